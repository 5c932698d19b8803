"""Loops that a test of this folder runs as machine code are run as Python too, and have to do the same.

So what stands in the source is what was compiled, and a tracer sees which of its branches were taken. All
calls over few elements are, and of those over more a share, which depends on nothing but what they are given.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from sparseprune.engine.kernels.compiling import Loop

FEW, MOST = 128, 3000
"""Elements of the arrays of a call, without the last one, the result; more take Python too long."""
SHARE = 8
"""One in so many of the calls between them."""


def as_value(pattern: Any, magnitude: Any, shift: Any, infinity: Any) -> Any:
    """What `value_of` is compiled to."""
    key = pattern & magnitude
    if key.itemsize == 8:
        return key.view(np.float64)
    return np.float64((np.uint32(key) << shift).view(np.float32)) if key < infinity else np.float64(np.inf)


def interpreted(loop: Any, arguments: tuple[Any, ...]) -> Any:
    """What the source of a loop gives, with the types of its signature; arrays are changed in place."""
    kind = next(one for one in arguments if isinstance(one, np.ndarray)).dtype.name
    _, *words = loop._types(kind)
    typed = [_typed(one, word) for one, word in zip(arguments, words, strict=True)]
    with np.errstate(all="ignore"), pytest.MonkeyPatch.context() as patch:
        patch.setitem(loop.function.__globals__, "value_of", as_value)
        return loop.function(*typed)


def _typed(argument: Any, word: str) -> Any:
    dtype = np.dtype(word.rstrip("*"))
    if not isinstance(argument, np.ndarray):
        return dtype.type(argument)
    memory = argument.reshape(-1).view(np.uint8)
    return memory[: memory.size // dtype.itemsize * dtype.itemsize].view(dtype)


def chosen(arguments: tuple[Any, ...]) -> bool:
    """Whether a call is run as Python."""
    arrays = [one for one in arguments if isinstance(one, np.ndarray)]
    size = sum(one.size for one in arrays[:-1] or arrays)
    if size > MOST or not all(one.flags.c_contiguous for one in arrays):
        return False
    numbers = [one for one in arguments if not isinstance(one, np.ndarray)]
    return size <= FEW or zlib.crc32(repr(numbers).encode(), zlib.crc32(arrays[0].data)) % SHARE == 0


def copied(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with arrays of their own; those of one memory share one again."""
    memory: dict[tuple[int, int], Any] = {}

    def copy(one: Any) -> Any:
        if not isinstance(one, np.ndarray):
            return one
        return memory.setdefault((one.ctypes.data, one.nbytes), one.copy()).view(one.dtype)

    return tuple(map(copy, arguments))


def compared(run: Callable[..., Any]) -> Callable[..., Any]:
    def both(loop: Loop, *arguments: Any) -> Any:
        if not chosen(arguments):
            return run(loop, *arguments)
        copies = copied(arguments)
        said = interpreted(loop, copies)
        result = run(loop, *arguments)
        for copy, array in zip((said, *copies), (result, *arguments), strict=True):
            if loop.reorders and array is not None:
                np.testing.assert_allclose(copy, array, rtol=1e-12)
            elif isinstance(array, np.ndarray):
                assert copy.tobytes() == array.tobytes()
            else:
                assert copy == array
        return result

    return both


@pytest.fixture(scope="module", autouse=True)
def _loops_as_written() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "__call__", compared(Loop.__call__))
        yield
