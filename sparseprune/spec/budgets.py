"""What is to survive, in blocks: `nnz`, `sparsity`, `threshold` and `multiple_of` of a table for one scope.

Knows the number of blocks in a scope and nothing else of it. Called by `binding`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from sparseprune.engine.grids import surviving
from sparseprune.spec.bound import Budget
from sparseprune.spec.expressions import ExpressionError
from sparseprune.spec.names import misfit
from sparseprune.spec.problems import Misfit, shown

if TYPE_CHECKING:
    from sparseprune.spec.names import Names
    from sparseprune.spec.schema import BudgetTable


def budget_of(
    place: str, table: BudgetTable, label: str, blocks: int, names: Names
) -> tuple[Budget, float | None]:
    """The budget of a scope of so many blocks, and the sparsity that was asked for.

    Misfit where an expression gives no number in range, or more should survive than there is.
    """
    key = ""
    try:
        if table.threshold is not None:
            key = "threshold"
            return Budget(threshold=names.number(table.threshold, sys.float_info.max, "0 or more")), None
        sparsity, asked = None, 0
        if table.nnz is not None:
            key = "nnz"
            asked = names.integer(table.nnz, 0, f"0 to {blocks}")
            if asked > blocks:
                found = "" if isinstance(table.nnz, int) else f"{shown(table.nnz.text)}: "
                text = (
                    f"{found}found {asked}, wanted 0 to {blocks}: that many blocks has each scope of {label}"
                )
                raise Misfit(place, key, text)
        elif table.sparsity is not None:
            key = "sparsity"
            sparsity = names.number(table.sparsity, 1.0, "a number from 0 to 1")
            asked = surviving(sparsity, blocks)
        key = "multiple_of"
        unit = 1 if table.multiple_of is None else names.integer(table.multiple_of, 1, "1 or more")
    except ExpressionError as error:
        raise misfit(place, key, error, label) from error
    return Budget(nnz=min(blocks, -(-asked // unit) * unit), multiple_of=unit), sparsity
