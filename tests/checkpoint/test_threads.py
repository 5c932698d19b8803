"""Work side by side in as many threads as the system gives; in the caller's own where it gives none."""

from __future__ import annotations

import threading

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
