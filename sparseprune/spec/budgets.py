"""What is to survive, in blocks: `nnz`, `sparsity`, `threshold` and `multiple_of` of a table for one scope.

Knows the number of blocks in a scope and nothing else of it. Called by `binding`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sparseprune.spec.bound import Budget
from sparseprune.spec.problems import Misfit

if TYPE_CHECKING:
    from sparseprune.spec.schema import BudgetTable


def budget_of(place: str, table: BudgetTable, label: str, blocks: int) -> Budget:
    """The budget of a scope of so many blocks; Misfit where more should survive than there are."""
    if table.threshold is not None:
        return Budget(threshold=table.threshold)
    if table.nnz is not None and table.nnz > blocks:
        text = f"found {table.nnz}, wanted 0 to {blocks}: that many blocks has each scope of {label}"
        raise Misfit(place, "nnz", text)
    asked = table.nnz if table.nnz is not None else _surviving(table.sparsity or 0.0, blocks)
    unit = table.multiple_of or 1
    return Budget(nnz=min(blocks, -(-asked // unit) * unit))


def _surviving(sparsity: float, blocks: int) -> int:
    """As the engine's `sparsity_to_nnz`: what is left once the whole number of pruned blocks is taken away.

    >>> _surviving(0.25, 10), _surviving(1.0, 10)
    (8, 0)
    """
    return max(0, blocks - math.floor(sparsity * blocks))
