"""Shrinking: kept indices of every tensor become new shapes, names and config.

Owns what must be refused whatever the model. Reads no data. Called by the command line and the preview.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sparseprune.checkpoint import ResizedTensor
from sparseprune.engine.grids import prod
from sparseprune.removal.config import Change, check_shapes, configure
from sparseprune.removal.dim_constraints import CutModel, refuse
from sparseprune.removal.module_lists import numbered, removed_members

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sparseprune.engine.grids import Shape
    from sparseprune.removal.slices import KeptIndices


@dataclass(frozen=True, slots=True)
class Removal:
    """What is left of a checkpoint, by the old names of tensors; `kept` has the indices of cut ones.

    `config` is None where it stays as it is. `remarks` are lines about statements in other files that may no
    longer be true.
    """

    left: Mapping[str, ResizedTensor]
    kept: Mapping[str, KeptIndices] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    changes: tuple[Change, ...] = ()
    remarks: tuple[str, ...] = ()


def make_removal(
    shapes: Mapping[str, Shape],
    kept: Mapping[str, KeptIndices],
    config: Mapping[str, Any] | None,
    *,
    exact: bool = True,
    beside: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> Removal:
    """What is left of tensors of these shapes where masks keep the indices in `kept`; others are kept whole.

    `exact` False: only the numbers of kept units are known, not which they are. `beside` are other documents
    about the model, by the names of their files.

    Raises:
        CheckpointError: masks that are not made of whole slices, or a model that no class can express.
    """
    cut = {name: each for name, each in kept.items() if not each.is_whole}
    empty = frozenset(name for name, each in cut.items() if each.is_empty)
    removed = removed_members((name for name, shape in shapes.items() if prod(shape)), empty)
    refuse([*_not_sliced(cut), *_orphans(removed.orphans, shapes, empty)])
    if not cut:
        return Removal({name: ResizedTensor(name, shape, whole=True) for name, shape in shapes.items()})
    # Tensors without elements have no mask; they go with the layer or expert that they belong to.
    gone = empty | {name for name, shape in shapes.items() if not prod(shape) and removed.has(name)}
    configured = configure(config, CutModel(shapes, cut, removed, gone, exact), beside)
    left_of = {name: each for name, each in {**cut, **configured.followers}.items() if name not in gone}
    left = {
        name: ResizedTensor(
            removed.renamed(name),
            left_of[name].shape if name in left_of else shape,
            whole=name not in left_of,
        )
        for name, shape in shapes.items()
        if name not in gone
    }
    changed = [change.key for change in configured.changes]
    check_shapes(configured.config, changed, {each.name: each.shape for each in left.values()})
    return Removal(left, left_of, configured.config, configured.changes, configured.remarks)


def _not_sliced(cut: Mapping[str, KeptIndices]) -> Iterator[str]:
    for name, each in cut.items():
        if not each.is_sliced:
            yield (
                f"{name}: its mask is not made of whole slices along its dimensions, so that nothing can be "
                "cut out; apply writes zeros"
            )


def _orphans(names: tuple[str, ...], shapes: Mapping[str, Shape], empty: frozenset[str]) -> Iterator[str]:
    """Tensors of which nothing is left, each with a tensor of the same layer or expert that stays."""
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
