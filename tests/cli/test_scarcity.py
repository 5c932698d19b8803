"""Threads and memory that the system does not give: the work is done without, or ends with one clear line."""

import resource
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparseprune.checkpoint import threads
from sparseprune.errors import is_out_of_memory
from sparseprune.execution.tensor_io import TensorIO
from tests.commands import ok, python, run
from tests.faults import failing
from tests.limits import force, narrow
from tests.samples import CHANNELS, TWO_OF_FOUR, mlp_tensors, write_shards, write_spec

FULL = "sparseprune: out of memory; give a smaller --memory, or fewer --jobs"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(mlp_tensors(), tmp_path / "m.safetensors")
    write_spec(tmp_path, CHANNELS)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files in it but reports, and of none below."""
    files = (path for path in folder.iterdir() if path.is_file() and "report" not in path.name)
    return {path.name: path.read_bytes() for path in files}


def thread_limit(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """The system gives so many threads in all."""
    begun: list[threading.Thread] = []
    start = threading.Thread.start

    def scarce(thread: threading.Thread) -> None:
        if len(begun) == limit:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", scarce)


@pytest.mark.parametrize("limit", range(4))
@pytest.mark.parametrize("quiet", [True, False])
def test_a_run_needs_no_thread_but_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, limit: int, quiet: bool
) -> None:
    narrow(monkeypatch, 64, tile=64)
    words = ["apply", folder / "m.safetensors", folder / "spec.toml", "--jobs", 3, *(["-q"] if quiet else [])]
    ok(*words)
    whole = contents(folder)
    thread_limit(monkeypatch, limit)
    ok(*words, "--force")
    assert contents(folder) == whole
    out = folder / "m.pruned.safetensors"
    for reading in (["verify", out, folder / "spec.toml"], ["inspect", out], ["compare", out, out]):
        said = run(*reading)
        assert (said.code, "Traceback" in said.err) == (0, False), said.err


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_all_work_is_done_by_whatever_threads_there_are(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    thread_limit(monkeypatch, limit)
    todo = deque(range(20))
    done: list[int] = []

    def work() -> None:
        while todo:
            done.append(todo.popleft())

    threads.side_by_side(work, 3, todo.clear)
    assert sorted(done) == list(range(20))


def test_threads_are_told_to_stop_whatever_happens() -> None:
    told: list[str] = []
    threads.side_by_side(lambda: told.append("worked"), 2, lambda: told.append("stopped"))
    assert told == ["worked", "worked", "stopped"]


def because(error: Exception, cause: Exception) -> Exception:
    """The error as it is raised while another one is handled."""
    error.__context__ = cause
    return error


ERRORS: dict[str, Exception] = {
    "Python": MemoryError(),
    "numpy": MemoryError("Unable to allocate 3.00 GiB for an array with shape (3,)"),
    "torch": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    ),
    "CUDA": RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "an extension": SystemError(
        "<function _find_and_load at 0x7f> returned NULL without setting an exception"
    ),
    "another one": SystemError("error return without exception set"),
    "the system": OSError(12, "Cannot allocate memory"),
    "a library": ImportError("libtorch.so: failed to map segment from shared object"),
    "a library that says less": because(
        OSError("Could not find/load shared object file"),
        OSError("libllvmlite.so: failed to map segment from shared object"),
    ),
}


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize(
    ("way", "place"),
    [
        ("torch_in_memory", "sparseprune.execution.torch_tiles.Tile"),
        ("block_norms", "sparseprune.execution.tensor_io.TensorIO.load"),
        ("block_norms", "sparseprune.checkpoint.source.read_header"),
        ("block_norms", "sparseprune.api.pruning.make_plan"),
        ("block_norms", "sparseprune.checkpoint.StagedOutput.write_mask"),
    ],
)
def test_memory_that_is_not_there_is_told_with_what_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, way: str, place: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ERRORS[kind]

    force(monkeypatch, way)
    before = contents(folder)
    monkeypatch.setattr(place, fail)
    said = run("apply", folder / "m.safetensors", folder / "spec.toml", "-q")
    first, *kept = said.err.splitlines()
    assert (said.code, said.out, first) == (3, "", FULL)
    assert all("what is finished is kept in" in line for line in kept)
    assert contents(folder) == before


@pytest.mark.parametrize("megabytes", [60, 90, 100, 110, 120, 130, 150])
def test_a_process_that_may_take_little_memory_says_so_and_passes_no_check_for_failed(
    folder: Path, megabytes: int
) -> None:
    """Whatever loads when the limit is met: exit code 1 would say that the checkpoint is wrong."""
    words = ("verify", "m.safetensors", "--masks", "masks.safetensors", "-q")
    save_file(mlp_tensors(), folder / "m.safetensors")
    save_file({"0.up.weight": torch.ones(16, 8, dtype=torch.bool)}, folder / "masks.safetensors")
    limit = (megabytes << 20, megabytes << 20)
    take_little = partial(resource.setrlimit, resource.RLIMIT_AS, limit)
    done = python("-m", "sparseprune", *words, "--partial", cwd=folder, preexec_fn=take_little)
    assert (done.returncode, done.stdout) in ((0, ""), (3, "")), done.stderr
    assert done.stderr.splitlines() == [FULL] * (done.returncode == 3)


def test_a_checkpoint_may_have_more_shards_than_a_process_may_have_files(tmp_path: Path) -> None:
    shards = {f"{number}.safetensors": {f"{number}.up.weight": torch.ones(4, 8)} for number in range(60)}
    write_shards(tmp_path / "in", shards)
    write_spec(tmp_path, TWO_OF_FOUR)
    few_files = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (45, 45))
    for words in (
        "apply in spec.toml -o out",
        "verify out spec.toml",
        "inspect out",
        "reapply in out -o more",
    ):
        done = python("-m", "sparseprune", *words.split(), "-q", cwd=tmp_path, preexec_fn=few_files)
        assert (done.returncode, done.stderr) == (0, ""), words


def test_a_program_that_is_wrong_is_not_taken_for_a_lack_of_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(
        "sparseprune.execution.tensor_io.TensorIO.load",
        failing(RuntimeError, "mat1 and mat2 shapes cannot be multiplied"),
    )
    with pytest.raises(RuntimeError, match="mat1"):
        run("apply", folder / "m.safetensors", folder / "spec.toml", "-q")
    assert not is_out_of_memory(None)
    assert not is_out_of_memory(OSError("Could not find/load shared object file"))
    assert not is_out_of_memory(OSError(5, "Input/output error"))


@pytest.mark.parametrize("command", ["apply", "mask"])
def test_a_disk_that_fails_beside_the_work_ends_the_run_with_its_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The thread that syncs fails while a worker waits: the worker is not waited for until it is done."""
    failed, begun = threading.Event(), threading.Event()

    def flush(_: object) -> None:
        begun.wait(10)
        failed.set()
        raise OSError(5, "Input/output error", "disk")

    def wait(*arguments: object) -> object:
        begun.set()
        assert failed.wait(10)
        return usual(*arguments)

    usual: Callable[..., object] = TensorIO.load
    monkeypatch.setattr("sparseprune.checkpoint.StagedOutput.flush", flush)
    monkeypatch.setattr(TensorIO, "load", wait)
    said = run(command, folder / "m.safetensors", folder / "spec.toml", "-q")
    assert (said.code, said.out, said.err) == (3, "", "sparseprune: disk: Input/output error\n")


def test_bars_and_logs_that_fail_stop_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr("sparseprune.cli.progress.Latest.read", failing(MemoryError))
    monkeypatch.setattr("sparseprune.cli.progress._TICK", 0.0001)
    save_file({"0.a.weight": torch.ones(512, 512)}, folder / "m.safetensors")
    ok("apply", folder / "m.safetensors", write_spec(folder, TWO_OF_FOUR))
