"""Writing at places of many files: right bytes, few open files, none left."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from sparseprune.checkpoint import file_io
from sparseprune.checkpoint.portions import FileWriter
from sparseprune.errors import MachineError
from tests.checkpoint.files import open_files
from tests.faults import failing


def files(at: Path, count: int, size: int = 8) -> list[str]:
    for number in range(count):
        file_io.create(at / str(number), size)
    return [str(at / str(number)) for number in range(count)]


def test_keeps_at_most_16_files_open_and_none_after_the_end(tmp_path: Path) -> None:
    before = open_files()
    paths = files(tmp_path, 40)
    writer = FileWriter()
    for turn in range(2):
        for number, path in enumerate(paths):
            writer.write(path, bytes([number]), turn)
            assert open_files() <= before + 16
    assert open_files() == before + 16
    writer.close()
    assert open_files() == before
    writer.write(paths[0], b"x", 7)
    assert open_files() == before
    assert [Path(path).read_bytes()[:2] for path in paths] == [bytes([n, n]) for n in range(40)]
    assert Path(paths[0]).read_bytes()[7:] == b"x"


def test_opens_a_file_once_for_many_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = files(tmp_path, 1)
    opened: list[str] = []
    really = file_io.open_to_write

    def count(path: Path | str) -> int:
        opened.append(str(path))
        return really(path)

    monkeypatch.setattr(file_io, "open_to_write", count)
    writer = FileWriter()
    for number in range(100):
        writer.write(path, bytes([number]), number % 8)
    writer.close()
    assert opened == [path]


def test_many_threads_write_where_they_should(tmp_path: Path) -> None:
    paths = files(tmp_path, 20, size=64)
    writer = FileWriter()
    with ThreadPoolExecutor(8) as pool:
        places = [(path, place) for place in range(64) for path in paths]
        list(pool.map(lambda at: writer.write(at[0], bytes([at[1]]), at[1]), places))
    writer.close()
    assert all(Path(path).read_bytes() == bytes(range(64)) for path in paths)


def test_a_failed_write_leaves_its_file_closed_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = files(tmp_path, 1)

    monkeypatch.setattr(os, "pwrite", failing(OSError, 5, "Input/output error"))
    writer = FileWriter()
    with pytest.raises(MachineError, match="cannot be written: Input/output"):
        writer.write(path, b"x", 0)
    with pytest.raises(MachineError, match="absent: cannot be written: No such file"):
        writer.write(str(tmp_path / "absent"), b"x", 0)
    writer.close()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.array([True, False]),
        np.array(1.5),
        np.zeros((0, 3), np.int16),
        np.array([1, 2], ">u4").view(np.uint8),
    ],
)
def test_writes_and_fills_arrays_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]
) -> None:
    (path,) = files(tmp_path, 1, size=24)
    owners: list[object] = []
    pwrite = os.pwrite

    def note(descriptor: int, data: memoryview, offset: int) -> int:
        owners.append(data.obj)
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", note)
    writer = FileWriter()
    writer.write(path, array, 0)
    writer.close()
    assert all(owner is array for owner in owners)
    assert Path(path).read_bytes()[: array.nbytes] == array.tobytes()
    filled = np.zeros_like(array)
    descriptor = os.open(path, os.O_RDONLY)
    assert file_io.read_into(descriptor, filled, 0) == array.nbytes
    os.close(descriptor)
    assert filled.tobytes() == array.tobytes()


def test_an_array_with_gaps_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="contiguous"):
        file_io.as_bytes(np.zeros((4, 4))[:, ::2])
