"""The mathematics of S3 on torch tensors: no files, no TOML, no printing.

Names are loaded on first use, so that shapes and dtypes can be had without importing torch.
"""

from typing import TYPE_CHECKING

from sparseprune import on_first_use

if TYPE_CHECKING:
    from sparseprune.engine.block import BlockCoupling, BlockSpec, SparseBlock
    from sparseprune.engine.energies import Errors, errors_of
    from sparseprune.engine.matrices import Matrix
    from sparseprune.engine.projections import Level, nested_masks, nested_projection, projection
    from sparseprune.engine.reconstruction import Reconstructed, admm, keep_rows, refit
    from sparseprune.engine.scope import ScopeCoupling, ScopeSpec, SparseScope
    from sparseprune.engine.view import View

__all__ = ["BlockCoupling", "BlockSpec", "ScopeCoupling", "ScopeSpec", "SparseBlock", "SparseScope", "View"]
__all__ += ["Errors", "Matrix", "Reconstructed", "admm", "errors_of", "keep_rows", "projection", "refit"]
__all__ += ["Level", "nested_masks", "nested_projection"]

__getattr__, __dir__ = on_first_use(
    __name__,
    {
        "block": "BlockCoupling BlockSpec SparseBlock",
        "energies": "Errors errors_of",
        "matrices": "Matrix",
        "projections": "Level nested_masks nested_projection projection",
        "reconstruction": "Reconstructed admm keep_rows refit",
        "scope": "ScopeCoupling ScopeSpec SparseScope",
        "view": "View",
    },
)
