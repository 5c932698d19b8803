"""Prune neural-network checkpoints as files: exact structured sparsity (S3) on safetensors.

`apply` and its sisters do what the commands do; the engine's classes prune tensors in memory. Names are
loaded on first use: importing the package imports neither torch nor numpy.
"""

import sys
from collections.abc import Callable, Mapping
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
        apply,
        calibrate,
        compare,
        evaluate,
        inspect,
        mask,
        plan,
        reapply,
        remove,
        specs,
        verify,
    )
    from sparseprune.api.run import Listener, Progress
    from sparseprune.calibration import KeptMasks, keep_masked, parameter_masks
    from sparseprune.checkpoint import load_masks
    from sparseprune.engine.block import BlockCoupling, BlockSpec, SparseBlock
    from sparseprune.engine.energies import Errors, errors_of
    from sparseprune.engine.matrices import Matrix
    from sparseprune.engine.projections import Level, nested_masks, nested_projection, projection
    from sparseprune.engine.reconstruction import Reconstructed, admm, keep_rows, refit
    from sparseprune.engine.scope import ScopeCoupling, ScopeSpec, SparseScope
    from sparseprune.engine.view import View

__version__ = "0.1.0"

__all__ = ["CheckFailedError", "CheckpointError", "CouplingError", "MachineError", "ShapeMismatchError"]
__all__ += ["SparsepruneError", "SparsityError", "SpecError"]
__all__ += ["Listener", "Progress", "apply", "calibrate", "compare", "evaluate", "inspect", "mask", "plan"]
__all__ += [
    "KeptMasks",
    "keep_masked",
    "load_masks",
    "parameter_masks",
    "reapply",
    "remove",
    "specs",
    "verify",
]
__all__ += ["BlockCoupling", "BlockSpec", "ScopeCoupling", "ScopeSpec", "SparseBlock", "SparseScope", "View"]
__all__ += ["Errors", "Matrix", "Reconstructed", "admm", "errors_of", "keep_rows", "projection", "refit"]
__all__ += ["Level", "nested_masks", "nested_projection"]


def on_first_use(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` for names that load on first use; `modules` lists those of each module."""
    homes = {name: f"{package}.{module}" for module, names in modules.items() for name in names.split()}

    def load(name: str) -> object:
        if name in homes:
            return getattr(import_module(homes[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return load, lambda: sorted({*vars(sys.modules[package]), *homes})


__getattr__, __dir__ = on_first_use(
    __name__,
    {
        "api": "Listener Progress apply calibrate compare evaluate inspect mask plan reapply remove specs "
        "verify",
        "calibration": "KeptMasks keep_masked parameter_masks",
        "checkpoint": "load_masks",
        "engine": "BlockCoupling BlockSpec ScopeCoupling ScopeSpec SparseBlock SparseScope View "
        "Errors Level Matrix Reconstructed admm errors_of keep_rows nested_masks nested_projection "
        "projection refit",
    },
)
