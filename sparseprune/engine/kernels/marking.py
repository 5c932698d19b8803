"""Looking at the elements of a slab: which are zero, and how many are no finite numbers.

Numpy's own vectorised loops, which count faster than cached pages are read. Owns these two facts of bit
patterns, whatever the dtype; knows nothing of shapes. Called by what measures checkpoints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparseprune.engine.dtypes import Dtype
    from sparseprune.engine.kernels.formats import Bits

    Flags = NDArray[np.bool_]


def mark_nonzero(bits: Bits, dtype: Dtype, marks: Flags) -> tuple[int, int]:
    """How many elements are zero, of either sign, and how many are NaN or infinite.

    `bits` are the patterns of elements of whole bytes, flat and unsigned, and are overwritten. `marks`, as
    many, become True where an element is not zero.

    >>> from sparseprune.engine.dtypes import DTYPES
    >>> marks = np.empty(4, dtype=np.bool_)
    >>> mark_nonzero(np.array([0x8000, 0x3F80, 0xFF80, 0], dtype=np.uint16), DTYPES["BF16"], marks), marks
    ((2, 1), array([False,  True,  True, False]))
    """
    if dtype.zero_bits == 0:
        marks[...] = True
        return 0, _nonfinite(bits, dtype)
    if dtype.zero_bits != np.iinfo(bits.dtype).max:
        bits &= bits.dtype.type(dtype.zero_bits)
    np.not_equal(bits, 0, out=marks)
    return bits.size - int(np.count_nonzero(marks)), _nonfinite(bits, dtype)


def _nonfinite(bits: Bits, dtype: Dtype) -> int:
    if dtype.nonfinite is None or bits.size == 0:
        return 0
    first, last = dtype.nonfinite
    numbers = bits.view(f"u{bits.itemsize // dtype.parts}")
    if numbers.max() < first:  # the cheapest question that nearly always settles it
        return 0
    found = numbers - numbers.dtype.type(first) <= last - first  # what lies below wraps around
    return int(np.count_nonzero(found.reshape(-1, dtype.parts).any(axis=1) if dtype.parts > 1 else found))
