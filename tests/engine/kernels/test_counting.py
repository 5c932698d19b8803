"""Counting: NaN, zeros, energy and digits, as plain loops over the numbers that torch reads count them."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparseprune.engine.kernels.counting import (
    DIGIT_BITS,
    count_digits,
    count_equal,
    first_nonfinite,
    zeros_and_energy,
)
from sparseprune.engine.kernels.formats import FORMATS, Format
from tests.engine.kernels.test_cutting import edges, patterns
from tests.engine.kernels.test_formats import read_by_torch

forms = st.sampled_from(list(FORMATS.values()))


@st.composite
def arrays(draw: st.DrawFn) -> tuple[Format, NDArray[Any]]:
    form = draw(forms)
    return form, draw(patterns(form))


@given(arrays())
def test_the_first_one_that_is_not_finite_is_where_torch_reads_one(case: tuple[Format, NDArray[Any]]) -> None:
    form, bits = case
    numbers = read_by_torch(bits, form).tolist()
    expected = next((place for place, number in enumerate(numbers) if not math.isfinite(number)), -1)
    assert first_nonfinite(bits, form) == expected


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_what_is_not_finite_is_found_at_any_place_and_nothing_else_is_taken_for_it(form: Format) -> None:
    sign = form.magnitude + 1
    fine = np.array([0, sign, 1, form.infinity - 1, sign | form.infinity - 1] * 7, dtype=form.pattern)
    assert first_nonfinite(fine, form) == -1
    assert first_nonfinite(fine[:0], form) == -1
    for wrong in (form.infinity, form.magnitude, sign | form.infinity, sign | form.magnitude):
        for place in (0, 1, 16, fine.size - 1):
            bits = fine.copy()
            bits[[place, -1]] = wrong
            assert first_nonfinite(bits, form) == place


@given(arrays())
def test_zeros_and_energy_are_those_of_the_numbers(case: tuple[Format, NDArray[Any]]) -> None:
    form, bits = case
    bits = bits[(bits & bits.dtype.type(form.magnitude)) <= form.largest]
    numbers = read_by_torch(bits, form).tolist()
    zeros, energy = zeros_and_energy(bits, form)
    assert zeros == sum(number == 0 for number in numbers)
    with np.errstate(over="ignore"):
        squares = np.square(numbers).tolist()
    try:
        expected = math.fsum(squares)
    except OverflowError:
        expected = math.inf
    if expected < 1e308:  # the order of a sum that is near the end of the range tells whether it fits
        assert energy == pytest.approx(expected, rel=1e-13, abs=0)
    else:
        assert energy >= 0.99e308


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_one_number_has_its_square_as_energy_exactly(form: Format) -> None:
    for pattern in edges(form):
        if pattern & form.magnitude > form.largest:
            continue
        bits = np.array([pattern], dtype=form.pattern)
        number = read_by_torch(bits, form)[0]
        with np.errstate(over="ignore"):
            assert zeros_and_energy(bits, form) == (int(number == 0), float(number * number))


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_subnormal_numbers_count_and_zeros_of_either_sign_do_not(form: Format) -> None:
    sign = form.magnitude + 1
    least = float(read_by_torch(np.array([1], dtype=form.pattern), form)[0])
    bits = np.array([1, 0, sign, sign | 1] * 8, dtype=form.pattern)
    assert zeros_and_energy(bits, form) == (16, 16 * least * least)
    assert zeros_and_energy(bits[:0], form) == (0, 0.0)


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_energy_with_nan_is_no_finite_number(form: Format) -> None:
    one = np.array([0, form.magnitude, 1], dtype=form.pattern)
    zeros, energy = zeros_and_energy(one, form)
    assert zeros == 1
    assert not math.isfinite(energy)


@st.composite
def digits(draw: st.DrawFn) -> tuple[Format, NDArray[Any], int, int]:
    """A format, patterns, a shift, and a prefix that some keys or none have."""
    form = draw(forms)
    bits = draw(patterns(form))
    shift = draw(st.integers(0, 8 * form.itemsize - 1))
    keys = [int(pattern) & form.magnitude for pattern in bits]
    key = draw(st.one_of(st.integers(0, form.magnitude), *([st.sampled_from(keys)] if keys else [])))
    return form, bits, shift, key >> shift + DIGIT_BITS


@given(digits())
def test_digits_are_counted_where_what_is_above_them_is_the_prefix(
    case: tuple[Format, NDArray[Any], int, int],
) -> None:
    form, bits, shift, prefix = case
    counts = np.zeros(1 << DIGIT_BITS, dtype=np.int64)
    counts[[0, 5]] = 3
    count_digits(bits, form, prefix, shift, counts)
    keys = [int(pattern) & form.magnitude for pattern in bits]
    expected = Counter({0: 3, 5: 3})
    expected.update((key >> shift) % (1 << DIGIT_BITS) for key in keys if key >> shift + DIGIT_BITS == prefix)
    assert {int(digit): int(counts[digit]) for digit in np.flatnonzero(counts)} == expected


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_digits_from_the_first_to_the_last_lead_to_every_key(form: Format) -> None:
    bits = np.array(edges(form), dtype=form.pattern)
    width = max(DIGIT_BITS, 8 * form.itemsize)
    for key in {int(pattern) & form.magnitude for pattern in bits}:
        prefix = 0
        for shift in range(width - DIGIT_BITS, -1, -DIGIT_BITS):
            counts = np.zeros(1 << DIGIT_BITS, dtype=np.int64)
            count_digits(bits, form, prefix, shift, counts)
            digit = (key >> shift) % (1 << DIGIT_BITS)
            assert counts[digit] > 0
            prefix = prefix << DIGIT_BITS | digit
        assert prefix == key
        assert counts[digit] == count_equal(bits, form, key)


@given(st.data(), arrays())
def test_equal_keys_are_counted_whatever_their_sign(
    data: st.DataObject, case: tuple[Format, NDArray[Any]]
) -> None:
    form, bits = case
    keys = [int(pattern) & form.magnitude for pattern in bits]
    for key in {*keys, data.draw(st.integers(0, form.magnitude))}:
        assert count_equal(bits, form, key) == keys.count(key)
