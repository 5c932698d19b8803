"""Shapes of bound blocks and scopes: -1, padding, divisibility, slices; overlaps of two rules."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, TypeVar

from sparseprune.engine.grids import (
    Shape,
    align,
    block_extents,
    divide,
    identity_order,
    permute,
    prod,
    scope_extents,
)
from sparseprune.errors import CouplingError
from sparseprune.spec.bound import BoundBlock, BoundBlockCoupling, BoundScope, BoundScopeCoupling

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from sparseprune.spec.bound import BoundRule
    from sparseprune.spec.problems import Problems


Member = TypeVar("Member", BoundBlock, BoundScope)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the elements of a view lie: `stride` and `offset` count those of the row-major tensor."""

    shape: Shape
    stride: Shape
    offset: int = 0


def blocks_in(layout: Layout, shape: Shape, tensor: Shape) -> Shape:
    """The extents of blocks in a view of a tensor of some shape; ShapeMismatchError where they do not fit."""
    return _blocks(layout.shape, shape, "tensor" if layout.shape == tensor else "view")


def scope_of(label: str, block: BoundBlock | BoundBlockCoupling, shape: Shape) -> BoundScope:
    """Scopes over a block grid; ShapeMismatchError where they do not fit."""
    return BoundScope(label, block, _scopes(_grid(block), shape))


def fuse(
    label: str, members: Sequence[Sequence[BoundBlock]], orders: Sequence[Shape] | None
) -> BoundBlockCoupling:
    """Blocks of several tensors as one; CouplingError where their grids do not align."""
    return BoundBlockCoupling(label, *_coupled(members, orders))


def compete(
    label: str, members: Sequence[Sequence[BoundScope]], orders: Sequence[Shape] | None
) -> BoundScopeCoupling:
    """Scopes that share a budget; CouplingError where their grids do not align."""
    return BoundScopeCoupling(label, *_coupled(members, orders))


def _coupled(
    groups: Sequence[Sequence[Member]], orders: Sequence[Shape] | None
) -> tuple[tuple[Member, ...], tuple[Shape, ...]]:
    """All members as one list, of one rank, with one order each; `orders` has one for each group."""
    rank = max(len(member.shape) for group in groups for member in group)
    given = orders or [identity_order(rank)] * len(groups)
    flat = [(member, order) for group, order in zip(groups, given, strict=True) for member in group]
    members = tuple([_widened(member, rank) for member, _ in flat])
    full = tuple([_widened_order(order, len(member.shape), rank) for member, order in flat])
    grids = tuple([_grid(member) for member in members])
    if not _align(grids, full):
        align(grids, full, [member.label for member in members])  # raises, with the names
    return members, full


def _widened(part: Member, rank: int) -> Member:
    """The same elements with unit dimensions appended, until the grid has this rank."""
    if len(part.shape) == rank:
        return part
    ones = (1,) * (rank - len(part.shape))
    if isinstance(part, BoundScope):
        return replace(part, block=_widened_block(part.block, rank), shape=part.shape + ones)
    view_shape, view_stride = part.view_shape + ones, part.view_stride + ones
    return replace(part, view_shape=view_shape, view_stride=view_stride, shape=part.shape + ones)


def _widened_block(block: BoundBlock | BoundBlockCoupling, rank: int) -> BoundBlock | BoundBlockCoupling:
    if isinstance(block, BoundBlock):
        return _widened(block, rank)
    members = tuple(_widened(member, rank) for member in block.members)
    orders = tuple(_widened_order(order, len(order), rank) for order in block.orders)
    return replace(block, members=members, orders=orders)


def _widened_order(order: Shape, grid_rank: int, rank: int) -> Shape:
    """An order of a member's own grid, for the grid with unit dimensions appended; others as they are."""
    return (*order, *range(grid_rank, rank)) if len(order) == grid_rank < rank else order


def _grid(part: BoundBlock | BoundBlockCoupling | BoundScope) -> Shape:
    """`part.grid_shape`, by arithmetic that is done once for all parts of one shape."""
    if isinstance(part, BoundBlock):
        return _divided(part.view_shape, part.shape)
    if isinstance(part, BoundBlockCoupling):
        return permute(_grid(part.members[0]), part.orders[0])
    return _divided(_grid(part.block), part.shape)


# A checkpoint has thousands of tensors of a handful of shapes.
@lru_cache(maxsize=1024)
def whole(shape: Shape) -> Layout:
    """The layout of all of a tensor."""
    return Layout(shape, _contiguous_stride(shape))


@lru_cache(maxsize=1024)
def _blocks(view_shape: Shape, shape: Shape, what: str) -> Shape:
    """The extents of blocks in a view."""
    extents = block_extents(view_shape, shape)
    divide(view_shape, extents, "block", what)
    return extents


@lru_cache(maxsize=1024)
def _scopes(grid: Shape, shape: Shape) -> Shape:
    """The extents of scopes in a block grid."""
    extents = scope_extents(grid, shape)
    divide(grid, extents, "scope", "block grid")
    return extents


@lru_cache(maxsize=128)
def _align(grids: tuple[Shape, ...], orders: tuple[Shape, ...]) -> bool:
    try:
        align(grids, orders, [""] * len(grids))
    except CouplingError:
        return False
    return True


@lru_cache(maxsize=1024)
def _divided(whole: Shape, part: Shape) -> Shape:
    return divide(whole, part)


def _contiguous_stride(shape: Shape) -> Shape:
    """Elements from one index to the next in each dimension of a row-major tensor.

    >>> _contiguous_stride((4, 3, 2))
    (6, 2, 1)
    """
    sizes = [max(size, 1) for size in shape[:0:-1]]
    return tuple(accumulate(sizes, int.__mul__, initial=1))[::-1] if shape else ()


Owned = tuple[str, str, "BoundBlock"]  # the rule, the instance and a leaf of it


def check_overlaps(rules: Iterable[BoundRule], problems: Problems) -> None:
    """A problem for every two rules (and every rule with itself) that reach one element."""
    found: dict[tuple[str, str], tuple[Owned, Owned]] = {}
    tensors: dict[tuple[str, str], int] = {}
    for owned in _leaves_of_shared_tensors(rules):
        for rule_names, pair in _overlapping(owned).items():
            found.setdefault(rule_names, pair)
            tensors[rule_names] = tensors.get(rule_names, 0) + 1
    for rule_names, pair in found.items():
        problems.add(rule_names[1], "", _worded(*pair, tensors[rule_names] - 1))


def share_an_element(a: BoundBlock, b: BoundBlock) -> bool:
    """Whether two views of one tensor have an element in common.

    Looks for indices with a.offset + sum(i * stride) == b.offset + sum(j * stride). Dimensions of equal
    stride count as one, and from the widest stride down only those steps are tried that the narrower
    ones can still make up for: strides that nest, as those of slices do, leave a handful.
    """
    if 0 in a.view_shape or 0 in b.view_shape:
        return False
    steps: dict[int, tuple[int, int]] = {}
    for view, sign in ((a, 1), (b, -1)):
        for size, stride in zip(view.view_shape, view.view_stride, strict=True):
            low, high = steps.get(stride, (0, 0))
            steps[stride] = (low, high + size - 1) if sign > 0 else (low - size + 1, high)
    return _reaches(b.view_offset - a.view_offset, steps)


def is_injective(shape: Shape, stride: Shape) -> bool:
    """Whether no two places of a view share an element.

    Two places that do differ by steps that add up to nothing, of which some first one goes forward.
    """
    wide = [(size, step) for size, step in zip(shape, stride, strict=True) if size > 1]
    strides = [step for _, step in wide]
    if 0 in strides or len(set(strides)) < len(strides):
        return False
    if prod(size for size, _ in wide) > 1 + sum((size - 1) * step for size, step in wide):
        return False  # more places than elements
    every = {step: (1 - size, size - 1) for size, step in wide}
    return not any(_reaches(0, {**every, step: (1, size - 1)}) for size, step in wide)


def _reaches(distance: int, steps: Mapping[int, tuple[int, int]]) -> bool:
    """Whether a distance is a sum of strides, each taken a number of times within its bounds."""
    taken = {stride: bounds for stride, bounds in steps.items() if stride and bounds != (0, 0)}
    rest_low = sum(stride * low for stride, (low, _) in taken.items())
    rest_high = sum(stride * high for stride, (_, high) in taken.items())
    gaps = {distance}
    for stride, (low, high) in sorted(taken.items(), reverse=True):
        rest_low, rest_high = rest_low - stride * low, rest_high - stride * high
        gaps = {
            gap - stride * step
            for gap in gaps
            for step in range(
                max(low, -((rest_high - gap) // stride)), min(high, (gap - rest_low) // stride) + 1
            )
        }
    return 0 in gaps


def _leaves_of_shared_tensors(rules: Iterable[BoundRule]) -> Iterator[list[Owned]]:
    """For every tensor that has several leaves, these, in the order of the rules."""
    instances = [(rule.name, instance) for rule in rules for instance in rule.instances]
    times = Counter(leaf.tensor for _, instance in instances for leaf in instance.scope.leaves)
    shared: dict[str, list[Owned]] = {tensor: [] for tensor, count in times.items() if count > 1}
    if shared:
        for rule, instance in instances:
            for leaf in instance.scope.leaves:
                if leaf.tensor in shared:
                    shared[leaf.tensor].append((rule, instance.label, leaf))
    yield from shared.values()


def _overlapping(owned: Sequence[Owned]) -> dict[tuple[str, str], tuple[Owned, Owned]]:
    """For every two rules, the first two leaves of one tensor that share an element."""
    found: dict[tuple[str, str], tuple[Owned, Owned]] = {}
    for first, second in _meeting(owned):
        rule_names = (first[0], second[0])
        if rule_names not in found and share_an_element(first[2], second[2]):
            found[rule_names] = (first, second)
    return found


def _meeting(owned: Sequence[Owned]) -> Iterator[tuple[Owned, Owned]]:
    """Pairs of leaves whose ranges of elements meet, each pair in the order of the rules."""
    numbered = sorted((_range(leaf), number) for number, (_, _, leaf) in enumerate(owned))
    active: list[tuple[int, int]] = []
    for (start, end), number in numbered:
        active = [(other_end, other) for other_end, other in active if other_end >= start]
        for _, other in active:
            yield owned[min(number, other)], owned[max(number, other)]
        active.append((end, number))


def _range(leaf: BoundBlock) -> tuple[int, int]:
    """The first and the last element of a view."""
    reach = sum((size - 1) * stride for size, stride in zip(leaf.view_shape, leaf.view_stride, strict=True))
    return leaf.view_offset, leaf.view_offset + (reach if prod(leaf.view_shape) else -1)


def _worded(first: Owned, second: Owned, more: int) -> str:
    (rule, instance, leaf), (other_rule, other_instance, _) = first, second
    tail = f" (and {more} more tensors)" if more else ""
    if rule != other_rule:
        text = f"{other_instance} reaches {leaf.tensor}{tail}, as {instance} of [{rule}] does"
    elif instance != other_instance:
        text = f"{instance} and {other_instance} both reach {leaf.tensor}{tail}"
    else:
        text = f"{instance} reaches {leaf.tensor}{tail} twice"
    return f"{text}: an element may be reached by one rule, once; narrow the patterns"
