"""Recipes: each task gets a way that may do it and that stays within the limits, whatever its shape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from sparseprune.checkpoint import StoredMask
from sparseprune.errors import SparsepruneError
from sparseprune.execution.inputs import TaskInput
from sparseprune.execution.plan import Task
from sparseprune.execution.regions import Limits, alone, is_run, members_of, numel_per_scope
from sparseprune.execution.strategy import (
    BlockNorms,
    Contiguous,
    RadixSelect,
    Strided,
    TorchInMemory,
    TorchOutOfCore,
    choose,
    needs_scaling,
    needs_torch,
)
from sparseprune.spec import BoundBlock, BoundInstance, BoundScope, Score
from sparseprune.spec.bound import Budget, Soft
from tests.execution.test_regions import joined, scopes, stored_tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.execution.regions import AnyScope
    from sparseprune.execution.strategy import Strategy
    from tests import oracle

    Shape = tuple[int, ...]

MIB, GIB = 1 << 20, 1 << 30
ROOM = Limits(GIB)
MAGNITUDE = Score()
DTYPES = ("F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2", "I8", "I32", "I64")
KINDS: tuple[Literal["magnitude", "random", "values", "wanda", "obd", "blocks"], ...] = (
    "magnitude", "random", "values", "wanda", "obd", "blocks",
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A task and the tensors that it reaches."""

    task: Task
    tensors: Mapping[str, StoredTensor]

    def choose(self, limits: Limits, *, compiled: bool = True) -> Strategy:
        return choose(self.task, self.tensors, limits, compiled=compiled)


def asked(
    scope: AnyScope, dtype: str, budget: Budget, score: Score = MAGNITUDE, soft: Soft | None = None
) -> Asked:
    """A task over tensors of a dtype, with the files of its score in F32."""
    instance = BoundInstance("all", (), scope, budget, None, score, soft)
    inputs: tuple[TaskInput, ...] = ()
    if score.kind in {"values", "wanda", "obd"}:
        role: Literal["values", "vector"] = "values" if score.kind == "values" else "vector"
        inputs = tuple(TaskInput(role, leaf.tensor, stored_tensor("score", 8)) for leaf in scope.leaves)
    tensors = {
        leaf.tensor: stored_tensor(leaf.tensor, math.prod(leaf.view_shape), dtype) for leaf in scope.leaves
    }
    return Asked(Task("scope.all", instance, inputs), tensors)


def matrix(view: Shape, block: Shape, shape: Shape, *, transposed: bool = False) -> BoundScope:
    """Scopes of a matrix; -1 spans what there is."""
    stride = (1, view[0]) if transposed else (view[1], 1)
    extent = tuple(size if part == -1 else part for size, part in zip(view, block, strict=True))
    leaf = BoundBlock("w", "w", view, stride, 0, extent)
    spanned = tuple(size if part == -1 else part for size, part in zip(leaf.grid_shape, shape, strict=True))
    return BoundScope("all", leaf, spanned)


@st.composite
def matrices(draw: st.DrawFn) -> Asked:
    """Tasks over one matrix of any size, up to some gigabytes: nothing of it is read."""

    def power(most: int) -> int:
        return 1 << draw(st.integers(0, most))

    view = (power(15), power(15))
    block = tuple(power(size.bit_length() - 1) for size in view)
    shape = tuple(power((size // part).bit_length() - 1) for size, part in zip(view, block, strict=True))
    scope = matrix(view, block, shape, transposed=draw(st.booleans()))
    blocks = scope.blocks_per_scope
    nnz = st.one_of(st.sampled_from([0, 1, blocks]), st.integers(0, blocks)).map(lambda n: Budget(nnz=n))
    budget = draw(st.one_of(nnz, st.just(Budget(threshold=0.5))))
    soft = draw(st.sampled_from([None, None, None, Soft()]))
    score = (
        Score() if soft else Score(draw(st.sampled_from(KINDS)), draw(st.sampled_from([1.0, 2.0, math.inf])))
    )
    dtype = draw(st.sampled_from(DTYPES[:6] if soft else DTYPES))
    return asked(scope, dtype, budget, score, soft)


def assert_bounded(strategy: Strategy, limits: Limits) -> None:
    assert 0 < strategy.memory <= limits.memory
    assert 0 <= strategy.held <= limits.held
    assert strategy.memory + strategy.held <= limits.memory
    assert strategy.passes >= 1


@given(matrices(), st.integers(64 * MIB, 8 * GIB))
def test_every_task_has_a_way_within_the_limits_or_is_told_what_it_needs(one: Asked, memory: int) -> None:
    limits = Limits(memory)
    (leaf,) = one.task.instance.scope.leaves
    try:
        strategy = one.choose(limits)
    except SparsepruneError:
        assert leaf.numel_per_block > limits.largest_tile()
        with pytest.raises(
            SparsepruneError, match=r"a block has \d+ elements.*; --memory must be .*\d bytes"
        ):
            one.choose(limits)
        return
    assert_bounded(strategy, limits)


@given(matrices(), st.booleans())
def test_a_way_is_only_chosen_for_what_it_can_do(one: Asked, compiled: bool) -> None:
    instance = one.task.instance
    (stored,) = one.tensors.values()
    (leaf,) = instance.scope.leaves
    try:
        strategy = one.choose(ROOM, compiled=compiled)
    except SparsepruneError:
        assert leaf.numel_per_block > ROOM.largest_tile()
        return
    if instance.soft is not None:
        assert not isinstance(strategy, BlockNorms)
    if stored.dtype.startswith("I") and instance.score.kind == "magnitude":
        assert needs_torch(strategy)
    if isinstance(strategy, Contiguous):
        assert compiled
    if isinstance(strategy, RadixSelect):
        assert leaf.numel_per_block == 1
        assert instance.score.kind == "magnitude"
        assert instance.budget.nnz is not None
    if isinstance(strategy, TorchInMemory):
        whole = instance.scope if instance.budget.nnz is not None else alone(instance.scope)
        assert numel_per_scope(whole) <= strategy.elements <= ROOM.largest_tile()
    if isinstance(strategy, TorchOutOfCore):
        assert instance.budget.nnz is not None
        assert leaf.numel_per_block <= strategy.elements <= ROOM.largest_tile()


HUGE = (1 << 15, 1 << 14)
HALF = Budget(nnz=1 << 13)


@pytest.mark.parametrize(
    ("scope", "dtype", "budget", "way"),
    [
        (matrix(HUGE, (1, 1), (1, 4)), "BF16", Budget(nnz=2), Contiguous),
        (matrix(HUGE, (1, 1), (1, -1)), "F64", HALF, Contiguous),
        (matrix(HUGE, (1, 1), (-1, -1)), "BF16", HALF, RadixSelect),
        (matrix(HUGE, (1, 1), (-1, -1)), "I8", HALF, TorchOutOfCore),
        (matrix(HUGE, (1, 1), (-1, -1)), "BF16", Budget(threshold=1.0), Contiguous),
        (matrix(HUGE, (1, 1), (-1, -1)), "BF16", Budget(nnz=0), Contiguous),
        (matrix(HUGE, (1, 1), (-1, -1)), "BF16", Budget(nnz=1 << 29), Contiguous),
        (matrix(HUGE, (1, 1), (-1, -1), transposed=True), "BF16", HALF, TorchOutOfCore),
        (matrix(HUGE, (1, -1), (-1, 1)), "BF16", HALF, BlockNorms),
        (matrix(HUGE, (-1, 1), (1, -1)), "F32", HALF, BlockNorms),
        (matrix(HUGE, (-1, 1), (1, -1)), "F64", HALF, BlockNorms),
        (matrix(HUGE, (-1, 1), (1, -1)), "I32", HALF, TorchOutOfCore),
        (matrix((64, 64), (-1, 1), (1, -1)), "I32", Budget(nnz=9), TorchInMemory),
    ],
)
def test_structures_beside_each_other_and_their_ways(
    scope: BoundScope, dtype: str, budget: Budget, way: type[Strategy]
) -> None:
    assert type(asked(scope, dtype, budget).choose(ROOM)) is way


@pytest.mark.parametrize(
    ("block", "shape", "transposed", "way"),
    [
        ((1, 1), (1, 4), False, Contiguous),
        ((1, 1), (1, 4), True, Strided),
        ((1, 1), (-1, -1), False, RadixSelect),
        ((-1, 1), (1, -1), False, BlockNorms),
    ],
)
def test_what_masks_keep_is_part_of_the_memory_of_a_way(
    block: Shape, shape: Shape, transposed: bool, way: type[Strategy]
) -> None:
    one = asked(matrix(HUGE, block, shape, transposed=transposed), "BF16", Budget(nnz=2))
    masks = tuple(StoredMask(name, stored, stored.shape, "packed") for name, stored in one.tensors.items())
    told = one.choose(ROOM)
    inside = Asked(replace(one.task, within=masks), one.tensors).choose(ROOM)
    assert type(told) is type(inside) is way
    assert inside.elements == told.elements
    assert inside.memory >= told.memory + 2 * told.elements  # a byte of the mask as it is, one in order
    assert_bounded(inside, ROOM)


def test_a_scope_of_some_slabs_is_decided_at_once_and_a_larger_one_counted() -> None:
    most = 8 * ROOM.slab // 2
    for columns, way in ((most, Contiguous), (2 * most, RadixSelect)):
        one = asked(matrix((4, columns), (1, 1), (1, -1)), "BF16", Budget(nnz=3))
        assert type(one.choose(ROOM)) is way


@pytest.mark.parametrize("dtype", ["F32", "F16", "F8_E4M3"])
def test_soft_thresholds_need_torch_for_what_loops_do_not_know(dtype: str) -> None:
    scope = matrix((64, 64), (1, 4), (1, 2))
    assert type(asked(scope, dtype, Budget(nnz=1), soft=Soft()).choose(ROOM)) is Contiguous
    for soft in (Soft(eps=1e-9), Soft(conditioners=Path("there"))):
        assert needs_torch(asked(scope, dtype, Budget(nnz=1), soft=soft).choose(ROOM))
    assert needs_torch(asked(scope, "F64", Budget(nnz=1), soft=Soft()).choose(ROOM))


def test_what_was_chosen_for_ample_memory_passes_by_the_fewest_times() -> None:
    passes = {
        dtype: asked(matrix(HUGE, (1, 1), (-1, -1)), dtype, HALF).choose(ROOM).passes
        for dtype in ("F8_E4M3", "BF16", "F32", "F64")
    }
    assert passes == {"F8_E4M3": 2, "BF16": 2, "F32": 3, "F64": 5}  # a pass for 16 bits, and one that cuts
    rows = matrix(HUGE, (1, -1), (-1, 1))
    assert [asked(rows, dtype, HALF).choose(ROOM).passes for dtype in ("BF16", "F64")] == [2, 3]
    assert asked(rows, "BF16", HALF, Score("random")).choose(ROOM).passes == 1


@pytest.mark.parametrize(
    ("dtype", "score", "scaled"),
    [
        ("F32", Score(), False),
        ("BF16", Score(norm=1.0), False),
        ("F64", Score(), True),
        ("F64", Score(norm=1.0), True),
        ("F64", Score(norm=math.inf), False),
        ("F32", Score("wanda"), True),
        ("F32", Score("wanda", norm=math.inf), False),
        ("F32", Score("obd", norm=math.inf), True),
        ("F64", Score("values"), False),  # its file is F32
    ],
)
def test_powers_are_scaled_where_they_may_leave_float64(dtype: str, score: Score, scaled: bool) -> None:
    one = asked(matrix((8, 8), (1, -1), (-1, 1)), dtype, Budget(nnz=1), score)
    assert needs_scaling(one.task, one.tensors) == scaled


@given(scopes())
def test_alone_every_block_is_a_scope_and_nothing_else_changes(case: tuple[AnyScope, oracle.Coupled]) -> None:
    scope, _ = case
    lonely = alone(scope)
    assert lonely.leaves == scope.leaves
    assert [order for _, order in members_of(lonely)] == [order for _, order in members_of(scope)]
    for (one, _), (member, _) in zip(members_of(lonely), members_of(scope), strict=True):
        assert one.blocks_per_scope == 1
        assert one.grid_shape == member.block.grid_shape


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=4))
def test_parts_are_runs_where_each_lies_in_one_piece(pairs: list[tuple[int, int]]) -> None:
    part = tuple(size for size, _ in pairs)
    whole = tuple(size * count for size, count in pairs)
    numbers = {place: number for number, place in enumerate(product(*map(range, whole)))}
    pieces = [
        joined(
            numbers[tuple(a * size + b for a, size, b in zip(at, part, inner, strict=True))]
            for inner in product(*map(range, part))
        )
        for at in product(*(range(count) for _, count in pairs))
    ]
    assert is_run(part, whole) == all(len(piece) == 1 for piece in pieces)
