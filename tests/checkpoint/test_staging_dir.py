"""Runs that were killed, that meet, and disks that fail: nothing is lost."""

import errno
import fcntl
import os
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sparseprune.checkpoint import StagedOutput, file_io, publish
from sparseprune.checkpoint.publish import StagingDir
from sparseprune.errors import CheckpointError, MachineError
from tests.checkpoint.files import (
    content,
    directory,
    error_of,
    fill,
    layout_of,
    names_in,
    sharded,
    single,
    stage,
)
from tests.faults import failing


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    ckpt = directory(tmp_path)
    partial = tmp_path / ".ckpt-pruned.sparseprune-partial"
    (partial / "output" / "sparseprune").mkdir(parents=True)
    (partial / "output" / "model.safetensors").write_text("half")
    (partial / "output" / "sparseprune" / "masks.safetensors").symlink_to(ckpt / "config.json")
    (partial / "lock").write_text("")
    (partial / "journal").write_text("")
    (partial / "link").symlink_to(ckpt)
    stage(layout_of(ckpt, masked="a", form="bool"))
    assert (tmp_path / "ckpt-pruned/model.safetensors").read_bytes() == (
        ckpt / "model.safetensors"
    ).read_bytes()
    assert (ckpt / "config.json").read_text() == '{"a": 1}'
    assert names_in(tmp_path) == ["ckpt", "ckpt-pruned"]


@pytest.mark.parametrize("renamed", [False, True])
def test_a_run_killed_while_it_replaced_its_target_has_lost_nothing(tmp_path: Path, renamed: bool) -> None:
    ckpt = directory(tmp_path)
    replaced = tmp_path / ".ckpt-pruned.sparseprune-partial" / "replaced"
    (replaced / "sparseprune").mkdir(parents=True)
    (replaced / "sparseprune" / "report.json").write_text("old")
    if not renamed:
        (replaced.parent / "output").mkdir()
    else:
        (tmp_path / "ckpt-pruned" / "sparseprune").mkdir(parents=True)
        (tmp_path / "ckpt-pruned" / "sparseprune" / "report.json").write_text("new")
    with pytest.raises(CheckpointError, match="already exists"):
        stage(layout_of(ckpt))
    if not renamed:
        assert content(tmp_path / "ckpt-pruned") == {"sparseprune/report.json": b"old"}
        assert names_in(tmp_path) == ["ckpt", "ckpt-pruned"]
    else:
        assert content(tmp_path / "ckpt-pruned") == {"sparseprune/report.json": b"new"}
    stage(layout_of(ckpt), force=True)
    assert names_in(tmp_path) == ["ckpt", "ckpt-pruned"]


def test_a_second_run_to_the_same_output_is_refused(tmp_path: Path) -> None:
    layout = layout_of(directory(tmp_path))
    with StagedOutput(layout, force=False) as output:
        fill(output)
        with pytest.raises(CheckpointError, match="ckpt-pruned: another run is writing this output"):
            stage(layout)
        output.commit()
    assert (tmp_path / "ckpt-pruned" / "config.json").exists()


def test_only_one_of_many_runs_at_once_gets_the_output(tmp_path: Path) -> None:
    layout = layout_of(single(tmp_path), masked="a", form="bool")
    barrier = threading.Barrier(4)

    def attempt(_: int) -> str:
        barrier.wait()
        try:
            stage(layout)
        except CheckpointError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            answers = list(pool.map(attempt, range(4)))
            assert answers.count("") == 1, answers
            assert all("another run" in answer or "already exists" in answer for answer in answers if answer)
            assert len(names_in(tmp_path)) == 4
            for name in ("m.pruned.safetensors", "m.pruned.masks.safetensors", "m.pruned.report.json"):
                (tmp_path / name).unlink()


def test_what_is_in_the_way_of_the_staging_folder_is_not_followed(tmp_path: Path) -> None:
    ckpt = directory(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    partial = tmp_path / ".ckpt-pruned.sparseprune-partial"
    partial.symlink_to("elsewhere")
    with pytest.raises(CheckpointError, match="is in the way of the unfinished output"):
        stage(layout_of(ckpt))
    partial.unlink()
    partial.mkdir()
    (partial / "lock").symlink_to("../elsewhere/lock")
    (partial / "journal").symlink_to("../elsewhere/journal")
    (partial / "output").symlink_to("../elsewhere")
    stage(layout_of(ckpt))
    assert names_in(tmp_path / "elsewhere") == []
    assert names_in(tmp_path) == ["ckpt", "ckpt-pruned", "elsewhere"]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_without_locks_the_work_is_done_all_the_same_and_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:

    monkeypatch.setattr(fcntl, "flock", failing(OSError, code, os.strerror(code)))
    with StagedOutput(layout_of(directory(tmp_path))) as output:
        fill(output)
        (warning,) = output.warnings
        assert warning.startswith(
            f"{tmp_path}: there are no locks, so two runs to one output are not told apart"
        )
        output.commit()
    assert len(output.warnings) == 1
    assert names_in(tmp_path) == ["ckpt", "ckpt-pruned"]


def test_a_lock_that_fails_otherwise_is_the_machines_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(fcntl, "flock", failing(OSError, errno.EIO, "Input/output error"))
    with pytest.raises(MachineError, match="Input/output error"):
        stage(layout_of(directory(tmp_path)))


@pytest.mark.parametrize("make", [directory, single, sharded])
@pytest.mark.parametrize("function", ["pwrite", "ftruncate", "fsync", "copy_file_range"])
def test_a_disk_that_is_full_at_any_moment_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, make: Callable[[Path], Path]
) -> None:
    layout = layout_of(make(tmp_path), masked="b", form="bool")
    before = content(tmp_path)
    real = getattr(os, function)
    good = 0
    countdown = 0

    def fill_up(*args: object) -> object:
        nonlocal countdown
        countdown -= 1
        if countdown < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, function, fill_up)
    while not os.path.lexists(layout.target):
        countdown = good
        error = error_of(layout)
        if os.path.lexists(layout.target):
            break
        assert re.search(
            r"/\S+: cannot (be written|get its name): No space .*needs \S+ .?B more, \S+ .?B are free now",
            error or "",
        )
        assert content(tmp_path) == before
        good += 1
    assert good > 0


def test_a_folder_that_cannot_be_synced_is_named_and_the_complete_output_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = file_io.sync

    def fail(path: Path | str, **options: bool) -> bool:
        if path == tmp_path and (tmp_path / "ckpt-pruned").exists():
            raise OSError(errno.EIO, "Input/output error")
        return sync(path, **options)

    monkeypatch.setattr(file_io, "sync", fail)
    layout = layout_of(directory(tmp_path))
    assert f"{tmp_path}: cannot be synced to disk: Input/output error" in (error_of(layout) or "")
    assert names_in(tmp_path) == ["ckpt", "ckpt-pruned"]


@pytest.mark.parametrize("make", [directory, single])
@pytest.mark.parametrize("number", [1, 2])
def test_a_rename_that_fails_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Path], number: int
) -> None:
    path = make(tmp_path)
    stage(layout_of(path), report=b"old")
    before = content(tmp_path)
    monkeypatch.setattr(publish, "swap", lambda one, other: False)
    moves = 0

    rename = Path.rename

    def move(source: Path, target: Path) -> Path:
        nonlocal moves
        moves += 1
        if moves == number:
            raise OSError(errno.EIO, "Input/output error")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", move)
    error = error_of(layout_of(path), force=True)
    assert "cannot get its name: Input/output error" in (error or "")
    assert content(tmp_path) == before


def test_names_given_before_a_failure_are_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = single(tmp_path)
    rename = Path.rename

    def fail(source: Path, target: Path) -> Path:
        if target.name == "m.pruned.safetensors":
            raise OSError(errno.EIO, "Input/output error")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(MachineError, match="cannot get its name"):
        stage(layout_of(path, masked="a", form="bool"))
    assert names_in(tmp_path) == ["m.safetensors"]


def test_what_fails_once_the_new_weights_have_their_name_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = single(tmp_path)
    stage(layout_of(path), report=b"old")
    rename = Path.rename
    moves = 0

    def fail_once(source: Path, target: Path) -> Path:
        nonlocal moves
        moves += 1
        if moves == 3:
            raise OSError(errno.EIO, "Input/output error")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    assert "cannot get its name: Input/output error" in (
        error_of(layout_of(path), force=True, report=b"new") or ""
    )
    assert (tmp_path / "m.pruned.report.json").read_bytes() == b"new"
    assert names_in(tmp_path) == ["m.pruned.report.json", "m.pruned.safetensors", "m.safetensors"]


def killed_while_naming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int, *, force: bool = True
) -> Path:
    """What a run leaves that dies after so many renames, with `force` over an old output.

    Then the old report goes first; the new weights are second, the new report is third.
    """
    path = single(tmp_path)
    if force:
        stage(layout_of(path), report=b"old")
    rename = Path.rename
    left = iter(range(renames))

    class Killed(BaseException):
        pass

    def die(source: Path, target: Path) -> Path:
        if next(left, None) is None:
            raise Killed
        return rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die)
        patch.setattr("sparseprune.checkpoint.publish.settle", lambda folder, target: None)
        patch.setattr("sparseprune.checkpoint.publish.remove", lambda path: None)
        with pytest.raises(Killed):
            stage(layout_of(path), force=force, report=b"new")
    return path


def test_what_somebody_put_in_the_place_of_a_file_since_is_not_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = killed_while_naming(tmp_path, monkeypatch, 1, force=False)
    report = tmp_path / "m.pruned.report.json"
    assert report.read_bytes() == b"new"
    report.write_bytes(b"of the user")
    with pytest.raises(CheckpointError, match="already exists"):
        stage(layout_of(path))
    assert report.read_bytes() == b"of the user"
    assert names_in(tmp_path) == ["m.pruned.report.json", "m.safetensors"]


@pytest.mark.parametrize("changed", ["report", "weights", "no weights"])
def test_what_new_weights_lack_is_given_to_them_and_to_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    path = killed_while_naming(tmp_path, monkeypatch, 2)
    report, weights = tmp_path / "m.pruned.report.json", tmp_path / "m.pruned.safetensors"
    assert not report.exists()
    if changed == "report":
        report.write_bytes(b"of the user")
    elif changed == "weights":
        weights.write_bytes(b"of the user")
    else:
        weights.unlink()
    if weights.exists():
        with pytest.raises(CheckpointError, match="already exists"):
            stage(layout_of(path))
    else:
        stage(layout_of(path), report=b"newest")
    wanted = {"report": b"of the user", "weights": None, "no weights": b"newest"}[changed]
    assert (report.read_bytes() if report.exists() else None) == wanted
    assert not StagingDir(weights).path.exists()


def test_files_whose_names_were_taken_away_get_them_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = killed_while_naming(tmp_path, monkeypatch, 1)
    assert "m.pruned.report.json" not in names_in(tmp_path)
    with pytest.raises(CheckpointError, match="already exists"):
        stage(layout_of(path))
    assert (tmp_path / "m.pruned.report.json").read_bytes() == b"old"
    assert names_in(tmp_path) == ["m.pruned.report.json", "m.pruned.safetensors", "m.safetensors"]


def test_a_target_that_cannot_be_put_back_is_kept_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = directory(tmp_path)
    stage(layout_of(ckpt), report=b"old")
    rename = Path.rename

    def fail(source: Path, target: Path) -> Path:
        if source.name in ("output", "replaced"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(source, target)

    monkeypatch.setattr(publish, "swap", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(MachineError, match=r"ckpt-pruned: could not be put back .* it was is in .*-partial"):
        stage(layout_of(ckpt), force=True)
    monkeypatch.undo()
    replaced = tmp_path / ".ckpt-pruned.sparseprune-partial" / "replaced"
    assert (replaced / "sparseprune" / "report.json").read_bytes() == b"old"
    with pytest.raises(CheckpointError, match="already exists"):
        stage(layout_of(ckpt))
    assert (tmp_path / "ckpt-pruned" / "sparseprune" / "report.json").read_bytes() == b"old"


def test_a_lock_that_its_owner_removed_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of(directory(tmp_path))
    lock = tmp_path / ".ckpt-pruned.sparseprune-partial" / "lock"
    flock = fcntl.flock
    attempts: list[int] = []

    def after_another_run_ended(descriptor: int, operation: int) -> None:
        attempts.append(descriptor)
        if len(attempts) == 1:
            lock.unlink()
            lock.parent.rmdir()
        if len(attempts) == 2:
            lock.unlink()
            lock.touch()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", after_another_run_ended)
    stage(layout)
    assert len(attempts) == 3
    assert names_in(tmp_path) == ["ckpt", "ckpt-pruned"]


def test_gives_up_on_a_staging_folder_that_keeps_vanishing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of(directory(tmp_path))
    make = os.open

    def vanish(path: Path, flags: int, mode: int = 0o777) -> int:
        if Path(path).name == "lock":
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        return make(path, flags, mode)

    monkeypatch.setattr(os, "open", vanish)
    with pytest.raises(MachineError, match="cannot be locked, other runs come and go there"):
        stage(layout)


def test_remains_that_cannot_be_removed_are_the_machines_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of(directory(tmp_path))
    stale = tmp_path / ".ckpt-pruned.sparseprune-partial" / "output"
    stale.mkdir(parents=True)

    monkeypatch.setattr(shutil, "rmtree", failing(OSError, errno.EBUSY, "Device or resource busy"))
    with pytest.raises(MachineError, match="sparseprune-partial: cannot be written: Device or resource busy"):
        stage(layout)
    monkeypatch.undo()
    stage(layout)
    assert names_in(tmp_path) == ["ckpt", "ckpt-pruned"]
