"""Fewer tokens: stock classes load what is left, and give the logits of the tokens that stay."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sparseprune
from sparseprune.errors import CheckpointError
from tests.families import zoo
from tests.families.harness import Zoo
from tests.families.zoo import SPECIES, VOCABULARY

pytestmark = pytest.mark.usefixtures("untraced")

KINDS = (
    *("llama", "gemma", "gpt2", "ctrl", "bert", "roberta", "electra", "distilbert", "albert"),
    *("t5", "bart", "marian", "whisper", "llava", "gemma3", "qwen2_vl", "clip"),
)


def given(name: str) -> dict[str, torch.Tensor]:
    return zoo.inputs(SPECIES[name])


def ids_of(name: str, *more: int) -> list[int]:
    """All tokens but eight that the model is not given, and these."""
    texts = [each for key, each in given(name).items() if key.endswith("input_ids")]
    used = {int(each) for text in texts for each in text.flatten()}
    unused = [each for each in range(4, 90) if each not in used]
    return [each for each in range(VOCABULARY) if each not in {*unused[:8], *more}]


def computed(name: str, model: Any, new: dict[int, int]) -> torch.Tensor:
    """What a model computes of the same text in new ids."""
    texts = {
        key: each.clone().apply_(lambda token: new[token]) if key.endswith("input_ids") else each
        for key, each in given(name).items()
    }
    with torch.inference_mode():
        result: torch.Tensor = model(**texts, return_dict=True)[0]
    return result


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_those_of_the_tokens_that_stay(name: str, tmp_path: Path) -> None:
    folder, ids = zoo.save(SPECIES[name], tmp_path), ids_of(name, 96)
    removal = sparseprune.remove(folder, vocabulary=ids, output=tmp_path / "smaller")
    (warning,) = removal.warnings
    assert warning.startswith("the tokenizer's files give the old ids: token ")
    one = Zoo(SPECIES[name], folder, torch.empty(0))
    dense = computed(name, one.load(folder), {each: each for each in ids})
    left = computed(name, one.load(tmp_path / "smaller"), {old: new for new, old in enumerate(ids)})
    if dense.shape[-1] == VOCABULARY:
        dense = dense[..., ids]
    torch.testing.assert_close(left, dense, rtol=1e-5, atol=1e-4)


REFUSED = {
    "gemma3n_text": "embed_tokens_per_layer.weight has 99 along dimension 0, and nothing tells whether",
    "mobilebert": "cls.predictions.dense.weight has 99 along dimension 1, and nothing tells whether",
    "mllama": "embed_tokens.weight has 107 rows, config.json says 99 for text_config.vocab_size",
    "t5gemma": "there is not one vocabulary: decoder.vocab_size and encoder.vocab_size have tensors each",
    "vit": "config.json says no vocab_size that a known embedding has as many rows as",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_vocabulary_that_is_not_understood_is_refused(name: str, tmp_path: Path) -> None:
    folder = zoo.save(SPECIES[name], tmp_path)
    with pytest.raises(CheckpointError, match=REFUSED[name]):
        sparseprune.remove(folder, vocabulary=[0, 1, 2, 3], output=tmp_path / "smaller")
    assert not (tmp_path / "smaller").exists()


def test_positions_that_begin_at_the_padding_keep_it_in_its_place(tmp_path: Path) -> None:
    folder = zoo.save(SPECIES["roberta"], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": 6}))
    line = "pad_token_id 6 would be 5, and positions are counted from it on: keep all tokens below it"
    with pytest.raises(CheckpointError, match=line):
        sparseprune.remove(folder, vocabulary=[0, 1, 2, 3, 4, 6, 7], output=tmp_path / "smaller")


def test_the_first_tokens_keep_their_ids_and_nothing_is_warned_of(tmp_path: Path) -> None:
    folder = zoo.save(SPECIES["llama"], tmp_path)
    removal = sparseprune.remove(folder, vocabulary=range(80), output=tmp_path / "smaller")
    assert removal.warnings == ()
    assert [(one.key, one.before, one.after) for one in removal.config] == [("vocab_size", 99, 80)]
