"""Prune neural-network checkpoints as files: exact structured sparsity (S3) on safetensors.

The engine's names are loaded on first use: importing the package does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from sparseprune.errors import CouplingError, ShapeMismatchError, SparsepruneError, SparsityError

if TYPE_CHECKING:
    from sparseprune.calibration import KeptMasks, keep_masked, parameter_masks
    from sparseprune.checkpoint import load_masks
    from sparseprune.engine import (
        BlockCoupling,
        BlockSpec,
        Matrix,
        Reconstructed,
        ScopeCoupling,
        ScopeSpec,
        SparseBlock,
        SparseScope,
        View,
        admm,
        keep_rows,
        projection,
        refit,
    )

__version__ = "0.1.0"

__all__ = [
    "BlockCoupling",
    "BlockSpec",
    "CouplingError",
    "KeptMasks",
    "Matrix",
    "Reconstructed",
    "ScopeCoupling",
    "ScopeSpec",
    "ShapeMismatchError",
    "SparseBlock",
    "SparseScope",
    "SparsepruneError",
    "SparsityError",
    "View",
    "admm",
    "keep_masked",
    "keep_rows",
    "load_masks",
    "parameter_masks",
    "projection",
    "refit",
]


_ROOMS = {
    "KeptMasks": "calibration",
    "keep_masked": "calibration",
    "load_masks": "checkpoint",
    "parameter_masks": "calibration",
}


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(import_module(f"sparseprune.{_ROOMS.get(name, 'engine')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
