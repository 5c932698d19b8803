"""Reapplying and finding lost zeros: equal to plain loops for every dtype, form of mask and cut."""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from sparseprune.checkpoint import (
    MaskFormat,
    StagedOutput,
    TensorReader,
    lay_out_apply,
    load_masks,
    open_checkpoint,
    open_masks,
)
from sparseprune.engine.dtypes import DTYPES
from sparseprune.execution.reapply import (
    Reapplication,
    Reapplied,
    find_lost,
    match_masks,
    reapply,
    reapply_bytes,
)
from sparseprune.execution.regions import Limits
from tests.checkpoint.test_masks import write_masks

PRUNABLE = [row.name for row in DTYPES.values() if row.prunable]
SHAPES = {"a": (5, 7), "empty": (0, 4), "s": (), "v": (64,), "w": (3, 3, 3)}
Tensors = dict[str, torch.Tensor]


def drawn(dtype: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Elements of any pattern, NaN and infinities among them, a third of them zero of either sign."""
    row = DTYPES[dtype]
    numbers = np.random.default_rng(seed)
    numel = int(np.prod(shape, dtype=np.int64))
    bits = numbers.integers(0, 1 << row.bits, numel, dtype=np.uint64)
    zero = np.uint64(0), np.uint64(~(row.zero_bits or 0) & (1 << row.bits) - 1)
    bits = np.where(numbers.random(numel) < 0.4, bits, np.array(zero)[numbers.integers(0, 2, numel)])
    patterns = bits.astype(f"uint{row.bits}")
    return torch.from_numpy(patterns.view(np.uint8)).view(torch_dtype(dtype)).reshape(shape)


def torch_dtype(dtype: str) -> torch.dtype:
    found = getattr(torch, DTYPES[dtype].torch_name or "")
    assert isinstance(found, torch.dtype)
    return found


def patterns(tensor: torch.Tensor, dtype: str) -> NDArray[Any]:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0).byte()
    return raw.numpy().view(f"uint{DTYPES[dtype].bits}")


def masks_of(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()}


def prepared(folder: Path, tensors: Tensors, masks: Tensors, form: MaskFormat, slab: int) -> Reapplication:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "c.safetensors")
    checkpoint = open_checkpoint(folder / "c.safetensors")
    opened = open_masks(write_masks(folder / form, masks, form))
    return Reapplication(match_masks(checkpoint, opened, None, partial=False), Limits(1 << 30, slab), 2)


def reapplied(reapplication: Reapplication, target: Path, form: MaskFormat | None) -> tuple[Reapplied, ...]:
    names = [pair.stored.name for pair in reapplication.matched.pairs]
    layout = lay_out_apply(reapplication.matched.checkpoint, target, names, form)
    passed: list[int] = []
    with StagedOutput(layout, force=True) as output, TensorReader() as reader:
        total, already = reapply_bytes(reapplication, output)
        found = reapply(reapplication, reader, output, lambda nbytes, _: passed.append(nbytes))
        output.commit()
    assert (sum(passed), already) == (total, 0)
    return tuple(found)


def check(tensors: Tensors, masks: Tensors, dtype: str, target: Path, found: tuple[Reapplied, ...]) -> None:
    """The output and what was counted, against loops over single elements."""
    written, zero_bits = load_file(target), DTYPES[dtype].zero_bits or 0
    assert written.keys() == tensors.keys()
    assert [one.name for one in found] == [name for name in open_checkpoint(target).tensors if name in masks]
    for one in found:
        before = patterns(tensors[one.name], dtype).tolist()
        kept = masks[one.name].flatten().tolist()
        wanted = [bits if keep else 0 for bits, keep in zip(before, kept, strict=True)]
        assert patterns(written[one.name], dtype).tolist() == wanted
        lost = sum(1 for bits, keep in zip(before, kept, strict=True) if not keep and bits & zero_bits)
        assert (one.pruned, one.lost) == (kept.count(False), lost)
        assert one.before.zeros == sum(1 for bits in before if not bits & zero_bits)
        assert one.after.zeros == sum(1 for bits in wanted if not bits & zero_bits)
        assert (one.before.numel, one.shape, one.dtype) == (len(before), tuple(masks[one.name].shape), dtype)
    for name in tensors.keys() - masks.keys():
        assert np.array_equal(patterns(written[name], dtype), patterns(tensors[name], dtype))


@pytest.mark.parametrize("form", ["bool", "packed"])
@pytest.mark.parametrize("dtype", PRUNABLE)
def test_dropped_elements_become_0_and_survivors_keep_their_bits(
    tmp_path: Path, dtype: str, form: MaskFormat
) -> None:
    tensors = {name: drawn(dtype, shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())}
    masks = masks_of(SHAPES, 1)
    tensors["other"] = drawn(dtype, (9,), 9)
    for slab in (24, 1 << 20):
        reapplication = prepared(tmp_path, tensors, masks, form, slab)
        found = reapplied(reapplication, tmp_path / "out.safetensors", form)
        check(tensors, masks, dtype, tmp_path / "out.safetensors", found)
        for name, mask in load_masks(tmp_path / "out.safetensors").items():
            assert torch.equal(mask, masks[name])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(PRUNABLE),
    shape=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    forms=st.sampled_from(list(product(["bool", "packed"], [None, "bool", "packed"]))),
    slab=st.sampled_from([1, 8, 24, 64, 1000]),
    seed=st.integers(0, 99),
)
def test_however_it_is_cut_the_output_is_that_of_plain_loops(
    tmp_path: Path,
    dtype: str,
    shape: tuple[int, ...],
    forms: tuple[MaskFormat, MaskFormat | None],
    slab: int,
    seed: int,
) -> None:
    tensors, masks = {"w": drawn(dtype, shape, seed)}, masks_of({"w": shape}, seed)
    reapplication = prepared(tmp_path, tensors, masks, forms[0], slab)
    found = reapplied(reapplication, tmp_path / "out.safetensors", forms[1])
    check(tensors, masks, dtype, tmp_path / "out.safetensors", found)


@pytest.mark.parametrize("kept", [False, True])
def test_masks_that_drop_all_or_nothing(tmp_path: Path, kept: bool) -> None:
    tensors = {"w": drawn("F32", (5, 9), 3)}
    masks = {"w": torch.full((5, 9), kept)}
    found = reapplied(prepared(tmp_path, tensors, masks, "packed", 64), tmp_path / "o.safetensors", None)
    check(tensors, masks, "F32", tmp_path / "o.safetensors", found)


@pytest.mark.parametrize("form", ["bool", "packed"])
@pytest.mark.parametrize("dtype", PRUNABLE)
def test_lost_zeros_are_counted_and_the_first_is_found(tmp_path: Path, dtype: str, form: MaskFormat) -> None:
    tensors = {name: drawn(dtype, shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())}
    masks, zero_bits = masks_of(SHAPES, 2), DTYPES[dtype].zero_bits or 0
    for slab in (24, 1 << 20):
        with TensorReader() as reader:
            found = find_lost(prepared(tmp_path, tensors, masks, form, slab), reader, lambda *_: None)
        assert sorted(one.name for one in found) == sorted(SHAPES)
        for one in found:
            dropped = torch.nonzero(~masks[one.name]).tolist()
            values = patterns(tensors[one.name], dtype).reshape(masks[one.name].shape)
            lost = [index for index in dropped if int(values[tuple(index)]) & zero_bits]
            assert (one.pruned, one.lost) == (len(dropped), len(lost))
            assert one.first == (tuple(lost[0]) if lost else None)


def test_what_was_reapplied_has_no_lost_zeros(tmp_path: Path) -> None:
    tensors, masks = {"w": drawn("BF16", (40, 9), 3)}, masks_of({"w": (40, 9)}, 4)
    first = prepared(tmp_path, tensors, masks, "bool", 64)
    assert reapplied(first, tmp_path / "o.safetensors", None)[0].lost
    again = prepared(tmp_path, load_file(tmp_path / "o.safetensors"), masks, "bool", 64)
    with TensorReader() as reader:
        (found,) = find_lost(again, reader, lambda *_: None)
    assert (found.lost, found.first) == (0, None)
    assert reapplied(again, tmp_path / "p.safetensors", None)[0].lost == 0
    assert torch.equal(load_file(tmp_path / "p.safetensors")["w"], load_file(tmp_path / "o.safetensors")["w"])


def test_the_check_can_fail(tmp_path: Path) -> None:
    tensors, masks = {"w": torch.ones(9)}, {"w": torch.arange(9) < 4}
    found = reapplied(prepared(tmp_path, tensors, masks, "bool", 64), tmp_path / "o.safetensors", None)
    check(tensors, masks, "F32", tmp_path / "o.safetensors", found)
    for wrong in ({"w": torch.arange(9) < 5}, {"w": torch.arange(9) > 4}):
        with pytest.raises(AssertionError):
            check(tensors, wrong, "F32", tmp_path / "o.safetensors", found)
    with pytest.raises(AssertionError):
        check(tensors, masks, "F32", tmp_path / "c.safetensors", found)
