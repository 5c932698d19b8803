"""The slow oracle: S3 in plain loops over nested indices and exact numbers, without torch.

It knows structures by their shapes alone and elements as numbers by index; whatever it is compared
with shares none of its code. Numbers are ints, Fractions or infinities, so that equal norms are equal.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

Index = tuple[int, ...]
Number = Fraction | int | float
Elements = Mapping[Index, Number]


@dataclass(frozen=True)
class Leaf:
    """Blocks of the shape `block` (all extents positive), cut out of a view of the shape `view`."""

    view: Index
    block: Index

    @property
    def grid(self) -> Index:
        return tuple(size // extent for size, extent in zip(self.view, self.block, strict=True))

    def block_elements(self, place: Index) -> Iterator[Index]:
        """The view indices of the block at `place` of the grid, in row-major order."""
        for inner in product(*map(range, self.block)):
            yield tuple(p * b + i for p, b, i in zip(place, self.block, inner, strict=True))


@dataclass(frozen=True)
class Fused:
    """Blocks of several leaves fused: `common[d] = leaf.grid[order[d]]`."""

    leaves: tuple[Leaf, ...]
    orders: tuple[Index, ...]

    @property
    def grid(self) -> Index:
        return tuple(self.leaves[0].grid[dim] for dim in self.orders[0])

    def block_elements(self, place: Index) -> Iterator[tuple[int, Index]]:
        """(leaf, view index) of all elements of a fused block, leaf by leaf."""
        for number, (leaf, order) in enumerate(zip(self.leaves, self.orders, strict=True)):
            for index in leaf.block_elements(_undo(order, place)):
                yield number, index

    def places(self) -> Iterator[Index]:
        """The blocks of the common grid, in row-major order."""
        return product(*map(range, self.grid))


@dataclass(frozen=True)
class Scope:
    """Scopes of the shape `shape`, in blocks, on the grid of `block`."""

    block: Fused
    shape: Index

    @property
    def grid(self) -> Index:
        return tuple(size // extent for size, extent in zip(self.block.grid, self.shape, strict=True))


@dataclass(frozen=True)
class Coupled:
    """Scopes aligned to one grid: `common[d] = scope.grid[order[d]]`. One scope alone is the simple case."""

    scopes: tuple[Scope, ...]
    orders: tuple[Index, ...]

    @property
    def grid(self) -> Index:
        return tuple(self.scopes[0].grid[dim] for dim in self.orders[0])

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return tuple(leaf for scope in self.scopes for leaf in scope.block.leaves)

    @property
    def blocks_per_scope(self) -> int:
        return sum(math.prod(scope.shape) for scope in self.scopes)

    def places(self) -> Iterator[Index]:
        """The scopes, in row-major order."""
        return product(*map(range, self.grid))

    def blocks(self, place: Index) -> Iterator[list[tuple[int, Index]]]:
        """The competing blocks of one scope, in scope order, each as (leaf, view index) of its elements."""
        first_leaf = 0
        for scope, order in zip(self.scopes, self.orders, strict=True):
            own = _undo(order, place)
            for inner in product(*map(range, scope.shape)):
                block = tuple(o * s + i for o, s, i in zip(own, scope.shape, inner, strict=True))
                yield [(first_leaf + leaf, index) for leaf, index in scope.block.block_elements(block)]
            first_leaf += len(scope.block.leaves)


def alone(leaf: Leaf) -> Fused:
    """One leaf as a coupling of one."""
    return Fused((leaf,), (tuple(range(len(leaf.view))),))


def infinite(number: Number) -> bool:
    """Whether a number is infinite; exact ones, which may be beyond all floats, are not."""
    return isinstance(number, float) and math.isinf(number)


def root(square: Number) -> float | None:
    """The root of a square, None where no float is its root."""
    if infinite(square):
        return math.inf
    exact = Fraction(square)
    guess = Fraction(math.isqrt(exact.numerator), math.isqrt(exact.denominator))
    return float(guess) if guess * guess == exact and Fraction(float(guess)) == guess else None


def score(numbers: Sequence[Number], p: float = 2) -> Number:
    """The p-norm to the power p, exact (p 1 or 2), or the largest magnitude (p infinite)."""
    if any(map(infinite, numbers)):
        return math.inf
    exact = [abs(Fraction(number)) for number in numbers]
    if math.isinf(p):
        return max(exact)
    return sum((number ** int(p) for number in exact), start=Fraction(0))


def norm(numbers: Sequence[Number], p: float = 2) -> float:
    """The p-norm, as near as floats can say: the numbers are scaled into range before they are raised."""
    scale = max((abs(Fraction(number)) for number in numbers if not infinite(number)), default=Fraction(0))
    if any(map(infinite, numbers)):
        return math.inf
    if math.isinf(p) or not scale:
        return float(scale)
    total = math.fsum(float(abs(Fraction(number)) / scale) ** p for number in numbers)
    try:
        return float(Fraction(total ** (1 / p)) * scale)
    except OverflowError:
        return math.inf


def scores_by_scope(structure: Coupled, elements: Sequence[Elements]) -> dict[Index, list[Number]]:
    """The squared norms of the blocks of each scope, in scope order."""
    return {
        place: [score([elements[leaf][index] for leaf, index in block]) for block in structure.blocks(place)]
        for place in structure.places()
    }


def keep_largest(scores: Sequence[Number], nnz: int) -> list[bool]:
    """True for the nnz largest, the lower index first among equals."""
    ranked = sorted(range(len(scores)), key=lambda block: (-scores[block], block))
    kept = set(ranked[:nnz])
    return [block in kept for block in range(len(scores))]


def masks(structure: Coupled, decisions: Mapping[Index, Sequence[bool]]) -> list[dict[Index, bool]]:
    """Decisions about the blocks of each scope as one mask for each leaf, by view index."""
    result: list[dict[Index, bool]] = [{} for _ in structure.leaves]
    for place in structure.places():
        for block, kept in zip(structure.blocks(place), decisions[place], strict=True):
            for leaf, index in block:
                result[leaf][index] = kept
    return result


def masks_by_budget(structure: Coupled, elements: Sequence[Elements], nnz: int) -> list[dict[Index, bool]]:
    """Which elements survive where each scope keeps its nnz blocks of largest norm."""
    scores = scores_by_scope(structure, elements)
    return masks(structure, {place: keep_largest(scores[place], nnz) for place in scores})


def masks_among(
    structure: Coupled,
    elements: Sequence[Elements],
    among: Sequence[Mapping[Index, bool]],
    budget: Callable[[int], int],
) -> list[dict[Index, bool]]:
    """Which elements survive of those that `among` keeps: of each scope `budget(blocks that are left)`."""
    decisions = {}
    for place in structure.places():
        left = [[(leaf, at) for leaf, at in block if among[leaf][at]] for block in structure.blocks(place)]
        competing = [number for number, block in enumerate(left) if block]
        scores = [score([elements[leaf][at] for leaf, at in left[number]]) for number in competing]
        kept = keep_largest(scores, budget(len(competing)))
        winners = {number for number, keeps in zip(competing, kept, strict=True) if keeps}
        decisions[place] = [number in winners for number in range(len(left))]
    return [
        {at: keeps and among[leaf][at] for at, keeps in mask.items()}
        for leaf, mask in enumerate(masks(structure, decisions))
    ]


def masks_by_threshold(
    structure: Coupled, elements: Sequence[Elements], thresholds: Mapping[Index, float]
) -> list[dict[Index, bool]]:
    """Which elements survive where a block is kept that has at least its scope's threshold as norm."""
    scores = scores_by_scope(structure, elements)

    def reaches(square: Number, threshold: float) -> bool:
        if infinite(square) or infinite(threshold) or threshold <= 0:
            return square >= threshold
        return square >= Fraction(threshold) ** 2

    return masks(
        structure,
        {place: [reaches(square, thresholds[place]) for square in scores[place]] for place in scores},
    )


def shrink(v: Sequence[float], threshold: float, h: Sequence[float] | None = None) -> list[float]:
    """The minimizer of `(u - v)^T diag(h) (u - v) / 2 + threshold * ||u||`, h = 1 where there is none.

    The norm s of the solution solves `||h v / (h s + threshold)|| = 1`; its left side falls with s, so
    the root is bracketed by 0 and ||v|| and halved until no double lies between the two ends.
    """
    diagonal = [1.0] * len(v) if h is None else list(h)
    pull = math.hypot(*(a * b for a, b in zip(diagonal, v, strict=True)))
    if pull <= threshold:
        return [0.0] * len(v)
    if threshold == 0:
        return list(v)

    def excess(size: float) -> float:
        terms = (a * b / (a * size + threshold) for a, b in zip(diagonal, v, strict=True))
        return math.fsum(term * term for term in terms) - 1

    low, high = 0.0, math.hypot(*v)
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return [a * b * high / (a * high + threshold) for a, b in zip(diagonal, v, strict=True)]


def _undo(order: Index, common: Index) -> Index:
    own = [0] * len(order)
    for dim, source in enumerate(order):
        own[source] = common[dim]
    return tuple(own)
