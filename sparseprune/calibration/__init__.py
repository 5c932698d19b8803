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
    from sparseprune.calibration.loading import (
        Elsewhere,
        LoadedModel,
        cpu_machine,
        gpus_here,
        load_model,
        room_for_sums,
    )
    from sparseprune.calibration.planning import Calibration, plan_calibration, plan_digest
    from sparseprune.calibration.predictions import Apart, Embeddings, Estimate, Guess, NextTokens, ratio
    from sparseprune.calibration.shares import Gathering, Machines
    from sparseprune.calibration.sweeps import Streaming
    from sparseprune.calibration.text import Chat, Sequences, make_sequences, read_documents
    from sparseprune.calibration.training import KeptMasks, keep_masked, parameter_masks

__all__ = ["Apart", "Calibration", "Chat", "Counted", "Elsewhere", "Embeddings", "Estimate", "Gathering"]
__all__ += ["Guess", "KeptMasks", "LoadedModel", "Loss", "Machines", "NextTokens", "Room", "Sequences"]
__all__ += ["Sides", "Streaming", "Work", "bytes_of", "calibrate", "cpu_machine", "evaluate", "gpus_here"]
__all__ += ["keep_masked", "kind_of", "load_model", "make_sequences", "parameter_masks", "plan_calibration"]
__all__ += ["plan_digest", "ratio", "read_documents", "refuse_unlike", "room_for_sums"]

__getattr__, __dir__ = on_first_use(
    __name__,
    {
        "collecting": "Counted Work calibrate",
        "evaluating": "Room Sides bytes_of evaluate kind_of refuse_unlike",
        "gradients": "Loss",
        "loading": "Elsewhere LoadedModel cpu_machine gpus_here load_model room_for_sums",
        "planning": "Calibration plan_calibration plan_digest",
        "predictions": "Apart Embeddings Estimate Guess NextTokens ratio",
        "shares": "Gathering Machines",
        "sweeps": "Streaming",
        "text": "Chat Sequences make_sequences read_documents",
        "training": "KeptMasks keep_masked parameter_masks",
    },
)
