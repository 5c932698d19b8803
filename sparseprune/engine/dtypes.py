"""The one table of element types: the safetensors name, its width, its torch dtype, may it be pruned.

Owns this fact for every layer. Knows neither torch nor files, so that headers can be read and plans
be made without importing torch; `torch_dtype` resolves a name when tensors are at hand.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


class Dtype(Struct, frozen=True):
    """One element type: `bits` per element, `torch_name` (None where torch has none), `prunable`.

    `zero_bits` are the bits that are all 0 just where an element is zero (all but the sign of a float);
    0 where no bit pattern is zero, None where elements are not whole bytes. `nonfinite` are the first and
    the last pattern that stand for no finite number, the sign left out where zeros have one; None where all
    are finite, and where elements are not whole bytes. They are patterns of each of the `parts`, the
    numbers that make an element.
    """

    name: str
    bits: int
    torch_name: str | None
    zero_bits: int | None
    prunable: bool = False
    nonfinite: tuple[int, int] | None = None
    parts: int = 1

    @property
    def itemsize(self) -> int:
        """Bytes of an element; 0 where elements are not whole bytes."""
        return self.bits // 8


# Names and widths as in the safetensors format (huggingface/safetensors, `Dtype` of its Rust crate).
_ROWS = (
    Dtype("BOOL", 8, "bool", 0xFF),
    Dtype("F4", 4, None, None),
    Dtype("F6_E2M3", 6, None, None),
    Dtype("F6_E3M2", 6, None, None),
    Dtype("U8", 8, "uint8", 0xFF),
    Dtype("I8", 8, "int8", 0xFF, prunable=True),
    Dtype("F8_E5M2", 8, "float8_e5m2", 0x7F, prunable=True, nonfinite=(0x7C, 0x7F)),
    Dtype("F8_E4M3", 8, "float8_e4m3fn", 0x7F, prunable=True, nonfinite=(0x7F, 0x7F)),
    Dtype("F8_E8M0", 8, "float8_e8m0fnu", 0, nonfinite=(0xFF, 0xFF)),  # a power of two, never zero
    # Of these two the negative zero is NaN.
    Dtype("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", 0xFF, nonfinite=(0x80, 0x80)),
    Dtype("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", 0xFF, nonfinite=(0x80, 0x80)),
    Dtype("I16", 16, "int16", 0xFFFF, prunable=True),
    Dtype("U16", 16, "uint16", 0xFFFF),
    Dtype("F16", 16, "float16", 0x7FFF, prunable=True, nonfinite=(0x7C00, 0x7FFF)),
    Dtype("BF16", 16, "bfloat16", 0x7FFF, prunable=True, nonfinite=(0x7F80, 0x7FFF)),
    Dtype("I32", 32, "int32", 0xFFFF_FFFF, prunable=True),
    Dtype("U32", 32, "uint32", 0xFFFF_FFFF),
    Dtype("F32", 32, "float32", 0x7FFF_FFFF, prunable=True, nonfinite=(0x7F80_0000, 0x7FFF_FFFF)),
    Dtype("C64", 64, "complex64", 0x7FFF_FFFF_7FFF_FFFF, nonfinite=(0x7F80_0000, 0x7FFF_FFFF), parts=2),
    Dtype("F64", 64, "float64", (1 << 63) - 1, prunable=True, nonfinite=(0x7FF0 << 48, (1 << 63) - 1)),
    Dtype("I64", 64, "int64", 0xFFFF_FFFF_FFFF_FFFF, prunable=True),
    Dtype("U64", 64, "uint64", 0xFFFF_FFFF_FFFF_FFFF),
)
DTYPES: Mapping[str, Dtype] = MappingProxyType({row.name: row for row in _ROWS})


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name; KeyError for one that torch does not have."""
    import torch  # noqa: PLC0415  (headers are read without torch)

    torch_name = DTYPES[name].torch_name
    if torch_name is None:
        raise KeyError(name)
    dtype: torch.dtype = getattr(torch, torch_name)
    return dtype
