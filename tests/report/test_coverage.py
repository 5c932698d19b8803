"""Coverage: which tensors are matrices of layers, what share of them rules reach, what is no success."""

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from sparseprune.checkpoint import Shard, StoredTensor
from sparseprune.checkpoint.codes import with_codes
from sparseprune.checkpoint.header import TensorEntry
from sparseprune.report.coverage import (
    Coverage,
    coverage_of,
    coverage_text,
    coverage_totals,
    matrix_kind,
    unpruned_lines,
)
from sparseprune.spec import BoundSpec, TensorInfo, bind, find_spec, parse_spec

SHARD = Shard(Path("m.safetensors"), PurePosixPath("m.safetensors"))
Shapes = dict[str, tuple[int, ...]]


def bound_to(shapes: Shapes, text: str, config: Mapping[str, Any] | None = None, **values: str) -> BoundSpec:
    """A spec as it binds to F32 tensors of these shapes."""
    tensors = [TensorInfo(name, "F32", shape) for name, shape in shapes.items()]
    return bind(parse_spec(text, overrides=values), tensors, config)


def covered(shapes: Shapes, text: str, config: Mapping[str, Any] | None = None, **values: str) -> Coverage:
    tensors = {
        name: StoredTensor(TensorEntry(name, "F32", shape, 0, 0), SHARD) for name, shape in shapes.items()
    }
    return coverage_of(tensors, bound_to(shapes, text, config, **values), config)


def rule(tensors: str, *more: str, covers: str | None = None) -> str:
    """A spec of one rule over single elements, half of each tensor."""
    head = ("version = 1", *([f'covers = "{covers}"'] if covers else []), "[scope.some]")
    body = (f'tensors = "{tensors}"', "block = []", "shape = []", "sparsity = 0.5")
    return "\n".join((*head, *body, *more))


def text_of(coverage: Coverage) -> str | None:
    return coverage_text(coverage)


ATTENTION = """
model.layers.0.self_attn.q_proj.weight
model.layers.0.self_attn.qkv_proj.weight
model.layers.0.self_attn.q_proj.base_layer.weight
model.layers.0.linear_attn.in_proj_qkvz.weight
model.layers.0.attn.Wqkv.weight
model.layers.0.attn.Wo.weight
transformer.h.0.attn.c_attn.weight
transformer.h.0.attn.c_proj.weight
transformer.h.0.self_attention.query_key_value.weight
transformer.h.0.self_attention.dense.weight
encoder.layer.0.attention.self.query.weight
encoder.layer.0.attention.output.dense.weight
encoder.layer.0.crossattention.output.dense.weight
encoder.block.0.layer.0.SelfAttention.q.weight
decoder.block.0.layer.1.EncDecAttention.o.weight
transformer.layer.0.attention.q_lin.weight
model.decoder.layers.0.encoder_attn.out_proj.weight
layers.0.wrapped.k_proj.weight
""".split()
MLP = """
model.layers.0.mlp.gate_proj.weight
model.layers.0.mlp.gate_up_proj.weight
model.layers.0.mlp.shared_experts.up_proj.weight
model.layers.0.mlp.shared_expert.down_proj.weight
model.layers.0.feed_forward.w1.weight
model.layers.0.mlp.Wi.weight
model.decoder.layers.0.fc1.weight
transformer.h.0.mlp.c_fc.weight
transformer.h.0.mlp.dense_h_to_4h.weight
encoder.layer.0.intermediate.dense.weight
encoder.layer.0.output.dense.weight
encoder.block.0.layer.1.DenseReluDense.wi_0.weight
encoder.albert_layer_groups.0.albert_layers.0.ffn_output.weight
transformer.layer.0.ffn.lin1.weight
visual.blocks.0.mlp.linear_fc1.weight
vision_model.encoder.layers.0.mlp.fc2.weight
layers.0.up.weight
""".split()
EXPERTS = """
model.layers.0.mlp.experts.gate_up_proj
model.layers.0.mlp.experts.0.down_proj.weight
model.layers.0.block_sparse_moe.experts.0.w1.weight
model.layers.0.block_sparse_moe.input_linear.weight
model.layers.0.feed_forward.experts.down_proj
mtp.layers.0.mlp.experts.3.up_proj.weight
""".split()
OTHER = """
model.layers.0.conv.in_proj.weight
backbone.layers.0.mixer.in_proj.weight
model.layers.0.mamba.out_proj.weight
model.layers.3.eh_proj.weight
encoder.stages.0.layers.0.layer.0.convolution.weight
""".split()
NONE = """
model.embed_tokens.weight
lm_head.weight
model.layers.3.embed_tokens.weight
model.layers.3.shared_head.head.weight
codec_embedding.0.weight
model.layers.0.self_attn.q_norm.weight
model.layers.0.mlp.router.weight
model.layers.0.feed_forward.router.weight
model.layers.0.block_sparse_moe.router.layer.weight
model.layers.0.mlp.shared_expert_gate.weight
model.layers.0.mlp.experts.gate_up_proj_bias
model.layers.0.self_attn.q_proj.lora_A.default.weight
encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight
encoder.layers.0.blocks.0.attn.relative_position_bias_table
transformer.h.0.attn.bias
model.layers.0.mamba.A_log
pooler.dense.weight
""".split()


@pytest.mark.parametrize(
    ("names", "kind"), [(ATTENTION, "attention"), (MLP, "mlp"), (EXPERTS, "experts"), (OTHER, "other")]
)
def test_matrices_of_layers_are_told_by_their_names(names: list[str], kind: str) -> None:
    for name in names:
        assert covered({name: (4, 4)}, rule("**")).layer_coverage == 1, name
        assert matrix_kind(re.sub(r"\b\d+\b", "*", f"a_moe.{name}")) == kind, name


def test_scales_beside_codes_do_not_count() -> None:
    forms = {"layers.0.up.weight": ("F8_E4M3", (8, 8)), "layers.0.up.weight_scale_inv": ("F32", (8, 2))}
    entries = [TensorEntry(name, *form, 0, 0) for name, form in forms.items()]
    tensors = with_codes({entry.name: StoredTensor(entry, SHARD) for entry in entries}, lambda: None)
    bound = bind(
        parse_spec(rule("layers.0.up.weight")), [TensorInfo("layers.0.up.weight", "F8_E4M3", (8, 8))]
    )
    found = coverage_of(tensors, bound)
    assert (found.layer_coverage, found.uncovered) == (1, ())


@pytest.mark.parametrize("name", NONE)
def test_embeddings_routers_norms_and_the_like_do_not_count(name: str) -> None:
    found = covered({name: (4, 4), "layers.0.up.weight": (4, 4)}, rule("layers.0.up.weight"))
    assert (found.layer_coverage, found.uncovered) == (1, ())
    alone = covered({name: (4, 4)}, rule("**"))
    assert (alone.layer_coverage, alone.declared_coverage, text_of(alone)) == (None, None, None)
    assert alone.warnings() == ()


def test_a_convolution_between_layers_of_attention_is_none_of_it() -> None:
    assert matrix_kind("model.layers.*.conv.out_proj.weight") == "other"
    assert matrix_kind("model.layers.*.conv_module.attn.out_proj.weight") == "attention"


def test_a_gate_is_a_router_beside_experts_and_a_matrix_elsewhere() -> None:
    experts: Shapes = {"layers.0.mlp.experts.0.up.weight": (4, 4), "layers.0.mlp.gate.weight": (2, 4)}
    assert covered(experts, rule("**.experts.**")).layer_coverage == 1
    dense: Shapes = {"layers.0.mlp.up.weight": (4, 4), "layers.0.mlp.gate.weight": (4, 4)}
    assert covered(dense, rule("**.up.weight")).layer_coverage == 0.5


@pytest.mark.parametrize(
    ("shape", "counts"),
    [
        ((8,), False),
        ((), False),
        ((8, 1), True),
        ((8, 1, 3), False),
        ((8, 1, 3, 3), False),
        ((8, 2, 3), True),
    ],
)
def test_vectors_and_convolutions_of_one_channel_do_not_count(shape: tuple[int, ...], counts: bool) -> None:
    shapes: Shapes = {"layers.0.conv.weight": shape, "layers.0.up.weight": (4, 4)}
    assert (covered(shapes, rule("**.up.weight")).layer_coverage == 1) != counts


def test_elements_count_and_not_tensors_or_blocks() -> None:
    shapes: Shapes = {"layers.0.up.weight": (6, 4), "layers.1.up.weight": (6, 4), "1.2.up.weight": (2, 4)}
    found = covered(shapes, rule("layers.{n}.up.weight", 'slice = ["0:4 - 2 * n", ":"]'))
    assert found.layer_coverage == (16 + 8) / 56
    assert (found.reached, found.numel) == (24, 56)
    assert [(kind.name, kind.tensors, kind.numel) for kind in found.uncovered] == [
        ("layers.*.up.weight", 2, 24),
        ("*.*.up.weight", 1, 8),
    ]
    assert text_of(found) == (
        "42.86% of the layers' matrices; not reached: 24 parameters of layers.*.up.weight, 8 of *.*.up.weight"
    )


LAYER: Shapes = {
    "layers.0.self_attn.q_proj.weight": (4, 4),
    "layers.0.mlp.up_proj.weight": (8, 4),
    "layers.0.mlp.experts.0.up_proj.weight": (16, 4),
    "vision.layers.0.mlp.fc1.weight": (8, 4),
}


@pytest.mark.parametrize(
    ("covers", "tensors", "declared"),
    [
        (None, "**.mlp.up_proj.weight", 32 / 144),
        ("matrices", "**.mlp.up_proj.weight", 32 / 144),
        ("mlp", "**.mlp.up_proj.weight", 32 / 128),
        ("mlp", "**.mlp.**", 1),
        ("experts", "**.experts.**", 1),
        ("experts", "**.mlp.up_proj.weight", 0),
        ("attention", "**.self_attn.**", 1),
        ("layers", "layers.0.**", 1),
        ("layers", "vision.layers.0.**", 1),
        ("layers", "**.mlp.**", 128 / 144),
    ],
)
def test_the_share_that_counts_is_of_what_the_spec_says_it_covers(
    covers: str | None, tensors: str, declared: float
) -> None:
    found = covered(LAYER, rule(tensors, covers=covers))
    assert found.declared_coverage == pytest.approx(declared)
    assert bool(found.warnings()) == (declared < 0.9)
    totals = coverage_totals(found)
    assert (totals["covers"], totals["declared_coverage"]) == (covers or "matrices", found.declared_coverage)


def test_kinds_that_the_spec_is_about_are_named_first_and_the_largest_of_them() -> None:
    found = covered(LAYER, rule("**.mlp.up_proj.weight", covers="mlp"))
    assert [kind.name for kind in found.uncovered] == [
        "layers.*.mlp.experts.*.up_proj.weight",
        "vision.layers.*.mlp.fc1.weight",
        "layers.*.self_attn.q_proj.weight",
    ]
    text = (
        "22.22% of the layers' matrices, 25.00% of the MLP matrices; not reached: 64 parameters of "
        "layers.*.mlp.experts.*.up_proj.weight, 32 of vision.layers.*.mlp.fc1.weight and more"
    )
    assert (text_of(found), found.warnings()) == (text, (f"the rules reach only {text}",))
    assert found.warnings("the check reaches") == (f"the check reaches only {text}",)


def test_a_spec_about_what_a_checkpoint_lacks_is_held_to_all_matrices() -> None:
    both: Shapes = {"layers.0.up.weight": (4, 4), "layers.0.q_proj.weight": (4, 4)}
    found = covered(both, rule("**.up.weight", covers="experts"))
    assert (found.declared_coverage, found.layer_coverage, text_of(found)) == (
        None,
        0.5,
        "50.00% of the layers' matrices; not reached: 16 parameters of layers.*.q_proj.weight",
    )
    assert len(found.warnings()) == 1
    assert covered(both, rule("**", covers="experts")).warnings() == ()
    assert covered(LAYER, rule("layers.**")).declared_coverage == 112 / 144


@pytest.mark.parametrize(("layers", "enough"), [(10, True), (9, False)])
def test_nine_of_ten_is_enough(layers: int, enough: bool) -> None:
    shapes: Shapes = {f"layers.{layer}.up.weight": (4, 4) for layer in range(layers)}
    found = covered(shapes, rule("layers.{n}.up.weight", 'where = "n > 0"'))
    assert (found.warnings() == ()) == enough


def test_documents_name_ten_kinds_at_most() -> None:
    shapes: Shapes = {f"layers.0.up{number}.weight": (4, 4 + number) for number in range(12)}
    found = covered(shapes, rule("layers.0.up0.weight"))
    assert (len(found.uncovered), len(coverage_totals(found)["uncovered"])) == (11, 10)
    assert coverage_totals(None) == {
        "covers": None,
        "layer_coverage": None,
        "declared_coverage": None,
        "uncovered": (),
    }


CHANNELS = """
version = 1
covers = "mlp"
block.rows = { tensors = "layers.{layer}.mlp.up_proj.weight", shape = [1, -1], optional = true }
block.bias = { tensors = "layers.{layer}.mlp.up_proj.bias", shape = [1], optional = true }
block.columns = { tensors = "layers.{layer}.mlp.down_proj.weight", shape = [-1, 1], optional = true }
block_coupling.channel = { blocks = ["rows", "bias", "columns"], orders = [[0, 1], [0, 1], [1, 0]] }
scope.mlp = { block = "channel", shape = [], sparsity = 0.5 }
"""
UP, BIAS, DOWN = "layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.bias", "layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("shapes", "half"),
    [
        ({UP: (8, 4), DOWN: (4, 8)}, False),
        ({UP: (8, 4), BIAS: (8,), DOWN: (4, 8)}, False),
        ({DOWN: (4, 8)}, True),
        ({BIAS: (8,), DOWN: (4, 8)}, True),
        ({UP: (8, 4), BIAS: (8,)}, False),
        ({DOWN: (8, 8), UP: (8, 8)}, False),
    ],
)
def test_columns_without_the_rows_that_feed_them_are_half_a_structure(shapes: Shapes, half: bool) -> None:
    text = f"scope.mlp prunes half a structure: it binds columns of {DOWN} without the rows that feed them"
    assert list(covered(shapes, CHANNELS).flaws) == [text] * half


def test_one_layer_without_rows_is_enough_to_tell() -> None:
    both: Shapes = {DOWN: (4, 8), UP: (8, 4)}
    shapes = both | {name.replace(".0.", ".1."): shape for name, shape in both.items()}
    del shapes[UP]
    text = CHANNELS.replace('blocks = ["rows", "bias", "columns"]', 'blocks = ["columns", "bias", "rows"]')
    text = text.replace("[[0, 1], [0, 1], [1, 0]]", "[[1, 0], [0, 1], [0, 1]]")
    (flaw,) = covered(shapes, text).flaws
    assert flaw.startswith(f"scope.mlp prunes half a structure: it binds columns of {DOWN} ")


def test_half_channels_of_fused_gate_and_up_are_whole_in_the_shipped_spec() -> None:
    shapes: Shapes = {"model.layers.0.mlp.gate_up_proj.weight": (16, 4), f"model.{DOWN}": (4, 8)}
    source = find_spec("mlp-channels-admm")
    found = covered(shapes, source.text)
    assert (found.layer_coverage, found.flaws) == (1, ())


HEADS = """
version = 1
covers = "attention"
[block.rows]
tensors = "layers.{layer}.self_attn.{name:q|k}_proj.weight"
view = "(kv d) k -> kv d k"
axes = { kv = "KV" }
shape = [1, -1, -1]
[block.columns]
tensors = "layers.{layer}.self_attn.o_proj.weight"
view = "m (kv d) -> kv m d"
axes = { kv = "KV" }
shape = [1, -1, -1]
[block_coupling.head]
blocks = ["rows", "columns"]
across = ["name"]
[scope.heads]
block = "head"
shape = []
sparsity = 0.5
"""


def attention(norm: tuple[int, ...] | None, name: str = "q_norm", kv: int = 2) -> Shapes:
    """Four query heads of 8 and `kv` key heads, a norm beside them."""
    at = "layers.0.self_attn"
    shapes: Shapes = {f"{at}.q_proj.weight": (32, 4), f"{at}.k_proj.weight": (8 * kv, 4)}
    shapes[f"{at}.o_proj.weight"] = (4, 32)
    return shapes if norm is None else shapes | {f"{at}.{name}.weight": norm}


@pytest.mark.parametrize(
    ("shapes", "cut", "part"),
    [
        (attention(None), 4, None),  # nothing tells what a head is
        (attention((8,)), 2, None),
        (attention((8,)), 1, None),  # all heads together are whole ones
        (attention((8,)), 4, "4 rows of layers.0.self_attn.k_proj.weight, a head has 8"),
        (attention((8,), "k_layernorm"), 4, "4 rows of layers.0.self_attn.k_proj.weight, a head has 8"),
        (attention((8,)), 8, "2 rows of layers.0.self_attn.k_proj.weight, a head has 8"),
        (attention((8,), kv=1), 2, "4 rows of layers.0.self_attn.k_proj.weight, a head has 8"),
        (attention((32,)), 4, None),  # a norm over all heads
        (attention((4, 8)), 4, None),
    ],
)
def test_parts_of_heads_are_told_by_the_norm_beside_them(shapes: Shapes, cut: int, part: str | None) -> None:
    found = list(covered(shapes, HEADS.replace("KV", str(cut))).flaws)
    idle = [flaw for flaw in found if "prunes nothing" in flaw]
    assert bool(idle) == (cut == 1)
    wanted = [] if part is None else [f"scope.heads prunes parts of heads: its blocks have {part}"]
    assert [flaw for flaw in found if flaw not in idle] == wanted


@pytest.mark.parametrize(
    ("head", "config", "flawed"),
    [
        ("mtp.layers.0", None, True),
        ("model.mtp_block.0", None, True),
        ("medusa.0", None, True),
        ("eagle3.layers.0", {"num_hidden_layers": "many"}, True),
        ("model.layers.2", {"num_hidden_layers": 2}, True),
        ("model.layers.2", {"text_config": {"num_hidden_layers": 2}}, True),
        ("model.layers.2", {"num_hidden_layers": 3}, False),
        ("model.layers.2", None, False),
        ("vision.layers.2", {"num_hidden_layers": 2}, False),
        ("prompt_drafts.layers.2", None, False),
    ],
)
def test_a_rule_that_binds_only_a_speculative_head_is_told(
    head: str, config: Mapping[str, Any] | None, flawed: bool
) -> None:
    name = f"{head}.experts.0.up_proj.weight"
    shapes: Shapes = {f"model.layers.{n}.experts.up_proj": (2, 4, 4) for n in range(2)} | {name: (4, 4)}
    text = f"scope.some binds only a speculative head, such as {name}"
    assert list(covered(shapes, rule(name), config).flaws) == [text] * flawed
    assert covered(shapes, rule("**"), config).flaws == ()


def test_a_checkpoint_that_is_a_speculative_head_is_no_matter() -> None:
    assert covered({"mtp.layers.0.up.weight": (4, 4)}, rule("**")).warnings() == ()


BUDGET = """
version = 1
[vars]
share = 0.5
[scope.rows]
tensors = "{layer}.up.weight"
block = [1, -1]
shape = []
BUDGET
"""
KEEPS = "scope.rows prunes nothing: it keeps"


@pytest.mark.parametrize(
    ("rows", "budget", "why"),
    [
        (2, "sparsity = 0.25",
         "2 of 2 blocks in each scope: sparsity 0.25 of 2 rounds to none; 0.5 or more prunes"),
        (3, "sparsity = 0.3",
         "3 of 3 blocks in each scope: sparsity 0.3 of 3 rounds to none; 0.3334 or more prunes"),
        (1, "sparsity = 0.9",
         "1 of 1 block in each scope: sparsity 0.9 of 1 rounds to none; 1 or more prunes"),
        (2, "nnz = 2", "2 of 2 blocks in each scope: nnz 2 let all survive; nnz 1 or less prunes"),
        (
            8,
            "sparsity = 0.25\nmultiple_of = 8",
            (
                "8 of 8 blocks in each scope: sparsity 0.25 of 8 and multiple_of 8 round to none; "
                "1 or more prunes"
            ),
        ),
        (
            8,
            "sparsity = 0.125\nmultiple_of = 3",
            (
                "8 of 8 blocks in each scope: sparsity 0.125 of 8 and multiple_of 3 round to none; "
                "0.25 or more prunes"
            ),
        ),
        (8, "nnz = 7\nmultiple_of = 4",
         "8 of 8 blocks in each scope: nnz and multiple_of 4 let all survive; nnz 4 or less prunes"),
    ],
)  # fmt: skip
def test_a_rule_that_keeps_all_is_told_with_what_would_prune(rows: int, budget: str, why: str) -> None:
    shapes: Shapes = {"0.up.weight": (rows, 4)}
    assert covered(shapes, BUDGET.replace("BUDGET", budget)).flaws == (f"{KEEPS} {why}",)


@pytest.mark.parametrize("multiple", [1, 3, 8])
@pytest.mark.parametrize("rows", range(1, 13))
def test_what_is_said_to_prune_prunes_and_a_little_less_does_not(rows: int, multiple: int) -> None:
    shapes: Shapes = {"0.up.weight": (rows, 4)}
    text = BUDGET.replace("BUDGET", f"sparsity = 'share'\nmultiple_of = {multiple}")
    (flaw,) = covered(shapes, text, share="0").flaws
    least = float(flaw.rpartition("; ")[2].partition(" or more prunes")[0])
    assert covered(shapes, text, share=str(least)).flaws == ()
    assert covered(shapes, text, share=str(least - 0.0002)).flaws != ()


def test_of_several_instances_the_one_that_needs_least_is_told_and_one_that_prunes_is_enough() -> None:
    text = BUDGET.replace("BUDGET", "sparsity = 0.25")
    (flaw,) = covered({"0.up.weight": (2, 4), "1.up.weight": (3, 4)}, text).flaws
    assert (
        flaw
        == f"{KEEPS} 3 of 3 blocks in each scope: sparsity 0.25 of 3 rounds to none; 0.3334 or more prunes"
    )
    assert covered({"0.up.weight": (2, 4), "1.up.weight": (4, 4)}, text).flaws == ()


def test_rules_without_elements_prune_nothing() -> None:
    text = BUDGET.replace("BUDGET", "sparsity = 0.5")
    found = covered({"0.up.weight": (0, 4)}, text)
    assert found.flaws == ("scope.rows prunes nothing: it reaches no elements",)
    assert (found.layer_coverage, text_of(found)) == (None, None)


def test_what_a_threshold_left_alone_is_known_after_a_run() -> None:
    shapes: Shapes = {f"{layer}.up.weight": (4, 4) for layer in range(3)}
    one = bound_to(shapes, BUDGET.replace("BUDGET", "threshold = 0.5"))
    assert list(unpruned_lines(one.rules, {"scope.rows": 1})) == []
    why = "scope.rows prunes nothing: no block scores less than the threshold 0.5"
    assert list(unpruned_lines(one.rules, {"scope.rows": 0})) == [why]
    assert list(unpruned_lines(one.rules, {})) == [why]
    several = bound_to(
        shapes, BUDGET.replace("BUDGET", 'threshold = "layer / 4"').replace("{layer}", "{layer}")
    )
    assert list(unpruned_lines(several.rules, {})) == [why.replace("0.5", "0 to 0.5")]
    told_before = bound_to(shapes, BUDGET.replace("BUDGET", "nnz = 4"))
    assert list(unpruned_lines(told_before.rules, {})) == []
