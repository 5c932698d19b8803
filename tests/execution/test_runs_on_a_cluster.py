"""Runs on two machines that share a folder: bytes and JSON of one, whatever is killed meanwhile."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from sparseprune import __version__
from sparseprune.checkpoint import StagedOutput
from sparseprune.errors import MachineError
from sparseprune.execution.cluster import Cluster, Node
from sparseprune.execution.machines import refuse_unlike
from sparseprune.execution.spreading import look
from tests.cli.removal import CASES, write
from tests.commands import ok, refused, run
from tests.execution.clusters import Machines, machines
from tests.samples import save_statistics, write_shards, write_spec

pytest.importorskip("ray")

GLOBAL = """
version = 1
scope.each = { tensors = "{layer}.{name}.weight", block = [1, 1], shape = [-1, -1] }
[scope_coupling.all]
scopes = ["each"]
across = "all"
sparsity = 0.5
"""
CHANNELS = """
version = 1
[block.up]
tensors = "{layer}.up.weight"
shape = [1, -1]
[block.down]
tensors = "{layer}.down.weight"
shape = [-1, 1]
[block_coupling.channel]
blocks = ["up", "down"]
orders = [[0, 1], [1, 0]]
[scope.mlp]
block = "channel"
shape = [-1, -1]
sparsity = 0.25
"""
TWO_OF_FOUR = """
version = 1
scope.proj = { tensors = "{layer}.{name}.weight", block = [1, 1], shape = [1, 4], nnz = 2 }
"""
ADMM = '[reconstruct]\nfile = "stats.safetensors"\nmethod = "admm"\n'
SOFT = CHANNELS.replace("sparsity = 0.25", 'mode = "soft"\nthreshold = 0.5')
SPECS = {
    "2:4": TWO_OF_FOUR,
    "channels over shards": CHANNELS,
    "global": GLOBAL,
    "soft channels over shards": SOFT,
    "admm": TWO_OF_FOUR + ADMM,
    "admm of channels over shards": CHANNELS + ADMM,
}


@pytest.fixture(scope="module")
def two() -> Iterator[Machines]:
    with machines(2) as found:
        yield found


@pytest.fixture
def joined(two: Machines) -> Iterator[Cluster]:
    with Cluster(two.address) as found:
        yield found


def write_decoder(folder: Path, width: int = 32) -> Path:
    """Two layers, each matrix in a shard of its own, beside tensors that no rule reaches; with statistics."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    shards: dict[str, dict[str, torch.Tensor]] = {}
    moments, sizes = {}, {"up": (2 * width, width), "down": (width, 2 * width)}
    for number, (layer, name) in enumerate((layer, name) for layer in (0, 1) for name in sizes):
        shards[f"model-{number + 1:05}-of-00004.safetensors"] = {
            f"{layer}.{name}.weight": draw(*sizes[name]),
            f"{layer}.{name}.norm": draw(width),
        }
        inputs = draw(4 * width, sizes[name][1])
        moments[f"{layer}.{name}.weight"] = inputs.T @ inputs
    save_statistics(folder.parent / "stats.safetensors", "hessian", moments)
    return write_shards(folder, shards)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of an output but what tells how long the run took."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "report.json"
    }


def without_seconds(text: str) -> Any:
    told = json.loads(text)
    told.pop("seconds", None)
    told.pop("output", None)
    return told


def test_every_command_says_and_writes_what_it_does_here(joined: Cluster, tmp_path: Path) -> None:
    dense = write_decoder(tmp_path / "dense")
    on = ("--on", joined.address)
    for name, text in SPECS.items():
        spec = write_spec(tmp_path, text)
        words = ("apply", dense, spec, "--json", "-q", "-o")
        here, there = (tmp_path / f"{name} {place}" for place in ("here", "there"))
        assert without_seconds(ok(*words, here).out) == without_seconds(ok(*words, there, *on).out), name
        assert contents(here) == contents(there), name
    pruned = tmp_path / "channels over shards here"
    spec = write_spec(tmp_path, CHANNELS)
    writing: list[tuple[object, ...]] = [
        ("mask", dense, spec, "--json", "-q", "--mask-format", "bool"),
        ("reapply", dense, pruned, "--json", "-q"),
    ]
    for written in writing:
        here, there = (tmp_path / f"{written[0]} {place}" for place in ("here", "there"))
        assert without_seconds(ok(*written, "-o", here).out) == without_seconds(
            ok(*written, "-o", there, *on).out
        )
        assert contents(here) == contents(there), written
    reading: list[tuple[object, ...]] = [
        ("verify", pruned, "--json"),
        ("verify", pruned, "--masks", pruned, "--json"),
        ("verify", pruned, write_spec(tmp_path, TWO_OF_FOUR), "--json"),
        ("inspect", pruned, "--json"),
        ("compare", dense, pruned, "--json", "--stats", tmp_path / "stats.safetensors"),
    ]
    for read in reading:
        here_said, there_said = run(*read), run(*read, *on)
        assert (there_said.code, there_said.out) == (here_said.code, here_said.out), read
        assert there_said.err.replace("sparseprune: on 2 machines with 2 CPUs\n", "") == here_said.err


@pytest.mark.parametrize("name", ["channels", "experts"])
def test_what_is_removed_is_what_one_machine_removes(joined: Cluster, name: str, tmp_path: Path) -> None:
    case, on = CASES[name], ("--on", joined.address)
    dense = write(tmp_path / "dense", case.tensors(), case.config, shards=3)
    ok("mask", dense, case.spec, *case.options, "-o", tmp_path / "masks")
    for number, what in enumerate([(case.spec, *case.options), ("--masks", tmp_path / "masks")]):
        here, there = (tmp_path / f"{number} {place}" for place in ("here", "there"))
        words = ("remove", dense, *what, "--json", "-q", "-o")
        assert without_seconds(ok(*words, here).out) == without_seconds(ok(*words, there, *on).out)
        assert contents(here) == contents(there)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, bytes]]:
    """A folder, the spec by which its decoder takes some seconds, and what that gives here."""
    folder = tmp_path_factory.mktemp("slow")
    dense, spec = write_decoder(folder / "dense", 640), write_spec(folder, TWO_OF_FOUR + ADMM)
    ok("apply", dense, spec, "-q", "-o", folder / "here")
    return folder, spec, contents(folder / "here")


def writers() -> list[int]:
    """The processes of this machine that write files of an output."""
    found = []
    for one in Path("/proc").iterdir():
        if one.name.isdecimal():
            try:
                if (one / "cmdline").read_bytes().startswith(b"ray::write_file"):
                    found.append(int(one.name))
            except OSError:
                continue
    return found


@contextmanager
def once_at_work(do: Callable[[int], None]) -> Iterator[None]:
    """Do something, once, when a process has begun to write a file, whose number it gets."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            found = writers()
            if found:
                time.sleep(0.2)
                do(found[0])
                done.set()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
        assert done.is_set(), "nothing was at work"
    finally:
        done.set()
        thread.join()


def test_a_worker_that_is_killed_changes_nothing(
    joined: Cluster, slow: tuple[Path, Path, dict[str, bytes]], tmp_path: Path
) -> None:
    folder, spec, wanted = slow
    with once_at_work(lambda pid: os.kill(pid, signal.SIGKILL)):
        ok("apply", folder / "dense", spec, "-q", "-o", tmp_path / "out", "--on", joined.address)
    assert contents(tmp_path / "out") == wanted


def test_a_machine_that_is_lost_changes_nothing(
    two: Machines, joined: Cluster, slow: tuple[Path, Path, dict[str, bytes]], tmp_path: Path
) -> None:
    folder, spec, wanted = slow
    try:
        with once_at_work(lambda _: two.kill(two.nodes[0])):
            ok("apply", folder / "dense", spec, "-q", "-o", tmp_path / "out", "--on", joined.address)
    finally:
        two.add()
    assert contents(tmp_path / "out") == wanted


def begun(*words: object) -> "subprocess.Popen[str]":
    """`sparseprune WORDS` in a process of its own."""
    command = [sys.executable, "-m", "sparseprune", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_a_note(output: Path) -> None:
    """Until the journal of an output has a note beside its head."""
    hidden = f".{output.name}.sparseprune-partial"
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for journal in output.parent.glob(f"{hidden}*/journal"):
            if journal.read_bytes().count(b"\n") > 1:
                return
        time.sleep(0.02)
    raise AssertionError([path.name for path in output.parent.iterdir()])


def test_the_next_run_continues_what_a_killed_driver_left(
    two: Machines, slow: tuple[Path, Path, dict[str, bytes]], tmp_path: Path
) -> None:
    folder, spec, wanted = slow
    words = ("apply", folder / "dense", spec, "-o", tmp_path / "out")
    process = begun(*words, "--on", two.address)
    wait_for_a_note(tmp_path / "out")
    process.kill()
    process.communicate()
    assert "an unfinished run is continued" in ok(*words).err
    assert contents(tmp_path / "out") == wanted


def test_an_interrupt_ends_all_machines_and_the_next_run_continues(
    two: Machines, slow: tuple[Path, Path, dict[str, bytes]], tmp_path: Path
) -> None:
    folder, spec, wanted = slow
    words = ("apply", folder / "dense", spec, "-o", tmp_path / "out", "--on", two.address)
    process = begun(*words)
    wait_for_a_note(tmp_path / "out")
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, time.monotonic() - began < 5) == (130, True)
    assert "sparseprune: interrupted: there is no output; run the same command again to continue" in told
    end = time.monotonic() + 10
    while writers() and time.monotonic() < end:
        time.sleep(0.05)
    assert not writers()
    said = ok(*words).err
    assert "on 2 machines with 2 CPUs" in said
    assert "an unfinished run is continued" in said
    assert contents(tmp_path / "out") == wanted


def test_a_folder_that_a_machine_does_not_see_is_refused(
    joined: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, spec = write_decoder(tmp_path / "dense"), write_spec(tmp_path, TWO_OF_FOUR)
    usual = StagedOutput.portion

    def elsewhere(output: StagedOutput, files: Any) -> Any:
        """As a machine has it where the folder is its own: the token is not there."""
        return replace(
            cast("Any", usual(output, files)), token=str(output.partial_path / "of-another-machine")
        )

    monkeypatch.setattr(StagedOutput, "portion", elsewhere)
    said = run("apply", dense, spec, "-o", tmp_path / "out", "--on", joined.address)
    assert (said.code, said.out) == (3, "")
    assert "No such file or directory; give an output in a folder that all machines share" in said.err
    assert not (tmp_path / "out").exists()


def test_an_input_that_is_another_one_there_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "shard"
    file.write_bytes(b"abc")
    assert look(((file, 3),), None) == []
    assert look(((file, 4), (tmp_path / "none", 1)), None) == [
        f"{file}: has 3 bytes, not 4; --on needs an input that all machines share",
        f"{tmp_path / 'none'}: No such file or directory; --on needs an input that all machines share",
    ]


class FakeCluster:
    """Two machines, on which a probe finds what the first has here, changed by `changes` on the other."""

    def __init__(self, **changes: Any) -> None:
        self.changes = changes

    def on_each(self, work: Callable[[], dict[str, Any]]) -> dict[Node, dict[str, Any]]:
        other = work()
        other["versions"] |= self.changes.get("versions", {})
        other["processor"] = self.changes.get("processor", other["processor"])
        return {Node("1", "one", 1): work(), Node("2", "two", 1): other}


def test_machines_of_another_version_are_refused() -> None:
    def refusal(**versions: str | None) -> str:
        with pytest.raises(MachineError) as found:
            refuse_unlike(cast("Any", FakeCluster(versions=versions)))
        return str(found.value)

    assert refuse_unlike(cast("Any", FakeCluster())) == ()
    ours = f"this one {__version__}; install the same everywhere"
    assert refusal(sparseprune="9.9") == f"machine two has another sparseprune 9.9, {ours}"
    assert refusal(sparseprune=None) == f"machine two has no sparseprune, {ours}"
    assert refusal(torch="1.0").startswith("machine two has another torch 1.0, this one ")
    assert refusal(Python="3.99").startswith("machine two has another Python 3.99, this one ")


def test_unlike_processors_are_told() -> None:
    (line,) = refuse_unlike(cast("Any", FakeCluster(processor="arm64")))
    assert "arm64 on two): rebuilt weights may differ in their last bits" in line


def test_an_error_of_the_work_ends_the_run_and_is_told_once(joined: Cluster, tmp_path: Path) -> None:
    dense, spec = write_decoder(tmp_path / "dense"), write_spec(tmp_path, TWO_OF_FOUR)
    path = dense / "model-00003-of-00004.safetensors"
    tensors = load_file(path)
    tensors["1.up.weight"][2, 3] = float("nan")
    save_file(tensors, path)
    here, there = (
        run("apply", dense, spec, "-q", "-o", tmp_path / "out", *on) for on in ((), ("--on", joined.address))
    )
    assert here == there
    assert (there.code, there.err.count("NaN")) == (2, 1)


def test_a_text_and_a_client_are_refused(tmp_path: Path) -> None:
    dense, spec = write_decoder(tmp_path / "dense"), write_spec(tmp_path, TWO_OF_FOUR)
    text = refused("apply", dense, spec, "--on", "auto", "--text", spec, "-o", tmp_path / "out")
    assert "--on: goes without --text" in text.err
    client = refused("verify", dense, spec, "--on", "ray://a:1")
    assert "run this command on a machine of the cluster" in client.err
