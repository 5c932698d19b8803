"""Pieces are worked through in order, side by side; what fails is told once, and nothing goes on."""

from __future__ import annotations

import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from sparseprune.checkpoint.threads import work_through

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.mark.parametrize("jobs", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 3, 200])
def test_every_piece_is_done_once(count: int, jobs: int) -> None:
    done: list[int] = []
    work_through(range(count), lambda: done.append, jobs)
    assert sorted(done) == list(range(count))


def test_one_job_keeps_the_order() -> None:
    done: list[int] = []
    work_through(range(50), lambda: done.append, 1)
    assert done == list(range(50))


def test_pieces_are_made_only_as_they_are_taken() -> None:
    done: list[int] = []

    def pieces() -> Iterator[int]:
        for number in range(20):
            assert len(done) == number
            yield number

    work_through(pieces(), lambda: done.append, 1)
    assert len(done) == 20


def test_every_thread_has_a_worker_of_its_own_and_all_work_at_one_time() -> None:
    together = threading.Barrier(3, timeout=60)
    made: list[set[int]] = []

    def worker() -> Callable[[int], None]:
        threads: set[int] = set()
        made.append(threads)

        def work(_: int) -> None:
            threads.add(threading.get_ident())
            together.wait()

        return work

    work_through(range(3), worker, 3)
    assert [len(threads) for threads in made] == [1, 1, 1]
    assert len(set.union(*made)) == 3
    assert threading.get_ident() not in set.union(*made)


@pytest.mark.parametrize("jobs", [1, 4])
def test_nothing_is_begun_after_a_failure(jobs: int) -> None:
    done = []

    def work(number: int) -> None:
        done.append(number)
        if number == 3:
            raise ValueError("three")
        time.sleep(0.01)

    before = threading.active_count()
    with pytest.raises(ValueError, match="three"):
        work_through(range(1000), lambda: work, jobs)
    assert len(done) < 500
    assert threading.active_count() == before


def test_of_two_failures_that_of_the_earlier_piece_is_raised() -> None:
    later = threading.Event()

    def work(number: int) -> None:
        if number == 1:
            later.set()
        later.wait(60)
        time.sleep(0.1 * (number == 0))
        raise ValueError(f"in {number}")

    with pytest.raises(ValueError, match="in 0"):
        work_through(range(9), lambda: work, 2)


def test_a_worker_that_cannot_be_made_is_told() -> None:
    def worker() -> Callable[[int], None]:
        raise MemoryError("no buffer")

    with pytest.raises(MemoryError, match="no buffer"):
        work_through(range(9), worker, 2)


def test_pieces_that_cannot_be_made_are_told() -> None:
    def pieces() -> Iterator[int]:
        yield 0
        raise ValueError("no more")

    done: list[int] = []
    with pytest.raises(ValueError, match="no more"):
        work_through(pieces(), lambda: done.append, 2)
    assert done == [0]


def test_an_interrupt_ends_what_was_begun_and_is_raised() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        if number == 0:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.05)
        done.append(number)

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        work_through(range(1000), lambda: work, 2)
    assert 0 in done
    assert len(done) < 500
    assert threading.active_count() == before
