"""A source of permuted tensors: byte for byte what is read had they been stored so, in whatever parts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseprune.checkpoint import TensorReader, open_checkpoint, permuted
from sparseprune.checkpoint.layout import permutations_path
from sparseprune.checkpoint.permuted import (
    Permuted,
    PermutedSource,
    both_sides,
    permutations_bytes,
    read_permutations,
)
from sparseprune.errors import CheckpointError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int8)


def order_of(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """A permutation for each leading part."""
    chance = np.random.default_rng(seed)
    return np.stack([chance.permutation(shape[-1]) for _ in range(shape[0])])


def by_index(tensor: torch.Tensor, dim: int, order: np.ndarray[Any, Any]) -> torch.Tensor:
    """The permuted tensor, leading part by leading part."""
    parts = tensor.reshape(len(order), -1, *tensor.shape[dim:])
    found = [part.index_select(1, torch.from_numpy(own)) for part, own in zip(parts, order, strict=True)]
    return torch.stack(found).reshape(tensor.shape)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def stored(folder: Path, **tensors: torch.Tensor) -> Any:
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder / "model.safetensors").tensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "dim", "leading"),
    [
        pytest.param((12,), 0, 1, id="a vector"),
        pytest.param((5, 12), 1, 1, id="columns"),
        pytest.param((12, 5), 0, 1, id="rows"),
        pytest.param((3, 12, 4), 1, 3, id="rows of the members of a stack"),
        pytest.param((3, 4, 12), 2, 3, id="columns of the members of a stack"),
        pytest.param((3, 12, 4), 1, 1, id="the same rows in all members"),
        pytest.param((12, 3, 2, 2), 0, 1, id="a convolution's filters"),
    ],
)
def test_serves_what_index_select_gives_in_whatever_parts(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...], dim: int, leading: int
) -> None:
    tensor = torch.randn(shape).mul(50).to(dtype)
    tensors, order = stored(tmp_path, w=tensor, z=torch.arange(7)), order_of(leading, shape[dim])
    wanted = raw(by_index(tensor, dim, order))
    with TensorReader() as reader:
        source = PermutedSource(reader, [Permuted(tensors["w"], {dim: order})])
        assert bytes(source.read(tensors["w"])) == wanted
        assert bytes(source.read(tensors["z"])) == raw(torch.arange(7))
        for begin in range(0, len(wanted), 7):
            for end in range(begin, len(wanted) + 1, 11):
                assert bytes(source.read(tensors["w"], begin, end)) == wanted[begin:end]


@pytest.mark.parametrize("span", [1, 30, 100, 1 << 20])
def test_gathers_pieces_of_tensors_of_any_size(
    tmp_path: Path, span: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(permuted, "_SPAN", span)
    tensor = torch.randn(4, 6, 10)
    tensors = stored(tmp_path, w=tensor)
    rows, columns = order_of(4, 6), order_of(1, 10, seed=1)
    wanted = raw(by_index(by_index(tensor, 1, rows), 2, columns))
    with TensorReader() as reader:
        source = PermutedSource(reader, [Permuted(tensors["w"], {1: rows, 2: columns})])
        assert bytes(source.read(tensors["w"])) == wanted
        for begin in range(0, len(wanted), 37):
            assert bytes(source.read(tensors["w"], begin, begin + 30)) == wanted[begin : begin + 30]


def test_reads_across_several_tensors_have_each_in_its_order(tmp_path: Path) -> None:
    tensors = {name: torch.randn(4, 6) for name in "abcd"}
    there, chance = stored(tmp_path, **tensors), np.random.default_rng(0)
    orders = {name: order_of(1, 6, seed=place) for place, name in enumerate("acd")}
    expected = b"".join(
        raw(by_index(tensors[name], 1, orders[name]) if name in orders else tensors[name]) for name in "abcd"
    )
    first, size = there["a"], sum(one.nbytes for one in there.values())
    entry = type(first.entry)("span", "U8", (size,), first.entry.begin, first.entry.begin + size)
    span = type(first)(entry, first.shard)
    with TensorReader() as reader:
        source = PermutedSource(reader, [Permuted(there[name], {1: own}) for name, own in orders.items()])
        for _ in range(200):
            begin, end = sorted(chance.integers(0, size + 1, 2).tolist())
            assert bytes(source.read(span, begin, end)) == expected[begin:end]


def test_second_moments_are_permuted_on_both_sides(tmp_path: Path) -> None:
    moment, order = torch.randn(3, 8, 8), order_of(3, 8)
    tensors = stored(tmp_path, h=moment)
    wanted = by_index(by_index(moment, 1, order), 2, order)
    assert torch.equal(wanted[1, 2, 5], moment[1, order[1, 2], order[1, 5]])
    with TensorReader() as reader:
        source = PermutedSource(reader, [both_sides(tensors["h"], order)])
        assert bytes(source.read(tensors["h"])) == raw(wanted)


def test_groups_along_the_diagonal_are_those_of_the_whole_moment(tmp_path: Path) -> None:
    groups = torch.randn(2, 3, 4, 4)
    order = np.concatenate([order_of(2, 4, seed=group) + 4 * group for group in range(3)], axis=1)
    tensors = stored(tmp_path, g=groups)
    whole = torch.stack([_along_diagonal(member) for member in groups])
    wanted = by_index(by_index(whole, 1, order), 2, order)
    blocks = [[member[4 * at : 4 * at + 4, 4 * at : 4 * at + 4] for at in range(3)] for member in wanted]
    with TensorReader() as reader:
        source = PermutedSource(reader, [both_sides(tensors["g"], order)])
        served = bytes(source.read(tensors["g"]))
    assert served == raw(torch.stack([torch.stack(member) for member in blocks]))


def test_refuses_an_order_in_which_indices_leave_their_groups(tmp_path: Path) -> None:
    tensors = stored(tmp_path, g=torch.randn(2, 3, 3))
    with pytest.raises(ValueError, match="groups of 3"):
        both_sides(tensors["g"], np.array([[0, 1, 3, 2, 4, 5]]))


def _along_diagonal(groups: torch.Tensor) -> torch.Tensor:
    """(groups, size, size) as one matrix."""
    count, size, _ = groups.shape
    whole = torch.zeros(count * size, count * size)
    for at, group in enumerate(groups):
        whole[size * at : size * (at + 1), size * at : size * (at + 1)] = group
    return whole


def test_refuses_places_outside_of_a_tensor(tmp_path: Path) -> None:
    tensors = stored(tmp_path, w=torch.randn(4, 4))
    with TensorReader() as reader:
        source = PermutedSource(reader, [Permuted(tensors["w"], {1: order_of(1, 4)})])
        with pytest.raises(ValueError, match="bytes 8 to 100"):
            source.read(tensors["w"], 8, 100)


def test_refuses_orders_of_another_size(tmp_path: Path) -> None:
    tensors = stored(tmp_path, w=torch.randn(4, 6))
    with pytest.raises(ValueError, match=r"order of shape \[1, 4\] for dimension 1"):
        Permuted(tensors["w"], {1: order_of(1, 4)})


# -- the file ----------------------------------------------------------------------------------------


def written(folder: Path, text: bytes) -> Any:
    save_file({"w": torch.zeros(4, 6), "e": torch.zeros(3, 5, 2)}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    path = permutations_path(checkpoint)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text)
    return checkpoint


def test_orders_come_back_from_their_file(tmp_path: Path) -> None:
    orders = {"w": {1: order_of(1, 6)}, "e": {1: order_of(3, 5)}}
    checkpoint = written(tmp_path, permutations_bytes(orders))
    found = read_permutations(checkpoint)
    assert {name: {dim: own.tolist() for dim, own in each.items()} for name, each in found.items()} == {
        name: {dim: own.tolist() for dim, own in each.items()} for name, each in orders.items()
    }
    tensors = load_file(permutations_path(checkpoint))
    assert (tensors["w"].shape, tensors["e"].shape) == ((6,), (3, 5))


def test_a_checkpoint_without_the_file_is_not_permuted(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert read_permutations(open_checkpoint(tmp_path)) == {}
    assert read_permutations(open_checkpoint(tmp_path / "model.safetensors")) == {}


def test_refuses_orders_of_tensors_that_a_checkpoint_has_not(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, permutations_bytes({"v": {0: order_of(1, 4)}}))
    with pytest.raises(CheckpointError, match="has no such tensor"):
        read_permutations(checkpoint)


def test_refuses_orders_of_another_shape(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, permutations_bytes({"w": {0: order_of(1, 6)}}))
    with pytest.raises(CheckpointError, match=r"shape \[6\] for dimension 0, .*tensor of shape \[4, 6\]"):
        read_permutations(checkpoint)


def test_refuses_what_is_no_order(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, permutations_bytes({"w": {1: np.array([[0, 1, 2, 3, 4, 4]])}}))
    with pytest.raises(CheckpointError, match="w is no order"):
        read_permutations(checkpoint)


def test_refuses_a_file_of_something_else(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, b"")
    save_file({"w": torch.zeros(6)}, permutations_path(checkpoint))
    with pytest.raises(CheckpointError, match="not that of permutations"):
        read_permutations(checkpoint)
