"""The fullest groups, in words and along any dimension, are those that plain loops find."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseprune.engine.kernels.counting import counts_along, fullest_in_words

LANES = [1, 2, 4, 8, 16, 32, 64]


def by_hand(words: list[int], groups: list[int]) -> dict[int, int]:
    """Bit by bit."""
    bits = [word >> at & 1 for word in words for at in range(64)]
    return {
        group: max(sum(bits[begin : begin + group]) for begin in range(0, len(bits), group))
        for group in groups
    }


word = st.one_of(
    st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 1 << 63, 2**64 - 1, 0x5555_5555_5555_5555])
)


@given(st.lists(word, min_size=1, max_size=9), st.lists(st.sampled_from(LANES)))
def test_fullest_groups_of_words_are_those_of_plain_loops(words: list[int], groups: list[int]) -> None:
    stacks = [words, words[::-1], [0] * len(words)]
    given_words = np.array(stacks, dtype=np.uint64)
    found = fullest_in_words(given_words, groups)
    expected = [by_hand(each, groups) for each in stacks]
    assert {group: most.tolist() for group, most in found.items()} == {
        group: [each[group] for each in expected] for group in groups
    }
    assert given_words.tolist() == stacks


@pytest.mark.parametrize("group", LANES)
def test_a_fullest_group_is_found_wherever_it_stands(group: int) -> None:
    for number in range(0, 192, group):
        bits = 0
        for full in range(group):
            bits |= 1 << number + full
            words = [bits >> at & 2**64 - 1 for at in (0, 64, 128)]
            assert fullest_in_words(np.array([words], dtype=np.uint64), [group]) == {group: full + 1}


@given(
    st.integers(1, 5),
    st.one_of(st.integers(1, 20), st.sampled_from([255, 256, 257, 513])),
    st.one_of(st.integers(1, 4), st.sampled_from([63, 64, 65])),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 2**32),
)
def test_counts_along_are_those_of_plain_loops(
    groups: int, members: int, places: int, share: float, seed: int
) -> None:
    marks = np.random.default_rng(seed).random((groups, members, places)) < share
    expected = [
        [sum(bool(marks[group, member, place]) for member in range(members)) for place in range(places)]
        for group in range(groups)
    ]
    assert counts_along(marks).tolist() == expected


def test_plain_loops_tell_a_case_by_hand() -> None:
    assert by_hand([0b1110_0001], [2, 4, 8, 1, 64]) == {2: 2, 4: 3, 8: 4, 1: 1, 64: 4}
    assert by_hand([1 << 63, 0b11], [64, 2]) == {64: 2, 2: 2}
