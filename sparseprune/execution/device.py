"""Which device the torch engine works on, and which devices do the work of a schedule."""

from __future__ import annotations

import ctypes
import re
from typing import TYPE_CHECKING

from sparseprune.errors import SparsepruneError
from sparseprune.execution.strategy import elements_together, needs_torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sparseprune.execution.schedule import Job, Schedule

_DRIVERS = ("libcuda.so.1", "nvcuda.dll")


def resolve_device(asked: str, *, uses_torch: bool) -> str:
    """`auto`, `cpu`, `cuda` or `cuda:N` as the name of a device that is there.

    `auto` takes CUDA where there is one and the torch engine has something to do; what compiled loops do on
    the CPU is as fast as the disk. SparsepruneError for another word or an absent device.
    """
    found = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", asked)
    if found is None:
        raise SparsepruneError(f"--device {asked}: wanted auto, cpu, cuda or cuda:N")
    if asked == "cpu" or (asked == "auto" and not uses_torch):
        return "cpu"
    count = _devices()
    if asked == "auto":
        return "cuda" if count else "cpu"
    if int(found[1] or 0) >= count:
        there = (
            f"only cuda:0 to cuda:{count - 1}" if count > 1 else "only cuda:0" if count else "no CUDA device"
        )
        raise SparsepruneError(
            f"--device {asked}: there is {there} on this machine; try --device auto or cpu"
        )
    return asked


def device_text(jobs: Iterable[Job], device: str) -> str:
    """Which devices work on some jobs if the torch engine works on `device`, as a report has it.

    "cpu" for compiled loops, which know no other device; "cuda and cpu" where both have something to do.
    """
    used = {device if needs_torch(job.strategy) else "cpu" for job in jobs}
    return " and ".join(sorted(used, reverse=True)) or "cpu"


def devices_of_rules(schedule: Schedule, device: str) -> dict[str, str]:
    """As `device_text`, for each rule of a schedule."""
    jobs: dict[str, list[Job]] = {}
    for job in schedule.jobs:
        jobs.setdefault(job.task.rule, []).append(job)
    return {rule: device_text(some, device) for rule, some in jobs.items()}


def cpu_lines(schedule: Schedule, asked: str) -> Iterator[str]:
    """A line for each rule that the CPU decides although CUDA was asked for: why it does."""
    if not asked.startswith("cuda"):
        return
    largest: dict[str, int] = {}
    for job in schedule.jobs:
        if not needs_torch(job.strategy):
            rule = job.task.rule
            largest[rule] = max(largest.get(rule, 0), elements_together(job.task))
    for rule, elements in largest.items():
        yield (
            f"{rule} is decided on the CPU: {elements:,} elements compete in a scope, more than --memory "
            f"lets a device have at one time ({schedule.limits.largest_tile:,})"
        )


def _devices() -> int:
    """How many CUDA devices torch can use; torch is not asked where there is no driver."""
    if not any(_loads(driver) for driver in _DRIVERS):
        return 0
    import torch  # noqa: PLC0415  (importing it takes longer than most runs)

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
