"""Which device the torch engine works on."""

from __future__ import annotations

import ctypes
import re

from sparseprune.errors import SparsepruneError

_DRIVERS = ("libcuda.so.1", "nvcuda.dll")


def resolve_device(asked: str, *, uses_torch: bool) -> str:
    """`auto`, `cpu`, `cuda` or `cuda:N` as the name of a device that is there.

    `auto` takes CUDA where there is one and the torch engine has something to do; what compiled loops do on
    the CPU is as fast as the disk. SparsepruneError for another word or an absent device.
    """
    found = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", asked)
    if found is None:
        raise SparsepruneError(f"--device {asked}: wanted auto, cpu, cuda or cuda:N")
    if asked == "cpu" or (asked == "auto" and not uses_torch):
        return "cpu"
    count = _devices()
    if asked == "auto":
        return "cuda" if count else "cpu"
    if int(found[1] or 0) >= count:
        there = (
            f"only cuda:0 to cuda:{count - 1}" if count > 1 else "only cuda:0" if count else "no CUDA device"
        )
        raise SparsepruneError(
            f"--device {asked}: there is {there} on this machine; try --device auto or cpu"
        )
    return asked


def _devices() -> int:
    """How many CUDA devices torch can use; torch is not asked where there is no driver."""
    if not any(_loads(driver) for driver in _DRIVERS):
        return 0
    import torch  # noqa: PLC0415  (importing it takes longer than most runs)

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
