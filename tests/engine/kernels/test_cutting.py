"""Cutting: losers become +0.0 bit for bit, survivors keep every bit, masks say which is which."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparseprune.engine.kernels.formats import FORMATS, Format
from sparseprune.engine.kernels.selecting import cut_below, cut_blocks


def edges(form: Format) -> list[int]:
    """Patterns of either sign: zeros, the least number, around infinity and NaN with any payload."""
    keys = [0, 1, 2, form.infinity - 1, form.infinity, form.largest, form.largest + 1, form.magnitude]
    return [*keys, *(form.magnitude + 1 + key for key in keys)]


@st.composite
def patterns(draw: st.DrawFn, form: Format) -> NDArray[Any]:
    some = st.one_of(st.sampled_from(edges(form)), st.integers(0, 2 * form.magnitude + 1))
    return np.array(draw(st.lists(some, max_size=40)), dtype=form.pattern)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Format, NDArray[Any], int]:
    form = draw(st.sampled_from(list(FORMATS.values())))
    near = st.sampled_from([0, 1, form.infinity, form.largest, form.largest + 1, form.magnitude + 1])
    return form, draw(patterns(form)), draw(st.one_of(near, st.integers(0, form.magnitude + 1)))


@given(cuts())
def test_a_pattern_survives_whole_where_its_key_reaches_the_limit(
    case: tuple[Format, NDArray[Any], int],
) -> None:
    form, bits, limit = case
    kept = [int(int(pattern) & form.magnitude >= limit) for pattern in bits]
    expected = [int(pattern) if keep else 0 for pattern, keep in zip(bits, kept, strict=True)]
    mask = np.full(bits.size, 7, dtype=np.uint8)
    assert cut_below(bits, form, limit, mask) == sum(kept)
    assert bits.tolist() == expected
    assert mask.tolist() == kept


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_a_limit_above_every_number_cuts_everything(form: Format) -> None:
    bits = np.array(
        [pattern for pattern in edges(form) if pattern & form.magnitude <= form.largest], form.pattern
    )
    mask = np.full(bits.size, 7, dtype=np.uint8)
    assert cut_below(bits, form, form.largest + 1, mask) == 0
    assert not bits.any()
    assert not mask.any()


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_a_limit_of_0_changes_nothing(form: Format) -> None:
    bits = np.array(edges(form), dtype=form.pattern)
    mask = np.zeros(bits.size, dtype=np.uint8)
    assert cut_below(bits, form, 0, mask) == bits.size
    assert bits.tolist() == edges(form)
    assert mask.all()


@given(st.data(), st.sampled_from(list(FORMATS.values())), st.integers(1, 9))
def test_runs_are_cut_whole_and_survivors_keep_every_bit(
    data: st.DataObject, form: Format, block: int
) -> None:
    keep = np.array(data.draw(st.lists(st.integers(0, 1), max_size=20)), dtype=np.uint8)
    some = st.one_of(st.sampled_from(edges(form)), st.integers(0, 2 * form.magnitude + 1))
    size = keep.size * block
    before = data.draw(st.lists(some, min_size=size, max_size=size))
    bits = np.array(before, dtype=form.pattern)
    mask = np.full(size, 7, dtype=np.uint8)
    cut_blocks(bits, keep, block, mask)
    assert mask.tolist() == [int(keep[place // block]) for place in range(size)]
    assert bits.tolist() == [pattern if keep[place // block] else 0 for place, pattern in enumerate(before)]


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_a_mask_may_be_the_decision_itself(form: Format) -> None:
    bits = np.array(edges(form), dtype=form.pattern)
    mask = np.arange(bits.size, dtype=np.uint8) % 2
    cut_blocks(bits, mask, 1, mask)
    assert mask.tolist() == [0, 1] * (bits.size // 2)
    assert bits.tolist() == [place % 2 and pattern for place, pattern in enumerate(edges(form))]
