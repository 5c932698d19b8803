"""The bytes of an output depend on the input and the spec alone: not on jobs, memory, cuts, or the run."""

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparseprune.execution.passes import Chunk
from sparseprune.execution.reconstruct import RebuildMatrices
from sparseprune.execution.regions import regions_at
from sparseprune.execution.tensor_io import TensorIO
from tests.commands import ok, run
from tests.limits import narrow
from tests.samples import CHANNELS, TWO_OF_FOUR, mlp_tensors, write_shards, write_spec

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
STACK = """
[scope.stack]
tensors = "{layer}.experts"
block = [1, 1, 1]
shape = [1, 1, 4]
nnz = 2
"""
METHODS = {
    name: f'[reconstruct]\nfile = "stats.safetensors"\nmethod = "{name}"\n' for name in ("admm", "refit")
}
SWEEP = [
    *((1, "300MiB", 8), (2, "1GiB", 8), (5, "300MiB", 8)),
    *((1, "1GiB", 1 << 20), (2, "300MiB", 1 << 20), (5, "1GiB", 1 << 20)),
]


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
            ok(*words, "-o", out, "--jobs", jobs, "--memory", memory, "-q")
        digests.add(digest(out))
    return digests


@pytest.mark.usefixtures("untraced")
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
    ok("mask", folder / "in", spec, "-o", masks, "--mask-format", form, "-q")
    assert len(all_digests(folder, monkeypatch, "reapply", folder / "in", masks)) == 1


@pytest.fixture
def matrices(tmp_path: Path) -> Path:
    """Matrices in two shards, a small one first, and a stack; large enough for torch's threads to share."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    shapes = {"0.a.weight": (64, 32), "0.b.weight": (96, 64), "1.a.weight": (64, 96), "1.b.weight": (64, 64)}
    tensors = {name: draw(*shape) for name, shape in (shapes | {"2.experts": (3, 64, 64)}).items()}
    stats = {}
    for name, tensor in tensors.items():
        rows = draw(*tensor.shape[:-2], 160, tensor.shape[-1]).cumsum(-1)
        stats[name] = (rows.mT @ rows).contiguous()
    shards: dict[str, dict[str, torch.Tensor]] = {"model-1.safetensors": {}, "model-2.safetensors": {}}
    for name, tensor in tensors.items():
        shards["model-1.safetensors" if name[0] == "0" else "model-2.safetensors"][name] = tensor
    write_shards(tmp_path / "in", shards)
    save_file(stats, tmp_path / "stats.safetensors")
    return tmp_path


@pytest.mark.parametrize("method", ["admm", "refit"])
def test_rebuilt_weights_do_not_depend_on_jobs_nor_on_torchs_threads_nor_on_an_interruption(
    matrices: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    words = (
        "apply",
        matrices / "in",
        write_spec(matrices, TWO_OF_FOUR + STACK + METHODS[method]),
        "-q",
        "-o",
    )
    usual = torch.get_num_threads()
    try:
        for jobs, threads in ((1, 4), (2, 1), (3, 3)):
            torch.set_num_threads(threads)  # as OMP_NUM_THREADS or the cores of a machine have it
            ok(*words, matrices / str(jobs), "--jobs", jobs)
        with monkeypatch.context() as patch:
            patch.setattr(RebuildMatrices, "work", interrupted_after(3))
            assert run(*words, matrices / "continued", "--jobs", 1).code == 130
        ok(*words, matrices / "continued", "--jobs", 2)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(usual)
    outputs = [matrices / name for name in ("1", "2", "3", "continued")]
    assert len({digest(out) for out in outputs}) == 1


def interrupted_after(count: int) -> Callable[[Any], Any]:
    """The work of a piece; Ctrl-C comes when so many are done."""
    usual = RebuildMatrices.work
    done: list[Any] = []

    def work(*arguments: Any) -> Any:
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(arguments)
        return usual(*arguments)

    return work


@pytest.mark.parametrize(("spec", "module"), [("soft", "torch_tiles"), ("rebuilt", "reconstruct")])
def test_torch_takes_one_thread_wherever_it_works(
    matrices: Path, monkeypatch: pytest.MonkeyPatch, spec: str, module: str
) -> None:
    import importlib

    place = importlib.import_module(f"sparseprune.execution.{module}")
    threads: set[tuple[bool, int]] = set()

    def watched(*arguments: Any) -> Any:
        threads.add((threading.current_thread() is threading.main_thread(), torch.get_num_threads()))
        return usual(*arguments)

    usual = place.Tile
    monkeypatch.setattr(place, "Tile", watched)
    path = write_spec(
        matrices, SPECS[spec] + "\neps = 1e-9\n" if spec in SPECS else TWO_OF_FOUR + METHODS["admm"]
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        ok("apply", matrices / "in", path, "-o", matrices / "out", "--jobs", 1, "-q")
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert threads == {(False, 1)}


def test_the_largest_matrix_is_begun_first_and_the_report_keeps_the_order_of_the_checkpoint(
    matrices: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []

    def watched(rebuild: RebuildMatrices, chunk: Chunk, io: TensorIO) -> Any:
        regions = regions_at(rebuild.task.instance.scope, chunk.about[0]).values()
        begun.append(sum(one.extent[-2] * one.extent[-1] ** 2 for one in regions))
        return usual(rebuild, chunk, io)

    usual = RebuildMatrices.work
    monkeypatch.setattr(RebuildMatrices, "work", watched)
    spec = write_spec(matrices, TWO_OF_FOUR + STACK + METHODS["refit"])
    said = run("apply", matrices / "in", spec, "-o", matrices / "out", "--jobs", 1, "-q", "--json")
    assert len(begun) == 7
    assert begun == sorted(begun, reverse=True)
    names = [one["name"] for one in json.loads(said.out)["tensors"]]
    assert names == sorted(names)


@pytest.mark.parametrize("method", ["admm", "refit"])
def test_matrices_of_a_stack_do_not_depend_on_memory_nor_on_each_other(
    matrices: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    spec = write_spec(matrices, "version = 1\n" + STACK + METHODS[method])
    found = []
    for memory in (1 << 20, 1 << 28):
        with monkeypatch.context() as patch:
            narrow(patch, 1 << 16, memory=memory)
            out = matrices / str(memory)
            ok("apply", matrices / "in", spec, "-o", out, "-q")
        found.append(digest(out))
    assert len(set(found)) == 1


def test_an_element_more_would_be_noticed(folder: Path) -> None:
    run("apply", folder / "in", write_spec(folder, TWO_OF_FOUR), "-o", folder / "a", "-q")
    run("apply", folder / "in", write_spec(folder, TWO_OF_FOUR), "-o", folder / "b", "-q")
    assert digest(folder / "a") == digest(folder / "b")
    save_file({"one": torch.ones(1)}, folder / "b" / "more.safetensors")
    assert digest(folder / "a") != digest(folder / "b")
