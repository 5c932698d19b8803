"""Which model an input names: a path, an address, or two words that name a model of the hub.

Owns that a model of the hub is read at one commit, which a run notes. Opens no checkpoint. Called by the
public functions for what they read.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from sparseprune.api.options import located

if TYPE_CHECKING:
    from pathlib import Path

    from sparseprune.api.options import Place
    from sparseprune.api.run import Run


def found(run: Run, place: Place) -> Path:
    """The file or folder that an input names, on the hub with the commit that it stands for now.

    CheckpointError where the hub has no such model, MachineError where it cannot be asked.
    """
    path = located(place)
    if path.parts[:1] == ("hf:",):
        return _pinned(run, str(path), str(path), "")
    if path.parts and not os.path.lexists(path):
        from sparseprune.checkpoint.not_safetensors import is_hub_id

        text = os.fspath(place)
        if is_hub_id(text) and find_spec("huggingface_hub") is not None:
            return _pinned(
                run, f"hf://{text}", text, "no such file or folder here, so it is read from the hub; "
            )
    return path


def found_if_any(run: Run, place: Place | None) -> Path | None:
    """As `found`; None where nothing was given."""
    return None if place is None else found(run, place)


def _pinned(run: Run, address: str, given: str, why: str) -> Path:
    """The address with a commit; notes which one where it was not `given`, and why."""
    from sparseprune.checkpoint.hub import HubStore, pinned
    from sparseprune.checkpoint.remote import RemotePath

    whole, is_cached = pinned(address, given)
    path = RemotePath(whole)
    if str(path) != given:
        cache = ", the last one in the local cache, since the hub cannot be asked" if is_cached else ""
        run.note(f"{given}: {why}the commit is {path.root_address.rpartition('@')[2]}{cache}")
    store = path.store
    if isinstance(store, HubStore):
        store.hears = run.fetching
    return path
