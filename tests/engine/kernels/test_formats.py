"""Formats: every pattern of the narrow floats, samples of the wide ones, mean what torch reads in them."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparseprune.engine.dtypes import torch_dtype
from sparseprune.engine.kernels.formats import FORMATS, Format

NARROW = tuple(form for form in FORMATS.values() if form.itemsize < 4)
WIDE = tuple(form for form in FORMATS.values() if form.itemsize >= 4)


def read_by_torch(bits: NDArray[Any], form: Format) -> NDArray[np.float64]:
    """The numbers, with their signs, that torch reads in patterns, in float64."""
    signed = torch.from_numpy(bits.view(f"int{8 * bits.itemsize}"))
    numbers: NDArray[np.float64] = signed.view(torch_dtype(form.name)).to(torch.float64).numpy()
    return numbers


def all_patterns(form: Format) -> NDArray[Any]:
    return np.arange(1 << 8 * form.itemsize, dtype=np.uint64).astype(form.pattern)


def assert_read_alike(form: Format, bits: NDArray[Any]) -> None:
    numbers = read_by_torch(bits, form)
    keys = bits & bits.dtype.type(form.magnitude)
    with np.errstate(invalid="ignore"):
        values = form.values(keys)
    assert values.dtype == np.float64
    assert np.array_equal(values, np.abs(numbers), equal_nan=True)
    assert np.array_equal(keys > form.largest, np.isnan(numbers))
    assert np.array_equal(keys >= form.infinity, ~np.isfinite(numbers))


@pytest.mark.parametrize("form", NARROW, ids=lambda form: form.name)
def test_every_pattern_of_a_narrow_float_has_the_value_that_torch_gives_it(form: Format) -> None:
    assert_read_alike(form, all_patterns(form))


@pytest.mark.parametrize("form", WIDE, ids=lambda form: form.name)
def test_patterns_of_wide_floats_have_the_value_that_torch_gives_them(form: Format) -> None:
    width = 8 * form.itemsize
    borders = [
        0, 1, 2, form.infinity - 1, form.infinity, form.infinity + 1, form.magnitude - 1, form.magnitude,
    ]  # fmt: skip
    powers = [1 << bit for bit in range(width - 1)]
    edges = np.array(
        [*borders, *powers, *(power - 1 for power in powers), *(form.magnitude + 1 + key for key in borders)],
        dtype=form.pattern,
    )
    drawn = np.random.default_rng(0).integers(0, 1 << width, 1 << 16, dtype=np.uint64, endpoint=False)
    for bits in (edges, drawn.astype(form.pattern)):
        assert_read_alike(form, bits)


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_nan_of_every_payload_is_read_without_a_word(form: Format) -> None:
    keys = np.array([form.largest + 1, form.magnitude], dtype=form.pattern)
    assert np.isnan(form.values(keys)).all()


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_a_key_is_all_of_a_pattern_but_its_sign(form: Format) -> None:
    one = torch.tensor([-1.0, 1.0]).to(torch_dtype(form.name))
    bits = one.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[form.itemsize]).numpy()
    minus, plus = bits.view(form.pattern)
    assert one.dtype.itemsize == form.itemsize
    assert minus & minus.dtype.type(form.magnitude) == plus
    assert minus != plus


@pytest.mark.parametrize("form", NARROW, ids=lambda form: form.name)
def test_the_limit_of_a_threshold_is_the_first_key_that_reaches_it(form: Format) -> None:
    values = np.abs(read_by_torch(np.arange(form.largest + 1, dtype=form.pattern), form))
    some = values if form.itemsize == 1 else values[:: 1 + values.size // 300]
    thresholds = {
        float(near)
        for value in (*some, *values[-3:], *values[:3])
        for near in (value, np.nextafter(value, -np.inf), np.nextafter(value, np.inf))
    }
    for threshold in thresholds | {-1.0, -0.0, 5e-324, 1e300, math.inf, -math.inf}:
        reached = np.flatnonzero(values >= threshold)
        assert form.limit(threshold) == (reached[0] if reached.size else form.largest + 1), threshold


@given(st.sampled_from(list(FORMATS.values())), st.floats(allow_nan=False))
def test_the_key_at_a_limit_reaches_the_threshold_and_the_one_before_does_not(
    form: Format, threshold: float
) -> None:
    limit = form.limit(threshold)
    assert 0 <= limit <= form.largest + 1
    if limit <= form.largest:
        assert read_by_torch(np.array([limit], dtype=form.pattern), form)[0] >= threshold
    if limit > 0:
        assert read_by_torch(np.array([limit - 1], dtype=form.pattern), form)[0] < threshold


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_limits_at_both_ends_keep_all_or_nothing(form: Format) -> None:
    largest = float(read_by_torch(np.array([form.infinity - 1], dtype=form.pattern), form)[0])
    assert [form.limit(threshold) for threshold in (-math.inf, -1.0, -0.0, 0.0)] == [0] * 4
    assert form.limit(5e-324) == 1
    assert form.limit(largest) == form.infinity - 1
    # E4M3 has no infinity, so that its key behind the largest number is none that can be reached.
    assert form.limit(math.nextafter(largest, math.inf)) == form.infinity
    assert form.limit(math.inf) == form.infinity
    assert form.limit(math.nan) == form.largest + 1
