"""A class that computes the same as another takes numbers that the other refuses."""

import json
from pathlib import Path

import pytest
import torch
import transformers

import sparseprune
from sparseprune.errors import SparsepruneError
from tests.families.checkpoints import save
from tests.families.models import DECODER

OPTIONS = {"sparsity": "0.4"}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A Llama with ten heads, of which six would not divide the hidden size."""
    sizes = {**DECODER, "hidden_size": 40, "num_attention_heads": 10, "num_key_value_heads": 5}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    return save(model, "llama", tmp_path).folder


def test_a_number_of_heads_that_llama_refuses_is_taken_as_mistral(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(SparsepruneError, match=r"such as 5 or 8; or --as mistral, whose class takes any$"):
        sparseprune.remove(dense, "heads", output=tmp_path / "small", set=OPTIONS)
    removal = sparseprune.remove(dense, "heads", output=tmp_path / "small", set=OPTIONS, as_model="mistral")
    assert ("model_type", "llama", "mistral") in {
        (one.key, one.before, one.after) for one in removal.config if one.key == "model_type"
    }
    sparseprune.apply(dense, "heads", tmp_path / "zeros", set=OPTIONS)
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    zeros = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "zeros")
    assert (type(small).__name__, small.config.num_attention_heads) == ("MistralForCausalLM", 6)
    ids = torch.arange(24).reshape(2, 12)
    with torch.inference_mode():
        torch.testing.assert_close(small(ids).logits, zeros(ids).logits, rtol=1e-5, atol=1e-5)


def helium(folder: Path, **own: object) -> Path:
    """A Helium with four heads, of which none can go."""
    sizes = {**DECODER, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    model = transformers.HeliumForCausalLM(transformers.HeliumConfig(**sizes))
    dense = save(model, "helium", folder).folder
    config = json.loads((dense / "config.json").read_text())
    left = {key: value for key, value in {**config, **own}.items() if value is not None}
    (dense / "config.json").write_text(json.dumps(left))
    return dense


def test_heads_that_helium_refuses_go_as_ernie(tmp_path: Path) -> None:
    dense = helium(tmp_path)
    with pytest.raises(SparsepruneError, match=r"; or --as ernie4_5, whose class takes any$"):
        sparseprune.remove(dense, "heads", output=tmp_path / "small")
    sparseprune.remove(dense, "heads", output=tmp_path / "small", as_model="ernie4_5")
    sparseprune.apply(dense, "heads", tmp_path / "zeros")
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    zeros = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "zeros")
    assert (type(small).__name__, small.config.num_attention_heads) == ("Ernie4_5ForCausalLM", 3)
    assert type(zeros).__name__ == "HeliumForCausalLM"
    ids = torch.arange(24).reshape(2, 12)
    with torch.inference_mode():
        torch.testing.assert_close(small(ids).logits, zeros(ids).logits, rtol=1e-5, atol=1e-5)


def test_what_another_class_takes_otherwise_by_default_must_be_told(tmp_path: Path) -> None:
    dense = helium(tmp_path, rms_norm_eps=None)
    with pytest.raises(SparsepruneError, match=r"^--as ernie4_5: config.json has no rms_norm_eps, for which"):
        sparseprune.remove(dense, "heads", output=tmp_path / "small", as_model="ernie4_5")


@pytest.mark.parametrize(
    ("values", "kin", "says"),
    [
        (
            {},
            "qwen2",
            'wanted a model type whose class computes the same as that of "llama"; known are mistral',
        ),
        ({"model_type": "gpt2"}, "mistral", 'computes the same as that of "gpt2"; known are none'),
        ({"attention_bias": True}, "mistral", "config.json has attention_bias, which that class lacks"),
    ],
)
def test_what_is_not_known_to_compute_the_same_is_refused(
    dense: Path, tmp_path: Path, values: dict[str, object], kin: str, says: str
) -> None:
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, **values}))
    with pytest.raises(SparsepruneError) as caught:
        sparseprune.remove(dense, "heads", output=tmp_path / "small", as_model=kin)
    assert says in str(caught.value)
