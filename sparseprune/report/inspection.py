"""Measuring a checkpoint: zeros and N:M patterns of every tensor, read in slabs.

Owns what a pattern is and when a tensor satisfies it. Reads through checkpoint, one slab for each job
in memory. Called by the command line; what it gives is plain data for tables and JSON.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sparseprune import __version__
from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.scoring import INTEGERS
from sparseprune.report.document import share

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from sparseprune.checkpoint import Checkpoint, StoredTensor, TensorReader

INSPECT_SCHEMA = "sparseprune.inspect.v1"
PATTERNS = ((1, 2), (2, 4), (4, 8))  # N of M elements along the last dimension; M bytes are an integer
_SLAB = 1 << 20  # elements read at a time, a multiple of every M


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
    checkpoint: Checkpoint, reader: TensorReader, jobs: int, progress: Callable[[int], None]
) -> tuple[TensorFacts, ...]:
    """The facts of every tensor, in the order of the checkpoint; `progress` is told bytes that were read."""

    def measure(stored: StoredTensor) -> TensorFacts:
        return _facts(stored, reader, progress)

    with ThreadPoolExecutor(jobs, "sparseprune") as pool:
        return tuple(pool.map(measure, checkpoint.tensors.values()))


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


def _facts(stored: StoredTensor, reader: TensorReader, progress: Callable[[int], None]) -> TensorFacts:
    zero_bits = DTYPES[stored.dtype].zero_bits
    if zero_bits is None:
        progress(stored.nbytes)
        return TensorFacts(stored.name, stored.dtype, stored.shape, stored.numel, None, ())
    zeros = 0
    asked = [
        (kept, group)
        for kept, group in PATTERNS
        if len(stored.shape) > 1 and stored.numel and stored.shape[-1] % group == 0
    ]
    fullest = dict.fromkeys(asked, 0)
    size = DTYPES[stored.dtype].bits // 8
    for first in range(0, stored.numel, _SLAB):
        last = min(first + _SLAB, stored.numel)
        nonzero = _nonzero(reader.read(stored, first * size, last * size), size, zero_bits)
        zeros += nonzero.numel() - int(nonzero.count_nonzero())
        for pattern, count in _fullest_groups(nonzero, asked).items():
            fullest[pattern] = max(fullest[pattern], count)
        progress((last - first) * size)
    patterns = tuple(f"{kept}:{group}" for (kept, group), count in fullest.items() if count <= kept)
    return TensorFacts(stored.name, stored.dtype, stored.shape, stored.numel, zeros, patterns)


def _nonzero(data: bytearray, size: int, zero_bits: int) -> Tensor:
    """Bool (elements): which elements of `size` bytes are not zero, by their bit patterns."""
    if zero_bits == 0:
        return torch.ones(len(data) // size, dtype=torch.bool)
    bits = torch.frombuffer(data, dtype=INTEGERS[size])
    limit = 1 << (8 * size - 1)
    signed = zero_bits - 2 * limit if zero_bits >= limit else zero_bits
    return bits.ne(0) if signed == -1 else bits.bitwise_and_(signed).ne(0)


def _fullest_groups(nonzero: Tensor, patterns: Iterable[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """For each pattern the largest number of non-zero elements in one group of M neighbours.

    The M bytes of a group, each 0 or 1, are read as one integer; a product with 0x01..01 adds them up in
    the highest byte.
    """
    fullest = {}
    for kept, group in patterns:
        words = nonzero.view(INTEGERS[group])
        ones = int.from_bytes(b"\x01" * group, "little")
        fullest[kept, group] = int((words * ones >> 8 * (group - 1)).max())
    return fullest
