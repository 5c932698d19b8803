"""Limits that make small checkpoints be worked in many pieces, and by a way of one's choice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparseprune.execution import reapplying, recipes, schedule
from sparseprune.execution.limits import Limits

if TYPE_CHECKING:
    import pytest

    from sparseprune.execution.plan import Task
    from sparseprune.execution.recipes import Tiled

_TILED = recipes._tiled
WAYS = ("runs", "gathered", "counted", "summed", "tiled", "streamed")
AMPLE = 1 << 30


def narrow(monkeypatch: pytest.MonkeyPatch, slab: int, tile: int = 1 << 18, memory: int = AMPLE) -> None:
    """Slabs of about so many bytes, tiles of so many elements, `memory` in flight."""
    limits = Limits(memory, slab, tile)
    for module in (reapplying, schedule):
        monkeypatch.setattr(module, "limits_of", lambda memory, **_: limits)


def force(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Only this way of working is chosen; where it cannot be, the next one that can."""
    for other in WAYS[: WAYS.index(way)]:
        monkeypatch.setattr(recipes, f"_{other}", _tiled_by_threshold if other == "tiled" else _never)


def _never(task: Task, *_: object) -> None:
    """A way that is not open to any task."""


def _tiled_by_threshold(task: Task, limits: Limits) -> Tiled | None:
    """A threshold asks every block by itself, so that there is nothing to stream."""
    return _TILED(task, limits) if task.instance.budget.nnz is None else None
