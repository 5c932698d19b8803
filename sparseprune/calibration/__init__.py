"""Models in memory: statistics of the inputs of their matrices over text, and masks kept during training.

Owns all that needs the model's own code; the only package that imports transformers. Knows no specs, and not
how masks are decided. Called by commands and, for training, by users; names are loaded on first use, because
they import torch.
"""

from typing import TYPE_CHECKING

from sparseprune import on_first_use

if TYPE_CHECKING:
    from sparseprune.calibration.collecting import Counted, Work, calibrate
    from sparseprune.calibration.evaluating import Room, Sides, bytes_of, evaluate, kind_of, refuse_unlike
    from sparseprune.calibration.gradients import Loss
    from sparseprune.calibration.loading import LoadedModel, load_model
    from sparseprune.calibration.planning import Calibration, plan_calibration, plan_digest
    from sparseprune.calibration.predictions import Apart, Embeddings, Estimate, Guess, NextTokens, ratio
    from sparseprune.calibration.sweeps import Streaming
    from sparseprune.calibration.text import Chat, Sequences, make_sequences, read_documents
    from sparseprune.calibration.training import KeptMasks, keep_masked, parameter_masks

__all__ = ["Apart", "Calibration", "Chat", "Counted", "Embeddings", "Estimate", "Guess", "KeptMasks"]
__all__ += ["LoadedModel", "Loss", "NextTokens", "Room", "Sequences", "Sides", "Streaming", "Work"]
__all__ += ["bytes_of", "calibrate", "evaluate", "keep_masked", "kind_of", "load_model", "make_sequences"]
__all__ += ["parameter_masks", "plan_calibration", "plan_digest", "ratio", "read_documents"]
__all__ += ["refuse_unlike"]

__getattr__, __dir__ = on_first_use(
    __name__,
    {
        "collecting": "Counted Work calibrate",
        "evaluating": "Room Sides bytes_of evaluate kind_of refuse_unlike",
        "gradients": "Loss",
        "loading": "LoadedModel load_model",
        "planning": "Calibration plan_calibration plan_digest",
        "predictions": "Apart Embeddings Estimate Guess NextTokens ratio",
        "sweeps": "Streaming",
        "text": "Chat Sequences make_sequences read_documents",
        "training": "KeptMasks keep_masked parameter_masks",
    },
)
