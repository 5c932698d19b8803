"""Radix select: the k-th element of huge scopes by digits of its key, then a cut of what passes by.

A histogram is made of each digit, of those elements that agree with the digits before it. Compiled loops and
numpy, no torch. Strategy.py chooses.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from sparseprune.engine.grids import prod
from sparseprune.engine.kernels.counting import DIGIT_BITS, count_digits, count_equal
from sparseprune.engine.kernels.formats import FORMATS
from sparseprune.engine.kernels.selecting import cut_below, cut_blocks, finite_ranks, ranks_among
from sparseprune.engine.kernels.shrinking import mid_of, shrink_elements
from sparseprune.execution.passes import Chunk, Decision, Pass
from sparseprune.execution.ranking import refuse_nonfinite_bits
from sparseprune.execution.regions import Region, flat_leaf, members_of
from sparseprune.execution.tiles import RegionPass, region_chunks
from sparseprune.execution.within import Search, told_survivors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from sparseprune.engine.kernels.formats import Bits, Format
    from sparseprune.execution.plan import Task
    from sparseprune.execution.strategy import RadixSelect
    from sparseprune.execution.tensor_io import Loaded, Mask, TensorIO

    Floats = NDArray[np.float64]
    Counts = NDArray[np.int64]
    Cut = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Keys(Pass):
    """A pass over single elements in scopes larger than a slab, by the unsigned integers that rank them.

    `cuts` are the decisions on the first scopes: a pair (kth, ties) says that keys above `kth` survive, and
    those equal to it among the first `ties` elements.
    """

    task: Task
    strategy: RadixSelect
    cuts: tuple[Cut, ...]

    def slabs(self, scope: int, part: tuple[int, int] | None = None) -> Iterator[tuple[int, Region]]:
        """The slabs of a scope with the number of elements before each; `part` counts slabs, None: all."""
        first, last = part or (0, self.slab_count)
        before = done = 0
        for member, _ in members_of(self.task.instance.scope):
            size = member.blocks_per_scope
            count = -(-size // self.strategy.elements)
            if done < last and done + count > first:
                (leaf,) = map(flat_leaf, member.leaves)
                for number in range(max(0, first - done), min(count, last - done)):
                    begin = number * self.strategy.elements
                    extent = min(self.strategy.elements, size - begin)
                    yield before + begin, Region(leaf, (scope * size + begin,), (extent,))
            before, done = before + size, done + count

    def load(self, region: Region, io: TensorIO) -> Loaded:
        """Elements of a scope, zero where an earlier mask drops them."""
        return io.inside(io.load(region), self.task.within)

    def ranks(self, loaded: Loaded, form: Format) -> Bits:
        """The patterns that are counted: the weights' own, unless what is not finite has a rank.

        Within masks they are one higher, so that 0 is for what these drop.
        """
        ranks = loaded.flat
        if self.task.instance.score.nonfinite == "prune":
            ranks = finite_ranks(loaded.flat, form)
        else:
            refuse_nonfinite_bits(loaded, form)
        if not self.task.within or self.task.instance.soft is not None:
            return ranks
        kept = np.ones(loaded.flat.size, dtype=np.uint8) if loaded.kept is None else loaded.kept
        return ranks_among(ranks, form.magnitude, kept)

    @property
    def slab_count(self) -> int:
        """The slabs of one scope."""
        sizes = (member.blocks_per_scope for member, _ in members_of(self.task.instance.scope))
        return sum(-(-size // self.strategy.elements) for size in sizes)


@dataclass(frozen=True, slots=True)
class _Search(_Keys, Search):
    """The search for the cut of the next scope: `places` are left for keys that begin with `prefix`."""

    prefix: int
    places: int
    shift: int

    @property
    def decides(self) -> str:
        return f"cut {len(self.cuts)}"

    def among(self, nnz: int) -> Self:
        return dataclasses.replace(self, places=nnz)

    def decision(self, ties: int, io: TensorIO) -> Decision:
        """The decision on the scope, once all digits and the end of the ties are known."""
        passed = (self.strategy.passes - 1) * self.task.nbytes(io.tensors)
        return Decision([self.prefix, ties], passed // prod(self.task.instance.scope.grid_shape))

    def decided(self, value: Any) -> Pass | None:  # noqa: ANN401
        if not isinstance(value, list) or [type(one) for one in value] != [int, int]:
            return None
        cuts = (*self.cuts, (value[0], value[1]))
        if len(cuts) == prod(self.task.instance.scope.grid_shape):
            return CutKeys(self.task, self.strategy, cuts)
        return radix_select(self.task, self.strategy, cuts)

    def _format(self, io: TensorIO) -> Format:
        return FORMATS[io.tensors[self.task.instance.scope.leaves[0].tensor].dtype]


@dataclass(frozen=True, slots=True)
class CountKeys(_Search):
    """Histograms of the digit at `shift` of the keys of a scope, among the keys that begin with `prefix`.

    A soft threshold needs two keys: `kth` is the first where the second is searched for.
    """

    kth: int | None = None

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:  # noqa: ARG002
        for part in self._parts():
            yield Chunk(part, memory=self.strategy.memory)

    def work(self, chunk: Chunk, io: TensorIO) -> Counts:
        counts = np.zeros(1 << DIGIT_BITS, dtype=np.int64)
        form = self._format(io)
        for _, region in self.slabs(len(self.cuts), chunk.about):
            loaded = self.load(region, io)
            count_digits(self.ranks(loaded, form), form, self.prefix, self.shift, counts)
            io.passed(loaded.flat.nbytes, self.task.part)
        return counts

    def merge(self, partials: list[Counts], io: TensorIO) -> Pass | Decision:
        digit, places = digit_of(reduce(np.add, partials), self.places)  # one by one: they are many and large
        following = dataclasses.replace(self, prefix=self.prefix << DIGIT_BITS | digit, places=places)
        if self.shift:
            return dataclasses.replace(following, shift=self.shift - DIGIT_BITS)
        alike = [int(counts[digit]) for counts in partials]
        if self.task.instance.soft is not None:
            return self._next_key(following.prefix, digit, sum(alike) - places, partials, io)
        if places == sum(alike):  # no tie is cut
            return following.decision(self.task.instance.scope.blocks_per_scope, io)
        number = 0
        while alike[number] < places:
            places -= alike[number]
            number += 1
        group = list(self._parts())[number]
        return FindTie(self.task, self.strategy, self.cuts, following.prefix, places, 0, group)

    def _next_key(
        self, key: int, digit: int, ties: int, partials: list[Counts], io: TensorIO
    ) -> Pass | Decision:
        """The decision by two keys; another search only if the next key has another prefix."""
        if self.kth is not None:
            return dataclasses.replace(self, prefix=self.kth).decision(key, io)
        found = dataclasses.replace(self, prefix=key)
        nnz = self.task.instance.budget.nnz or 0
        if ties or nnz == self.task.instance.scope.blocks_per_scope:
            return found.decision(key if ties else 0, io)
        lower = np.flatnonzero(reduce(np.add, partials)[:digit])
        if lower.size:
            return found.decision(self.prefix << DIGIT_BITS | int(lower[-1]), io)
        first = DIGIT_BITS * (self.strategy.passes - 2)
        return CountKeys(self.task, self.strategy, self.cuts, 0, nnz + 1, first, key)

    def _parts(self) -> Iterator[tuple[int, int]]:
        """The slabs of the scope in groups that are counted together, by their numbers."""
        slabs, groups = self.slab_count, self.strategy.histograms
        return pairwise(slabs * group // groups for group in range(groups + 1))


@dataclass(frozen=True, slots=True)
class FindTie(_Search):
    """The element that takes the last of the `places` for ties, in the group of slabs that has it."""

    part: tuple[int, int]

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:  # noqa: ARG002
        yield Chunk(self.part, memory=self.strategy.memory)

    def work(self, chunk: Chunk, io: TensorIO) -> int:
        """How many elements of the scope there are up to that one, itself among them."""
        places, form = self.places, self._format(io)
        for before, region in self.slabs(len(self.cuts), chunk.about):
            bits = self.ranks(self.load(region, io), form)
            count = count_equal(bits, form, self.prefix)
            if count >= places:
                equal = np.flatnonzero((bits & bits.dtype.type(form.magnitude)) == self.prefix)
                return before + int(equal[places - 1]) + 1
            places -= count
        raise ValueError("there are fewer ties than were counted: the input changed while it was read")

    def merge(self, partials: list[int], io: TensorIO) -> Decision:
        return self.decision(partials[0], io)


@dataclass(frozen=True, slots=True)
class CutKeys(_Keys, RegionPass):
    """Elements whose key is below the limit of their scope; a member is (number of the scope, `before`)."""

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:
        regions = (
            ((scope, before), region)
            for scope in range(len(self.cuts))
            for before, region in self.slabs(scope)
        )
        return region_chunks(regions, io, self.strategy.elements, self.strategy.memory)

    def rule(self, member: tuple[int, int]) -> str:  # noqa: ARG002
        return self.task.rule

    def cut(self, member: tuple[int, int], loaded: Loaded, io: TensorIO) -> Mask:
        inside = io.inside(loaded, self.task.within)
        mask = self._cut_at(member, inside)
        return mask if inside.kept is None else mask & inside.kept

    def _cut_at(self, member: tuple[int, int], loaded: Loaded) -> Mask:
        """Ties are above the limit up to the last one that survives, below it from there on."""
        kth, ties = self.cuts[member[0]]
        bits, form, soft = loaded.flat, FORMATS[loaded.dtype], self.task.instance.soft
        mask = np.empty(bits.size, dtype=np.uint8)
        if soft is not None:  # the second number is the next key
            first, following = (form.values(np.array([key], dtype=bits.dtype)) for key in (kth, ties))
            shrink_elements(bits[None], form, mid_of(first, following, soft.k_weight), mask)
            return mask
        split = min(max(ties - member[1], 0), bits.size)
        if self.task.instance.score.nonfinite == "prune":
            ranks = self.ranks(loaded, form)
            keep = np.concatenate([ranks[:split] >= kth, ranks[split:] > kth]).view(np.uint8)
            cut_blocks(bits, keep, 1, mask)
            return mask
        refuse_nonfinite_bits(loaded, form)
        limit = kth - 1 if self.task.within else kth  # a rank within masks is one above the key
        cut_below(bits[:split], form, max(limit, 0), mask[:split])
        cut_below(bits[split:], form, limit + 1, mask[split:])
        return mask


def radix_select(task: Task, strategy: RadixSelect, cuts: tuple[Cut, ...] = ()) -> Pass:
    """The first pass over single elements in scopes up to a whole model; `cuts` decide the first scopes."""
    shift = DIGIT_BITS * (strategy.passes - 2)
    search = CountKeys(task, strategy, cuts, 0, task.instance.budget.nnz or 0, shift)
    return told_survivors(task, len(cuts), strategy, search)


def digit_of(counts: Counts, k: int) -> tuple[int, int]:
    """The digit of the k-th largest key, and how many places are left for keys that have it."""
    at_least = np.cumsum(counts[::-1])
    behind = int(np.searchsorted(at_least, k))
    return len(counts) - 1 - behind, k - (int(at_least[behind - 1]) if behind else 0)


# -- block norms -------------------------------------------------------------------------------------
