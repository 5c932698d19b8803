"""Settings of all tests.

Property tests draw the same examples on every machine and at any speed. The width of a terminal is that of
none, whoever runs the tests. Torch computes in one thread, since several tests run side by side: threads that
spin while they wait for a core made some of them ten times slower. OMP_NUM_THREADS overrides it. Tests hear
signals also where whoever started them lets them ignore some, as a shell does in the background. Nobody
waits for the disk: no machine fails while tests run, and a sync may take longer than all the work before it.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import wraps
from itertools import count
from typing import Any
from zlib import crc32

import coverage
import pytest
from hypothesis import HealthCheck, settings

from tests.hub import hub
from tests.stores import bucket, s3_server

__all__ = ["bucket", "hub", "s3_server"]

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded
os.environ.pop("COLUMNS", None)  # pytest-xdist tells its workers that of its own terminal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)  # processes that tests start hear it, this one stays

settings.register_profile(
    "fixed",
    derandomize=True,
    max_examples=60,
    deadline=None,
    print_blob=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("fixed")


@pytest.fixture(scope="session", autouse=True)
def _quick_syncs() -> Iterator[None]:
    """In this process; those that tests start write through to the disk."""
    with pytest.MonkeyPatch.context() as patch:
        for name in {"fsync", "fdatasync"} & {*dir(os)}:
            patch.setattr(os, name, lambda descriptor: os.fstat(descriptor) and None)
        yield


TRACED, EXAMPLES = 32, 20
"""So many cases of a test are traced, and examples of a property: tracing takes longer than running."""
QUICK = {"removal", "spec"}
"""Rooms whose tests take no time: there all cases are traced."""
_UNTRACED = pytest.StashKey[bool]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test with more cases some are traced: branches that only others take count as missed.

    They are drawn by their names: regular steps through a product of parameters leave values of some out.
    What takes a minute alone begins first, so that no process works on it when all others are done.
    """
    items.sort(key=lambda item: item.path.name != "test_pages.py")
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in tests.values():
        if cases[0].path.parent.name in QUICK:
            continue
        for case in sorted(cases, key=lambda case: crc32(case.nodeid.encode()))[TRACED:]:
            case.stash[_UNTRACED] = True


@pytest.fixture(autouse=True)
def _traced_in_part(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.stash.get(_UNTRACED, False):
        request.getfixturevalue("untraced")
    own = sys.gettrace()
    property_test = getattr(getattr(request, "function", None), "hypothesis", None)
    if own is None or property_test is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(property_test, "inner_test", _traced_at_first(property_test.inner_test))
        yield
    sys.settrace(own)


def _traced_at_first(test: Callable[..., None]) -> Callable[..., None]:
    """A property that stops tracing after some examples, until its fixtures end."""
    examples = count()

    @wraps(test)
    def in_part(*arguments: Any, **named: Any) -> None:
        if next(examples) == EXAMPLES:
            sys.settrace(None)
        test(*arguments, **named)

    return in_part


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For sweeps over what other tests reach as well: to trace their lines takes as long as they do.

    Processes that they start are not traced either.
    """
    if coverage.Coverage.current() is None:
        yield
        return
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
    own, of_threads = sys.gettrace(), threading.gettrace()
    sys.settrace(None)
    threading.settrace(None)
    yield
    threading.settrace(of_threads)
    sys.settrace(own)


@pytest.fixture(scope="module")
def quiet_transformers() -> Iterator[None]:
    """Errors still show: what transformers warns of in tests is that a small config has its own token ids."""
    from transformers import utils

    logging: Any = utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    logging.set_verbosity(level)
