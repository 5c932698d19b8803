"""Runs: scopes that lie one after the other in the storage, each small, decided by compiled loops.

N:M along the rows, blocks along rows, whole rows, and everything that a threshold decides alone. Any cut
between scopes will do. Chosen by recipes.py, which holds the conditions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.kernels.counting import first_nan
from sparseprune.engine.kernels.cutting import cut_below, cut_blocks
from sparseprune.engine.kernels.formats import FORMATS
from sparseprune.engine.kernels.selecting import select_keys
from sparseprune.engine.kernels.sums import run_sums
from sparseprune.engine.tally import tally
from sparseprune.pipeline.boxes import Box, flat_leaf
from sparseprune.pipeline.programs import Item, Outcome, Program, finish
from sparseprune.pipeline.ranking import Ranking, nan_error, refuse_nan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from sparseprune.pipeline.plan import Task
    from sparseprune.pipeline.programs import Setting
    from sparseprune.pipeline.recipes import Runs
    from sparseprune.pipeline.traffic import Bits, Loaded, Mask


def run_program(task: Task, recipe: Runs, setting: Setting) -> Program:
    """One step: all slabs, each decided, cut and written on its own."""
    ranking = Ranking(task, setting.traffic)

    def prune(box: Box) -> list[Outcome]:
        loaded = setting.traffic.load(box)
        mask = np.empty(loaded.flat.size, dtype=np.uint8)
        before = tally(loaded.flat, box.stored.dtype)
        _cut(loaded, recipe, ranking, mask)
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


def _cut(loaded: Loaded, recipe: Runs, ranking: Ranking, mask: Mask) -> None:
    """Decide and cut the elements of a slab in place; fills the mask."""
    bits, form = loaded.flat, FORMATS.get(loaded.box.stored.dtype)
    elements = ranking.elements(loaded)
    if elements is not None:
        refuse_nan(loaded, elements)
        keep = _keep_largest(elements.magnitudes().reshape(-1), recipe)
        cut_blocks(bits, keep, 1, mask)
        return
    if form is None:
        raise TypeError(f"{loaded.box.stored.dtype} has no compiled loops")
    place = first_nan(bits, form)
    if place >= 0:
        raise nan_error(loaded.box, (place,))
    if recipe.threshold is not None and recipe.block == 1:
        cut_below(bits, form, form.limit(recipe.threshold), mask)
    elif recipe.block == 1:
        keep = np.empty(bits.size, dtype=np.uint8)
        select_keys(bits, form.magnitude, recipe.blocks, recipe.nnz, keep)
        cut_blocks(bits, keep, 1, mask)
    else:
        power = int(recipe.norm)
        norms = run_sums(bits, form, recipe.block, power)
        if power != 1:
            np.sqrt(norms, out=norms)
        if recipe.rms:
            norms /= np.sqrt(float(recipe.block))
        cut_blocks(bits, _keep_largest(norms, recipe), recipe.block, mask)


def _keep_largest(scores: NDArray[np.float64], recipe: Runs) -> Mask:
    """The decision over scores that are not negative, flat, scope after scope."""
    if recipe.threshold is not None:
        kept: Mask = (scores >= recipe.threshold).view(np.uint8)
        return kept
    keep = np.empty(scores.size, dtype=np.uint8)
    keys: Bits = scores.view(np.uint64)
    select_keys(keys, (1 << 63) - 1, recipe.blocks, recipe.nnz, keep)
    return keep
