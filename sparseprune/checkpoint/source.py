"""The reading side: what a checkpoint holds, and the bytes of its tensors.

Owns the types that describe an input and the only code that reads its data. Finding the files is
discovery.py's part. Opens nothing for writing. Called by execution, and by layout.py for the types.
"""

from __future__ import annotations

import errno
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from msgspec import Struct

from sparseprune.checkpoint import discovery, file_io
from sparseprune.checkpoint.codes import with_codes
from sparseprune.checkpoint.documents import leads_nowhere, read_object, read_object_if_any, shown
from sparseprune.checkpoint.file_io import NO_STAMP, ChangedInputError, Stamp, machine_errors
from sparseprune.checkpoint.header import Header, TensorEntry, read_header
from sparseprune.checkpoint.read_ahead import ReadAhead, RemoteTensor
from sparseprune.checkpoint.remote import RemotePath
from sparseprune.engine.dtypes import DTYPES
from sparseprune.errors import CheckpointError, SparsepruneError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from sparseprune.checkpoint.codes import Codes
    from sparseprune.checkpoint.discovery import OtherFile
    from sparseprune.checkpoint.file_io import WritableBytes


_SIDE_BY_SIDE = 16  # headers that a store is asked for at a time
_SMALL = 1 << 20  # bytes of a JSON file that may describe a model


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file as it was when its header was read; its path decides equality.

    `relative` is its place in the checkpoint, and so in an output: `path` may be a link. The data begin at
    byte `data_begin` of `size`. `mode` are its permissions, `digest` is the SHA-256 of its header. A shard
    holds no entries, so that a tensor stays small when it is pickled: see `Checkpoint.headers`.
    """

    path: Path
    relative: PurePosixPath = field(compare=False, repr=False)
    data_begin: int = field(default=0, compare=False, repr=False)
    size: int = field(default=0, compare=False, repr=False)
    stamp: Stamp = field(default=NO_STAMP, compare=False, repr=False)
    mode: int = field(default=0o600, compare=False, repr=False)
    digest: bytes = field(default=b"", compare=False, repr=False)

    @property
    def name(self) -> str:
        return self.path.name


class StoredTensor(Struct, frozen=True):
    """A tensor and the shard that holds it; `offset` counts from the beginning of the shard's file.

    `codes` tells what its elements mean where they are no weights.
    """

    entry: TensorEntry
    shard: Shard
    codes: Codes | None = None

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def dtype(self) -> str:
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def numel(self) -> int:
        return self.entry.numel

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes

    @property
    def holds(self) -> Literal["weights", "codes", "packed"]:
        """What its elements are; "packed" where one is not one code."""
        return "weights" if self.codes is None else "packed" if self.codes.packed else "codes"

    @property
    def is_counted(self) -> bool:
        """Whether it is known of each element whether it is zero: whole bytes, and no packed codes."""
        is_whole = DTYPES[self.entry.dtype].zero_bits is not None
        return is_whole and (self.codes is None or self.codes.is_counted)

    @property
    def offset(self) -> int:
        return self.shard.data_begin + self.entry.begin


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of which all headers were read and no data; every tensor counts in exactly one shard.

    `tensors` are in the order in which their data is read best: shard by shard, by offset. Where several
    shards hold a tensor, the one counts that the index names (see `counted`). An output copies
    `others`, the `index` among them where there is one, but not `left_out`, which hold the same weights in
    another form. `folders` has the permissions of every folder with files in it, and of the checkpoint's own.
    """

    path: Path
    headers: Mapping[Shard, Header] = field(repr=False)
    is_directory: bool
    others: tuple[OtherFile, ...]
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    index: PurePosixPath | None = None
    left_out: tuple[OtherFile, ...] = ()
    folders: Mapping[PurePosixPath, int] = field(default_factory=dict, repr=False)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Its safetensors files, by name."""
        return tuple(self.headers)

    def counted(self, shard: Shard) -> Iterator[TensorEntry]:
        """The tensors of a shard, by offset, without those that the index has in another one."""
        tensors = self.tensors
        return (entry for entry in self.headers[shard].entries if tensors[entry.name].shard == shard)


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a safetensors file or a directory: a single file, or shards with their index.

    CheckpointError where it is not a checkpoint or contradicts itself, MachineError where it cannot be read.
    """
    if not discovery.is_folder(path):
        headers = dict([open_shard(path)])
        tensors = _coded(_tensors(headers, {}), path.parent)
        return Checkpoint(path, headers, is_directory=False, others=(), tensors=tensors)
    found = discovery.find_files(path)
    headers = dict(open_shards(path, found.shards))
    tensors = _coded(_tensors(headers, found.weight_map), path)
    _check_index(path, found, tensors)
    with machine_errors(path, "cannot be read"):
        copies = discovery.copies_of_weights(path, found, lambda file: _has_same(path / file, tensors))
    return Checkpoint(
        path,
        headers,
        is_directory=True,
        others=tuple(other for other in found.others if other.path not in copies),
        tensors=tensors,
        index=found.index,
        left_out=tuple(other for other in found.others if other.path in copies),
        folders=found.folders,
    )


def open_unnamed(path: Path, places: Iterable[PurePosixPath], of: Checkpoint) -> Checkpoint:
    """The checkpoint of which these shards and no index are there yet, made from another one."""
    headers = dict(open_shards(path, places))
    weight_map = {name: stored.shard.relative for name, stored in of.tensors.items()}
    tensors = _coded(_tensors(headers, weight_map), path)
    return Checkpoint(path, headers, is_directory=True, others=(), tensors=tensors)


def _has_same(path: Path, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether most elements of a file are in tensors with these names and shapes; masks do not count."""
    try:
        entries = read_header(path).entries
    except SparsepruneError:
        return False  # an unreadable file is copied like any other
    same = sum(
        entry.numel
        for entry in entries
        if entry.dtype != "BOOL" and entry.name in tensors and tensors[entry.name].shape == entry.shape
    )
    return 2 * same > sum(entry.numel for entry in entries)


def read_config(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """The config.json in a checkpoint's directory or beside its file; None if there is none."""
    home = checkpoint.path if checkpoint.is_directory else checkpoint.path.parent
    config = read_object_if_any(home / "config.json")
    return None if config is None else MappingProxyType(config)


def read_beside(checkpoint: Checkpoint) -> dict[str, Mapping[str, Any]]:
    """The small JSON objects beside a directory's config.json, by the names of their files."""
    found: dict[str, Mapping[str, Any]] = {}
    for other in checkpoint.others:
        path = other.path
        is_small = path.suffix == ".json" and len(path.parts) == 1 and other.nbytes <= _SMALL
        if is_small and path.name != "config.json" and path != checkpoint.index:
            try:
                found[path.name] = read_object(checkpoint.path / path)
            except CheckpointError:
                continue  # it is copied unread
    return found


class Source(Protocol):
    """Where bytes of tensors are read, from any thread; `TensorReader` reads local files."""

    def read(self, stored: StoredTensor, begin: int = 0, end: int | None = None) -> bytearray:
        """The bytes [begin, end) of a tensor, all of it by default; ValueError outside of it."""
        stop = stored.nbytes if end is None else end
        _check_part(stored, begin, stop)
        data = bytearray(stop - begin)
        self.read_into(stored, begin, data)
        return data

    def read_into(self, stored: StoredTensor, begin: int, buffer: WritableBytes) -> None:
        """Fills a contiguous buffer, such as a numpy array, with a tensor's bytes from `begin` on.

        ValueError where it reaches outside of the tensor.
        """

    def close(self) -> None:
        """Frees what is open; reads that are under way still end well."""


class TensorReader(Source):
    """The Source of local files, of which a few stay open, for reading only, and of files in stores.

    A context manager: leaving it closes the files. A shard that is not the file of which the header was
    read, or has another length, is a ChangedInputError, every error of the disk or store a MachineError.
    """

    def __init__(self) -> None:
        self._files = file_io.OpenFiles(_opened)
        self._etags: dict[Shard, str | None] = {}  # None for those of which there is a local copy
        self._ahead = ReadAhead()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._files.close()
        self._ahead.close()

    def read_into(self, stored: StoredTensor, begin: int, buffer: WritableBytes) -> None:
        view = file_io.as_bytes(buffer)
        _check_part(stored, begin, begin + len(view))
        offset = stored.offset + begin
        if isinstance(stored.shard.path, RemotePath):
            etag = self._etag(stored.shard, stored.shard.path)
            if etag is not None:
                first = stored.offset
                tensor = RemoteTensor(stored.shard.path, etag, first, first + stored.nbytes)
                with file_io.remote_errors(stored.shard.path):
                    self._ahead.read_into(tensor, begin, view)
                return
        with machine_errors(stored.shard.path, "cannot be read"), self._files.use(stored.shard) as descriptor:
            done = file_io.read_into(descriptor, view, offset)
        if done < len(view):
            raise _truncated(stored.shard.path, offset + done, stored.shard.size)

    def _etag(self, shard: Shard, path: RemotePath) -> str | None:
        """Of the content of which the header was read, by ranges; None where a local copy is read."""
        if shard not in self._etags:
            with file_io.remote_errors(path):
                found = None if path.local() is not None else path.facts().etag
                if found is not None and file_io.replaced(shard.stamp, file_io.stamp_of(path.stat())):
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            self._etags[shard] = found
        return self._etags[shard]


def open_shards(folder: Path, places: Iterable[PurePosixPath]) -> list[tuple[Shard, Header]]:
    """As `open_shard`, for files in a folder, in this order; in a store many at a time."""
    if not isinstance(folder, RemotePath):
        return [open_shard(folder / place, place) for place in places]
    with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
        return list(pool.map(lambda place: open_shard(folder / place, place), places))


def open_shard(path: Path, relative: PurePosixPath | None = None) -> tuple[Shard, Header]:
    """A safetensors file and its header, `relative` its name by default; errors as `open_checkpoint`."""
    stamp, mode = NO_STAMP, 0
    try:
        # Before the header is read, so that a change meanwhile is noticed later.
        status = path.stat()
        stamp, mode = file_io.stamp_of(status), file_io.permissions(status)
    except OSError as error:  # read_header reports any other one
        refusal = leads_nowhere(path, error)
        if refusal is not None:
            raise refusal from error
    header = read_header(path)
    digest = hashlib.sha256(header.raw).digest()
    place = relative or PurePosixPath(path.name)
    return Shard(path, place, header.data_begin, header.file_size, stamp, mode, digest), header


def _check_part(stored: StoredTensor, begin: int, end: int) -> None:
    if not 0 <= begin <= end <= stored.nbytes:
        raise ValueError(f"bytes {begin} to {end} of {stored.name!r}, which has {stored.nbytes}")


def _opened(shard: Shard) -> int:
    with machine_errors(shard.path, "cannot be read any more"):  # its header was read before
        copy = shard.path.local() if isinstance(shard.path, RemotePath) else None
        descriptor = os.open(copy or shard.path, os.O_RDONLY | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    size, wanted = status.st_size, shard.size
    if size == wanted and (copy or not file_io.replaced(shard.stamp, file_io.stamp_of(status))):
        return descriptor
    os.close(descriptor)
    if size == wanted:
        raise ChangedInputError(f"{shard.path}: another file has taken its place while it was read")
    if size < wanted:
        raise _truncated(shard.path, size, wanted)
    raise ChangedInputError(f"{shard.path}: file grew while it was read, from {wanted} bytes to {size}")


def _truncated(path: Path, size: int, wanted: int) -> ChangedInputError:
    return ChangedInputError(
        f"{path}: file was truncated while it was read: it ends at byte {size}, had {wanted}"
    )


def _tensors(
    headers: Mapping[Shard, Header], weight_map: Mapping[str, PurePosixPath]
) -> dict[str, StoredTensor]:
    """Every tensor once: of those in several shards the one where the index has it."""
    tensors: dict[str, StoredTensor] = {}
    for shard, header in headers.items():
        for entry in header.entries:
            other, place = tensors.get(entry.name), weight_map.get(entry.name)
            if other is not None and place is None:
                raise CheckpointError(
                    f"{shard.path}: tensor {shown(entry.name)} is also in {other.shard.name}; keep it in "
                    "one shard, or add an index that names the one to use"
                )
            if other is None or place == shard.relative:
                tensors.pop(entry.name, None)  # so that it comes in the order of its shard
                tensors[entry.name] = StoredTensor(entry, shard)
    return tensors


def _coded(tensors: Mapping[str, StoredTensor], home: Path) -> Mapping[str, StoredTensor]:
    """The tensors with what their codes mean; a config.json that cannot be read says nothing of that."""

    def config() -> Mapping[str, Any] | None:
        with suppress(SparsepruneError):
            return read_object_if_any(home / "config.json")
        return None

    return MappingProxyType(with_codes(tensors, config))


def _check_index(path: Path, found: discovery.FoundFiles, tensors: Mapping[str, StoredTensor]) -> None:
    """Every tensor that the index names is in the shard where the index says it is."""
    for name, place in found.weight_map.items():
        stored = tensors.get(name)
        if stored is None or stored.shard.relative != place:
            fact = "which does not hold it" if stored is None else f"but it is in {stored.shard.relative}"
            raise CheckpointError(
                f"{path / str(found.index)}: names tensor {shown(name)} in {place}, {fact}; "
                "copy or download the checkpoint again"
            )
