"""How fast blocks are selected: by the engine, by compiled loops and by torch's own means; medians.

Run by hand: `python -m tests.benchmarks.selection`; results are kept in README.md beside this file.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sparseprune.engine import selection
from sparseprune.engine.kernels.selecting import select_keys
from sparseprune.engine.scoring import magnitude_keys

ELEMENTS = 1 << 20
ROUNDS = 9


def milliseconds(work: Callable[[], object]) -> float:
    """The median of some rounds, after one that is not counted."""
    work()
    rounds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        rounds.append(1000 * (time.perf_counter() - began))
    return statistics.median(rounds)


def torch_sort(keys: torch.Tensor, nnz: int) -> torch.Tensor:
    """The first `nnz` of a stable sort, which is exact."""
    ranked = keys.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros(keys.shape, dtype=torch.bool).scatter_(-1, ranked[..., :nnz], value=True)


def torch_kth(keys: torch.Tensor, nnz: int) -> torch.Tensor:
    """Everything that reaches the k-th largest, which keeps too many where keys tie."""
    return keys >= keys.kthvalue(keys.shape[-1] - nnz + 1, dim=-1, keepdim=True).values


def compiled(keys: torch.Tensor, nnz: int) -> np.ndarray[Any, Any]:
    """What runs on the CPU without torch."""
    patterns = keys.numpy().reshape(-1)
    bits = patterns.view(f"uint{8 * patterns.itemsize}")
    keep = np.empty(bits.size, dtype=np.uint8)
    select_keys(bits, (1 << 8 * bits.itemsize - 1) - 1, keys.shape[-1], nnz, keep)
    return keep


def main() -> None:
    """Print a table in Markdown."""
    torch.set_num_threads(1)
    print("| dtype | blocks a scope | torch sort | torch kthvalue | engine, in numpy | compiled |")
    print("|---|---|---|---|---|---|")
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        keys = magnitude_keys(torch.randn(ELEMENTS, generator=generator).to(dtype))
        for blocks in (4, 8, 16, 32, 64, 2048, ELEMENTS):
            scopes, nnz = keys.view(-1, blocks), blocks // 2
            times = [
                milliseconds(lambda way=way, scopes=scopes, nnz=nnz: way(scopes, nnz))  # type: ignore[misc]
                for way in (torch_sort, torch_kth, selection.select, compiled)
            ]
            cells = " | ".join(f"{each:.1f}" for each in times)
            print(f"| {str(dtype).removeprefix('torch.')} | {blocks} | {cells} |")


if __name__ == "__main__":
    main()
