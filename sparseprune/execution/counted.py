"""Counted: single elements that compete in scopes larger than a slab, up to a whole model.

The k-th largest key is found exactly by histograms of its digits, the most significant first, so that a scope
passes by once for each 16 bits of a key and no score is kept. Ties go to the lower index: which of the groups
of slabs holds the last tie that survives is known from the counts, and that group alone is read once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, reduce
from itertools import pairwise
from typing import TYPE_CHECKING, TypeGuard

import numpy as np

from sparseprune.engine.grids import prod
from sparseprune.engine.kernels.counting import DIGIT_BITS, count_digits, count_equal, first_nonfinite
from sparseprune.engine.kernels.formats import FORMATS, Format
from sparseprune.engine.kernels.selecting import cut_below
from sparseprune.engine.tally import tally
from sparseprune.execution.boxes import Box, flat_leaf
from sparseprune.execution.cells import members_of
from sparseprune.execution.outcomes import Outcome, finish
from sparseprune.execution.plan import task_bytes
from sparseprune.execution.programs import Item, Program
from sparseprune.execution.ranking import Elements, nonfinite_error
from sparseprune.spec import BoundBlock

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from sparseprune.execution.plan import Task
    from sparseprune.execution.programs import Setting
    from sparseprune.execution.recipes import Counted
    from sparseprune.execution.tensor_io import Bits, Mask

    Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Slab:
    """Neighbouring elements of a leaf seen flat; `before` counts the elements of the scope before them."""

    box: Box
    before: int


Group = Callable[[], Iterator[Slab]]
"""Neighbouring slabs of a scope, made anew at each call: no list of them is kept."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A decision: keys above `kth` survive, and those equal to it among the first `ties` elements."""

    kth: int
    ties: int


def run_program(task: Task, recipe: Counted, setting: Setting) -> Program:
    """For each scope steps that count and one that finds the last tie; in the end one that cuts."""
    cuts = []
    scopes = prod(task.instance.scope.grid_shape)
    for scope in range(scopes):
        key = f"cut {scope}"
        noted = setting.recall(key)
        if _is_cut(noted):
            cut = Cut(*noted)
        else:
            cut = yield from _find(task, scope, recipe, setting)
            passed = (recipe.passes - 1) * task_bytes(task, setting.tensors) // scopes
            setting.note(key, [cut.kth, cut.ties], passed)
        cuts.append(cut)

    def prune(slab: Slab, cut: Cut) -> list[Outcome]:
        stored = slab.box.stored
        bits = setting.traffic.load(slab.box)
        mask = np.empty(bits.flat.size, dtype=np.uint8)
        before = tally(bits.flat, stored.dtype)
        _cut(bits.flat, FORMATS[stored.dtype], cut, slab.before, mask)
        setting.traffic.store(bits, mask)
        return [finish(task, stored, before, bits.flat, mask)]

    def items() -> Iterator[Item]:
        number = 0
        for scope, cut in enumerate(cuts):
            for slab in _slabs(task, scope, recipe, setting):
                work = lambda slab=slab, cut=cut: prune(slab, cut)  # noqa: E731
                yield Item(work, slab.box.nbytes, recipe.memory, str(number))
                number += 1

    yield items()


def _is_cut(noted: object) -> TypeGuard[list[int]]:
    return isinstance(noted, list) and [type(one) for one in noted] == [int, int]


def _slabs(
    task: Task, scope: int, recipe: Counted, setting: Setting, part: tuple[int, int] | None = None
) -> Iterator[Slab]:
    """The elements of one scope, member after member; those whose numbers are in `part`, or all."""
    first, last = part or (0, _slab_count(task, recipe))
    before = done = 0
    for member, _ in members_of(task.instance.scope):
        size = member.blocks_per_scope
        count = -(-size // recipe.slab)
        if done < last and done + count > first:
            if not isinstance(member.block, BoundBlock):
                raise TypeError(f"{member.label} has fused blocks")
            flat = flat_leaf(member.block)
            stored = setting.tensors[flat.tensor]
            for number in range(max(0, first - done), min(count, last - done)):
                begin = number * recipe.slab
                extent = min(recipe.slab, size - begin)
                yield Slab(Box(flat, stored, (scope * size + begin,), (extent,)), before + begin)
        before, done = before + size, done + count


def _slab_count(task: Task, recipe: Counted) -> int:
    return sum(-(-member.blocks_per_scope // recipe.slab) for member, _ in members_of(task.instance.scope))


def _find(task: Task, scope: int, recipe: Counted, setting: Setting):  # type: ignore[no-untyped-def]  # noqa: ANN202
    """A program that gives the Cut of one scope."""
    budget = task.instance.budget.nnz
    form = FORMATS[setting.tensors[task.instance.scope.leaves[0].tensor].dtype]
    slabs = _slab_count(task, recipe)
    bounds = [slabs * group // recipe.groups for group in range(recipe.groups + 1)]
    groups = [
        partial(_slabs, task, scope, recipe, setting, part) for part in pairwise(bounds) if part[1] > part[0]
    ]
    width = max(DIGIT_BITS, 8 * form.itemsize)
    prefix, places, of_group = 0, budget or 0, []
    for shift in range(width - DIGIT_BITS, -1, -DIGIT_BITS):
        counts: Sequence[Counts] = yield [
            Item(_counter(task, group, form, (prefix, shift), setting), memory=recipe.memory)
            for group in groups
        ]
        total = reduce(np.add, counts)  # one by one: they are many and large
        digit, places = _digit(total, places)
        prefix = prefix << DIGIT_BITS | digit
        of_group = [int(each[digit]) for each in counts]
    if places == sum(of_group):  # no tie is cut
        return Cut(prefix, task.instance.scope.blocks_per_scope)
    number = 0
    while of_group[number] < places:
        places -= of_group[number]
        number += 1
    (ties,) = yield [
        Item(lambda: _end_of_ties(groups[number], form, prefix, places, setting), memory=recipe.memory)
    ]
    return Cut(prefix, ties)


def _counter(task: Task, group: Group, form: Format, digit: tuple[int, int], setting: Setting):  # type: ignore[no-untyped-def]  # noqa: ANN202
    prefix, shift = digit

    def work() -> Counts:
        counts = np.zeros(1 << DIGIT_BITS, dtype=np.int64)
        for slab in group():
            bits = setting.traffic.load(slab.box).flat
            place = first_nonfinite(bits, form)
            if place >= 0:
                element = Elements(bits[place : place + 1], form.name)
                raise nonfinite_error(slab.box, (place,), element)
            count_digits(bits, form, prefix, shift, counts)
            setting.passed(slab.box.nbytes, task.instance.label)
        return counts

    return work


def _digit(counts: Counts, k: int) -> tuple[int, int]:
    """The digit of the k-th largest key, and how many places are left among those that have it."""
    at_least = np.cumsum(counts[::-1])
    behind = int(np.searchsorted(at_least, k))
    return len(counts) - 1 - behind, k - (int(at_least[behind - 1]) if behind else 0)


def _end_of_ties(group: Group, form: Format, kth: int, places: int, setting: Setting) -> int:
    """How many elements of the scope there are up to the one that takes the last of some places."""
    for slab in group():
        bits = setting.traffic.load(slab.box).flat
        count = count_equal(bits, form, kth)
        if count >= places:
            equal = np.flatnonzero((bits & bits.dtype.type(form.magnitude)) == kth)
            return slab.before + int(equal[places - 1]) + 1
        places -= count
    raise ValueError("there are fewer ties than were counted: the input changed while it was read")


def _cut(bits: Bits, form: Format, cut: Cut, before: int, mask: Mask) -> None:
    """Cut a slab: ties are above the limit up to the last one that survives, below it from there on."""
    split = min(max(cut.ties - before, 0), bits.size)
    cut_below(bits[:split], form, cut.kth, mask[:split])
    cut_below(bits[split:], form, cut.kth + 1, mask[split:])
