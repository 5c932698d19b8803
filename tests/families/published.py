"""Published layouts that no class writes: checkpoints of the zoo, with tensors renamed and added.

Heads that guess tokens ahead, experts in one tensor or in many, a thinker with a talker, configs that leave
out what the class has as a default, shards.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from safetensors.torch import save_file

from tests.families.checkpoints import read
from tests.families.harness import Zoo, settle
from tests.families.zoo import EXPERTS, HIDDEN, LAYERS, SPECIES, VOCABULARY, Species, save

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]


def rewritten(one: Zoo, tensors: Tensors, config: Config | None = None, beside: str = "") -> Zoo:
    """The checkpoint with these tensors and this config; `beside` are names that its class leaves alone."""
    for file in one.folder.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, one.folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (one.folder / "config.json").write_text(json.dumps(config))
    return replace(one, beside=beside)


def config_of(one: Zoo) -> Config:
    found: Config = json.loads((one.folder / "config.json").read_text())
    return found


def random_like(tensors: Mapping[str, torch.Tensor], seed: int = 3) -> Tensors:
    """Tensors of these names and shapes with other numbers: norms near one."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (tensor.ndim == 1) + 0.3 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tensors.items()
    }


def _renamed(tensors: Tensors, pattern: str, name: str) -> Tensors:
    """Those whose name matches at its beginning, with that replaced."""
    return {re.sub(f"^{pattern}", name, old): each for old, each in tensors.items() if re.match(pattern, old)}


def _head_beside(tensors: Tensors, at: str) -> Tensors:
    """`mtp.`: a layer as the trunk's with full attention, behind a projection of two hidden states."""
    layer = _renamed(tensors, rf"{re.escape(at)}\.3\.", "mtp.layers.0.")
    norms = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    return {
        **layer,
        "mtp.fc.weight": torch.empty(HIDDEN, 2 * HIDDEN),
        **{f"mtp.{norm}.weight": torch.empty(HIDDEN) for norm in norms},
    }


def head_beside_trunk(name: str, at: str) -> Callable[[Path], Zoo]:
    """Qwen3.5 and Qwen3-Next: `mtp.layers.0` next to `model.layers.*`."""

    def make(folder: Path) -> Zoo:
        one = settle(SPECIES[name], folder)
        tensors, config = read(one.folder), config_of(one)
        config.get("text_config", config)["mtp_num_hidden_layers"] = 1
        return rewritten(one, {**tensors, **random_like(_head_beside(tensors, at))}, config, "mtp")

    return make


def head_in_trunk(name: str) -> Callable[[Path], Zoo]:
    """DeepSeek-V3 and GLM-4.5: one layer more than `num_hidden_layers` counts, with its own vocabulary."""

    def make(folder: Path) -> Zoo:
        one = settle(SPECIES[name], folder)
        tensors, config = read(one.folder), config_of(one)
        at = f"model.layers.{LAYERS}"
        wide, norm = torch.empty(VOCABULARY, HIDDEN), torch.empty(HIDDEN)
        head = {
            **_renamed(tensors, rf"model\.layers\.{LAYERS - 1}\.", f"{at}."),
            f"{at}.eh_proj.weight": torch.empty(HIDDEN, 2 * HIDDEN),
            **{f"{at}.{each}.weight": norm for each in ("enorm", "hnorm", "shared_head.norm")},
            **{f"{at}.{each}.weight": wide for each in ("embed_tokens", "shared_head.head")},
        }
        config.pop("num_mtp_layers", None)
        config["num_nextn_predict_layers"] = 1
        return rewritten(one, {**tensors, **random_like(head)}, config, r"model\.layers")

    return make


def fused(tensors: Tensors) -> Tensors:
    """Experts as transformers has them in memory: one tensor of gates and ups, one of downs."""
    expert = re.compile(r"(.*\.mlp\.experts)\.\d+\.")
    places = sorted({match[1] for match in map(expert.match, tensors) if match})
    left = {name: each for name, each in tensors.items() if not expert.match(name)}
    for at in places:
        gate, up, down = (
            torch.stack([tensors[f"{at}.{number}.{name}_proj.weight"] for number in range(EXPERTS)])
            for name in ("gate", "up", "down")
        )
        left |= {f"{at}.gate_up_proj": torch.cat([gate, up], 1), f"{at}.down_proj": down}
    return left


def experts_fused(name: str) -> Callable[[Path], Zoo]:
    def make(folder: Path) -> Zoo:
        one = settle(SPECIES[name], folder)
        return rewritten(one, fused(read(one.folder)))

    return make


def experts_fused_but_in_the_head(folder: Path) -> Zoo:
    """Qwen3.5-MoE: the trunk has experts in one tensor, the head has modules."""
    one = settle(SPECIES["qwen3_5_moe"], folder)
    tensors, config = read(one.folder), config_of(one)
    config["text_config"]["mtp_num_hidden_layers"] = 1
    head = random_like(_head_beside(tensors, "model.language_model.layers"))
    return rewritten(one, {**fused(tensors), **head}, config, "mtp")


def shards(name: str) -> Callable[[Path], Zoo]:
    """As `save_pretrained` splits it: tensors of one layer, and of one expert, in several files."""

    def make(folder: Path) -> Zoo:
        one = settle(SPECIES[name], folder)
        model = one.load(one.folder)
        (one.folder / "model.safetensors").unlink()
        model.save_pretrained(one.folder, max_shard_size="64KB")
        return one

    return make


def with_few_keys(species: Species, *left: str) -> Callable[[Path], Zoo]:
    """A nested config of the text that has these keys only."""

    def make(folder: Path) -> Zoo:
        one = settle(species, folder)
        config = config_of(one)
        config["text_config"] = {key: config["text_config"][key] for key in ("model_type", *left)}
        return rewritten(one, read(one.folder), config)

    return make


def thinker_and_talker(folder: Path) -> Zoo:
    """Qwen2.5-Omni: two decoders beside each other, one of them with towers; no class runs both."""
    thinker = settle(SPECIES["qwen2_5_omni_thinker"], folder / "thinker")
    talker = save(_TALKER, folder / "talker")
    tensors = {
        f"{part}.{name}": each
        for part, place in (("thinker", thinker.folder), ("talker", talker))
        for name, each in read(place).items()
    }
    config = {
        "architectures": ["Qwen2_5OmniModel"], "model_type": "qwen2_5_omni",
        "thinker_config": config_of(thinker),
        "talker_config": json.loads((talker / "config.json").read_text()),
    }  # fmt: skip
    return rewritten(thinker, tensors, config)


_TALKER = Species(
    "qwen2_5_omni_talker", "Qwen2_5OmniTalkerForConditionalGeneration", "Qwen2_5OmniTalkerConfig",
    {"embedding_size": HIDDEN, "num_hidden_layers": 3, "intermediate_size": 56},
)  # fmt: skip
_GEMMA3 = replace(
    SPECIES["gemma3"],
    sizes={**SPECIES["gemma3"].sizes, "text_config": {"num_hidden_layers": 6, "head_dim": 256}},
)
_LLAVA = replace(
    SPECIES["llava"],
    sizes={
        **SPECIES["llava"].sizes,
        "text_config": {
            "model_type": "llama", "hidden_size": 64, "num_attention_heads": 32, "num_key_value_heads": 32,
            "head_dim": 2,
        },
    },
)  # fmt: skip
llava_of_few_keys = with_few_keys(_LLAVA, "max_position_embeddings", "rms_norm_eps", "vocab_size")
"""LLaVA-1.5: even its widths are the defaults of Llama, which are larger than these."""
_GEMMA3_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "sliding_window", "vocab_size")
PUBLISHED: Mapping[str, Callable[[Path], Zoo]] = {
    "qwen3_5 with a head": head_beside_trunk("qwen3_5_text", "model.layers"),
    "qwen3_5 with pictures and a head": head_beside_trunk("qwen3_5", "model.language_model.layers"),
    "qwen3_next with a head": head_beside_trunk("qwen3_next", "model.layers"),
    "qwen3_5_moe with a head": experts_fused_but_in_the_head,
    "deepseek_v3 with a head": head_in_trunk("deepseek_v3"),
    "glm4_moe with a head": head_in_trunk("glm4_moe"),
    "qwen3_moe in memory": experts_fused("qwen3_moe"),
    "qwen2_moe in memory": experts_fused("qwen2_moe"),
    "llama in shards": shards("llama"),
    "qwen3_moe in shards": shards("qwen3_moe"),
    "gemma3 of few keys": with_few_keys(_GEMMA3, *_GEMMA3_KEYS),
}
