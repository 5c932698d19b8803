"""The floats that the compiled loops read: how a bit pattern gives a magnitude and a value.

Owns one row for each dtype. A key is a pattern without its sign: keys order as magnitudes do. A value is
the float32 whose pattern is `key << shift`, times `scale`: exact for every narrow float.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Bits = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Format:
    """One float dtype; `pattern` is numpy's name of its patterns.

    `largest` is the last key that is no NaN, `infinity` the first that stands for no finite number. `shift`
    and `scale` turn keys into values; F64 is its own value.
    """

    name: str
    pattern: str
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

    def values(self, keys: Bits) -> NDArray[np.float64]:
        """The magnitudes that keys stand for, in float64; NaN stays NaN."""
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
            Format("F64", "uint64", 0x7FF0_0000_0000_0000, 0x7FF0_0000_0000_0000),
            Format("F32", "uint32", 0x7F80_0000, 0x7F80_0000),
            Format("BF16", "uint16", 0x7F80, 0x7F80, 16),
            Format("F16", "uint16", 0x7C00, 0x7C00, 13, 2.0**112),
            Format("F8_E5M2", "uint8", 0x7C, 0x7C, 21, 2.0**112),
            Format("F8_E4M3", "uint8", 0x7E, 0x7F, 20, 2.0**120),
        )
    }
)
