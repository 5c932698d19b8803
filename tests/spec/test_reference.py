"""The reference: every example is a whole spec that binds, and no table or key is without an example."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparseprune.spec import TensorInfo, bind, parse_spec
from sparseprune.spec.schema import (
    COVERS,
    KINDS,
    SCORE_KEYS,
    ExplicitView,
    ReconstructTable,
    ScoreTable,
    Table,
)

REFERENCE = (Path(__file__).parents[2] / "specs" / "README.md").read_text("utf-8")
EXAMPLES = re.findall(r"```toml\n(.*?)```", REFERENCE, re.DOTALL)
HIDDEN, WIDTH, LAYERS, EXPERTS = 32, 96, 12, 12
CONFIG = {
    "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 8,
    "num_key_value_heads": 2,
}  # fmt: skip
PER_LAYER: dict[str, tuple[int, ...]] = {
    "model.layers.{}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.{}.self_attn.k_proj.weight": (HIDDEN // 4, HIDDEN),
    "model.layers.{}.self_attn.v_proj.weight": (HIDDEN // 4, HIDDEN),
    "model.layers.{}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.{}.mlp.gate_proj.weight": (WIDTH, HIDDEN),
    "model.layers.{}.mlp.up_proj.weight": (WIDTH, HIDDEN),
    "model.layers.{}.mlp.down_proj.weight": (HIDDEN, WIDTH),
    "model.layers.{}.mlp.gate.weight": (EXPERTS, HIDDEN),
    "model.layers.{}.input_layernorm.weight": (HIDDEN,),
    "fused.layers.{}.mlp.gate_up_proj.weight": (2 * WIDTH, HIDDEN),
    "fused.layers.{}.mlp.down_proj.weight": (HIDDEN, WIDTH),
    "encoder.layer.{}.intermediate.dense.weight": (WIDTH, HIDDEN),
    "encoder.layer.{}.intermediate.dense.bias": (WIDTH,),
    "adapted.layers.{}.self_attn.q_proj.lora_A.weight": (8, HIDDEN),
    "adapted.layers.{}.self_attn.q_proj.lora_B.weight": (HIDDEN, 8),
}
PER_EXPERT: dict[str, tuple[int, ...]] = {
    "model.layers.{}.mlp.experts.{}.gate_proj.weight": (WIDTH, HIDDEN),
    "model.layers.{}.mlp.experts.{}.up_proj.weight": (WIDTH, HIDDEN),
    "model.layers.{}.mlp.experts.{}.down_proj.weight": (HIDDEN, WIDTH),
}


def tensors(text: str) -> Iterator[TensorInfo]:
    """Names and (small) shapes of a Llama, one with fused matrices, one with adapters, and a BERT.

    For an example that speaks of them, a mixture of experts or a convolution, too.
    """
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        yield TensorInfo(name, "BF16", (3 * WIDTH, HIDDEN))
    if "scope.convolution]" in text:
        yield TensorInfo("stages.0.conv1.weight", "BF16", (HIDDEN, 8, 3, 3))
    for layer in range(LAYERS):
        for name, shape in PER_LAYER.items():
            yield TensorInfo(name.format(layer), "BF16", shape)
        for expert in range(EXPERTS if "expert" in text else 0):
            for name, shape in PER_EXPERT.items():
                yield TensorInfo(name.format(layer, expert), "BF16", shape)


@pytest.mark.parametrize("text", EXAMPLES)
def test_every_example_is_a_spec_that_reaches_tensors(text: str) -> None:
    bound = bind(parse_spec(text, "example"), list(tensors(text)), CONFIG)
    scopes = [name for name, table in tomllib.loads(text)["scope"].items() if not table.get("optional")]
    assert bound.covered
    assert len(bound.rules) == len(scopes) or "scope_coupling" in text


def keys_of(tables: list[dict[str, Any]]) -> set[str]:
    return {key for table in tables for key in table}


def test_every_key_of_every_table_has_an_example() -> None:
    documents = [tomllib.loads(text) for text in EXAMPLES]
    assert keys_of(documents) == {"version", "covers", "vars", "score", "reconstruct", *KINDS}
    found = {kind: [table for each in documents for table in each.get(kind, {}).values()] for kind in KINDS}
    everywhere = set().union(*map(keys_of, found.values()))
    for kind, model in KINDS.items():
        assert keys_of(found[kind]) <= set(model.keys)
        assert set(model.keys) <= everywhere
    views = [
        table["view"] for table in found["scope"] + found["block"] if isinstance(table.get("view"), dict)
    ]
    assert keys_of(views) == set(ExplicitView.keys)
    scores = [each["score"] for each in documents if "score" in each]
    scores += [table["score"] for table in found["scope"] if "score" in table]
    assert keys_of(scores) == set(ScoreTable.keys)
    rebuilt = [each["reconstruct"] for each in documents if "reconstruct" in each]
    rebuilt += [table["reconstruct"] for table in found["scope"] if "reconstruct" in table]
    assert keys_of(rebuilt) == set(ReconstructTable.keys)


def test_every_key_and_kind_is_named_in_the_text() -> None:
    models: list[type[Table]] = [*KINDS.values(), ScoreTable, ReconstructTable, ExplicitView]
    keys = {key for model in models for key in model.keys}
    assert [key for key in sorted(keys) if not re.search(rf"`{key}\b", REFERENCE)] == []
    assert [covers for covers in COVERS if f'`"{covers}"`' not in REFERENCE] == []
    assert [kind for kind in SCORE_KEYS if f'`"{kind}"`' not in REFERENCE] == []
