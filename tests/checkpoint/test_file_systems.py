"""Places of all kinds: behind links, with long names, without syncs or exchanges: the work is done."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sparseprune.checkpoint import StagedOutput, publish
from sparseprune.checkpoint.publish import StagingDir, left_behind
from sparseprune.errors import CheckpointError
from tests.checkpoint.files import (
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

Make = Callable[[Path], Path]

SHARED_MEMORY = Path("/dev/shm")


@pytest.mark.parametrize("make", [directory, single])
@pytest.mark.parametrize("link", ["absolute", "relative", "chain"])
def test_the_folder_of_the_output_may_be_a_link(tmp_path: Path, make: Make, link: str) -> None:
    (tmp_path / "real").mkdir()
    path = make(tmp_path / "real")
    (tmp_path / "lnk").symlink_to(tmp_path / "real" if link == "absolute" else "real")
    (tmp_path / "far").mkdir()
    (tmp_path / "far/lnk").symlink_to("../lnk")
    through = tmp_path / ("far/lnk" if link == "chain" else "lnk")
    finish(layout_of(through / path.name, masked="b", form="bool"))
    finish(layout_of(path, through / f"out{path.suffix}", masked="b", form="bool"))
    assert names_in(through) == names_in(tmp_path / "real")
    pruned, out = (layout.target for layout in (layout_of(path), layout_of(path, through / "out")))
    assert pruned.exists()
    assert out.with_name(f"out{path.suffix}").exists()
    finish(layout_of(path, through / f"out{path.suffix}", masked="b", form="bool"), force=True)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize("make", [directory, single])
def test_without_syncs_of_folders_the_work_is_done_and_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, make: Make
) -> None:
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    layout = layout_of(make(tmp_path), masked="b")
    for force in (False, True):
        with resumable(layout, force=force) as output:
            work(output)
            output.commit()
            (warning,) = output.warnings
            assert warning == (
                f"{tmp_path}: nothing tells when a name is on disk there, so a crash of the machine may lose "
                "the output"
            )


def test_without_syncs_of_data_nothing_is_noted_that_a_crash_could_lose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(os, "fdatasync", refuse)
    layout = layout_of(directory(tmp_path), masked="b")
    output = resumable(layout)

    def run() -> None:
        with output:
            (warning,) = output.warnings
            assert "nothing tells when data is on disk there" in warning
            work(output)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert not output.kept
    finish(layout)
    assert names_in(tmp_path) == ["ckpt", "ckpt-pruned"]


def test_a_folder_that_may_be_written_and_not_listed_takes_an_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of(single(tmp_path))
    opened = os.open

    def refuse(path: Path | str, *more: int, **keywords: int) -> int:
        if Path(path) == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *more, **keywords)

    monkeypatch.setattr(os, "open", refuse)
    with StagedOutput(layout) as output:
        assert len(output.warnings) == 1
        output.commit()
    assert layout.target.exists()


def test_advice_that_is_refused_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr("sparseprune.checkpoint.output._CACHED_SHARE", 0)
    monkeypatch.setattr(os, "posix_fadvise", failing(OSError, errno.EINVAL, "Invalid argument"))
    stage(layout_of(directory(tmp_path), masked="b"))


@pytest.mark.skipif(not os.access(SHARED_MEMORY, os.W_OK), reason="there is no file system in memory")
def test_a_file_system_in_memory_takes_and_replaces_outputs(tmp_path: Path) -> None:
    path = directory(tmp_path)
    target = SHARED_MEMORY / f"sparseprune-test-{os.getpid()}"
    try:
        finish(layout_of(path, target, masked="b", form="bool"))
        finish(layout_of(path, target, masked="b", form="bool"), force=True)
        assert (target / "model.safetensors").stat().st_dev == SHARED_MEMORY.stat().st_dev
        assert not StagingDir(target).path.exists()
    finally:
        for file in sorted(target.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        target.rmdir()


def long_name(length: int, letter: str) -> str:
    """So many bytes."""
    width = len(letter.encode())
    return letter * (length // width) + "x" * (length % width)


@pytest.mark.parametrize("letter", ["a", "é", "\U0001f600"])
@pytest.mark.parametrize("length", [233, 234, 235, 236, 240, 255])
def test_a_name_may_be_as_long_as_the_file_system_takes(tmp_path: Path, length: int, letter: str) -> None:
    path = directory(tmp_path)
    target = tmp_path / long_name(length, letter)
    layout = layout_of(path, target, masked="b")
    with resumable(layout) as output:
        name = output.partial_path.name
        assert len(os.fsencode(name)) <= 255
        name.encode()  # no character is cut
        assert (target.name in name) == (length <= 255 - len("..sparseprune-partial"))
        work(output)
        output.commit()
    assert (target / "model.safetensors").exists()


def test_long_names_that_end_differently_have_folders_of_their_own(tmp_path: Path) -> None:
    one, other = (StagingDir(tmp_path / ("n" * 250 + end)).path for end in ("a", "b"))
    assert one != other
    assert StagingDir(tmp_path / ("n" * 250), "choice").path != StagingDir(tmp_path / ("n" * 250)).path
    strange = os.fsdecode(b"\x80" * 255)
    assert len(os.fsencode(StagingDir(tmp_path / strange).path.name)) <= 255


@pytest.mark.parametrize(
    ("make", "name", "bytes_"),
    [
        (directory, "n" * 256, 256),
        (directory, "é" * 128, 256),
        (single, "n" * 239 + ".safetensors", 257),
        (single, "n" * 249, 267),
    ],
)
def test_a_name_that_is_too_long_is_refused_before_the_work(
    tmp_path: Path, make: Make, name: str, bytes_: int
) -> None:
    path = make(tmp_path)
    before = names_in(tmp_path)
    with pytest.raises(CheckpointError, match=rf": a name of {bytes_} bytes, at most 255 can be; give a sho"):
        stage(layout_of(path, tmp_path / name, masked="b", form="bool"))
    assert names_in(tmp_path) == before
    with pytest.raises(CheckpointError, match=r"the folder .* does not exist"):
        stage(layout_of(path, tmp_path / name / "deeper" / "out", masked="b", form="bool"))


def test_an_output_that_replaces_another_is_exchanged_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    if not publish.swap(tmp_path / "old", tmp_path / "new"):
        pytest.skip("names cannot be exchanged here")
    swap, exchanged = publish.swap, []

    def note(one: Path, other: Path) -> bool:
        exchanged.append(swap(one, other))
        return exchanged[-1]

    monkeypatch.setattr(publish, "swap", note)
    path = directory(tmp_path)
    stage(layout_of(path), report=b"old")
    with StagedOutput(layout_of(path), force=True) as output:
        inode = output.staged_path.stat().st_ino
        output.commit()
        assert (output.partial_path / "replaced/sparseprune/report.json").read_bytes() == b"old"
    assert exchanged == [True]
    assert layout_of(path).target.stat().st_ino == inode
    assert names_in(tmp_path) == ["ckpt", "ckpt-pruned", "new", "old"]


def test_a_link_is_exchanged_itself_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    path = directory(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/mine").write_text("")
    (tmp_path / "ckpt-pruned").symlink_to("elsewhere")
    stage(layout_of(path), force=True)
    assert not (tmp_path / "ckpt-pruned").is_symlink()
    assert names_in(tmp_path / "elsewhere") == ["mine"]
    assert names_in(tmp_path) == ["ckpt", "ckpt-pruned", "elsewhere"]


def test_the_old_output_is_not_continued_after_a_death_at_the_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files have the sizes of the new one's, and the journal is still there."""
    path = directory(tmp_path)
    stage(layout_of(path, masked="b"), report=b"old")
    old = content(tmp_path / "ckpt-pruned")
    swap = publish.swap
    if not swap(tmp_path / "ckpt", tmp_path / "ckpt-pruned"):
        pytest.skip("names cannot be exchanged here")
    swap(tmp_path / "ckpt", tmp_path / "ckpt-pruned")

    class Killed(BaseException):
        pass

    def die(one: Path, other: Path) -> bool:
        swap(one, other)
        raise Killed

    def die_with_it(output: StagedOutput, *, keep: bool) -> None:
        """Closes the files that a killed process would close."""
        output._staging._unlock()
        assert output._writer.journal is not None
        output._writer.journal.close()

    layout = layout_of(path, masked="b")
    with monkeypatch.context() as patch:
        patch.setattr(publish, "swap", die)
        patch.setattr(StagedOutput, "_leave", die_with_it)
        with pytest.raises(Killed):
            finish(layout, force=True)
    folder = StagingDir(layout.target).path
    assert content(folder / "output") == old
    assert left_behind(layout.target) == folder
    new = content(layout.target)
    assert new != old
    with pytest.raises(CheckpointError, match="already exists"):
        finish(layout)
    assert content(layout.target) == new
    assert names_in(tmp_path) == ["ckpt", "ckpt-pruned"]


def test_only_what_a_dead_run_left_counts_as_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of(directory(tmp_path), masked="b")
    assert left_behind(layout.target) is None
    assert left_behind(Path("/")) is None
    with resumable(layout) as output:
        assert left_behind(layout.target) is None
    folder = output.partial_path
    folder.write_text("a file")
    assert left_behind(layout.target) is None
    folder.unlink()
    folder.mkdir()
    (folder / "lock").touch()
    assert left_behind(layout.target) == folder
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert left_behind(layout.target) is None
