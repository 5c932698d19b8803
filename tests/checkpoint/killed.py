"""Runs that die by SIGKILL at every call of the system, one after another, each in a process of its own.

    python -m tests.checkpoint.killed HOME INPUT [force] ["without exchange"] [seldom]

HOME/start is copied to HOME/1, HOME/2, ...: there a run that prunes INPUT dies at its first, second, ...
call, before it or, where it writes, in its middle; at one of three `seldom`. Ends with the first run that
reaches its end.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np  # noqa: F401  (once here instead of once in every process)

from sparseprune.checkpoint import publish
from tests.checkpoint.files import finish, layout_of

DEADLY = "pwrite ftruncate fdatasync fsync rename mkdir rmdir unlink copy_file_range".split()


def die_at(moment: int) -> None:
    """Ends this process at that call, counted from 1; every write counts twice, a sync takes no time."""
    left = moment

    def deadly(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "pwrite":
                left -= 1
                if left == 0:
                    real(args[0], args[1][: len(args[1]) // 2], args[2])
                    os.kill(os.getpid(), signal.SIGKILL)
            # What a killed process has written stays, synced or not.
            return None if name in ("fdatasync", "fsync") else real(*args, **keywords)

        return call

    for name in DEADLY:
        setattr(os, name, deadly(getattr(os, name), name))
    publish.swap = deadly(publish.swap, "swap")


def prune(home: Path, source: str, *, force: bool) -> tuple[list[str], list[str]]:
    return finish(layout_of(home / source, masked="bs", form="packed"), force=force)


def main(home: Path, source: str, *, force: bool, step: int) -> None:
    for moment in count(1, step):
        shutil.copytree(home / "start", home / str(moment))
        child = os.fork()
        if child == 0:
            die_at(moment)
            prune(home / str(moment), source, force=force)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            sys.exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    if "without exchange" in sys.argv[3:]:
        publish.swap = lambda one, other: False
    main(Path(sys.argv[1]), sys.argv[2], force="force" in sys.argv[3:], step=3 if "seldom" in sys.argv else 1)
