"""Runs: scopes that lie one after the other in the storage, each small, decided by compiled loops.

N:M along the rows, blocks along rows, whole rows, and everything that a threshold decides alone. Any cut
between scopes will do. Chosen by recipes.py, which holds the conditions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.kernels.counting import first_nonfinite
from sparseprune.engine.kernels.formats import FORMATS
from sparseprune.engine.kernels.selecting import cut_below, cut_blocks
from sparseprune.engine.tally import tally
from sparseprune.execution.boxes import Box, flat_leaf
from sparseprune.execution.deciding import keep_by_patterns, keep_by_scores
from sparseprune.execution.outcomes import Outcome, finish
from sparseprune.execution.programs import Item, Program
from sparseprune.execution.ranking import Elements, Ranking, nonfinite_error, refuse_nonfinite

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sparseprune.execution.plan import Task
    from sparseprune.execution.programs import Setting
    from sparseprune.execution.recipes import Contest, Runs
    from sparseprune.execution.tensor_io import Loaded, Mask


def run_program(task: Task, recipe: Runs, setting: Setting) -> Program:
    """One step: all slabs, each decided, cut and written on its own."""
    ranking = Ranking(task, setting.traffic)

    def prune(box: Box) -> list[Outcome]:
        loaded = setting.traffic.load(box)
        mask = np.empty(loaded.flat.size, dtype=np.uint8)
        before = tally(loaded.flat, box.stored.dtype)
        _cut(loaded, recipe.contest, ranking, mask)
        setting.traffic.store(loaded, mask)
        return [finish(task, box.stored, before, loaded.flat, mask)]

    def items() -> Iterator[Item]:
        for number, box in enumerate(_slabs(task, recipe, setting)):
            yield Item(lambda box=box: prune(box), box.nbytes, recipe.memory, str(number))  # type: ignore[misc]

    yield items()


def _slabs(task: Task, recipe: Runs, setting: Setting) -> Iterator[Box]:
    """Ranges of whole scopes, as boxes of the leaf seen flat."""
    (leaf,) = task.instance.scope.leaves
    stored, flat = setting.tensors[leaf.tensor], flat_leaf(leaf)
    (size,) = flat.view_shape
    for begin in range(0, size, recipe.slab):
        yield Box(flat, stored, (begin,), (min(recipe.slab, size - begin),))


def _cut(loaded: Loaded, contest: Contest, ranking: Ranking, mask: Mask) -> None:
    """Decide and cut the elements of a slab in place; fills the mask."""
    bits, form = loaded.flat, FORMATS.get(loaded.box.stored.dtype)
    elements = ranking.elements(loaded)
    if elements is not None:
        refuse_nonfinite(loaded, elements)
        cut_blocks(bits, keep_by_scores(elements.magnitudes().reshape(-1), contest), 1, mask)
        return
    if form is None:
        raise TypeError(f"{loaded.box.stored.dtype} has no compiled loops")
    place = first_nonfinite(bits, form)
    if place >= 0:
        raise nonfinite_error(loaded.box, (place,), Elements(bits[place : place + 1], form.name))
    if contest.threshold is not None and contest.block == 1:
        cut_below(bits, form, form.limit(contest.threshold), mask)
    else:
        cut_blocks(bits, keep_by_patterns(bits, form, contest), contest.block, mask)
