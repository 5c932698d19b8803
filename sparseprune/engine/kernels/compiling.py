"""How the loops of this room are compiled: by numba, without the interpreter's lock, kept on disk.

Owns what to do where nothing can be kept. Knows no loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar, cast

import numba

if TYPE_CHECKING:
    from collections.abc import Callable

Loop = TypeVar("Loop", bound="Callable[..., object]")


def compiled(loop: Loop) -> Loop:
    """The loop, compiled when it is first called with arguments of some types.

    The machine code is kept beside the package, or in the user's cache folder; where neither can be
    written every process compiles anew.
    """
    return _compiled(loop, set())


def compiled_sum(loop: Loop) -> Loop:
    """As `compiled`, for sums of floats whose last bits may depend on the width of the machine's vectors."""
    return _compiled(loop, {"reassoc"})


def _compiled(loop: Loop, fastmath: set[str]) -> Loop:
    try:
        return cast("Loop", numba.njit(cache=True, nogil=True, fastmath=fastmath)(loop))
    except RuntimeError:  # "cannot cache function: no locator available": no folder can be written
        return cast("Loop", numba.njit(cache=False, nogil=True, fastmath=fastmath)(loop))
