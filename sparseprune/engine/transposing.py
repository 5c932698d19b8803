"""Transposable N:M: square tiles in which n of m survive in every row and in every column.

Owns the exact choice of the largest sum of scores among all legal patterns of a tile (Hubara et al. 2021,
"Accelerated Sparse Neural Training", section 4, maximize sums of |w|). Knows no block and no file. Called by
scopes. Imports torch.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations, product
from typing import TYPE_CHECKING

import numpy as np
import torch
from msgspec import Struct

from sparseprune.engine.kernels.tiles import best_numbers
from sparseprune.errors import SparsityError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from sparseprune.engine.kernels.tiles import Integers

SCORE_BITS = 46  # of a score beside the largest one of its tile; sums of these are exact
_CHUNK = 1 << 13  # tiles that are decided at one time, so that their sums stay in the cache

Rows = tuple[int, ...]


class _Patterns(Struct, frozen=True):
    """The rows that may be kept, and upper and lower halves of tiles by how many each column keeps.

    A half has the number of a row's pattern for each of its rows; lower numbers keep lower indices.
    """

    rows: tuple[Rows, ...]
    upper: Mapping[Rows, tuple[Rows, ...]]
    lower: Mapping[Rows, tuple[Rows, ...]]


@lru_cache(maxsize=8)
def _patterns(size: int, kept: int) -> _Patterns:
    rows = tuple(combinations(range(size), kept))
    halves: list[dict[Rows, tuple[Rows, ...]]] = []
    for height in (size // 2, size - size // 2):
        half: dict[Rows, tuple[Rows, ...]] = {}
        for chosen in product(range(len(rows)), repeat=height):
            counts = tuple(sum(column in rows[one] for one in chosen) for column in range(size))
            if max(counts) <= kept:
                half[counts] = (*half.get(counts, ()), chosen)
        halves.append(half)
    return _Patterns(rows, *halves)


def select_transposable(scores: Tensor, size: int, kept: int) -> Tensor:
    """Bool mask of the shape of `scores` (..., size * size): `kept` True in each row and column of a tile.

    The sum of the scores that are kept is the largest one; of equal sums the pattern wins that keeps lower
    indices first, in row-major order. Scores count in integer multiples of 2**-46 of the power of two above
    the largest one of their tile, so that sums are exact on every device, in any order.

    >>> select_transposable(torch.tensor([[1.0, 3.0, 2.0, 1.0]]), 2, 1)
    tensor([[False,  True,  True, False]])

    Raises:
        SparsityError: a score is infinite, NaN or negative, so that sums of them say nothing.
    """
    if kept in (0, size) or not scores.numel():
        return torch.full(scores.shape, kept == size, dtype=torch.bool, device=scores.device)
    tiles = scores.detach().reshape(-1, size * size).to(torch.float64)
    if not bool((torch.isfinite(tiles) & (tiles >= 0)).all()):
        raise SparsityError("transposable N:M adds scores up: found one that is infinite, NaN or negative")
    table = _masks(size, kept).to(scores.device)
    numbers = [_numbers(chunk, size, kept) for chunk in torch.split(tiles, _CHUNK)]
    kept_elements: Tensor = table[torch.cat(numbers)]
    return kept_elements.reshape(scores.shape)


def _numbers(tiles: Tensor, size: int, kept: int) -> Tensor:
    """The number of the best pattern of each tile: its rows' numbers as digits, the first row's foremost.

    A sum and that number are one integer: the largest one has the largest sum and the lowest number.
    """
    found = _patterns(size, kept)
    digits = len(found.rows)
    shift = (digits**size - 1).bit_length()
    values = _integers(tiles) << shift
    if tiles.device.type == "cpu":
        key = torch.from_numpy(best_numbers(values.numpy(), size, *_tables(size, kept)))
    else:
        key = _by_tensors(values, size, kept)
    number: Tensor = -key & ((1 << shift) - 1)
    return number


def _by_tensors(values: Tensor, size: int, kept: int) -> Tensor:
    """The largest key of each tile, of values (elements, tiles), as `best_numbers` has it: for devices."""
    found = _patterns(size, kept)
    digits = len(found.rows)
    keys = [
        [
            _sum([values[row * size + column] for column in columns]) - number * digits ** (size - 1 - row)
            for number, columns in enumerate(found.rows)
        ]
        for row in range(size)
    ]
    upper = _largest(keys[: size // 2], found.upper)
    lower = _largest(keys[size // 2 :], found.lower)
    best = None
    for counts, key in upper.items():
        left = tuple(kept - count for count in counts)
        if left not in lower:
            continue
        total = key + lower[left]
        best = total if best is None else torch.maximum(best, total)
    if best is None:
        raise SparsityError(f"no pattern keeps {kept} of {size} in each row and column")
    return best


@lru_cache(maxsize=8)
def _tables(size: int, kept: int) -> tuple[Integers, Integers, Integers]:
    """The patterns as `best_numbers` takes them; a state is what the columns of an upper half keep."""
    found = _patterns(size, kept)
    states = {counts: number for number, counts in enumerate(found.upper)}
    upper = [(states[counts], *one) for counts, every in found.upper.items() for one in every]
    lower = [
        (states[above], *one)
        for counts, every in found.lower.items()
        if (above := tuple(kept - count for count in counts)) in states
        for one in every
    ]
    return _table(found.rows), _table(upper), _table(lower)


def _table(rows: Sequence[Rows]) -> Integers:
    return np.array(rows, dtype=np.int64)


def _sum(numbers: list[Tensor]) -> Tensor:
    total = numbers[0]
    for number in numbers[1:]:
        total = total + number
    return total


def _largest(keys: list[list[Tensor]], half: Mapping[Rows, tuple[Rows, ...]]) -> dict[Rows, Tensor]:
    """Of the halves that keep as many in each column the largest key of each tile."""
    largest = {}
    for counts, every in half.items():
        best = None
        for chosen in every:
            key = _sum([keys[row][number] for row, number in enumerate(chosen)])
            best = key if best is None else torch.maximum(best, key)
        if best is not None:
            largest[counts] = best
    return largest


def _integers(tiles: Tensor) -> Tensor:
    """Scores (tiles, elements) as integers below 2**SCORE_BITS, (elements, tiles): int64, rounded down."""
    columns = tiles.T.contiguous()
    exponents = (columns.amax(0).view(torch.int64) >> 52).clamp_(min=1)  # biased; subnormals have that of 1
    # Two factors, as one alone may be out of range; powers of two round nothing.
    scale = SCORE_BITS + 1022 - exponents
    first = scale.div(2, rounding_mode="floor")
    for power in (first, scale - first):
        columns = columns * ((power + 1023) << 52).view(torch.float64)
    return columns.to(torch.int64)


@lru_cache(maxsize=8)
def _masks(size: int, kept: int) -> Tensor:
    """What each number keeps: (numbers, elements); also those of patterns that are not legal."""
    rows = torch.zeros(len(_patterns(size, kept).rows), size, dtype=torch.bool)
    for number, columns in enumerate(_patterns(size, kept).rows):
        rows[number, list(columns)] = True
    chosen = torch.cartesian_prod(*[torch.arange(len(rows))] * size)
    return rows[chosen].reshape(len(chosen), size * size)
