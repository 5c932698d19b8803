"""The bytes of an output depend on the input and the spec alone: not on jobs, memory, cuts, or the run."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from tests.limits import narrow
from tests.samples import CHANNELS, TWO_OF_FOUR, mlp_tensors, run, write_shards, write_spec

if TYPE_CHECKING:
    from pathlib import Path

GLOBAL = TWO_OF_FOUR.replace("[1, 4]", "[-1, -1]").replace("nnz = 2", "") + (
    '[scope_coupling.model]\nscopes = ["proj"]\nacross = "all"\nsparsity = 0.5\n'
)
SPECS = {
    "2:4": TWO_OF_FOUR,
    "channels": CHANNELS,
    "global": GLOBAL,
    "columns": TWO_OF_FOUR.replace("[1, 4]", "[4, 1]"),
    "random": TWO_OF_FOUR + 'score = { kind = "random", seed = 3 }\n',
    "soft": TWO_OF_FOUR.replace("[1, 4]", "[-1, -1]").replace("nnz = 2", 'nnz = 40\nmode = "soft"'),
    "rescued": CHANNELS + 'score = { nonfinite = "prune" }\n',
}
SWEEP = [(jobs, memory, slab) for jobs in (1, 2, 5) for memory in ("300MiB", "1GiB") for slab in (8, 1 << 20)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = mlp_tensors(3, torch.bfloat16)
    first = {name: tensor for name, tensor in tensors.items() if not name.startswith("2")}
    rest = {name: tensor for name, tensor in tensors.items() if name.startswith("2")}
    write_shards(tmp_path / "in", {"model-1.safetensors": first, "model-2.safetensors": rest})
    return tmp_path


def digest(out: Path) -> str:
    """One number for all files of an output; the report without its clock and its place."""
    found = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.name == "report.json":
                report = json.loads(data)
                for key in ("seconds", "output", "input"):
                    del report[key]
                for tensor in report["tensors"]:  # sums of pieces, whose last bits are their order's
                    tensor["energy_kept"] = tensor["energy_kept"] and round(tensor["energy_kept"], 9)
                data = json.dumps(report, sort_keys=True).encode()
            found.update(f"{path.relative_to(out)} {len(data)}\n".encode() + data)
    return found.hexdigest()


def all_digests(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: object) -> set[str]:
    digests = set()
    for number, (jobs, memory, slab) in enumerate([*SWEEP, SWEEP[0]]):
        with monkeypatch.context() as patch:
            narrow(patch, slab, tile=max(16, slab))
            out = folder / f"out{number}"
            said = run(*words, "-o", out, "--jobs", jobs, "--memory", memory, "-q")
            assert said.code == 0, said.err
        digests.add(digest(out))
    return digests


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("command", ["apply", "mask"])
def test_every_number_of_jobs_memory_and_cut_gives_one_output(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, spec: str
) -> None:
    path = write_spec(folder, SPECS[spec])
    options = ("--mask-format", "packed") if spec == "global" else ()
    assert len(all_digests(folder, monkeypatch, command, folder / "in", path, *options)) == 1


@pytest.mark.parametrize("form", ["bool", "packed"])
def test_reapplying_gives_one_output_too(folder: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    spec = write_spec(folder, GLOBAL)
    masks = folder / "masks"
    assert run("mask", folder / "in", spec, "-o", masks, "--mask-format", form, "-q").code == 0
    assert len(all_digests(folder, monkeypatch, "reapply", folder / "in", masks)) == 1


def test_an_element_more_would_be_noticed(folder: Path) -> None:
    run("apply", folder / "in", write_spec(folder, TWO_OF_FOUR), "-o", folder / "a", "-q")
    run("apply", folder / "in", write_spec(folder, TWO_OF_FOUR), "-o", folder / "b", "-q")
    assert digest(folder / "a") == digest(folder / "b")
    save_file({"one": torch.ones(1)}, folder / "b" / "more.safetensors")
    assert digest(folder / "a") != digest(folder / "b")
