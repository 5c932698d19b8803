"""Weights that a smaller model needs in another size: norms over fewer channels, scaled embeddings.

A norm divides by the root of the mean square of its channels. Where a masked model has zeros among them, that
mean is smaller by a ratio of numbers, which the weights of the norm make up for. Called by shrink and config.
"""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from sparseprune.engine.kernels.formats import bits_of, values_of
from sparseprune.errors import CheckpointError
from sparseprune.removal.sections import path_shown
from sparseprune.spec.naming import EMBEDDINGS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.engine.grids import Shape
    from sparseprune.removal.counting import Counts
    from sparseprune.removal.sections import Path
    from sparseprune.removal.slices import KeptIndices

_PIECE = 1 << 14  # elements, some 50 bytes each while they are scaled
_SCALABLE = ("F64", "F32", "BF16", "F16")
_EPSILONS = ("rms_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "layernorm_epsilon")


class Scale(Struct, frozen=True):
    """What a weight is multiplied by, when the class has added `offset` to it."""

    factor: float
    offset: float = 0.0

    def applied(self, bits: NDArray[np.generic], dtype: str) -> NDArray[np.generic]:
        """The patterns of the scaled weights, each rounded once to its dtype; widened a piece at a time."""
        found = np.empty_like(bits)
        for begin in range(0, bits.size, _PIECE):
            piece = slice(begin, begin + _PIECE)
            values = values_of(bits[piece], dtype).astype(np.float64)
            found[piece] = bits_of((values + self.offset) * self.factor - self.offset, dtype)
        return found


def scales_of(
    counts: Counts, left: Mapping[str, KeptIndices], shapes: Mapping[str, Shape]
) -> dict[str, Scale]:
    """How the weights of a smaller checkpoint are scaled, by name; `left` are tensors that lose something."""
    hidden = None if counts.hidden is None else counts.sections[counts.hidden]
    found: dict[str, Scale] = {}
    for name, kept in left.items():
        for each in counts.of.get(name, ()):
            if each.dim not in kept.cut or each.dim is None:
                continue
            factor = sqrt(shapes[name][each.dim] / kept.shape[each.dim])
            if each.key != counts.hidden or hidden is None:
                found |= {name: Scale(factor)} if each.averaged else {}
                continue
            row, is_tied = hidden.architecture.hidden, hidden.value("tie_word_embeddings") is not False
            embedded = hidden.evaluated(row.embeddings)
            made_up = (
                is_tied
                and (embedded or hidden.evaluated(row.divided))
                and f".{name}".endswith(f".{row.last}")
            )
            if each.averaged and not made_up:
                found[name] = Scale(factor, row.offset)
            elif embedded and EMBEDDINGS.search(name.removesuffix(".weight")):
                found[name] = Scale(factor)
    return found


def scaled_keys(counts: Counts, values: Mapping[Path, int]) -> dict[Path, object]:
    """New values of keys that a class uses with the hidden size, where that changes."""
    if counts.hidden is None or counts.hidden not in values:
        return {}
    section, after = counts.sections[counts.hidden], values[counts.hidden]
    before = section.number(f"config.{path_shown(counts.hidden[len(section.path) :])}")
    found: dict[Path, object] = {}
    for key in () if section.architecture.hidden.shared else _EPSILONS:  # stands beside the mean of squares
        value = section.value(key)
        if isinstance(value, float) and after:
            found[section.path_of(key)] = float(f"{value * before / after:.12g}")
    for key in section.architecture.hidden.keys:
        value = section.value(key)
        if isinstance(value, int):
            whole, rest = divmod(value * after, before)
            if rest:
                text = f"{value} for {before} hidden channels is no integer for {after}"
                raise CheckpointError(f"config.json: {section.prefix}{key} {text}")
            found[section.path_of(key)] = whole
    for name, text in section.architecture.pinned.items():
        found[section.path_of(name)] = section.number(text)
    return found


def remarks_on(scales: Mapping[str, Scale]) -> Iterator[str]:
    """A line about weights that are scaled."""
    factors = sorted({scale.factor for scale in scales.values()})
    if factors:
        times = " or ".join(f"{factor:.6g}" for factor in factors)
        first = next(iter(scales))
        count = f"{len(scales)} weights, such as {first}, are" if len(scales) > 1 else f"{first} is"
        why = (
            "since they stand for fewer channels" if len(scales) > 1 else "since it stands for fewer channels"
        )
        yield f"{count} multiplied by {times}, {why}, and rounded"


def unscalable(scales: Mapping[str, Scale], tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    """A line for each tensor whose dtype cannot hold scaled weights."""
    for name in scales:
        if tensors[name].dtype not in _SCALABLE or tensors[name].codes is not None:
            yield f"{name} is {tensors[name].dtype}, and its weights would have to be scaled"
