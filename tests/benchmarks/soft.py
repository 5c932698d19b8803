"""How fast soft thresholding is beside plain vectorized torch, as people write it; medians of one run.

Run by hand: `python -m tests.benchmarks.soft`; results are kept in README.md beside this file. The plain
versions round thresholds and norms to float32, and look for no NaN; the engine does neither.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from sparseprune.engine import BlockCoupling, BlockSpec, ScopeSpec, SparseBlock

ROUNDS = 7
SIZE = 2048
SHAPES = {"elements": (1, 1), "rows": (1, -1), "16x16 tiles": (16, 16), "1x16 runs": (1, 16)}
MOST_STEPS, TOLERANCE = 20, 1e-8


def elements(v: Tensor, t: float) -> Tensor:
    """`sign(v) * max(0, |v| - t)`."""
    return v.sign() * (v.abs() - t).relu()


def groups(parts: list[Tensor], dims: list[tuple[int, ...]], t: float) -> list[Tensor]:
    """`v * max(0, 1 - t / ||v||)` over some dimensions of each part, together."""
    squares = [v.square().sum(dim, keepdim=True) for v, dim in zip(parts, dims, strict=True)]
    total = squares[0] + sum(one.reshape(squares[0].shape) for one in squares[1:])
    factor = (1 - t / total.sqrt()).clamp(min=0)
    return [v * factor.reshape(one.shape) for v, one in zip(parts, squares, strict=True)]


def conditioned_elements(v: Tensor, h: Tensor, t: float) -> Tensor:
    """`sign(v) * max(0, |v| - t / h)`, the closed form of one element."""
    return v.sign() * (v.abs() - t / h).relu()


def conditioned_groups(
    parts: list[Tensor], diagonals: list[Tensor], dims: list[tuple[int, ...]], t: float
) -> list[Tensor]:
    """Newton's steps on `||h v / (h s + t)|| = 1` for all blocks at one time, in float64."""
    curved = [h.double() for h in diagonals]
    pulls = [h * v.double() for h, v in zip(curved, parts, strict=True)]
    shapes = [v.sum(dim, keepdim=True).shape for v, dim in zip(parts, dims, strict=True)]

    def over(terms: list[Tensor]) -> Tensor:
        sums = [one.sum(dim, keepdim=True) for one, dim in zip(terms, dims, strict=True)]
        return sums[0] + sum(one.reshape(shapes[0]) for one in sums[1:])

    reach = over([pull.square() for pull in pulls]).sqrt()
    size = torch.zeros_like(reach)
    for _ in range(MOST_STEPS):
        bottoms = [h * size.reshape(shape) + t for h, shape in zip(curved, shapes, strict=True)]
        squares = [(pull / bottom).square() for pull, bottom in zip(pulls, bottoms, strict=True)]
        square = over(squares)
        slope = over([one * h / bottom for one, h, bottom in zip(squares, curved, bottoms, strict=True)])
        norm = square.sqrt()
        size = (size + square * (norm - 1) / slope).clamp(min=0)
        if bool(((norm - 1).abs() <= TOLERANCE).logical_or(reach <= t).all()):
            break
    size = torch.where(reach > t, size, 0.0)
    sizes = [size.reshape(shape) for shape in shapes]
    return [(pull * s / (h * s + t)).float() for pull, h, s in zip(pulls, curved, sizes, strict=True)]


def seconds(work: Callable[[], object]) -> float:
    """What one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compare(name: str, weights: list[Tensor], block: SparseBlock, plain: Callable[[], list[Tensor]],
            t: float, diagonals: list[Tensor] | None) -> None:  # fmt: skip
    """Print a row; the weights are as they were before each call, and both results are alike."""
    scope = ScopeSpec(block, (1,) * block.ndim)
    before = [w.clone() for w in weights]
    given = dict(zip(block.blocks(), diagonals, strict=True)) if diagonals else None
    rounds: list[tuple[float, float]] = []
    for _ in range(ROUNDS):
        for w, old in zip(weights, before, strict=True):
            w.copy_(old)
        results: list[Tensor] = []
        simple = seconds(lambda: results.extend(plain()))  # noqa: B023  (called at once)
        ours = seconds(lambda: scope.soft_threshold(t, given))
        rounds.append((simple, ours))
    for w, one in zip(weights, results, strict=True):
        if not torch.allclose(w.float(), one.float().reshape(w.shape), rtol=1e-2, atol=1e-3):
            raise ValueError(f"{name}: the results differ")
    simple, ours = (1000 * statistics.median(each) for each in zip(*rounds, strict=True))
    ratio = statistics.median(ours / simple for simple, ours in rounds)
    print(f"| {name} | {str(weights[0].dtype)[6:]} | {simple:.1f} | {ours:.1f} | {ratio:.2f}x |", flush=True)


def main() -> None:
    """Print a table in Markdown."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    print("| blocks | dtype | plain torch, ms | engine, ms | ratio |")
    print("|---|---|---|---|---|")
    for conditioned in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            for name, parts in (
                ("elements", 1),
                ("rows", 1),
                ("16x16 tiles", 1),
                ("1x16 runs", 1),
                ("fused channels", 3),
            ):
                weights = [torch.randn(SIZE, SIZE, generator=generator).to(dtype) for _ in range(parts)]
                curved = [torch.rand(SIZE, SIZE, generator=generator) + 0.1 for _ in range(parts)]
                measure(name, weights, curved if conditioned else None)


def measure(name: str, weights: list[Tensor], curved: list[Tensor] | None) -> None:
    """One structure, with conditioners or without."""
    label = f"{name}, conditioned" if curved else name
    first = weights[0]
    if name == "elements":
        compare(label, weights, BlockSpec(first, (1, 1)), lambda: [_alone(first, curved)], 0.7, curved)
        return
    if name == "fused channels":
        specs = [BlockSpec(w, shape) for w, shape in zip(weights, [(1, -1), (1, -1), (-1, 1)], strict=True)]
        block: SparseBlock = BlockCoupling(specs, [(0, 1), (0, 1), (1, 0)])
        dims: list[tuple[int, ...]] = [(1,), (1,), (0,)]
        cells = [tuple(w.shape) for w in weights]
    else:
        block = BlockSpec(first, SHAPES[name])
        high, wide = block.shape
        cells = [(SIZE // high, high, SIZE // wide, wide)]
        dims = [(1, 3)]
    size = block.numel_per_block()
    t = 0.7 * size**0.5 * (0.5 if curved else 1.0)

    def plain() -> list[Tensor]:
        parts = [w.float().view(cell) for w, cell in zip(weights, cells, strict=True)]
        if curved:
            found = conditioned_groups(
                parts, [h.view(cell) for h, cell in zip(curved, cells, strict=True)], dims, t
            )
        else:
            found = groups(parts, dims, t)
        return [one.to(w.dtype) for one, w in zip(found, weights, strict=True)]

    compare(label, weights, block, plain, t, curved)


def _alone(first: Tensor, curved: list[Tensor] | None) -> Tensor:
    """Single elements, in float32."""
    found = conditioned_elements(first.float(), curved[0], 0.7) if curved else elements(first.float(), 0.7)
    return found.to(first.dtype)


if __name__ == "__main__":
    main()
