"""`inspect --require` and `inspect --for` as whole command lines: exit codes, lines of stderr, the table."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.sparse import _semi_structured_conversions as _conversions

from tests.commands import refused, run, silent

UP, DOWN, NORM = "h.0.up.weight", "h.0.down.weight", "h.0.norm.weight"


def two_of_four(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Two of every four neighbours along the last dimension are zero, not always the same two.

    Values are small integers: torch unpacks a float32 as two halves, and those that are a NaN come back as
    another one.
    """
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(1, 100, shape, generator=generator).float()
    order = torch.rand((*shape[:-1], shape[-1] // 4, 4), generator=generator).argsort(-1)
    return (values * (order < 2).reshape(shape)).to(dtype)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A 2:4 matrix, one of the same size that is half zero in no pattern, and a vector."""
    path = tmp_path / "m.safetensors"
    down = torch.ones((64, 128), dtype=torch.float16)
    down[:, ::4] = 0
    down[:, 1:64:4] = down[:, 66::4] = 0
    down[0, 0] = 1
    save_file({UP: two_of_four(64, 128), DOWN: down, NORM: torch.ones(128, dtype=torch.float16)}, path)
    return path


@pytest.mark.parametrize(
    "words",
    [
        ["--require", f"2:4 in {UP}"],
        ["--require", "2:4 in h.{layer}.{part:up|gate}.*"],
        ["--require", f"sparsity>=50% in {UP}", "--match", "h.*.up.*"],
        ["--require", "sparsity>=0.45 in **.up.*, **.down.*", "--require", "nonfinite==0"],
        ["--require", f"torch-cutlass in {UP}"],
        ["--require", f"torch-cutlass in {UP}", "--for", "asp"],
        ["--require", "sparsity<1"],
    ],
)
def test_exits_0_in_silence_where_all_hold(checkpoint: Path, words: list[str]) -> None:
    assert UP in silent("inspect", checkpoint, *words).out
    assert silent("inspect", checkpoint, "-q", *words).out == ""


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["--require", "2:4"], [f"{DOWN}: wanted 2:4, satisfies none"]),
        (["--require", "2:4@0 in **.up.*"], [f"{UP}: wanted 2:4@0, satisfies 2:4 4:8"]),
        (["--require", f"2:4 in {NORM}"], [f"{NORM}: wanted 2:4, is 1-D"]),
        (["--require", "sparsity>=0.5"],
         [f"{DOWN}: wanted sparsity>=0.5, found 0.4999", f"{NORM}: wanted sparsity>=0.5, found 0"]),
        (["--require", "sparsity>50% in **.up.*", "--require", "zeros==0 in **.up.*, **.norm.*"],
         [f"{UP}: wanted sparsity>50%, found 50%", f"{UP}: wanted zeros==0, found 4096"]),
        (["--require", "torch-cutlass"],
         [f"{DOWN}: not eligible for torch-cutlass: is not 2:4 along the input dimension"]),
        (["--require", f"tensorrt in {UP}"],
         [f"{UP}: not eligible for tensorrt: no gain: 64 outputs, wanted more than 256"]),
        (["--require", "zero_blocks_1x1>=5000 in **.up.*", "--block", "1x1"],
         [f"{UP}: wanted zero_blocks_1x1>=5000, found 4096"]),
    ],
)  # fmt: skip
def test_exits_1_after_the_table_and_names_each_tensor_that_fails(
    checkpoint: Path, words: list[str], lines: list[str]
) -> None:
    said = run("inspect", checkpoint, "-q", *words)
    assert said.code == 1
    assert said.err.splitlines() == [f"sparseprune: {line}" for line in lines]
    others = words[2:] if words[2:3] != ["--require"] else []
    runtimes = [name for name in ("torch-cutlass", "tensorrt") if name in words[1]]
    told = ["--for", ",".join(runtimes)] if runtimes else []
    assert said.out == run("inspect", checkpoint, "-q", *others, *told).out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--require", "4:2"], '--require "4:2": wanted N:M with N less than M'),
        (["--require", "sparsty>=0.5"], 'there is no field "sparsty"; did you mean "sparsity"?'),
        (
            ["--require", "2:4 in h.*.upp.weight"],
            f'no tensor matches "h.*.upp.weight"; the nearest names are {UP}',
        ),
        (["--require", "zero_blocks_7x7==0"], 'there is no field "zero_blocks_7x7"'),
        (["--require", "torch-cutlas"], 'did you mean "torch-cutlass"?'),
        (["--for", "torch-cutlas"], '--for torch-cutlas: no runtime is called "torch-cutlas"; did you mean'),
        (["--require", "2:4", "--match", "**.norm.*"], "there is no tensor it can be asked of"),
    ],
)
def test_exits_2_where_a_condition_has_no_meaning_or_no_tensor(
    checkpoint: Path, words: list[str], text: str
) -> None:
    said = refused("inspect", checkpoint, "-q", *words)
    assert text in said.err
    assert len(said.err.splitlines()) == 1


def test_json_on_stdout_is_whole_where_a_requirement_fails(checkpoint: Path) -> None:
    said = run("inspect", checkpoint, "-q", "--json", "--require", "torch-cutlass")
    assert said.code == 1
    tensors = {one["name"]: one for one in json.loads(said.out)["tensors"]}
    assert tensors[UP]["runtimes"] == {"torch-cutlass": {"eligible": True, "reason": None}}
    assert tensors[NORM]["runtimes"] == {"torch-cutlass": {"eligible": False, "reason": "1-D, wanted 2-D"}}


def test_for_tells_of_each_runtime_which_tensors_it_can_use(checkpoint: Path) -> None:
    said = silent("inspect", checkpoint, "--for", "torch-cutlass,torch-cusparselt,tensorrt,asp")
    for text in (
        "torch-cutlass: 1 of 2 matrices",
        "compute capability 8.x",
        f"{DOWN}: is not 2:4 along the input dimension",
        "no gain: 64 outputs, wanted more than 256",
    ):
        assert text in said.out


@pytest.mark.parametrize("seed", range(4))
def test_what_is_told_to_be_eligible_is_what_torch_packs_rightly(tmp_path: Path, seed: int) -> None:
    """From the bytes of a file to the verdict, in the dtypes that are packed on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, dtype in (
        ("half", torch.float16),
        ("brain", torch.bfloat16),
        ("int", torch.int8),
        ("full", torch.float32),
    ):
        for broken in (0, 1):
            kept = 1 if dtype == torch.float32 else 2
            dense = two_of_four(32, 256, dtype=torch.float32)
            if kept == 1:
                dense[:, ::2] *= dense[:, 1::2] == 0
            for _ in range(broken):
                group = 4 * int(torch.randint(64, (1,), generator=generator))
                dense[int(torch.randint(32, (1,), generator=generator)), group : group + 4] = 1
            tensors[f"{name}.{broken}"] = dense.to(dtype)
    path = tmp_path / "m.safetensors"
    save_file(tensors, path)
    document = json.loads(run("inspect", path, "-q", "--json", "--for", "torch-cutlass").out)
    conversions: Any = _conversions
    for one in document["tensors"]:
        dense = tensors[one["name"]]
        packed = conversions.sparse_semi_structured_from_dense_cutlass(dense)
        back = conversions.sparse_semi_structured_to_dense_cutlass(*packed)
        assert one["runtimes"]["torch-cutlass"]["eligible"] == torch.equal(back, dense)
        assert one["runtimes"]["torch-cutlass"]["eligible"] == one["name"].endswith("0")


def test_a_convolution_is_looked_at_along_its_input_channels(tmp_path: Path) -> None:
    along_channels = two_of_four(16, 3, 3, 32).movedim(-1, 1).contiguous()
    along_pixels = two_of_four(16, 32, 2, 4)
    path = tmp_path / "m.safetensors"
    save_file({"good.weight": along_channels, "bad.weight": along_pixels}, path)
    said = run("inspect", path, "-q", "--require", "asp")
    assert said.code == 1
    reason = "is not 2:4 along the input dimension, but along dimension 3"
    assert said.err == f"sparseprune: bad.weight: not eligible for asp: {reason}\n"


def test_odd_names_stay_on_their_line(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"[red]x\ny": torch.ones((4, 4))}, path)
    said = run("inspect", path, "-q", "--require", "2:4")
    assert said.code == 1
    assert said.err == "sparseprune: [red]x\\ny: wanted 2:4, satisfies none\n"
