"""Commands on all kinds of file systems, with private files and after deaths: what they do and say."""

import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
from itertools import cycle
from pathlib import Path
from typing import NoReturn

import pytest
from safetensors.torch import save_file

from sparseprune.checkpoint.output import Journal, note_text, read_journal
from sparseprune.checkpoint.publish import StagingDir
from tests.checkpoint.files import names_in
from tests.cli.removal import LLAMA, decoder, write
from tests.cli.test_resuming_runs import GLOBAL
from tests.commands import Said, ok, refused, run
from tests.faults import failing
from tests.limits import force, narrow
from tests.samples import CHANNELS, TWO_OF_FOUR, mlp_tensors, write_shards, write_spec

NO_LOCKS = "there are no locks, so two runs to one output are not told apart; start one at a time"
NO_NAMES = "nothing tells when a name is on disk there, so a crash of the machine may lose the output"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory `in` of two shards, a file `m.safetensors`, and a spec for both."""
    write_shards(
        tmp_path / "in", {"a.safetensors": mlp_tensors(1), "b.safetensors": {"more": mlp_tensors()["norm"]}}
    )
    save_file(mlp_tensors(), tmp_path / "m.safetensors")
    write_spec(tmp_path, TWO_OF_FOUR)
    return tmp_path


def modes(at: Path) -> set[int]:
    """Those of a folder and its files."""
    return {stat.S_IMODE(path.stat().st_mode) for path in at.rglob("*") if path.is_file()}


def test_no_output_of_a_private_checkpoint_is_for_others(tmp_path: Path) -> None:
    source = write(tmp_path / "in", decoder(), LLAMA)
    source.chmod(0o700)
    for path in source.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    spec = "mlp-channels"
    for number, words in enumerate(
        (
            ("apply", source, spec),
            ("mask", source, spec),
            ("remove", source, spec),
            ("reapply", source, tmp_path / "0"),
            ("remove", source, "--masks", tmp_path / "1"),
        )
    ):
        out = tmp_path / str(number)
        ok(*words, "-o", out, "-q")
        assert modes(out) == {0o600}
        assert {stat.S_IMODE(path.stat().st_mode) for path in (out, *out.rglob("*")) if path.is_dir()} == {
            0o700
        }
        assert len(list(out.rglob("*"))) >= 3


def test_private_masks_make_private_masks(home: Path) -> None:
    ok("mask", home / "m.safetensors", home / "spec.toml", "-o", home / "masks.safetensors", "-q")
    (home / "masks.safetensors").chmod(0o600)
    ok("reapply", home / "m.safetensors", home / "masks.safetensors", "-o", home / "out.safetensors", "-q")
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in home.glob("out.*")}
    assert found.pop("out.safetensors") == stat.S_IMODE((home / "m.safetensors").stat().st_mode)
    assert found == {"out.masks.safetensors": 0o600, "out.report.json": 0o600}


def fail(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def test_a_promise_that_is_weaker_there_is_told_once_and_an_error_under_strict(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> NoReturn:
        raise fail(errno.ENOLCK)

    monkeypatch.setattr(fcntl, "flock", refuse)
    words = ("apply", home / "in", home / "spec.toml", "-o", home / "out")
    strict = refused(*words, "--strict")
    assert strict.err == f"sparseprune: --strict: {home}: {NO_LOCKS}\n"
    assert names_in(home) == ["in", "m.safetensors", "spec.toml"]
    said = ok(*words)
    assert said.err.count("warning: ") == said.err.count(f"sparseprune: warning: {home}: {NO_LOCKS}\n") == 1
    report = json.loads((home / "out/sparseprune/report.json").read_text())
    assert report["warnings"] == [f"{home}: {NO_LOCKS}"]


def interrupted(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that ended when all of its work was noted."""

    with monkeypatch.context() as patch:
        patch.setattr("sparseprune.api.pruning.refuse_changed", failing(KeyboardInterrupt))
        said = run("apply", home / "m.safetensors", home / "spec.toml", "-o", home / "out.safetensors", "-q")
    assert said.code == 130
    folder = StagingDir(home / "out.safetensors").path
    assert str(folder) in said.err
    return folder


def finished(home: Path) -> tuple[Said, dict[str, bytes]]:
    said = ok("apply", home / "m.safetensors", home / "spec.toml", "-o", home / "out.safetensors")
    return said, {name: (home / name).read_bytes() for name in ("out.safetensors", "out.masks.safetensors")}


STRANGE: tuple[object, ...] = (
    *(5, None, True, "a", [], {}, [1], [1, 2, 3], {"a": 1}, ["a", []], [-1, []], [1.5, []], [True, []]),
    *(
        [1, 5],
        [1, None],
        [1, "a"],
        [1, "0x"],
        [1, {}],
        [1, [5]],
        [1, [[]]],
        [1, [["m", "r", 1]]],
        [1, [1, "2"]],
    ),
    *(
        [1, [1, 2, 3]],
        [1, [1e300, 1]],
        [1, [-1, 1 << 70]],
        [1, [["m", "r", 1, 1, 1, 1.0, 1, 1.0, [1, "2", 3]]]],
    ),
)


@pytest.mark.parametrize(
    "way", ["contiguous", "radix_select", "block_norms", "torch_out_of_core", "torch_out_of_core softly"]
)
def test_records_of_any_form_are_worked_again(home: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """With good check sums: written by somebody who knows how."""
    text = {"contiguous": TWO_OF_FOUR, "block_norms": CHANNELS}.get(way, GLOBAL)
    write_spec(home, text.replace("sparsity", 'mode = "soft"\nsparsity') if "softly" in way else text)
    force(monkeypatch, way.removesuffix(" softly"))
    narrow(monkeypatch, 64, 16)
    _, wanted = finished(home)
    for path in home.glob("out.*"):
        path.unlink()
    folder = interrupted(home, monkeypatch)
    journal = folder / "journal"
    found = read_journal(journal)
    assert found is not None
    keys = [key for key in found.finished if not key.startswith("copy")]
    assert any("decision" in key or "cut " in key for key in keys) == (way != "contiguous")
    for first in range(0, len(STRANGE), max(1, len(keys))):
        journal.unlink()
        written = Journal.begin(journal, found.identity)
        strange = cycle((*STRANGE[first:], *STRANGE[:first]))
        written.append([note_text(key, next(strange)) for key in keys])
        written.close()
        shutil.copytree(folder, home / "copy")
        said, there = finished(home)
        assert "an unfinished run is continued" in said.err
        assert there == wanted
        for path in home.glob("out.*"):
            path.unlink()
        (home / "copy").rename(folder)


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_what_a_killed_run_left_beside_an_output_is_told_in_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    folder = interrupted(home, monkeypatch)
    shutil.copytree(folder, home / "kept")
    finished(home)
    words = (command, home / "out.safetensors", *([home / "spec.toml"] if command == "verify" else []))
    assert str(folder) not in run(*words).err
    (home / "kept").rename(folder)
    said = ok(*words)
    assert said.err.count(str(folder)) == 1
    assert f"sparseprune: {folder}: left by a run that was killed; the command that wrote it" in said.err
    assert str(folder) not in run(*words, "-q").err
    assert run("apply", home / "m.safetensors", home / "spec.toml", "-o", home / "out.safetensors").code == 2
    ok("apply", home / "m.safetensors", home / "spec.toml", "-o", home / "out.safetensors", "--force")
    assert not folder.exists()
    assert str(folder) not in run(*words).err


def traced(home: Path, *words: str, inject: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """`sparseprune WORDS` under strace, which answers calls of the system as these expressions say."""
    calls = ",".join(expression.partition(":")[0] for expression in inject)
    tracer = ["strace", "-f", "-qq", "-o", str(home / "trace"), "-e", f"trace={calls}"]
    tracer += [word for expression in inject for word in ("-e", f"inject={expression}")]
    done = subprocess.run(
        [*tracer, sys.executable, "-m", "sparseprune", *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        cwd=home,
    )
    if "PTRACE" in done.stderr or "ptrace" in done.stderr:
        pytest.skip("no process may be traced here")
    return done


STRACE = pytest.mark.skipif(shutil.which("strace") is None, reason="there is no strace")


@STRACE
def test_a_file_system_without_locks_syncs_of_folders_and_copies_by_the_kernel_gets_its_output(
    home: Path,
) -> None:
    finished(home)
    inject = (
        "flock:error=ENOLCK",
        "fsync:error=EINVAL",
        "copy_file_range:error=EIO",
        "renameat2:error=EINVAL",
    )
    for more in ((), ("--force",)):
        done = traced(
            home, "apply", "m.safetensors", "spec.toml", "-o", "other.safetensors", *more, inject=inject
        )
        assert (done.returncode, done.stdout) == (0, "other.safetensors\n"), done.stderr
        lines = [line for line in done.stderr.splitlines() if "warning" in line]
        assert lines == [f"sparseprune: warning: {home}: {fact}" for fact in (NO_LOCKS, NO_NAMES)]
    for end in ("safetensors", "masks.safetensors"):
        assert (home / f"other.{end}").read_bytes() == (home / f"out.{end}").read_bytes()
    assert "copy_file_range" in (home / "trace").read_text()
    assert not [name for name in names_in(home) if name.startswith(".")]


@STRACE
def test_a_directory_that_is_replaced_is_there_when_the_run_is_killed_at_its_exchange(home: Path) -> None:
    words = ("apply", "in", "spec.toml", "-o", "out")
    ok("apply", home / "in", home / "spec.toml", "--no-masks", "-o", home / "out", "-q")
    done = traced(home, *words, "--force", inject=("renameat2:signal=KILL",))
    if "renameat2" not in (home / "trace").read_text():
        pytest.skip("names cannot be exchanged here")
    assert done.returncode != 0
    assert (home / "out/sparseprune/report.json").exists()
    ok("apply", home / "in", home / "spec.toml", "-o", home / "out", "--force")
    assert (home / "out/sparseprune/masks.safetensors").exists() or list(
        (home / "out/sparseprune").glob("masks*")
    )
    assert not [name for name in names_in(home) if name.startswith(".")]
