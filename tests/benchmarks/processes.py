"""Whole processes, measured: seconds with the sync that they leave behind, CPU seconds and peak memory.

Used by pipeline.py. Imports nothing large: on Linux the peak memory of a process begins with its parent's.
"""

import os
import re
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_POLL_SECONDS = 0.05
_READ_BYTES = 8 << 20


@dataclass(frozen=True)
class Measured:
    """What one process took; `peak` is resident memory in bytes, `failure` is empty where it ended well."""

    wall: float
    sync: float
    user: float
    system: float
    peak: int
    failure: str = ""

    @property
    def seconds(self) -> float:
        """Until everything was on the disk."""
        return self.wall + self.sync


def measure(command: Sequence[str | Path], log: Path, limit: int | None = None) -> Measured:
    """Run a command to its end, its output to `log`; it is killed once it holds more than `limit` bytes."""
    with log.open("wb") as streams:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=streams, stderr=streams)
        passed = _watched(process.pid, limit)
        ended = time.perf_counter()
        os.sync()
        synced = time.perf_counter()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    failure = f"exit {process.returncode}" if process.returncode else ""
    if passed and limit is not None:
        failure = f"passed {limit / 2**30:.0f} GiB"
    peak = usage.ru_maxrss << 10
    return Measured(ended - began, synced - ended, usage.ru_utime, usage.ru_stime, peak, failure)


def prepare(source: Path) -> None:
    """The state that every command finds: the files of `source` in the page cache, nothing left to sync."""
    buffer = bytearray(_READ_BYTES)
    for path in source.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    os.sync()


def _watched(process: int, limit: int | None) -> bool:
    """Wait for the end of a process, which stays to be reaped; was it killed for its memory?"""
    done = threading.Event()
    passed = threading.Event()

    def watch() -> None:
        while limit is not None and not done.wait(_POLL_SECONDS):
            if _resident(process) > limit:
                passed.set()
                os.kill(process, 9)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    finally:
        done.set()
        watcher.join()
    return passed.is_set()


def _resident(process: int) -> int:
    """Bytes of resident memory, 0 for a process that has ended."""
    with open(f"/proc/{process}/status") as status:  # noqa: PTH123
        found = re.search(r"VmRSS:\s+(\d+) kB", status.read())
    return int(found[1]) << 10 if found else 0
