"""Overlaps: elements that two views of one tensor share, and rules that may not share any.

Owns the search for shared elements, and which rules may meet: those nested within each other. Knows neither
tables nor tensors' values. Called by binding.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from sparseprune.engine.grids import Shape, prod
from sparseprune.spec.bound import levels_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from sparseprune.spec.bound import BoundBlock, BoundRule
    from sparseprune.spec.problems import Problems

Owned = tuple[str, str, "BoundBlock"]  # the rule, the instance and a leaf of it


def check_overlaps(rules: Sequence[BoundRule], outer: Mapping[str, str], problems: Problems) -> None:
    """A problem for every two rules, or one rule with itself, that reach one element.

    Rules meet where one is within the other, by way of others, too; `outer` has the rule around each one that
    is within another. A rule that never meets the one around it is a problem.
    """
    around = {rule.name: frozenset(levels_of(rule.name, outer)[:-1]) for rule in rules}
    some = {rule.name for rule in rules if rule.instances}
    apart = {inner: outside for inner, outside in outer.items() if {inner, outside} <= some}
    found: dict[tuple[str, str], list[tuple[Owned, Owned]]] = {}
    for owned in _leaves_of_shared_tensors(rules):
        first_of: dict[tuple[str, str], tuple[Owned, Owned]] = {}  # of every two rules
        for one, other in _meeting(owned):
            names = (one[0], other[0])
            inner = next((name for name in names if not around[name].isdisjoint(names)), None)
            if inner is not None:
                if apart.get(inner) in names and share_an_element(one[2], other[2]):
                    del apart[inner]
            elif names not in first_of and share_an_element(one[2], other[2]):
                first_of[names] = (one, other)
        for names, pair in first_of.items():
            found.setdefault(names, []).append(pair)
    for (_, rule), pairs in found.items():
        problems.add(rule, "", _worded(*pairs[0], len(pairs) - 1))
    for rule, outside in apart.items():
        problems.add(rule, "within", f"it reaches nothing of what [{outside}] reaches: leave this key out")


def share_an_element(a: BoundBlock, b: BoundBlock) -> bool:
    """Whether two views of one tensor have an element in common.

    Searches indices with a.offset + sum(i * stride) == b.offset + sum(j * stride). Dimensions of equal stride
    count as one. From the widest stride down, only steps are tried that narrower strides can compensate: for
    strides that nest, as those of slices do, these are a handful.
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

    Two places share one if steps between them add up to 0; one of these steps can be taken as positive.
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
    """The leaves of every tensor that has several, in the order of the rules."""
    instances = [(rule.name, instance) for rule in rules for instance in rule.instances]
    names = [leaf.tensor for _, instance in instances for leaf in instance.scope.leaves]
    if len(set(names)) < len(names):
        shared: dict[str, list[Owned]] = {name: [] for name, times in Counter(names).items() if times > 1}
        for rule, instance in instances:
            for leaf in instance.scope.leaves:
                if leaf.tensor in shared:
                    shared[leaf.tensor].append((rule, instance.label, leaf))
        yield from shared.values()


def _meeting(owned: Sequence[Owned]) -> Iterator[tuple[Owned, Owned]]:
    """Pairs of leaves whose ranges of elements overlap, each pair in the order of the rules."""
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
