"""Scores other than the plain norm: other norms, root mean squares, ready block scores, soft budgets."""

import hashlib

import numpy as np
import pytest
import torch

from sparseprune import BlockSpec, ScopeCoupling, ScopeSpec, SparsityError
from sparseprune.execution.scores import random_scores


def coupled() -> tuple[ScopeCoupling, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide, narrow = torch.randn(4, 6, generator=generator), torch.randn(2, 2, generator=generator)
    scopes = [ScopeSpec(BlockSpec(tensor, (1, -1)), ()) for tensor in (wide, narrow)]
    return ScopeCoupling(scopes, [(0, 1), (0, 1)]), wide, narrow


@pytest.mark.parametrize("p", [1, 2, 3, float("inf")])
@pytest.mark.parametrize("rms", [False, True])
def test_block_norms_of_any_order_and_per_element(p: float, rms: bool) -> None:
    scope, wide, narrow = coupled()
    expected = torch.cat(
        [
            torch.linalg.vector_norm(tensor.double(), p, dim=1) / (tensor.shape[1] ** 0.5 if rms else 1)
            for tensor in (wide, narrow)
        ]
    )
    torch.testing.assert_close(scope.block_norms(None, p, rms=rms)[0, 0], expected, rtol=1e-14, atol=0)


def test_block_norms_refuse_nan_by_name() -> None:
    with pytest.raises(SparsityError, match=r"w: NaN at \[1, 2\]"):
        ScopeSpec(
            BlockSpec(torch.tensor([[1.0, 2, 3], [4, 5, float("nan")]]), (1, -1), "w"), ()
        ).block_norms()


def test_thresholds_compare_ready_scores() -> None:
    scope, wide, narrow = coupled()
    scores = torch.tensor([[[1.0, 2, 3, 4, 5, 6]]])
    keeps = scope.threshold_masks(3.0, block_scores=scores)
    big, small = scope.blocks()
    assert keeps[big][:, 0].tolist() == [False, False, True, True]
    assert keeps[small][:, 0].tolist() == [True, True]
    assert wide.all()
    assert narrow.all()
    with pytest.raises(SparsityError, match="NaN"):
        scope.threshold_masks(3.0, block_scores=scores / 0 * 0)
    with pytest.raises(SparsityError, match="shape"):
        scope.threshold_masks(3.0, block_scores=scores[0])


def test_soft_budget_is_kth_mid_of_the_weights() -> None:
    scope, _, _ = coupled()
    single = scope.scopes[0]
    for nnz in range(1, 5):
        assert torch.equal(scope.soft_budget(nnz, 0.5), scope.kth_mid(None, nnz, 0.5))
        assert torch.equal(single.soft_budget(nnz), single.kth_mid(None, nnz))


def split_mix_64(state: int) -> int:
    """The output that belongs to a state, as the paper has it (Steele, Lea and Flood 2014, figure 17)."""
    mixed = state
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ mixed >> shift) * factor % 2**64
    return mixed ^ mixed >> 31


@pytest.mark.parametrize(("seed", "name"), [(0, "w"), (7, "w"), (0, "v"), (2**63 - 1, "é.channel[layer=3]")])
def test_random_scores_are_those_of_split_mix_in_plain_numbers(seed: int, name: str) -> None:
    numbers = [0, 1, 2, 1000, 2**32, 2**63, 2**64 - 1]
    start = int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest(), "little")
    steps = [(start + (number + 1) * 0x9E3779B97F4A7C15) % 2**64 for number in numbers]
    found = random_scores(seed, name, np.array(numbers, dtype=np.uint64))
    assert found.tolist() == [(split_mix_64(step) >> 11) / 2**53 for step in steps]


def test_random_scores_are_uniform_and_differ_by_seed_and_name() -> None:
    scores = random_scores(0, "w", np.arange(100_000, dtype=np.uint64))
    assert float(scores.min()) >= 0
    assert float(scores.max()) < 1
    assert float(scores.mean()) == pytest.approx(0.5, abs=0.01)
    assert len(set(scores.tolist())) == 100_000
    few = np.arange(100, dtype=np.uint64)
    for other in (random_scores(1, "w", few), random_scores(0, "v", few)):
        assert not (other == scores[:100]).any()
