"""Drawn structures: one plan makes the oracle's description and the engine's objects, over one storage.

Also the checks that compare the two, down to every bit of every storage.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparseprune import BlockCoupling, BlockSpec, ScopeCoupling, ScopeSpec, SparseBlock, View
from tests import oracle
from tests.oracle import Index, Number

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
WHOLE_NUMBERS = (torch.int8, torch.int16, torch.int32, torch.int64)
DTYPES = FLOATS + WHOLE_NUMBERS
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FEW = (0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5)
"""Values whose squares and sums of squares are exact, so that ties in norm are ties."""


@dataclass(frozen=True)
class Laid:
    """A leaf over its storage: where each view index lies, and all that must not change around it."""

    plan: oracle.Leaf
    block: BlockSpec
    storage: Tensor
    places: dict[Index, int]

    def bits(self) -> list[int]:
        return bits_of(self.storage)

    def elements(self) -> dict[Index, Number]:
        return self.elements_of(self.storage)

    def elements_of(self, storage: Tensor) -> dict[Index, Number]:
        numbers = numbers_of(storage)
        return {index: numbers[place] for index, place in self.places.items()}

    def param_shaped(self, storage: Tensor) -> Tensor:
        """Numbers of the storage's length, laid out as the parameter's shape."""
        param = self.block.view.param
        return storage.as_strided(param.shape, param.stride(), param.storage_offset()).contiguous()

    def view_shaped(self, storage: Tensor) -> Tensor:
        view = self.block.view
        return storage.as_strided(
            view.shape, view.stride, view.param.storage_offset() + view.offset
        ).contiguous()


@dataclass(frozen=True)
class Case:
    """A structure twice: `plan` for the oracle, `scope` for the engine."""

    plan: oracle.Coupled
    scope: ScopeSpec | ScopeCoupling
    laid: tuple[Laid, ...]

    @property
    def exact(self) -> bool:
        """Whether every block is one element, so that no norm is rounded."""
        return all(sum(math.prod(leaf.block) for leaf in s.block.leaves) == 1 for s in self.plan.scopes)

    def elements(self) -> list[dict[Index, Number]]:
        return [leaf.elements() for leaf in self.laid]

    def expected(self, nnz: int) -> list[dict[Index, bool]]:
        return oracle.masks_by_budget(self.plan, self.elements(), nnz)


def bits_of(tensor: Tensor) -> list[int]:
    bits: list[int] = tensor.detach().cpu().contiguous().view(BITS[tensor.element_size()]).flatten().tolist()
    return bits


def numbers_of(tensor: Tensor) -> list[Number]:
    """A flat tensor's elements as exact numbers; NaN is none of the oracle's business."""
    flat = tensor.detach().cpu().flatten()
    if not tensor.dtype.is_floating_point:
        whole: list[Number] = flat.tolist()
        return whole
    return [x if math.isinf(x) or math.isnan(x) else Fraction(x) for x in flat.to(torch.float64).tolist()]


# -- storage ---------------------------------------------------------------------------------------


def extremes(dtype: torch.dtype) -> list[float]:
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return [info.min, info.min + 1, info.max, info.max - 1, 0, 1, -1]
    top = torch.finfo(dtype)
    least = torch.ones(1, dtype=BITS[top.bits // 8]).view(dtype).to(torch.float64).item()
    numbers = [top.max, -top.max, top.smallest_normal, least, -least, 0.0, -0.0, 1.0]
    return numbers if dtype == torch.float8_e4m3fn else [*numbers, math.inf, -math.inf]


def filled(kind: str, seed: int, size: int, dtype: torch.dtype) -> Tensor:
    """`size` elements: "few" values (ties everywhere), "extreme" ones, or any bits that are no NaN."""
    chance = random.Random(seed)
    if kind == "any":
        width = dtype.itemsize * 8
        raw = [chance.randrange(-(2 ** (width - 1)), 2 ** (width - 1)) for _ in range(size)]
        drawn = torch.tensor(raw, dtype=BITS[width // 8]).view(dtype)
        if dtype.is_floating_point:
            hole = drawn.to(torch.float64).isnan()
            drawn = drawn.view(BITS[width // 8]).masked_fill(hole, 0).view(dtype)
        return drawn
    palette: Sequence[float] = FEW if kind == "few" else extremes(dtype)
    if not dtype.is_floating_point and kind == "few":
        palette = (0, 1, -1, 2, -2)
    picked = [palette[chance.randrange(len(palette))] for _ in range(size)]
    return torch.tensor(
        picked, dtype=torch.float64 if dtype.is_floating_point else torch.int64, device="cpu"
    ).to(dtype)


@st.composite
def laid_out(draw: st.DrawFn, plan: oracle.Leaf, dtype: torch.dtype, kind: str, device: str) -> Laid:
    """A leaf whose elements lie permuted, strided and shifted in a storage with guards around them."""
    rank = len(plan.view)
    order = draw(st.permutations(range(rank)))
    steps = draw(st.lists(st.sampled_from([1, 1, 2]), min_size=rank, max_size=rank))
    pads = draw(st.lists(st.sampled_from([0, 0, 1]), min_size=rank, max_size=rank))
    offset = draw(st.integers(0, 3))
    stride = [0] * rank
    reach = 1
    for dim in reversed(order):
        stride[dim] = reach * steps[dim]
        reach = stride[dim] * max(1, plan.view[dim]) + pads[dim]
    storage = filled(kind, draw(st.integers(0, 2**32)), offset + reach + 2, dtype).to(device)
    if draw(st.booleans()):  # the parameter is the strided tensor itself
        view: View | Tensor = storage.as_strided(plan.view, stride, offset)
    else:  # a part of a longer parameter, which itself begins behind a guard
        lead = draw(st.integers(0, offset))
        view = View(storage[lead:], plan.view, stride, offset - lead)
    places = {
        index: offset + sum(i * s for i, s in zip(index, stride, strict=True))
        for index in product(*map(range, plan.view))
    }
    shape: Index = () if set(plan.block) <= {1} and draw(st.booleans()) else spans(draw, plan)
    return Laid(plan, BlockSpec(view, shape, f"leaf{draw(st.integers(0, 9))}"), storage, places)


def spans(draw: st.DrawFn, plan: oracle.Leaf) -> Index:
    """A block shape, with -1 here and there where the block has the whole dimension."""
    return tuple(
        -1 if size == extent and draw(st.booleans()) else extent
        for size, extent in zip(plan.view, plan.block, strict=True)
    )


# -- structures ------------------------------------------------------------------------------------


@st.composite
def structures(draw: st.DrawFn, *, element_blocks: bool, empty: bool, coupled: bool) -> oracle.Coupled:
    """Up to two scopes of up to two leaves each, 0 to 4 dimensions, orders permuted everywhere."""
    rank = draw(st.sampled_from([0, 1, 1, 2, 2, 2, 3, 3, 4]))
    most = 48
    common: list[int] = []
    for _ in range(rank):
        size = draw(st.sampled_from([0, 1, 2] if empty else [1, 2, 2, 3]))
        common.append(size if max(size, 1) * max(1, math.prod(common)) <= 6 else 1)
    scopes, orders = [], []
    for _ in range(draw(st.integers(1, 2)) if coupled else 1):
        order = tuple(draw(st.permutations(range(rank))))
        own = [0] * rank
        for dim, source in enumerate(order):
            own[source] = common[dim]
        shape = extents(draw, own, [1, 2, 3, 5], most)
        grid = [a * b for a, b in zip(own, shape, strict=True)]
        leaves, inner = [], []
        for _ in range(draw(st.integers(1, 2)) if coupled and not element_blocks else 1):
            turn = tuple(draw(st.permutations(range(rank))))
            cut = [0] * rank
            for dim, source in enumerate(turn):
                cut[source] = grid[dim]
            block = (1,) * rank if element_blocks else extents(draw, cut, [1, 1, 2, 3], 2 * most)
            leaves.append(oracle.Leaf(tuple(a * b for a, b in zip(cut, block, strict=True)), block))
            inner.append(turn)
        scopes.append(oracle.Scope(oracle.Fused(tuple(leaves), tuple(inner)), shape))
        orders.append(order)
    return oracle.Coupled(tuple(scopes), tuple(orders))


def extents(draw: st.DrawFn, whole: Sequence[int], choices: Sequence[int], most: int) -> Index:
    result: list[int] = []
    for _ in whole:
        size = draw(st.sampled_from(choices))
        now = max(1, math.prod(max(n, 1) for n in whole)) * math.prod(result)
        result.append(size if now * size <= most else 1)
    return tuple(result)


@st.composite
def cases(
    draw: st.DrawFn,
    device: str,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    element_blocks: bool | None = None,
    kinds: Sequence[str] = ("few", "any", "extreme"),
    empty: bool = False,
    coupled: bool = True,
) -> Case:
    """A structure over storages of drawn dtypes. Fused elements are "few", lest norms be rounded."""
    single = draw(st.booleans()) if element_blocks is None else element_blocks
    plan = draw(structures(element_blocks=single, empty=empty, coupled=coupled))
    dtype = draw(st.sampled_from(dtypes))
    mixed = draw(st.booleans()) and len(plan.leaves) > 1
    kind = draw(st.sampled_from(kinds)) if single else "few"
    laid, scopes = [], []
    for scope in plan.scopes:
        own = []
        for leaf in scope.block.leaves:
            chosen = draw(st.sampled_from(dtypes)) if mixed else dtype
            own.append(draw(laid_out(leaf, chosen, "few" if mixed else kind, device)))
        scopes.append(ScopeSpec(joined(draw, scope.block, own), scope.shape, "scope"))
        laid += own
    if len(scopes) == 1 and plan.orders[0] == tuple(range(len(plan.grid))) and draw(st.booleans()):
        return Case(plan, scopes[0], tuple(laid))
    return Case(plan, ScopeCoupling(scopes, plan.orders, "coupled scopes"), tuple(laid))


def joined(draw: st.DrawFn, plan: oracle.Fused, laid: Sequence[Laid]) -> SparseBlock:
    if len(laid) == 1 and plan.orders[0] == tuple(range(len(plan.grid))) and draw(st.booleans()):
        return laid[0].block
    return BlockCoupling([leaf.block for leaf in laid], plan.orders, "fused")


@st.composite
def values_for(
    draw: st.DrawFn, case: Case, device: str, kinds: Sequence[str] = ("few", "any")
) -> tuple[Any, list[dict[Index, Number]]]:
    """Values in one of their forms, and what the oracle makes of them."""
    dtype = draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from(kinds)) if case.exact else "few"
    given: dict[BlockSpec, Tensor] = {}
    elements = []
    for leaf in case.laid:
        flat = filled(kind, draw(st.integers(0, 2**32)), leaf.storage.numel(), dtype).to(device)
        view = leaf.block.view
        as_param = view.shape == tuple(view.param.shape) or draw(st.booleans())
        given[leaf.block] = leaf.param_shaped(flat) if as_param else leaf.view_shaped(flat)
        elements.append(leaf.elements_of(flat))
    if len(given) == 1 and draw(st.booleans()):
        return next(iter(given.values())), elements
    return given, elements


# -- checks ----------------------------------------------------------------------------------------


def assert_masks(case: Case, masks: dict[BlockSpec, Tensor], wanted: Sequence[dict[Index, bool]]) -> None:
    """The masks are bool, view-shaped, complete, and True just where the oracle says so."""
    assert set(masks) == {leaf.block for leaf in case.laid}
    for leaf, want in zip(case.laid, wanted, strict=True):
        mask = masks[leaf.block]
        assert mask.dtype == torch.bool
        assert tuple(mask.shape) == leaf.plan.view
        found = dict(zip(product(*map(range, leaf.plan.view)), mask.flatten().tolist(), strict=True))
        assert found == want


def assert_pruned(case: Case, before: Sequence[Sequence[int]], wanted: Sequence[dict[Index, bool]]) -> None:
    """Every bit of every storage is as before, but all bits are zero where an element was pruned."""
    for leaf, old, want in zip(case.laid, before, wanted, strict=True):
        expected = list(old)
        for index, kept in want.items():
            if not kept:
                expected[leaf.places[index]] = 0
        assert leaf.bits() == expected


def assert_budget_held(case: Case, masks: dict[BlockSpec, Tensor], nnz: int) -> None:
    """In every scope just nnz blocks are True, and no block is True in part."""
    for place in case.plan.places():
        kept = 0
        for block in case.plan.blocks(place):
            flags = {bool(masks[case.laid[leaf].block][index]) for leaf, index in block}
            assert len(flags) == 1
            kept += flags.pop()
        assert kept == nnz


def assert_close(found: Sequence[float], wanted: Sequence[float], relative: float, scale: float) -> None:
    """Numbers agree to `relative`, where `scale` is the size that counts as 1 among them."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert math.isclose(one, other, rel_tol=relative, abs_tol=relative * scale), (one, other)
