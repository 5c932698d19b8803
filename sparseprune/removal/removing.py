"""Removing: from what masks keep to what is left: names, shapes, the config, or why that cannot be.

Owns the verdict. Pure: reads no data. Called by the command line with what was decided, and with what a plan
presumes.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sparseprune.engine.grids import prod
from sparseprune.removal.claiming import Dense
from sparseprune.removal.configuring import Change, check_shapes, configure
from sparseprune.removal.membership import find_vanished, numbered
from sparseprune.removal.refusing import refuse

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sparseprune.engine.grids import Shape
    from sparseprune.removal.slices import Kept


@dataclass(frozen=True, slots=True)
class Left:
    """A tensor that stays, under its new name; `kept` is None where all of it does."""

    name: str
    shape: Shape
    kept: Kept | None


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
    kept: Mapping[str, Kept],
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


def _torn(dropped: Mapping[str, Kept]) -> Iterator[str]:
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
