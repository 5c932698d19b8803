"""Models in memory: statistics of the inputs of their matrices over text, and masks kept during training.

Owns all that needs the model's own code; the only package that imports transformers. Knows no specs, and not
how masks are decided. Called by commands and, for training, by users; names are loaded on first use, because
they import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparseprune.calibration.collecting import (
        Calibration,
        Counted,
        already_run,
        calibrate,
        passes_digest,
        plan_calibration,
    )
    from sparseprune.calibration.loading import LoadedModel, load_model
    from sparseprune.calibration.text import Chat, Sequences, make_sequences, read_documents
    from sparseprune.calibration.training import KeptMasks, keep_masked, parameter_masks

__all__ = [
    "Calibration",
    "Chat",
    "Counted",
    "KeptMasks",
    "LoadedModel",
    "Sequences",
    "already_run",
    "calibrate",
    "keep_masked",
    "load_model",
    "make_sequences",
    "parameter_masks",
    "passes_digest",
    "plan_calibration",
    "read_documents",
]

_HOME = {
    "Calibration": "collecting",
    "Chat": "text",
    "Counted": "collecting",
    "KeptMasks": "training",
    "LoadedModel": "loading",
    "Sequences": "text",
    "already_run": "collecting",
    "calibrate": "collecting",
    "keep_masked": "training",
    "load_model": "loading",
    "make_sequences": "text",
    "passes_digest": "collecting",
    "parameter_masks": "training",
    "plan_calibration": "collecting",
    "read_documents": "text",
}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"sparseprune.calibration.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
