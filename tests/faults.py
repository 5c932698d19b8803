"""Machines that fail: calls that raise, and disks that are small."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest


def failing(kind: type[BaseException], *arguments: object) -> Callable[..., NoReturn]:
    """A function that raises this error, whatever it is called with."""

    def fail(*_: object, **__: object) -> NoReturn:
        raise kind(*arguments)

    return fail


@contextmanager
def mounted(place: Path, size: str) -> Iterator[Path]:
    """A disk of its own, where this user may mount one."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("this user may not mount a disk")
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this system does not let root mount a disk")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def free_bytes(disk: Path) -> int:
    status = os.statvfs(disk)
    return status.f_bavail * status.f_frsize


def fill(disk: Path, left: int) -> None:
    """Fills a disk but for so many bytes."""
    with (disk / "filler").open("ab") as filler:
        filler.write(bytes(max(0, free_bytes(disk) - left)))
