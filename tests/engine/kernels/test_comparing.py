"""Comparing: counts, energies and the largest change, as plain loops over exact numbers find them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparseprune.engine.dtypes import DTYPES, torch_dtype
from sparseprune.engine.kernels.comparing import Counts, Energies, compare, compare_values
from sparseprune.engine.kernels.formats import values_of

Number = int | float | complex

WHOLE = [name for name, dtype in DTYPES.items() if dtype.zero_bits is not None]
ANY_SIZE = [0, 1, 511, 4097]
WHOLE_BLOCKS = 4096


@dataclass(frozen=True)
class Found:
    """What plain loops find; energies before, after and of the changes."""

    counts: Counts
    energies: tuple[float, float, float]
    largest: float
    place: int


def numbers(bits: NDArray[Any], dtype: str) -> list[Number]:
    """The numbers that torch reads."""
    if dtype == "BOOL" or not bits.size:
        return [int(pattern) for pattern in bits]
    read = torch.frombuffer(bytearray(bits.tobytes()), dtype=torch_dtype(dtype))
    return [number.item() for number in (read.to(torch.float64) if dtype.startswith("F") else read)]


def compared_by_hand(before: NDArray[Any], after: NDArray[Any], dtype: str, dtype_after: str) -> Found:
    """Element by element: those of one dtype by bits, those of two by value."""
    patterns = zip(before.tolist(), after.tolist(), strict=True)
    counts = [0, 0, 0, 0]
    first, largest, place = -1, 0.0, -1
    squares: list[list[float]] = [[], [], []]
    old, new = numbers(before, dtype), numbers(after, dtype_after)
    for at, (one, two, bits) in enumerate(zip(old, new, patterns, strict=True)):
        if dtype == dtype_after:
            same = bits[0] == bits[1] or (one == 0 and two == 0)
        else:
            same = one == two or (one != one and two != two)  # noqa: PLR0124  (NaN)
        counts[0] += one == 0
        counts[1] += two == 0
        counts[2] += one != 0 and two == 0
        if two != 0 and not same:
            counts[3] += 1
            first = at if first < 0 else first
        change = 0.0 if same else distance(one, two)
        if not same and (place < 0 or change > largest):
            largest, place = change, at
        kept = energy(one) if two != 0 else 0.0
        for each, square in zip(squares, (energy(one), kept, change * change), strict=True):
            each.append(square)
    return Found(
        Counts(counts[0], counts[1], counts[2], counts[3], first),
        (total(squares[0]), total(squares[1]), total(squares[2])),
        largest,
        place,
    )


def distance(one: Number, two: Number) -> float:
    """The magnitude of a difference, rounded once; infinite where it is no number."""
    if isinstance(one, complex) or isinstance(two, complex):
        change = complex(two) - complex(one)
        return min(math.inf, math.hypot(change.real, change.imag))  # NaN is not less
    return min(math.inf, abs(float(two) - float(one)))


def energy(number: Number) -> float:
    real, imaginary = float(number.real), float(number.imag)
    return real * real + imaginary * imaginary


def total(squares: Sequence[float]) -> float:
    try:
        return math.fsum(squares) if all(map(math.isfinite, squares)) else math.inf
    except OverflowError:
        return math.inf


def assert_found(counts: Counts, energies: Energies, expected: Found) -> None:
    assert counts == expected.counts
    found = energies.before, energies.kept, energies.change
    for sum_found, sum_expected in zip(found, expected.energies, strict=True):
        if sum_expected < 1e308:
            assert sum_found == pytest.approx(sum_expected, rel=1e-12, abs=1e-300)
        else:  # the order of a sum tells whether it leaves the range
            assert not sum_found < 0.99e308
    assert energies.largest == pytest.approx(expected.largest, rel=1e-15, abs=0)
    assert energies.place == expected.place


def special(dtype: str) -> list[int]:
    """Patterns of zeros, ones, the ends of the range, subnormals, infinities and NaN of several payloads."""
    bits = DTYPES[dtype].bits
    if dtype == "BOOL":
        return [0, 1]
    full, sign = (1 << bits) - 1, 1 << bits - 1
    near = {0, 1, 2, full, sign, sign - 1, sign | 1, full - 1}
    first, last = DTYPES[dtype].nonfinite or (1, 1)
    near |= {first, last, first - 1, first | sign, last | sign, (first - 1) | sign}
    if dtype == "C64":
        words = [0, 1, 1 << 31, 0x3F800000, 0xBF800000, 0x40000000]
        return [one << 32 | two for one in words for two in words]
    return sorted(near)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[NDArray[Any], NDArray[Any], str]:
    """Two runs of one dtype: the same, some zeroed, some drawn anew."""
    dtype = draw(st.sampled_from(WHOLE))
    some = st.sampled_from(special(dtype))
    if dtype not in {"BOOL", "C64"}:
        some |= st.integers(0, (1 << DTYPES[dtype].bits) - 1)
    before = np.array(draw(st.lists(some, max_size=40)), dtype=f"u{DTYPES[dtype].bits // 8}")
    after = before.copy()
    ways = st.sampled_from(["keep", "zero", "minus zero", "other"])
    if draw(st.booleans()):
        ways = st.sampled_from(["keep", "zero"])
    for at in range(before.size):
        way = draw(ways)
        if way == "zero":
            after[at] = 0
        elif way == "minus zero" and DTYPES[dtype].zero_bits != (1 << DTYPES[dtype].bits) - 1:
            after[at] = 1 << DTYPES[dtype].bits - 1
        elif way == "other":
            after[at] = draw(some)
    return before, after, dtype


@given(pairs())
def test_one_dtype_is_compared_as_plain_loops_do(case: tuple[NDArray[Any], NDArray[Any], str]) -> None:
    before, after, dtype = case
    kept = before.copy(), after.copy()
    counts, energies = compare(before, after, dtype)
    expected = compared_by_hand(before, after, dtype, dtype)
    if dtype in {"I64", "U64"} and energies.place < 0:  # numbers that float64 does not tell apart
        expected = Found(expected.counts, expected.energies, 0.0, -1)
    assert_found(counts, energies, expected)
    assert (before == kept[0]).all()
    assert (after == kept[1]).all()


@given(pairs(), st.data())
def test_unlike_dtypes_are_compared_by_value(
    case: tuple[NDArray[Any], NDArray[Any], str], data: st.DataObject
) -> None:
    before, _, dtype = case
    other = data.draw(st.sampled_from([name for name in WHOLE if name != dtype]))
    size = before.size
    some = st.lists(st.sampled_from(special(other)), min_size=size, max_size=size)
    after = np.array(data.draw(some), dtype=f"u{DTYPES[other].bits // 8}")
    found = compare_values(values_of(before, dtype), values_of(after, other))
    assert_found(*found, compared_by_hand(before, after, dtype, other))


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        *product(WHOLE, [513]),
        *((dtype, ANY_SIZE[number % len(ANY_SIZE)]) for number, dtype in enumerate(WHOLE)),
        *product(("F64", "F32", "BF16", "F8_E5M2", "I8"), [WHOLE_BLOCKS]),
    ],
)
def test_any_size_is_compared_to_its_end(dtype: str, size: int) -> None:
    drawn = np.random.default_rng(size)
    some = np.array(special(dtype), dtype=f"u{DTYPES[dtype].bits // 8}")
    some = np.array([each for each in some if math.isfinite(abs(numbers(np.array([each]), dtype)[0]))])
    before = drawn.choice(some, size).astype(f"u{DTYPES[dtype].bits // 8}")
    pruned = before * drawn.integers(0, 2, size).astype(before.dtype)
    altered = np.where(drawn.integers(0, 9, size) == 0, drawn.choice(some, size).astype(before.dtype), before)
    late = before.copy()
    late[-1:] = before[:1]
    for after in (before.copy(), pruned, altered, late):
        found = compare(before, after, dtype)
        expected = compared_by_hand(before, after, dtype, dtype)
        if dtype in {"I64", "U64"}:
            place, largest = found[1].place, found[1].largest
            expected = Found(expected.counts, expected.energies, largest, place)
        assert_found(*found, expected)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E5M2", "I8", "I32", "C64"])
@pytest.mark.parametrize("after", [0, 1])
def test_the_first_of_equal_changes_is_told_wherever_it_is(dtype: str, after: int) -> None:
    kinds = {
        name: torch.zeros(0, dtype=torch_dtype(name)).numpy().dtype
        for name in ("F64", "F32", "F16", "I8", "I32", "C64")
    }
    one = {"BF16": 0x3F80, "F8_E5M2": 0x3C}.get(dtype)
    width = DTYPES[dtype].bits // 8
    if one is None:
        one = int.from_bytes(np.ones(1, dtype=kinds[dtype]).tobytes(), "little")
    for place in (0, 3, 511, 512, 4096, 5000):
        before = np.full(6000, one, dtype=f"u{width}")
        changed = before.copy()
        changed[[place, 5999]] = 0
        changed[place:][1:3] = after * one
        counts, energies = compare(before, changed, dtype)
        assert (energies.largest, energies.place) == (1.0, place)
        assert counts.altered == 0
        back, energies = compare(changed, before, dtype)
        assert (energies.largest, energies.place, back.first_altered) == (1.0, place, place)
        assert back.revived == back.altered == counts.zeroed


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3"])
def test_the_first_change_that_is_not_finite_is_the_largest(dtype: str) -> None:
    first, last = DTYPES[dtype].nonfinite or (0, 0)
    before = np.zeros(10_000, dtype=f"u{DTYPES[dtype].bits // 8}")
    before[:] = first - 1
    before[[700, 9000]] = first, last
    after = before.copy()
    after[[3, 700, 9000]] = 0
    _, energies = compare(before, after, dtype)
    assert (energies.largest, energies.place) == (math.inf, 700)
    after[5] = 1
    _, energies = compare(before, after, dtype)
    assert (energies.largest, energies.place) == (math.inf, 700)


def test_zeros_of_either_sign_are_equal_and_nan_only_to_its_own_bits() -> None:
    before = np.array([0, 0x8000, 0x7FC0, 0x7FC0, 0x7F80], dtype=np.uint16)
    after = np.array([0x8000, 0, 0x7FC0, 0x7FC1, 0x7F80], dtype=np.uint16)
    counts, energies = compare(before, after, "BF16")
    assert counts == Counts(2, 2, 0, 1, 3)
    assert (energies.largest, energies.place) == (math.inf, 3)
    counts, energies = compare(before[:3], after[:3], "BF16")
    assert (counts, energies.change, energies.place) == (Counts(2, 2), 0.0, -1)


def test_dtypes_of_less_than_a_byte_are_refused() -> None:
    nothing = np.zeros(4, dtype=np.uint8)
    with pytest.raises(KeyError, match="F4"):
        compare(nothing, nothing, "F4")


def test_plain_loops_tell_a_case_by_hand() -> None:
    before, after = (
        np.array(each, dtype=np.float32).view(np.uint32) for each in ([3, 4, 1, 0], [3, 0, -1, 2])
    )
    expected = Found(Counts(1, 1, 1, 2, 2), (26.0, 10.0, 24.0), 4.0, 1)
    assert compared_by_hand(before, after, "F32", "F32") == expected
    wrong = Counts(1, 1, 1, 1, 2)
    with pytest.raises(AssertionError):
        assert_found(wrong, Energies(26, 10, 24, 4, 1), expected)
    for energies in ((26, 10, 24, 4, 2), (26, 10, 24, 3, 1), (25, 10, 24, 4, 1), (26, 14, 24, 4, 1)):
        with pytest.raises(AssertionError):
            assert_found(expected.counts, Energies(*energies), expected)
