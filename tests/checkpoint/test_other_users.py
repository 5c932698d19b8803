"""Staging folders that others made or may write to: nothing in them is trusted, nobody is harmed."""

import ctypes  # noqa: F401  (another user may not find it)
import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sparseprune.checkpoint import OutputLayout, StagedOutput
from sparseprune.checkpoint.publish import StagingDir
from sparseprune.errors import CheckpointError
from tests.checkpoint.files import (
    all_keys,
    content,
    directory,
    finish,
    layout_of,
    names_in,
    resumable,
    single,
    stage,
    work,
)
from tests.faults import failing

NOBODY = 65534
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")


def kept(layout: OutputLayout) -> Path:
    """The folder of a run that was interrupted when all of its work was noted."""
    output = resumable(layout)

    def run() -> None:
        with output:
            work(output)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert output.kept
    return output.partial_path


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A folder that every user may come to and write to, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


@contextmanager
def as_nobody() -> Iterator[None]:
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_nobody_else_may_enter_the_folder_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    layout = layout_of(directory(tmp_path), masked="b")
    before = os.umask(umask)
    try:
        with resumable(layout) as output:
            assert mode_of(output.partial_path) == 0o700
            assert {mode_of(output.partial_path / name) for name in ("lock", "journal")} == {0o600}
    finally:
        os.umask(before)


def test_the_group_of_the_folder_around_it_is_kept(tmp_path: Path) -> None:
    layout = layout_of(directory(tmp_path))
    tmp_path.chmod(0o2755)
    with StagedOutput(layout) as output:
        assert mode_of(output.partial_path) == 0o2700
        assert mode_of(output.staged_path) & 0o2000


@pytest.mark.parametrize("kind", ["partial", "choice"])
@pytest.mark.parametrize("real", [pytest.param(True, marks=AS_ROOT), False])
def test_the_folder_of_another_user_is_refused_and_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real: bool, kind: str
) -> None:
    target = tmp_path / "out"
    folder = StagingDir(target, kind)
    folder.path.mkdir(0o700)
    (folder.path / "journal").write_text("planted")
    if real:
        os.chown(folder.path, NOBODY, NOBODY)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: folder.path.stat().st_uid + 1)
    with pytest.raises(CheckpointError, match=r"out\.sparseprune-\w+: belongs to another user, number \d+"):
        folder.acquire()
    assert content(folder.path) == {"journal": b"planted"}


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_what_others_could_write_to_is_closed_and_made_anew(tmp_path: Path, mode: int) -> None:
    path = directory(tmp_path)
    layout = layout_of(path, masked="b")
    folder = kept(layout)
    (folder / "output/model.safetensors").write_bytes(b"x" * (path / "model.safetensors").stat().st_size)
    folder.chmod(mode)
    with resumable(layout) as output:
        assert not output.resumed
        assert mode_of(folder) == 0o700
        (warning,) = output.warnings
        assert "others could write there, so the run that left it is not continued" in warning
        work(output)
        output.commit()
    assert b"xxx" not in (tmp_path / "ckpt-pruned/model.safetensors").read_bytes()


def test_what_others_could_read_is_closed_and_continued(tmp_path: Path) -> None:
    layout = layout_of(directory(tmp_path), masked="b")
    folder = kept(layout)
    folder.chmod(0o755)
    with resumable(layout) as output:
        assert output.resumed
        assert output.warnings == ()
        assert mode_of(folder) == 0o700


@pytest.mark.parametrize("name", ["replaced", "former", "names", "exchanged"])
def test_old_outputs_are_not_taken_from_where_others_could_write(tmp_path: Path, name: str) -> None:
    layout = layout_of(directory(tmp_path))
    folder = StagingDir(layout.target).path
    (folder / "output").mkdir(parents=True)
    (folder / name).mkdir()
    (folder / name / "planted").write_text("")
    folder.chmod(0o777)
    with pytest.raises(CheckpointError, match="others could write there while an output got its name"):
        stage(layout)
    assert not layout.target.exists()
    assert (folder / name / "planted").exists()


def give_away(path: Path) -> None:
    os.chown(path, NOBODY, NOBODY)


def link_again(path: Path) -> None:
    """Another name, by which the bytes can be changed."""
    path.parent.parent.joinpath("other-name").hardlink_to(path)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def lead_away(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


@pytest.mark.parametrize("change", [pytest.param(give_away, marks=AS_ROOT), link_again, pipe, lead_away])
@pytest.mark.parametrize("name", ["output/deep/er/run.sh", "output/model.safetensors", "journal"])
def test_a_run_is_not_continued_with_files_that_are_not_its_own(
    tmp_path: Path, name: str, change: Callable[[Path], None]
) -> None:
    layout = layout_of(directory(tmp_path), masked="b")
    change(kept(layout) / name)
    assert finish(layout) == ([], all_keys(layout))
    assert (tmp_path / "ckpt-pruned/deep/er/run.sh").read_text() == "true"


@pytest.mark.parametrize("change", [pytest.param(give_away, marks=AS_ROOT), link_again, pipe, lead_away])
def test_a_lock_that_somebody_else_may_hold_is_made_anew(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    layout = layout_of(single(tmp_path), masked="b")
    lock = kept(layout) / "lock"
    holder = os.open(lock, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        change(lock)
        assert finish(layout) == (all_keys(layout), [])
    finally:
        os.close(holder)


def test_where_owners_are_not_kept_the_work_is_done_and_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a share that gives everything to one user, or a disk without owners."""
    layout = layout_of(directory(tmp_path), masked="b", form="bool")
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    output = resumable(layout)

    def run() -> None:
        with output:
            (warning,) = output.warnings
            assert warning.endswith(
                "owners and permissions are not kept there, so an interrupted run is not continued"
            )
            work(output)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert not output.kept
    assert names_in(tmp_path) == ["ckpt"]
    assert finish(layout) == ([], all_keys(layout))


def test_where_permissions_are_not_kept_the_work_is_done_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk on which everything may be written by everybody."""
    mkdir = os.mkdir

    def make(path: Path, mode: int = 0o777) -> None:
        mkdir(path, mode)
        path.chmod(0o777)

    layout = layout_of(directory(tmp_path), masked="b")
    monkeypatch.setattr(os, "mkdir", make)
    monkeypatch.setattr(os, "fchmod", failing(PermissionError, 1, "Operation not permitted"))
    with resumable(layout) as output:
        assert len(output.warnings) == 1
        work(output)
        output.commit()
    assert names_in(tmp_path) == ["ckpt", "ckpt-pruned"]


@AS_ROOT
def test_a_user_without_powers_reads_what_nobody_may_write(open_to_all: Path) -> None:
    """A whole run, then once more over its output, then one in two parts."""
    path = directory(open_to_all)
    for file in (path, *path.rglob("*")):
        file.chmod(0o555 if file.is_dir() else 0o444)
    with as_nobody():
        layout = layout_of(path, masked="b", form="bool")
        finish(layout)
        finish(layout, force=True)
        other = layout_of(path, open_to_all / "other", masked="b")
        kept(other)
        assert finish(other) == (all_keys(other), [])
    assert (open_to_all / "ckpt-pruned").stat().st_uid == NOBODY
    assert mode_of(open_to_all / "ckpt-pruned/model.safetensors") == 0o444
    assert names_in(open_to_all) == ["ckpt", "ckpt-pruned", "other"]


@AS_ROOT
def test_a_user_without_powers_is_refused_what_root_began_and_harms_nothing(open_to_all: Path) -> None:
    layout = layout_of(directory(open_to_all), masked="b")
    folder = kept(layout)
    before = content(folder)
    with as_nobody(), pytest.raises(CheckpointError, match="belongs to another user, number 0, whose run"):
        finish(layout)
    assert content(folder) == before
    assert finish(layout) == (all_keys(layout), [])
