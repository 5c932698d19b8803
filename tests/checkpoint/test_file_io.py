"""Moving bytes: short steps, kernels that will not copy, sources that end too early."""

import errno
import os
from pathlib import Path

import pytest

from sparseprune.checkpoint import file_io
from sparseprune.errors import MachineError
from tests.faults import failing

DATA = bytes(range(256)) * 8


def two_files(at: Path) -> tuple[Path, Path]:
    (at / "from").write_bytes(DATA)
    (at / "to").write_bytes(bytes(len(DATA)))
    return at / "from", at / "to"


def check_copies(at: Path) -> None:
    for begin, offset, length in ((0, 0, len(DATA)), (3, 17, 1000), (5, 0, 0), (len(DATA) - 1, 9, 1)):
        source, file = two_files(at)
        file_io.copy_range(source, begin, file, offset, length)
        wanted = bytearray(len(DATA))
        wanted[offset : offset + length] = DATA[begin : begin + length]
        assert file.read_bytes() == wanted


def test_copies_ranges(tmp_path: Path) -> None:
    check_copies(tmp_path)


REFUSALS = "EBADF EOVERFLOW EIO EACCES EXDEV EINVAL ENOSYS EPERM ETXTBSY EOPNOTSUPP EISDIR ENOMEM".split()


@pytest.mark.parametrize("name", REFUSALS)
def test_copies_by_hand_where_the_kernel_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    number = getattr(errno, name)

    monkeypatch.setattr(os, "copy_file_range", failing(OSError, number, os.strerror(number)))
    check_copies(tmp_path)


@pytest.mark.parametrize("broken", ["pread", "pwrite"])
def test_a_disk_that_is_broken_is_told_by_the_copy_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*args: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    source, file = two_files(tmp_path)
    monkeypatch.setattr(os, "copy_file_range", fail)
    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(MachineError if broken == "pread" else OSError, match="Input/output error"):
        file_io.copy_range(source, 0, file, 0, 9)


def test_copies_where_there_is_no_kernel_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "copy_file_range")
    check_copies(tmp_path)


def test_copies_where_the_kernel_says_that_there_is_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "copy_file_range", lambda *args: 0)
    check_copies(tmp_path)


def test_puts_short_copies_reads_and_writes_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, pread, pwrite = os.copy_file_range, os.pread, os.pwrite
    calls: list[int] = []

    def copy_seven_then_refuse(reading: int, writing: int, length: int, begin: int, offset: int) -> int:
        calls.append(length)
        if len(calls) % 3 == 0:
            raise OSError(errno.EXDEV, "")
        return kernel(reading, writing, min(length, 7), begin, offset)

    monkeypatch.setattr(os, "copy_file_range", copy_seven_then_refuse)
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: pread(fd, min(length, 100), offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:33], offset))
    check_copies(tmp_path)


@pytest.mark.parametrize("kernel", [True, False])
def test_a_source_that_ends_too_early_is_the_machines_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: bool
) -> None:
    if not kernel:
        monkeypatch.delattr(os, "copy_file_range")
    source, file = two_files(tmp_path)
    with pytest.raises(
        MachineError, match="from: file was truncated while it was read: it ends at byte 2048, w"
    ):
        file_io.copy_range(source, 2000, file, 0, 49)
    source.unlink()
    with pytest.raises(MachineError, match="from: cannot be read: No such file"):
        file_io.copy_range(source, 0, file, 0, 1)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_errors_of_the_kernel_that_are_no_refusal_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:

    monkeypatch.setattr(os, "copy_file_range", failing(OSError, number, os.strerror(number)))
    source, file = two_files(tmp_path)
    with pytest.raises(OSError, match=os.strerror(number)):
        file_io.copy_range(source, 0, file, 0, 1)


def test_makes_a_file_of_its_final_size(tmp_path: Path) -> None:
    file_io.create(tmp_path / "x", 6, b"ab", 0o700)
    assert (tmp_path / "x").read_bytes() == b"ab\0\0\0\0"
    assert os.access(tmp_path / "x", os.X_OK)
    file_io.overwrite(tmp_path / "x", memoryview(b"cd"), 3)
    assert (tmp_path / "x").read_bytes() == b"ab\0cd\0"
    with pytest.raises(FileExistsError):
        file_io.create(tmp_path / "x", 1)


def test_never_follows_a_link_when_it_writes(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"1234")
    (tmp_path / "link").symlink_to("secret")
    (tmp_path / "nowhere").symlink_to("absent")
    source, _ = two_files(tmp_path)
    with pytest.raises(OSError, match="symbolic link"):
        file_io.overwrite(tmp_path / "link", b"x", 0)
    with pytest.raises(OSError, match="symbolic link"):
        file_io.copy_range(source, 0, tmp_path / "link", 0, 1)
    for name in ("link", "nowhere"):
        with pytest.raises(FileExistsError):
            file_io.create(tmp_path / name, 1)
    assert (tmp_path / "secret").read_bytes() == b"1234"
    assert not (tmp_path / "absent").exists()


def test_writes_items_of_any_width_as_bytes(tmp_path: Path) -> None:
    file_io.create(tmp_path / "x", 8)
    file_io.overwrite(tmp_path / "x", memoryview(b"abcdefgh").cast("I"), 0)
    assert (tmp_path / "x").read_bytes() == b"abcdefgh"


def test_closes_what_it_opened(tmp_path: Path) -> None:
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    check_copies(tmp_path)
    file_io.sync(tmp_path)
    with pytest.raises(OSError, match="No such file"):
        file_io.overwrite(tmp_path / "absent", b"", 0)
    source, _ = two_files(tmp_path)
    with pytest.raises(OSError, match="No such file"):
        file_io.copy_range(source, 0, tmp_path / "absent", 0, 1)
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) == before
