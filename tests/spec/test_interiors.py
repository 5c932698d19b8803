"""Interiors: which units may move, in which tensors, and why some may not; by names and shapes."""

from typing import Any

import pytest

from sparseprune.spec import TensorInfo
from sparseprune.spec.structures import Index, Inside, Interior, find_interiors

Shapes = dict[str, tuple[int, ...]]
LAYER = "model.layers.0"
LLAMA = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}


def interiors(shapes: Shapes, config: dict[str, Any] | None = None) -> dict[str, Interior]:
    """By the names of their modules."""
    tensors = [TensorInfo(name, "F32", shape) for name, shape in shapes.items()]
    return {one.module: one for one in find_interiors(Index.of(tensors, config or LLAMA))}


def attention(more: Shapes | None = None, groups: int = 2) -> Shapes:
    heads, size = 4, 6
    rows = {"q": heads * size, "k": groups * size, "v": groups * size}
    found: Shapes = {f"{LAYER}.self_attn.{name}_proj.weight": (size, 10) for name, size in rows.items()}
    found[f"{LAYER}.self_attn.o_proj.weight"] = (10, heads * size)
    return found | {f"{LAYER}.self_attn.{name}": shape for name, shape in (more or {}).items()}


def mlp(more: Shapes | None = None) -> Shapes:
    names = {"gate_proj": (24, 10), "up_proj": (24, 10), "down_proj": (10, 24)}
    found: Shapes = {f"{LAYER}.mlp.{name}.weight": shape for name, shape in names.items()}
    return found | {f"{LAYER}.mlp.{name}": shape for name, shape in (more or {}).items()}


def test_channels_are_rows_of_what_writes_and_columns_of_what_reads() -> None:
    one = interiors(mlp({"up_proj.bias": (24,), "down_proj.bias": (10,)}))[f"{LAYER}.mlp"]
    assert (one.kind, one.sets, one.size, one.problem) == ("mlp", 1, 24, "")
    assert set(one.parts) == {
        Inside(f"{LAYER}.mlp.gate_proj.weight", 0),
        Inside(f"{LAYER}.mlp.up_proj.weight", 0),
        Inside(f"{LAYER}.mlp.up_proj.bias", 0),
        Inside(f"{LAYER}.mlp.down_proj.weight", 1),
    }


def test_all_query_heads_of_a_group_read_its_values_in_one_order() -> None:
    one = interiors(attention({"v_proj.bias": (12,), "q_norm.weight": (6,)}))[f"{LAYER}.self_attn"]
    assert (one.kind, one.sets, one.size, one.problem) == ("heads", 2, 6, "")
    assert set(one.parts) == {
        Inside(f"{LAYER}.self_attn.v_proj.weight", 0, step=6),
        Inside(f"{LAYER}.self_attn.v_proj.bias", 0, step=6),
        Inside(f"{LAYER}.self_attn.o_proj.weight", 1, step=12, runs=2),
    }


def test_one_key_value_head_has_one_order_for_all_query_heads() -> None:
    config = LLAMA | {"num_key_value_heads": 1}
    one = interiors(attention(groups=1), config)[f"{LAYER}.self_attn"]
    assert (one.sets, one.size, one.problem) == (1, 6, "")
    assert Inside(f"{LAYER}.self_attn.o_proj.weight", 1, step=24, runs=4) in one.parts


def test_values_in_a_fused_matrix_are_its_last_rows() -> None:
    shapes: Shapes = {
        f"{LAYER}.self_attn.qkv_proj.weight": (48, 10),
        f"{LAYER}.self_attn.o_proj.weight": (10, 24),
    }
    one = interiors(shapes, LLAMA | {"model_type": "phi3"})[f"{LAYER}.self_attn"]
    assert one.problem == ""
    assert Inside(f"{LAYER}.self_attn.qkv_proj.weight", 0, begin=36, step=6) in one.parts


def test_members_of_a_stack_are_sets_of_their_own() -> None:
    shapes: Shapes = {
        f"{LAYER}.mlp.experts.gate_up_proj": (3, 48, 10),
        f"{LAYER}.mlp.experts.down_proj": (3, 10, 24),
    }
    one = interiors(shapes, {"model_type": "qwen3_moe"})[f"{LAYER}.mlp.experts"]
    assert (one.sets, one.size, one.problem) == (3, 24, "")
    assert set(one.parts) == {
        Inside(f"{LAYER}.mlp.experts.gate_up_proj", 1, stacked=True),
        Inside(f"{LAYER}.mlp.experts.gate_up_proj", 1, begin=24, stacked=True),
        Inside(f"{LAYER}.mlp.experts.down_proj", 2, stacked=True),
    }


def test_rows_that_take_turns_move_in_pairs() -> None:
    shapes: Shapes = {
        f"{LAYER}.mlp.experts.gate_up_proj": (3, 10, 48),
        f"{LAYER}.mlp.experts.gate_up_proj_bias": (3, 48),
        f"{LAYER}.mlp.experts.down_proj": (3, 24, 10),
    }
    one = interiors(shapes, {"model_type": "gpt_oss"})[f"{LAYER}.mlp.experts"]
    assert one.problem == ""
    assert set(one.parts) == {
        Inside(f"{LAYER}.mlp.experts.gate_up_proj", 2, width=2, stacked=True),
        Inside(f"{LAYER}.mlp.experts.gate_up_proj_bias", 1, width=2, stacked=True),
        Inside(f"{LAYER}.mlp.experts.down_proj", 1, stacked=True),
    }


GATED = {f"{LAYER}.self_attn.q_proj.weight": (48, 10)}
LATENT: Shapes = {
    f"{LAYER}.self_attn.q_proj.weight": (24, 10),
    f"{LAYER}.self_attn.kv_b_proj.weight": (48, 4),
    f"{LAYER}.self_attn.o_proj.weight": (10, 24),
}


@pytest.mark.parametrize(
    ("shapes", "config", "problem"),
    [
        (mlp({"norm.weight": (24,)}), {}, "mlp.norm.weight is as long as its channels"),
        (mlp({"gate_proj.lora_B.weight": (24, 2)}), {}, "lora_B.weight is as long as its channels"),
        (
            attention({"v_norm.weight": (6,)}),
            {},
            "values pass through model.layers.0.self_attn.v_norm.weight",
        ),
        (
            attention({"o_norm.weight": (24,)}),
            {},
            "values pass through model.layers.0.self_attn.o_norm.weight",
        ),
        (attention({"gate_proj.weight": (24, 10)}), {}, "model.layers.0.self_attn.gate_proj.weight"),
        (attention() | GATED, {}, "its queries have a gate for each dimension of the values"),
        (attention(), {"rotary_value": True}, "its values are rotated"),
        (LATENT, {}, "its values have no rows of their own"),
    ],
)
def test_units_stay_where_something_else_may_know_their_order(
    shapes: Shapes, config: dict[str, Any], problem: str
) -> None:
    (one,) = interiors(shapes, LLAMA | config).values()
    assert problem in one.problem


def test_values_that_another_layer_reads_stay() -> None:
    second = {name.replace("layers.0", "layers.1"): shape for name, shape in attention().items()}
    del second["model.layers.1.self_attn.k_proj.weight"], second["model.layers.1.self_attn.v_proj.weight"]
    shared = {"num_hidden_layers": 2, "num_kv_shared_layers": 1, "layer_types": ["full", "full"]}
    one = interiors(attention() | second, LLAMA | shared)[f"{LAYER}.self_attn"]
    assert one.problem == "another layer reads its values, too"
