"""Removing: from the config that is written the class makes tensors of the very shapes that are left."""

from copy import deepcopy

import pytest
import torch
import transformers

from sparseprune.removal.shrink import make_removal
from tests.removal.models import Config, Shapes, cut
from tests.removal.test_shrink import CASES

HEADLESS = ("bert", "gpt2")
# Classes that keep experts in other tensors than checkpoints do have them converted while they are read.
UNLIKE = ("deepseek_v3", "mixtral", "qwen2_moe", "qwen3_moe")
ODD = ("gemma3", "vit")  # modules have other names in files
KNOWN = [case for case, each in CASES.items() if each.model[1]["model_type"] not in ODD]


def shapes_of_the_class(config: Config) -> Shapes:
    """Names and shapes of the model that the class makes of a config, without any data."""
    values = deepcopy(config)
    made = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    factory = transformers.AutoModel if made.model_type in HEADLESS else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = factory.from_config(made)  # type: ignore[no-untyped-call]
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("case", KNOWN)
def test_the_class_makes_what_is_left_from_the_config_that_is_written(case: str) -> None:
    (shapes, config), cuts, *_ = CASES[case]
    removal = make_removal(shapes, cut(shapes, cuts), config)
    assert removal.config is not None
    prefix = "model." if case == "layers whose names begin with them" else ""
    left = {prefix + each.name.removeprefix("bert."): each.shape for each in removal.left.values()}
    made = shapes_of_the_class(dict(removal.config))
    if config["model_type"] in UNLIKE:
        left = {name: shape for name, shape in left.items() if name in made or ".self_attn." in name}
    assert {name: made.get(name) for name in left} == left
