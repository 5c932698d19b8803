"""Work side by side in as many threads as the system gives; in the caller's own where it gives none."""

import os
import signal
import threading
import time

import pytest

from sparseprune.checkpoint.threads import side_by_side


@pytest.mark.parametrize(("given", "works"), [(0, 1), (1, 1), (2, 2), (3, 3), (9, 3)])
def test_the_callers_thread_works_only_where_no_other_one_started(
    given: int, works: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start
    begun: list[threading.Thread] = []
    at_work: list[threading.Thread] = []

    def scarce(thread: threading.Thread) -> None:
        if len(begun) == given:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", scarce)
    stops: list[int] = []
    side_by_side(lambda: at_work.append(threading.current_thread()), 3, lambda: stops.append(len(at_work)))
    assert len(at_work) == works
    assert (threading.main_thread() in at_work) == (given == 0)
    assert stops == [works]


def test_threads_at_work_are_waited_for_also_where_a_signal_interrupts_the_wait() -> None:
    """Else the interpreter goes down around them, and one that is inside of a library aborts it."""
    working, stopped = threading.Barrier(2), threading.Event()
    ended: list[int] = []

    def work() -> None:
        if working.wait() == 0:
            time.sleep(0.05)  # by then the caller waits
            os.kill(os.getpid(), signal.SIGINT)
        assert stopped.wait(10)
        if threading.current_thread().name == "sparseprune-0":  # which the caller waits for
            time.sleep(0.2)  # a step that nothing interrupts
        ended.append(threading.get_ident())

    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            side_by_side(work, 2, stopped.set)
    finally:
        signal.signal(signal.SIGINT, usual)
    assert len(ended) == 2
