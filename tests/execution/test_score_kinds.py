"""The table of score kinds: a kind of one's own is one row of it, and one row of keys in a spec."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseprune.execution import scores
from sparseprune.execution.scores import SCORE_KINDS, ScoreKind
from sparseprune.spec import schema
from tests.commands import imported, ok
from tests.limits import narrow
from tests.samples import TWO_OF_FOUR, write_spec

CHANNELS = """
version = 1
[scope.proj]
tensors = "{layer}.{name}.weight"
block = [1, -1]
shape = [-1, 1]
nnz = 3
"""
SINGLE = TWO_OF_FOUR.replace("shape = [1, 4]", "shape = [-1, -1]").replace("nnz = 2", "sparsity = 0.75")


def taylor(weights: Any, gradients: Any) -> Any:
    """|w g|: Molchanov et al. 2019, Importance Estimation for Neural Network Pruning."""
    return weights * gradients


def nearest_to_one(weights: Any) -> Any:
    return 1 / (1 + abs(weights - 1))


def last(score: Any, label: str, numbers: Any) -> Any:
    return numbers.astype(np.float64)


def add(monkeypatch: pytest.MonkeyPatch, name: str, row: ScoreKind, *keys: str) -> None:
    monkeypatch.setattr(scores, "SCORE_KINDS", {**SCORE_KINDS, name: row})
    monkeypatch.setattr(schema, "SCORE_KEYS", {**schema.SCORE_KEYS, name: keys})


def pruned_by(folder: Path, spec: str, score: str, weights: torch.Tensor) -> torch.Tensor:
    save_file({"a.b.weight": weights}, folder / "m.safetensors")
    path = write_spec(folder, f"{spec.rstrip()}\nscore = {{ {score} }}\n")
    ok("plan", folder / "m.safetensors", path)
    ok("apply", folder / "m.safetensors", path, "--force")
    return load_file(folder / "m.pruned.safetensors")["a.b.weight"]


def largest(numbers: torch.Tensor, count: int) -> torch.Tensor:
    """1 for the `count` largest of each row."""
    keep = torch.zeros(numbers.shape)
    return keep.scatter(-1, numbers.argsort(-1, descending=True)[..., :count], 1.0)


def survivors(spec: str, ranks: torch.Tensor, norm: float = 2) -> torch.Tensor:
    """1 for the elements that survive a spec by their scores, all of them different."""
    if spec == CHANNELS:
        return largest(torch.linalg.vector_norm(ranks.double(), norm, dim=1), 3)[:, None]
    scopes = ranks.reshape(-1, 4) if spec == TWO_OF_FOUR else ranks.reshape(1, -1)
    return largest(scopes, 2 if spec == TWO_OF_FOUR else ranks.numel() // 4).reshape(ranks.shape)


@pytest.mark.parametrize("limit", [1 << 20, 64])  # in one slab, and in many
@pytest.mark.parametrize("spec", [TWO_OF_FOUR, SINGLE, CHANNELS], ids=["2:4", "global", "channels"])
def test_a_kind_that_reads_a_number_for_each_weight_is_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, limit: int
) -> None:
    add(monkeypatch, "taylor", ScoreKind("values", elements=taylor), "file", "nonfinite")
    narrow(monkeypatch, limit, tile=limit)
    weights, gradients = torch.randn((2, 8, 16), generator=torch.Generator().manual_seed(6))
    save_file({"a.b.weight": gradients}, tmp_path / "gradients.safetensors")
    for more in ("", ', nonfinite = "prune"'):
        key = f'kind = "taylor", file = "gradients.safetensors"{more}'
        wanted = survivors(spec, (weights.double() * gradients.double()).abs())
        assert torch.equal(pruned_by(tmp_path, spec, key, weights), weights * wanted)


@pytest.mark.parametrize("spec", [TWO_OF_FOUR, SINGLE, CHANNELS], ids=["2:4", "global", "channels"])
def test_a_kind_that_reads_weights_alone_is_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    add(monkeypatch, "near", ScoreKind(elements=nearest_to_one, norm=1.0))
    weights = torch.randn((8, 16), generator=torch.Generator().manual_seed(12))
    ranks = 1 / (1 + (weights.double().abs() - 1).abs())
    wanted = survivors(spec, ranks, norm=1)
    assert spec != CHANNELS or not torch.equal(wanted, survivors(spec, ranks, norm=2))
    assert torch.equal(pruned_by(tmp_path, spec, 'kind = "near"', weights), weights * wanted)


@pytest.mark.parametrize("spec", [TWO_OF_FOUR, SINGLE, CHANNELS], ids=["2:4", "global", "channels"])
def test_a_kind_that_scores_blocks_whatever_they_hold_is_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    add(monkeypatch, "last", ScoreKind(blocks=last))
    weights = torch.randn((8, 16), generator=torch.Generator().manual_seed(8))
    numbers = torch.arange(8.0)[:, None] if spec == CHANNELS else torch.arange(128.0).reshape(8, 16)
    wanted = survivors(spec, numbers)
    assert torch.equal(pruned_by(tmp_path, spec, 'kind = "last"', weights), weights * wanted)


def test_every_kind_has_a_row_and_keys_and_a_file_where_it_reads_one() -> None:
    assert list(SCORE_KINDS) == list(schema.SCORE_KEYS)
    for name, row in SCORE_KINDS.items():
        assert ("file" in schema.SCORE_KEYS[name]) == (row.reads not in {None, "router"}), name
        assert row.elements is not None or row.reads != "vector", name


def test_a_plan_asks_the_table_without_numpy() -> None:
    code = "from sparseprune.execution import plan, schedule, scores, strategy"
    assert imported(code).isdisjoint({"torch", "numpy"})
