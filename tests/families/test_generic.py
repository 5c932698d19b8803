"""Patterns for every matrix of layers: what survives is checked in the weights that were written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.families.checkpoints import Checkpoint, changed, make, prune, read
from tests.families.models import LAYERS


def projections() -> set[str]:
    return {
        f"model.layers.{layer}.{part}_proj.weight"
        for layer in range(LAYERS)
        for part in (*(f"self_attn.{name}" for name in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
    }


def of_neighbours(size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Single weights, `size` side by side in a row."""
    return lambda matrix: matrix.reshape(-1, size, 1)


def of_pairs(size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Two neighbours as one, `size` side by side in a row."""
    return lambda matrix: matrix.reshape(-1, size, 2)


def of_rows(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.unsqueeze(-1)


def of_column_pairs(matrix: torch.Tensor) -> torch.Tensor:
    """Columns j and j + 8 of every 16 as one, four neighbouring pairs together; in plain loops."""
    scopes = []
    for row in matrix:
        for first in range(0, row.numel(), 16):
            pairs = [torch.stack([row[first + j], row[first + j + 8]]) for j in range(8)]
            scopes += [torch.stack(pairs[:4]), torch.stack(pairs[4:])]
    return torch.stack(scopes)


def of_runs_8_rows_apart(matrix: torch.Tensor) -> torch.Tensor:
    """Sixteen columns of row j and of row j + 8 of every 16 rows; in plain loops."""
    rows, columns = matrix.shape
    return torch.stack(
        [
            torch.stack([matrix[row, first : first + 16], matrix[row + 8, first : first + 16]])
            for top in range(0, rows, 16)
            for row in range(top, top + 8)
            for first in range(0, columns, 16)
        ]
    )


def of_tiles(matrix: torch.Tensor) -> torch.Tensor:
    """The 16 x 16 blocks of a matrix, all in one scope."""
    rows, columns = matrix.shape
    tiles = matrix.reshape(rows // 16, 16, columns // 16, 16).transpose(1, 2)
    return tiles.reshape(1, -1, 16 * 16)


@pytest.mark.parametrize(
    ("spec", "options", "scopes_of", "share"),
    [
        ("2of4", (), of_neighbours(4), 0.5),
        ("4of8", (), of_neighbours(8), 0.5),
        ("pairs-4of8", (), of_pairs(4), 0.5),
        ("nofm", (), of_neighbours(4), 0.75),
        ("nofm", ("--set=n=3", "--set=m=8"), of_neighbours(8), 0.625),
        ("coupled-2of4", (), of_column_pairs, 0.5),
        ("block16", (), of_runs_8_rows_apart, 0.5),
        ("block16x16", (), of_tiles, 0.5),
        ("block16x16", ("--set=sparsity=0.25",), of_tiles, 0.25),
        ("unstructured", (), of_rows, 0.5),
        ("unstructured", ("--set=sparsity=0.9",), of_rows, 0.9),
    ],
)
def test_in_every_scope_the_largest_blocks_survive(
    dense: Checkpoint,
    spec: str,
    options: tuple[str, ...],
    scopes_of: Callable[[torch.Tensor], torch.Tensor],
    share: float,
) -> None:
    """`scopes_of` gives a matrix as (scopes, blocks, elements)."""
    pruned = prune(dense, spec, *options)
    assert changed(dense, pruned) == projections()
    before, after = dense.tensors(), read(pruned)
    for name in projections():
        scopes, left = scopes_of(before[name]), scopes_of(after[name])
        blocks = scopes.shape[1]
        nnz = blocks - int(share * blocks)
        alive = left.ne(0).all(-1)
        assert torch.equal(alive, left.ne(0).any(-1)), "a block is kept or pruned as one"
        assert alive.sum(1).eq(nnz).all()
        norms = scopes.double().square().sum(-1)
        best = norms.topk(nnz, dim=1).indices
        assert torch.equal(alive, torch.zeros_like(alive).scatter(1, best, value=True))


@pytest.mark.parametrize(("options", "share"), [((), 0.5), (("--set=sparsity=0.8",), 0.8)])
def test_unstructured_global_keeps_the_largest_of_the_whole_model(
    dense: Checkpoint, options: tuple[str, ...], share: float
) -> None:
    pruned = prune(dense, "unstructured-global", *options)
    assert changed(dense, pruned) == projections()
    before, after = dense.tensors(), read(pruned)
    weights = torch.cat([before[name].flatten().abs() for name in projections()])
    nnz = weights.numel() - int(share * weights.numel())
    least = weights.topk(nnz).values.min()
    survivors = [after[name][after[name] != 0].abs() for name in projections()]
    assert sum(each.numel() for each in survivors) == nnz
    assert torch.cat(survivors).min() == least


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_2of4_reaches_all_experts_and_leaves_routers_alone(family: str, tmp_path: Path) -> None:
    dense = make(family, tmp_path)
    reached = changed(dense, prune(dense, "2of4"))
    matrices = {name for name, tensor in dense.tensors().items() if tensor.ndim == 2}
    left = {name.rpartition("layers.")[2].lstrip("01.") for name in matrices - reached}
    known = {"model.embed_tokens.weight", "lm_head.weight"}
    assert {name for name in left if "gate" not in name and "kv_a_proj" not in name} == known
    assert sum(".experts." in name for name in reached) == sum(".experts." in name for name in matrices)
    assert any(name.endswith(("mlp.gate.weight", "moe.gate.weight")) for name in left)
