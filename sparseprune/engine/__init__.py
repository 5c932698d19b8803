"""The mathematics of S3 on torch tensors: no files, no TOML, no printing.

Names are loaded on first use, so that shapes and dtypes can be had without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparseprune.engine.block import BlockCoupling, BlockSpec, SparseBlock
    from sparseprune.engine.reconstruction.matrices import Matrix, projection
    from sparseprune.engine.reconstruction.solvers import Reconstructed, admm, keep_rows, refit
    from sparseprune.engine.scope import ScopeCoupling, ScopeSpec, SparseScope
    from sparseprune.engine.view import View

__all__ = [
    "BlockCoupling",
    "BlockSpec",
    "Matrix",
    "Reconstructed",
    "ScopeCoupling",
    "ScopeSpec",
    "SparseBlock",
    "SparseScope",
    "View",
    "admm",
    "keep_rows",
    "projection",
    "refit",
]

_HOME = {
    "BlockCoupling": "block",
    "BlockSpec": "block",
    "Matrix": "reconstruction.matrices",
    "Reconstructed": "reconstruction.solvers",
    "ScopeCoupling": "scope",
    "ScopeSpec": "scope",
    "SparseBlock": "block",
    "SparseScope": "scope",
    "View": "view",
    "admm": "reconstruction.solvers",
    "keep_rows": "reconstruction.solvers",
    "projection": "reconstruction.matrices",
    "refit": "reconstruction.solvers",
}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"sparseprune.engine.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
