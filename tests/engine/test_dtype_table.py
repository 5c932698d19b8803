"""The table of element types says what torch says: how wide an element is, what is zero, what is finite."""

import pytest
import torch

from sparseprune.engine.dtypes import DTYPES, torch_dtype

KNOWN = [row for row in DTYPES.values() if row.torch_name is not None]
SIGNED = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


def _patterns(bits: int, borders: tuple[int, ...]) -> list[int]:
    """All patterns of few bits; of many those about the borders, with and without every bit."""
    if bits <= 16:
        return list(range(1 << bits))
    near = {border + step for border in (0, *borders) for step in (-1, 0, 1)}
    near |= {pattern ^ 1 << bit for pattern in near for bit in range(bits)}
    return sorted({pattern & (1 << bits) - 1 for pattern in near})


def _numbers(patterns: list[int], bits: int, dtype: torch.dtype) -> torch.Tensor:
    wrapped = [pattern - (1 << bits) if pattern >> bits - 1 else pattern for pattern in patterns]
    numbers = torch.tensor(wrapped, dtype=SIGNED[bits]).view(dtype)
    return numbers.to(torch.float32) if numbers.element_size() == 1 else numbers


def test_an_element_is_as_wide_as_that_of_torch() -> None:
    widths = {row.name: row.bits for row in KNOWN}
    assert widths == {row.name: 8 * torch_dtype(row.name).itemsize for row in KNOWN}


def test_signed_numbers_are_pruned_unless_two_make_an_element_or_the_format_is_rare() -> None:
    prunable = {name for name, row in DTYPES.items() if row.prunable}
    assert prunable == {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8"}


@pytest.mark.parametrize("name", [row.name for row in KNOWN if row.zero_bits is not None])
def test_an_element_is_zero_where_torch_reads_zero(name: str) -> None:
    row = DTYPES[name]
    patterns = _patterns(row.bits, (1 << row.bits - 1, 1 << row.bits // 2))
    zeros = _numbers(patterns, row.bits, torch_dtype(name)) == 0
    assert row.zero_bits is not None
    said = [row.zero_bits != 0 and pattern & row.zero_bits == 0 for pattern in patterns]
    assert said == zeros.tolist()


@pytest.mark.parametrize("name", [row.name for row in KNOWN])
def test_an_element_is_finite_where_torch_reads_a_finite_number(name: str) -> None:
    row = DTYPES[name]
    bits = row.bits // row.parts
    dtype = torch_dtype(name).to_real() if row.parts > 1 else torch_dtype(name)
    patterns = _patterns(bits, row.nonfinite or ())
    finite = _numbers(patterns, bits, dtype).isfinite()
    # Zeros that have a sign leave it out of their bits, and so do the patterns.
    full = (1 << bits) - 1
    counted = (row.zero_bits or full) & full
    first, last = row.nonfinite or (full + 1, full + 1)
    assert [not first <= pattern & counted <= last for pattern in patterns] == finite.tolist()
