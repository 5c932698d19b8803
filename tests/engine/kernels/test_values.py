"""Values: every dtype is read as torch reads it."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sparseprune.engine.dtypes import DTYPES, torch_dtype
from sparseprune.engine.kernels.formats import values_of

WHOLE = [name for name, dtype in DTYPES.items() if dtype.zero_bits is not None]


def samples(name: str) -> NDArray[Any]:
    """All patterns of one and two bytes; of more a thousand and those around every power of two."""
    bits = DTYPES[name].bits
    if name == "BOOL":
        return np.array([0, 1], dtype=np.uint8)
    if bits <= 16:
        return np.arange(1 << bits, dtype=np.uint32).astype(f"u{bits // 8}")
    powers = [1 << at for at in range(bits)]
    drawn = np.random.default_rng(0).integers(0, 1 << bits, 1000, dtype=np.uint64, endpoint=False)
    edges = np.array([0, *powers, *(power - 1 for power in powers), (1 << bits) - 1], dtype=np.uint64)
    return np.concatenate([edges, drawn]).astype(f"u{bits // 8}")


@pytest.mark.parametrize("name", WHOLE)
def test_values_are_those_that_torch_reads(name: str) -> None:
    bits = samples(name)
    values = values_of(bits, name)
    read = torch.frombuffer(bytearray(bits.tobytes()), dtype=torch_dtype(name))
    wide = np.complex128 if name == "C64" else np.float64
    with np.errstate(invalid="ignore"):
        expected = read.to(torch.complex128 if name == "C64" else torch.float64).numpy()
        assert np.array_equal(values.astype(wide), expected, equal_nan=True)
    if name != "C64":  # of which numpy compares only what is a number
        signs = ~np.isnan(values)
        assert np.array_equal(np.signbit(values)[signs], np.signbit(expected)[signs])


@pytest.mark.parametrize("name", WHOLE)
def test_values_of_nothing_are_nothing(name: str) -> None:
    assert values_of(samples(name)[:0], name).size == 0


def test_elements_of_less_than_a_byte_have_no_values() -> None:
    with pytest.raises(KeyError, match="F4"):
        values_of(np.zeros(1, dtype=np.uint8), "F4")
