"""How much memory a run takes at its peak, told before it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import prod
from sparseprune.pipeline.slabs import slabs_of

if TYPE_CHECKING:
    from sparseprune.pipeline.plan import Plan
    from sparseprune.pipeline.slabs import Slab

_PAIRWISE = 8  # blocks a scope that are compared all with all, without a search
_HISTOGRAM = 1 << 22  # blocks a scope from which on they are counted, not copied
_SEARCHED, _COUNTED = 24, 2  # bytes that each block costs then, positions in int64 among them
_INTERPRETER = 420 << 20  # Python with torch loaded, measured with torch 2.13 for the CPU
_FLOAT64 = 64 << 20  # a chunk of elements on the way to its norm or tally


def expected_peak(plan: Plan, jobs: int) -> int:
    """Bytes of resident memory, about: what is loaded, and the largest slabs with all that they need.

    A slab needs its weights, their keys, what the search for the k-th largest copies, and masks; with
    scores from elsewhere float64 values too.
    """
    largest = sorted((_slab_bytes(slab) for unit in plan.units for slab in slabs_of(unit)), reverse=True)
    return _INTERPRETER + sum(largest[:jobs]) + min(jobs, len(largest)) * _FLOAT64


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
