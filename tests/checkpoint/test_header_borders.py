"""The borders of what a header may say: the last value that is legal, and the first that is not."""

import json
import os
import tracemalloc
from pathlib import Path

import pytest

from sparseprune.checkpoint import header
from sparseprune.checkpoint.header import read_header
from tests.checkpoint.headers import file_of, refusal, tensor, verdict_of_package

ONE = file_of({"a": tensor()}, b"1")
BORDERS: dict[str, tuple[bytes, str | None]] = {
    "eight bytes that promise nothing": (bytes(8), "does not begin with '{'"),
    "the longest header, which is not there": ((100_000_000).to_bytes(8, "little") + b"{}",
        "header length 100000000 reaches beyond the file of 10 bytes"),
    "one byte more than that": ((100_000_001).to_bytes(8, "little") + b"{}", "more than the 100000000 bytes"),
    "a header up to the end of the file": (file_of({}), None),
    "a header one byte beyond it": ((3).to_bytes(8, "little") + b"{}", "reaches beyond the file of 10 bytes"),
    "a header some bytes beyond it": ((12).to_bytes(8, "little") + b"{}", "beyond the file of 10 bytes"),
    "as many elements as 64 bits count": (file_of({"a": tensor(shape=[2**64 - 1])}, b"1"), "more bits than"),
    "one more": (file_of({"a": tensor(shape=[2**32, 2**32])}, b"1"), "more elements than"),
    "nearly as many bits as 64 bits count": (file_of({"a": tensor(shape=[2**61 - 1])}, b"1"),
        f"needs {2**61 - 1} bytes; its data_offsets hold 1"),
    "eight bits more": (file_of({"a": tensor(shape=[2**61])}, b"1"), "more bits than"),
    "half a byte": (file_of({"a": tensor("F4", [1])}, b"1"), "has 4 bits, which do not fill whole bytes"),
    "no byte at the end": (file_of({"a": tensor(), "b": tensor(shape=[0], offsets=[1, 1])}, b"1"), None),
    "no byte beyond the end": (file_of({"a": tensor(), "b": tensor(shape=[0], offsets=[2, 2])}, b"1"),
        "leaves a gap after byte 1"),
    "no byte inside of another tensor": (
        file_of({"a": tensor(shape=[2], offsets=[0, 2]), "b": tensor(shape=[0], offsets=[1, 1])}, b"12"),
        "overlaps what ends at byte 2",
    ),
    "one byte too few": (ONE[:-1], f"truncated: expected {len(ONE)} bytes, has {len(ONE) - 1}"),
    "one byte too many": (ONE + b"2", f"1 trailing bytes: expected {len(ONE)} bytes, has {len(ONE) + 1}"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "fact"), BORDERS.values(), ids=BORDERS)
def test_the_verdict_changes_at_the_border(tmp_path: Path, content: bytes, fact: str | None) -> None:
    text = refusal(tmp_path, content)
    assert (text is None) == (fact is None) == verdict_of_package(content)
    assert (fact or "") in (text or "")


def test_a_header_may_be_as_long_as_the_limit_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = len(ONE) - 9
    monkeypatch.setattr(header, "MAX_HEADER", length)
    assert refusal(tmp_path, ONE) is None
    monkeypatch.setattr(header, "MAX_HEADER", length - 1)
    assert f"header length {length} is more than the {length - 1} bytes" in str(refusal(tmp_path, ONE))


@pytest.mark.parametrize("length", range(500, 525))
def test_a_header_is_read_whole_wherever_the_first_read_ended(tmp_path: Path, length: int) -> None:
    """The first read is for recognising what a file is; what is behind it is the header's rest or data."""
    content = file_of(b'{"a":{"dtype":"U8","shape":[600],"data_offsets":[0,600]}}'.ljust(length), b"d" * 600)
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    assert read_header(path).raw == content[: 8 + length]


@pytest.mark.parametrize("length", [80, 504, 505, 2000])
def test_the_data_behind_a_header_is_not_read(tmp_path: Path, length: int) -> None:
    size = 16 << 20
    path = tmp_path / "m.safetensors"
    path.write_bytes(file_of((b'{"a":' + _entry(size) + b"}").ljust(length)))
    os.truncate(path, 8 + length + size)
    tracemalloc.start()
    try:
        read_header(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def _entry(size: int) -> bytes:
    return json.dumps(tensor(shape=[size], offsets=[0, size]), separators=(",", ":")).encode()
