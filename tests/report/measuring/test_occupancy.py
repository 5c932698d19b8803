"""What is kept of a tensor while its slabs come: no more groups of rows than are begun."""

from __future__ import annotations

import numpy as np
import pytest

from sparseprune.engine.kernels.occupancy import packed
from sparseprune.report.facts import BLOCKS, BlockShape, Zeros
from sparseprune.report.measuring.blocking import Bits, Blocking
from sparseprune.report.measuring.occupancy import Occupancy
from sparseprune.report.measuring.slabs import cut

HEIGHTS = {1, 3, 4, 16, 32, 70}  # of the blocks below, a row and a column of a matrix of 70 rows


@pytest.mark.parametrize("shape", [(70, 130), (5, 70, 130)])
@pytest.mark.parametrize("size", [1, 64, 200, 700, 1300])
def test_a_group_is_kept_only_until_all_of_it_has_come(shape: tuple[int, ...], size: int) -> None:
    blocking = Blocking(shape, (*BLOCKS, BlockShape(3, 5)))
    occupancy = Occupancy(blocking)
    for slab in cut(blocking.stack, 1, size):
        occupancy.add(*blocking.find(slab, Bits(packed(np.zeros(slab.shape, dtype=np.bool_)))))
        assert {height for height, _, _ in occupancy._open} <= HEIGHTS
        assert len(occupancy._open) <= len(HEIGHTS)
    assert not occupancy._open
    assert occupancy.told()[0] == tuple(Zeros(size, size) for size in shape)


def test_slabs_may_come_in_any_order() -> None:
    blocking = Blocking((70, 130), (*BLOCKS, BlockShape(3, 5)))
    marks = np.random.default_rng(0).random(blocking.stack) < 0.02
    told = []
    for order in (1, -1):
        occupancy = Occupancy(blocking)
        for slab in list(cut(blocking.stack, 1, 200))[::order]:
            part = marks[:, slab.row : slab.row + slab.rows, slab.column : slab.column + slab.columns]
            occupancy.add(*blocking.find(slab, Bits(packed(np.ascontiguousarray(part)))))
        told.append(occupancy.told())
    assert told[0] == told[1]
    assert told[0][1] == Zeros(int((~marks.any(axis=2)).sum()), 70)


def test_a_vector_has_no_blocks() -> None:
    with pytest.raises(ValueError, match="no matrix has the shape"):
        Blocking((8,), BLOCKS)
