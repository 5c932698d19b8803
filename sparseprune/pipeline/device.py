"""Which torch device a run uses."""

from __future__ import annotations

import re

import torch

from sparseprune.errors import SparsepruneError


def resolve_device(asked: str) -> str:
    """`auto`, `cpu`, `cuda` or `cuda:N` as the name of a device that is there.

    `auto` takes CUDA where there is one. SparsepruneError for another word or an absent device.
    """
    found = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", asked)
    if found is None:
        raise SparsepruneError(f"--device {asked}: wanted auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if asked != "cpu" and torch.cuda.is_available() else 0
    if asked == "auto":
        return "cuda" if count else "cpu"
    if asked != "cpu" and int(found[1] or 0) >= count:
        there = (
            f"only cuda:0 to cuda:{count - 1}" if count > 1 else "only cuda:0" if count else "no CUDA device"
        )
        raise SparsepruneError(
            f"--device {asked}: there is {there} on this machine; try --device auto or cpu"
        )
    return asked
