"""Tiled: whole scopes in the torch engine, a tile of them at one time: the way that is always right.

Every structure, dtype, score and mode whose scopes fit in memory; soft thresholds; any torch device. The
compiled ways are tested equal to this one. Imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparseprune.engine.block import zero_pruned
from sparseprune.execution.cells import block_part, cells, members_of
from sparseprune.execution.programs import Item, Program
from sparseprune.execution.ranking import Ranking
from sparseprune.execution.recipes import alone
from sparseprune.execution.tensors import (
    build_scope,
    element_values,
    load_tile,
    rescued_scores,
    store_tile,
    stream_of,
    tensor_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.engine import BlockSpec, SparseScope
    from sparseprune.execution.cells import AnyBlock, AnyScope, Part
    from sparseprune.execution.outcomes import Outcome
    from sparseprune.execution.plan import Task
    from sparseprune.execution.programs import Setting
    from sparseprune.execution.recipes import Tiled
    from sparseprune.execution.tensors import Tile


def run_program(task: Task, recipe: Tiled, setting: Setting) -> Program:
    """One step: all tiles, each decided, cut and written on its own."""
    ranking = Ranking(task, setting.traffic)
    scope = task.instance.scope if task.instance.budget.nnz is not None else alone(task.instance.scope)

    def prune(parts: Sequence[tuple[AnyBlock, Part]]) -> list[Outcome]:
        with stream_of(setting.device):
            tile = load_tile(parts, setting)
            engine = build_scope(scope, tile.views)
            masks = _pruned(task, engine, parts, tile, ranking)
            by_leaf = {leaf: masks[spec] for leaf, spec in zip(scope.leaves, engine.blocks(), strict=True)}
            return store_tile(task, tile, by_leaf, setting)

    def items() -> Iterator[Item]:
        element_bytes = max(stored.nbytes // max(1, stored.numel) for stored in _stored(scope, setting))
        for number, cell in enumerate(cells(scope, recipe.tile)):
            parts = [(member.block, block_part(member, order, cell)) for member, order in members_of(scope)]
            size = sum(part.numel * block.numel_per_block for block, part in parts) * element_bytes
            yield Item(lambda parts=parts: prune(parts), size, recipe.memory, str(number))  # type: ignore[misc]

    yield items()


def shrink(
    engine: SparseScope,
    task: Task,
    tile: Tile,
    ranking: Ranking,
    limits: Tensor | float,
) -> dict[BlockSpec, Tensor]:
    """Soft thresholding in place; gives the masks, True where a block is not zero afterwards."""
    soft = task.instance.soft
    if soft is None:
        raise TypeError(f"{task.instance.label} is not soft")
    diagonals = {}
    for spec, one in zip(engine.blocks(), tile.loaded.values(), strict=True):
        elements = ranking.conditioners(one.box)
        if elements is not None:
            diagonals[spec] = tensor_of(elements, tile.flat[one.box.leaf].device)
    engine.soft_threshold(limits, diagonals or None, soft.scale, soft.max_iter, soft.atol, soft.eps)
    return engine.get_masks(0, block_mask=engine.block_norms() > 0)


def block_scores(
    engine: SparseScope, parts: Sequence[tuple[AnyBlock, Part]], tile: Tile, ranking: Ranking
) -> Tensor | None:
    """Ready scores by scope, None where elements are ranked by themselves."""
    if ranking.prunes_nonfinite:
        return rescued_scores(engine, tile, ranking)
    grids = [ranking.block_scores(block, part) for block, part in parts]
    ready = [torch.from_numpy(grid) for grid in grids if grid is not None]
    return engine.gather(ready) if ready else None


def _pruned(
    task: Task, engine: SparseScope, parts: Sequence[tuple[AnyBlock, Part]], tile: Tile, ranking: Ranking
) -> dict[BlockSpec, Tensor]:
    """Decide and write in memory; gives the masks, True where a weight is kept."""
    budget = task.instance.budget
    if task.instance.soft is not None:
        element_values(engine, tile, ranking)
        limits = (
            budget.threshold
            if budget.nnz is None
            else engine.soft_budget(budget.nnz, task.instance.soft.k_weight)
        )
        return shrink(engine, task, tile, ranking, 0.0 if limits is None else limits)
    masks = decide(task, engine, parts, tile, ranking)
    zero_pruned(masks)
    return masks


def decide(
    task: Task, engine: SparseScope, parts: Sequence[tuple[AnyBlock, Part]], tile: Tile, ranking: Ranking
) -> dict[BlockSpec, Tensor]:
    """The masks of hard thresholding, True where a weight is kept; nothing is written."""
    budget = task.instance.budget
    scores = block_scores(engine, parts, tile, ranking)
    values = None if scores is not None else element_values(engine, tile, ranking)
    single = all(spec.block.numel_per_block() == 1 for spec, _ in engine.members)
    if scores is None and not single and (ranking.norm != 2 or ranking.rms):
        scores = engine.block_norms(values, ranking.norm, rms=ranking.rms)
    if budget.nnz is not None:
        return engine.get_masks(budget.nnz, values, scores)
    return engine.threshold_masks(budget.threshold or 0.0, values, scores)


def _stored(scope: AnyScope, setting: Setting) -> Iterator[StoredTensor]:
    return (setting.tensors[leaf.tensor] for leaf in scope.leaves)
