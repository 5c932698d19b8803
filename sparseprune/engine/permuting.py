"""Permutations for N:M: an order of columns in which groups of M neighbours lose less than as they lie.

Owns the search: groups are paired at random, and each pair splits its columns between its groups anew. Knows
no model and no file: who permutes the columns of a matrix has to permute what writes its inputs as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.kernels.regrouping import lost, trade

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Order = NDArray[np.int64]

ROUNDS = 48
_IDLE = 6  # rounds of which none changed anything, after which nothing more is to be had


def best_order(
    scores: NDArray[np.float32],
    keep: int,
    group: int,
    *,
    cells: Sequence[int] | None = None,
    seed: int = 0,
    between: Callable[[], None] = lambda: None,
) -> Order:
    """The order of columns, (columns,), in which pruning by N:M loses least: column i comes from order[i].

    `scores` (columns, rows), contiguous and not negative: what is lost where an element is pruned; of each
    row `keep` of every `group` neighbouring columns survive. Columns change places among groups of one of the
    `cells`, a number for each group; None: among all. Within a group the columns ascend. The identity where
    no order is found that loses less. `between` is called between rounds.

    The channel permutations of Pool and Yu 2021, with the splits of two groups in place of their search.

    Raises:
        ValueError: scores that are not finite, or columns that are not whole groups.

    >>> best_order(np.array([[9], [8], [1], [2]], dtype=np.float32), 1, 2).tolist()
    [1, 2, 0, 3]
    """
    columns = len(scores)
    if group < 1 or columns % group or not 0 <= keep <= group:
        raise ValueError(f"{keep} of {group} of {columns} columns: wanted whole groups")
    if not np.isfinite(scores).all():
        raise ValueError("scores that are not finite")
    order = np.arange(columns, dtype=np.int64).reshape(-1, group)
    whole = float(scores.max(initial=0.0))
    if keep in (0, group) or len(order) < 2 or whole == 0:
        return order.reshape(-1)
    scaled = np.ascontiguousarray(scores / np.float32(whole))
    chance = np.random.default_rng(seed)
    places = _places(len(order), cells)
    before, least, idle = lost(scaled, order, group - keep), group - keep, 0
    found = order.copy()
    for _ in range(ROUNDS):
        between()
        chosen = np.concatenate([_paired(chance.permutation(own)) for own in places])
        pairs = np.ascontiguousarray(found[chosen].reshape(-1, 2 * group))
        traded = pairs.copy()
        trade(scaled, traded, least)
        idle = 0 if (traded != pairs).any() else idle + 1
        found[chosen] = traded.reshape(-1, 2, group)
        if idle == _IDLE:
            break
    found.sort(axis=1)
    return (found if lost(scaled, found, least) < before else order).reshape(-1)


def pruned(scores: NDArray[np.float32], order: Order, keep: int, group: int) -> float:
    """The sum of the scores that N:M along columns in this order prunes; `scores` (columns, rows)."""
    groups = np.ascontiguousarray(order.reshape(-1, group))
    return lost(np.ascontiguousarray(scores), groups, group - keep)


def _places(groups: int, cells: Sequence[int] | None) -> list[Order]:
    """The numbers of the groups of each cell that has two or more."""
    labels = np.zeros(groups, dtype=np.int64) if cells is None else np.asarray(cells)
    own = [np.flatnonzero(labels == cell) for cell in np.unique(labels)]
    return [each for each in own if len(each) > 1] or [np.empty(0, dtype=np.int64)]


def _paired(order: Order) -> Order:
    """Pairs of groups that are neighbours in this order: (pairs, 2); an odd one is left out."""
    return order[: len(order) // 2 * 2].reshape(-1, 2)
