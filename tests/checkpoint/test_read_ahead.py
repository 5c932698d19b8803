"""Tensors in a store: the bytes of any reads in any order, each asked for about once, within bounds."""

import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseprune.checkpoint import read_ahead
from sparseprune.checkpoint.read_ahead import ReadAhead, RemoteTensor
from sparseprune.checkpoint.remote import RemotePath

DATA = bytes(number * 7 % 251 for number in range(1000))


class Served:
    """A path of a file that is bytes; counts what is asked for, and may fail."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.fails = 0
        self._lock = threading.Lock()

    def fill(self, begin: int, view: memoryview, etag: str) -> None:
        assert etag == "content"
        with self._lock:
            self.asked.append((begin, begin + len(view)))
            self.fails -= 1
            if self.fails == 0:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        view[:] = DATA[begin : begin + len(view)]


def tensor(served: Served, begin: int = 10, end: int = 990) -> RemoteTensor:
    return RemoteTensor(cast("RemotePath", served), "content", begin, end)


@pytest.fixture(autouse=True, scope="module")
def _small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_ahead, "BLOCK", 16)
        patch.setattr(read_ahead, "_NEAR", 64)
        yield


def read(reader: ReadAhead, of: RemoteTensor, begin: int, count: int) -> bytes:
    data = bytearray(count)
    reader.read_into(of, begin, memoryview(data))
    return bytes(data)


@given(st.lists(st.tuples(st.integers(0, 980), st.integers(0, 200)), max_size=12), st.booleans())
def test_reads_what_is_there_in_any_order(parts: list[tuple[int, int]], closed: bool) -> None:
    served = Served()
    with ReadAhead() as reader:
        for begin, count in parts:
            end = min(begin + count, 980)
            assert read(reader, tensor(served), begin, end - begin) == DATA[10 + begin : 10 + end]
            if closed:
                reader.close()


@pytest.mark.parametrize("step", [5, 16, 24, 100])
def test_asks_once_for_each_byte_that_is_read_on(step: int) -> None:
    served = Served()
    with ReadAhead() as reader:
        found = [read(reader, tensor(served), at, min(step, 980 - at)) for at in range(0, 980, step)]
    assert b"".join(found) == DATA[10:990]
    assert sum(end - begin for begin, end in served.asked) == 980


def test_a_read_elsewhere_asks_for_its_own_bytes_alone() -> None:
    served = Served()
    with ReadAhead() as reader:
        read(reader, tensor(served), 500, 3)
    assert served.asked == [(510, 513)]


def test_many_threads_read_one_tensor() -> None:
    served = Served()
    with ReadAhead() as reader, ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda at: read(reader, tensor(served), at, 7), range(0, 980, 7))
        assert b"".join(found) == DATA[10:990]


def test_keeps_few_blocks_and_none_after_it_is_closed() -> None:
    reader, served = ReadAhead(), Served()
    for begin in range(0, 900, 50):
        read(reader, tensor(served, begin, begin + 50), 0, 3)
    assert 0 < len(reader._kept) <= read_ahead._KEPT
    reader.close()
    assert not reader._kept


def test_what_failed_ahead_is_asked_for_again() -> None:
    served = Served()
    served.fails = 2  # the block behind the first one
    few = tensor(served, 0, 32)
    with ReadAhead() as reader:
        read(reader, few, 0, 3)
        assert reader._kept[few, 1].data.exception() is not None
        assert read(reader, few, 16, 3) == DATA[16:19]


def test_a_failure_is_told() -> None:
    served = Served()
    served.fails = 1
    with ReadAhead() as reader, pytest.raises(OSError, match="Stale"):
        read(reader, tensor(served), 0, 16)
