"""Scores and soft thresholds of a spec, against direct computations on the dense tensors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseprune import load_masks
from tests.commands import ok, refused
from tests.limits import narrow
from tests.samples import CHANNELS, TWO_OF_FOUR, mlp_tensors, write_spec

ROWS = """
version = 1
[scope.rows]
tensors = "{layer}.{name}.weight"
block = [1, -1]
shape = [-1, -1]
nnz = 3
"""
UNSTRUCTURED_ROWS = TWO_OF_FOUR.replace("shape = [1, 4]", "shape = [1, -1]").replace(
    "nnz = 2", "sparsity = 0.5"
)


def pruned_by(
    folder: Path, spec: str, tensors: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    save_file(mlp_tensors() if tensors is None else tensors, folder / "m.safetensors")
    ok("apply", folder / "m.safetensors", write_spec(folder, spec), "--force")
    return load_file(folder / "m.pruned.safetensors")


def with_score(spec: str, score: str) -> str:
    return f"{spec}score = {score}\n"


def weights() -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in mlp_tensors().items() if name.endswith("weight")}


def kept_rows(tensor: torch.Tensor, scores: torch.Tensor, nnz: int) -> torch.Tensor:
    """The tensor with all but the `nnz` rows of the largest scores zero; scores must differ."""
    assert len(set(scores.tolist())) == scores.numel()
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    keep[scores.argsort(descending=True)[:nnz]] = True
    return tensor * keep[:, None]


@pytest.mark.parametrize(("norm", "order"), [("1", 1.0), ("2", 2.0), ('"inf"', float("inf"))])
def test_magnitude_takes_the_norm_that_is_asked_for(tmp_path: Path, norm: str, order: float) -> None:
    pruned = pruned_by(tmp_path, with_score(ROWS, f'{{ kind = "magnitude", norm = {norm} }}'))
    for name, tensor in weights().items():
        scores = torch.linalg.vector_norm(tensor.double(), order, dim=1)
        assert torch.equal(pruned[name], kept_rows(tensor, scores, 3)), name


def test_rms_compares_blocks_of_unlike_size_fairly(tmp_path: Path) -> None:
    spec = """
version = 1
[scope.wide]
tensors = "wide"
block = [1, -1]
shape = [-1, -1]
[scope.narrow]
tensors = "narrow"
block = [1, -1]
shape = [-1, -1]
[scope_coupling.both]
scopes = ["wide", "narrow"]
nnz = 4
{score}
"""
    tensors = {"wide": torch.full((4, 100), 1.0), "narrow": torch.full((4, 4), 2.0)}
    plain = pruned_by(tmp_path, spec.format(score=""), tensors)
    assert plain["wide"].all()
    assert not plain["narrow"].any()
    fair = pruned_by(
        tmp_path, spec.format(score='score = { kind = "magnitude", normalize = "rms" }'), tensors
    )
    assert not fair["wide"].any()
    assert fair["narrow"].all()


def test_wanda_is_weight_times_input_norm_compared_within_each_row(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    norms = {name: torch.rand(tensor.shape[1], generator=generator) for name, tensor in weights().items()}
    save_file(norms, tmp_path / "stats.safetensors")
    pruned = pruned_by(
        tmp_path, with_score(UNSTRUCTURED_ROWS, '{ kind = "wanda", file = "stats.safetensors" }')
    )
    for name, tensor in weights().items():
        metric = tensor.double().abs() * norms[name].double()
        drop = metric.argsort(dim=1, stable=True)[:, : tensor.shape[1] // 2]
        assert torch.equal(pruned[name], tensor.scatter(1, drop, 0.0)), name


def test_wanda_of_matrices_whose_input_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    norms = {name: torch.rand(tensor.shape[0], generator=generator) for name, tensor in weights().items()}
    save_file(norms, tmp_path / "stats.safetensors")
    spec = with_score(TWO_OF_FOUR, '{ kind = "wanda", file = "stats.safetensors", input_dim = 0 }')
    spec = spec.replace("shape = [1, 4]", "shape = [4, 1]")
    for limit in (1 << 20, 64):  # in one slab, and in many
        narrow(monkeypatch, limit, tile=limit)
        pruned = pruned_by(tmp_path, spec)
        for name, tensor in weights().items():
            metric = (tensor.double().abs() * norms[name].double()[:, None]).reshape(-1, 4, tensor.shape[1])
            drop = metric.argsort(dim=1, stable=True)[:, :2]
            assert torch.equal(
                pruned[name], tensor.reshape(-1, 4, tensor.shape[1]).scatter(1, drop, 0.0).flatten(0, 1)
            )


def test_obd_is_squared_weight_times_hessian_diagonal(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    diagonal = {name: torch.rand(tensor.shape[1], generator=generator) for name, tensor in weights().items()}
    save_file(diagonal, tmp_path / "h.safetensors")
    pruned = pruned_by(tmp_path, with_score(ROWS, '{ kind = "obd", file = "h.safetensors" }'))
    for name, tensor in weights().items():
        scores = (tensor.double().square() * diagonal[name].double()).sum(1)
        assert torch.equal(pruned[name], kept_rows(tensor, scores, 3)), name


def test_values_rank_instead_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(6)
    values = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in weights().items()}
    save_file(values, tmp_path / "v.safetensors")
    for limit in (1 << 20, 64):
        narrow(monkeypatch, limit, tile=limit)
        pruned = pruned_by(tmp_path, with_score(TWO_OF_FOUR, '{ kind = "values", file = "v.safetensors" }'))
        for name, tensor in weights().items():
            drop = values[name].abs().reshape(tensor.shape[0], -1, 4).argsort(dim=2, stable=True)[:, :, :2]
            assert torch.equal(
                pruned[name], tensor.reshape(tensor.shape[0], -1, 4).scatter(2, drop, 0.0).flatten(1)
            )


def test_ready_scores_of_blocks_are_found_by_the_label_of_the_coupling(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(8)
    scores = {f"channel[layer={layer}]": torch.randn(16, 1, generator=generator) for layer in range(2)}
    save_file(scores, tmp_path / "b.safetensors")
    pruned = pruned_by(tmp_path, with_score(CHANNELS, '{ kind = "blocks", file = "b.safetensors" }'))
    for layer in range(2):
        lost = scores[f"channel[layer={layer}]"][:, 0].argsort()[:4]
        assert set((pruned[f"{layer}.up.weight"] == 0).all(1).nonzero()[:, 0].tolist()) == set(lost.tolist())
        assert not pruned[f"{layer}.down.weight"][:, lost].any()
        assert not pruned[f"{layer}.up.bias"][lost].any()


def test_ready_scores_of_blocks_of_one_tensor_are_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {name: -tensor for name, tensor in weights().items()}  # of either sign: the smallest survive
    save_file(scores, tmp_path / "b.safetensors")
    for limit in (1 << 20, 64):
        narrow(monkeypatch, limit, tile=limit)
        pruned = pruned_by(tmp_path, with_score(TWO_OF_FOUR, '{ kind = "blocks", file = "b.safetensors" }'))
        for name, tensor in weights().items():
            drop = tensor.reshape(tensor.shape[0], -1, 4).argsort(dim=2, descending=True, stable=True)[
                :, :, :2
            ]
            assert torch.equal(
                pruned[name], tensor.reshape(tensor.shape[0], -1, 4).scatter(2, drop, 0.0).flatten(1)
            )


def test_random_depends_on_the_seed_and_not_on_the_slabs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pruned(seed: int, limit: int) -> dict[str, torch.Tensor]:
        narrow(monkeypatch, limit, tile=limit)
        return pruned_by(tmp_path, with_score(TWO_OF_FOUR, f'{{ kind = "random", seed = {seed} }}'))

    first, cut, other = pruned(1, 1 << 20), pruned(1, 64), pruned(2, 1 << 20)
    for name in weights():
        assert torch.equal(first[name], cut[name])
        assert not torch.equal(first[name], other[name])
        assert int((first[name] == 0).sum()) == first[name].numel() // 2


def test_threshold_compares_the_score(tmp_path: Path) -> None:
    save_file(
        {name: torch.full((tensor.shape[1],), 2.0) for name, tensor in weights().items()},
        tmp_path / "s.safetensors",
    )
    spec = with_score(
        TWO_OF_FOUR.replace("nnz = 2", "threshold = 1.0"), '{ kind = "wanda", file = "s.safetensors" }'
    )
    pruned = pruned_by(tmp_path, spec)
    for name, tensor in weights().items():
        assert torch.equal(pruned[name], torch.where(tensor.abs() >= 0.5, tensor, 0.0))


def test_statistics_of_some_members_of_a_fused_block_are_enough(tmp_path: Path) -> None:
    norms = {f"{layer}.down.weight": torch.rand(16) + 0.1 for layer in range(2)}
    save_file(norms, tmp_path / "s.safetensors")
    pruned = pruned_by(tmp_path, with_score(CHANNELS, '{ kind = "wanda", file = "s.safetensors" }'))
    for layer in range(2):
        down = mlp_tensors()[f"{layer}.down.weight"].double() * norms[f"{layer}.down.weight"].double()
        lost = down.square().sum(0).argsort()[:4]
        assert not pruned[f"{layer}.down.weight"][:, lost].any()
        assert int((pruned[f"{layer}.up.bias"] == 0).sum()) == 4


@pytest.mark.parametrize(
    ("kind", "damage", "text"),
    [
        ("wanda", {"0.up.weight": None}, "has no statistics of 0.up.weight"),
        ("wanda", {"0.up.weight": torch.ones(9)}, "0.up.weight has shape [9], wanted [8]"),
        ("wanda", {"0.up.weight": torch.ones(8, dtype=torch.bool)}, "0.up.weight is BOOL, wanted one of"),
        (
            "wanda",
            {"0.up.weight": torch.full((8,), float("nan"))},
            "0.up.weight: there is NaN in its score file",
        ),
        ("obd", {"0.up.weight": -torch.ones(8)}, "0.up.weight: the diagonal of the Hessian"),
        ("wanda", {"0.up.weight": -torch.ones(8)}, "0.up.weight: a norm of its inputs in the score file is"),
        ("values", {}, "0.down.weight has shape [16], wanted [8, 16]"),
        ("blocks", {}, "0.down.weight has shape [16], wanted [8, 16]"),
    ],
)
def test_score_files_that_do_not_fit_are_refused(
    tmp_path: Path, kind: str, damage: dict[str, torch.Tensor | None], text: str
) -> None:
    vectors = {name: torch.ones(tensor.shape[1]) for name, tensor in weights().items()} | damage
    save_file(
        {name: vector for name, vector in vectors.items() if vector is not None}, tmp_path / "s.safetensors"
    )
    save_file(mlp_tensors(), tmp_path / "m.safetensors")
    spec = write_spec(tmp_path, with_score(TWO_OF_FOUR, f'{{ kind = "{kind}", file = "s.safetensors" }}'))
    said = refused("apply", tmp_path / "m.safetensors", spec)
    assert text in said.err
    assert "s.safetensors" in said.err
    assert not (tmp_path / "m.pruned.safetensors").exists()


def test_a_score_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    save_file(mlp_tensors(), tmp_path / "m.safetensors")
    spec = write_spec(tmp_path, with_score(TWO_OF_FOUR, '{ kind = "wanda", file = "absent.safetensors" }'))
    said = refused("apply", tmp_path / "m.safetensors", spec)
    assert "there are no statistics in " in said.err
    assert said.err.endswith(f", and give --stats {tmp_path / 'm.safetensors-stats'}\n")


def test_soft_threshold_shrinks_each_block_by_its_norm(tmp_path: Path) -> None:
    pruned = pruned_by(tmp_path, ROWS.replace("nnz = 3", 'mode = "soft"\nthreshold = 2.5'))
    masks = load_masks(tmp_path / "m.pruned.masks.safetensors")
    for name, tensor in weights().items():
        norms = torch.linalg.vector_norm(tensor.double(), dim=1, keepdim=True)
        shrunk = tensor.double() * (1 - 2.5 / norms).clamp(min=0)
        torch.testing.assert_close(pruned[name], shrunk.float(), rtol=1e-6, atol=0)
        assert torch.equal(masks[name], (norms > 2.5).expand_as(tensor))


def test_soft_budget_leaves_nnz_blocks(tmp_path: Path) -> None:
    pruned = pruned_by(tmp_path, ROWS.replace("nnz = 3", 'mode = "soft"\nnnz = 3\nk_weight = 1.0'))
    for name, tensor in weights().items():
        norms = torch.linalg.vector_norm(tensor.double(), dim=1)
        kth, following = norms.sort(descending=True).values[2:4]
        shrunk = tensor.double() * (1 - (kth + following) / 2 / norms).clamp(min=0)[:, None]
        torch.testing.assert_close(pruned[name], shrunk.float(), rtol=1e-6, atol=0)
        assert int(pruned[name].any(1).sum()) == 3


def test_soft_thresholds_take_no_other_score(tmp_path: Path) -> None:
    save_file(mlp_tensors(), tmp_path / "m.safetensors")
    spec = ROWS.replace("nnz = 3", 'mode = "soft"\nthreshold = 0.5\nscore = { kind = "random" }')
    said = refused("apply", tmp_path / "m.safetensors", write_spec(tmp_path, spec))
    assert "[scope.rows] score: mode soft shrinks the norms of the weights" in said.err


def test_soft_threshold_with_conditioners_and_scale(tmp_path: Path) -> None:
    ones = {name: torch.ones_like(tensor) for name, tensor in weights().items()}
    save_file(ones, tmp_path / "h.safetensors")
    spec = ROWS.replace("nnz = 3", 'mode = "soft"\nthreshold = 0.5\nscale = true')
    plain = pruned_by(tmp_path, spec)
    conditioned = pruned_by(tmp_path, spec + 'conditioners = "h.safetensors"\n')
    for name, tensor in weights().items():
        norms = torch.linalg.vector_norm(tensor.double(), dim=1, keepdim=True)
        limit = 0.5 * tensor.shape[1] ** 0.5
        shrunk = tensor.double() * (1 - limit / norms).clamp(min=0)
        torch.testing.assert_close(plain[name], shrunk.float(), rtol=1e-6, atol=0)
        # With the identity as Hessian the two operators are one.
        torch.testing.assert_close(conditioned[name], plain[name], rtol=1e-5, atol=1e-7)
