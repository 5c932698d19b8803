"""Prune neural-network checkpoints as files: exact structured sparsity (S3) on safetensors.

`apply` and its sisters do what the commands do; the engine's classes prune tensors in memory. Names are
loaded on first use: importing the package imports neither torch nor numpy.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from sparseprune.errors import (
    CheckFailedError,
    CheckpointError,
    CouplingError,
    MachineError,
    ShapeMismatchError,
    SparsepruneError,
    SparsityError,
    SpecError,
)

if TYPE_CHECKING:
    from sparseprune.api import (
        Listener,
        Progress,
        apply,
        calibrate,
        compare,
        inspect,
        mask,
        plan,
        reapply,
        remove,
        specs,
        verify,
    )
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
    "CheckFailedError",
    "CheckpointError",
    "CouplingError",
    "KeptMasks",
    "Listener",
    "MachineError",
    "Matrix",
    "Progress",
    "Reconstructed",
    "ScopeCoupling",
    "ScopeSpec",
    "ShapeMismatchError",
    "SparseBlock",
    "SparseScope",
    "SparsepruneError",
    "SparsityError",
    "SpecError",
    "View",
    "admm",
    "apply",
    "calibrate",
    "compare",
    "inspect",
    "keep_masked",
    "keep_rows",
    "load_masks",
    "mask",
    "parameter_masks",
    "plan",
    "projection",
    "reapply",
    "refit",
    "remove",
    "specs",
    "verify",
]


_API = "Listener Progress apply calibrate compare inspect mask plan reapply remove specs verify"
_ROOMS = dict.fromkeys(_API.split(), "api") | {
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
