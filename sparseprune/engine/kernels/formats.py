"""The dtypes of compiled loops: bit patterns, keys, and values.

Owns one row for each floating dtype, and the values of all other dtypes. Called by kernels, execution and
reports.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Bits = NDArray[Any]
    Singles = NDArray[np.float32]
    Values = NDArray[Any]


class Format(Struct, frozen=True):
    """One float dtype; `pattern` is the numpy dtype of its bits, a key is a pattern without its sign.

    `mantissa` is how many bits a key has below its exponent. `largest` is the last key that is not NaN,
    `infinity` the first that is no finite number. `shift` and `scale` turn keys into values; an F64 key is
    its own value.
    """

    name: str
    pattern: str
    mantissa: int
    largest: int
    infinity: int
    shift: int = 0
    scale: float = 1.0

    @property
    def itemsize(self) -> int:
        return np.dtype(self.pattern).itemsize

    @property
    def magnitude(self) -> int:
        """The bits of a key: all but the sign."""
        return (1 << (8 * self.itemsize - 1)) - 1

    @property
    def numbers(self) -> tuple[int, int, int]:
        """For `value_of` in loops: magnitude, shift and infinity."""
        return self.magnitude, self.shift, self.infinity

    def values(self, keys: Bits) -> NDArray[np.float64]:
        """The magnitudes of keys, in float64; NaN stays NaN."""
        if self.itemsize == 8:
            return keys.view(np.float64)
        patterns = (keys.astype(np.uint32) << np.uint32(self.shift)).view(np.float32)
        with np.errstate(invalid="ignore"):  # a signalling NaN is widened like every other
            wide = patterns.astype(np.float64)
        wide *= self.scale
        if self.infinity > self.largest:  # E4M3 has no infinity
            wide[keys > self.largest] = np.nan
        elif self.scale != 1:
            wide[keys == self.infinity] = np.inf
            wide[keys > self.infinity] = np.nan
        return wide

    def limit(self, threshold: float) -> int:
        """The least key whose value is `threshold` or more: one above the largest where there is none."""
        low, high = 0, self.largest + 1
        while low < high:
            middle = (low + high) // 2
            value = float(self.values(np.array([middle], dtype=self.pattern))[0])
            low, high = (low, middle) if value >= threshold else (middle + 1, high)
        return low


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        row.name: row
        for row in (
            Format("F64", "uint64", 52, 0x7FF0_0000_0000_0000, 0x7FF0_0000_0000_0000),
            Format("F32", "uint32", 23, 0x7F80_0000, 0x7F80_0000),
            Format("BF16", "uint16", 7, 0x7F80, 0x7F80, 16),
            Format("F16", "uint16", 10, 0x7C00, 0x7C00, 13, 2.0**112),
            Format("F8_E5M2", "uint8", 2, 0x7C, 0x7C, 21, 2.0**112),
            Format("F8_E4M3", "uint8", 3, 0x7E, 0x7F, 20, 2.0**120),
        )
    }
)


def values_of(bits: Bits, dtype: str) -> Values:
    """The values of elements (flat, unsigned patterns); KeyError where they are not whole bytes.

    In float32 where it holds all values of a dtype, else in float64, C64 in complex64; exact except integers
    beyond 2**53. May share the memory of `bits`.

    >>> values_of(np.array([0xBF80, 0x8000], dtype=np.uint16), "BF16")
    array([-1., -0.], dtype=float32)
    """
    if dtype in _TABLES:
        return _TABLES[dtype].take(bits, mode="wrap")  # twice as fast as a checked index
    if dtype == "BF16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "F16":
        with np.errstate(invalid="ignore"):  # a signalling NaN is widened like every other
            return bits.view(np.float16).astype(np.float32)
    if dtype in _AS_THEY_ARE:
        return bits.view(_AS_THEY_ARE[dtype])
    return bits.view(_INTEGERS[dtype]).astype(np.float64 if bits.itemsize > 2 else np.float32)


def bits_of(values: NDArray[np.float64], dtype: str) -> Bits:
    """The patterns of float64 values as F64, F32, BF16 or F16, rounded once, to even; KeyError for others.

    >>> [hex(bits) for bits in bits_of(np.array([-1.0, 1 + 2**-8 + 2**-40]), "BF16")]
    ['0xbf80', '0x3f81']
    """
    with np.errstate(over="ignore"):  # beyond the largest is infinity
        if dtype == "F16":
            return values.astype(np.float16).view(np.uint16)
        singles = values.astype(_AS_THEY_ARE.get(dtype, np.float32))
    bits: Bits = singles.view(FORMATS["F32" if dtype == "BF16" else dtype].pattern)
    if dtype != "BF16":
        return bits
    # What lies halfway in float32 may have been rounded to there, from above or from below.
    wide, rounded = np.abs(values), np.abs(singles)
    halfway = (bits & np.uint32(0xFFFF)) == 0x8000
    bits = bits + (halfway & (wide > rounded)) - (halfway & (wide < rounded))
    even = (bits >> np.uint32(16)) & np.uint32(1)
    return np.where(np.isnan(values), 0x7FC0, (bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(
        np.uint16
    )


_AS_THEY_ARE: Mapping[str, Any] = MappingProxyType(
    {"F32": np.float32, "F64": np.float64, "C64": np.complex64}
)
_INTEGERS: Mapping[str, str] = MappingProxyType(
    {"BOOL": "u1"}
    | {f"{letter}{8 * size}": f"{letter.lower()}{size}" for letter in "IU" for size in (1, 2, 4, 8)}
)


def _of_format(name: str) -> Singles:
    """The values of all bytes, where the upper half is the negative of the lower half."""
    with np.errstate(invalid="ignore"):
        values = FORMATS[name].values(np.arange(128, dtype=np.uint8)).astype(np.float32)
    return np.concatenate([values, -values])


def _without_negative_zero(mantissa_bits: int, bias: int) -> Singles:
    """The values of all bytes of sign, exponent, mantissa, where minus zero is the only NaN."""
    keys = np.arange(128)
    mantissa = (keys & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    exponent = keys >> mantissa_bits
    magnitudes = np.ldexp(np.where(exponent > 0, 1 + mantissa, mantissa), np.maximum(exponent, 1) - bias)
    values = np.concatenate([magnitudes, -magnitudes]).astype(np.float32)
    values[0x80] = np.nan
    return values


def _scales() -> Singles:
    """The values of all bytes that are exponents of two; the last one is NaN."""
    values = np.ldexp(np.float64(1), np.arange(256) - 127)
    values[0xFF] = np.nan
    return values.astype(np.float32)


# As torch reads them: float8_e5m2, float8_e4m3fn, float8_e4m3fnuz, float8_e5m2fnuz, float8_e8m0fnu.
_TABLES: Mapping[str, Singles] = MappingProxyType(
    {
        "F8_E5M2": _of_format("F8_E5M2"),
        "F8_E4M3": _of_format("F8_E4M3"),
        "F8_E4M3FNUZ": _without_negative_zero(3, 8),
        "F8_E5M2FNUZ": _without_negative_zero(2, 16),
        "F8_E8M0": _scales(),
    }
)
