"""Deciding by compiled loops: scopes that lie one after the other in memory, each with its blocks in order.

Owns the choice of loop for a budget, a norm and a dtype. Knows no tensors and no files. Called by the ways
that bring scopes into this order: runs as they lie in the storage, gathered after they were moved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.kernels.selecting import select_keys
from sparseprune.engine.kernels.sums import run_sums, tree_sum

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparseprune.engine.kernels.formats import Bits, Format
    from sparseprune.execution.recipes import Contest
    from sparseprune.execution.tensor_io import Mask

    Floats = NDArray[np.float64]


def keep_by_patterns(bits: Bits, form: Format, contest: Contest) -> Mask:
    """Bytes, one a block: 1 for those that survive. `bits` are flat, scope after scope, block after block."""
    if contest.block == 1 and contest.threshold is None:
        keep = np.empty(bits.size, dtype=np.uint8)
        select_keys(bits, form.magnitude, contest.blocks, contest.nnz, keep)
        return keep
    if contest.block == 1 and contest.threshold is not None:
        limit = form.limit(contest.threshold)
        reaches: Mask = ((bits & bits.dtype.type(form.magnitude)) >= limit).view(np.uint8)
        return reaches
    return keep_by_scores(_norms(bits, form, contest), contest)


def keep_by_scores(scores: Floats, contest: Contest) -> Mask:
    """The decision over scores of blocks that are not negative, flat, scope after scope."""
    if contest.threshold is not None:
        kept: Mask = (scores >= contest.threshold).view(np.uint8)
        return kept
    keep = np.empty(scores.size, dtype=np.uint8)
    select_keys(scores.view(np.uint64), (1 << 63) - 1, contest.blocks, contest.nnz, keep)
    return keep


def _norms(bits: Bits, form: Format, contest: Contest) -> Floats:
    """The norm of every block, over the tree of engine.scoring: the last dimension first."""
    power = int(contest.norm)
    *outer, run = contest.extent
    sums = run_sums(bits, form, run, power).reshape(-1, *outer)
    for axis in range(len(outer), 0, -1):
        sums = tree_sum(sums, axis)
    norms = sums if power == 1 else np.sqrt(sums)
    return norms / np.sqrt(float(contest.block)) if contest.rms else norms
