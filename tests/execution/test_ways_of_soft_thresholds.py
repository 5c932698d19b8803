"""Soft thresholds and what is not finite in compiled loops, in small pieces: the bytes of whole scopes."""

from pathlib import Path

import pytest
import torch

from sparseprune import load_masks
from sparseprune.execution.strategy import needs_torch
from tests.execution.structures import CASES, FLOATS
from tests.execution.test_ways import PRUNING, applied, prepare, strategies
from tests.limits import force, narrow

SOFT = [name for name in CASES if "soft" in name]


@pytest.mark.parametrize("name", [*SOFT, *PRUNING])
def test_small_pieces_in_loops_give_what_whole_scopes_in_the_engine_give(tmp_path: Path, name: str) -> None:
    if name in PRUNING:
        block, shape, budget = PRUNING[name]
        score = 'score = { kind = "magnitude", nonfinite = "prune" }'
        table = f'tensors = "{{n}}"\nblock = {block}\nshape = {shape}\n{budget}\n{score}\n'
        weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
        weight[:, 5] = float("nan")
        prepare(tmp_path, f"version = 1\n[scope.all]\n{table}", {"w": weight})
    else:
        spec, tensors = CASES[name]
        prepare(tmp_path, spec, tensors(torch.float32))
    with pytest.MonkeyPatch.context() as patch:
        force(patch, "torch_in_memory")
        reference = applied(tmp_path, "reference", "--jobs", 2)
    with pytest.MonkeyPatch.context() as patch:
        narrow(patch, 64, 16)
        assert applied(tmp_path, "pieces", "--jobs", 1) == reference


@pytest.mark.parametrize(
    ("name", "dtype", "slab"),
    [
        (name, FLOATS[(number + more) % len(FLOATS)], slab)
        for number, name in enumerate(SOFT)
        for more, slab in ((0, 64), (2, 64), (4, 1))
    ],
    ids=str,
)
def test_loops_shrink_every_dtype_as_the_engine_does(
    tmp_path: Path, name: str, dtype: torch.dtype, slab: int
) -> None:
    spec, tensors = CASES[name]
    prepare(tmp_path, spec, tensors(dtype))
    with pytest.MonkeyPatch.context() as patch:
        force(patch, "torch_in_memory")
        reference = applied(tmp_path, "reference", "--jobs", 1)
    with pytest.MonkeyPatch.context() as patch:
        narrow(patch, slab, 16)
        single = name in {"soft elements", "soft 2:4", "soft whole tensors", "soft elements over all"}
        assert not (single and any(needs_torch(how) for how in strategies(tmp_path, 1)))
        assert applied(tmp_path, "loops", "--jobs", 1) == reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", ["[4, 8]", "[1, 32]"])
def test_a_mask_drops_a_block_of_which_every_element_was_rounded_to_zero(
    tmp_path: Path, block: str, dtype: torch.dtype
) -> None:
    lowest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    weight = torch.full((8, 64), lowest, dtype=torch.float64)
    weight[4:] *= -8
    weight[0, 0] = 0
    text = f'block = {block}\nshape = [1, 1]\nmode = "soft"\nthreshold = {4 * lowest}\n'
    prepare(tmp_path, f'version = 1\n[scope.all]\ntensors = "w"\n{text}', {"w": weight.to(dtype)})
    with pytest.MonkeyPatch.context() as patch:
        force(patch, "torch_in_memory")
        reference = applied(tmp_path, "reference", "--jobs", 1)
    assert applied(tmp_path, "loops", "--jobs", 1) == reference
    assert not any(needs_torch(how) for how in strategies(tmp_path, 1))
    assert load_masks(tmp_path / "loops")["w"].sum() == 4 * 64
