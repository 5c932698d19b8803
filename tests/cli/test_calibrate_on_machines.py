"""`calibrate --on`: machines that share the work write the bytes of one, whatever is lost meanwhile."""

import fcntl
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseprune.calibration.outbox import Note, Outbox, Piece, states_folder
from sparseprune.calibration.shares import Gathering
from sparseprune.execution import cluster
from sparseprune.execution.cluster import Cluster
from tests.calibration.models import albert, made, save
from tests.commands import Said, refused, run
from tests.execution.clusters import Machines, machines
from tests.execution.here import Here

pytest.importorskip("ray")
pytestmark = pytest.mark.usefixtures("quiet_transformers", "one_thread")

SIZES = ("--length", 12, "--sequences", 6)
SOME_MATRICES = 4 * 4 * 48 * 48  # bytes of moments: not enough for all of a block
FEW_MATRICES = 4 * 64 * 64  # not enough for all in one sweep


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a mixtral and an albert; nothing in it is changed by tests."""
    folder = made(tmp_path_factory.mktemp("machines"), "mixtral")
    save(albert(), folder / "albert")
    return folder


@pytest.fixture(scope="module")
def two() -> Iterator[Machines]:
    with machines(2) as found:
        yield found


@pytest.fixture(scope="module")
def joined(two: Machines) -> Iterator[Cluster]:
    with Cluster(two.address) as found:
        yield found


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As each of the machines has."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


@pytest.fixture(scope="module")
def local(home: Path) -> Callable[..., tuple[Any, bytes]]:
    """What one process says and writes, each made once."""

    @cache
    def done(model: str, *words: object) -> tuple[Any, bytes]:
        out = home / "-".join(("local", model, *map(str, words)))
        said = calibrate(home / model, out, "--json", "-q", *words)
        assert said.code == 0, said.err
        return told(said.out), statistics(out)

    return done


def calibrate(model: Path, out: Path, *words: object) -> Said:
    return run("calibrate", model, "--text", model.parent / "words.txt", *SIZES, "-o", out, *words)


def statistics(folder: Path) -> bytes:
    return (folder / "statistics.safetensors").read_bytes()


def told(text: str) -> Any:
    found = json.loads(text)
    del found["seconds"], found["output"]
    return found


def left_behind() -> list[Path]:
    """Folders for hidden states whose processes are gone: those of others are locked."""
    found = []
    for folder in Path(tempfile.gettempdir()).glob("sparseprune-states-*"):
        with suppress(FileNotFoundError, BlockingIOError), (folder / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found.append(folder)
    return [folder for folder in found if folder.exists()]


@pytest.mark.parametrize(
    "arguments",
    [
        ("mixtral",),
        ("mixtral", "--kind", "norm"),
        ("mixtral", "--gradients", "--memory", SOME_MATRICES),
        ("albert", "--gradients", "--memory", FEW_MATRICES),
    ],
)
def test_two_machines_write_and_say_what_one_process_does(
    arguments: tuple[Any, ...],
    home: Path,
    local: Callable[..., tuple[Any, bytes]],
    joined: Cluster,
    tmp_path: Path,
) -> None:
    model, *words = arguments
    said = calibrate(home / model, tmp_path / "stats", "--on", joined.address, "--json", "-q", *words)
    assert said.code == 0, said.err
    facts, data = local(*arguments)
    assert told(said.out) == facts
    assert statistics(tmp_path / "stats") == data
    assert not left_behind()


@pytest.mark.parametrize("losing", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [("mixtral",), ("mixtral", "--gradients", "--memory", SOME_MATRICES), ("albert", "--gradients")],
)
def test_shares_that_this_process_does_or_loses_make_the_same(
    arguments: tuple[Any, ...],
    losing: bool,
    home: Path,
    local: Callable[..., tuple[Any, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster, "Cluster", Here)
    monkeypatch.setattr(Here, "losing", losing)
    model, *words = arguments
    said = calibrate(home / model, tmp_path / "stats", "--on", "auto", "--json", "-q", *words)
    assert said.code == 0, said.err
    facts, data = local(*arguments)
    assert told(said.out) == facts
    assert statistics(tmp_path / "stats") == data


def worker_of(kind: str) -> list[int]:
    """The processes of machines that do a share."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title, environment = path.read_bytes(), (path.parent / "environ").read_bytes()
        except OSError:
            continue
        if title.startswith(f"ray::{kind}".encode()) and os.environ["RAY_TMPDIR"].encode() in environment:
            found.append(int(path.parent.name))
    return found


def test_a_share_that_is_lost_with_its_process_is_done_again(
    home: Path,
    local: Callable[..., tuple[Any, bytes]],
    joined: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After its first note has come: only the rest is done again."""
    killed: list[int] = []
    asked: list[list[str]] = []
    usual, again = Gathering._note, Gathering._again

    def note(this: Any, one: Any) -> None:
        usual(this, one)
        if not killed:
            killed.extend(worker_of("do_share")[:1])
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    def rest(this: Any, number: int) -> Any:
        share = this._open[number][0] if number in this._open else None
        found = again(this, number)
        if share is not None and found is not None:
            asked.append([*found.share.summed.there])
            assert {*asked[-1]} <= {*share.summed.there}
        return found

    monkeypatch.setattr(Gathering, "_note", note)
    monkeypatch.setattr(Gathering, "_again", rest)
    words = ("--memory", SOME_MATRICES)
    said = calibrate(home / "mixtral", tmp_path / "stats", "--on", joined.address, "--json", "-q", *words)
    assert said.code == 0, said.err
    assert killed
    assert (told(said.out), statistics(tmp_path / "stats")) == local("mixtral", *words)


def test_what_a_killed_driver_noted_is_continued_here_and_there(
    home: Path, local: Callable[..., tuple[Any, bytes]], joined: Cluster, tmp_path: Path
) -> None:
    """The journal is that of one process."""
    out = tmp_path / "stats"
    usual = Gathering._note

    def ended(this: Any, one: Any) -> None:
        usual(this, one)
        raise KeyboardInterrupt

    for words in (("--on", joined.address), ()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Gathering, "_note", ended)
            said = calibrate(home / "mixtral", out, "--on", joined.address)
        assert said.code == 130
        assert "the same command continues" in said.err
        said = calibrate(home / "mixtral", out, *words)
        assert said.code == 0, said.err
        assert "sparseprune: an unfinished run is continued\n" in said.err
        assert statistics(out) == local("mixtral")[1]
        shutil.rmtree(out)


def test_what_machines_cannot_do_is_refused_in_a_line(home: Path, joined: Cluster, tmp_path: Path) -> None:
    words = ("--text", home / "words.txt", *SIZES, "-o", tmp_path / "stats", "--on")
    said = refused("calibrate", home / "mixtral", *words, "ray://there:10001")
    assert "not meant for long runs" in said.err
    said = run("calibrate", home / "mixtral", *words, joined.address, "--device", "cuda")
    assert (said.code, said.err.splitlines()[-1]) == (
        3,
        "sparseprune: --device cuda: no machine of this cluster has a GPU; leave it out",
    )
    assert not (tmp_path / "stats").exists()


def test_a_folder_that_a_killed_process_left_is_removed_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / "sparseprune-states-left"
    left.mkdir()
    (left / "lock").touch()
    (left / "states").write_bytes(b"x" * 100)
    with states_folder() as first, states_folder() as second:
        assert not left.exists()
        assert first != second
        assert first.exists()
    assert not any(tmp_path.iterdir())


def test_what_is_sent_waits_until_it_is_taken_and_comes_in_order() -> None:
    outbox = Outbox()
    heard: list[object] = []

    def work() -> None:
        outbox.write_weight("a", 8, bytes(range(100)))
        outbox.passed(0.5, "block")
        outbox.note("first", [1])
        outbox.write_weight("a", 0, b"12345678")
        raise ValueError("the work fails")

    def hear() -> None:
        for report in outbox.sent(work):
            heard.extend([*report.items, *report.passed])

    with pytest.raises(ValueError, match="the work fails"):
        hear()
    pieces = [one for one in heard if isinstance(one, Piece)]
    assert [(one.name, one.begin, one.data.tobytes()) for one in pieces] == [
        ("a", 8, bytes(range(100))),
        ("a", 0, b"12345678"),
    ]
    assert [one for one in heard if not isinstance(one, Piece)] in (
        [(0.5, "block"), Note("first", [1])],
        [Note("first", [1]), (0.5, "block")],
    )
