"""Headers: every refusal beside its legal neighbour, in one order, in short words."""

import json
import os
import socket
from pathlib import Path

import pytest

from sparseprune.checkpoint import lay_out
from sparseprune.checkpoint.header import TensorEntry, read_header, with_metadata
from sparseprune.errors import CheckpointError, MachineError
from tests.checkpoint.headers import STRICTER, file_of, refusal, tensor, verdict_of_package
from tests.faults import failing

PICKLE = b"\x80\x02}q\x00(X\x01\x00\x00\x00a"
ONE = file_of({"a": tensor()}, b"1")
LEGAL = {
    "an empty header": file_of({}),
    "padding": file_of(b"{} \t\r\n   "),
    "no metadata": ONE,
    "null metadata": file_of({"__metadata__": None, "a": tensor()}, b"1"),
    "metadata": file_of({"__metadata__": {"b": "1", "a": "\U0001f600"}, "a": tensor()}, b"1"),
    "an unknown key": file_of({"a": tensor(note={"x": [1, 2.5e300, None]})}, b"1"),
    "offsets out of the order of names": file_of({"b": tensor(offsets=[1, 2]), "a": tensor()}, b"12"),
    "unaligned data": file_of({"z": tensor(), "a": tensor("F32", [1], [1, 5])}, b"12345"),
    "a scalar": file_of({"a": tensor("BF16", [], [0, 2])}, b"12"),
    "an empty tensor of endless width": file_of({"a": tensor(shape=[0, 2**64 - 1, 2], offsets=[0, 0])}),
    "empty tensors that tie": file_of(
        {"b": tensor(shape=[0], offsets=[0, 0]), "a": tensor(shape=[0, 3], offsets=[0, 0])}
    ),
    "an empty name": file_of({"": tensor()}, b"1"),
    "a name with NUL and quotes": file_of({'a\0"\n': tensor()}, b"1"),
    "escapes": file_of(b'{"\\u0061\\\\ud800":{"dty\\u0070e":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
    "a surrogate pair": file_of(b'{"\\ud83d\\uDe00":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
    "four bits twice": file_of({"a": tensor("F4", [2])}, b"1"),
    "six bits four times": file_of({"a": tensor("F6_E2M3", [4], [0, 3])}, b"123"),
    "depth 127": file_of(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":%s%s}}' % (b"[" * 125, b"]" * 125), b"1"
    ),
    "a pickle's first bytes as the length": file_of(b"{}" + b" " * (0x0280 - 2)),
}
# In the fixed order of the checks.
REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "too short, has 0 bytes"),
    "seven bytes": (b"1234567", "too short, has 7 bytes"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "git lfs pull"),
    "a web page": (b"\n <!DOCTYPE html><html>", "an HTML page"),
    "a page with a byte order mark": (b"\xef\xbb\xbf<html lang='en'>", "an HTML page"),
    "a page behind a comment": (b"<!-- saved -->\n<!---->" + b"<!-- -->" * 50 + b"<HTML>", "an HTML page"),
    "a page behind an XML prologue": (b'<?xml version="1.0"?>\n<!DOCTYPE html PUBLIC "x">', "an HTML page"),
    "comments without a page": (b"<!-- -->" * 64, "a text that begins '<!-- --><!-- -->"),
    "a server's XML": (b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>',
        "a text that begins '<?xml version="),
    "a server's JSON": (b'{"error":"Repository not found"}',
        """a text that begins '{"error":"Repository not found"}', perhaps a server's answer"""),
    "a server's words": ("Accès refusé".encode(), "a text that begins 'Accès refusé', perhaps"),
    "a text cut inside a character": (b"x" * 511 + "é".encode(), f"'{'x' * 60}...', perhaps"),
    "bytes that are no text": (b"abcdefghij\xff\xff", "more than the 100000000 bytes"),
    "text with a NUL": (b"abcdefghij\0", "more than the 100000000 bytes"),
    "gzip": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", "a gzip archive; unpack it"),
    "tar": (b"model.safetensors".ljust(257, b"\0") + b"ustar\x0000", "a tar archive; unpack it"),
    "numpy": (b"\x93NUMPY\x01\x00v\x00{'descr'", "a numpy array"),
    "a pickle": (PICKLE, "torch.save); pickles can run code"),
    "a zip": (b"PK\x03\x04\x00\x00\x08\x08abc", "safetensors.torch.save_file"),
    "another format": (b"GGUF\x03\x00\x00\x00\x00\x00", "a GGUF file"),
    "a header too long": ((100_000_001).to_bytes(8, "little") + b"{}", "more than the 100000000 bytes"),
    "a header beyond the file": ((3).to_bytes(8, "little") + b"{}", "reaches beyond the file of 10 bytes"),
    "no header": (bytes(8) + b"{}", "does not begin with '{'"),
    "a list": (file_of([]), "does not begin with '{'"),
    "a byte order mark": (file_of(b"\xef\xbb\xbf{}"), "does not begin with '{'"),
    "not UTF-8": (file_of(b'{"\xff":1}'), "not UTF-8 at byte 2"),
    "a half JSON": (file_of(b'{"a":'), "not JSON"),
    "something after the JSON": (file_of(b"{}\0"), "not JSON: Extra data"),
    "NaN": (file_of(b'{"a":NaN}'), "NaN is no JSON value"),
    "a number out of range": (file_of(b'{"a":1e999}'), "out of range"),
    "an integer out of range": (file_of(b'{"a":%s}' % (b"9" * 5000)), "out of range"),
    "a lone surrogate": (file_of(b'{"__metadata__":{"a":"\\ud800"}}'), "lone surrogate"),
    "a line break in a string": (file_of(b'{"__metadata__":{"a":"\n"}}'), "control character"),
    "endless nesting": (file_of(b'{"a":%s%s}' % (b"[" * 9000, b"]" * 9000)), "not a valid safetensors file"),
    "a metadata key twice": (file_of(b'{"__metadata__":{},"__metadata__":{}}'),
        "'__metadata__' stands twice"),
    "a dtype twice": (file_of(b'{"a":{"dtype":"U8","dtype":"U8"}}'), "'dtype' stands twice"),
    "an entry that is null": (file_of({"a": None}), "'a' is null, wanted an object"),
    "an entry without dtype": (file_of({"a": {"shape": [1], "data_offsets": [0, 1]}}, b"1"), "no 'dtype'"),
    "an entry without shape": (file_of({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, b"1"), "no 'shape'"),
    "an entry without offsets": (file_of({"a": {"dtype": "U8", "shape": [1]}}, b"1"), "no 'data_offsets'"),
    "depth 128": (
        file_of(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":%s%s}}' % (b"[" * 126, b"]" * 126), b"1"
        ),
        "nested too deeply",
    ),
    "an unknown dtype": (file_of({"a": tensor("F7")}, b"1"), "unknown dtype 'F7'"),
    "a dtype in small letters": (file_of({"a": tensor("u8")}, b"1"), "unknown dtype 'u8'"),
    "no dtype": (file_of({"a": tensor(None)}, b"1"), "unknown dtype None"),
    "a negative size": (file_of({"a": tensor(shape=[-1])}, b"1"), "has the shape [-1]"),
    "minus zero": (file_of(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'),
        "has the shape [-0.0]"),
    "a fraction": (file_of({"a": tensor(shape=[1.0])}, b"1"), "has the shape [1.0]"),
    "a truth value": (file_of({"a": tensor(shape=[True])}, b"1"), "has the shape [True]"),
    "a size above 64 bits": (file_of({"a": tensor(shape=[2**64])}, b"1"), "wanted integers from 0 on"),
    "a shape that is a number": (file_of({"a": tensor(shape=1)}, b"1"), "has the shape 1"),
    "three offsets": (file_of({"a": tensor(offsets=[0, 1, 2])}, b"1"), "data_offsets [0, 1, 2]"),
    "offsets backwards": (file_of({"a": tensor(offsets=[1, 0])}, b"1"), "data_offsets [1, 0]"),
    "a gap": (file_of({"a": tensor(offsets=[1, 2])}, b"12"), "leaves a gap after byte 0"),
    "an overlap": (
        file_of({"a": tensor(shape=[2], offsets=[0, 2]), "b": tensor(shape=[2], offsets=[1, 3])}, b"123"),
        "overlaps",
    ),
    "an empty tensor inside another": (
        file_of({"a": tensor(shape=[2], offsets=[0, 2]), "b": tensor(shape=[0], offsets=[1, 1])}, b"12"),
        "overlaps what ends at byte 2",
    ),
    "an endless shape": (file_of({"a": tensor(shape=[2**63, 2])}, b"1"), "more elements than 64 bits"),
    "an endless shape times nothing": (file_of({"a": tensor(shape=[2**63, 2, 0], offsets=[0, 0])}),
        "more elements"),
    "endless bits": (file_of({"a": tensor(shape=[2**61])}, b"1"), "more bits than 64 bits"),
    "half a byte": (file_of({"a": tensor("F4", [1])}, b"1"), "do not fill whole bytes"),
    "a size that is not shape times dtype": (file_of({"a": tensor("F16", [1])}, b"1"),
        "needs 2 bytes; its data_offsets hold 1"),
    "a truncated file": (file_of({"a": tensor(shape=[2], offsets=[0, 2])}, b"1"), "truncated: expected "),
    "trailing bytes": (ONE + b"12", "2 trailing bytes"),
    "metadata that is a list": (file_of({"__metadata__": []}), "is a list, wanted an object of strings"),
    "metadata that is a number": (file_of({"__metadata__": {"a": 1}}), "has a number under 'a'"),
}  # fmt: skip


@pytest.mark.parametrize("content", LEGAL.values(), ids=LEGAL)
def test_reads_what_is_legal(tmp_path: Path, content: bytes) -> None:
    assert refusal(tmp_path, content) is None
    assert verdict_of_package(content)


@pytest.mark.parametrize(("content", "fragment"), REFUSED.values(), ids=REFUSED)
def test_refuses_with_the_fact(tmp_path: Path, content: bytes, fragment: str) -> None:
    assert fragment in (refusal(tmp_path, content) or "")
    assert not verdict_of_package(content)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        (b' {"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', "does not begin with '{'"),
        (
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            "'a' stands twice",
        ),
        (
            b'{"__metadata__":{"k":"1","k":"2"},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            "'k' stands twice",
        ),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1,"x":2}}', "'x' stands twice"),
        (b'{"a":["U8",[1],[0,1]]}', "is a list, wanted an object"),
        (b'{"a":{"dtype":{"U8":null},"shape":[1],"data_offsets":[0,1]}}', "unknown dtype {'U8': None}"),
    ],
)
def test_is_stricter_than_the_package_where_a_file_is_ambiguous_or_breaks_the_format(
    tmp_path: Path, text: bytes, fragment: str
) -> None:
    content = file_of(text, b"1")
    assert verdict_of_package(content)
    assert fragment in (refusal(tmp_path, content) or "")
    assert any(known in (refusal(tmp_path, content) or "") for known in STRICTER)


def broken(faults: set[str]) -> bytes:
    """A file with all of these faults at once, as far as a file can have them together."""
    entries: list[str] = []

    def entry(fault: str, text: str) -> None:
        if fault in faults:
            entries.append(text)

    entry("stands twice", '"k":{"x":1,"x":1}')
    entry("is null, wanted an object", '"n":null')
    entry("no 'dtype'", '"e":{"shape":[1],"data_offsets":[0,1]}')
    entry("nested too deeply", f'"d":{json.dumps(tensor())[:-1]},"x":{"[" * 126}{"]" * 126}}}')
    entry("unknown dtype", f'"u":{json.dumps(tensor("F7"))}')
    entry("has the shape", f'"s":{json.dumps(tensor(shape=[-1]))}')
    entry("has the data_offsets", f'"o":{json.dumps(tensor(offsets=[1, 0]))}')
    entry("leaves a gap", f'"g":{json.dumps(tensor(offsets=[100, 101]))}')
    entry("needs 2 bytes", f'"w":{json.dumps(tensor("F16"))}')
    entry("wanted an object of strings", '"__metadata__":[]')
    whole = {"needs 2 bytes", "leaves a gap"} & faults
    if not whole:
        entries.append(f'"a":{json.dumps(tensor())}')
    text = ("{" + ",".join(entries) + ("" if "not JSON" in faults else "}")).encode()
    text = text + b"\xff" if "not UTF-8" in faults else text
    text = b" " + text if "does not begin" in faults else text
    length = len(text) + (9999 if "reaches beyond" in faults else 0)
    length = 2**40 if "more than the 100000000" in faults else length
    content = length.to_bytes(8, "little") + text + (b"" if "truncated" in faults else b"1")
    return b"GGUF" + content if "a GGUF file" in faults else content


# As the docstring of read_header tells it.
ORDER = [
    "a GGUF file", "more than the 100000000", "reaches beyond", "does not begin", "not UTF-8", "stands twice",
    "not JSON", "is null, wanted an object", "no 'dtype'", "nested too deeply", "unknown dtype",
    "has the shape", "has the data_offsets", "leaves a gap", "needs 2 bytes", "truncated",
    "wanted an object of strings",
]  # fmt: skip


@pytest.mark.parametrize("first", range(len(ORDER)), ids=ORDER)
def test_names_the_first_fact_of_a_fixed_order(tmp_path: Path, first: int) -> None:
    assert refusal(tmp_path, broken(set())) is None
    assert ORDER[first] in (refusal(tmp_path, broken({ORDER[first]})) or "")
    assert ORDER[first] in (refusal(tmp_path, broken(set(ORDER[first:]))) or "")


def test_says_how_to_convert_a_file_with_a_pickle_name(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"whatever it is, it is no header")
    with pytest.raises(CheckpointError, match=r"save_file.*torch\.load\('pytorch_model\.bin'"):
        read_header(path)


def test_refuses_a_missing_file_and_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    with pytest.raises(CheckpointError, match="no such file"):
        read_header(tmp_path / "absent")
    for name in (".", "pipe", "device", "socket"):
        with pytest.raises(CheckpointError, match="not a regular file"):
            read_header(tmp_path / name)


def test_a_disk_that_fails_is_the_machines_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(ONE)

    monkeypatch.setattr(Path, "stat", failing(OSError, 5, "Input/output error"))
    with pytest.raises(MachineError, match=r"m\.safetensors: cannot be read: Input/output error"):
        read_header(path)


def test_error_texts_stay_short_whatever_stands_in_the_file(tmp_path: Path) -> None:
    monsters = [
        {"n" * 100_000: None},
        {"a": tensor("d" * 100_000)},
        {"a": tensor(shape=[*range(100_000), -1])},
        {"a": tensor(shape=[[[["deep"] * 999] * 9] * 9])},
        {"__metadata__": {"k\n" * 100_000: 1}},
    ]
    for document in monsters:
        assert len(refusal(tmp_path, file_of(document)) or "") < 1000


def test_entries_stand_in_the_order_of_their_data_and_ties_as_stored(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    empty = tensor(shape=[0], offsets=[1, 1])
    path.write_bytes(file_of({"z": empty, "b": tensor(offsets=[1, 2]), "a": empty, "c": tensor()}, b"12"))
    header = read_header(path)
    assert [entry.name for entry in header.entries] == ["c", "z", "a", "b"]
    assert header.entries[3] == TensorEntry("b", "U8", (1,), 1, 2)
    assert (header.entries[3].numel, header.entries[3].nbytes) == (1, 1)
    assert path.read_bytes() == header.raw + b"12"
    assert header.data_begin + 2 == header.file_size == path.stat().st_size


def test_equality_of_headers_is_that_of_their_bytes() -> None:
    assert lay_out([("a", "U8", (1,))], {}) == lay_out([("a", "U8", (1,))], {})
    assert lay_out([("a", "U8", (1,))], {}) != lay_out([("b", "U8", (1,))], {})


@pytest.mark.parametrize(
    ("tensors", "fragment"),
    [
        ([("__metadata__", "U8", (1,))], "reserved"),
        ([("a", "U8", (1,)), ("a", "U8", (1,))], "stands twice"),
        ([("a", "F4", (3,))], "whole bytes"),
    ],
)
def test_lays_out_nothing_that_would_not_load(
    tensors: list[tuple[str, str, tuple[int, ...]]], fragment: str
) -> None:
    with pytest.raises(ValueError, match=fragment):
        lay_out(tensors, {})


ODD = {
    "metadata at the end": file_of(
        b'{ "w" : {"dtype":"U8","shape":[1],"data_offsets":[0,1]},"__metadata__":{"a":"b"}}  ', b"1"
    ),
    "escaped keys": file_of(
        b'{"w\\u0041":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"__met\\u0061data__":{}}', b"1"
    ),
}


@pytest.mark.parametrize("name", [*LEGAL, *ODD])
def test_other_metadata_keep_the_entries_and_the_place_in_a_page(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes({**LEGAL, **ODD}[name])
    old = read_header(path)
    data = path.read_bytes()[old.data_begin :]
    raw, before = old.raw, old.metadata
    for times in (1, 2, 3):  # the spaces of the first one are room for the others
        wanted = {**old.metadata, "sparseprune.spec": "2of4" * times}
        raw, before = with_metadata(raw, before, wanted), wanted
        path.write_bytes(raw + data)
        new = read_header(path)
        assert (new.entries, new.metadata) == (old.entries, wanted)
        assert new.data_begin - old.data_begin == (0 if name.startswith("a pickle's") else 4096)
