"""Limits that make small checkpoints be worked in many pieces, and by a strategy of one's choice."""

import pytest

from sparseprune.execution import reapply, schedule, strategy
from sparseprune.execution.regions import Limits

WAYS = strategy.ORDER
AMPLE = 1 << 30


def narrow(
    monkeypatch: pytest.MonkeyPatch,
    slab: int,
    tile: int = 1 << 18,
    memory: int = AMPLE,
    device: int | None = None,
) -> None:
    """Slabs of about so many bytes, tiles of so many elements, `memory` in flight; `device` bytes free."""
    limits = Limits(memory, slab, tile, device=device)
    for module in (reapply, schedule):
        monkeypatch.setattr(module, "limits_of", lambda memory, **_: limits)


def force(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Only this strategy is chosen; where it cannot be, the next one that can."""
    monkeypatch.setattr(strategy, "ORDER", WAYS[WAYS.index(way) :])
