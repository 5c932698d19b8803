"""What a run may use of a machine: its device, threads and memory; how sizes are written, and the defaults.

Owns what a control group around the process allows. Called by the public functions. Imports nothing that
takes time.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from sparseprune.errors import SparsepruneError

_GIB = 1 << 30
_SIZE = re.compile(r"(?P<number>[0-9]{1,15}(\.[0-9]*)?|\.[0-9]+) *(?P<unit>[a-z]*)", re.IGNORECASE)
_UNITS = {"": 1, "b": 1} | {
    name: base**power
    for power, letter in enumerate("kmgt", 1)
    for name, base in ((letter, 1000), (f"{letter}b", 1000), (f"{letter}ib", 1024))
}


@dataclass(frozen=True, slots=True)
class Machine:
    """What a run may use: a device as it was given, threads, and bytes of memory."""

    device: str
    jobs: int
    memory: int


def machine(
    device: str = "cpu",
    jobs: int | None = None,
    memory: int | str | None = None,
    *,
    sweeps: bool = False,
) -> Machine:
    """What was given, and the defaults for the rest; SparsepruneError for a size that is none.

    One that `sweeps` a text through a model has more memory by default.
    """
    if jobs is not None and jobs < 1:
        raise SparsepruneError(f"--jobs {jobs}: wanted 1 or more")
    usual = quarter_of_memory() if sweeps else default_memory()
    nbytes = usual if memory is None else memory_of(memory)
    return Machine(device, jobs or default_jobs(), nbytes)


def memory_of(size: int | str) -> int:
    """Bytes of a `--memory` size.

    >>> memory_of("1.5GiB"), memory_of("500 mb"), memory_of("4096")
    (1610612736, 500000000, 4096)
    """
    if isinstance(size, int):
        return size
    found = _SIZE.fullmatch(size.strip())
    nbytes = int(float(found["number"]) * _UNITS.get(found["unit"].lower(), 0)) if found else 0
    if nbytes <= 0:
        raise SparsepruneError(f"--memory {size}: wanted a size such as 8GiB or 500MB")
    return nbytes


def default_memory(root: Path = Path("/")) -> int:
    """Bytes: a quarter of the RAM that this process may use, 1 GiB at most; `root` as below."""
    return min(_GIB, quarter_of_memory(root))


def quarter_of_memory(root: Path = Path("/")) -> int:
    """Bytes: a quarter of the RAM that the machine has, or that a control group around the process allows."""
    found = _control_group(root, "", "memory.max")
    found += _control_group(root, "memory", "memory.limit_in_bytes")
    limits = [int(text) for text in found if text.isdecimal()]
    return max(1, min([*limits, _physical_memory()]) // 4)


def default_jobs(root: Path = Path("/")) -> int:
    """One job for each core that this process may use; a container may allow it less than it sees."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for text in _control_group(root, "", "cpu.max"):
        quota, _, period = text.partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period):
            cores = min(cores, -(-int(quota) // int(period)))
    return max(cores, 1)


def _physical_memory() -> int:
    """Bytes of RAM of the machine, or enough where it does not say."""
    try:
        nbytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 4 * _GIB
    return nbytes if nbytes > 0 else 4 * _GIB


def _control_group(root: Path, controller: str, file: str) -> list[str]:
    """What `file` holds in the control group of this process and in each one around it.

    `controller` names a tree of version 1, "" is that of version 2. In a container the groups outside are
    not there, and the outermost one inside is that of the container.
    """
    top = root / "sys/fs/cgroup" / controller
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if path and controller in controllers.split(","):
            own = top / path.lstrip("/")
            around = [folder for folder in own.parents if folder.is_relative_to(top)]
            return [text for folder in (own, *around) if (text := _text(folder / file))]
    return []


def _text(path: Path) -> str:
    """The text of a small file, nothing where it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
