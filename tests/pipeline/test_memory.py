"""The peak that is told before a run: it follows the largest slabs and the number of jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from sparseprune.checkpoint import open_checkpoint
from sparseprune.engine import selection
from sparseprune.pipeline import expected_peak, make_plan, memory
from sparseprune.spec import parse_spec
from tests.samples import TWO_OF_FOUR, mlp_tensors

if TYPE_CHECKING:
    from pathlib import Path

GLOBAL = TWO_OF_FOUR.replace("shape = [1, 4]", "shape = [-1, -1]")


def peak(folder: Path, tensors: dict[str, torch.Tensor], spec: str, jobs: int = 1) -> int:
    save_file(tensors, folder / "m.safetensors")
    return expected_peak(make_plan(open_checkpoint(folder / "m.safetensors"), parse_spec(spec)), jobs)


def test_jobs_add_slabs_and_no_more_than_there_are(tmp_path: Path) -> None:
    one, two, four, many = (peak(tmp_path, mlp_tensors(), TWO_OF_FOUR, jobs) for jobs in (1, 2, 4, 100))
    assert one < two < four
    assert four == many


def test_a_tensor_that_is_cut_costs_no_more_than_its_slabs(tmp_path: Path) -> None:
    small = {"0.a.weight": torch.zeros(4096, 4096, dtype=torch.bfloat16)}
    large = {"0.a.weight": torch.zeros(3 * 4096, 4096, dtype=torch.bfloat16)}
    assert peak(tmp_path, small, TWO_OF_FOUR) == peak(tmp_path, large, TWO_OF_FOUR)
    assert peak(tmp_path, small, GLOBAL) + (32 << 20) < peak(tmp_path, large, GLOBAL)


def test_the_ways_of_selection_are_told_apart_where_the_engine_does() -> None:
    """The engine's limits stand beside numpy and torch, which a plan does not import."""
    assert memory._PAIRWISE == selection._PAIRWISE_LIMIT
    assert memory._HISTOGRAM == selection._HISTOGRAM_LIMIT
