"""Refusing: all that is in the way of a removal at once, or the first lines of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparseprune.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable


def refuse(problems: Iterable[str], most: int = 10) -> None:
    """CheckpointError with all that is in the way, or the first of it; nothing where that is nothing."""
    lines = list(problems)
    if len(lines) > most:
        lines = [*lines[:most], f"and {len(lines) - most:,} more"]
    if lines:
        raise CheckpointError(*lines)
