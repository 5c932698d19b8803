"""Slabs: the pieces of a work unit that are read, decided and written at one time.

Owns where a unit may be cut: between rows of scopes of a whole tensor that compete with nobody else.
Every other unit is one slab. Pure arithmetic on bound shapes; no tensor data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sparseprune.engine.grids import prod
from sparseprune.spec import BoundBlock, BoundScope

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.pipeline.inputs import TaskInput
    from sparseprune.pipeline.plan import Task, WorkUnit

SLAB_BYTES = 2 << 20  # measured: what is made of a slab stays in the cache and in the allocator
_PACKED = 8  # mask elements in a byte: slabs begin at whole bytes of a packed mask


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [begin, end) of a stored tensor, which are a tensor of `shape` themselves."""

    stored: StoredTensor
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def first(self) -> int:
        """The number of elements of the stored tensor before this piece."""
        return 0 if not self.begin else self.begin * self.stored.numel // self.stored.nbytes


TaskPieces = tuple[tuple[tuple[str, str], Piece], ...]
"""What a task reads besides the weights: pieces by role and key."""


@dataclass(frozen=True, slots=True)
class Slab:
    """Tasks whose views count from the pieces, not from the whole tensors.

    `inputs` has one entry for each task; `rows_before` counts the rows of the one tensor that lie before
    the slab.
    """

    tasks: tuple[Task, ...]
    pieces: tuple[Piece, ...]
    inputs: tuple[TaskPieces, ...]
    rows_before: int = 0

    @property
    def nbytes(self) -> int:
        return sum(piece.end - piece.begin for piece in self.pieces)


def slabs_of(unit: WorkUnit, limit: int = SLAB_BYTES) -> Iterator[Slab]:
    """Cut a unit in slabs of about `limit` bytes where it may be cut, else give it whole."""
    rows = _rows_per_cut(unit)
    if rows is None or unit.nbytes <= limit:
        inputs = tuple(_task_pieces(task, None) for task in unit.tasks)
        yield Slab(unit.tasks, tuple(_whole(stored) for stored in unit.tensors), inputs)
        return
    (task,), (stored,) = unit.tasks, unit.tensors
    row_bytes = stored.nbytes // stored.shape[0]
    step = rows * max(1, limit // (rows * row_bytes))
    for begin in range(0, stored.shape[0], step):
        end = min(begin + step, stored.shape[0])
        rows_read = _task_pieces(task, (begin, end))
        yield Slab((_restricted(task, end - begin),), (_rows(stored, begin, end),), (rows_read,), begin)


def _whole(stored: StoredTensor) -> Piece:
    return Piece(stored, stored.shape, 0, stored.nbytes)


def _rows(stored: StoredTensor, begin: int, end: int) -> Piece:
    row_bytes = stored.nbytes // stored.shape[0]
    return Piece(stored, (end - begin, *stored.shape[1:]), begin * row_bytes, end * row_bytes)


def _task_pieces(task: Task, rows: tuple[int, int] | None) -> TaskPieces:
    """The inputs of a task, all of them or what belongs to rows [begin, end) of its one weight."""
    pieces: list[tuple[tuple[str, str], Piece]] = []
    for one in task.inputs:
        piece = _whole(one.stored) if rows is None else _input_rows(one, task, *rows)
        pieces.append(((one.role, one.key), piece))
    return tuple(pieces)


def _input_rows(one: TaskInput, task: Task, begin: int, end: int) -> Piece:
    """What belongs to rows [begin, end) of the weight; a vector that lies along another dimension whole."""
    if one.role == "blocks":
        rows = task.instance.scope.leaves[0].shape[0]
        return _rows(one.stored, begin // rows, end // rows)
    rank = len(task.instance.scope.leaves[0].view_shape)
    if one.role == "vector" and one.dim % rank:
        return _whole(one.stored)
    return _rows(one.stored, begin, end)


def _rows_per_cut(unit: WorkUnit) -> int | None:
    """The least number of rows that hold whole scopes and whole bytes of mask; None for no cuts."""
    if len(unit.tasks) != 1 or len(unit.tensors) != 1:
        return None
    scope = unit.tasks[0].instance.scope
    if not isinstance(scope, BoundScope) or not isinstance(scope.block, BoundBlock):
        return None
    leaf, (stored,) = scope.block, unit.tensors
    if leaf.view_shape != stored.shape or not stored.shape or not _is_row_major(leaf):
        return None
    rows = math.lcm(leaf.shape[0] * scope.shape[0], _PACKED)
    return rows if 0 < rows < stored.shape[0] else None


def _is_row_major(leaf: BoundBlock) -> bool:
    steps = tuple(prod(leaf.view_shape[dim + 1 :]) for dim in range(len(leaf.view_shape)))
    return leaf.view_offset == 0 and leaf.view_stride == steps


def _restricted(task: Task, rows: int) -> Task:
    scope = task.instance.scope
    if not isinstance(scope, BoundScope) or not isinstance(scope.block, BoundBlock):
        raise TypeError(f"{task.instance.label} cannot be cut in rows")
    leaf = replace(scope.block, view_shape=(rows, *scope.block.view_shape[1:]))
    return replace(task, instance=replace(task.instance, scope=replace(scope, block=leaf)))
