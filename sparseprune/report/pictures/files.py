"""The file of a picture: what can be wrong with it before anything is drawn, and putting it in its place.

Owns which forms there are. Knows nothing of what is drawn; looks for matplotlib, but does not draw.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from importlib import import_module
from pathlib import Path

from sparseprune.errors import SparsepruneError

FORMS = (".png", ".svg", ".pdf", ".html")


def check_picture(path: Path) -> None:
    """SparsepruneError where no picture can be written to `path`: its ending, its folder, matplotlib."""
    form_of(path)
    if path.is_dir():
        raise SparsepruneError(f"--plot {path}: this is a folder; wanted the name of a file")
    if not path.parent.is_dir():
        raise SparsepruneError(f"--plot {path}: there is no folder {path.parent}; make it first")
    try:
        import_module("matplotlib")
    except ImportError as error:
        raise SparsepruneError(
            "--plot needs matplotlib: pip install 'sparseprune[plot]' (in a clone: '.[plot]')"
        ) from error


def form_of(path: Path) -> str:
    """The ending that says in which form a picture is written.

    >>> form_of(Path("mask.PNG"))
    '.png'
    """
    form = path.suffix.lower()
    if form not in FORMS:
        found = f"ends in {path.suffix}" if path.suffix else "has no ending"
        raise SparsepruneError(f"--plot {path}: {found}; wanted .png, .svg, .pdf or .html")
    return form


def put(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; what had its name before is replaced when the new one is there.

    OSError names `path`, not the file beside it that nobody asked for.
    """
    final = Path(os.path.realpath(path))  # of a link the file that it leads to is replaced
    beside = final.with_name(f".{final.name[:100]}.{secrets.token_hex(4)}.part")
    try:
        with beside.open("xb") as file:
            file.write(content)
        beside.replace(final)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
