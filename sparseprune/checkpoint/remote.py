"""Paths of files that are in no file system: in an object store or on the hub, read as pathlib's are.

Owns what such addresses look like, and what a `Store` gives of its files; the stores themselves are modules
of their own, imported when they are used. Errors are OSErrors, as those of local files. Writes nothing.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import io
import os
import re
import stat
import threading
from functools import lru_cache
from pathlib import Path, PosixPath
from typing import TYPE_CHECKING, Any, Protocol

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from _typeshed import ReadableBuffer

FOLDER, _FILE = 0o755, 0o644  # the permissions of what is in no file system
_PART = 4 << 20  # bytes that are read at once of an open file
HUB = "hf"
INSTALL = "pip install 'sparseprune[remote]'"
_ADDRESS = re.compile(r"(?:s3|gs|az|hf):/")  # of a Path, too, which makes one slash of two
# Of a path: scheme and bucket; scheme, organization and model.
_ROOT_PARTS = {"s3": 2, "gs": 2, "az": 2, "hf": 3}


class Facts(Struct, frozen=True):
    """What a store knows of a file without reading it; another `etag` is another content."""

    nbytes: int
    etag: str


class Store(Protocol):
    """Reads the files of one bucket or one model, from any thread; keys are their paths in it.

    A file that is not there is a FileNotFoundError; all else that fails is an OSError whose `strerror` says
    why, and what to do.
    """

    def facts(self, key: str) -> Facts | None:
        """Of one file; None where there is none."""

    def below(self, folder: str) -> Mapping[str, Facts]:
        """Of every file in a folder and the folders in it, by key; "" is the top."""

    def read(self, key: str, begin: int, end: int, etag: str = "") -> ReadableBuffer:
        """The bytes [begin, end) of a file; fewer where it ends before. OSError of ESTALE if it changed."""

    def read_into(self, key: str, begin: int, view: memoryview, etag: str = "") -> int:
        """Fills the beginning of `view` as `read` would, and says how much of it."""
        data = memoryview(self.read(key, begin, begin + len(view), etag)).cast("B")
        view[: len(data)] = data
        return len(data)

    def local(self, key: str) -> Path | None:
        """A whole copy on this machine, fetched now if need be; None where files are read by ranges."""


class _Root:
    """A store and what is known of its files since they were listed, or looked at one by one.

    What is in a listed folder is not asked for again, also if it is nothing, until the folder is listed anew
    or something in it is asked for that was not there.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._known: dict[str, Facts] = {}
        self._listed: set[str] = set()
        self._lock = threading.Lock()

    def list(self, folder: str) -> dict[str, Facts]:
        """Every file below a folder, asked for anew."""
        found = dict(self.store.below(folder))
        with self._lock:
            for key in [key for key in self._known if key == folder or _is_below(key, folder)]:
                del self._known[key]
            self._known |= found
            if found:
                self._listed.add(folder)
            else:
                self._listed -= {one for one in self._listed if one == folder or _is_below(folder, one)}
        return found

    def facts(self, key: str, *, fresh: bool = False) -> Facts | None:
        with self._lock:
            known = None if fresh else self._known.get(key)
            if known is not None or (not fresh and self._is_listed(key)):
                return known
        known = self.store.facts(key)
        with self._lock:
            self._known.pop(key, None)
            if known is not None:
                self._known[key] = known
        return known

    def has_folder(self, folder: str) -> bool:
        """Whether a folder has files; asked for where that is not known."""
        with self._lock:
            if self._is_listed(folder):
                return any(_is_below(key, folder) for key in self._known)
        return bool(self.list(folder))

    def _is_listed(self, key: str) -> bool:
        return any(_is_below(key, folder) for folder in self._listed)


class RemotePath(PosixPath):
    """An address such as `s3://bucket/models/llama`; what reads a local path reads this one as well.

    >>> path = RemotePath("s3://bucket/models") / "llama" / "config.json"
    >>> str(path), path.key, path.name, str(path.parent)
    ('s3://bucket/models/llama/config.json', 'models/llama/config.json', 'config.json', 's3://bucket/models/llama')
    """

    @property
    def scheme(self) -> str:
        return self.parts[0].removesuffix(":")

    @property
    def root_address(self) -> str:
        """The bucket, or the model on the hub: that of which there is one store."""
        return _address(self.parts[: _ROOT_PARTS[self.scheme]])

    @property
    def key(self) -> str:
        """The path inside the bucket or the model."""
        return "/".join(self.parts[_ROOT_PARTS[self.scheme] :])

    @property
    def store(self) -> Store:
        return self._opened_root.store

    @property
    def _opened_root(self) -> _Root:
        return _opened(self.root_address)

    def __str__(self) -> str:
        return _address(self.parts)

    def __fspath__(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __truediv__(self, place: str | os.PathLike[str]) -> Path:  # type: ignore[override]
        found = located(place)
        return found if found.is_absolute() else self.joinpath(found)

    def is_absolute(self) -> bool:
        return True

    def absolute(self) -> RemotePath:
        return self

    def resolve(self, strict: bool = False) -> RemotePath:  # noqa: ARG002, FBT001, FBT002  (pathlib's)
        return self

    def facts(self, *, fresh: bool = False) -> Facts:
        """Of a file, as they were when it was listed, or `fresh`; FileNotFoundError if it is none."""
        found = self._opened_root.facts(self.key, fresh=fresh) if self.key else None
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return found

    def stat(self, *, follow_symlinks: bool = True, fresh: bool = False) -> os.stat_result:  # noqa: ARG002
        """As of a local file that all may read; inode and time of change stand for the content."""
        try:
            found = self.facts(fresh=fresh)
        except FileNotFoundError:
            if not self._opened_root.has_folder(self.key):
                raise
            return os.stat_result((stat.S_IFDIR | FOLDER, 0, 0, 1, 0, 0, 0, 0, 0, 0))
        content = int.from_bytes(hashlib.sha256(found.etag.encode()).digest()[:7], "big") or 1
        status = (stat.S_IFREG | _FILE, content, 0, 1, 0, 0, found.nbytes, 0, 0, 0)
        return os.stat_result(status, {"st_mtime_ns": 0, "st_ctime_ns": content})

    def lstat(self) -> os.stat_result:
        return self.stat()

    def exists(self, *, follow_symlinks: bool = True) -> bool:  # noqa: ARG002
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_file(self, *, follow_symlinks: bool = True) -> bool:  # noqa: ARG002
        try:
            self.facts()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:  # noqa: ARG002
        return bool(self._opened_root.list(self.key))

    def samefile(self, other_path: str | os.PathLike[str]) -> bool:
        return str(self) == os.fspath(other_path)

    def is_symlink(self) -> bool:
        return False

    def below(self) -> dict[str, Facts]:
        """Every file in this folder and the folders in it, by its path from here, asked for anew."""
        skip = len(self.key) + 1 if self.key else 0
        return {key[skip:]: facts for key, facts in sorted(self._opened_root.list(self.key).items())}

    def iterdir(self) -> Generator[RemotePath, None, None]:
        """Files and folders in this one; FileNotFoundError where there are none."""
        names = dict.fromkeys(path.partition("/")[0] for path in self.below())
        if not names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        yield from (self.joinpath(name) for name in names)

    def glob(self, pattern: str, **_: Any) -> Generator[RemotePath, None, None]:  # noqa: ANN401
        """Files and folders in this one whose names fit; a pattern is of one level."""
        names = dict.fromkeys(path.partition("/")[0] for path in self.below())
        return (self.joinpath(name) for name in names if fnmatch.fnmatchcase(name, pattern.rstrip("/")))

    def read_part(self, begin: int, end: int, etag: str = "") -> memoryview:
        """Bytes of the file, fewer where it ends before; OSError of ESTALE if its `etag` changed."""
        return memoryview(self.store.read(self.key, begin, end, etag)).cast("B")

    def fill(self, begin: int, view: memoryview, etag: str = "") -> None:
        """Fills `view` from a byte on; OSError of ESTALE if its `etag` changed or it ends before."""
        if self.store.read_into(self.key, begin, view, etag) < len(view):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self))

    def local(self) -> Path | None:
        """A whole copy on this machine, fetched if need be; None where files are read by ranges."""
        return self.store.local(self.key)

    def read_bytes(self) -> bytes:
        try:
            found = self.facts()
            return bytes(self.read_part(0, found.nbytes, found.etag))
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        found = self.facts(fresh=True)  # it was written to since it was listed
        return bytes(self.read_part(0, found.nbytes, found.etag))

    def read_text(self, encoding: str | None = None, errors: str | None = None, **_: Any) -> str:  # noqa: ANN401
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def open(self, mode: str = "r", *_: Any, encoding: str | None = None, **__: Any) -> Any:  # noqa: ANN401
        """The file for reading, in parts of 4 MiB; OSError of ESTALE where it changes meanwhile."""
        if set(mode) - set("rbt"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        if stat.S_ISDIR(self.stat().st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(self))
        data = io.BufferedReader(_Parts(self, self.facts(fresh=True)))
        return data if "b" in mode else io.TextIOWrapper(data, encoding=encoding or "utf-8")


class _Parts(io.RawIOBase):
    """A file in a store, read on from its beginning."""

    def __init__(self, path: RemotePath, facts: Facts) -> None:
        self._path, self._facts = path, facts
        self._part = memoryview(b"")
        self._end = 0  # of the part

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401
        if not self._part and self._end < self._facts.nbytes:
            begin, self._end = self._end, min(self._end + _PART, self._facts.nbytes)
            self._part = self._path.read_part(begin, self._end, self._facts.etag)
        data, self._part = self._part[: len(buffer)], self._part[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


def located(place: str | os.PathLike[str]) -> Path:
    """The path that a text is, or the address.

    >>> located("s3://bucket/model"), located("models/llama").name
    (RemotePath('s3://bucket/model'), 'llama')
    """
    if isinstance(place, RemotePath):
        return place
    text = os.fspath(place)
    return RemotePath(text) if _ADDRESS.match(text) else Path(place)


def is_on_hub(path: Path) -> bool:
    return isinstance(path, RemotePath) and path.scheme == HUB


def beside(path: Path) -> Path:
    """The absolute path that stands for an input where names of outputs are made from it.

    Beside a model of the hub nothing is written, so that is one in the current folder.

    >>> beside(RemotePath("hf://Qwen/Qwen3-8B@main")) == Path.cwd() / "Qwen3-8B"
    True
    """
    if isinstance(path, RemotePath) and path.scheme == HUB:
        return Path.cwd() / (path.name if path.key else path.name.partition("@")[0])
    return path.absolute()


class _Folder(PosixPath):
    """A local folder from which addresses lead elsewhere, as absolute paths do."""

    def __truediv__(self, place: str | os.PathLike[str]) -> Path:  # type: ignore[override]
        found = located(place)
        return found if found.is_absolute() else Path(self, found)


def folder_of_files(folder: Path) -> Path:
    """A folder whose `/` takes what stands in a file in it: a relative path, an absolute one, or an address.

    >>> folder_of_files(Path("specs")) / "s3://bucket/scores"
    RemotePath('s3://bucket/scores')
    """
    return folder if isinstance(folder, RemotePath) else _Folder(folder)


def forget_stores() -> None:
    """Opens every store anew from now on, with what the environment says then."""
    _opened.cache_clear()


def _address(parts: tuple[str, ...]) -> str:
    return f"{parts[0]}//{'/'.join(parts[1:])}"


def _is_below(key: str, folder: str) -> bool:
    return not folder or key.startswith(f"{folder}/")


@lru_cache(maxsize=64)
def _opened(root_address: str) -> _Root:
    """The store of a bucket or a model, made once: it keeps connections."""
    if root_address.startswith(f"{HUB}:"):
        from sparseprune.checkpoint.hub import HubStore  # noqa: PLC0415

        return _Root(HubStore(root_address))
    from sparseprune.checkpoint.objects import ObjectStore  # noqa: PLC0415

    return _Root(ObjectStore(root_address))
