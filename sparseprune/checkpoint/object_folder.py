"""Objects below one address of an object store: written whole, in pieces, or only where nobody else did.

Owns the calls of obstore that write and what their errors become. Knows no layout and no run. Called by
remote_output.py and remote_run.py; objects are read by the store that `RemotePath` has.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from sparseprune.checkpoint.file_io import as_bytes, machine_errors
from sparseprune.checkpoint.objects import ObjectStore, store_errors
from sparseprune.checkpoint.remote import Facts
from sparseprune.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from sparseprune.checkpoint.file_io import Bytes
    from sparseprune.checkpoint.remote import RemotePath

Mark = dict[str, str]
"""One version of one object, as its store tells versions apart."""
_ALL_AT_ONCE = 1000
_OTHER = "give a local folder, or one in s3://, gs:// or az:// with -o"


class ObjectFolder:
    """The objects below an address, by their paths from there. Errors of the store are MachineErrors."""

    def __init__(self, address: RemotePath) -> None:
        self.address = address
        with machine_errors(address):
            store = address.store
        if not isinstance(store, ObjectStore):
            raise CheckpointError(f"{address}: cannot be written to; {_OTHER}")
        self._bucket = store.bucket
        self._prefix = f"{address.key}/" if address.key else ""

    def put(self, name: str, data: Bytes) -> Facts:
        """A small object, which replaces what is there."""
        view = as_bytes(data)
        with self._told(name):
            done = _obstore().put(self._bucket, self._prefix + name, view, use_multipart=False)
        return Facts(len(view), done["e_tag"] or "")

    def send(self, name: str, pieces: Iterator[Bytes], part_bytes: int, side_by_side: int) -> Facts:
        """A large one in pieces of `part_bytes`, the last one shorter; nothing is left if `pieces` fails."""
        nbytes = 0

        def counted() -> Iterator[Bytes]:
            nonlocal nbytes
            for piece in pieces:
                nbytes += len(as_bytes(piece))
                yield piece

        with self._told(name):
            done = _obstore().put(
                self._bucket,
                self._prefix + name,
                counted(),
                use_multipart=True,
                chunk_size=part_bytes,
                max_concurrency=side_by_side,
            )
        return Facts(nbytes, done["e_tag"] or "")

    def create(self, name: str, data: bytes) -> Mark | None:
        """A new object; None where there is one already."""
        with self._told(name):
            try:
                return _mark(_obstore().put(self._bucket, self._prefix + name, data, mode="create"))
            except _errors().AlreadyExistsError:
                return None

    def replace(self, name: str, data: bytes, mark: Mark) -> Mark | None:
        """Another content of this version of an object; None where it is no longer the one that is there."""
        with self._told(name):
            try:
                return _mark(_obstore().put(self._bucket, self._prefix + name, data, mode=mark))
            except (_errors().PreconditionError, FileNotFoundError):
                return None

    def read(self, name: str) -> tuple[bytes, Mark] | None:
        """A small object and its version; None where there is none."""
        with self._told(name, "cannot be read"):
            try:
                found = _obstore().get(self._bucket, self._prefix + name)
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise
                return None
            return bytes(found.bytes()), _mark(found.meta)

    def facts(self, name: str) -> Facts | None:
        """Of one object; None where there is none."""
        with self._told(name, "cannot be read"):
            try:
                return _facts(_obstore().head(self._bucket, self._prefix + name))
            except FileNotFoundError:
                return None

    def below(self, name: str = "") -> dict[str, Facts]:
        """Every object in a folder of this one, or in this one, by its path from here."""
        prefix = self._prefix + (f"{name}/" if name else "")
        found = {}
        with self._told(name, "cannot be listed"):
            for some in _obstore().list(self._bucket, prefix=prefix or None):
                for one in some:
                    if one["path"].startswith(prefix):
                        found[one["path"][len(self._prefix) :]] = _facts(one)
        return found

    def delete(self, names: Iterable[str]) -> None:
        """These objects, of which some may be gone already."""
        wanted = sorted(names)
        for first in range(0, len(wanted), _ALL_AT_ONCE):
            some = wanted[first : first + _ALL_AT_ONCE]
            with self._told(some[0], "cannot be removed"):
                try:
                    _obstore().delete(self._bucket, [self._prefix + name for name in some])
                except FileNotFoundError:
                    # Some stores end there.
                    for name in some:
                        with suppress(FileNotFoundError):
                            _obstore().delete(self._bucket, self._prefix + name)

    @contextmanager
    def _told(self, name: str, doing: str = "cannot be written") -> Iterator[None]:
        key = self._prefix + name
        with machine_errors(self.address / name, doing), store_errors(self.address.root_address, key):
            yield


def _mark(found: Mapping[str, Any]) -> Mark:
    return {one: found[one] for one in ("e_tag", "version") if found.get(one)}


def _facts(found: Mapping[str, Any]) -> Facts:
    return Facts(found["size"], found["e_tag"] or "")


def _obstore() -> Any:  # noqa: ANN401
    import obstore  # noqa: PLC0415  (an extra)

    return obstore


def _errors() -> Any:  # noqa: ANN401
    import obstore.exceptions  # noqa: PLC0415  (as above)

    return obstore.exceptions
