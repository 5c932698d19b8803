"""Tensors whose indices are in another order than in their file: served as if they had been stored so.

Owns a Source around another one, in which byte ranges of such tensors are gathered, and the file that tells
the order of each. Knows neither why they are permuted nor how. Called by execution and by comparisons.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct

from sparseprune.checkpoint import file_io
from sparseprune.checkpoint.documents import shown, strict_json
from sparseprune.checkpoint.header import lay_out
from sparseprune.checkpoint.layout import permutations_path
from sparseprune.checkpoint.source import Source, StoredTensor, TensorReader, open_shard
from sparseprune.engine.dtypes import DTYPES
from sparseprune.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    from sparseprune.checkpoint.file_io import WritableBytes
    from sparseprune.checkpoint.header import TensorEntry
    from sparseprune.checkpoint.source import Checkpoint, Shard

    Order = NDArray[np.integer[Any]]

PERMUTATIONS_KEY = "sparseprune.permutations"
_SPAN = 4 << 20  # bytes that are gathered from at one time; pieces of larger ones are read one by one


class Permuted(Struct, frozen=True, eq=False):
    """A tensor, and for dimensions of it an order: index i of what is served is index `order[i]` of the file.

    An order has the shape (leading, size): leading parts, of which the dimensions before it are made, such as
    the members of a stack, have an order each.
    """

    stored: StoredTensor
    orders: Mapping[int, Order]

    def __post_init__(self) -> None:
        shape = self.stored.shape
        for dim, order in self.orders.items():
            if order.shape[-1] != shape[dim] or prod(shape[:dim]) % len(order):
                found = f"an order of shape {list(order.shape)} for dimension {dim}"
                raise ValueError(f"{self.stored.name} of shape {list(shape)}: {found}")


class PermutedSource(Source):
    """Another source in which some tensors are permuted, also in reads that span several of them."""

    def __init__(self, source: Source, permuted: Iterable[Permuted]) -> None:
        self._source = source
        found: dict[Shard, list[_Gather]] = {}
        for one in permuted:
            if one.stored.nbytes:
                found.setdefault(one.stored.shard, []).append(_Gather(one))
        self._gathers = {shard: sorted(ones, key=lambda one: one.begin) for shard, ones in found.items()}
        self._begins = {shard: [one.begin for one in ones] for shard, ones in self._gathers.items()}

    def close(self) -> None:
        """Nothing: whoever made the other source closes it."""

    def read_into(self, stored: StoredTensor, begin: int, buffer: WritableBytes) -> None:
        begins = self._begins.get(stored.shard)
        if begins is None:
            self._source.read_into(stored, begin, buffer)
            return
        view = file_io.as_bytes(buffer)
        first, done = stored.offset + begin, 0
        gathers = self._gathers[stored.shard]
        for one in gathers[max(0, bisect_right(begins, first) - 1) :]:
            if one.begin >= first + len(view):
                break
            if one.end <= first + done:
                continue
            start, stop = max(one.begin, first) - first, min(one.end - first, len(view))
            self._plain(stored, begin + done, view[done:start])
            one.fill(self._source, first + start - one.begin, view[start:stop])
            done = stop
        self._plain(stored, begin + done, view[done:])

    def _plain(self, stored: StoredTensor, begin: int, view: memoryview) -> None:
        if view:
            self._source.read_into(stored, begin, view)


class _Level(Struct, frozen=True, eq=False):
    """A permuted dimension: its size, the bytes of an index, and how many leading places share an order."""

    size: int
    inner: int
    order: Order
    shared: int

    @property
    def block(self) -> int:
        return self.size * self.inner

    def at(self, outer: int) -> Order:
        """The order in the block with this number."""
        own: Order = self.order[outer // self.shared]
        return own


class _Gather:
    """The bytes of one permuted tensor, from `begin` to `end` of its shard."""

    def __init__(self, one: Permuted) -> None:
        stored, shape = one.stored, one.stored.shape
        self._stored = stored
        self.begin, self.end = stored.offset, stored.offset + stored.nbytes
        itemsize = DTYPES[stored.dtype].itemsize
        *self._outer, self._last = [
            _Level(shape[dim], prod(shape[dim + 1 :]) * itemsize, order, prod(shape[:dim]) // len(order))
            for dim, order in sorted(one.orders.items())
        ]

    def fill(self, source: Source, begin: int, out: memoryview) -> None:
        """Fill `out` with the bytes from `begin` on: of many whole blocks at one time, or of one block."""
        level, done = self._last, 0
        while done < len(out):
            number, within = divmod(begin + done, level.block)
            left, whole = len(out) - done, 1
            if within == 0 and not self._outer:
                alike = level.shared - number % level.shared
                whole = max(1, min(left // level.block, _SPAN // level.block, alike))
            size = min(whole * level.block - within, left)
            self._gather(source, (number, whole), within, out[done : done + size])
            done += size

    def _gather(self, source: Source, blocks: tuple[int, int], begin: int, out: memoryview) -> None:
        """All of some neighbouring blocks of one order, or one block from a byte of it on."""
        level, (number, count) = self._last, blocks
        first, skipped = divmod(begin, level.inner)
        last = level.size if count > 1 else (begin + len(out) - 1) // level.inner + 1
        order, base = level.at(number)[first:last], self._place(number)
        low, high = int(order.min()), int(order.max()) + 1
        if count * (high - low) * level.inner <= _SPAN:
            raw = np.empty((count, high - low, level.inner), dtype=np.uint8)
            source.read_into(self._stored, base + low * level.inner, raw.reshape(-1))
            found = _taken(raw, order - low).reshape(-1)
            np.frombuffer(out, dtype=np.uint8)[...] = found[skipped : skipped + len(out)]
            return
        for index, many in _runs(order):
            size = min(many * level.inner - skipped, len(out))
            source.read_into(self._stored, base + index * level.inner + skipped, out[:size])
            out, skipped = out[size:], 0

    def _place(self, number: int) -> int:
        """The byte of the file at which a block of the last permuted dimension begins."""
        for level in self._outer:
            blocks = level.inner // self._last.block
            index, inside = divmod(number, blocks)
            outer, place = divmod(index, level.size)
            number = (outer * level.size + int(level.at(outer)[place])) * blocks + inside
        return number * self._last.block


def _taken(raw: NDArray[np.uint8], order: Order) -> NDArray[np.uint8]:
    """(blocks, size, bytes) with the indices of the second dimension in this order."""
    inner = raw.shape[2]
    if inner in {2, 4, 8}:
        numbers = raw.view(f"u{inner}")
        return np.ascontiguousarray(numbers[:, order]).view(np.uint8).reshape(len(raw), -1, inner)
    return raw[:, order]


def _runs(order: Order) -> Iterator[tuple[int, int]]:
    """Indices that follow each other: the first one, and how many."""
    ends = np.flatnonzero(np.diff(order) != 1) + 1
    for begin, end in zip([0, *ends.tolist()], [*ends.tolist(), len(order)], strict=True):
        yield int(order[begin]), end - begin


# -- what belongs to a permuted tensor ---------------------------------------------------------------


def both_sides(stored: StoredTensor, order: Order) -> Permuted:
    """Second moments, (..., size, size), of inputs or outputs in this order.

    Blocks along the diagonal are (..., groups, size, size): ValueError where an index leaves its group.
    """
    size, (leading, whole) = stored.shape[-1], order.shape
    groups = whole // size
    local = order.reshape(leading * groups, size) - np.tile(np.arange(groups) * size, leading)[:, None]
    if ((local < 0) | (local >= size)).any():
        raise ValueError(f"{stored.name} has groups of {size}, and in another order some leave theirs")
    rank = len(stored.shape)
    return Permuted(stored, {rank - 2: local, rank - 1: local})


# -- the file that tells the orders ------------------------------------------------------------------


def permutations_bytes(orders: Mapping[str, Mapping[int, Order]]) -> bytes:
    """A safetensors file with the order of each tensor by its name; its metadata has the dimensions.

    ValueError for a tensor with several permuted dimensions.
    """
    dims: dict[str, int] = {}
    arrays: dict[str, NDArray[np.int32]] = {}
    for name, along in orders.items():
        ((dims[name], order),) = along.items()
        arrays[name] = np.ascontiguousarray(order[0] if len(order) == 1 else order, dtype="<i4")
    text = json.dumps(dims, ensure_ascii=False, separators=(",", ":"))
    shapes = ((name, "I32", array.shape) for name, array in arrays.items())
    header = lay_out(shapes, {"format": "pt", PERMUTATIONS_KEY: text})
    return b"".join([header.raw, *(arrays[entry.name].tobytes() for entry in header.entries)])


def read_permutations(checkpoint: Checkpoint) -> dict[str, dict[int, Order]]:
    """The orders of the tensors of a checkpoint to those that it was made from; {} where none is told.

    CheckpointError where the file is not one of ours, or is about other tensors.
    """
    path = permutations_path(checkpoint)
    if not path.is_file():
        return {}
    shard, header = open_shard(path)
    try:
        dims = strict_json(header.metadata[PERMUTATIONS_KEY])
        right = {entry.name for entry in header.entries} == dims.keys()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        right = False
    if not right:
        raise CheckpointError(f"{path}: its metadata {PERMUTATIONS_KEY} is not that of permutations")
    found: dict[str, dict[int, Order]] = {}
    with TensorReader() as reader:
        for entry in header.entries:
            stored = checkpoint.tensors.get(entry.name)
            order = np.frombuffer(reader.read(StoredTensor(entry, shard)), dtype=np.uint8)
            if stored is None or not _fits(entry, dims[entry.name], stored.shape):
                shape = "no such tensor" if stored is None else f"a tensor of shape {list(stored.shape)}"
                raise CheckpointError(
                    f"{path}: {entry.name} has an order of shape {list(entry.shape)} for dimension "
                    f"{shown(dims[entry.name])}, and {checkpoint.path} has {shape}"
                )
            numbers = order.view("<i4").reshape(-1, entry.shape[-1])
            if (np.sort(numbers, axis=1) != np.arange(entry.shape[-1])).any():
                raise CheckpointError(f"{path}: {entry.name} is no order: each index has to be there once")
            found[entry.name] = {dims[entry.name]: numbers}
    return found


def _fits(entry: TensorEntry, dim: object, shape: tuple[int, ...]) -> bool:
    """Whether an order can be one of a dimension of a tensor."""
    if type(dim) is not int or not 0 <= dim < len(shape) or entry.dtype != "I32" or not prod(shape):
        return False
    leading = entry.shape[0] if len(entry.shape) == 2 else 1
    size = entry.shape[-1] if entry.shape else 0
    return (
        len(entry.shape) in {1, 2} and size == shape[dim] and leading > 0 and prod(shape[:dim]) % leading == 0
    )
