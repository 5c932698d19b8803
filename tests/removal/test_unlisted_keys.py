"""What a config says under names that no row of the table has: cut if that is certain, else told."""

from copy import deepcopy
from typing import Any

import pytest

from sparseprune.removal.shrink import Removal, make_removal
from tests.removal.models import GPT2, LLAMA, MIXTRAL, Config, Shapes, cut, decoder, mixtral, whole
from tests.removal.test_layers import SIZES, norms, without_layers

SIX = list("abcdef")
STAYS = [0, 2, 3, 5]  # of 6 layers 1 and 4 go
LEFT = [SIX[layer] for layer in STAYS]
SAID = "looks like a statement about layers, and stays as it is"


def removal_of(config: Config, layers: int = 6) -> Removal:
    return without_layers(
        {**SIZES, "num_hidden_layers": layers, "model_type": "llama", **config}, [1, 4], layers
    )


CUT: dict[str, tuple[str, object, object]] = {
    # A key, what it says of six layers, what it says of those that stay.
    "a list by its name": ("per_layer_window", SIX, LEFT),
    "objects of blocks": ("block_configs", [{"a": one} for one in SIX], [{"a": one} for one in LEFT]),
    "a list in place of a number that the table has": (
        "num_attention_heads",
        [4, 4, 2, 4, 2, 4],
        [4, 2, 4, 4],
    ),
    "a name in one word": ("perLayerInputs", SIX, LEFT),
    "numbers of all layers of a kind": ("full_attention_idxs", [1, 3, 5], [2, 3]),
    "numbers under a name that says only": ("dense_only_layers", [0, 1], [0]),
    "numbers of layers that all stay": ("target_layer_ids", [0, 3, 5], [0, 2, 3]),
    "the number of every layer": ("moe_layer_indices", [0, 1, 2, 3, 4, 5], [0, 1, 2, 3]),
    "an object by number": ("layer_dims", {"0": 8, "1": 9, "5": 7}, {"0": 8, "3": 7}),
    "another name of the count": ("n_layer", 6, 4),
}


@pytest.mark.parametrize("case", CUT)
def test_what_certainly_speaks_of_layers_is_cut(case: str) -> None:
    key, before, after = CUT[case]
    config = {key: deepcopy(before)}
    removal = removal_of(config)
    assert removal.config is not None
    assert removal.config[key] == after
    assert removal.remarks == ()
    assert {change.key: (change.before, change.after) for change in removal.changes} == {
        "num_hidden_layers": (6, 4),
        key: (before, after),
    }
    assert config == {key: before}


TOLD: dict[str, tuple[str, object, str]] = {
    "layers that something looks at, of which one goes": ("target_layer_ids", [1, 3],
        f"target_layer_ids {SAID}"),
    "numbers counted from the end": ("target_layer_ids", [-1, 2], f"target_layer_ids {SAID}"),
    "a list of as many numbers": ("window_of", [1, 2, 3, 4, 5, 5], f"window_of {SAID}"),
    "as many numbers as if counted": ("layer_order", [0, 1, 2, 3, 4, 5], f"layer_order {SAID}"),
    "a list of another length": ("layers_block_type", ["a", "b"], f"layers_block_type {SAID}"),
    "an object with all numbers": ("widths", dict.fromkeys(map(str, range(6)), 1), f"widths {SAID}"),
    "an object with other numbers": ("layer_dims", {"0": 1, "9": 2}, f"layer_dims {SAID}"),
    "modules with numbers": ("dtypes", {"model.layers.3.mlp": "F32"},
        "dtypes names layers by their numbers, and stays as it is"),
    "a text with a letter for each": ("hybrid_override_pattern", "M-M*-M", f"hybrid_override_pattern {SAID}"),
    "a list in an object": ("attn_config", {"windows": SIX}, f"attn_config.windows {SAID}"),
    "a rule": ("full_attention_interval", 4, f"full_attention_interval 4 {SAID}"),
    "a period": ("attn_layer_period", 8, f"attn_layer_period 8 {SAID}"),
    "a pattern": ("sliding_window_pattern", 4, f"sliding_window_pattern 4 {SAID}"),
    "a number of some layers": ("num_kv_shared_layers", 2, f"num_kv_shared_layers 2 {SAID}"),
    "a count of another name": ("num_decoder_layers", 6,
        "num_decoder_layers is 6, as num_hidden_layers was, and stays as it is"),
    "the same in another object": ("llm_config", {"num_hidden_layers": 6},
        "llm_config.num_hidden_layers is 6, as num_hidden_layers was, and stays as it is"),
}  # fmt: skip


@pytest.mark.parametrize("case", TOLD)
def test_what_may_speak_of_layers_is_told(case: str) -> None:
    key, value, line = TOLD[case]
    removal = removal_of({key: value})
    assert removal.config is not None
    assert removal.config[key] == value
    assert removal.remarks == ((f"config.json: {line}",) if line else ())


SILENT: dict[str, object] = {
    "architectures": SIX,
    "eos_token_id": [1, 2, 3, 4, 5, 6],
    "id2label": dict.fromkeys(map(str, range(6)), "x"),
    "rope_scaling": {"short_factor": [1.0] * 6, "long_factor": [1.0] * 6, "type": "longrope"},
    "vision_config": {"num_hidden_layers": 6, "layer_types": SIX},
    "torch_dtype": "sixsix",
    "layer_norm_eps": 1e-6,
    "layer_norm_size": 6,
    "moe_layer_freq": 1,
    "use_cache": True,
    "per_layer": [],
    "layer_dims": {},
    "max_position_embeddings": 6,
    "bos_token_id": 6,
    "hidden_act": "silu",
    "_name_or_path": "a/b-6",
    "dropout_of_layers": 0.5,
    "pretraining_tp": 1,
    "": [],
    "7": None,
}


@pytest.mark.parametrize("key", SILENT)
def test_what_has_nothing_to_do_with_layers_is_left_without_a_word(key: str) -> None:
    removal = removal_of({key: SILENT[key]})
    assert removal.remarks == ()
    assert [change.key for change in removal.changes] == ["num_hidden_layers"]


def test_a_list_of_as_many_entries_as_there_are_many_layers_has_one_for_each() -> None:
    values = list(range(10, 18))
    removal = removal_of({"of_each": values, "by_each": {str(n): n for n in range(8)}}, 8)
    assert removal.config is not None
    assert removal.config["of_each"] == [10, 12, 13, 15, 16, 17]
    assert removal.config["by_each"] == {"0": 0, "1": 2, "2": 3, "3": 5, "4": 6, "5": 7}
    assert removal.remarks == ()


def test_a_second_copy_beside_the_nested_config_changes_with_it() -> None:
    inner: dict[str, Any] = {**SIZES, "model_type": "llama", "layer_windows": SIX}
    beside = {
        "num_hidden_layers": 6, "layer_windows": SIX, "hidden_size": 24, "mm_layers": 6, "vision_layers": 6,
    }  # fmt: skip
    config = {"model_type": "llava", "text_config": inner, **beside}
    removal = without_layers(config, [1, 4])
    assert removal.config is not None
    assert {key: removal.config[key] for key in beside} == {
        **beside,
        "num_hidden_layers": 4,
        "layer_windows": LEFT,
    }
    assert removal.config["text_config"]["layer_windows"] == LEFT
    assert [change.key for change in removal.changes] == [
        "text_config.num_hidden_layers",
        "text_config.layer_windows",
        "num_hidden_layers",
        "layer_windows",
    ]
    assert removal.remarks == ("config.json: mm_layers is 6, as num_hidden_layers was, and stays as it is",)
    other = without_layers({**config, "num_hidden_layers": 8}, [1, 4])
    assert f"config.json: num_hidden_layers 8 {SAID}" in other.remarks


def test_the_other_name_of_the_count_changes_where_the_class_takes_either() -> None:
    shapes: Shapes = {f"transformer.h.{layer}.ln_1.weight": (8,) for layer in range(2)}
    config = {**GPT2, "num_hidden_layers": 2}
    removal = make_removal(shapes, cut(shapes, whole("transformer.h.0.*")), config)
    assert removal.config is not None
    assert (removal.config["n_layer"], removal.config["num_hidden_layers"]) == (1, 1)


def test_documents_beside_the_config_are_told_of_by_their_names() -> None:
    shapes = norms(6)
    beside: dict[str, dict[str, Any]] = {
        "params.json": {"n_layers": 6, "n_heads": 4, "dim": 24},
        "generation_config.json": {"dola_layers": [1, 3], "suppress_tokens": [1] * 6, "any": [1] * 6},
        "adapter_config.json": {"layers_to_transform": None, "layers_pattern": "layers"},
    }
    config = {**SIZES, "model_type": "llama"}
    removal = make_removal(shapes, cut(shapes, whole("model.layers.1.*")), config, beside=beside)
    assert removal.remarks == (
        "params.json: n_layers is 6, as num_hidden_layers was, and stays as it is",
        f"generation_config.json: dola_layers {SAID}",
    )


def test_copies_of_other_numbers_that_change_are_told() -> None:
    more = {
        "ffn_dim": 10,
        "mlp_size": 11,
        "shared": {"intermediate_size": 10},
        "n_kv_heads": 10,
        "max_layers": 3,
    }
    shapes = decoder(LLAMA)
    made = {"gate": 0, "up": 0, "down": 1}
    removal = make_removal(
        shapes,
        cut(shapes, [(f"*.{name}_proj.weight", dim, {1}) for name, dim in made.items()]),
        {**LLAMA, **more},
    )
    assert [change.key for change in removal.changes] == ["intermediate_size"]
    was = "is 10, as intermediate_size was, and stays as it is"
    assert removal.remarks == (f"config.json: ffn_dim {was}", f"config.json: shared.intermediate_size {was}")


def test_copies_of_the_number_of_experts_are_told() -> None:
    shapes = mixtral()
    config = {**MIXTRAL, "moe": {"num_experts": 4, "num_experts_per_tok": 3}}
    removal = make_removal(shapes, cut(shapes, whole("*.experts.1.*")), config)
    was = "is 4, as num_local_experts was, and stays as it is"
    assert removal.remarks == (f"config.json: moe.num_experts {was}",)
