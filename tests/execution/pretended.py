"""A CUDA device that is not there: the CPU does its work, under a name that no code takes for the CPU's."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from sparseprune.engine import proximal, scope, scoring, selection
from sparseprune.execution import devices, schedule

NAME = "cpu:0"


@dataclass
class Device:
    """What was asked of the device: how often the host waited for it."""

    waits: int = 0

    def wait_for(self, device: str) -> None:
        assert device == NAME
        self.waits += 1


def select(keys: Tensor, nnz: int) -> Tensor:
    """As `selection.select` on a device."""
    blocks = keys.shape[-1]
    if nnz in (0, blocks) or not keys.numel():
        return torch.full(keys.shape, nnz == blocks, dtype=torch.bool)
    return selection.select_by_comparing(keys.reshape(-1, blocks), nnz).reshape(keys.shape)


def pretend(patch: pytest.MonkeyPatch, room: int = 1 << 36) -> Device:
    """`--device cuda` finds a device with `room` bytes that are free."""
    device = Device()
    free: Callable[[str], int | None] = lambda name: room if name.startswith("cuda") else None  # noqa: E731
    patch.setattr(schedule, "free_bytes", free)
    patch.setattr(schedule, "resolve_device", lambda asked, **_: NAME if asked == "cuda" else "cpu")
    patch.setattr(devices, "_pinned", np.empty)
    patch.setattr(devices, "stream_context", lambda _: nullcontext())
    patch.setattr(devices, "wait_for", device.wait_for)
    patch.setattr(scope, "select", select)
    for module in (proximal, scoring):  # compiled loops work on the CPU alone
        patch.setattr(module, "patterns", lambda _: None)
    return device
