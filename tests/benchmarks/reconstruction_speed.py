"""How long `admm` takes beside SparseGPT: one matrix at 2:4, in memory, one thread.

`python -m tests.benchmarks.reconstruction_speed [--size N ...] [--rounds N]` prints a Markdown table. All
have their turn in every round; CPU seconds with the checks of `Matrix`; ratios are medians over the rounds.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from sparseprune import BlockSpec, Matrix, ScopeSpec, admm, projection
from sparseprune.engine import errors_of
from tests.benchmarks.loss_metric import correlated
from tests.benchmarks.reconstruction import table
from tests.benchmarks.sparsegpt import n_of_m, sparsegpt


def ways(dense: Tensor, moment: Tensor) -> dict[str, Callable[[], Tensor]]:
    params = [torch.empty_like(dense)]
    project = projection(ScopeSpec(BlockSpec(params[0], (1, 1)), (1, 4)), 2, params)
    return {
        "SparseGPT": lambda: sparsegpt(dense, moment, n_of_m(2, 4)),
        "fast": lambda: admm([Matrix(dense, moment)], project, effort="fast")[0].weights,
        "best": lambda: admm([Matrix(dense, moment)], project)[0].weights,
    }


def measured(size: int, rounds: int) -> list[list[str]]:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(size, size, generator=generator) / math.sqrt(size)
    moment = correlated(size, generator)
    each = ways(dense, moment)
    seconds: dict[str, list[float]] = {name: [] for name in each}
    errors: dict[str, float] = {}
    for _ in range(rounds):
        for name, way in each.items():
            began = time.process_time()
            weights = way()
            seconds[name].append(time.process_time() - began)
            errors[name] = errors_of(Matrix(dense, moment), weights).outputs[0]
    rows = []
    for name, taken in seconds.items():
        ratio = statistics.median(
            mine / theirs for mine, theirs in zip(taken, seconds["SparseGPT"], strict=True)
        )
        cells = f"{statistics.median(taken):.2f}", f"{ratio:.2f}", f"{errors[name]:.4f}"
        rows.append([f"{size}x{size}", name, *cells, f"{errors[name] / errors['SparseGPT']:.3f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, action="append", help="1024 and 2048 where none is given")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for size in asked.size or (1024, 2048) for row in measured(size, asked.rounds)]
    table("2:4", ["matrix", "method", "CPU seconds", "to SparseGPT", "error", "to SparseGPT"], rows)


if __name__ == "__main__":
    main()
