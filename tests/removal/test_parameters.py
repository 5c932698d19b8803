"""What an element counts: parameters as people count them, those of one token, and bytes."""

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparseprune.checkpoint import open_checkpoint, read_config
from sparseprune.errors import CheckpointError
from sparseprune.removal.parameters import Unit, Worth, worth_of

Tensors = Mapping[str, torch.Tensor]
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 8}


def judged(folder: Path, unit: Unit, tensors: Tensors, config: Mapping[str, Any]) -> tuple[Worth, Any]:
    """What the elements of a checkpoint count, and what there is in all."""
    (folder / "config.json").write_text(json.dumps(config))
    save_file({**tensors}, folder / "model.safetensors")
    found = open_checkpoint(folder)
    worth = worth_of(unit, found.tensors, read_config(found))
    return worth, worth.total({name: stored.shape for name, stored in found.tensors.items()})


def listed(experts: int) -> dict[str, torch.Tensor]:
    """A layer of a Mixtral: 8 x 4 in the router, 3 matrices of 8 x 16 in each expert."""
    at = "model.layers.0.block_sparse_moe"
    tensors = {"model.embed_tokens.weight": torch.zeros(12, 8), f"{at}.gate.weight": torch.zeros(experts, 8)}
    for expert in range(experts):
        for name, shape in (("w1", (16, 8)), ("w2", (8, 16)), ("w3", (16, 8))):
            tensors[f"{at}.experts.{expert}.{name}.weight"] = torch.zeros(shape)
    return tensors


def stacked(experts: int) -> dict[str, torch.Tensor]:
    """A layer of gpt-oss: stacks with biases of all experts."""
    at = "model.layers.0.mlp"
    return {
        f"{at}.router.weight": torch.zeros(experts, 8),
        f"{at}.router.bias": torch.zeros(experts),
        f"{at}.experts.gate_up_proj": torch.zeros(experts, 8, 32),
        f"{at}.experts.gate_up_proj_bias": torch.zeros(experts, 32),
        f"{at}.experts.down_proj": torch.zeros(experts, 16, 8),
        f"{at}.experts.down_proj_bias": torch.zeros(experts, 8),
    }


def test_parameters_are_the_elements_of_all_tensors(tmp_path: Path) -> None:
    tensors = listed(4)
    assert judged(tmp_path, "params", tensors, MIXTRAL)[1] == sum(one.numel() for one in tensors.values())


def test_a_token_uses_the_experts_that_it_is_sent_to(tmp_path: Path) -> None:
    worth, total = judged(tmp_path, "active", listed(4), MIXTRAL)
    assert total == 12 * 8 + 4 * 8 + 2 * 3 * 8 * 16
    assert worth.weights["model.layers.0.block_sparse_moe.experts.3.w1.weight"] == Fraction(1, 2)


def test_of_fewer_experts_a_token_is_sent_to_as_many(tmp_path: Path) -> None:
    worth, total = judged(tmp_path, "active", listed(4), MIXTRAL)
    left = {name: tuple(one.shape) for name, one in listed(3).items()}
    assert worth.total(left) == total - 8


@pytest.mark.parametrize("left", [4, 3, 2])
def test_experts_in_stacks_take_turns_too(tmp_path: Path, left: int) -> None:
    config = {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2}
    worth, _ = judged(tmp_path, "active", stacked(4), config)
    shapes = {name: tuple(one.shape) for name, one in stacked(left).items()}
    assert worth.total(shapes) == left * 9 + 2 * (8 * 32 + 32 + 16 * 8 + 8)


def test_a_dense_model_uses_all_of_its_parameters_for_each_token(tmp_path: Path) -> None:
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.zeros(4, 3)}
    assert judged(tmp_path, "active", tensors, {"model_type": "llama"})[1] == 12


def test_where_no_config_tells_how_many_experts_serve_a_token_nobody_does(tmp_path: Path) -> None:
    config = {key: value for key, value in MIXTRAL.items() if key != "num_experts_per_tok"}
    text = r"config.json does not say to how many experts of model\.layers\.0\..*\.experts a token is sent"
    with pytest.raises(CheckpointError, match=text):
        judged(tmp_path, "active", listed(4), config)


@pytest.mark.parametrize(("tied", "total"), [(True, 96), (False, 192), (None, 192)])
def test_a_matrix_that_the_model_ties_counts_once(tmp_path: Path, tied: bool | None, total: int) -> None:
    tensors = {name: torch.zeros(12, 8) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    config = {"model_type": "llama"} | ({} if tied is None else {"tie_word_embeddings": tied})
    assert judged(tmp_path, "params", tensors, config)[1] == total


def test_codes_count_as_weights_and_what_lies_beside_them_as_nothing(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.zeros(8, 16).to(torch.float8_e4m3fn),
        "a.weight_scale": torch.ones(8, 1),
        "b.qweight": torch.zeros(4, 6, dtype=torch.int32),
        "b.qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "b.scales": torch.ones(1, 6),
        "c_blocks": torch.zeros(2, 3, 16, dtype=torch.uint8),
        "c_scales": torch.zeros(2, 3, dtype=torch.uint8),
    }
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}
    assert judged(tmp_path, "params", tensors, config)[1] == 8 * 16 + 8 * 4 * 6 + 2 * 2 * 3 * 16


def test_three_bits_in_integers_count_exactly(tmp_path: Path) -> None:
    tensors = {"b.qweight": torch.zeros(12, 6, dtype=torch.int32), "b.scales": torch.ones(1, 6)}
    config = {"quantization_config": {"quant_method": "gptq", "bits": 3, "group_size": 128}}
    assert judged(tmp_path, "params", tensors, config)[1] == 128 * 6


def test_of_codes_whose_bits_nobody_tells_nobody_tells_the_number(tmp_path: Path) -> None:
    tensors = {"b.qweight": torch.zeros(4, 6, dtype=torch.int32), "b.scales": torch.ones(1, 6)}
    with pytest.raises(CheckpointError, match=r"b\.qweight holds integer codes, several in an int32: nobody"):
        judged(tmp_path, "params", tensors, {})


def test_bytes_are_those_of_the_dtypes(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16), "c": torch.zeros(7) > 0}
    assert judged(tmp_path, "size", tensors, {})[1] == 48 + 10 + 7
