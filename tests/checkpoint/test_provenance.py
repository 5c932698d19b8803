"""Provenance: which report and spec belong to masks, and which do not."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparseprune.checkpoint import Provenance, open_masks
from sparseprune.checkpoint.masks import provenance_of
from sparseprune.errors import CheckpointError
from tests.commands import ok
from tests.samples import TWO_OF_FOUR, mlp_tensors, write_shards, write_spec

MATRICES = {name for name in mlp_tensors() if name.endswith("weight")}
REPORT = {"schema": "sparseprune.report.v1", "tensors": [{"name": "a"}]}


def found(path: Path) -> Provenance | None:
    return provenance_of(open_masks(path))


def write(folder: Path, name: str, report: Any = REPORT, masks: str = "masks") -> Path:
    save_file({"a": torch.ones(3, dtype=torch.bool)}, folder / f"{masks}.safetensors")
    (folder / name).write_text(json.dumps(report))
    return folder / f"{masks}.safetensors"


def test_the_output_of_a_directory_tells_tensors_variables_and_spec(tmp_path: Path) -> None:
    ckpt = write_shards(tmp_path / "ckpt", {"a.safetensors": {}, "b.safetensors": mlp_tensors()})
    text = "[vars]\nkeep = 2\n" + TWO_OF_FOUR.replace("nnz = 2", 'nnz = "keep"')
    text = "version = 1\n" + text.replace("version = 1\n", "")
    spec = write_spec(tmp_path, text)
    ok("apply", ckpt, spec, "--set", "keep=1", "-o", tmp_path / "out")
    ok("mask", ckpt, spec, "-o", tmp_path / "alone")
    for path in (tmp_path / "out", tmp_path / "out" / "sparseprune"):
        origin = found(path)
        assert origin is not None
        assert origin.report == tmp_path / "out" / "sparseprune" / "report.json"
        assert origin.tensors == MATRICES
        assert origin.overrides == {"keep": "1"}
        assert origin.spec == (tmp_path / "out" / "sparseprune" / "spec.toml").read_bytes()
    alone = found(tmp_path / "alone")
    assert alone is not None
    assert (alone.overrides, alone.spec) == ({}, text.encode())


def test_the_output_of_a_file_tells_tensors(tmp_path: Path) -> None:
    save_file(mlp_tensors(), tmp_path / "m.safetensors")
    spec = write_spec(tmp_path, TWO_OF_FOUR)
    ok("apply", tmp_path / "m.safetensors", spec)
    ok("mask", tmp_path / "m.safetensors", spec)
    for masks, report in {
        "m.pruned": "m.pruned.report",
        "m.pruned.masks": "m.pruned.report",
        "m.masks": "m.masks.report",
    }.items():
        origin = found(tmp_path / f"{masks}.safetensors")
        assert origin == Provenance(tmp_path / f"{report}.json", frozenset(MATRICES))


def test_masks_of_others_have_none(tmp_path: Path) -> None:
    write(tmp_path, "other.json")
    assert found(tmp_path) is None


@pytest.mark.parametrize(
    "report",
    [
        {},
        {"schema": "other.v1", "tensors": [{"name": "a"}]},
        {"schema": "sparseprune.report.v1", "tensors": 3},
        {"schema": "sparseprune.report.v1", "tensors": [{"name": 3}]},
        {"schema": "sparseprune.report.v1", "tensors": ["a"]},
    ],
)
def test_a_report_that_is_not_ours_vouches_for_nothing(tmp_path: Path, report: Any) -> None:
    write(tmp_path, "report.json", report)
    assert found(tmp_path) is None


def test_the_report_of_a_folder_is_not_that_of_a_file_of_another_name(tmp_path: Path) -> None:
    assert found(write(tmp_path, "report.json", masks="mine")) is None
    assert found(write(tmp_path, "report.json", masks="masks-00001-of-00002")) is not None


def test_a_spec_without_end_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, "report.json")
    (tmp_path / "spec.toml").touch()
    os.truncate(tmp_path / "spec.toml", 100_000_001)
    with pytest.raises(CheckpointError, match=r"spec\.toml: larger than 100.00 MB"):
        found(tmp_path)
    (tmp_path / "spec.toml").unlink()
    os.mkfifo(tmp_path / "spec.toml")
    origin = found(tmp_path)
    assert origin is not None
    assert origin.spec is None


def test_a_report_that_is_no_json_is_told(tmp_path: Path) -> None:
    write(tmp_path, "report.json")
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"report\.json: cannot be read as JSON"):
        found(tmp_path)
