"""Sections of configs: paths of keys, values by layer, and which object speaks of which tensor."""

from copy import deepcopy
from typing import Any

import pytest

from sparseprune.errors import CheckpointError
from sparseprune.removal.sections import Path, Section, Sections, path_shown, value_at, with_value
from tests.removal.models import LLAMA, PICTURES, Config, without

NESTED: Config = {"a": 1, "text": {"width": 8, "windows": [4, [5, 6]]}}


@pytest.mark.parametrize(
    ("path", "shown", "value"),
    [
        ((), "", NESTED),
        (("a",), "a", 1),
        (("text", "width"), "text.width", 8),
        (("text", "windows", 0), "text.windows[0]", 4),
        (("text", "windows", 1, 1), "text.windows[1][1]", 6),
        (("text", "windows", 2), "text.windows[2]", None),
        (("text", "windows", "0"), "text.windows.0", None),
        (("text", "none"), "text.none", None),
        (("a", "width"), "a.width", None),
        (("a", 0), "a[0]", None),
        (("none", "width"), "none.width", None),
    ],
)
def test_a_path_is_shown_and_leads_to_a_value_or_to_none(path: Path, shown: str, value: object) -> None:
    assert path_shown(path) == shown
    assert value_at(NESTED, path) == value


@pytest.mark.parametrize(
    ("path", "value", "after"),
    [
        (("a",), 2, {**NESTED, "a": 2}),
        (("a",), None, {"text": NESTED["text"]}),
        (("none",), None, NESTED),
        (("text", "width"), 6, {"a": 1, "text": {**NESTED["text"], "width": 6}}),
        (("text", "width"), None, {"a": 1, "text": {"windows": [4, [5, 6]]}}),
        (("text", "windows", 1, 0), 3, {"a": 1, "text": {"width": 8, "windows": [4, [3, 6]]}}),
        (("b", "c"), 3, {**NESTED, "b": {"c": 3}}),
        ((), 7, 7),
    ],
)
def test_another_value_at_a_path_leaves_the_config_as_it_was(
    path: Path, value: object, after: object
) -> None:
    before = deepcopy(NESTED)
    found = with_value(NESTED, path, value)
    assert found == after
    assert before == NESTED
    if isinstance(found, dict):  # keys stay in their order
        assert list(found)[:1] == list(after)[:1]  # type: ignore[call-overload]


def section(**keys: Any) -> Section:
    return Sections.of({**LLAMA, **keys}).at("model.layers")


def test_a_key_has_one_value_or_one_for_each_layer() -> None:
    by_layer = {"intermediate_size": [10, 12, 14], "per_layer_config": {"1": {"head_dim": 4}}}
    of = section(**by_layer)
    found = {
        (key, layer): (path_shown(of.path_of(key, layer)), of.value(key, layer))
        for key in ("intermediate_size", "head_dim", "num_attention_heads")
        for layer in (None, 0, 1)
    }
    assert found == {
        ("intermediate_size", None): ("intermediate_size", [10, 12, 14]),
        ("intermediate_size", 0): ("intermediate_size[0]", 10),
        ("intermediate_size", 1): ("intermediate_size[1]", 12),
        ("head_dim", None): ("head_dim", 2),
        ("head_dim", 0): ("head_dim", 2),
        ("head_dim", 1): ("per_layer_config.1.head_dim", 4),
        ("num_attention_heads", None): ("num_attention_heads", 6),
        ("num_attention_heads", 0): ("num_attention_heads", 6),
        ("num_attention_heads", 1): ("num_attention_heads", 6),
    }
    assert of.value("intermediate_size", 3) is None


def test_a_key_with_a_dot_lies_in_an_object() -> None:
    of = section(attn_config={"kv_n_heads": 3})
    assert of.path_of("attn_config.kv_n_heads") == ("attn_config", "kv_n_heads")
    assert of.value("attn_config.kv_n_heads", 1) == 3
    assert of.value("ffn_config.ffn_hidden_size") is None


def test_the_table_has_an_expression_for_what_a_config_leaves_out() -> None:
    config = without(LLAMA, "num_key_value_heads")
    assert Sections.of(config).at("model.layers").value("num_key_value_heads") == 6
    assert Sections.of({**config, "num_key_value_heads": None}).at("model").value("num_key_value_heads") == 6


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("config.hidden_size", None),
        ("config.kind", 'config.kind comes to "a", wanted an integer'),
        ("config.hidden_size > 1", "config.hidden_size > 1 comes to true, wanted an integer"),
        ("config.hidden_size - 30", "config.hidden_size - 30 comes to -6, wanted 0 or more"),
        ("config.hidden_size // 0", "divides by zero"),
    ],
)
def test_numbers_of_expressions_are_integers_that_are_no_less_than_asked(text: str, line: str | None) -> None:
    of = section(kind="a")
    if line is None:
        assert of.number(text) == 24
        return
    with pytest.raises(CheckpointError, match=r"^config\.json: ") as error:
        of.number(text)
    assert line in error.value.args[0]


TWO_SIDES: Config = {"model_type": "encoder-decoder", "encoder": LLAMA, "decoder": LLAMA}
SPEAKING: Config = {
    "model_type": "x",
    "thinker_config": {**PICTURES, "model_type": "y"},
    "talker_config": {"model_type": "z"},
    "token2wav_config": {"model_type": "w"},
}
TALKING: Config = {
    **SPEAKING,
    "talker_config": {"text_config": LLAMA, "code_predictor_config": {"model_type": "p"}},
}
PLACES: dict[str, tuple[Config, str, Path]] = {
    # A config, the name of a tensor -> where the section is that speaks of it.
    "a model without others": (LLAMA, "model.layers.0.mlp.up_proj.weight", ()),
    "the text model": (PICTURES, "language_model.model.layers.0.mlp.up_proj.weight", ("text_config",)),
    "the text model under another name": (
        {"model_type": "x", "llm_config": LLAMA},
        "model.layers.0.mlp.up_proj.weight",
        ("llm_config",),
    ),
    "a tower": (PICTURES, "vision_tower.encoder.layers.0.mlp.fc1.weight", ("vision_config",)),
    "a text model inside another model": (
        SPEAKING,
        "thinker.model.layers.0.mlp.up_proj.weight",
        ("thinker_config", "text_config"),
    ),
    "a model beside the one that thinks": (
        SPEAKING,
        "talker.model.layers.0.mlp.up_proj.weight",
        ("talker_config",),
    ),
    "a model that makes sound": (SPEAKING, "token2wav.layers.0.up.weight", ("token2wav_config",)),
    "a tower inside another model": (
        SPEAKING,
        "thinker.visual.blocks.0.mlp.up_proj.weight",
        ("thinker_config", "vision_config"),
    ),
    "a text model of the one that talks": (
        TALKING,
        "talker.model.layers.0.mlp.up_proj.weight",
        ("talker_config", "text_config"),
    ),
    "what predicts codes of the one that talks": (
        TALKING,
        "talker.code_predictor.model.layers.0.mlp.up_proj.weight",
        ("talker_config", "code_predictor_config"),
    ),
    "a tower of which the config does not speak": (LLAMA, "vision_tower.layers.0.fc1.weight", ()),
    "an encoder": (TWO_SIDES, "encoder.layers.0.fc1.weight", ("encoder",)),
    "a decoder": (TWO_SIDES, "decoder.model.layers.0.fc1.weight", ("decoder",)),
    "an object without a type, beside a model that the table knows": (
        {**LLAMA, "llm_config": {"num_hidden_layers": 6}},
        "model.layers.0.mlp.up_proj.weight",
        (),
    ),
    "an object without a type": (
        {"model_type": "strange", "text_config": {"hidden_size": 8}},
        "model.layers.0.mlp.up_proj.weight",
        ("text_config",),
    ),
}


@pytest.mark.parametrize("case", PLACES)
def test_the_section_of_a_tensor_is_told_by_its_name(case: str) -> None:
    config, name, path = PLACES[case]
    assert Sections.of(config).path_at(name) == path


def test_a_section_has_its_row_of_the_table_and_is_named_where_there_is_none() -> None:
    sections = Sections.of({**PICTURES, "vision_config": {"model_type": "strange"}})
    found = sections.at("language_model.model.layers.1")
    assert (found.prefix, found.path_of("head_dim")) == ("text_config.", ("text_config", "head_dim"))
    assert "gemma3_text" in found.architecture.models
    assert sections.at("language_model.lm_head") is found
    with pytest.raises(CheckpointError, match=r"known of the vision_config\.model_type \"strange\", so that"):
        sections.at("vision_tower.encoder.layers.1")
    with pytest.raises(CheckpointError, match=r"there is no config\.json"):
        Sections.of(None)
