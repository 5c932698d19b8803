"""Dropping: bits of packed masks as bytes, what is dropped becomes 0 bit for bit, lost zeros are found."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.kernels.selecting import count_lost, drop, unpack

PRUNABLE = [row for row in DTYPES.values() if row.prunable]


@st.composite
def masked(draw: st.DrawFn) -> tuple[str, NDArray[Any], NDArray[np.uint8]]:
    row = draw(st.sampled_from(PRUNABLE))
    top = (1 << row.bits) - 1
    some = st.one_of(st.sampled_from([0, 1, top, top >> 1, 1 << row.bits - 1]), st.integers(0, top))
    bits = draw(st.lists(st.tuples(some, st.integers(0, 1)), max_size=40))
    return (
        row.name,
        np.array([pattern for pattern, _ in bits], dtype=f"uint{row.bits}"),
        np.array([kept for _, kept in bits], dtype=np.uint8),
    )


@given(st.lists(st.integers(0, 1), max_size=70))
def test_bits_become_bytes_the_lowest_first(wanted: list[int]) -> None:
    packed = np.zeros(-(-len(wanted) // 8), dtype=np.uint8)
    for place, kept in enumerate(wanted):
        packed[place // 8] |= kept << place % 8
    mask = np.full(len(wanted), 7, dtype=np.uint8)
    unpack(packed, mask)
    assert mask.tolist() == wanted


def test_every_byte_is_unpacked_as_numpy_does_it() -> None:
    packed = np.arange(256, dtype=np.uint8)
    mask = np.empty(2048, dtype=np.uint8)
    unpack(packed, mask)
    assert np.array_equal(mask, np.unpackbits(packed, bitorder="little"))


@given(masked())
def test_what_is_dropped_becomes_0_and_the_others_keep_every_bit(
    case: tuple[str, NDArray[Any], NDArray[np.uint8]],
) -> None:
    _, bits, mask = case
    wanted = [pattern if kept else 0 for pattern, kept in zip(bits.tolist(), mask.tolist(), strict=True)]
    drop(bits, mask)
    assert bits.tolist() == wanted


@given(masked())
def test_lost_zeros_are_those_that_are_dropped_and_no_zero_of_either_sign(
    case: tuple[str, NDArray[Any], NDArray[np.uint8]],
) -> None:
    dtype, bits, mask = case
    zero_bits = DTYPES[dtype].zero_bits
    assert zero_bits is not None
    lost = [
        place
        for place, (pattern, kept) in enumerate(zip(bits.tolist(), mask.tolist(), strict=True))
        if not kept and pattern & zero_bits
    ]
    wanted = mask.tolist().count(0), len(lost), lost[0] if lost else None
    assert count_lost(bits, zero_bits, mask) == wanted


@pytest.mark.parametrize("place", [0, 4095, 4096, 8191, 8192, 9999])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64"])
def test_the_first_lost_zero_is_found_wherever_it_is(place: int, dtype: str) -> None:
    bits = np.zeros(10_000, dtype=dtype)
    bits[place:] = 1
    mask = np.zeros(bits.size, dtype=np.uint8)
    assert count_lost(bits, 0x7F, mask) == (bits.size, bits.size - place, place)
    mask[place:] = 1
    assert count_lost(bits, 0x7F, mask) == (place, 0, None)
