"""Layers: of those that stay the config says what the classes of transformers make of the dense one."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from itertools import combinations, product
from typing import Any

import pytest
import transformers

from sparseprune.errors import CheckpointError
from sparseprune.removal.layers import Stacks
from sparseprune.removal.preview import removed_members
from sparseprune.removal.sections import Sections, path_shown
from sparseprune.removal.shrink import Removal, make_removal
from tests.removal.models import LLAMA, PICTURES, Config, Shapes, cut, whole

LAYERS = 6
SIZES = {**LLAMA, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2}
TYPES = ["sliding_attention", "full_attention"]


def types(config: Any, layer: int) -> object:
    return config.layer_types[layer]


def qwen_experts(config: Any, layer: int) -> object:
    """As Qwen2MoeDecoderLayer and Qwen3MoeDecoderLayer ask."""
    return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0


def qwen2_experts(config: Any, layer: int) -> object:
    return (qwen_experts(config, layer), config.layer_types[layer])


def llama4(config: Any, layer: int) -> object:
    """As Llama4TextDecoderLayer and Llama4TextAttention ask."""
    return (layer in config.moe_layers, config.no_rope_layers[layer], config.layer_types[layer])


def deepseek(config: Any, layer: int) -> object:
    return layer >= config.first_k_dense_replace


def nothing(_config: Any, _layer: int) -> object:
    return None


CLASSES: dict[str, tuple[str, Callable[[Any, int], object]]] = {
    "llama": ("LlamaConfig", nothing), "mistral": ("MistralConfig", nothing),
    "gemma": ("GemmaConfig", nothing), "mixtral": ("MixtralConfig", nothing), "qwen2": ("Qwen2Config", types),
    "qwen3": ("Qwen3Config", types), "gemma2": ("Gemma2Config", types),
    "gemma3_text": ("Gemma3TextConfig", types), "gpt_oss": ("GptOssConfig", types),
    "qwen2_moe": ("Qwen2MoeConfig", qwen2_experts), "qwen3_moe": ("Qwen3MoeConfig", qwen_experts),
    "llama4_text": ("Llama4TextConfig", llama4), "deepseek_v3": ("DeepseekV3Config", deepseek),
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 8}
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    *((model, {}) for model in CLASSES),
    *(
        ("qwen2", keys)
        for keys in (
            {**WINDOW, "max_window_layers": 3},
            {**WINDOW, "max_window_layers": 0},
            {**WINDOW, "max_window_layers": 6},
            {**WINDOW, "layer_types": [*TYPES, *TYPES, *TYPES]},
            {**WINDOW, "layer_types": None, "max_window_layers": 5},
            {"use_sliding_window": True, "max_window_layers": 3},
            {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 3},
            {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 3},
            {"sliding_window": 8, "max_window_layers": 3},
        )
    ),
    ("qwen2", {**WINDOW, "max_window_layers": 0, "num_hidden_layers": 30}),
    ("qwen2", {**WINDOW, "num_hidden_layers": 30}),
    ("qwen2_moe", {**WINDOW, "num_hidden_layers": 30}),
    ("gemma2", {"layer_types": [TYPES[1]] * 5 + [TYPES[0]]}),
    ("gemma3_text", {"sliding_window_pattern": 2}),
    ("gemma3_text", {"sliding_window_pattern": 7}),
    ("gemma3_text", {"layer_types": [TYPES[1], *[TYPES[0]] * 5]}),
    ("gpt_oss", {"layer_types": [*TYPES, *TYPES, *TYPES]}),
    *(
        (model, keys)
        for model in ("qwen2_moe", "qwen3_moe")
        for keys in (
            {"decoder_sparse_step": 2},
            {"decoder_sparse_step": 3, "mlp_only_layers": [2]},
            {"mlp_only_layers": [0, 5]},
            {"mlp_only_layers": [], "decoder_sparse_step": 1},
            {"mlp_only_layers": None, "decoder_sparse_step": 6},
            {"decoder_sparse_step": 7},
        )
    ),
    ("qwen2_moe", {**WINDOW, "max_window_layers": 4}),
    ("qwen2_moe", {**WINDOW, "max_window_layers": 0}),
    ("qwen2_moe", {**WINDOW, "max_window_layers": 9, "decoder_sparse_step": 2}),
    ("qwen2_moe", {**WINDOW, "layer_types": [*TYPES, *TYPES, *TYPES]}),
    ("llama4_text", {"interleave_moe_layer_step": 2}),
    ("llama4_text", {"interleave_moe_layer_step": 7}),
    ("llama4_text", {"moe_layers": [0, 3, 4]}),
    ("llama4_text", {"moe_layers": []}),
    ("llama4_text", {"no_rope_layer_interval": 2, "interleave_moe_layer_step": 3}),
    ("llama4_text", {"no_rope_layers": [0, 0, 1, 1, 0, 1]}),
    ("llama4_text", {"no_rope_layers": []}),
    ("llama4_text", {"no_rope_layers": [1] * 6, "layer_types": ["chunked_attention", *[TYPES[1]] * 5]}),
    ("llama4_text", {"attention_chunk_size": None}),
    ("deepseek_v3", {"first_k_dense_replace": 0}),
    ("deepseek_v3", {"first_k_dense_replace": 2}),
    ("deepseek_v3", {"first_k_dense_replace": 6}),
    ("deepseek_v3", {"first_k_dense_replace": 9}),
]
REMOVED = [
    chosen
    for many, step in ((1, 1), (2, 3), (3, 5), (5, 2))
    for chosen in list(combinations(range(LAYERS), many))[::step]
]


def norms(layers: int) -> Shapes:
    """A tensor of each layer: for a layer that goes whole it does not matter which."""
    return {f"model.layers.{layer}.input_layernorm.weight": (24,) for layer in range(layers)}


def without_layers(config: Config, removed: Iterable[int], layers: int = LAYERS) -> Removal:
    """The removal of layers from a checkpoint that has so many."""
    shapes = norms(layers)
    return make_removal(shapes, cut(shapes, whole(*(f"model.layers.{layer}.*" for layer in removed))), config)


def made(model: str, config: Config) -> Any:
    """What the class makes of a config."""
    values = {key: value for key, value in config.items() if key != "model_type"}
    return getattr(transformers, CLASSES[model][0])(**deepcopy(values))


@pytest.mark.parametrize(("model", "keys"), CONFIGS, ids=str)
def test_layers_that_stay_are_what_the_class_makes_of_them_in_the_dense_config(
    model: str, keys: dict[str, Any]
) -> None:
    config: Config = {**SIZES, **keys, "model_type": model}
    fact = CLASSES[model][1]
    dense = made(model, config)
    layers = config["num_hidden_layers"]
    facts = [fact(dense, layer) for layer in range(layers)]
    before = deepcopy(config)
    for removed in REMOVED:
        removal = without_layers(config, removed, layers)
        written = removal.config
        assert written is not None
        stays = [layer for layer in range(layers) if layer not in removed]
        assert written["num_hidden_layers"] == len(stays)
        found = made(model, dict(written))
        left = [fact(found, place) for place in range(len(stays))]
        assert left == [facts[layer] for layer in stays], removed
        changed = {change.key for change in removal.changes}
        either = config.keys() | written.keys()
        assert {key for key in either if config.get(key) != written.get(key)} == changed
    assert config == before


RULES: list[tuple[str, str, dict[str, Any]]] = [
    # A class, the list that it makes, the keys that it makes it of.
    *(("gemma3_text", "layer_types", {"sliding_window_pattern": pattern}) for pattern in (1, 2, 3, 6)),
    *(("qwen2", "layer_types", {**WINDOW, "max_window_layers": first}) for first in (0, 3, 6, 9)),
    ("qwen3", "layer_types", {**WINDOW, "max_window_layers": 2}),
    *(("qwen2_moe", "layer_types", {**WINDOW, "max_window_layers": first}) for first in (0, 4, 6)),
    *(("llama4_text", "no_rope_layers", {"no_rope_layer_interval": step}) for step in (1, 2, 4)),
    *(("llama4_text", "moe_layers", {"interleave_moe_layer_step": step}) for step in (1, 2, 3, 7)),
]


@pytest.mark.parametrize(("model", "made_list", "keys"), RULES, ids=str)
def test_a_rule_that_stays_makes_the_list_that_stands_beside_it(
    model: str, made_list: str, keys: dict[str, Any]
) -> None:
    rule = list(keys)[-1]
    gone = 0
    for removed in REMOVED:
        removal = without_layers({**SIZES, **keys, "model_type": model}, removed)
        written = dict(removal.config or {})
        said = [line for line in removal.remarks if rule in line]
        if rule not in written:
            text = f"no {rule} makes the layers that stay: it is taken out, and {made_list} has them"
            assert said == [f"config.json: {text}"]
            gone += 1
            continue
        assert said == []
        told = getattr(made(model, written), made_list)
        written.pop(made_list, None)
        assert getattr(made(model, written), made_list) == told, removed
    assert gone < len(REMOVED)


def test_a_rule_is_settled_under_its_private_name_too() -> None:
    config = {**SIZES, "model_type": "gemma3_text", "_sliding_window_pattern": 3}
    types = [TYPES[0], TYPES[0], TYPES[1]] * 2
    removal = without_layers({**config, "layer_types": types, "sliding_window_pattern": 3}, [0, 3])
    assert removal.config is not None
    assert (removal.config["_sliding_window_pattern"], removal.config["sliding_window_pattern"]) == (2, 2)
    nothing = without_layers({**config, "layer_types": types, "_sliding_window_pattern": None}, [0])
    assert "_sliding_window_pattern" not in {change.key for change in nothing.changes}
    removal = without_layers({**config, "layer_types": types}, [0])
    assert removal.config is not None
    assert "_sliding_window_pattern" not in removal.config
    change = next(one for one in removal.changes if one.key == "_sliding_window_pattern")
    assert (change.before, change.after) == (3, None)


KEYS: dict[str, tuple[Config, tuple[int, ...], dict[str, object]]] = {
    # A config, layers that go -> the keys that change with num_hidden_layers, None for whatever it becomes.
    "nothing else": ({"model_type": "llama"}, (2,), {}),
    "types of layers, also where the class has none": ({"model_type": "llama", "layer_types": list("abcdef")},
        (0, 4), {"layer_types": list("bcdf")}),
    "types of layers that are all alike": ({"model_type": "qwen2", "layer_types": [TYPES[1]] * 6}, (0,),
        {"layer_types": [TYPES[1]] * 5}),
    "types of layers that the class makes all alike": ({"model_type": "qwen3"}, (0,), {}),
    "types of layers that the class makes": ({"model_type": "gpt_oss"}, (0, 1, 2),
        {"layer_types": [TYPES[1], TYPES[0], TYPES[1]]}),
    "layers without experts by a step": ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, (1, 2),
        {"decoder_sparse_step": 1, "mlp_only_layers": [0, 2]}),
    "layers without experts by a list": (
        {"model_type": "qwen3_moe", "decoder_sparse_step": 1, "mlp_only_layers": [3, 5]},
        (4,),
        {"mlp_only_layers": [3, 4]},
    ),
    "a list that stays as it is": (
        {"model_type": "qwen3_moe", "decoder_sparse_step": 1, "mlp_only_layers": [0]}, (4,), {}),
    "layers with experts": ({"model_type": "llama4_text", "moe_layers": [1, 3, 5]}, (0, 3),
        {"moe_layers": [0, 3], "no_rope_layers": None}),
    "the first layers": ({"model_type": "deepseek_v3", "first_k_dense_replace": 3}, (1, 4),
        {"first_k_dense_replace": 2}),
    "layers behind the first ones": ({"model_type": "deepseek_v3", "first_k_dense_replace": 3}, (4,), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", KEYS)
def test_the_keys_that_speak_of_layers_change_with_them(case: str) -> None:
    config, removed, changes = KEYS[case]
    removal = without_layers({**SIZES, **config}, removed)
    found = {change.key: change.after for change in removal.changes}
    assert found.pop("num_hidden_layers") == LAYERS - len(removed)
    assert {key: None if changes.get(key, 0) is None else value for key, value in found.items()} == changes


def test_layers_behind_those_that_the_config_counts_are_renumbered_and_not_counted() -> None:
    """Layers that predict further tokens lie behind the others in the same list."""
    config = {**SIZES, "model_type": "deepseek_v3", "num_hidden_layers": 4, "first_k_dense_replace": 1}
    removal = without_layers(config, [0, 2])
    assert {change.key: change.after for change in removal.changes} == {
        "num_hidden_layers": 2,
        "first_k_dense_replace": 0,
    }
    assert [left.name for left in removal.left.values()] == list(norms(4))
    removal = without_layers(config, [4, 5])
    assert removal.changes == ()
    assert list(removal.left) == list(norms(4))
    removal = without_layers(config, [1, 2, 3, 4])
    assert {change.key: change.after for change in removal.changes} == {"num_hidden_layers": 1}


COUNTED: dict[str, tuple[Config, str, str, int]] = {
    # A config, a list of layers with three members -> the key that counts it, and its value.
    "all layers": ({"model_type": "llama", "num_hidden_layers": 3}, "model.layers", "num_hidden_layers", 3),
    "another name": ({"model_type": "gpt2", "n_layer": 3}, "transformer.h", "n_layer", 3),
    "the key of the right value": ({"model_type": "llama", "num_hidden_layers": 4, "num_layers": 3},
        "model.layers", "num_layers", 3),
    "a key that the config leaves out": ({"model_type": "llama"}, "model.layers", "num_hidden_layers", 3),
    "more than the key counts": ({"model_type": "llama", "num_hidden_layers": 2}, "model.layers",
        "num_hidden_layers", 2),
    "an encoder": ({"model_type": "bart", "encoder_layers": 3, "decoder_layers": 2, "num_hidden_layers": 3},
        "model.encoder.layers", "encoder_layers", 3),
    "a decoder": ({"model_type": "bart", "encoder_layers": 3, "decoder_layers": 3}, "model.decoder.layers",
        "decoder_layers", 3),
    "a stage": ({"model_type": "convnext", "depths": [2, 3], "num_hidden_layers": 2},
        "encoder.stages.1.layers", "depths[1]", 3),
    "a stage that the config does not have": ({"model_type": "convnext", "depths": [2], "num_layers": 3},
        "encoder.stages.1.layers", "num_layers", 3),
    "layers of a tower": (PICTURES, "vision_tower.encoder.layers", "vision_config.num_hidden_layers", 2),
}  # fmt: skip


@pytest.mark.parametrize("case", COUNTED)
def test_the_key_that_counts_a_list_of_layers_is_told_by_its_names_and_value(case: str) -> None:
    config, stack, key, count = COUNTED[case]
    shapes = {f"{stack}.{layer}.norm.weight": (4,) for layer in range(3)}
    removed = removed_members(shapes, [f"{stack}.1.norm.weight"])
    found = Stacks.find(shapes, removed, Sections.of(config)).of[stack]
    assert (path_shown(found.key), found.count, found.members) == (key, count, 3)
    assert found.stays == [layer for layer in range(count) if layer != 1]


def test_an_encoder_and_a_decoder_lose_layers_of_their_own() -> None:
    config = {"model_type": "whisper", "encoder_layers": 3, "decoder_layers": 3, "num_hidden_layers": 3}
    shapes: Shapes = {
        f"model.{side}.layers.{layer}.fc1.weight": (4, 2)
        for side in ("encoder", "decoder")
        for layer in range(3)
    }
    cuts = whole("*.encoder.layers.0.*", "*.decoder.layers.[12].*")
    removal = make_removal(shapes, cut(shapes, cuts), config)
    assert removal.config is not None
    assert (removal.config["encoder_layers"], removal.config["decoder_layers"]) == (2, 1)
    removal = make_removal(shapes, cut(shapes, whole("*.encoder.layers.0.*")), config)
    assert removal.config is not None
    assert (removal.config["encoder_layers"], removal.config["decoder_layers"]) == (2, 3)


BROKEN: dict[str, tuple[Config, str]] = {
    "mlp_only_layers that is no list": ({"model_type": "qwen3_moe", "mlp_only_layers": 5},
        "config.json: mlp_only_layers is 5, wanted a list of numbers of layers"),
    "mlp_only_layers of lists": ({"model_type": "qwen3_moe", "mlp_only_layers": [[1]]},
        "config.json: mlp_only_layers is [[1]], wanted a list of numbers of layers"),
    "moe_layers that is a text": ({"model_type": "llama4_text", "moe_layers": "012"},
        'config.json: moe_layers is "012", wanted a list of numbers of layers'),
    "more layers than there are": ({"model_type": "llama", "num_hidden_layers": 10**15},
        "config.json: num_hidden_layers is 1000000000000000, and model.layers has 6 members"),
    "layers that are no number": ({"model_type": "llama", "num_hidden_layers": 6.0},
        "config.json: num_hidden_layers is 6.0, wanted an integer"),
    "first layers that are no number": ({"model_type": "deepseek_v3", "first_k_dense_replace": None},
        "config.json: config.first_k_dense_replace comes to null, wanted an integer"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_configs_that_make_no_sense_are_refused_in_one_line(case: str) -> None:
    config, line = BROKEN[case]
    with pytest.raises(CheckpointError) as error:
        without_layers({**SIZES, **config}, [1])
    assert error.value.args == (line,)


def test_layers_behind_the_others_are_counted_by_a_key_of_their_own() -> None:
    config = {**SIZES, "model_type": "deepseek_v3", "num_hidden_layers": 4, "num_nextn_predict_layers": 2}
    removal = without_layers(config, [1, 5])
    found = {change.key: change.after for change in removal.changes}
    assert (found["num_hidden_layers"], found["num_nextn_predict_layers"]) == (3, 1)
    assert "num_nextn_predict_layers" not in {change.key for change in without_layers(config, [1]).changes}


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignore"])
def test_names_that_a_quantizer_has_written_down_get_new_numbers(key: str) -> None:
    config = {**SIZES, "model_type": "llama"}
    for name in ("model.layers.{}.mlp", "model.layers.{}", "model.layers.{}.*"):
        names = ["lm_head", "re:.*mlp", *(name.format(layer) for layer in (0, 1, 3))]
        removal = without_layers({**config, "quantization_config": {key: names}}, [1])
        assert removal.config is not None
        found = removal.config["quantization_config"][key]
        assert found == ["lm_head", "re:.*mlp", name.format(0), name.format(2)]


@pytest.mark.parametrize(
    ("stated", "name"),
    [
        ({"ignore": ["re:model\\.layers\\.3\\..*"]}, "re:model"),
        ({"dynamic": {"model.layers.3.mlp": {"bits": 8}}}, "model.layers.3.mlp"),
        ({"ignore": ["language_model.layers.3.mlp"]}, "language_model.layers.3.mlp"),
    ],
)
def test_layers_stay_where_a_quantizer_names_them_otherwise(stated: dict[str, Any], name: str) -> None:
    config = {**SIZES, "model_type": "llama", "quantization_config": stated}
    with pytest.raises(CheckpointError, match=f'quantization_config names "{name}.*" by a number'):
        without_layers(config, [1])


# -- what a skipped layer is -------------------------------------------------------------------------

SKIPPED: dict[str, tuple[Config, str]] = {
    # A config -> what the line says of its layers; nothing where a masked layer passes its input on.
    "a norm at the end": ({"model_type": "bert"}, "end in a norm"),
    "a scale": ({"model_type": "doge"}, "scale what they pass on"),
    "sums alone": ({"model_type": "llama"}, ""),
    "a norm by a key": ({"model_type": "opt", "do_layer_norm_before": False}, "end in a norm"),
    "no norm by a key": ({"model_type": "opt", "do_layer_norm_before": True}, ""),
    "no norm by default": ({"model_type": "opt"}, ""),
    "a norm by default": ({"model_type": "wav2vec2"}, "end in a norm"),
    "a stable norm": ({"model_type": "wav2vec2", "do_stable_layer_norm": True}, ""),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_a_line_says_where_a_removed_layer_is_not_what_a_masked_one_is(case: str) -> None:
    config, what = SKIPPED[case]
    removal = without_layers({**SIZES, **config}, [1])
    text = "removed ones are skipped, while masked ones would pass on zeros"
    assert removal.remarks == ((f"layers of model.layers {what}: {text}",) if what else ())


# -- kinds by the number of a layer ------------------------------------------------------------------


def jamba(config: Config, layer: int, _layers: int) -> Any:
    """As JambaConfig asks, and refuses."""
    kinds = ("attn_layer", "expert_layer")
    pairs = [(config[f"{kind}_period"], config[f"{kind}_offset"]) for kind in kinds]
    return tuple(period > offset and layer % period == offset for period, offset in pairs)


def ernie(config: Config, layer: int, layers: int) -> object:
    """As Ernie4_5_MoeDecoderLayer asks."""
    end = config["moe_layer_end_index"]
    last = layers - 1 if end == -1 else end
    first, every = config["moe_layer_start_index"], config["moe_layer_interval"]
    return every > 0 and (layer + 1) % every == 0 and first <= layer <= last


def switch(config: Config, layer: int, _layers: int) -> object:
    """As SwitchTransformersStack asks."""
    step = config["encoder_sparse_step"]
    return step > 0 and (layer % step == 1 or step == 1)


def nllb(config: Config, layer: int, _layers: int) -> object:
    """As NllbMoeEncoder asks."""
    step = config["encoder_sparse_step"]
    return step > 0 and (layer + 1) % step == 0


ASKS: dict[str, Callable[[Config, int, int], object]] = {
    "jamba": jamba, "ernie4_5_moe": ernie, "switch_transformers": switch, "nllb-moe": nllb,
}  # fmt: skip
EXPERT_LAYERS = {"expert_layer_period": 2, "expert_layer_offset": 1}
ERNIE = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")
NUMBERED: list[tuple[str, dict[str, int]]] = [
    ("jamba", {"attn_layer_period": 3, "attn_layer_offset": 0, **EXPERT_LAYERS}),
    ("jamba", {"attn_layer_period": 3, "attn_layer_offset": 1, **EXPERT_LAYERS}),
    *(
        ("ernie4_5_moe", dict(zip(ERNIE, numbers, strict=True)))
        for numbers in ((0, -1, 1), (1, -1, 1), (2, 4, 1), (0, 5, 2), (1, -1, 3))
    ),
    *(("switch_transformers", {"encoder_sparse_step": step}) for step in (0, 1, 2, 4)),
    *(("nllb-moe", {"encoder_sparse_step": step}) for step in (0, 1, 2, 4)),
]


def of_kinds(model: str, keys: dict[str, int], count: int) -> list[Any]:
    """What the class makes of each of so many layers."""
    return [ASKS[model](keys, layer, count) for layer in range(count)]


def encoder_without(config: Config, removed: Iterable[int]) -> Removal:
    shapes: Shapes = {f"model.encoder.layers.{layer}.norm.weight": (24,) for layer in range(LAYERS)}
    gone = whole(*(f"model.encoder.layers.{layer}.*" for layer in removed))
    return make_removal(shapes, cut(shapes, gone), config)


@pytest.mark.parametrize(("model", "keys"), NUMBERED, ids=str)
def test_a_rule_of_numbers_makes_the_layers_that_stay_or_they_are_refused(
    model: str, keys: dict[str, int]
) -> None:
    """They are refused only where no values of the keys make them."""
    config = {**SIZES, **keys, "encoder_layers": LAYERS, "model_type": model}
    before = of_kinds(model, keys, LAYERS)
    known = {
        tuple(of_kinds(model, dict(zip(keys, values, strict=True)), count))
        for count in range(1, LAYERS)
        for values in product(range(count + 2), repeat=len(keys))
    }
    removed_any = False
    for removed in (one for one in REMOVED if model != "switch_transformers" or 0 not in one):
        wanted = [kind for layer, kind in enumerate(before) if layer not in removed]
        if model == "jamba" and not any(attends for attends, _ in wanted):
            continue  # of attention something has to stay
        if tuple(wanted) not in known:
            with pytest.raises(CheckpointError, match="what they are at their new places: remove whole"):
                encoder_without(config, removed)
            continue
        written = dict(encoder_without(config, removed).config or {})
        assert of_kinds(model, {key: written[key] for key in keys}, len(wanted)) == wanted, removed
        removed_any = True
    assert removed_any


FAULTS: dict[str, tuple[Config, tuple[int, ...], str]] = {
    # A config, layers that go -> what is in the way.
    "a kind that no key can say": (
        {"model_type": "jamba", "attn_layer_period": 3, "attn_layer_offset": 1},
        (1,),
        (
            "no expert_layer_offset and expert_layer_period make layers 2, 3, 4 and 5 what they are at their "
            "new places: remove whole periods"
        ),
    ),
    "a number that is even or odd": (
        {"model_type": "swin", "depths": [6]},
        (0, 3),
        "their numbers do not make layers 1 and 2 what they are at their new places: remove whole periods",
    ),
    "the last layers of a kind": (
        {"model_type": "jamba", "attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_offset": 0},
        (0, 1, 4, 5),
        'no layer of attn_layer_offset and attn_layer_period "full_attention" would be left',
    ),
    "the last layers of a kind in a cycle": (
        {"model_type": "recurrent_gemma"},
        (2, 5),
        'no layer of block_types "attention" would be left',
    ),
    "a last layer that the class makes another": (
        {"model_type": "gemma4_text"},
        (5,),
        'layer 4 would be the last, and the class makes the last "full_attention"',
    ),
    "a first layer that is unlike": (
        {"model_type": "t5"},
        (0, 2),
        "the first layer has the position biases of all: keep layer 0",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_layers_that_have_to_stay_are_named(case: str) -> None:
    config, removed, why = FAULTS[case]
    with pytest.raises(CheckpointError) as error:
        without_layers({**SIZES, **config}, removed)
    assert error.value.args == (f"layers of model.layers cannot go: {why}",)


def test_a_late_first_layer_with_experts_is_named_by_its_new_number() -> None:
    config = {"model_type": "ernie4_5_moe", "num_hidden_layers": 30, "moe_layer_start_index": 20}
    removal = without_layers(config, range(5), 30)
    assert {one.key: one.after for one in removal.changes} == {
        "num_hidden_layers": 25, "moe_layer_start_index": 15,
    }  # fmt: skip


def test_pairs_of_layers_of_a_stage_whose_windows_shift_can_go() -> None:
    names = [f"encoder.layers.{stage}.blocks.{layer}.norm.weight" for stage in (0, 1) for layer in range(4)]
    shapes: Shapes = dict.fromkeys(names, (4,))
    config = {"model_type": "swin", "depths": [4, 4]}
    removal = make_removal(shapes, cut(shapes, whole("*.1.blocks.[12].*")), config)
    assert [(one.key, one.after) for one in removal.changes] == [("depths", [4, 2])]


def test_lists_with_entries_for_stages_stay_where_a_stage_has_as_many_layers() -> None:
    names = [f"encoder.block.{stage}.{layer}.norm.weight" for stage in (0, 1) for layer in range(2)]
    shapes: Shapes = dict.fromkeys(names, (4,))
    config = {
        "model_type": "segformer",
        "depths": [2, 2],
        "num_attention_heads": [2, 4],
        "mlp_ratios": [2, 3],
    }
    removal = make_removal(shapes, cut(shapes, whole("*.block.[01].0.*")), config)
    assert [(one.key, one.after) for one in removal.changes] == [("depths", [1, 1])]
    assert removal.remarks == ()
    assert [left.name for left in removal.left.values()] == [names[0], names[2]]


# -- scales, cycles, parts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "after"), [({"scale_depth": 2}, 1.0), ({}, 0.7), ({"scale_depth": None}, None)]
)
def test_a_scale_by_the_root_of_the_number_of_layers_stays_what_it_is(scale: Config, after: object) -> None:
    removal = without_layers(
        {**SIZES, "model_type": "minicpm3", "num_hidden_layers": 4, **scale}, [0, 1, 3], 4
    )
    assert removal.config is not None
    assert removal.config.get("scale_depth") == after


def test_kinds_that_are_cycled_through_are_those_of_the_layers_that_stay() -> None:
    config = {**SIZES, "model_type": "recurrent_gemma"}
    kinds = ["recurrent", "recurrent", "attention"] * 2
    for own in ({}, {"block_types": kinds[:3]}, {"block_types": kinds}):
        removal = without_layers({**config, **own}, [0, 5])
        assert removal.config is not None
        assert removal.config["block_types"] == kinds[1:5]
    removal = without_layers({**config, "block_types": kinds[:3]}, [3, 4, 5])
    assert {change.key for change in removal.changes} == {"num_hidden_layers"}


def test_what_has_a_part_for_each_layer_loses_those_of_removed_ones() -> None:
    shapes = norms(LAYERS) | {"model.contact_head.regression.weight": (1, 4 * LAYERS)}
    removal = make_removal(shapes, cut(shapes, whole("model.layers.[14].*")), {**SIZES, "model_type": "esm"})
    assert removal.left["model.contact_head.regression.weight"].shape == (1, 16)
    along = removal.kept["model.contact_head.regression.weight"].along[1]
    assert along.reshape(LAYERS, 4).all(1).tolist() == [True, False, True, True, False, True]
    odd = shapes | {"model.contact_head.regression.weight": (1, 25)}
    with pytest.raises(CheckpointError, match=r"has 25 along dimension 1, wanted a multiple of the 6 layers"):
        make_removal(odd, cut(odd, whole("model.layers.1.*")), {**SIZES, "model_type": "esm"})
    coded = shapes | {"model.contact_head.regression.weight_scale": (1,)}
    with pytest.raises(
        CheckpointError, match=r"regression\.weight_scale beside it: dequantize the checkpoint"
    ):
        make_removal(coded, cut(coded, whole("model.layers.1.*")), {**SIZES, "model_type": "esm"})


def test_windows_of_an_encoder_are_cut_with_its_layers_alone() -> None:
    shapes: Shapes = {
        f"led.{side}.layers.{layer}.norm.weight": (4,)
        for side in ("encoder", "decoder")
        for layer in range(3)
    }
    config = {"model_type": "led", "encoder_layers": 3, "decoder_layers": 3, "attention_window": [2, 4, 6]}
    for side, after in (("encoder", [2, 6]), ("decoder", [2, 4, 6])):
        removal = make_removal(shapes, cut(shapes, whole(f"led.{side}.layers.1.*")), config)
        assert removal.config is not None
        assert removal.config["attention_window"] == after


# -- towers that feed numbered layers ----------------------------------------------------------------

FED: Config = {
    "model_type": "qwen3_vl",
    "text_config": {"model_type": "qwen3_vl_text", "num_hidden_layers": 4},
    "vision_config": {"model_type": "qwen3_vl_vision", "depth": 4, "deepstack_visual_indexes": [3, 1]},
}
FED_SHAPES: Shapes = {
    f"model.{stack}.{layer}.norm.weight": (4,)
    for stack in ("language_model.layers", "visual.blocks")
    for layer in range(4)
}


def test_blocks_of_a_tower_that_feed_nothing_can_go_and_the_others_are_numbered_anew() -> None:
    cuts = whole("*.visual.blocks.[02].*", "*.language_model.layers.2.*")
    removal = make_removal(FED_SHAPES, cut(FED_SHAPES, cuts), FED)
    assert {change.key: change.after for change in removal.changes} == {
        "text_config.num_hidden_layers": 3,
        "vision_config.depth": 2,
        "vision_config.deepstack_visual_indexes": [1, 0],
    }


@pytest.mark.parametrize(
    ("stack", "removed", "indexes", "why"),
    [
        (
            "visual.blocks",
            "[123]",
            [3, 1],
            "vision_config.deepstack_visual_indexes names layers 1 and 3, whose outputs are used: keep them",
        ),
        (
            "visual.blocks",
            "0",
            None,
            "config.json has no vision_config.deepstack_visual_indexes, which names those that feed others",
        ),
        (
            "language_model.layers",
            "[12]",
            [3, 1],
            "the first 2 take what vision_config.deepstack_visual_indexes sends: keep layer 1",
        ),
    ],
)
def test_layers_that_feed_or_are_fed_stay(stack: str, removed: str, indexes: object, why: str) -> None:
    config = {**FED, "vision_config": {**FED["vision_config"], "deepstack_visual_indexes": indexes}}
    with pytest.raises(CheckpointError) as error:
        make_removal(FED_SHAPES, cut(FED_SHAPES, whole(f"*.{stack}.{removed}.*")), config)
    assert error.value.args == (f"layers of model.{stack} cannot go: {why}",)
