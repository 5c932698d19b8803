"""What `reapply` and `verify --masks` share: the way from two paths to tensors with their masks.

Reads headers and what lies beside the masks, no tensor data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sparseprune.checkpoint import open_checkpoint, open_masks, provenance_of
from sparseprune.pipeline.matching import match_masks

if TYPE_CHECKING:
    from pathlib import Path

    from sparseprune.checkpoint import Provenance
    from sparseprune.pipeline.matching import Matched


class Asked(Protocol):
    """What was typed: a checkpoint, and whether names without a counterpart are let be."""

    @property
    def checkpoint(self) -> Path: ...
    @property
    def partial(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Masked:
    """Tensors with their masks, and what is known of the run that made these."""

    matched: Matched
    origin: Provenance | None


def masked_by(asked: Asked, masks: Path) -> Masked:
    """Open both, and give each tensor its mask; CheckpointError with all that does not fit."""
    checkpoint, opened = open_checkpoint(asked.checkpoint), open_masks(masks)
    origin = provenance_of(opened)
    return Masked(match_masks(checkpoint, opened, origin, partial=asked.partial), origin)
