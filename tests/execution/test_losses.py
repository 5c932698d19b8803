"""Histograms of losses: in whatever pieces the losses come, that of all of them."""

import numpy as np
import pytest

from sparseprune.execution.losses import _binned, _joined


@pytest.mark.parametrize("cuts", [[], [0], [5], [0, 0, 40], [1, 2, 39], [13, 13, 27, 40, 40]])
@pytest.mark.parametrize("seed", range(3))
def test_pieces_of_losses_are_counted_as_all_of_them(cuts: list[int], seed: int) -> None:
    losses = np.exp(4 * np.random.default_rng(seed).standard_normal(40))
    found = None
    for piece in np.split(losses, cuts):
        found = _joined(found, _binned(piece))
    assert found is not None
    low, counts = _binned(losses)
    assert (found[0], found[1].tolist()) == (low, counts.tolist())
    assert counts.sum() == 40
