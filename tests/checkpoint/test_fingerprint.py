"""Is it still the same input: by name, size, time and header."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sparseprune.checkpoint import open_checkpoint
from sparseprune.checkpoint.file_io import checkpoint_identity, refuse_changed
from sparseprune.checkpoint.header import Header, read_header
from sparseprune.errors import MachineError
from tests.checkpoint.files import ONES, directory, sharded, single, write


def touch(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def grow(path: Path) -> None:
    """Larger by a byte, at the same time."""
    status = path.stat()
    os.truncate(path, status.st_size + 1)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def rewrite(path: Path) -> None:
    """Other bytes in the same file, of the same size and time, as `rsync --inplace -t` writes them."""
    status = path.stat()
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if data else b"")
    while path.stat().st_ctime_ns == status.st_ctime_ns:  # the clock of some file systems is coarse
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(path: Path) -> None:
    """Another file, of the same size and time, as `cp -p` and tar make them."""
    other = path.with_name("other")
    shutil.copy2(path, other)
    other.replace(path)


@pytest.mark.parametrize("make", [directory, sharded, single])
def test_an_input_that_nobody_touched_is_the_same(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path)
    checkpoint = open_checkpoint(path)
    assert checkpoint_identity(checkpoint) == checkpoint_identity(open_checkpoint(path))
    assert len(checkpoint_identity(checkpoint)) == 64
    refuse_changed(checkpoint)


def test_its_identity_does_not_depend_on_where_the_user_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = directory(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert checkpoint_identity(open_checkpoint(Path("ckpt"))) == checkpoint_identity(open_checkpoint(path))


@pytest.mark.parametrize("make", [directory, sharded])
@pytest.mark.parametrize("change", [touch, grow, rewrite, replace])
def test_other_bytes_or_another_time_or_size_of_any_file_is_another_identity(
    tmp_path: Path, make: Callable[[Path], Path], change: Callable[[Path], None]
) -> None:
    path = make(tmp_path)
    seen = {checkpoint_identity(open_checkpoint(path))}
    # A file of the format that grew is no checkpoint any more.
    files = [file for file in path.rglob("*") if file.is_file()]
    broken = {"grow": (".safetensors", ".json"), "rewrite": (".json",)}.get(change.__name__, ())
    files = [file for file in files if file.suffix not in broken]
    for file in files:
        change(file)
        seen.add(checkpoint_identity(open_checkpoint(path)))
    assert len(seen) == 1 + len(files)


def test_another_name_or_header_is_another_identity(tmp_path: Path) -> None:
    path = single(tmp_path)
    first = checkpoint_identity(open_checkpoint(path))
    time = path.stat().st_mtime_ns
    other = path.rename(tmp_path / "n.safetensors")
    assert checkpoint_identity(open_checkpoint(other)) != first
    write(path, [(name.upper(), dtype, shape) for name, dtype, shape in ONES])
    os.utime(path, ns=(time, time))
    assert path.stat().st_size == other.stat().st_size
    assert checkpoint_identity(open_checkpoint(path)) != first


def test_another_file_that_is_gone_is_the_machines_error(tmp_path: Path) -> None:
    path = directory(tmp_path)
    checkpoint = open_checkpoint(path)
    (path / "config.json").unlink()
    with pytest.raises(MachineError, match=r"ckpt/config\.json: cannot be examined: No such file"):
        checkpoint_identity(checkpoint)


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (touch, r"1\.safetensors: changed while it was read: it was written to"),
        (grow, r"1\.safetensors: changed while it was read, from \d+ bytes to \d+"),
        (Path.unlink, r"1\.safetensors: cannot be read any more: No such file"),
    ],
)
def test_a_shard_that_changed_is_refused(tmp_path: Path, change: Callable[[Path], None], fact: str) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path))
    change(tmp_path / "ckpt" / "1.safetensors")
    with pytest.raises(MachineError, match=fact):
        refuse_changed(checkpoint)


def test_a_shard_that_is_written_while_its_header_is_read_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = single(tmp_path)

    def meanwhile(file: Path) -> Header:
        header = read_header(file)
        touch(file)
        return header

    monkeypatch.setattr("sparseprune.checkpoint.source.read_header", meanwhile)
    checkpoint = open_checkpoint(path)
    with pytest.raises(MachineError, match="changed while it was read"):
        refuse_changed(checkpoint)
