"""The mathematics of S3 on torch tensors: no files, no TOML, no printing.

Names are loaded on first use, so that shapes and dtypes can be had without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparseprune.engine.block import BlockCoupling, BlockSpec, SparseBlock
    from sparseprune.engine.reconstruction import Matrix, Reconstructed, admm, keep_rows, projection, refit
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
    "Matrix": "reconstruction",
    "Reconstructed": "reconstruction",
    "ScopeCoupling": "scope",
    "ScopeSpec": "scope",
    "SparseBlock": "block",
    "SparseScope": "scope",
    "View": "view",
    "admm": "reconstruction",
    "keep_rows": "reconstruction",
    "projection": "reconstruction",
    "refit": "reconstruction",
}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"sparseprune.engine.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
