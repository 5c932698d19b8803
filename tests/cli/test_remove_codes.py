"""Whole experts and layers cut out of quantized checkpoints: scales go with their codes, byte for byte."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands import ok, refused
from tests.quantized import Coded, Tensors, coded, draw, floats, integers, scales, write
from tests.samples import config_of

LAYERS, EXPERTS, HIDDEN, INNER = 3, 4, 32, 16
CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": INNER,
    "intermediate_size": 64,
    "vocab_size": 64,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "intermediate_size": HIDDEN,
    "vocab_size": 64,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    },
}
RANDOM_EXPERTS = """
version = 1
[block.part]
structure = "experts"
shape = [1]
[block_coupling.expert]
blocks = ["part"]
across = ["part"]
[scope.expert]
block = "expert"
shape = [-1]
[scope_coupling.experts]
scopes = ["expert"]
across = ["expert"]
sparsity = 0.25
score = { kind = "random", seed = 3 }
"""
RANDOM_LAYERS = """
version = 1
[block.part]
structure = "layers"
shape = [1]
[block_coupling.layer]
blocks = ["part"]
across = ["part"]
[scope.layer]
block = "layer"
shape = [-1]
[scope_coupling.depth]
scopes = ["layer"]
across = ["layer"]
nnz = 2
score = { kind = "random", seed = 3 }
"""


def plain(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=draw(seed)).to(torch.bfloat16)


def fp8(name: str, rows: int, columns: int, seed: int, scale: float = 1.0) -> Tensors:
    grid = scales((rows // 8, columns // 8), seed) * scale
    return coded(f"{name}.weight", floats((rows, columns), seed), grid, (8, 8), end="_scale_inv").stored


def gptq(name: str, rows: int, columns: int, seed: int, scale: float = 1.0) -> Tensors:
    """Matrices of four bits, with inputs in the first dimension."""
    words = torch.randint(-(2**31), 2**31 - 1, (columns // 8, rows), generator=draw(seed)).to(torch.int32)
    return {
        f"{name}.qweight": words,
        f"{name}.qzeros": words[:1, : rows // 8].clone(),
        f"{name}.scales": scales((columns // 16, rows), seed, torch.float16) * scale,
        f"{name}.g_idx": torch.arange(columns).to(torch.int32) // 16,
    }


def mixture(
    matrix: Callable[..., Tensors], stated: dict[str, Any], large: dict[int, int] | None = None
) -> Coded:
    """Experts in tensors of their own; `large` names for a layer the expert of large scales."""
    found: Tensors = {"model.embed_tokens.weight": plain(64, HIDDEN), "model.norm.weight": plain(HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for number, (name, rows) in enumerate({"q": 32, "k": 16, "v": 16, "o": HIDDEN}.items()):
            found |= matrix(f"{at}.self_attn.{name}_proj", rows, HIDDEN, 10 * layer + number)
        found[f"{at}.mlp.gate.weight"] = plain(EXPERTS, HIDDEN, seed=layer)
        for expert in range(EXPERTS):
            scale = 1e-4 if large is not None and large[layer] != expert else 1.0
            for number, (name, form) in enumerate(
                {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}.items()
            ):
                seed = 100 * layer + 10 * expert + number
                found |= matrix(f"{at}.mlp.experts.{expert}.{name}_proj", *form, seed, scale)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}.{name}.weight"] = plain(HIDDEN, seed=layer)
    return Coded(found, config={**CONFIG, "quantization_config": stated})


def fp8_mixture(large: dict[int, int] | None = None) -> Coded:
    gates = [f"model.layers.{layer}.mlp.gate" for layer in range(LAYERS)]
    stated = {
        "quant_method": "fp8",
        "weight_block_size": [8, 8],
        "modules_to_not_convert": ["lm_head", *gates],
    }
    return mixture(fp8, stated, large)


def gptq_mixture() -> Coded:
    return mixture(gptq, {"quant_method": "gptq", "bits": 4, "group_size": 16})


def gpt_oss() -> Coded:
    """Experts in stacks of MXFP4, with scales and biases."""
    found: Tensors = {"model.embed_tokens.weight": plain(64, HIDDEN), "model.norm.weight": plain(HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name, rows in {"q": 32, "k": 16, "v": 16, "o": HIDDEN}.items():
            found[f"{at}.self_attn.{name}_proj.weight"] = plain(rows, HIDDEN, seed=layer)
            found[f"{at}.self_attn.{name}_proj.bias"] = plain(rows, seed=layer)
        found[f"{at}.self_attn.sinks"] = plain(4, seed=layer)
        found[f"{at}.mlp.router.weight"] = plain(EXPERTS, HIDDEN, seed=layer)
        found[f"{at}.mlp.router.bias"] = plain(EXPERTS, seed=layer)
        for name, rows in {"gate_up": 2 * HIDDEN, "down": HIDDEN}.items():
            stack = f"{at}.mlp.experts.{name}_proj"
            found[f"{stack}_blocks"] = integers((EXPERTS, rows, HIDDEN // 32, 16), layer, 0, 256)
            found[f"{stack}_scales"] = integers((EXPERTS, rows, HIDDEN // 32), layer, 0, 256)
            found[f"{stack}_bias"] = plain(EXPERTS, rows, seed=layer)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}.{name}.weight"] = plain(HIDDEN, seed=layer)
    return Coded(found, config=GPT_OSS)


def spec_at(folder: Path, text: str) -> Path:
    (folder / "spec.toml").write_text(text)
    return folder / "spec.toml"


def removed(folder: Path, found: Coded, spec: object, *words: object) -> tuple[Tensors, dict[str, Any], Any]:
    """The tensors and the config of the smaller checkpoint, and the report."""
    path = write(folder / "m", found, shards=True)
    report = json.loads(ok("remove", path, spec, "-o", folder / "small", "--json", "-q", *words).out)
    files = sorted((folder / "small").glob("*.safetensors"))
    tensors = {name: one for file in files for name, one in load_file(file).items()}
    return tensors, config_of(folder / "small"), report


def same(tensors: Tensors, wanted: Tensors) -> bool:
    return tensors.keys() == wanted.keys() and all(
        torch.equal(tensors[name].view(torch.uint8), wanted[name].view(torch.uint8))
        if wanted[name].ndim
        else torch.equal(tensors[name], wanted[name])
        for name in wanted
    )


def without_experts(found: Coded, kept: dict[int, list[int]]) -> Tensors:
    """Of lists of experts the kept ones, numbered anew; of routers their rows."""
    left: Tensors = {}
    for name, tensor in found.stored.items():
        pieces = name.split(".")
        stays = kept[int(pieces[2])] if pieces[1] == "layers" else []
        if "experts" in pieces:
            expert = int(pieces[5])
            if expert in stays:
                left[".".join([*pieces[:5], str(stays.index(expert)), *pieces[6:]])] = tensor
        elif ".mlp.gate." in name:
            left[name] = tensor[stays]
        else:
            left[name] = tensor
    return left


def without_layers(found: Coded, stays: list[int]) -> Tensors:
    left: Tensors = {}
    for name, tensor in found.stored.items():
        pieces = name.split(".")
        if pieces[1] != "layers":
            left[name] = tensor
        elif int(pieces[2]) in stays:
            left[".".join([*pieces[:2], str(stays.index(int(pieces[2]))), *pieces[3:]])] = tensor
    return left


def staying(tensors: Tensors, found: Coded, what: str) -> list[int]:
    """Which layers stay, by the bytes of a tensor of each."""
    return [
        next(
            old
            for old in range(LAYERS)
            if torch.equal(found.stored[what.format(old)], tensors[what.format(at)])
        )
        for at in range(2)
    ]


def test_the_experts_of_small_scales_go_with_their_scales(tmp_path: Path) -> None:
    found = fp8_mixture(large={0: 2, 1: 0, 2: 3})
    tensors, config, _ = removed(tmp_path, found, "experts", "--set", "sparsity=0.5")
    kept = {}
    for layer, large in {0: 2, 1: 0, 2: 3}.items():
        names = [
            f"model.layers.{layer}.mlp.experts.{{}}.{name}_proj.weight" for name in ("gate", "up", "down")
        ]
        energy = [
            sum(decoded_energy(found, name.format(expert)) for name in names) for expert in range(EXPERTS)
        ]
        kept[layer] = sorted(sorted(range(EXPERTS), key=lambda expert: -energy[expert])[:2])
        assert large in kept[layer]
    assert same(tensors, without_experts(found, kept))
    assert config["num_experts"] == 2
    assert config["quantization_config"] == found.config["quantization_config"]  # type: ignore[index]


def decoded_energy(found: Coded, name: str) -> float:
    codes, grid = found.stored[name].double(), found.stored[f"{name}_scale_inv"].double()
    return float(((codes * grid.repeat_interleave(8, 0).repeat_interleave(8, 1)) ** 2).sum())


@pytest.mark.parametrize("make", [fp8_mixture, gptq_mixture])
def test_experts_go_from_any_quantized_checkpoint_where_no_weight_is_read(
    tmp_path: Path, make: Callable[[], Coded]
) -> None:
    found = make()
    tensors, config, _ = removed(tmp_path, found, spec_at(tmp_path, RANDOM_EXPERTS))
    kept = {
        layer: [
            next(
                old
                for old in range(EXPERTS)
                if torch.equal(
                    found.stored[f"model.layers.{layer}.mlp.gate.weight"][old],
                    tensors[f"model.layers.{layer}.mlp.gate.weight"][new],
                )
            )
            for new in range(3)
        ]
        for layer in range(LAYERS)
    }
    assert same(tensors, without_experts(found, kept))
    assert config["num_experts"] == 3


@pytest.mark.parametrize("make", [fp8_mixture, gptq_mixture, gpt_oss])
def test_layers_go_from_any_quantized_checkpoint_with_all_that_lies_beside(
    tmp_path: Path, make: Callable[[], Coded]
) -> None:
    found = make()
    tensors, config, _ = removed(tmp_path, found, spec_at(tmp_path, RANDOM_LAYERS))
    stays = staying(tensors, found, "model.layers.{}.input_layernorm.weight")
    assert same(tensors, without_layers(found, stays))
    assert config["num_hidden_layers"] == 2


def test_members_of_stacks_go_with_their_scales_and_biases(tmp_path: Path) -> None:
    found = gpt_oss()
    tensors, config, _ = removed(tmp_path, found, spec_at(tmp_path, RANDOM_EXPERTS))
    wanted = dict(found.stored)
    for layer in range(LAYERS):
        router = f"model.layers.{layer}.mlp.router.bias"
        kept = [found.stored[router].tolist().index(one) for one in tensors[router].tolist()]
        assert len(kept) == 3
        for name in [name for name in wanted if name.startswith(f"model.layers.{layer}.mlp.")]:
            wanted[name] = wanted[name][kept]
    assert same(tensors, wanted)
    assert config["num_local_experts"] == 3
    assert config["quantization_config"] == GPT_OSS["quantization_config"]


def test_packed_experts_go_by_the_rows_of_a_router_that_holds_codes(tmp_path: Path) -> None:
    found = gptq_mixture()
    kept = {0: [0, 1, 3], 1: [1, 2, 3], 2: [0, 1, 2]}
    for layer, stays in kept.items():
        grid = torch.tensor([[1.0] if expert in stays else [1e-3] for expert in range(EXPERTS)])
        found.stored[f"model.layers.{layer}.mlp.gate.weight"] = floats((EXPERTS, HIDDEN), layer)
        found.stored[f"model.layers.{layer}.mlp.gate.weight_scale"] = grid
    text = RANDOM_EXPERTS.replace('"random", seed = 3', '"router"')
    tensors, _, _ = removed(tmp_path, found, spec_at(tmp_path, text))
    assert same(tensors, without_experts(found, kept))


def test_masks_of_packed_codes_cut_what_a_spec_would(tmp_path: Path) -> None:
    found = gpt_oss()
    tensors, _, _ = removed(tmp_path, found, spec_at(tmp_path, RANDOM_EXPERTS))
    ok("mask", tmp_path / "m", tmp_path / "spec.toml", "-o", tmp_path / "masks", "-q")
    ok("remove", tmp_path / "m", "--masks", tmp_path / "masks", "-o", tmp_path / "again", "-q")
    files = sorted((tmp_path / "again").glob("*.safetensors"))
    assert same({name: one for file in files for name, one in load_file(file).items()}, tensors)


def test_numbers_of_layers_that_a_quantizer_has_written_down_follow(tmp_path: Path) -> None:
    found = fp8_mixture()
    tensors, config, _ = removed(tmp_path, found, spec_at(tmp_path, RANDOM_LAYERS))
    assert len(staying(tensors, found, "model.layers.{}.input_layernorm.weight")) == 2
    names = config["quantization_config"]["modules_to_not_convert"]
    assert names == ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]


@pytest.mark.parametrize(
    ("make", "spec", "line"),
    [
        (
            fp8_mixture,
            "mlp-channels",
            "holds FP8 codes (model.layers.0.mlp.experts.0.down_proj.weight_scale_inv",
        ),
        (
            gptq_mixture,
            "experts",
            "holds GPTQ codes, eight in an int32 (model.layers.0.mlp.experts.0.down_proj.g_idx",
        ),
        (gpt_oss, "experts", "model.layers.0.mlp.experts.down_proj_blocks holds MXFP4 codes, two in a byte"),
    ],
)
def test_what_has_to_be_understood_is_refused_by_name(
    tmp_path: Path, make: Callable[[], Coded], spec: str, line: str
) -> None:
    path = write(tmp_path / "m", make())
    said = refused("remove", path, spec, "-o", tmp_path / "small")
    assert line in said.err
    assert "dequantize the checkpoint first" in said.err
    assert not (tmp_path / "small").exists()


def test_zeros_cannot_be_written_where_slices_could_be_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "m", gpt_oss())
    said = refused("apply", path, spec_at(tmp_path, RANDOM_EXPERTS), "-o", tmp_path / "small")
    assert "model.layers.0.mlp.experts.down_proj_blocks holds MXFP4 codes, two in a byte" in said.err


def test_a_scale_of_a_whole_stack_stays(tmp_path: Path) -> None:
    found = gpt_oss()
    stored = {name: one for name, one in found.stored.items() if "_scales" not in name}
    for layer in range(LAYERS):
        for name, rows in {"gate_up": 2 * HIDDEN, "down": HIDDEN}.items():
            stack = f"model.layers.{layer}.mlp.experts.{name}_proj"
            del stored[f"{stack}_blocks"]
            stored[stack] = floats((EXPERTS, HIDDEN, rows), layer)
            stored[f"{stack}_scale"] = torch.tensor(0.5)
    config = {**GPT_OSS, "quantization_config": {"quant_method": "fp8"}}
    tensors, _, _ = removed(tmp_path, Coded(stored, config=config), "experts")
    assert tensors["model.layers.0.mlp.experts.down_proj"].shape == (3, HIDDEN, HIDDEN)
    assert tensors["model.layers.0.mlp.experts.down_proj_scale"] == 0.5
    save_file(tensors, tmp_path / "all.safetensors")
