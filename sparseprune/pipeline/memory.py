"""How much memory a run takes at its peak, told before it begins."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import prod
from sparseprune.pipeline.slabs import slabs_of
from sparseprune.spec import BoundScope

if TYPE_CHECKING:
    from sparseprune.pipeline.plan import Plan, WorkUnit
    from sparseprune.pipeline.slabs import Slab

_PAIRWISE = 16  # blocks a scope that are compared all with all, without a search
_HISTOGRAM = 1 << 24  # blocks a scope from which on they are counted, not copied
_SEARCHED, _COUNTED = 24, 3  # bytes that each block costs then, positions in int64 among them
_INTERPRETER = 260 << 20  # Python with torch loaded, measured with torch 2.13 for the CPU
_FLOAT64 = 8 << 20  # elements on the way to a norm or a tally, a chunk at a time


def expected_peak(plan: Plan, jobs: int) -> int:
    """Bytes of resident memory, about: what is loaded, and the largest slabs with all that they need.

    A slab needs its weights, their keys, what the search for the k-th largest copies, and masks; with
    scores from elsewhere float64 values too.
    """
    alike: defaultdict[tuple[object, ...], list[WorkUnit]] = defaultdict(list)
    for unit in plan.units:  # thousands of units have a handful of forms
        alike[_form(unit)].append(unit)
    slabs = sorted(
        ((_slab_bytes(slab), len(units)) for units in alike.values() for slab in slabs_of(units[0])),
        reverse=True,
    )
    largest = [size for size, count in slabs for _ in range(min(count, jobs))][:jobs]
    return _INTERPRETER + sum(largest) + len(largest) * _FLOAT64


def _form(unit: WorkUnit) -> tuple[object, ...]:
    """What the memory of a unit depends on."""
    tasks = (
        (
            tuple((leaf.view_shape, leaf.shape) for leaf in task.instance.scope.leaves),
            task.instance.score.kind,
            task.instance.soft is None,
            tuple((one.stored.shape, one.stored.dtype) for one in task.inputs),
            task.instance.scope.shape if isinstance(task.instance.scope, BoundScope) else None,
        )
        for task in unit.tasks
    )
    return (tuple((stored.dtype, stored.shape) for stored in unit.tensors), *tasks)


def _slab_bytes(slab: Slab) -> int:
    total = 0
    passing = 0  # what one tensor at a time needs: it is counted, its mask is laid out
    wide = any(task.instance.score.kind != "magnitude" or task.instance.soft for task in slab.tasks)
    for piece in slab.pieces:
        size = piece.end - piece.begin
        numel = size * 8 // DTYPES[piece.stored.dtype].bits
        total += 2 * size + (27 if wide else 3) * numel
        passing = max(passing, size + numel)
    for task in slab.tasks:
        scope = task.instance.scope
        if scope.blocks_per_scope > _PAIRWISE:
            blocks = prod(scope.grid_shape) * scope.blocks_per_scope
            total += (_SEARCHED if scope.blocks_per_scope < _HISTOGRAM else _COUNTED) * blocks
    read = sum(piece.end - piece.begin for inputs in slab.inputs for _, piece in inputs)
    return total + passing + read
