"""Shrinking: kept indices of every tensor become new shapes, names and config."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseprune.engine.grids import prod
from sparseprune.errors import CheckpointError
from sparseprune.execution.scope_order import by_leaf
from sparseprune.removal.config import Change, check_shapes, configure
from sparseprune.removal.dim_constraints import Dense, find_vanished, numbered, refuse
from sparseprune.removal.slices import KeptIndices, kept_slices
from sparseprune.spec import BoundScope

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.engine.grids import Shape
    from sparseprune.removal.preview import Look, Sliced
    from sparseprune.spec import BoundBlock, BoundInstance

    Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Left:
    """A tensor that stays, under its new name; `kept` is None where all of it does."""

    name: str
    shape: Shape
    kept: KeptIndices | None


@dataclass(frozen=True, slots=True)
class Removal:
    """What is left of a checkpoint, by the names that tensors had; `config` None where it stays as it is.

    `remarks` are lines of what may no longer be true in files that say something of the model.
    """

    left: Mapping[str, Left]
    config: Mapping[str, Any] | None
    changes: tuple[Change, ...]
    remarks: tuple[str, ...] = ()


def make_removal(
    shapes: Mapping[str, Shape],
    kept: Mapping[str, KeptIndices],
    config: Mapping[str, Any] | None,
    *,
    exact: bool = True,
    beside: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> Removal:
    """What is left of tensors of these shapes where masks keep what `kept` says; others are kept whole.

    `exact` False: only numbers count, and not which units they are. `beside` are other documents that say
    something of the model, by the names of their files.

    Raises:
        CheckpointError: masks that are not made of whole slices, or a model that no class can express.
    """
    dropped = {name: each for name, each in kept.items() if not each.is_whole}
    empty = [name for name, each in dropped.items() if each.is_empty]
    vanished = find_vanished((name for name, shape in shapes.items() if prod(shape)), frozenset(empty))
    refuse([*_torn(dropped), *_orphans(vanished.orphans, shapes, frozenset(empty))])
    if not dropped:
        return Removal({name: Left(name, shape, None) for name, shape in shapes.items()}, None, ())
    # What has no elements has no mask, and goes with what it belongs to.
    gone = frozenset(empty) | {
        name for name, shape in shapes.items() if not prod(shape) and vanished.takes(name)
    }
    configured = configure(config, Dense(shapes, dropped, vanished, gone, exact), beside)
    everything = {**dropped, **configured.followers}
    left = {
        name: Left(
            vanished.renamed(name),
            everything[name].shape if name in everything else shape,
            everything.get(name),
        )
        for name, shape in shapes.items()
        if name not in gone
    }
    check_shapes(
        configured.config,
        [change.key for change in configured.changes],
        {each.name: each.shape for each in left.values()},
    )
    return Removal(left, configured.config, configured.changes, configured.remarks)


def _torn(dropped: Mapping[str, KeptIndices]) -> Iterator[str]:
    for name, each in dropped.items():
        if not each.is_sliced:
            yield (
                f"{name}: its mask is not made of whole slices along its dimensions, so that nothing can be "
                "cut out; apply writes zeros"
            )


def _orphans(names: tuple[str, ...], shapes: Mapping[str, Shape], empty: frozenset[str]) -> Iterator[str]:
    """Tensors of which nothing is left, and for each what of the same layer or expert stays."""
    staying: dict[tuple[str, int], str] = {}
    for name in shapes if names else ():
        if name not in empty:
            for before, number, _ in numbered(name):
                staying.setdefault((before, number), name)
    for name in names:
        members = [(before, number) for before, number, _ in numbered(name)]
        stays = next((staying[member] for member in reversed(members) if member in staying), None)
        since = "" if stays is None else f", since {stays} stays"
        yield (
            f"{name}: nothing of its {list(shapes[name])} is kept, and it belongs to no layer or expert that "
            f"is dropped as a whole{since}: couple all tensors of one"
        )


@dataclass(frozen=True, slots=True)
class Imagined:
    """The shapes of what is left, None for nothing; of the whole checkpoint, or the problems in the way."""

    shapes: Mapping[str, Shape | None]
    removal: Removal | None
    problems: tuple[str, ...]


def imagine(
    tensors: Mapping[str, StoredTensor],
    instances: Iterable[BoundInstance],
    look: Look,
    config: Mapping[str, Any] | None,
    beside: Mapping[str, Mapping[str, Any]],
) -> Imagined:
    """What would be left; `look` has every leaf of the instances as slices; `beside` as in `make_removal`."""
    shapes = {name: stored.shape for name, stored in tensors.items()}
    leaves = (found for instance in instances for found in _first_ones(instance))
    kept = kept_of(leaves, look, shapes)
    became = {
        name: None if each.is_empty and not each.is_whole else each.shape for name, each in kept.items()
    }
    try:
        return Imagined(became, make_removal(shapes, kept, config, exact=False, beside=beside), ())
    except CheckpointError as error:
        return Imagined(became, None, error.args)


def _first_ones(instance: BoundInstance) -> Iterator[tuple[BoundBlock, Flags]]:
    """For every leaf that would lose any the blocks that survive, flat: the first ones of each scope."""
    scope, nnz = instance.scope, instance.budget.nnz
    if (
        not isinstance(scope, BoundScope)
        and prod(scope.grid_shape) == 1
        and scope.blocks_per_scope == len(scope.members)
    ):
        for member in scope.members[nnz:]:  # each a single block
            yield from ((leaf, np.zeros(1, dtype=np.bool_)) for leaf in member.leaves)
        return
    keep = np.zeros((prod(scope.grid_shape), scope.blocks_per_scope), dtype=np.bool_)
    keep[:, :nnz] = True
    for leaf, blocks in by_leaf(scope, keep).items():
        if not blocks.all():
            yield leaf, np.ascontiguousarray(blocks).reshape(-1)


def kept_of(
    leaves: Iterable[tuple[BoundBlock, Flags]], look: Look, shapes: Mapping[str, Shape]
) -> dict[str, KeptIndices]:
    """What tensors keep where these blocks of their leaves survive, flat; leaves without slices are left out.

    Several leaves may share a tensor: an index is kept where all of them keep it.
    """
    kept: dict[str, KeptIndices] = {}
    known: dict[tuple[Shape, Sliced, bytes], KeptIndices] = {}  # thousands of tensors lose the same
    for leaf, blocks in leaves:
        found, name = look(leaf), leaf.tensor
        if found is None:
            continue
        key = (shapes[name], found, blocks.tobytes())
        if key not in known:
            known[key] = _of_leaf(shapes[name], found, blocks)
        kept[name] = known[key] if name not in kept else _both(kept[name], known[key])
    return {name: _nothing(each) if each.is_empty and each.cut else each for name, each in kept.items()}


def _of_leaf(shape: Shape, found: Sliced, blocks: Flags) -> KeptIndices:
    """What a tensor keeps of which these blocks survive; one without dimensions is kept or not."""
    if not shape:
        return KeptIndices((), int(blocks.all()))
    along = [np.ones(size, dtype=np.bool_) for size in shape]
    if along[found.dim].size:
        along[found.dim] = found.kept(blocks)
    return kept_slices(along)


def _both(one: KeptIndices, other: KeptIndices) -> KeptIndices:
    """What two rules leave of a tensor, each of which drops something."""
    return kept_slices([first & second for first, second in zip(one.along, other.along, strict=True)])


def _nothing(kept: KeptIndices) -> KeptIndices:
    """No index survives along any dimension, as a mask without survivors says it."""
    return KeptIndices(tuple(np.zeros(flags.size, dtype=np.bool_) for flags in kept.along), 0)
