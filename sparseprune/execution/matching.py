"""Matching: which mask is for which tensor of a checkpoint, and what has no counterpart.

Owns the rules by which a name is missing, and the words for all that does not fit. Reads no tensor data.
Called by the command line for whatever looks at a checkpoint through masks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from sparseprune.checkpoint.documents import shown
from sparseprune.engine.dtypes import DTYPES
from sparseprune.errors import CheckpointError
from sparseprune.spec.problems import nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from sparseprune.checkpoint import Checkpoint, MaskSet, Provenance, StoredMask, StoredTensor

_TOLD = 10  # names of one kind, then how many more there are
_LOOKED_AT = 2000  # names that one is compared with letter by letter
_PRUNABLE = ", ".join(row.name for row in DTYPES.values() if row.prunable)


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor and its mask, of one shape."""

    stored: StoredTensor
    mask: StoredMask


@dataclass(frozen=True, slots=True)
class Matched:
    """Tensors with their masks, in the order of the checkpoint; names without a counterpart that are let be.

    `unused` are masks whose tensor is not there, `unmasked` tensors that should have a mask and have none.
    """

    checkpoint: Checkpoint = field(repr=False)
    masks: MaskSet = field(repr=False)
    pairs: tuple[Pair, ...]
    unused: tuple[str, ...] = ()
    unmasked: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that have masks."""
        return sum(pair.stored.nbytes for pair in self.pairs)


def match_masks(
    checkpoint: Checkpoint, masks: MaskSet, origin: Provenance | None, *, partial: bool
) -> Matched:
    """Give every tensor its mask.

    A tensor must have one if the report of the run that made the masks lists it; where there is no such
    report, if its like in another layer has one: their names differ in pieces that are numbers. So must a
    name that an index of masks lists. `partial` lets be what has no counterpart, but not what does not fit.

    Raises:
        CheckpointError: names without a counterpart, other shapes, dtypes that cannot be pruned; all of them.
    """
    tensors = checkpoint.tensors
    pairs = [Pair(tensors[name], masks.masks[name]) for name in tensors if name in masks.masks]
    unused = [name for name in masks.masks if name not in tensors]
    why_missing = _missing(checkpoint, masks, origin)
    lines = [*_unfit(checkpoint, masks, pairs)]
    if not partial:
        free = [name for name in tensors if name not in masks.masks]
        lines += _first_ten(
            unused,
            lambda name: (
                f"{masks.path}: mask {shown(name)} is for no tensor of {checkpoint.path}{_near(name, free)}"
            ),
            f"{masks.path}: {{}} more masks are for no tensor of {checkpoint.path}",
        )
        lines += _first_ten(
            list(why_missing),
            lambda name: (
                f"{checkpoint.path}: tensor {shown(name)} has no mask, {why_missing[name]}"
                f"{_near(name, unused)}"
            ),
            f"{checkpoint.path}: {{}} more tensors have no mask",
        )
        if unused or why_missing:
            lines.append("give the masks of this checkpoint, or --partial to let be what has no counterpart")
    elif masks.masks and not pairs:
        some = next(iter(masks.masks))
        near = _near(some, list(tensors))
        lines.append(
            f"{masks.path}: no mask is for any tensor of {checkpoint.path}, such as {shown(some)}{near}; "
            "give the masks of this checkpoint"
        )
    if lines:
        raise CheckpointError(*lines)
    return Matched(checkpoint, masks, tuple(pairs), tuple(unused), tuple(why_missing))


def _unfit(checkpoint: Checkpoint, masks: MaskSet, pairs: Sequence[Pair]) -> Iterator[str]:
    """What can never be done: a mask of another shape, elements of which no pattern need be zero."""
    reshaped = {pair.stored.name: pair for pair in pairs if pair.mask.shape != pair.stored.shape}
    yield from _first_ten(
        list(reshaped),
        lambda name: (
            f"{masks.path}: mask {shown(name)} has the shape {shown(list(reshaped[name].mask.shape))}, the "
            f"tensor in {checkpoint.path} {shown(list(reshaped[name].stored.shape))}; give the "
            "masks of this checkpoint"
        ),
        f"{masks.path}: {{}} more masks have another shape than their tensors",
    )
    other = {pair.stored.name: pair.stored for pair in pairs if not DTYPES[pair.stored.dtype].prunable}
    yield from _first_ten(
        list(other),
        lambda name: (
            f"{checkpoint.path}: tensor {shown(name)}, which has a mask, is {other[name].dtype}, and need "
            f"not be zero where its bits are; wanted one of {_PRUNABLE}: leave its mask out"
        ),
        f"{checkpoint.path}: {{}} more tensors with masks cannot be pruned",
    )


def _missing(checkpoint: Checkpoint, masks: MaskSet, origin: Provenance | None) -> dict[str, str]:
    """The names that should have a mask and have none, and why; tensors of the checkpoint stand first."""
    why: dict[str, str] = {}
    if origin is not None:
        why = {name: f"but {origin.report} lists it" for name in origin.tensors if name not in masks.masks}
    else:
        alike = {_kind(name, len(mask.shape)): name for name, mask in reversed(list(masks.masks.items()))}
        for name, stored in checkpoint.tensors.items():
            like = alike.get(_kind(name, len(stored.shape)))
            if like is not None and name not in masks.masks:
                why[name] = f"but {shown(like)} has one"
    for name, place in masks.missing.items():
        why[name] = f"but the index of {masks.path} lists one in {place}"
    places = {name: place for place, name in enumerate(checkpoint.tensors)}
    return {name: why[name] for name in sorted(why, key=lambda name: (places.get(name, len(places)), name))}


def _kind(name: str, rank: int) -> tuple[str, int]:
    """What is alike in all layers of a name: pieces that are numbers count as one."""
    return ".".join("*" if piece.isdigit() else piece for piece in name.split(".")), rank


def _first_ten(names: Sequence[str], line: Callable[[str], str], more: str) -> list[str]:
    lines = [line(name) for name in names[:_TOLD]]
    return lines if len(names) <= _TOLD else [*lines, more.format(f"{len(names) - _TOLD:,}")]


def _near(name: str, others: Sequence[str]) -> str:
    """The name that was meant, as words; nothing where none is near."""
    near = max(_longer_or_shorter(name, others), key=len, default=None)
    if near is None:
        near = next(iter(nearest(name, islice(others, _LOOKED_AT), cutoff=0.8)), None)
    return "" if near is None else f"; the nearest name is {shown(near)}"


def _longer_or_shorter(name: str, others: Iterable[str]) -> Iterator[str]:
    """Names that are this one but for pieces in front of it: `model.`, `base_model.model.`."""
    return (other for other in others if f".{other}".endswith(f".{name}") or name.endswith(f".{other}"))
