"""Scores: norms in float64 whatever the storage, the same in any chunks (promises 7 and 9)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprune import BlockCoupling, BlockSpec, ScopeSpec, SparsityError
from sparseprune.engine import scoring
from sparseprune.engine.scoring import magnitude_keys, order_keys
from tests import oracle
from tests.engine.devices import on_every_device
from tests.engine.structures import DTYPES, cases, extremes, filled, numbers_of


@on_every_device
@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
@settings(max_examples=60)
@given(data=st.data())
def test_norms_are_those_of_exact_arithmetic(device: str, p: float, data: st.DataObject) -> None:
    case = data.draw(cases(device, empty=data.draw(st.booleans())))
    elements = case.elements()
    first = 0
    for scope in case.plan.scopes:
        leaves = range(first, first + len(scope.block.leaves))
        block = next(
            member.block
            for member, _ in case.scope.members
            if member.block.blocks()[0] is case.laid[first].block
        )
        found = block.norms(p=p)
        assert found.dtype == torch.float64
        assert tuple(found.shape) == scope.block.grid
        for place in scope.block.places():
            inner = [elements[leaves[leaf]][index] for leaf, index in scope.block.block_elements(place)]
            assert math.isclose(found[place].item(), oracle.norm(inner, p), rel_tol=1e-13)
        first += len(leaves)


@on_every_device
@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_elements_neither_overflow_nor_vanish(device: str, dtype: torch.dtype, p: float) -> None:
    # a power and a root may round the largest double up to infinity
    most = 1e308 if p == 3 else math.inf
    numbers = [number for number in extremes(dtype) if abs(number) < most]
    wide = torch.float64 if dtype.is_floating_point else torch.int64
    pairs = torch.tensor([(a, b) for a in numbers for b in (0, a // 4, *numbers)], dtype=wide).to(dtype)
    found = BlockSpec(pairs.to(device), (1, 2)).norms(p=p).flatten().tolist()
    exact = numbers_of(pairs)
    for row, norm in enumerate(found):
        wanted = oracle.norm(exact[2 * row : 2 * row + 2], p)
        assert math.isclose(norm, wanted, rel_tol=1e-9 if p == 3 else 1e-14), (pairs[row], norm)


@pytest.mark.parametrize("size", [1e200, 1e-200, 1e-310])
@pytest.mark.parametrize("p", [0.5, 1, 2, 3])
def test_float64_norms_far_from_one_keep_their_digits(size: float, p: float) -> None:
    block = BlockSpec(torch.full((8,), size, dtype=torch.float64), (-1,))
    assert math.isclose(block.norms(p=p).item(), size * 8 ** (1 / p), rel_tol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e5m2, torch.int8])
def test_long_blocks_of_narrow_dtypes_are_summed_wide(dtype: torch.dtype) -> None:
    block = BlockSpec(torch.ones(1 << 14, dtype=dtype), (-1,))
    assert block.norms(p=1).tolist() == [1 << 14]
    assert block.norms().tolist() == [1 << 7]


@pytest.mark.parametrize("p", [0, -1, math.nan])
def test_an_order_that_is_no_norm_is_refused(p: float) -> None:
    with pytest.raises(SparsityError, match="is not defined"):
        BlockSpec(torch.ones(2), (2,)).norms(p=p)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), rows=st.integers(2, 9), block=st.sampled_from([(1, 4), (1, 7), (2, 3)]))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_norms_of_a_chunk_are_bit_for_bit_those_of_the_whole(
    dtype: torch.dtype, seed: int, rows: int, block: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows * block[0], 5 * block[1], generator=generator, dtype=torch.float64).to(dtype)
    whole = BlockSpec(weight, block).norms()
    for row in range(rows):
        chunk = weight[row * block[0] : (row + 1) * block[0]]
        assert torch.equal(BlockSpec(chunk, block).norms(), whole[row : row + 1])
        assert torch.equal(
            BlockSpec(chunk.clone().T, block[::-1]).norms().T, BlockSpec(chunk.T, block[::-1]).norms().T
        )


def test_chunks_inside_the_engine_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    one, other = torch.randn(24, 6), torch.randn(6, 24).to(torch.bfloat16)
    fused = BlockCoupling([BlockSpec(one, (2, -1)), BlockSpec(other, (-1, 2))], [(0, 1), (1, 0)])
    whole = fused.norms()
    for chunk in (1, 5, 48, 100):
        monkeypatch.setattr(scoring, "_CHUNK", chunk)
        assert torch.equal(fused.norms(), whole)


def test_norms_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    block = BlockSpec(torch.randn(96, 4096), (3, 1024))
    threads = torch.get_num_threads()
    try:
        norms = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            norms.append(block.norms())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(norms[0], norms[1])
    assert torch.equal(norms[0], norms[2])


@on_every_device
@pytest.mark.parametrize("kind", ["few", "any", "extreme"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_are_ordered_as_exact_magnitudes(device: str, dtype: torch.dtype, kind: str) -> None:
    elements = filled(kind, 3, 40, dtype).to(device)
    keys = magnitude_keys(elements).tolist()
    sizes = [oracle.score([number], 1) for number in numbers_of(elements)]
    assert magnitude_keys(elements).dtype.itemsize == dtype.itemsize
    for a, size_a in zip(keys, sizes, strict=True):
        for b, size_b in zip(keys, sizes, strict=True):
            assert (a < b) == bool(size_a < size_b)


@pytest.mark.parametrize(
    "scores",
    [
        torch.tensor([-math.inf, -2.0, -5e-324, -0.0, 0.0, 5e-324, 2.0, math.inf], dtype=torch.float64),
        torch.tensor([-(2**63), -1, 0, 1, 2**63 - 1]),
        torch.tensor([0, 1, 2**63 - 1, 2**63, 2**64 - 1], dtype=torch.uint64),
        torch.tensor([False, True]),
        torch.tensor([0, 1, 255], dtype=torch.uint8),
        torch.tensor([-448.0, -1.0, 0.0, 1.0, 448.0]).to(torch.float8_e4m3fn),
    ],
    ids=lambda scores: str(scores.dtype),
)
def test_scores_of_either_sign_and_any_dtype_keep_their_order(scores: torch.Tensor) -> None:
    keys = order_keys(scores).tolist()
    assert keys == sorted(keys)
    assert len(set(keys)) == len(set(scores.tolist()))


@on_every_device
@settings(max_examples=60)
@given(data=st.data())
def test_reductions_and_block_norms_follow_the_blocks(device: str, data: st.DataObject) -> None:
    case = data.draw(cases(device, kinds=("few",)))
    elements = case.elements()
    by_scope = case.scope.block_norms()
    for place, squares in oracle.scores_by_scope(case.plan, elements).items():
        assert by_scope[place].tolist() == pytest.approx([math.sqrt(square) for square in squares], rel=1e-15)
    first = 0
    for scope in case.plan.scopes:
        number = len(scope.block.leaves)
        block = next(
            member.block
            for member, _ in case.scope.members
            if member.block.blocks()[0] is case.laid[first].block
        )
        merged = block.block_view(merge=True)
        least, most = block.min(), block.max()
        total = block.reduce(None, lambda part: part.to(torch.float64).sum(-1))
        for place in scope.block.places():
            inner = [
                float(elements[first + leaf][index]) for leaf, index in scope.block.block_elements(place)
            ]
            assert merged[place].to(torch.float64).tolist() == inner
            assert (least[place].item(), most[place].item()) == (min(inner), max(inner))
            assert total[place].item() == math.fsum(inner)
        assert block.numel_per_block() * block.numblk() == block.numel()
        first += number
    assert case.scope.nnz() == sum(number != 0 for leaf in elements for number in leaf.values())
    assert case.scope.numblk() == case.scope.numscp() * case.scope.numblk_per_scope()
    assert case.scope.numel_per_scope() * case.scope.numscp() == sum(map(len, elements))


def test_nnz_counts_what_is_larger_than_eps_and_nan() -> None:
    block = BlockSpec(torch.tensor([0.0, -0.0, 1e-9, 2e-8, -1.0, math.nan, math.inf]), ())
    assert block.nnz() == 4
    assert block.nnz(eps=0) == 5
    assert ScopeSpec(block, ()).nnz(eps=1.0) == 2


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_0d_tensors_are_one_block_in_one_scope(device: str, dtype: torch.dtype) -> None:
    weight = torch.tensor(3).to(dtype).to(device)
    block = BlockSpec(weight, ())
    scope = ScopeSpec(block, ())
    assert (block.norms().item(), block.min().item(), block.max().item(), block.nnz()) == (3, 3, 3, 1)
    assert tuple(block.block_view(merge=True).shape) == tuple(scope.block_norms().shape) == (1,)
    assert tuple(scope.block_to_scope(torch.tensor(1.0), reorder=False).shape) == ()
    assert scope.scope_to_block(torch.tensor(1.0)).item() == 1
    assert scope.kth_mid(None, 1).item() == 1.5
    block.apply_multiplier(torch.tensor(2.0, device=device))
    assert weight.item() == 6
    scope.hard_threshold(6.0)
    assert weight.item() == 6
    scope.hard_threshold(nnz=0)
    assert weight.item() == 0
