"""Files that are sent while they grow: their bytes, whatever the order of writes, and how much waits."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparseprune.checkpoint import uploads
from sparseprune.checkpoint.file_io import ChangedInputError
from sparseprune.checkpoint.growing import MOST_PARTS, GrowingFile, Intervals
from sparseprune.checkpoint.layout import CopyRange, OutputFile
from sparseprune.checkpoint.remote import Facts
from sparseprune.checkpoint.threads import Worker
from sparseprune.checkpoint.uploads import Uploads
from sparseprune.errors import MachineError

FILE = PurePosixPath("file")


class Kept:
    """A target that keeps what it gets, and in which pieces."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.pieces: list[int] = []

    def put(self, name: str, data: Any) -> Facts:
        self.objects[name] = bytes(data)
        return Facts(len(data), "tag")

    def send(self, name: str, pieces: Iterator[Any], part_bytes: int, side_by_side: int) -> Facts:
        got = []
        for piece in pieces:
            got.append(bytes(piece))
            self.pieces.append(len(piece))
        self.objects[name] = b"".join(got)
        return Facts(len(self.objects[name]), "tag")


def growing(
    size: int, written: list[tuple[int, int]], copies: list[CopyRange], part_bytes: int, head: bytes = b""
) -> GrowingFile:
    return GrowingFile(OutputFile(FILE, size, head), written, copies, {}, part_bytes)


@st.composite
def divided(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int]], list[tuple[int, int]]]:
    """The length of a header, that of a file, and the ranges of it that are written and copied."""
    edges = sorted(draw(st.sets(st.integers(0, 400), min_size=2, max_size=9)))
    kinds = draw(st.lists(st.booleans(), min_size=len(edges), max_size=len(edges)))
    ranges = list(zip(pairwise(edges), kinds, strict=False))
    written, copied = ([one for one, kind in ranges if kind is wanted] for wanted in (True, False))
    return edges[0], edges[-1], written, copied


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(parts=divided(), part_bytes=st.integers(1, 90), data=st.data())
def test_parts_that_are_written_in_any_order_become_the_file(
    tmp_path: Path, parts: Any, part_bytes: int, data: st.DataObject
) -> None:
    head, size, written, copied = parts
    content = bytes(np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8))
    source = tmp_path / "source"
    source.write_bytes(b"before" + content)
    copies = [CopyRange(source, FILE, begin + 6, begin, end - begin) for begin, end in copied]
    pieces: list[tuple[int, int]] = []
    for begin, end in written:
        pieces += pairwise(sorted({begin, end, *data.draw(st.sets(st.integers(begin, end), max_size=5))}))
    pieces += data.draw(st.lists(st.sampled_from(pieces), max_size=3)) if pieces else []  # some once more
    target, sent = Kept(), []
    sending = Uploads(
        [growing(size, written, copies, part_bytes, content[:head])], target, lambda *one: sent.append(one)
    )
    for begin, end in data.draw(st.permutations(pieces)):
        sending.write("file", content[begin:end], begin)
    sending.finish(["file"])
    sending.close()
    assert target.objects == {"file": content}
    assert sent == [("file", Facts(size, "tag"))]
    assert all(one == part_bytes for one in target.pieces[:-1])


def test_bits_that_several_writers_give_to_a_byte_complete_it() -> None:
    file = GrowingFile(OutputFile(FILE, 3), [(0, 3)], [], {2: 0b111}, 1)
    target = Kept()
    sending = Uploads([file], target, lambda *_: None)
    sending.merge("file", 1, 0b0101_0000, 0b1111_0000)
    sending.merge("file", 2, 0b001, 0b001)
    sending.write("file", b"\x07", 0)
    sending.merge("file", 2, 0b110, 0b110)
    assert not target.objects
    sending.merge("file", 1, 0b1001, 0b1111)
    sending.finish(["file"])
    sending.close()
    assert target.objects["file"] == bytes([7, 0b0101_1001, 0b111])


def test_what_nobody_writes_is_zero() -> None:
    target = Kept()
    sending = Uploads([growing(6, [(0, 6)], [], 2)], target, lambda *_: None)
    sending.write("file", b"ab", 3)
    sending.merge("file", 5, 1, 1)
    sending.finish(["file"])
    sending.close()
    assert target.objects["file"] == b"\0\0\0ab\1"


def test_a_file_is_held_before_its_last_part() -> None:
    target = Kept()
    sending = Uploads([growing(6, [(0, 6)], [], 2)], target, lambda *_: None, held=["file"])
    sending.write("file", b"abcdef", 0)
    sending.finish(["file"])
    assert not target.objects
    assert sending.left_bytes == 2
    sending.release("file")
    sending.close()
    assert target.objects["file"] == b"abcdef"


def test_files_that_were_not_touched_wait_and_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"abc")
    copy = CopyRange(tmp_path / "source", FILE, 0, 0, 3)
    target = Kept()
    sending = Uploads([growing(3, [], [copy], 2)], target, lambda *_: None)
    sending.drop(["file"])
    sending.finish(["file"])
    sending.close()
    assert not target.objects


def test_an_input_that_became_shorter_ends_the_sending(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"ab")
    copy = CopyRange(tmp_path / "source", FILE, 0, 0, 3)
    sending = Uploads([growing(3, [], [copy], 3)], Kept(), lambda *_: None)
    with pytest.raises(ChangedInputError, match="truncated while it was read: it ends at byte 2, wanted 3"):
        sending.finish(["file"])
    with pytest.raises(ChangedInputError):
        sending.copy("file", copy)
    sending.close()


def test_an_interval_is_counted_once() -> None:
    found = Intervals()
    for begin in (8, 0, 4, 2, 6, 0):
        found.add(begin, begin + 2)
    assert (found.count, list(found)) == (10, [(0, 10)])


def test_a_large_file_has_as_many_parts_as_stores_take() -> None:
    file = growing(MOST_PARTS * 8 + 1, [], [], 8)
    assert len(file.parts) <= MOST_PARTS
    assert file.parts[-1].end == file.file.size


class Slow(Kept):
    """A target that takes a piece when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.may = threading.Semaphore(0)

    def send(self, name: str, pieces: Iterator[Any], part_bytes: int, side_by_side: int) -> Facts:
        def one_by_one() -> Iterator[Any]:
            for piece in pieces:
                self.may.acquire()
                yield piece

        return super().send(name, one_by_one(), part_bytes, side_by_side)


def test_writers_wait_for_a_slow_store_and_not_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "_WAITING", 20)
    target = Slow()
    sending = Uploads([growing(100, [(0, 100)], [], 10)], target, lambda *_: None)
    for number in range(9, 0, -1):  # nothing can be sent: they do not wait
        sending.write("file", bytes([number]) * 10, 10 * number)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(sending.write, "file", bytes(10), 0)
        first.result(timeout=10)
        for _ in range(10):
            target.may.release()
        sending.finish(["file"])
    sending.close()
    assert target.objects["file"] == bytes(number for number in range(10) for _ in range(10))


def test_a_writer_waits_while_much_is_being_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "_WAITING", 20)
    target = Slow()
    sending = Uploads([growing(60, [(0, 60)], [], 10)], target, lambda *_: None)
    with ThreadPoolExecutor(1) as pool:
        writes = pool.submit(sending.write, "file", bytes(60), 0)
        with pytest.raises(TimeoutError):
            writes.result(timeout=0.5)
        for _ in range(6):
            target.may.release()
        writes.result(timeout=10)
        sending.finish(["file"])
    sending.close()
    assert target.objects["file"] == bytes(60)


class Broken(Kept):
    def put(self, name: str, data: Any) -> Facts:
        raise MachineError("the store is gone")


def test_every_call_raises_what_ended_the_sending() -> None:
    sending = Uploads([growing(2, [(0, 2)], [], 2)], Broken(), lambda *_: None)
    sending.write("file", b"ab", 0)
    for call in (
        partial(sending.finish, ["file"]),
        sending.refuse_failed,
        partial(sending.write, "file", b"a", 0),
    ):
        with pytest.raises(MachineError, match="the store is gone"):
            call()
    sending.close()


def test_what_is_written_to_other_files_and_to_parts_that_were_sent_is_dropped() -> None:
    target = Kept()
    sending = Uploads([growing(8, [(0, 8)], [], 4)], target, lambda *_: None)
    sending.write("other", b"12", 0)
    sending.merge("other", 0, 1, 1)
    sending.write("file", b"abcdefgh", 0)
    sending.finish(["file"])
    sending.write("file", b"ABCDEFGH", 0)
    sending.close()
    assert target.objects == {"file": b"abcdefgh"}
    assert sending.touched == {"file"}


def test_what_is_kept_can_be_read_and_what_was_not_written_stays_as_it_is() -> None:
    sending = Uploads([growing(8, [(0, 8)], [], 4)], Kept(), lambda *_: None, ["file"], keeps=True)
    sending.write("file", b"abcd", 0)
    found = bytearray(b"........")
    sending.read_into("file", 0, found)
    sending.close()
    assert found == b"abcd...."


def test_a_failure_that_is_no_error_of_the_machine_is_raised_as_it_is() -> None:
    class Broken(Kept):
        def put(self, name: str, data: Any) -> Facts:
            raise LookupError(name)

    sending = Uploads([growing(4, [(0, 4)], [], 4)], Broken(), lambda *_: None)
    sending.write("file", b"abcd", 0)
    with pytest.raises(LookupError, match="file"):
        sending.finish(["file"])
    sending.close()


def test_nothing_is_written_after_the_sending_was_given_up() -> None:
    sending = Uploads([growing(4, [(0, 4)], [], 4)], Kept(), lambda *_: None)
    sending.close()
    with pytest.raises(uploads.AbandonedError):
        sending.write("file", b"abcd", 0)


def test_a_system_without_threads_ends_the_sending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "begin", lambda _: False)
    sending = Uploads([growing(4, [(0, 4)], [], 4)], Kept(), lambda *_: None)
    sending.write("file", b"abcd", 0)
    with pytest.raises(MachineError, match="file: cannot be sent: the system has no thread left"):
        sending.finish(["file"])
    sending.close()
