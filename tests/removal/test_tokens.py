"""Ids of tokens in configs after rows are gone."""

from typing import Any

import numpy as np

from sparseprune.removal.architectures import Architecture
from sparseprune.removal.sections import Section
from sparseprune.removal.tokens import Renumbered, renumber

CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 8, "bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": None,
    "image_token_index": 6, "hidden_size": 4, "decoder_start_token_id": -1, "audio_token_id": 8, "token": 3,
}  # fmt: skip


def renumbered(config: dict[str, Any], *gone: int, **beside: Any) -> Renumbered:
    kept = np.ones(8, dtype=np.bool_)
    kept[list(gone)] = False
    section = Section((), config, Architecture(()))
    return renumber({"config.json": config, **beside}, section, kept)


def test_ids_move_down_and_what_is_no_id_of_a_token_stays() -> None:
    found = renumbered(CONFIG, 0, 3)
    assert found.documents["config.json"] == {
        **CONFIG, "bos_token_id": 0, "eos_token_id": [1, 3], "image_token_index": 4,
    }  # fmt: skip
    assert found.problems == []
    text = "token 1 is 0 now; give each the place that it has in the list"
    assert found.remarks == [f"the tokenizer's files give the old ids: {text}"]


def test_an_id_that_goes_is_refused_with_its_place() -> None:
    found = renumbered(CONFIG, 5, 6, **{"generation_config.json": {"bos_token_id": 6}})
    assert found.problems == [
        "config.json: eos_token_id is 5, which is not among the tokens that stay",
        "config.json: image_token_index is 6, which is not among the tokens that stay",
        "generation_config.json: bos_token_id is 6, which is not among the tokens that stay",
    ]


def test_the_first_tokens_keep_their_ids() -> None:
    found = renumbered(CONFIG, 7)
    assert (found.documents["config.json"], found.problems, found.remarks) == (CONFIG, [], [])


def test_suppressed_tokens_that_go_are_forgotten() -> None:
    config = {**CONFIG, "suppress_tokens": [-1, 3, 4], "begin_suppress_tokens": [3]}
    found = renumbered(config, 3)
    assert found.problems == []
    left = found.documents["config.json"]
    assert (left["suppress_tokens"], left["begin_suppress_tokens"]) == ([-1, 3], [])


def test_configs_inside_are_read_unless_they_have_a_vocabulary_of_their_own() -> None:
    inner = {"vision_config": {"start_token_id": 5}, "talker_config": {"vocab_size": 9, "bos_token_id": 5}}
    found = renumbered({**CONFIG, **inner}, 0)
    assert found.documents["config.json"]["vision_config"] == {"start_token_id": 4}
    assert found.documents["config.json"]["talker_config"] == inner["talker_config"]


def test_what_is_not_read_is_told() -> None:
    found = renumbered(
        CONFIG, 7, **{"generation_config.json": {"lang_to_id": {"<|en|>": 3}, "bad_words_ids": None}}
    )
    assert found.remarks == [
        "generation_config.json: lang_to_id names tokens by their ids, and stays as it is"
    ]


def test_sizes_of_a_part_of_the_vocabulary_are_in_the_way() -> None:
    found = renumbered({**CONFIG, "vocab_size_per_layer_input": 6, "type_vocab_size": 2}, 7)
    assert found.problems == [
        "config.json: vocab_size_per_layer_input 6 counts tokens of its own: rows cannot go"
    ]
