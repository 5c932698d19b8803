"""Limits: how much a run may hold in memory at one time, and what follows for the sizes of its pieces.

Owns the bytes that things cost. Knows no files and no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparseprune.errors import SparsepruneError

INTERPRETER = 100 << 20  # Python with numpy, numba and compiled loops, measured on the CPU
TORCH = 220 << 20  # what torch 2.13 for the CPU adds, with the first thread that it works in; measured
TORCH_THREAD = 8 << 20  # that the allocator keeps for each further thread in which torch worked, measured
SLAB_BYTES = 1 << 20  # measured: the results from a slab stay in the cache (tests/benchmarks/README.md)
TILE_ELEMENTS = 1 << 18  # that the torch engine gets at one time where scopes are small
_ENGINE_BYTES = 64  # that the torch engine needs for each element of a tile: keys, norms, masks, positions
_HELD_SHARE = 4  # one part in so many is for scores that are kept while a job runs
READING = 1 << 30  # bytes in flight of commands that read, and have no --memory
_LEAST = 16 * SLAB_BYTES  # that must be left for work
# Resident bytes, measured with 50,000 tensors: of each tensor while headers are read, and from then on; of
# each that is pruned, of each scope, of each mask; the text of a header is there three times, in parts.
_READ, _KEPT, _REACHED, _SCOPE, _MASK, _TEXTS = 510, 160, 600, 600, 190, 3
_RESIZED = 2700  # of each tensor where slices are cut out: masks that are read back, shapes, places and cuts


@dataclass(frozen=True, slots=True)
class Resident:
    """What a run holds of all tensors from the beginning to the end: `nbytes` of so many."""

    tensors: int = 0
    nbytes: int = 0

    @classmethod
    def of(
        cls,
        tensors: int,
        header_bytes: int,
        *,
        reached: int,
        scopes: int = 0,
        masks: bool = False,
        resized: bool = False,
    ) -> Resident:
        """For `tensors` in headers of so many bytes; `reached` counts those that are worked on.

        With `masks` there will be a file of masks for these, `scopes` is in how many parts the work is known;
        `resized` tells that slices will be cut out.
        """
        texts = _TEXTS * header_bytes
        mask = _MASK + header_bytes // max(1, tensors) if masks else 0
        each = _KEPT + (_RESIZED if resized else 0)
        kept = texts + each * tensors + (_REACHED + mask) * reached + _SCOPE * scopes
        return cls(tensors, max(kept, texts + _READ * tensors))


@dataclass(frozen=True, slots=True)
class Limits:
    """`memory` bytes may be in flight, over all chunks and what jobs keep; a slab has about `slab` bytes.

    The interpreter is not counted, nor are the `resident` bytes that all tensors take from first to last.
    """

    memory: int
    slab: int = SLAB_BYTES
    tile: int = TILE_ELEMENTS
    resident: int = 0

    @property
    def largest_tile(self) -> int:
        """The elements that one tile of the torch engine may have at most."""
        return max(1, (self.memory - self.held) // _ENGINE_BYTES)

    @property
    def held(self) -> int:
        """Bytes of block scores that one task may hold."""
        return self.memory // _HELD_SHARE


@dataclass(frozen=True, slots=True)
class Crowd:
    """How many `threads` share the work, and the bytes of `memory` that chunks and jobs may take."""

    threads: int
    memory: int

    @classmethod
    def of(cls, limits: Limits, workers: int, *, item: int, held: int, uses_torch: bool) -> Crowd:
        """Up to `workers` threads, where the largest chunk and the largest job take so many bytes.

        What torch keeps for each thread beyond the first is taken from the memory. There are no more threads
        than have room for that and for a tile beside the largest item.
        """
        if not uses_torch:
            return cls(workers, limits.memory)
        each = TORCH_THREAD + min(item, tile_bytes(limits.tile))
        threads = min(workers, 1 + max(0, limits.memory - item - held) // each)
        return cls(threads, limits.memory - TORCH_THREAD * (threads - 1))


def tile_bytes(elements: int) -> int:
    """Memory that the torch engine takes for so many elements."""
    return _ENGINE_BYTES * elements


def memory_for_tile(elements: int) -> int:
    """The memory of a process in which one tile of the torch engine may have so many elements."""
    left = -(-tile_bytes(elements + 1) * _HELD_SHARE // (_HELD_SHARE - 1))
    return INTERPRETER + TORCH + left


def limits_of(memory: int, *, uses_torch: bool, resident: Resident = Resident()) -> Limits:
    """The limits of a run that may take so many bytes of memory, the interpreter and `resident` among them.

    SparsepruneError where these alone would not fit.
    """
    base = INTERPRETER + (TORCH if uses_torch else 0)
    left = memory - base - resident.nbytes
    needed = base + resident.nbytes + _LEAST
    if left >= _LEAST:
        return Limits(left, resident=resident.nbytes)
    if resident.nbytes > _LEAST:
        raise SparsepruneError(
            f"--memory {memory}: this checkpoint's {resident.tensors:,} tensors alone take about "
            f"{_megabytes(resident.nbytes)} beside Python{' and torch' if uses_torch else ''}, which "
            f"{'take' if uses_torch else 'takes'} {_megabytes(base)}; give {_megabytes(needed)} or more"
        )
    raise SparsepruneError(
        f"--memory {memory}: this run needs {needed} bytes at least, of which Python"
        f"{' and torch take' if uses_torch else ' takes'} {base}"
    )


def _megabytes(nbytes: int) -> str:
    """A size as --memory takes it, rounded up."""
    return f"{-(-nbytes // 1_000_000)}MB"
