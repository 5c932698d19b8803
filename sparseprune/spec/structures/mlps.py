"""MLPs: the matrices that write and read the same channels, in layers and in experts.

Owns where the channels lie in each of them: fused, interleaved, inputs first, in stacks of experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from sparseprune.spec.naming import (
    ATTACHED,
    ATTENTION_EXPERTS,
    EXPERTS,
    INTERLEAVED,
    MERGERS,
    MLP_KEY_VALUE,
    MLPS,
)
from sparseprune.spec.structures.index import MATRIX, Structure, Units, of_all_experts, place_of
from sparseprune.spec.structures.matrices import inputs_first

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sparseprune.spec.bound import TensorInfo
    from sparseprune.spec.naming import MlpNames
    from sparseprune.spec.structures.index import Index, Numbers


def find_mlps(index: Index) -> list[Structure]:
    """MLPs inside numbered modules, of layers and of experts; units are channels."""
    found: dict[str, Structure] = {}  # by the matrix that reads
    taken: set[str] = set()
    for names in MLPS:
        for suffix in (MATRIX, ""):
            ending = f".{names.reads}{suffix}"
            for form in [each for each in index.forms if each.endswith(ending)]:
                base = form[: -len(ending)]
                if not _may_hold(base) or (names.reads == "value" and not MLP_KEY_VALUE.search(base)):
                    continue
                for numbers, reads in index.forms[form].items():
                    mlp = None if reads.name in taken else _mlp(index, names, (base, suffix), numbers)
                    if mlp is not None and taken.isdisjoint(each.tensor for each in mlp.parts):
                        found[reads.name] = mlp
                        taken.update(each.tensor for each in mlp.parts)
    return list(found.values())


def _may_hold(base: str) -> bool:
    """Whether an MLP of this module is one of layers, or stands behind them with as many channels."""
    if "*" not in base:
        return ATTACHED.search(base) is not None
    return MERGERS.search(base) is None and ATTENTION_EXPERTS.search(base) is None


def _mlp(index: Index, names: MlpNames, where: tuple[str, str], numbers: Numbers) -> Structure | None:
    """The MLP of a module; None where it lacks a matrix, or shapes do not fit."""
    base, suffix = where
    written = [index.forms.get(f"{base}.{each}{suffix}", {}).get(numbers) for each in names.writes]
    reads = index.forms[f"{base}.{names.reads}{suffix}"][numbers]
    writes = [each for each in written if each is not None]
    if len(writes) < len(names.writes) or len(reads.shape) not in (2, 3):
        return None
    if any(len(each.shape) != len(reads.shape) for each in writes):
        return None
    flipped = inputs_first(index, f"{base}.{names.writes[0]}{suffix}", numbers, writes[0].shape)
    sides = _flat_sides(index, names, base, numbers) if names.flat else _sides(writes, reads, flipped=flipped)
    if sides is None:
        return None
    out, into, channels, flat = sides
    stacked = len(reads.shape) == 3
    parts: list[Units] = []
    for name, each in zip(names.writes, writes, strict=True):
        parts += _halves(
            index, Units(each.name, name, out, channels, stacked=stacked, flat=flat), each.shape[out]
        )
    parts.append(Units(reads.name, names.reads, into, channels, stacked=stacked, flat=flat))
    for name in names.writes:
        bias = index.forms.get(f"{base}.{name}.bias" if suffix else f"{base}.{name}_bias", {}).get(numbers)
        if bias is not None:
            units = Units(bias.name, f"{name}.bias", len(bias.shape) - 1, channels, stacked=stacked)
            parts += _halves(index, units, bias.shape[-1])
    for name in names.beside:
        for end in ("weight", "bias"):
            beside = index.forms.get(f"{base}.{name}.{end}", {}).get(numbers)
            if beside is not None and beside.shape[0] == channels:
                parts.append(Units(beside.name, f"{name}.{end}", 0, channels))
    place = place_of(base, numbers)
    return Structure("mlp", of_all_experts(place) if stacked or flat > 1 else place, channels, tuple(parts))


def _sides(
    writes: Sequence[TensorInfo], reads: TensorInfo, *, flipped: bool
) -> tuple[int, int, int, int] | None:
    """The dimensions of the channels in what writes and in what reads, how many of them, in how many MLPs."""
    last = len(reads.shape) - 1
    out, into = (last, last - 1) if flipped else (last - 1, last)
    channels = reads.shape[into]
    if all(each.shape[out] in (channels, 2 * channels) for each in writes):
        return out, into, channels, 1
    return None


def _flat_sides(
    index: Index, names: MlpNames, base: str, numbers: Numbers
) -> tuple[int, int, int, int] | None:
    """As `_sides`, of matrices that have the channels of all experts as rows."""
    module = base.partition(f".{EXPERTS}")[0]
    router = index.shape(f"{module}.router.layer.weight", numbers)
    rows = {(index.shape(f"{base}.{each}", numbers) or (0,))[0] for each in (*names.writes, names.reads)}
    if router is None or len(rows) != 1 or f".{EXPERTS}" not in base:
        return None
    (count,), experts = rows, router[0]
    return (0, 0, count // experts, experts) if experts and count and count % experts == 0 else None


def _halves(index: Index, units: Units, size: int) -> Iterator[Units]:
    """The units of a matrix that writes channels: of gate and of up, where it is fused."""
    if size == units.count or units.flat > 1:
        yield units
    elif index.is_one_of(INTERLEAVED) or (units.stacked and _interleaved(index, units)):
        yield replace(units, size=2)
    else:
        head, _, tail = units.part.partition(".")
        end = f".{tail}" if tail else ""
        yield replace(units, part=f"{head}[gate]{end}")
        yield replace(units, part=f"{head}[up]{end}", begin=units.count)


def _interleaved(index: Index, units: Units) -> bool:
    """Of a model that no config names: stacks with biases are those of gpt-oss."""
    return not index.types and units.part.startswith("gate_up_proj") and units.tensor.endswith("_bias")
