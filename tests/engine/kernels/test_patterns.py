"""Counting zeros and the fullest groups gives what plain loops give, for every M, dtype and length."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.kernels.patterns import WORD, count_zeros

WHOLE_BYTES = {
    name: (dtype.bits, dtype.zero_bits) for name, dtype in DTYPES.items() if dtype.zero_bits is not None
}
ELEMENTS = 4096


def by_hand(elements: list[int], zero_bits: int, groups: list[int]) -> tuple[int, dict[int, int]]:
    """Element by element; `fullest` by M."""
    nonzero = [zero_bits == 0 or (element & zero_bits) > 0 for element in elements]
    fullest = dict.fromkeys(groups, 0)
    for group in groups:
        for begin in range(0, len(nonzero), group):
            fullest[group] = max(fullest[group], sum(nonzero[begin : begin + group]))
    return nonzero.count(False), fullest


def counted(elements: list[int], bits: int, zero_bits: int, groups: list[int]) -> tuple[int, dict[int, int]]:
    scratch = np.ones(-(-len(elements) // WORD) * WORD, dtype=np.bool_)  # what an earlier call may leave
    zeros, fullest = count_zeros(np.array(elements, dtype=f"u{bits // 8}"), zero_bits, groups, scratch)
    return zeros, dict(fullest)


@st.composite
def elements_and_groups(draw: st.DrawFn, bits: int) -> tuple[list[int], list[int]]:
    """Whole groups of every M, up to 4096 elements; zeros of either sign are rare, common or nearly all."""
    groups: list[int] = []
    for group in draw(
        st.lists(st.one_of(st.integers(1, 64), st.sampled_from([2, 4, 8, 32, 64])), max_size=4)
    ):
        if group not in groups and math.lcm(group, *groups) <= ELEMENTS:
            groups.append(group)
    whole = math.lcm(*groups)
    size = whole * draw(st.integers(0, min(ELEMENTS // whole, 300)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    sign = 1 << bits - 1
    some = np.array([0, sign, 1, sign - 1, sign + 1, 2 * sign - 1], dtype=np.uint64)
    zeros = draw(st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0])) / 2
    shares = np.array([zeros, zeros, *[(1 - 2 * zeros) / 4] * 4])
    return generator.choice(some, size, p=shares).tolist(), groups


@pytest.mark.parametrize("name", WHOLE_BYTES)
@given(st.data())
def test_counts_are_those_of_plain_loops(name: str, data: st.DataObject) -> None:
    bits, zero_bits = WHOLE_BYTES[name]
    elements, groups = data.draw(elements_and_groups(bits))
    assert counted(elements, bits, zero_bits, groups) == by_hand(elements, zero_bits, groups)


@pytest.mark.parametrize("group", range(1, 65))
def test_a_fullest_group_is_found_wherever_it_stands(group: int) -> None:
    for size in (group, 3 * group, 130 * group):
        for number in {0, size // group // 2, size // group - 1}:
            elements = [0] * size
            for full in range(group):
                elements[number * group + full] = 1
                assert counted(elements, 16, 0x7FFF, [group]) == (size - full - 1, {group: full + 1})


def test_plain_loops_count_a_case_told_by_hand() -> None:
    elements = [0x80, 1, 0, 0, 5, 6, 7, 0]
    assert by_hand(elements, 0x7F, [2, 4, 8, 1]) == (4, {2: 2, 4: 3, 8: 4, 1: 1})
    assert by_hand(elements, 0xFF, [2]) == (3, {2: 2})
    assert by_hand(elements, 0, [4]) == (0, {4: 4})
    assert by_hand([], 0xFF, [4]) == (0, {4: 0})
