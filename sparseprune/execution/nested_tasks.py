"""Tasks of nested scopes that are decided together, in memory: by their scores, or as one projection.

Owns masks of whole tensors that pass from level to level, and what members without statistics follow. Called
by reconstruct. Imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from msgspec.structs import replace

from sparseprune.engine import View
from sparseprune.engine.grids import prod
from sparseprune.engine.projections import Level, nested_projection
from sparseprune.execution.regions import whole_part
from sparseprune.execution.torch_tiles import Tile, build_scope, only, parts_at, read_parts

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch import Tensor

    from sparseprune.engine.projections import NestedProjection
    from sparseprune.execution.passes import Outcome
    from sparseprune.execution.plan import Task
    from sparseprune.execution.tensor_io import Loaded, TensorIO
    from sparseprune.spec import BoundBlock

    Kept = dict[str, Tensor]  # by tensor, bool, flat: what is kept


def seen(flat: Tensor, leaf: BoundBlock) -> Tensor:
    """The elements of a tensor as a leaf sees them, sharing memory."""
    return flat.as_strided(leaf.view_shape, leaf.view_stride, leaf.view_offset)


def all_kept(tasks: Sequence[Task], io: TensorIO) -> Kept:
    """Masks of all tensors that some tasks reach, all True."""
    names = dict.fromkeys(leaf.tensor for task in tasks for leaf in task.instance.scope.leaves)
    return {name: torch.ones(io.tensors[name].numel, dtype=torch.bool) for name in names}


def decide(tasks: Sequence[Task], io: TensorIO) -> Kept:
    """What tasks keep by their scores, each among what those before it keep."""
    kept = all_kept(tasks, io)
    decided: set[str] = set()
    for task in tasks:
        scope = task.instance.scope
        parts = parts_at(scope, whole_part(scope.grid_shape))
        read = read_parts(task, parts, io, counts=False)
        loaded = {
            leaf: _inside(one, kept[leaf.tensor]) if leaf.tensor in decided else one
            for leaf, one in read.loaded.items()
        }
        tile = Tile(task, scope, parts, io, replace(read, loaded=loaded))
        masks = tile.decide()
        for spec, one in tile.leaves():
            seen(kept[one.region.leaf.tensor], one.region.leaf).copy_(masks[spec])
            decided.add(one.region.leaf.tensor)
    return kept


def _inside(loaded: Loaded, kept: Tensor) -> Loaded:
    order = loaded.region.storage_order
    mask = seen(kept, loaded.region.leaf).permute(*order).contiguous()
    return loaded.inside(mask.reshape(-1).numpy().view(np.uint8))


def project_onto(tasks: Sequence[Task], params: Mapping[str, Tensor]) -> NestedProjection:
    """One projection for all tasks, over contiguous tensors; fused blocks have the members among these.

    Those that are not rebuilt for a task, as its blocks hold whole rows of them, have no say in it.
    """
    levels = []
    for task in tasks:
        budget = task.instance.budget
        views = {
            leaf: View(params[leaf.tensor], leaf.view_shape, leaf.view_stride, leaf.view_offset)
            for leaf in task.instance.scope.leaves
            if leaf.tensor in params
        }
        scope = build_scope(only(task.instance.scope, frozenset(views)), views)
        nnz = budget.nnz if budget.share is None else None
        blocks = dict(zip(views, scope.blocks(), strict=True))
        told = task.with_role("moment").keys() or params.keys()
        silent = tuple([block for leaf, block in blocks.items() if leaf.tensor not in told])
        levels.append(Level(scope, nnz, budget.share, budget.multiple_of, silent))
    return nested_projection(levels, list(params.values()))


def follow(tasks: Sequence[Task], kept: Kept, known: Collection[str]) -> None:
    """Tensors that took no part lose the blocks of which nothing is left in those that are `known`."""
    for task in tasks:
        if all(leaf.tensor in known for leaf in task.instance.scope.leaves):
            continue
        for leaf, mask in blocks_left(task, kept, known).items():
            if leaf.tensor not in known:
                seen(kept[leaf.tensor], leaf).logical_and_(mask)


def blocks_left(task: Task, kept: Kept, known: Collection[str]) -> dict[BoundBlock, Tensor]:
    """Masks by leaf of the blocks of which masks of `known` tensors keep an element."""
    scope = task.instance.scope
    views = {leaf: seen(kept[leaf.tensor], leaf) for leaf in scope.leaves}
    # The engine has no blocks of bools, and looks at nothing but their shapes here.
    engine = build_scope(scope, {leaf: mask.view(torch.int8) for leaf, mask in views.items()})
    among = {
        spec: views[leaf] if leaf.tensor in known else torch.zeros_like(views[leaf])
        for spec, leaf in zip(engine.blocks(), scope.leaves, strict=True)
    }
    masks = engine.get_masks(0, block_mask=engine.left(among))
    return {leaf: masks[spec] for spec, leaf in zip(engine.blocks(), scope.leaves, strict=True)}


def share_out(outcomes: Sequence[Outcome], tasks: Sequence[Task], kept: Kept) -> list[Outcome]:
    """Outcomes of whole tensors, and what each of the tasks reached and dropped of them.

    The blocks of outer tasks are dropped where nothing of them is left.
    """
    outer = {task.instance.within for task in tasks}
    rows: list[Outcome] = []
    inner = dict.fromkeys(kept, 0)
    for task in tasks:
        found = blocks_left(task, kept, kept.keys()) if task.rule in outer else {}
        for leaf in task.instance.scope.leaves:
            mask = found[leaf] if task.rule in outer else seen(kept[leaf.tensor], leaf)
            dropped = mask.numel() - int(mask.sum())
            rows.append([leaf.tensor, task.rule, prod(leaf.view_shape), dropped, 0, 0.0, 0, 0.0])
            inner[leaf.tensor] += 0 if task.rule in outer else dropped
    whole = [[name, "", numel, dropped - inner[name], *rest] for name, _, numel, dropped, *rest in outcomes]
    return [*whole, *rows]
