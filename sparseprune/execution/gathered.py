"""Gathered: small scopes of one tensor that do not lie together; a copy in their order is decided.

N:M down the columns, blocks of more than one row, coupled elements, transposed views. The copy goes through
the same compiled loops as runs; the decision goes back to where the elements lie.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.kernels.formats import FORMATS
from sparseprune.engine.kernels.selecting import cut_blocks
from sparseprune.engine.tally import tally
from sparseprune.execution.cells import block_part, boxes_of, cells, members_of
from sparseprune.execution.deciding import keep_by_patterns, keep_by_scores
from sparseprune.execution.outcomes import Outcome, finish
from sparseprune.execution.programs import Item, Program
from sparseprune.execution.ranking import Ranking, refuse_nonfinite
from sparseprune.spec import BoundScope

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sparseprune.execution.boxes import Box
    from sparseprune.execution.plan import Task
    from sparseprune.execution.programs import Setting
    from sparseprune.execution.recipes import Gathered
    from sparseprune.execution.tensor_io import Bits, Loaded, Mask


def run_program(task: Task, recipe: Gathered, setting: Setting) -> Program:
    """One step: all cells of scopes, each decided, cut and written on its own."""
    ranking = Ranking(task, setting.traffic)
    scope = task.instance.scope
    if not isinstance(scope, BoundScope):
        raise TypeError(f"{task.instance.label} couples scopes")
    (leaf,) = scope.leaves

    def prune(box: Box) -> list[Outcome]:
        loaded = setting.traffic.load(box)
        before = tally(loaded.flat, box.stored.dtype)
        mask, mask_view = loaded.masked()
        keep = _decide(loaded, scope, recipe, ranking)
        spread = _in_scopes(mask_view, scope)
        spread[...] = keep.reshape(spread.shape[: -len(leaf.shape)] + (1,) * len(leaf.shape))
        cut_blocks(loaded.flat, mask, 1, mask)
        setting.traffic.store(loaded, mask)
        return [finish(task, box.stored, before, loaded.flat, mask)]

    def items() -> Iterator[Item]:
        ((member, order),) = members_of(scope)
        for number, cell in enumerate(cells(scope, recipe.tile)):
            (box,) = boxes_of(leaf, block_part(member, order, cell), setting.tensors).values()
            yield Item(lambda box=box: prune(box), box.nbytes, recipe.memory, str(number))  # type: ignore[misc]

    yield items()


def _decide(loaded: Loaded, scope: BoundScope, recipe: Gathered, ranking: Ranking) -> Mask:
    """Bytes, one a block, scope after scope."""
    elements = ranking.elements(loaded)
    refuse_nonfinite(loaded, elements)
    if elements is not None:
        magnitudes = np.ascontiguousarray(_in_scopes(elements.magnitudes(), scope))
        return keep_by_scores(magnitudes.reshape(-1), recipe.contest)
    ordered: Bits = np.ascontiguousarray(_in_scopes(loaded.view, scope)).reshape(-1)
    return keep_by_patterns(ordered, FORMATS[loaded.box.stored.dtype], recipe.contest)


def _in_scopes(view: Bits, scope: BoundScope) -> Bits:
    """Elements as the leaf sees them as (scopes..., blocks of a scope..., elements of a block...)."""
    (leaf,) = scope.leaves
    rank = len(leaf.shape)
    split = [
        part
        for size, extent, blocks in zip(view.shape, leaf.shape, scope.shape, strict=True)
        for part in (size // (extent * blocks), blocks, extent)
    ]
    order = [3 * dim + part for part in range(3) for dim in range(rank)]
    return view.reshape(split).transpose(order)
