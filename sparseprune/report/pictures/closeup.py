"""A few elements of one tensor from close up: which of them are zero, which scope and block each belongs to.

Owns which two dimensions and which part of them are worth a look: where kept and pruned both are seen. Reads
just that, of tensors of any size; draws nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import prod
from sparseprune.engine.kernels.counting import mark_nonzero
from sparseprune.errors import SparsepruneError, printable
from sparseprune.report.drawings import cell_of, window_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from sparseprune.checkpoint import Source, StoredTensor
    from sparseprune.engine.grids import Shape
    from sparseprune.report.drawings import AnyScope
    from sparseprune.spec import BoundInstance, BoundSpec

    Flags = NDArray[np.bool_]

SIDE = 64  # rows and columns of a window
_SMALL, _MANY = 32, 256  # the same where so many scopes would be seen in it that lines cover it
_SPAN = 1 << 20  # bytes that are read at one time where not all of them are wanted
_PATIENCE = 1 << 26  # bytes that are read in search of a window
_STRIP = 2048  # rows or columns of a strip that is searched
_LEAD = 16  # rows and columns before the first place of the other kind


@dataclass(frozen=True, slots=True)
class Cells:
    """What each element of a window belongs to, (rows, columns): numbers of scopes and of blocks, or -1.

    Both count in the order in which they are met, over all rules that reach the tensor.
    """

    scope: NDArray[np.int64] = field(repr=False)
    block: NDArray[np.int64] = field(repr=False)


@dataclass(frozen=True, slots=True)
class CloseUp:
    """A window of a tensor: `kept` is True where an element is not zero, (rows, columns).

    It shows dimensions `dims` from `begin` on, the others at index 0; a vector has one row and one of `dims`.
    `rules` says what reaches the tensor, such as "scope.proj: 2 of 4 blocks". Without a spec there are no
    `cells`.
    """

    name: str
    dtype: str
    shape: Shape
    dims: tuple[int, ...]
    begin: tuple[int, int]
    kept: Flags = field(repr=False)
    rules: tuple[str, ...] = ()
    cells: Cells | None = None


@dataclass(frozen=True, slots=True)
class _Reach:
    """A leaf of an instance that lies in the tensor."""

    rule: str
    instance: BoundInstance
    leaf: int


def close_up(stored: StoredTensor, reader: Source, bound: BoundSpec | None = None) -> CloseUp:
    """Look at a tensor where kept and pruned elements both are seen, or at its beginning.

    SparsepruneError for a tensor without elements, or with elements of less than a byte.
    """
    if DTYPES[stored.dtype].zero_bits is None:
        raise SparsepruneError(
            f"--tensor {printable(stored.name)}: {stored.dtype} elements are less than a byte and cannot be "
            "looked at"
        )
    if not stored.numel:
        raise SparsepruneError(f"--tensor {printable(stored.name)}: it has no elements to draw")
    reached = [] if bound is None else list(_reaching(bound, stored.name))
    dims = _dims(stored.shape, reached)
    plane = _Plane(stored, reader, dims)
    begin = _begin(plane)
    rows, columns = _ranges(begin, plane.size, SIDE)
    cells = None if bound is None else _cells(plane, rows, columns, reached)
    if cells is not None and len(np.unique(cells.scope)) > _MANY:
        rows, columns = _ranges(begin, plane.size, _SMALL)
        cells = Cells(*(labels[: len(rows), : len(columns)] for labels in (cells.scope, cells.block)))
    return CloseUp(
        stored.name,
        stored.dtype,
        stored.shape,
        dims,
        begin,
        plane.read(rows, columns),
        tuple(dict.fromkeys(f"{reach.rule}: {_budget(reach.instance)}" for reach in reached)),
        cells,
    )


def _ranges(begin: tuple[int, int], size: tuple[int, int], side: int) -> tuple[range, range]:
    rows, columns = (range(at, min(at + side, end)) for at, end in zip(begin, size, strict=True))
    return rows, columns


class _Plane:
    """Two dimensions of a tensor, the others at index 0; a vector, or a single number, is one row."""

    def __init__(self, stored: StoredTensor, reader: Source, dims: tuple[int, ...]) -> None:
        strides = [prod(stored.shape[dim + 1 :]) for dim in range(len(stored.shape))]
        axes = [(1, 0)] * (2 - len(dims)) + [(stored.shape[dim], strides[dim]) for dim in dims]
        self.size = axes[0][0], axes[1][0]
        self._strides = axes[0][1], axes[1][1]
        self._stored, self._reader = stored, reader
        self._dtype = DTYPES[stored.dtype]
        self.itemsize = self._dtype.itemsize

    def element(self, row: int, column: int) -> int:
        """The place in the tensor."""
        return row * self._strides[0] + column * self._strides[1]

    def cost(self, rows: range, columns: range) -> int:
        """Bytes that are read for a rectangle, about."""
        return len(rows) * min(self._span(columns), len(columns) * 4096)

    def read(self, rows: range, columns: range) -> Flags:
        """True where an element is not zero, (rows, columns)."""
        marks = np.empty((len(rows), len(columns)), dtype=np.bool_)
        apart = self._span(columns) > max(_SPAN, self.itemsize * len(columns))
        parts = [range(column, column + 1) for column in columns] if apart else [columns]
        for at, row in enumerate(rows):
            for part in parts:
                marks[at, part.start - columns.start : part.stop - columns.start] = self._read_row(row, part)
        return marks

    def _span(self, columns: range) -> int:
        return ((len(columns) - 1) * self._strides[1] + 1) * self.itemsize

    def _read_row(self, row: int, columns: range) -> Flags:
        begin = self.element(row, columns.start) * self.itemsize
        data = self._reader.read(self._stored, begin, begin + self._span(columns))
        bits = np.frombuffer(data, dtype=f"<u{self.itemsize}")[:: max(1, self._strides[1])].copy()
        marks = np.empty(bits.size, dtype=np.bool_)
        mark_nonzero(bits, self._dtype, marks)
        return marks


def _reaching(bound: BoundSpec, name: str) -> Iterator[_Reach]:
    for rule, instance in bound.instances():
        for number, leaf in enumerate(instance.scope.leaves):
            if leaf.tensor == name:
                yield _Reach(rule.name, instance, number)


def _dims(shape: Shape, reached: Sequence[_Reach]) -> tuple[int, ...]:
    """The two dimensions to show: where a rule tells most blocks apart, else those of a matrix.

    Of three dimensions the last two are a matrix of a stack; of more the first two are, of a convolution's
    filters and channels.
    """
    if len(shape) < 3:
        return tuple(range(len(shape)))
    if reached:
        return window_of(reached[0].instance.scope, reached[0].leaf, shape).dims
    return (1, 2) if len(shape) == 3 else (0, 1)


def _begin(plane: _Plane) -> tuple[int, int]:
    """Where a window begins in which kept and pruned are seen, as near to the beginning as can be found.

    The first rows and the first columns are searched, and not to their end where they are very long.
    """
    rows, columns = (range(min(SIDE, size)) for size in plane.size)
    first = plane.read(rows, columns)
    kind = bool(first.flat[0])
    if (first != kind).any():
        return 0, 0
    across = _first_unlike(plane, kind, rows, downwards=False)
    if across is not None:
        return 0, _placed(across, plane.size[1])
    down = _first_unlike(plane, kind, columns, downwards=True)
    return (0, 0) if down is None else (_placed(down, plane.size[0]), 0)


def _first_unlike(plane: _Plane, kind: bool, across: range, *, downwards: bool) -> int | None:  # noqa: FBT001
    """The first column, or row, of a strip in which something is of the other kind."""
    size = plane.size[0 if downwards else 1]
    spent = 0
    for start in range(SIDE, size, _STRIP):
        along = range(start, min(start + _STRIP, size))
        rows, columns = (along, across) if downwards else (across, along)
        spent += plane.cost(rows, columns)
        if spent > _PATIENCE:
            return None
        unlike = (plane.read(rows, columns) != kind).any(axis=1 if downwards else 0)
        if unlike.any():
            return start + int(unlike.argmax())
    return None


def _placed(first: int, size: int) -> int:
    """Where a window begins that has this line in it, with some before."""
    begin = first - _LEAD
    return max(0, min(begin - begin % _LEAD, size - SIDE))


def _cells(plane: _Plane, rows: range, columns: range, reached: Sequence[_Reach]) -> Cells:
    scopes: dict[tuple[int, int], int] = {}
    blocks: dict[tuple[int, int, int], int] = {}
    scope = np.full((len(rows), len(columns)), -1, dtype=np.int64)
    block = scope.copy()
    instances: dict[str, int] = {}
    for reach in reached:
        instance = instances.setdefault(reach.rule + reach.instance.label, len(instances))
        for at, row in enumerate(rows):
            for across, column in enumerate(columns):
                cell = cell_of(reach.instance.scope, reach.leaf, plane.element(row, column))
                if cell is None:
                    continue
                scope[at, across] = scopes.setdefault((instance, cell.scope), len(scopes))
                block[at, across] = blocks.setdefault((instance, cell.scope, cell.block), len(blocks))
    return Cells(scope, block)


def _budget(instance: BoundInstance) -> str:
    """What survives, in words."""
    scope: AnyScope = instance.scope
    if instance.budget.nnz is not None:
        return f"{instance.budget.nnz:,} of {scope.blocks_per_scope:,} blocks"
    return f"blocks from {instance.budget.threshold:g} on"
