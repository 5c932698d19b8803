"""Sums by pairs: nothing adds up to zero, one term to itself, and the tree is that of neighbours."""

import pytest
import torch

from sparseprune.engine.scoring import pairwise_sum


@pytest.mark.parametrize("shape", [(2, 0), (2, 3, 0), (2, 0, 3), (2, 0, 0), (0, 3, 2), (2, 1, 1), (2, 3, 5)])
def test_the_last_dimensions_are_gone_and_the_first_one_stays(shape: tuple[int, ...]) -> None:
    terms = torch.ones(shape, dtype=torch.float64)
    total = pairwise_sum(terms, len(shape) - 1)
    assert total.tolist() == terms.flatten(1).sum(1).tolist()


def test_neighbours_are_added_first_and_an_odd_term_waits() -> None:
    large = 2.0**53
    # In order from the left, both ones are lost: (2**53 + 1) + 1 is 2**53.
    assert pairwise_sum(torch.tensor([large, 0.0, 1.0, 1.0], dtype=torch.float64), 1).item() == large + 2
    assert pairwise_sum(torch.tensor([large, 1.0, 1.0], dtype=torch.float64), 1).item() == large
    assert pairwise_sum(torch.tensor([1.0, 1.0, large], dtype=torch.float64), 1).item() == large + 2
