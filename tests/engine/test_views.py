"""Views: write-through, injective, laid out to and from the parameter (promises 5 and 6)."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprune import (
    BlockCoupling,
    BlockSpec,
    CouplingError,
    ScopeSpec,
    ShapeMismatchError,
    SparsityError,
    View,
)
from tests import oracle
from tests.engine.devices import on_every_device
from tests.engine.structures import DTYPES, Case, bits_of, cases


@on_every_device
@settings(max_examples=100)
@given(data=st.data())
def test_to_param_lays_a_mask_like_the_parameter_and_is_true_outside(
    device: str, data: st.DataObject
) -> None:
    case: Case = data.draw(cases(device, empty=data.draw(st.booleans())))
    masks = case.scope.get_masks(case.plan.blocks_per_scope // 2)
    before = [leaf.storage.clone() for leaf in case.laid]
    case.scope.hard_threshold(nnz=case.plan.blocks_per_scope // 2)
    for leaf, old in zip(case.laid, before, strict=True):
        view = leaf.block.view
        laid = view.to_param(masks[leaf.block])
        assert laid.dtype == torch.bool
        assert laid.shape == view.param.shape
        assert laid.is_contiguous()
        assert int((~laid).sum()) == int((~masks[leaf.block]).sum())
        old_param = old.as_strided(view.param.shape, view.param.stride(), view.param.storage_offset())
        zeroed = dict(zip(indices(laid), bits_of(view.param), strict=True))
        kept = dict(zip(indices(laid), bits_of(old_param), strict=True))
        for index in indices(laid):
            assert zeroed[index] == (kept[index] if laid[index] else 0)


def indices(tensor: torch.Tensor) -> list[oracle.Index]:
    return list(product(*map(range, tensor.shape)))


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_written_outside_a_view_among_nan_neighbours(device: str, dtype: torch.dtype) -> None:
    bits = torch.full(
        (6, 8), -1, dtype={1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    )
    inner = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).to(dtype)
    bits[1:5:3, 1:7:2] = inner.view(bits.dtype)
    bits = bits.to(device)
    weight = bits.view(dtype)[1:5:3, 1:7:2]  # all bits set around it: NaN, or -1
    ScopeSpec(BlockSpec(weight.T, (1, 1)), (1, -1)).hard_threshold(nnz=1)
    assert weight.to(torch.float64).tolist() == [[0, 0, 0], [4, 5, 6]]
    assert int((bits == -1).sum()) == 6 * 8 - 6


@pytest.mark.parametrize(
    ("pattern", "axes", "shape"),
    [
        ("m (k p j) -> m k j p", {"p": 2, "j": 4}, (4, 2, 4, 2)),
        ("m k -> k m", {}, (16, 4)),
        ("(a b) k -> b k a", {"a": 2}, (2, 16, 2)),
        ("m k -> (m k)", {}, (64,)),
        ("m k -> m k 1", {}, (4, 16, 1)),
    ],
)
def test_rearrange_is_einops_and_writes_through(
    pattern: str, axes: dict[str, int], shape: tuple[int, ...]
) -> None:
    from einops import rearrange

    weight = torch.arange(64.0).view(4, 16)
    view = View.rearrange(weight, pattern, **axes)
    assert view.shape == shape
    assert torch.equal(view.data, rearrange(weight, pattern, **axes))
    values = torch.randn(4, 16)
    assert torch.equal(view.layout(values), rearrange(values, pattern, **axes))
    view.data.fill_(7)
    assert (weight == 7).all()


def test_rearrange_of_a_strided_offset_tensor_finds_its_elements() -> None:
    base = torch.arange(60.0).view(6, 10)
    weight = base[1:5, 2:10:2]
    view = View.rearrange(weight, "m (k p) -> p k m", p=2)
    assert torch.equal(view.data, weight.reshape(4, 2, 2).permute(2, 1, 0))
    BlockSpec(view, ()).hard_threshold(1000.0)
    assert int((base == 0).sum()) == 16 + 1
    assert (weight == 0).all()


@pytest.mark.parametrize("shape", [(4,), (2, 3), (0, 4), ()])
def test_from_existing_takes_the_whole_tensor_and_leaves_a_view_alone(shape: tuple[int, ...]) -> None:
    weight = torch.zeros(shape)
    view = View.from_existing(weight)
    assert view.is_whole
    assert view.shape == shape
    assert view.ndim == len(shape)
    assert view.data.data_ptr() == weight.data_ptr()
    assert View.from_existing(view) is view


def test_a_parameter_that_wants_gradients_is_pruned_in_place() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    ScopeSpec(BlockSpec(weight, ()), ()).hard_threshold(nnz=1)
    assert weight.tolist() == [0, 2]


def test_values_of_a_transposed_square_view_are_read_as_the_parameters() -> None:
    weight = torch.ones(2, 2)
    view = View(weight, (2, 2), (1, 2))
    values = torch.tensor([[4.0, 3.0], [2.0, 1.0]])
    assert torch.equal(view.layout(values), values.T)
    ScopeSpec(BlockSpec(view, ()), (1, 2)).hard_threshold(nnz=1, values=values)
    assert weight.tolist() == [[1, 1], [0, 0]]


ILLEGAL_VIEWS = {
    "overlapping rows": ((3, 4), (2, 1), 0, SparsityError, "not injective"),
    "a repeated element": ((3, 2), (0, 1), 0, SparsityError, "not injective"),
    "crossing strides": ((3, 3), (2, 2), 0, SparsityError, "not injective"),
    "behind the end": ((3, 4), (4, 1), 1, ShapeMismatchError, "reaches element 12 of the storage"),
    "unlike lengths": ((3, 4), (1,), 0, ShapeMismatchError, "must have one length"),
    "a negative stride": ((3, 4), (4, -1), 3, ShapeMismatchError, "must not be negative"),
    "a negative extent": ((3, -1), (4, 1), 0, ShapeMismatchError, "must not be negative"),
    "a negative offset": ((3, 2), (4, 1), -1, ShapeMismatchError, "must not be negative"),
}
LEGAL_VIEWS = {
    "overlapping rows": ((3, 2), (2, 1), 0),
    "a repeated element": ((1, 2), (0, 1), 0),
    "crossing strides": ((2, 3), (3, 4), 0),  # 0 4 8 / 3 7 11: not nested, yet injective
    "behind the end": ((3, 3), (4, 1), 1),
    "unlike lengths": ((3, 4), (1, 3), 0),
    "a negative stride": ((3, 4), (4, 1), 0),
    "a negative extent": ((3, 0), (4, 1), 0),
    "a negative offset": ((3, 2), (4, 1), 0),
}


@pytest.mark.parametrize("fault", ILLEGAL_VIEWS)
def test_an_illegal_view_is_refused_and_its_legal_neighbour_is_not(fault: str) -> None:
    weight = torch.zeros(12)
    shape, stride, offset, error, text = ILLEGAL_VIEWS[fault]
    with pytest.raises(error, match=text):
        View(weight, shape, stride, offset)
    View(weight, *LEGAL_VIEWS[fault])


def test_a_view_must_stay_within_the_parameters_own_elements() -> None:
    base = torch.zeros(4, 6)
    part = base[1:3, ::2]
    View(part, (2, 3), (6, 2))
    with pytest.raises(ShapeMismatchError, match="between the elements"):
        View(part, (2, 3), (6, 1))
    with pytest.raises(ShapeMismatchError, match="reaches element"):
        View(part, (3, 3), (6, 2))


def test_a_parameter_that_repeats_its_own_elements_is_refused() -> None:
    once = torch.zeros(1)
    View.from_existing(once)
    with pytest.raises(SparsityError, match=r"parameter \[4\] .* not injective"):
        View.from_existing(once.expand(4))
    with pytest.raises(SparsityError, match=r"parameter \[4\] .* not injective"):
        View(once.expand(4), (1,), (1,))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fnuz])
def test_a_dtype_that_cannot_be_pruned_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(SparsityError, match="cannot be pruned: wanted one of"):
        View.from_existing(torch.zeros(4, dtype=dtype))


def test_a_pattern_that_copies_or_does_not_fit_is_refused() -> None:
    weight = torch.zeros(4, 6)
    assert View.rearrange(weight.T, "k m -> (m k)").shape == (24,)
    with pytest.raises(SparsityError, match="would need a copy"):
        View.rearrange(weight, "m k -> (k m)")
    assert View.rearrange(weight, "m (k p) -> m k p", p=3).shape == (4, 2, 3)
    with pytest.raises(ShapeMismatchError, match="does not fit a tensor of shape"):
        View.rearrange(weight, "m (k p) -> m k p", p=4)


def test_masks_and_values_of_another_shape_are_refused() -> None:
    view = View(torch.zeros(12), (3, 4), (4, 1))
    view.to_param(torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ShapeMismatchError, match=r"mask of shape \[4, 3\]"):
        view.to_param(torch.ones(4, 3, dtype=torch.bool))
    assert view.layout(torch.zeros(12)).shape == view.layout(torch.zeros(3, 4)).shape
    with pytest.raises(ShapeMismatchError, match="fit neither the parameter"):
        view.layout(torch.zeros(4, 3))
    with pytest.raises(SparsityError, match="complex64 have no order"):
        view.layout(torch.zeros(3, 4, dtype=torch.complex64))


SHARED = {
    "apart": ((1, 2), (4, 1), 14, True),
    "interleaved": ((4, 2), (4, 1), 2, True),
    "one element in common": ((2, 2), (4, 1), 5, False),
    "the same": ((4, 2), (4, 1), 0, False),
    "empty": ((0, 2), (4, 1), 0, True),
}


@pytest.mark.parametrize("how", SHARED)
def test_members_of_a_coupling_share_no_element(how: str) -> None:
    weight = torch.zeros(16)
    shape, stride, offset, apart = SHARED[how]
    one = BlockSpec(View(weight, (4, 2), (4, 1)), (-1, -1), "one")
    other = BlockSpec(View(weight, shape, stride, offset), (-1, -1), "other")
    if not shape[0]:
        other = BlockSpec(View(torch.zeros(16), (4, 2), (4, 1)), (-1, -1))
    assert one.view.overlaps(other.view) is not apart
    if apart:
        BlockCoupling([one, other], [(0, 1), (0, 1)])
    else:
        with pytest.raises(CouplingError, match="one and other share elements"):
            BlockCoupling([one, other], [(0, 1), (0, 1)])


def test_one_storage_read_as_two_dtypes_counts_as_shared() -> None:
    weight = torch.zeros(8)
    halves = weight.view(torch.float16)
    assert View.from_existing(weight).overlaps(View.from_existing(halves))
    assert not View.from_existing(weight).overlaps(View.from_existing(torch.zeros(8)))


def test_many_column_slices_of_one_matrix_are_told_apart_in_one_pass() -> None:
    weight = torch.zeros(64, 256)
    slices = [BlockSpec(weight[:, 4 * i : 4 * i + 4], (-1, -1), f"head {i}") for i in range(64)]
    BlockCoupling(slices, [(0, 1)] * 64)
    again = BlockSpec(weight[:, 8:12], (-1, -1), "again")
    with pytest.raises(CouplingError, match="head 2 and again"):
        BlockCoupling([*slices, again], [(0, 1)] * 65)
