"""Measuring a checkpoint: zeros and N:M patterns of every tensor, read in slabs.

Owns which patterns are asked, when a tensor satisfies one, and who reads what: every job takes the next slab
of any tensor and holds no other. Needs no torch. Called by the command line; what it gives is plain data for
tables and JSON.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseprune import __version__
from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.kernels.patterns import WORD, count_zeros
from sparseprune.report.document import share

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from sparseprune.checkpoint import Checkpoint, StoredTensor, TensorReader

    Progress = Callable[[int, str], None]

INSPECT_SCHEMA = "sparseprune.inspect.v1"
PATTERNS = ((1, 2), (2, 4), (4, 8))  # N of M elements along the last dimension, M <= 64
_SLAB = 1 << 21  # bytes read at a time: few calls, and they stay in the cache until they are counted


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """What was counted in one tensor; `zeros` is None where elements are not whole bytes.

    `patterns` are the N:M patterns that it satisfies: in every group of M neighbours along the last
    dimension at most N are not zero. Only matrices and what has more dimensions are asked.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    numel: int
    zeros: int | None
    patterns: tuple[str, ...]

    @property
    def sparsity(self) -> float | None:
        return None if self.zeros is None else share(self.zeros, self.numel)


def inspect_checkpoint(
    checkpoint: Checkpoint, reader: TensorReader, jobs: int, progress: Progress
) -> tuple[TensorFacts, ...]:
    """The facts of every tensor, in the order of the checkpoint; the same for any number of jobs.

    `progress` is told how many bytes were read, and the tensor they belong to. Of several failures the
    one is raised that is the first in the order of the checkpoint.
    """
    tallies = [_Tally(stored) for stored in checkpoint.tensors.values()]
    _Readers(tallies, reader, progress).run(jobs)
    return tuple(tally.facts() for tally in tallies)


def inspect_document(path: str, facts: Iterable[TensorFacts]) -> dict[str, Any]:
    """The facts as plain data, in the shape of schemas/inspect.schema.json."""
    tensors = list(facts)
    numel = sum(one.numel for one in tensors)
    zeros = sum(one.zeros or 0 for one in tensors)
    return {
        "schema": INSPECT_SCHEMA,
        "sparseprune": __version__,
        "input": path,
        "totals": {
            "tensors": len(tensors),
            "numel": numel,
            "pruned": zeros,
            "sparsity": share(zeros, numel),
            "patterns": {
                pattern: sum(pattern in one.patterns for one in tensors)
                for pattern in (f"{kept}:{group}" for kept, group in PATTERNS)
            },
        },
        "tensors": [
            {
                "name": one.name,
                "dtype": one.dtype,
                "shape": list(one.shape),
                "numel": one.numel,
                "zeros": one.zeros,
                "sparsity": one.sparsity,
                "patterns": list(one.patterns),
            }
            for one in tensors
        ],
    }


class _Tally:
    """What is known of one tensor. Slabs are added in any order, by one thread at a time.

    A slab is `step` bytes, or what is left: whole groups of every pattern that the tensor could satisfy.
    """

    def __init__(self, stored: StoredTensor) -> None:
        self.stored = stored
        self.dtype = DTYPES[stored.dtype]
        self._zeros = 0
        self._left: tuple[tuple[int, int], ...] = ()
        if self.dtype.zero_bits is not None and len(stored.shape) > 1 and stored.numel:
            self._left = tuple(pattern for pattern in PATTERNS if stored.shape[-1] % pattern[1] == 0)
        groups = math.lcm(*self.groups) * max(1, self.dtype.bits // 8)
        self.step = groups * max(1, _SLAB // groups)

    @property
    def groups(self) -> set[int]:
        """The M of the patterns that nothing was found against so far."""
        return {group for _, group in self._left}

    def add(self, zeros: int, fullest: Mapping[int, int]) -> None:
        """What one slab holds: zeros, and by M the most non-zero elements of one group."""
        self._zeros += zeros
        self._left = tuple((kept, group) for kept, group in self._left if fullest[group] <= kept)

    def facts(self) -> TensorFacts:
        stored = self.stored
        zeros = None if self.dtype.zero_bits is None else self._zeros
        patterns = tuple(f"{kept}:{group}" for kept, group in self._left)
        return TensorFacts(stored.name, stored.dtype, stored.shape, stored.numel, zeros, patterns)


class _Readers:
    """Threads that take slabs in the order of the checkpoint, as they become free, and add them up."""

    def __init__(self, tallies: Sequence[_Tally], reader: TensorReader, progress: Progress) -> None:
        slabs = (
            (tally, begin, min(begin + tally.step, tally.stored.nbytes))
            for tally in tallies
            for begin in range(0, tally.stored.nbytes, tally.step)
        )
        self._slabs = enumerate(slabs)
        self._longest = max((min(tally.step, tally.stored.nbytes) for tally in tallies), default=0)
        self._reader = reader
        self._progress = progress
        self._failures: dict[int, BaseException] = {}
        self._lock = threading.Lock()

    def run(self, jobs: int) -> None:
        threads = [threading.Thread(target=self._work, name=f"sparseprune-{n}") for n in range(jobs)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            self._stop()  # where Ctrl-C comes, or no thread can be had
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        if self._failures:
            # Slabs are begun in order and what is begun is ended: nothing earlier can have failed unseen.
            raise self._failures[min(self._failures)]

    def _stop(self) -> None:
        with self._lock:
            self._slabs = enumerate(())

    def _take(self) -> tuple[int, tuple[_Tally, int, int]] | None:
        with self._lock:
            return next(self._slabs, None)

    def _work(self) -> None:
        number = -1
        try:
            data = np.empty(self._longest, dtype=np.uint8)
            scratch = np.empty(-(-self._longest // WORD) * WORD, dtype=np.bool_)
            while (taken := self._take()) is not None:
                number, (tally, begin, end) = taken
                self._count(tally, begin, data[: end - begin], scratch)
                self._progress(end - begin, tally.stored.name)
        except BaseException as failure:  # noqa: BLE001  (raised by `run`, in the thread that waits)
            self._failures[number] = failure
            self._stop()

    def _count(self, tally: _Tally, begin: int, data: NDArray[np.uint8], scratch: NDArray[np.bool_]) -> None:
        dtype = tally.dtype
        if dtype.zero_bits is None:
            return
        self._reader.read_into(tally.stored, begin, data)
        bits = data.view(f"u{dtype.bits // 8}")
        zeros, fullest = count_zeros(bits, dtype.zero_bits, tally.groups, scratch)
        with self._lock:
            tally.add(zeros, fullest)
