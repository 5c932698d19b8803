"""`inspect`: zeros and patterns of any checkpoint, as a table and as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import jsonschema
import pytest
import torch
from safetensors.torch import save_file

from tests.samples import mlp_tensors, run, schema

if TYPE_CHECKING:
    from pathlib import Path


def patterns_by_hand(tensor: torch.Tensor) -> list[str]:
    """Plain loops over every group of M neighbours along the last dimension."""
    found = []
    for kept, group in ((1, 2), (2, 4), (4, 8)):
        if tensor.ndim < 2 or not tensor.numel() or tensor.shape[-1] % group:
            continue
        values = tensor.to(torch.float64).flatten().tolist()
        counts = [sum(value != 0 for value in values[at : at + group]) for at in range(0, len(values), group)]
        if max(counts) <= kept:
            found.append(f"{kept}:{group}")
    return found


def sparse(shape: tuple[int, ...], pattern: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    numel = torch.Size(shape).numel()
    return torch.tensor((pattern * (numel // len(pattern) + 1))[:numel]).view(shape).to(dtype)


SAMPLES = {
    "one of two": sparse((2, 8), [0, 3]),
    "two of four": sparse((2, 8), [1, 2, 0, 0]),
    "four of eight": sparse((2, 8), [1, 2, 3, 4, 0, 0, 0, 0]),
    "one too many": torch.cat([sparse((2, 8), [1, 2, 0, 0]), torch.tensor([[0, 0, 1, 0, 0, 1, 1, 1.0]])]),
    "narrow": sparse((4, 6), [1, 0]),
    "three dimensions": sparse((2, 3, 8), [0, 1, 1, 0]),
    "all zero": torch.zeros(2, 8),
    "vector": torch.zeros(8),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 8),
    "negative zero": torch.full((2, 8), -0.0, dtype=torch.bfloat16),
    "NaN": torch.full((2, 8), float("nan")),
    "float8": sparse((2, 8), [0, 0, 2, 1], torch.float8_e4m3fn),
    "int64": sparse((2, 8), [0, 2**62, 0, -5], torch.int64),
    "uint8": sparse((2, 8), [0, 255], torch.uint8),
    "bool": sparse((2, 8), [0, 1], torch.bool),
    "complex": torch.tensor([[0j, 1j, -0.0 + 0j, 0j]]),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_file(SAMPLES, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def test_json_agrees_with_plain_loops(checkpoint: Path) -> None:
    document = json.loads(run("inspect", checkpoint, "--json").out)
    jsonschema.validate(document, schema("inspect"))
    facts = {entry["name"]: entry for entry in document["tensors"]}
    assert facts.keys() == SAMPLES.keys()
    for name, tensor in SAMPLES.items():
        fact = facts[name]
        zeros = int((tensor.to(torch.complex128 if tensor.is_complex() else torch.float64) == 0).sum())
        assert (fact["shape"], fact["numel"], fact["zeros"]) == (list(tensor.shape), tensor.numel(), zeros)
        assert fact["sparsity"] == (zeros / tensor.numel() if tensor.numel() else 0)
        if not tensor.is_complex():
            assert fact["patterns"] == patterns_by_hand(tensor), name
    assert facts["complex"]["patterns"] == ["1:2", "2:4"]
    totals = document["totals"]
    assert totals["tensors"] == len(SAMPLES)
    assert totals["pruned"] == sum(entry["zeros"] for entry in facts.values())
    assert totals["patterns"] == {
        pattern: sum(pattern in entry["patterns"] for entry in facts.values())
        for pattern in ("1:2", "2:4", "4:8")
    }


def test_facts_do_not_depend_on_jobs_and_slabs(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("inspect", checkpoint, "--json", "--jobs", 1).out
    monkeypatch.setattr("sparseprune.report.inspection._SLAB", 8)
    assert run("inspect", checkpoint, "--json", "--jobs", 4).out == whole


def test_elements_of_less_than_a_byte_are_not_counted(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F4", "shape": [2, 8], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    (entry,) = json.loads(run("inspect", tmp_path / "m.safetensors", "--json").out)["tensors"]
    assert (entry["zeros"], entry["sparsity"], entry["patterns"]) == (None, None, [])
    assert "?" in run("inspect", tmp_path / "m.safetensors").out


def test_table_has_a_line_for_each_tensor_and_the_total(tmp_path: Path) -> None:
    tensors = mlp_tensors(1)
    tensors["0.up.weight"][:, ::2] = 0
    save_file(tensors, tmp_path / "m.safetensors")
    said = run("inspect", tmp_path / "m.safetensors")
    lines = [line.split() for line in said.out.splitlines()]
    assert lines == [
        ["tensor", "dtype", "shape", "zeros", "sparsity", "patterns"],
        ["0.down.weight", "F32", "8x16", "0", "0.00%"],
        ["0.up.bias", "F32", "16", "0", "0.00%"],
        ["0.up.weight", "F32", "16x8", "64", "50.00%", "1:2", "2:4", "4:8"],
        ["norm", "F32", "8", "0", "0.00%"],
        ["total", "of", "4", "64", "22.86%"],
        "satisfied: 1:2 by 1 tensor, 2:4 by 1 tensor, 4:8 by 1 tensor".split(),
    ]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_table_fits_the_width_that_it_is_given(checkpoint: Path, width: int) -> None:
    environment = os.environ | {"COLUMNS": str(width)}
    done = subprocess.run(
        [sys.executable, "-m", "sparseprune", "inspect", str(checkpoint)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert max(map(len, done.stdout.splitlines())) <= width
    assert "\x1b" not in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_neither_torch_nor_numba_is_loaded(checkpoint: Path, words: list[str]) -> None:
    code = (
        "import sys; from sparseprune.cli import main; sys.argv = ['sparseprune', *sys.argv[1:]]\n"
        "try: main()\n"
        "except SystemExit as stop: sys.exit(stop.code or not {'torch', 'numba'}.isdisjoint(sys.modules))"
    )
    command = [sys.executable, "-c", code, "inspect", str(checkpoint), *words]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    said = run("inspect", tmp_path / "absent.safetensors")
    assert (said.code, said.out) == (2, "")
    assert said.err == f"sparseprune: {tmp_path / 'absent.safetensors'}: no such file\n"
