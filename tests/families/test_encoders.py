"""Encoders for text (BERT) and for pictures (ViT), whose layers differ in the name of the attention alone."""

from dataclasses import dataclass

import pytest

from tests.families.checkpoints import (
    Checkpoint,
    by_column,
    by_row,
    changed,
    check_ablation,
    make,
    prune,
    read,
    surviving,
    with_inputs_ablated,
)
from tests.families.models import HEADS, LAYERS, WIDTH


@dataclass(frozen=True)
class Encoder:
    """A checkpoint and the names it goes by: of a stored layer and of its attention.

    `mlp` and `output` are the modules that read the channels and the heads.
    """

    dense: Checkpoint
    layer: str
    attention: str
    mlp: str
    output: str


@pytest.fixture(scope="module", params=["bert", "bert_for_masked_lm", "vit", "vit_for_classification"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    family: str = request.param
    dense = make(family, tmp_path_factory.mktemp("dense"))
    model, _, has_prefix = family.partition("_")
    prefix = f"{model}." if has_prefix else ""
    layer, module = f"{prefix}encoder.layer.{{}}", f"{prefix}layers.{{}}"
    if model == "bert":
        mlp, output = f"{layer}.output.dense", f"{layer}.attention.output.dense"
        return Encoder(dense, layer, "self", mlp, output)
    mlp, output = f"{module}.mlp.fc2", f"{module}.attention.o_proj"
    return Encoder(dense, layer, "attention", mlp, output)


def test_2of4_leaves_embeddings_norms_and_poolers_alone(encoder: Encoder) -> None:
    pruned = prune(encoder.dense, "2of4")
    names = changed(encoder.dense, pruned)
    parts = [f"attention.{encoder.attention}.{name}" for name in ("query", "key", "value")]
    parts += ["attention.output.dense", "intermediate.dense", "output.dense"]
    assert names == {
        f"{encoder.layer.format(layer)}.{part}.weight" for layer in range(LAYERS) for part in parts
    }
    after = read(pruned)
    assert all(after[name].reshape(-1, 4).ne(0).sum(1).eq(2).all() for name in names)


def test_lost_channels_add_nothing(encoder: Encoder) -> None:
    dense = encoder.dense
    pruned = prune(dense, "mlp-channels")
    before, after = dense.tensors(), read(pruned)
    kept, names = {}, set()
    for layer in range(LAYERS):
        stem = encoder.layer.format(layer)
        row, bias, column = (
            f"{stem}.{part}"
            for part in ("intermediate.dense.weight", "intermediate.dense.bias", "output.dense.weight")
        )
        parts = [[each[row], each[bias], each[column].T] for each in (before, after)]
        kept[encoder.mlp.format(layer)] = surviving(parts, WIDTH - WIDTH // 4)
        names |= {row, bias, column}
    assert changed(dense, pruned) == names
    check_ablation(dense, pruned, with_inputs_ablated(dense.load(), kept))


def test_lost_heads_add_nothing(encoder: Encoder) -> None:
    dense = encoder.dense
    pruned = prune(dense, "heads")
    before, after = dense.tensors(), read(pruned)
    kept, names = {}, set()
    for layer in range(LAYERS):
        stem = encoder.layer.format(layer)
        rows = {
            f"{stem}.attention.{encoder.attention}.{part}.{kind}"
            for part in ("query", "key", "value")
            for kind in ("weight", "bias")
        }
        output = f"{stem}.attention.output.dense.weight"
        parts = [
            [*(by_row(each[name], HEADS) for name in rows), by_column(each[output], HEADS)]
            for each in (before, after)
        ]
        kept[encoder.output.format(layer)] = surviving(parts, HEADS - HEADS // 4)
        names |= {*rows, output}
    assert changed(dense, pruned) == names
    check_ablation(dense, pruned, with_inputs_ablated(dense.load(), kept))
