"""The safetensors header: bytes to entries and back, refused in one fixed order.

Owns every rule of the format. Accepts what the safetensors package accepts, except in four cases of broken
files: repeated keys, a header that does not begin with `{`, entries that are lists, dtypes that are objects.
Reads no tensor data. Called by source.py and, for new headers, by layout.py.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from sparseprune.checkpoint.documents import MAX_DEPTH, nested_deeper_than, shown, strict_json
from sparseprune.checkpoint.not_safetensors import foreign_format
from sparseprune.checkpoint.remote import RemotePath, located
from sparseprune.engine.dtypes import DTYPES
from sparseprune.errors import CheckpointError, MachineError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

MAX_HEADER = 100_000_000
_LENGTH_BYTES = 8
_ALIGNMENT = 8
_PAGE = 4096
_METADATA = "__metadata__"
_ENTRY_KEYS = ("dtype", "shape", "data_offsets")
_LARGEST = 2**64 - 1
_HEAD = 512  # bytes of a file by which its format is recognised
_REMOTE_HEAD = 1 << 17  # bytes that a store is asked for at first: the headers of most shards are shorter


class TensorEntry(Struct, frozen=True):
    """One tensor of a header; `begin` and `end` are bytes relative to the data section.

    >>> TensorEntry("w", "BF16", (4, 8), 0, 64).numel
    32
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """A header whose entries, in the order of their data, cover the data section without gap or overlap.

    `raw` holds the 8 length bytes and the JSON exactly as stored; it decides equality.
    """

    entries: tuple[TensorEntry, ...] = field(compare=False)
    metadata: Mapping[str, str] = field(compare=False)
    raw: bytes = field(repr=False)

    @property
    def data_begin(self) -> int:
        return len(self.raw)

    @property
    def file_size(self) -> int:
        return len(self.raw) + (self.entries[-1].end if self.entries else 0)


def read_header(path: Path | str) -> Header:
    """The header of a safetensors file; CheckpointError naming the file and the first fact that is wrong.

    The order: no regular file; shorter than 8 bytes; an impossible header length, or no `{` after it (then
    the format of the file, if it is known: a pointer, a page, another format; else length over the limit,
    length beyond the file, no `{`); not UTF-8; not JSON, a repeated key, a number out of range (whichever
    comes first); entry by entry as stored: not an object, a key missing, nested too deeply, dtype, shape,
    data_offsets; in the order of the data: gaps and overlaps; then sizes, overflow included; the file
    truncated or with trailing bytes; metadata that is not strings.
    """
    where = located(path)
    raw, size = _header_bytes(where)
    try:
        document = _document(raw[_LENGTH_BYTES:])
        metadata = document.pop(_METADATA, None)
        shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
        entries = [_entry(*item, shapes) for item in document.items()]
        entries.sort(key=lambda entry: (entry.begin, entry.end))
        _check_cover(entries)
        _check_sizes(entries)
        _check_length(raw, entries, size)
        return Header(tuple(entries), _checked_metadata(metadata), raw)
    except ValueError as error:
        raise CheckpointError(f"{where}: not a valid safetensors file: {error}") from error


def lay_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> Header:
    """The header of a file with these (name, dtype, shape), in this order.

    The JSON is padded with spaces so that the data begins at a multiple of 8. ValueError for a repeated or
    reserved name, and for a sub-byte tensor that does not fill whole bytes.
    """
    entries: list[TensorEntry] = []
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    # Piece by piece: one document of all tensors would take three times the memory.
    text = bytearray(_LENGTH_BYTES)
    text += encode({_METADATA: dict(metadata)} if metadata else {}).encode()[:-1]
    names = {_METADATA}
    begin = 0
    for name, dtype, shape in tensors:
        if name in names:
            raise ValueError(f"tensor name {name!r} is reserved or stands twice")
        names.add(name)
        end = begin + _size_of(name, dtype, shape)
        entries.append(TensorEntry(name, dtype, shape, begin, end))
        value = encode({"dtype": dtype, "shape": shape, "data_offsets": (begin, end)})
        between = "," if len(entries) > 1 or metadata else ""
        text += f"{between}{encode(name)}:{value}".encode()
        begin = end
    text += b"}"
    text += b" " * (-len(text) % _ALIGNMENT)
    text[:_LENGTH_BYTES] = (len(text) - _LENGTH_BYTES).to_bytes(_LENGTH_BYTES, "little")
    return Header(tuple(entries), dict(metadata), bytes(text))


def with_metadata(raw: bytes, old: Mapping[str, str], new: Mapping[str, str]) -> bytes:
    """The bytes of a header with other metadata: `old` is what it has, `new` what it gets.

    The entries stay as stored. Spaces at the end keep the length, or make it longer by whole pages, so that
    the data begins at the same byte of a page: the kernel shares pages between files only then. A header
    that would be longer than the format allows stays as it is.
    """
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    text, before = raw[_LENGTH_BYTES:].rstrip(b" "), f"{{{encode(_METADATA)}:{encode(dict(old))}".encode()
    if text.startswith(before):  # as the safetensors package writes it
        rest = text[len(before) :]
    elif text.startswith(b'{"') and not any(part in text for part in (_METADATA.encode(), b"\\u")):
        rest = b"," + text[1:]
    else:
        entries = strict_json(text.decode())
        entries.pop(_METADATA, None)
        rest = f"{',' if entries else ''}{encode(entries)[1:]}".encode()
    text = f"{{{encode(_METADATA)}:{encode(dict(new))}".encode() + rest
    pages = -(-max(0, _LENGTH_BYTES + len(text) - len(raw)) // _PAGE)
    length = len(raw) - _LENGTH_BYTES + pages * _PAGE
    return raw if length > MAX_HEADER else length.to_bytes(_LENGTH_BYTES, "little") + text.ljust(length)


def _header_bytes(path: Path) -> tuple[bytes, int]:
    """Length bytes and JSON as stored, and the size of the file."""
    try:
        # Before it is opened: opening a pipe would wait for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: not a regular file; give a safetensors file")
        if isinstance(path, RemotePath):
            return _remote_header(path)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(_HEAD)
            end = _LENGTH_BYTES + _checked_length(path, head, size)
            return (head + file.read(max(0, end - len(head))))[:end], size
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except OSError as error:
        raise MachineError(f"{path}: cannot be read: {error.strerror}") from error


def _remote_header(path: RemotePath) -> tuple[bytes, int]:
    """As `_header_bytes`: in one request, and a second one where the header is long."""
    facts = path.facts()
    head = bytes(path.read_part(0, min(_REMOTE_HEAD, facts.nbytes), facts.etag))
    end = _LENGTH_BYTES + _checked_length(path, head[:_HEAD], facts.nbytes)
    rest = path.read_part(len(head), end, facts.etag)
    return (head + bytes(rest))[:end], facts.nbytes


def _checked_length(path: Path, head: bytes, size: int) -> int:
    """The length of the JSON, between 1 and what the file and the format allow."""
    if size < _LENGTH_BYTES:
        raise CheckpointError(
            f"{path}: too short, has {size} bytes; a safetensors file begins with 8 bytes that hold the "
            "length of its header; copy or download it again"
        )
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    if 0 < length <= min(size - _LENGTH_BYTES, MAX_HEADER) and head[_LENGTH_BYTES:][:1] == b"{":
        return length
    # Only now: the first bytes of a pickle or a zip can be the length of a legal header, too.
    known = foreign_format(path.name, head)
    if known is not None:
        raise CheckpointError(f"{path}: not a safetensors file: {known}")
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{path}: header length {length} is more than the {MAX_HEADER} bytes that safetensors allows; "
            "it is no safetensors file"
        )
    if _LENGTH_BYTES + length > size:
        raise CheckpointError(
            f"{path}: header length {length} reaches beyond the file of {size} bytes; the file is truncated "
            "or no safetensors file"
        )
    raise CheckpointError(f"{path}: not a valid safetensors file: the header does not begin with '{{'")


# The functions below raise ValueErrors with the bare fact; read_header adds the file.


def _document(text: bytes) -> dict[str, Any]:
    try:
        document: dict[str, Any] = strict_json(text.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"the header is not UTF-8 at byte {error.start}") from error
    except ValueError as error:
        raise ValueError(f"the header cannot be read: {error}") from error
    return document


def _entry(name: str, fields: object, shapes: dict[tuple[int, ...], tuple[int, ...]]) -> TensorEntry:
    """The entry of a tensor; `shapes` makes equal shapes one tuple, since thousands of tensors have few."""
    if not isinstance(fields, dict):
        raise ValueError(  # noqa: TRY004
            f"tensor {shown(name)} is {_kind(fields)}, wanted an object with {', '.join(_ENTRY_KEYS)}"
        )
    try:
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    except KeyError as error:
        raise ValueError(f"tensor {shown(name)} has no {error}") from error
    if len(fields) > len(_ENTRY_KEYS) and nested_deeper_than(fields, MAX_DEPTH - 1):
        raise ValueError(f"tensor {shown(name)} is nested too deeply")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor {shown(name)} has the unknown dtype {shown(dtype)}")
    if not _is_sizes(shape):
        raise ValueError(f"tensor {shown(name)} has the shape {shown(shape)}, wanted integers from 0 on")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {shown(name)} has the data_offsets {shown(offsets)}, wanted [begin, end]")
    sizes = tuple(shape)
    return TensorEntry(name, DTYPES[dtype].name, shapes.setdefault(sizes, sizes), *offsets)


def _check_cover(entries: list[TensorEntry]) -> None:
    covered = 0
    for entry in entries:
        if entry.begin != covered:
            fact = "leaves a gap after" if entry.begin > covered else "overlaps what ends at"
            place = f"tensor {shown(entry.name)} at bytes {entry.begin} to {entry.end}"
            raise ValueError(f"{place} {fact} byte {covered}")
        covered = entry.end


def _check_sizes(entries: list[TensorEntry]) -> None:
    for entry in entries:
        wanted = _size_of(entry.name, entry.dtype, entry.shape)
        if entry.nbytes != wanted:
            raise ValueError(
                f"tensor {shown(entry.name)}, {entry.dtype} of shape {shown(list(entry.shape))}, needs "
                f"{wanted} bytes; its data_offsets hold {entry.nbytes}"
            )


def _check_length(raw: bytes, entries: list[TensorEntry], size: int) -> None:
    wanted = len(raw) + (entries[-1].end if entries else 0)
    if size < wanted:
        raise ValueError(f"truncated: expected {wanted} bytes, has {size}; copy or download it again")
    if size > wanted:
        raise ValueError(f"{size - wanted} trailing bytes: expected {wanted} bytes, has {size}")


def _size_of(name: str, dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor; refuses 64-bit overflow, as the safetensors package does."""
    numel = 1
    for size in shape:
        numel *= size
        if numel > _LARGEST:
            raise ValueError(f"tensor {shown(name)} has more elements than 64 bits can count")
    bits = numel * DTYPES[dtype].bits
    if bits > _LARGEST:
        raise ValueError(f"tensor {shown(name)} has more bits than 64 bits can count")
    if bits % 8:
        raise ValueError(f"tensor {shown(name)} ({dtype}) has {bits} bits, which do not fill whole bytes")
    return bits // 8


def _checked_metadata(metadata: object) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise ValueError(f"{_METADATA} is {_kind(metadata)}, wanted an object of strings")  # noqa: TRY004
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise ValueError(  # noqa: TRY004
                f"{_METADATA} has {_kind(value)} under {shown(key)}, wanted a string"
            )
    return metadata


def _is_sizes(value: object) -> bool:
    if not isinstance(value, list):
        return False
    for size in value:  # noqa: SIM110  (a generator takes twice as long)
        if type(size) is not int or size < 0:
            return False
    return True


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
