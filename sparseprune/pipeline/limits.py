"""Limits: how much a run may hold in memory at one time, and what follows for the sizes of its pieces.

Owns the bytes that things cost. Knows no files and no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparseprune.errors import SparsepruneError

INTERPRETER = 100 << 20  # Python with numpy, numba and compiled loops, measured on the CPU
TORCH = 220 << 20  # what torch 2.13 for the CPU adds, measured
SLAB_BYTES = 1 << 20  # measured: what is made of a slab stays in the cache (tests/benchmarks/README.md)
TILE_ELEMENTS = 1 << 18  # what the torch engine is given at one time where scopes are small
_ENGINE_BYTES = 64  # that the torch engine needs for each element of a tile: keys, norms, masks, positions
_HELD_SHARE = 4  # one part in so many is for scores that are held while a task goes on


@dataclass(frozen=True, slots=True)
class Limits:
    """`memory` bytes may be in flight, over all items and what programs hold; a slab has about `slab` bytes.

    The interpreter is not counted.
    """

    memory: int
    slab: int = SLAB_BYTES
    tile: int = TILE_ELEMENTS

    @property
    def largest_tile(self) -> int:
        """The elements that one tile of the torch engine may have at most."""
        return max(1, (self.memory - self.held) // _ENGINE_BYTES)

    @property
    def held(self) -> int:
        """Bytes of block scores that one task may hold."""
        return self.memory // _HELD_SHARE


def tile_bytes(elements: int) -> int:
    """Memory that the torch engine takes for so many elements."""
    return _ENGINE_BYTES * elements


def memory_for_tile(elements: int) -> int:
    """The memory of a process in which one tile of the torch engine may have so many elements."""
    left = -(-tile_bytes(elements + 1) * _HELD_SHARE // (_HELD_SHARE - 1))
    return INTERPRETER + TORCH + left


def limits_of(memory: int, *, uses_torch: bool) -> Limits:
    """The limits of a run that may take so many bytes of memory, the interpreter among them.

    SparsepruneError where the interpreter alone would not fit.
    """
    base = INTERPRETER + (TORCH if uses_torch else 0)
    left = memory - base
    least = 16 * SLAB_BYTES
    if left < least:
        raise SparsepruneError(
            f"--memory {memory}: this run needs {base + least} bytes at least, of which Python"
            f"{' and torch take' if uses_torch else ' takes'} {base}"
        )
    return Limits(left)
