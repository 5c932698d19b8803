"""What `reapply`, `remove --masks` and `verify --masks` share: from two paths to tensors with their masks.

Reads headers and what lies beside the masks, no tensor data.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sparseprune import __version__
from sparseprune.checkpoint import (
    checkpoint_identity,
    open_checkpoint,
    open_masks,
    provenance_of,
    shards_identity,
)
from sparseprune.cli.writing import digest
from sparseprune.execution.reapply import match_masks

if TYPE_CHECKING:
    from pathlib import Path

    from sparseprune.checkpoint import Provenance
    from sparseprune.execution.reapply import Matched


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


def identity_of_masked(masked: Masked) -> dict[str, str]:
    """What an unfinished output must agree with to be continued: the version, the input, the masks."""
    matched, origin = masked.matched, masked.origin
    carried = () if origin is None else (sorted(origin.overrides.items()), repr(origin.spec))
    return {
        "the version": __version__,
        "the input": checkpoint_identity(matched.checkpoint),
        "the masks": digest(json.dumps([shards_identity(matched.masks.shards), carried])),
    }
