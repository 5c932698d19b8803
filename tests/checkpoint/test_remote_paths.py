"""Addresses do what paths do: names, folders, bytes, and the errors of files that are not there or change."""

import errno
import pickle
from pathlib import Path

import pytest

from sparseprune.checkpoint import remote
from sparseprune.checkpoint.remote import Facts, RemotePath, Store

ROOT = RemotePath("s3://bucket/models")


class Kept(Store):
    """Files in memory; another content has another ETag."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def facts(self, key: str) -> Facts | None:
        data = self.files.get(key)
        return None if data is None else Facts(len(data), f"{hash(data)}")

    def below(self, folder: str) -> dict[str, Facts]:
        inside = [key for key in self.files if key.startswith(f"{folder}/" if folder else "")]
        return {key: facts for key in inside if (facts := self.facts(key)) is not None}

    def read(self, key: str, begin: int, end: int, etag: str = "") -> bytes:
        if etag not in {"", f"{hash(self.files[key])}"}:
            raise OSError(errno.ESTALE, "it changed", key)
        return self.files[key][begin:end]

    def local(self, key: str) -> None:
        """Nothing has a copy."""


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Kept:
    found = Kept(
        {"models/a/config.json": b'{"a": 1}\n', "models/a/x/w.bin": b"0123456789", "models/b.txt": b"b"}
    )
    root = remote._Root(found)
    monkeypatch.setattr(remote, "_opened", lambda _: root)
    return found


def test_folders_list_files_and_folders(store: Kept) -> None:
    assert [str(path) for path in ROOT.iterdir()] == ["s3://bucket/models/a", "s3://bucket/models/b.txt"]
    assert [path.name for path in (ROOT / "a").glob("*.json")] == ["config.json"]
    assert (ROOT / "a").is_dir()
    assert not (ROOT / "a").is_file()
    assert (ROOT / "b.txt").is_file()
    assert (ROOT / "b.txt").exists()
    assert not (ROOT / "c").exists()


def test_a_folder_without_files_is_not_there(store: Kept) -> None:
    for look in (lambda: list((ROOT / "c").iterdir()), (ROOT / "c").stat, (ROOT / "c").read_bytes):
        with pytest.raises(FileNotFoundError):
            look()


def test_files_are_read_whole_and_in_parts(store: Kept) -> None:
    path = ROOT / "a" / "x" / "w.bin"
    assert (path.read_bytes(), path.stat().st_size) == (b"0123456789", 10)
    assert (ROOT / "a/config.json").read_text() == '{"a": 1}\n'
    with path.open("rb") as file:
        assert (file.read(3), file.read()) == (b"012", b"3456789")
    with (ROOT / "a/config.json").open() as file:
        assert file.readline() == '{"a": 1}\n'


def test_folders_are_not_opened_and_nothing_is_written(store: Kept) -> None:
    with pytest.raises(IsADirectoryError):
        (ROOT / "a").open()
    with pytest.raises(OSError, match="Read-only"):
        (ROOT / "b.txt").open("w")


def test_a_file_that_was_written_to_since_it_was_listed_is_read_as_it_is_now(store: Kept) -> None:
    assert (ROOT / "b.txt").is_file()
    store.files["models/b.txt"] = b"longer"
    assert (ROOT / "b.txt").read_bytes() == b"longer"


def test_a_file_that_changes_or_ends_while_it_is_read_is_an_error(store: Kept) -> None:
    path = RemotePath(f"{ROOT}/a/x/w.bin")
    etag = path.facts().etag
    with pytest.raises(OSError, match="Stale") as ended:
        path.fill(8, memoryview(bytearray(5)), etag)
    store.files["models/a/x/w.bin"] = b"other"
    with pytest.raises(OSError, match="it changed") as changed:
        path.fill(0, memoryview(bytearray(5)), etag)
    assert ended.value.errno == changed.value.errno == errno.ESTALE


def test_errors_of_the_store_are_not_hidden(store: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(errno.EACCES, "not you", "b.txt")

    monkeypatch.setattr(store, "read", refuse)
    with pytest.raises(PermissionError):
        (ROOT / "b.txt").read_bytes()


def test_addresses_are_sent_and_joined_as_paths(store: Kept) -> None:
    again = pickle.loads(pickle.dumps(ROOT / "a"))
    assert (again, type(again), again.store) == (ROOT / "a", RemotePath, store)
    assert Path("/scores") == ROOT / "/scores"
    assert str(ROOT / "s3://other/scores") == "s3://other/scores"
    assert (ROOT / "a").samefile("s3://bucket/models/a")
