"""The search for cyclic garbage, and when it is not worth its time.

Called by the commands that make a plan or a document.
"""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def collector_paused() -> Iterator[None]:
    """No search for cyclic garbage: a plan of many tensors is a million objects and none of them is any.

    With 50,000 tensors it takes a third of the time otherwise.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            # What is there now is old: else the next object that is made lets all of it be looked through.
            gc.freeze()
            gc.unfreeze()
            gc.enable()
