"""A zoo of small models: one row a type, each built from its config class with numbers that are unlike.

`python -m tests.families.zoo FOLDER [NAME...]` saves them as checkpoints.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from msgspec import Struct
from transformers import AutoConfig
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts

from tests.families.checkpoints import fill, read

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, WIDTH = 4, 48, 8, 4, 10, 72
EXPERTS, CHOSEN, EXPERT_WIDTH, SHARED_WIDTH, VOCABULARY, PLACES = 8, 2, 32, 24, 99, 64
IMAGE, PATCH, PICTURE_TOKEN = 16, 8, 90
BINS, FRAMES, SAMPLES = 16, 32, 1200

_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
_LAYERED = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
TEXT: dict[str, Any] = {
    **_LAYERED, **_ENDS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_SIZE, "vocab_size": VOCABULARY,
    "max_position_embeddings": PLACES, "sliding_window": 8,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), CHOSEN),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), EXPERT_WIDTH),
    "shared_expert_intermediate_size": SHARED_WIDTH, "shared_intermediate_size": SHARED_WIDTH,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
    "q_lora_rank": 20, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8,
    "d_ff": WIDTH, "d_kv": HEAD_SIZE, "num_decoder_layers": 3, "dropout_rate": 0.0,
    "encoder_layers": LAYERS, "decoder_layers": 3, "encoder_ffn_dim": WIDTH, "decoder_ffn_dim": 56,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "d_model": HIDDEN,
    **dict.fromkeys(("image_token_id", "image_token_index"), PICTURE_TOKEN), "video_token_id": 91,
    "vision_start_token_id": 92, "vision_end_token_id": 93, "boi_token_index": 92, "eoi_token_index": 93,
    "projection_dim": 36, "max_target_positions": PLACES, "num_heads": HEADS, "num_layers": LAYERS,
}  # fmt: skip
"""Numbers of a language model, by all keys that classes have for them."""
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": IMAGE, "patch_size": PATCH, "num_channels": 3, "projection_dim": 36,
    "depth": 3, "num_heads": 4, "embed_dim": 32,
}  # fmt: skip
SOUND: dict[str, Any] = {
    **_LAYERED, "encoder_layers": LAYERS, "encoder_ffn_dim": WIDTH, "encoder_attention_heads": HEADS,
    "d_model": HIDDEN, "num_mel_bins": BINS, "max_source_positions": FRAMES // 2,
}  # fmt: skip
_PARTS = {
    "text_config": TEXT,
    "vision_config": VISION,
    "audio_config": SOUND,
    "encoder": TEXT,
    "decoder": TEXT,
}


class Species(Struct, frozen=True):
    """A type: the class of its model, what its config has beside the sizes of all, what it is given.

    `sizes` replaces the sizes of all, of which the config's class takes those that it knows; one that is
    itself a dictionary is the config of a part.
    """

    name: str
    model: str
    config: str
    sizes: Mapping[str, Any] = {}
    given: str = "text"
    shown: int = 0


def build(species: Species) -> Any:
    """The model of a row."""
    torch.manual_seed(5)
    config = _config(getattr(transformers, species.config), dict(species.sizes), _sizes(species))
    return getattr(transformers, species.model)(config).eval()


def _sizes(species: Species) -> Mapping[str, Any]:
    return VISION if species.given == "picture" else SOUND | TEXT


def _config(kind: Any, own: dict[str, Any], common: Mapping[str, Any]) -> Any:
    known = {field.name for field in fields(kind)}
    aliases = getattr(kind, "attribute_map", {})
    named = {key if key in known else aliases.get(key, key): value for key, value in common.items()}
    sizes = {key: value for key, value in named.items() if key in known}
    for part, of_part in getattr(kind, "sub_configs", {}).items():
        given = dict(own.pop(part, None) or {})
        named_kind = CONFIG_MAPPING[given.pop("model_type")] if of_part is AutoConfig else of_part
        sizes[part] = _config(named_kind, given, _PARTS.get(part, {}))
    return kind(**{**sizes, **own})


def inputs(species: Species) -> dict[str, torch.Tensor]:
    """What the model is given: two sequences of twelve tokens, and pictures or sound where it takes them."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(3, 80, (2, 12), generator=generator)
    pictures = torch.randn(2, 3, IMAGE, IMAGE, generator=generator)
    sound = torch.randn(2, BINS, FRAMES, generator=generator)
    shown = tokens.clone()
    shown[:, 1 : 1 + species.shown] = PICTURE_TOKEN
    kinds: dict[str, dict[str, torch.Tensor]] = {
        "text": {"input_ids": shown},
        "answer": {"decoder_input_ids": tokens[:, :7].flip(0)},
        "picture": {"pixel_values": pictures},
        "sizes": {"image_sizes": torch.tensor([[IMAGE, IMAGE]] * 2)},
        "pictures": {"pixel_values": pictures[:, None]},
        "patches": {
            "pixel_values": torch.randn(8, 3 * 2 * PATCH * PATCH, generator=generator),
            "image_grid_thw": torch.tensor([[1, IMAGE // PATCH, IMAGE // PATCH]] * 2),
            "mm_token_type_ids": (shown == PICTURE_TOKEN).int(),
        },
        "tiles": {
            "pixel_values": pictures[:, None, None].repeat(1, 1, 2, 1, 1, 1),
            "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.tensor([[[1.0, 0.0]]] * 2),
        },
        "samples": {"input_values": torch.randn(2, SAMPLES, generator=generator)},
        "frames": {"input_features": sound.mT},
        "bins": {"input_features": sound},
    }
    given = [kinds[kind] for kind in species.given.split()]
    return {name: value for kind in given for name, value in kind.items()}


def output(species: Species, model: Any) -> torch.Tensor:
    """What the model computes, in its precision: the first of its outputs, logits or hidden states."""
    given = {
        name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in inputs(species).items()
    }
    return run(model, given)


def wanted_by_llama4() -> Any:
    """While it is entered, outputs have what Llama 4 asks them for, and no class of transformers gives."""
    return patch.object(MoeCausalLMOutputWithPast, "image_outputs", None, create=True)


def run(model: Any, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The first output of a model for what it is given."""
    chosen = patch.object(NllbMoeExperts, "forward", _chosen_experts)
    with torch.inference_mode(), wanted_by_llama4(), chosen:
        result: torch.Tensor = model(**given, return_dict=True)[0]
    return result


def _chosen_experts(
    experts: NllbMoeExperts, states: torch.Tensor, _mask: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """What the experts of NLLB make of states (tokens, hidden), with weights (tokens, experts) by its router.

    The class runs the first two experts in place of those that the router chose.
    """
    return sum(
        (experts[f"expert_{at}"](states) * weight[:, None] for at, weight in enumerate(weights.T)),
        torch.zeros_like(states),
    )


def save(species: Species, folder: Path) -> Path:
    """Its checkpoint, below a folder."""
    fill(build(species), torch.Generator().manual_seed(11)).save_pretrained(folder / species.name)
    return folder / species.name


def _text(name: str, stem: str, config: str = "", model: str = "ForCausalLM", **sizes: Any) -> Species:
    return Species(name, f"{stem}{model}", config or f"{stem}Config", sizes)


def _both(name: str, stem: str, model: str = "ForConditionalGeneration", **sizes: Any) -> Species:
    """An encoder and its decoder."""
    return Species(name, f"{stem}{model}", f"{stem}Config", sizes, "text answer")


def _picture(
    name: str, stem: str, config: str = "", model: str = "ForImageClassification", **sizes: Any
) -> Species:
    return Species(name, f"{stem}{model}", config or f"{stem}Config", sizes, "picture")


def _seen(
    name: str,
    stem: str,
    vision_type: str,
    text_type: str,
    *,
    given: str = "text picture",
    shown: int = 0,
    text: Mapping[str, Any] = {},
    vision: Mapping[str, Any] = {},
    **sizes: Any,
) -> Species:
    """A language model with a vision tower; types are named where the class leaves them open."""
    parts = {
        "text_config": {**text, **({"model_type": text_type} if text_type else {})},
        "vision_config": {**vision, **({"model_type": vision_type} if vision_type else {})},
    }
    return Species(name, f"{stem}ForConditionalGeneration", f"{stem}Config", {**parts, **sizes}, given, shown)


_TURNED = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]}}
_TINY = 1e-10  # norms over other numbers of channels share it, so that it cannot be right for all
_LINEAR: dict[str, Any] = {
    "rms_norm_eps": 1e-8, "num_hidden_layers": 6, "linear_key_head_dim": 6, "linear_value_head_dim": 8,
    "linear_num_key_heads": 4, "linear_num_value_heads": 8, "head_dim": 20,
    "layer_types": [f"{kind}_attention" for kind in "linear full linear full full linear".split()],
}  # fmt: skip
_QWEN3_VISION = {"out_hidden_size": HIDDEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [1, 2]}
_CONVOLVED = {
    "conv_dim": [12, 20],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 4],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}

_HEARD = {"audio_config": {"output_dim": HIDDEN, "downsample_hidden_size": 12}, "audio_token_index": 94}
# fmt: off
ZOO: tuple[Species, ...] = (
    _text("llama", "Llama"),
    _text("llama_mlp_bias", "Llama", mlp_bias=True, attention_bias=True),
    _text("mistral", "Mistral"),
    _text("ministral", "Ministral"),
    _text("ministral3", "Ministral3"),
    _text("qwen2", "Qwen2"),
    _text("qwen3", "Qwen3"),
    _text("qwen3_5_text", "Qwen3_5", "Qwen3_5TextConfig", **_LINEAR),
    _text("qwen3_5_moe_text", "Qwen3_5Moe", "Qwen3_5MoeTextConfig", **_LINEAR),
    _text("qwen3_next", "Qwen3Next", **_LINEAR),
    _text("gemma", "Gemma"),
    _text("gemma2", "Gemma2"),
    _text("gemma3_text", "Gemma3", "Gemma3TextConfig", num_hidden_layers=6),
    _text(
        "gemma3n_text", "Gemma3n", "Gemma3nTextConfig", num_hidden_layers=6, vocab_size_per_layer_input=99,
        hidden_size_per_layer_input=12, num_kv_shared_layers=2, laurel_rank=14,
        intermediate_size=[WIDTH] * 6, layer_types=["sliding_attention", "full_attention"] * 3,
        activation_sparsity_pattern=[0.5] * 2 + [0.0] * 4,
    ),
    _text(
        "gemma4_text", "Gemma4", "Gemma4TextConfig", num_hidden_layers=6, vocab_size_per_layer_input=99,
        hidden_size_per_layer_input=12, global_head_dim=14, num_global_key_value_heads=2,
        attention_k_eq_v=True, layer_types=["sliding_attention", "full_attention", "sliding_attention",
        "sliding_attention", "full_attention", "full_attention"], num_experts=None,
    ),
    _text(
        "gemma4_shared", "Gemma4", "Gemma4TextConfig", num_hidden_layers=6, vocab_size_per_layer_input=99,
        hidden_size_per_layer_input=12, global_head_dim=14, num_global_key_value_heads=2,
        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention", "sliding_attention",
        "sliding_attention", "full_attention", "full_attention"], num_experts=None,
    ),
    _text(
        "gemma4_moe", "Gemma4", "Gemma4TextConfig", num_hidden_layers=6, vocab_size_per_layer_input=99,
        hidden_size_per_layer_input=12, enable_moe_block=True, global_head_dim=14,
    ),
    _text("vaultgemma", "VaultGemma"),
    _text("phi", "Phi", hidden_size=64),
    _text("phi3", "Phi3"),
    _text("phimoe", "Phimoe", intermediate_size=EXPERT_WIDTH),
    _text("gpt2", "GPT2", model="LMHeadModel", n_inner=WIDTH),
    _text("gpt_neo", "GPTNeo", num_layers=LAYERS, attention_types=[[["global", "local"], 2]], window_size=8),
    _text("gpt_neox", "GPTNeoX"),
    _text("gptj", "GPTJ", n_inner=WIDTH, rotary_dim=4),
    _text("gpt_bigcode", "GPTBigCode", n_inner=WIDTH),
    _text("codegen", "CodeGen", n_inner=WIDTH, rotary_dim=4),
    _text("opt", "OPT", ffn_dim=WIDTH),
    _text("bloom", "Bloom"),
    _text("falcon", "Falcon"),
    _text("falcon_40b", "Falcon", new_decoder_architecture=True, num_kv_heads=4),
    _text("mpt", "Mpt"),
    _text(
        "dbrx", "Dbrx", attn_config={"kv_n_heads": 4, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"hidden_size": 48, "ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2},
    ),
    _text("starcoder2", "Starcoder2"),
    _text("stablelm", "StableLm"),
    _text("olmo", "Olmo"),
    _text("olmo2", "Olmo2", rms_norm_eps=_TINY),
    _text("olmo3", "Olmo3", rms_norm_eps=_TINY),
    _text("olmoe", "Olmoe", intermediate_size=EXPERT_WIDTH),
    _text("flex_olmo", "FlexOlmo", intermediate_size=EXPERT_WIDTH, rms_norm_eps=_TINY),
    _text("granite", "Granite"),
    _text("granitemoe", "GraniteMoe", intermediate_size=EXPERT_WIDTH),
    _text("granitemoeshared", "GraniteMoeShared", intermediate_size=EXPERT_WIDTH),
    _text(
        "granitemoehybrid", "GraniteMoeHybrid", intermediate_size=EXPERT_WIDTH, mamba_n_heads=8,
        mamba_d_head=12, mamba_d_state=16, mamba_chunk_size=8,
        layer_types=["mamba", "attention", "mamba", "attention"],
    ),
    _text("cohere", "Cohere"),
    _text("cohere2", "Cohere2"),
    _text("glm", "Glm"),
    _text("glm4", "Glm4"),
    _text("glm4_moe", "Glm4Moe", head_dim=12),
    _text("smollm3", "SmolLM3"),
    _text("exaone4", "Exaone4", rms_norm_eps=_TINY),
    _text("seed_oss", "SeedOss"),
    _text("hunyuan_v1_dense", "HunYuanDenseV1"),
    _text("hunyuan_v1_moe", "HunYuanMoEV1", intermediate_size=EXPERT_WIDTH),
    _text("helium", "Helium", head_dim=6),
    _text("ernie4_5", "Ernie4_5"),
    _text("ernie4_5_moe", "Ernie4_5_Moe"),
    _text("arcee", "Arcee"),
    _text("apertus", "Apertus"),
    _text("nemotron", "Nemotron"),
    _text("persimmon", "Persimmon", hidden_size=64),
    _text("diffllama", "DiffLlama"),
    _text(
        "bamba", "Bamba", mamba_n_heads=8, mamba_d_head=12, mamba_d_state=16, mamba_chunk_size=8,
        attn_layer_indices=[1, 3],
    ),
    _text(
        "jamba", "Jamba", intermediate_size=EXPERT_WIDTH, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=6,
    ),
    _text(
        "zamba2", "Zamba2", num_hidden_layers=6, layers_block_type=["mamba", "hybrid", "mamba", "mamba",
        "hybrid", "mamba"], mamba_d_state=16, n_mamba_heads=8, mamba_headdim=12, chunk_size=8,
        num_mem_blocks=2, adapter_rank=10, use_shared_attention_adapter=True, num_key_value_heads=HEADS,
    ),
    _text("mamba", "Mamba", state_size=8, time_step_rank=6),
    _text("mamba2", "Mamba2", num_heads=8, head_dim=12, state_size=16, n_groups=2, chunk_size=8),
    _text(
        "falcon_h1", "FalconH1", mamba_n_heads=8, mamba_d_head=12, mamba_d_ssm=96, mamba_d_state=16,
        mamba_chunk_size=8,
    ),
    _text("falcon_mamba", "FalconMamba", state_size=8, time_step_rank=6),
    _text("recurrent_gemma", "RecurrentGemma", num_hidden_layers=6, lru_width=48, attention_window_size=8),
    _text("rwkv", "Rwkv"),
    _text(
        "lfm2", "Lfm2", num_hidden_layers=6, layer_types=["conv", "conv", "full_attention", "conv",
        "full_attention", "conv"],
    ),
    _text(
        "lfm2_moe", "Lfm2Moe", num_hidden_layers=6, layer_types=["conv", "conv", "full_attention", "conv",
        "full_attention", "conv"],
    ),
    _text("afmoe", "Afmoe"),
    _text("minimax", "MiniMax", intermediate_size=EXPERT_WIDTH, block_size=8, rms_norm_eps=_TINY),
    _text("minimax_m2", "MiniMaxM2", intermediate_size=EXPERT_WIDTH, rms_norm_eps=_TINY),
    _text("mixtral", "Mixtral", intermediate_size=EXPERT_WIDTH),
    _text("qwen2_moe", "Qwen2Moe"),
    _text("qwen3_moe", "Qwen3Moe", num_experts=EXPERTS, head_dim=HEAD_SIZE),
    _text("deepseek_v2", "DeepseekV2", num_key_value_heads=HEADS),
    _text("deepseek_v3", "DeepseekV3", num_key_value_heads=HEADS),
    _text("dots1", "Dots1"),
    _text("gpt_oss", "GptOss", intermediate_size=EXPERT_WIDTH),
    _text(
        "llama4_text", "Llama4", "Llama4TextConfig", intermediate_size=EXPERT_WIDTH,
        intermediate_size_mlp=WIDTH, num_experts_per_tok=1, moe_layers=[1, 2],
    ),
    _text(
        "longcat_flash", "LongcatFlash", num_layers=3, num_key_value_heads=HEADS, head_dim=4,
        ffn_hidden_size=WIDTH, zero_expert_num=3,
    ),
    _text("bitnet", "BitNet"),
    _text("doge", "Doge"),
    _text("jetmoe", "JetMoe", intermediate_size=EXPERT_WIDTH, kv_channels=10),
    _text("aria_text", "AriaText", intermediate_size=EXPERT_WIDTH),
    _text("nanochat", "NanoChat"),
    _text("exaone_moe", "ExaoneMoe"),
    _text("biogpt", "BioGpt"),
    _text("xglm", "XGLM", ffn_dim=WIDTH),
    _text("ctrl", "CTRL", model="LMHeadModel", dff=WIDTH),
    _text("openai-gpt", "OpenAIGPT", model="LMHeadModel"),
    _text(
        "nemotron_h", "NemotronH", layers_block_type=["mamba", "moe", "attention", "mlp", "mamba", "moe"],
        mamba_num_heads=8, mamba_head_dim=12, n_groups=2, ssm_state_size=16, chunk_size=8,
        moe_shared_expert_intermediate_size=SHARED_WIDTH, layer_norm_epsilon=_TINY,
    ),
    _text("minicpm3", "MiniCPM3", num_key_value_heads=HEADS, dim_model_base=12),
    _text("cwm", "Cwm"),
    _text("jais2", "Jais2"),
    _text("solar_open", "SolarOpen"),
    _text("glm4_moe_lite", "Glm4MoeLite", num_key_value_heads=HEADS),
    _text("bert", "Bert", model="ForMaskedLM"),
    _text("roberta", "Roberta", model="ForMaskedLM"),
    _text("xlm_roberta", "XLMRoberta", model="ForMaskedLM"),
    _text("camembert", "Camembert", model="ForMaskedLM"),
    _text("distilbert", "DistilBert", model="ForMaskedLM", hidden_dim=WIDTH),
    _text("albert", "Albert", model="ForMaskedLM", num_hidden_groups=2),
    _text("electra", "Electra", model="ForMaskedLM"),
    _text("deberta", "Deberta", model="ForMaskedLM"),
    _text("deberta_v2", "DebertaV2", model="ForMaskedLM"),
    _text("modernbert", "ModernBert", model="ForMaskedLM"),
    _text("eurobert", "EuroBert", model="ForMaskedLM"),
    _text("nomic_bert", "NomicBert", model="ForMaskedLM"),
    _text("mpnet", "MPNet", model="ForMaskedLM"),
    _text("ernie", "Ernie", model="ForMaskedLM"),
    _text("esm", "Esm", model="ForMaskedLM"),
    _text("rembert", "RemBert", model="ForMaskedLM", input_embedding_size=20, output_embedding_size=28),
    _text(
        "mobilebert", "MobileBert", model="ForMaskedLM", embedding_size=20, intra_bottleneck_size=24,
        num_feedforward_networks=2,
    ),
    _text("xlnet", "XLNet", model="LMHeadModel", d_inner=WIDTH),
    _text("roformer", "RoFormer", model="ForMaskedLM"),
    _text("longformer", "Longformer", model="ForMaskedLM"),
    _both("t5", "T5"),
    _both("t5_gated", "T5", feed_forward_proj="gated-gelu"),
    _both("mt5", "MT5"),
    _both("umt5", "UMT5"),
    _both("bart", "Bart"),
    _both("mbart", "MBart"),
    _both("pegasus", "Pegasus"),
    _both("marian", "Marian", model="MTModel"),
    _both("blenderbot", "Blenderbot"),
    _both("m2m_100", "M2M100"),
    _both(
        "led", "LED", attention_window=4, max_encoder_position_embeddings=PLACES,
        max_decoder_position_embeddings=PLACES,
    ),
    _both(
        "switch_transformers", "SwitchTransformers", num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=1, expert_capacity=64,
    ),
    _both("nllb_moe", "NllbMoe", encoder_sparse_step=2, decoder_sparse_step=2),
    _both("t5gemma", "T5Gemma"),
    _picture("vit", "ViT"),
    _picture("deit", "DeiT"),
    _picture("beit", "Beit"),
    _picture("dinov2", "Dinov2", mlp_ratio=2),
    _picture("dinov2_swiglu", "Dinov2", use_swiglu_ffn=True),
    _picture("dinov3_vit", "DINOv3ViT", model="Model"),
    _picture("dinov3_vit_gated", "DINOv3ViT", model="Model", use_gated_mlp=True),
    _picture("ijepa", "IJepa"),
    _picture("vit_msn", "ViTMSN"),
    _picture("siglip_vision_model", "Siglip", "SiglipVisionConfig", model="VisionModel"),
    _picture("clip_vision_model", "CLIP", "CLIPVisionConfig", model="VisionModel"),
    _picture("swin", "Swin", embed_dim=16, depths=[2, 4], num_heads=[2, 4], window_size=2, patch_size=2),
    _picture(
        "swinv2", "Swinv2", embed_dim=16, depths=[4, 2], num_heads=[2, 4], window_size=2, patch_size=2,
        pretrained_window_sizes=[0, 0],
    ),
    _picture(
        "segformer", "Segformer", model="ForSemanticSegmentation", num_encoder_blocks=2, depths=[2, 3],
        hidden_sizes=[16, 24], num_attention_heads=[2, 4], sr_ratios=[2, 1], patch_sizes=[7, 3],
        strides=[4, 2], mlp_ratios=[2, 3], decoder_hidden_size=20,
    ),
    _picture("convnext", "ConvNext", patch_size=4, num_stages=2, hidden_sizes=[16, 24], depths=[2, 3]),
    _picture("convnextv2", "ConvNextV2", patch_size=4, num_stages=2, hidden_sizes=[16, 24], depths=[2, 3]),
    _picture("resnet", "ResNet", embedding_size=8, hidden_sizes=[16, 24], depths=[1, 3], layer_type="basic"),
    _picture("resnet_bottleneck", "ResNet", embedding_size=8, hidden_sizes=[16, 32], depths=[1, 3]),
    _picture("mobilenet_v2", "MobileNetV2", depth_multiplier=0.25),
    _picture(
        "pvt_v2", "PvtV2", hidden_sizes=[16, 24, 32, 40], depths=[1, 3, 1, 1], num_attention_heads=[1, 2,
        4, 4], strides=[2, 1, 2, 2], sr_ratios=[2, 2, 1, 1],
    ),
    _picture(
        "hiera", "Hiera", embed_dim=16, depths=[1, 3], num_heads=[2, 4], patch_size=[3, 3],
        patch_stride=[2, 2], patch_padding=[1, 1], num_query_pool=1, masked_unit_size=[4, 4],
        masked_unit_attention=[True, False], image_size=[16, 16],
    ),
    Species("clip", "CLIPModel", "CLIPConfig", {}, "text picture"),
    Species(
        "siglip", "SiglipModel", "SiglipConfig", {"text_config": {"projection_size": 32}},
        "text picture",
    ),
    _seen("llava", "Llava", "clip_vision_model", "llama", shown=4, image_seq_length=4),
    _seen(
        "paligemma", "PaliGemma", "siglip_vision_model", "gemma", shown=4, projection_dim=HIDDEN,
        vision={"projection_dim": HIDDEN, "vision_use_head": False},
    ),
    _seen(
        "gemma3", "Gemma3", "siglip_vision_model", "", shown=4, mm_tokens_per_image=4,
        text={"num_hidden_layers": 6}, vision={"vision_use_head": False},
    ),
    _seen(
        "internvl", "InternVL", "internvl_vision", "qwen2", shown=1, image_seq_length=1,
        vision={"image_size": [IMAGE, IMAGE], "patch_size": [PATCH, PATCH]},
    ),
    _seen("idefics3", "Idefics3", "", "llama", given="text pictures", shown=1),
    _seen("smolvlm", "SmolVLM", "", "llama", given="text pictures", shown=1),
    _seen("mistral3", "Mistral3", "pixtral", "mistral", given="text picture sizes", shown=1),
    _seen(
        "aria", "Aria", "idefics3_vision", "", shown=4, projector_patch_to_query_dict={4: 4},
        text={"intermediate_size": EXPERT_WIDTH},
    ),
    _seen(
        "llama4", "Llama4", "", "", given="text", text={"intermediate_size": EXPERT_WIDTH,
        "intermediate_size_mlp": WIDTH, "num_experts_per_tok": 1, "moe_layers": [1, 2]},
        vision={"intermediate_size": 128, "projector_input_dim": 24, "projector_output_dim": 24,
        "vision_output_dim": 24},
    ),
    _seen(
        "qwen2_vl", "Qwen2VL", "", "", given="text patches", shown=1, text=_TURNED,
        vision={"hidden_size": HIDDEN, "mlp_ratio": 2},
    ),
    _seen(
        "qwen2_5_vl", "Qwen2_5_VL", "", "", given="text patches", shown=1, text=_TURNED,
        vision={"out_hidden_size": HIDDEN, "window_size": 16, "fullatt_block_indexes": [1]},
    ),
    _seen(
        "qwen3_vl", "Qwen3VL", "", "", given="text patches", shown=1, text=_TURNED,
        vision=_QWEN3_VISION,
    ),
    _seen(
        "qwen3_vl_moe", "Qwen3VLMoe", "", "", given="text patches", shown=1, text=_TURNED,
        vision=_QWEN3_VISION,
    ),
    _seen(
        "qwen3_5", "Qwen3_5", "", "", given="text patches", shown=1, text=_LINEAR,
        vision=_QWEN3_VISION,
    ),
    _seen(
        "qwen3_5_moe", "Qwen3_5Moe", "", "", given="text patches", shown=1, text=_LINEAR,
        vision=_QWEN3_VISION,
    ),
    _seen(
        "glm4v", "Glm4v", "", "", given="text patches", shown=1, text=_TURNED,
        vision={"out_hidden_size": HIDDEN, "intermediate_size": 56},
    ),
    _seen(
        "qwen2_5_omni_thinker", "Qwen2_5OmniThinker", "", "", given="text patches", shown=1, text=_TURNED,
        vision={"out_hidden_size": HIDDEN, "window_size": 16, "fullatt_block_indexes": [1]}, **_HEARD,
    ),
    _seen(
        "qwen3_omni_moe_thinker", "Qwen3OmniMoeThinker", "", "", given="text patches", shown=1, text=_TURNED,
        vision=_QWEN3_VISION, **_HEARD,
    ),
    _seen(
        "mllama", "Mllama", "", "", given="text tiles", text={"num_hidden_layers": 6,
        "cross_attention_layers": [1, 4]}, vision={"num_global_layers": 2, "attention_heads": 4,
        "max_num_tiles": 2, "intermediate_layers_indices": [0, 2], "vision_output_dim": 96,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]},
    ),
    _seen("blip", "Blip", "", "", given="text picture", text={"encoder_hidden_size": 32}),
    Species("whisper", "WhisperForConditionalGeneration", "WhisperConfig", {}, "bins answer"),
    Species("wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config", _CONVOLVED, "samples"),
    Species("hubert", "HubertForCTC", "HubertConfig", _CONVOLVED, "samples"),
    Species("wavlm", "WavLMForCTC", "WavLMConfig", _CONVOLVED, "samples"),
    Species(
        "wav2vec2_bert", "Wav2Vec2BertForCTC", "Wav2Vec2BertConfig",
        {"feature_projection_input_dim": BINS}, "frames",
    ),
    Species(
        "wav2vec2_conformer", "Wav2Vec2ConformerForCTC", "Wav2Vec2ConformerConfig", _CONVOLVED, "samples",
    ),
    Species(
        "moonshine", "MoonshineForConditionalGeneration", "MoonshineConfig",
        {"encoder_num_hidden_layers": 3, "decoder_num_hidden_layers": 4, "encoder_num_attention_heads": 4,
        "decoder_num_attention_heads": 4}, "samples answer",
    ),
    Species(
        "speech_to_text", "Speech2TextForConditionalGeneration", "Speech2TextConfig", {"conv_channels": 20,
        "input_feat_per_channel": BINS}, "frames answer",
    ),
    Species(
        "parakeet_ctc", "ParakeetForCTC", "ParakeetCTCConfig",
        {"encoder_config": {
            "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 72,
            "num_mel_bins": BINS, "subsampling_conv_channels": 12, "max_position_embeddings": 50,
        }},
        "frames",
    ),
)
# fmt: on
SPECIES: Mapping[str, Species] = {species.name: species for species in ZOO}


def main(folder: str, *names: str) -> None:
    """Save all, or those that are named, with an index of their tensors; one that fails is told."""
    index = {}
    for name in names or SPECIES:
        try:
            species = SPECIES[name]
            path = save(species, Path(folder))
        except (TypeError, ValueError, AttributeError, RuntimeError, KeyError) as error:
            sys.stderr.write(f"{name}: {error}\n")
            continue
        kind = json.loads((path / "config.json").read_text())["model_type"]
        shapes = {name: list(tensor.shape) for name, tensor in read(path).items()}
        index[name] = {"model_type": kind, "class": species.model, "tensors": shapes}
    (Path(folder) / "INDEX.json").write_text(json.dumps(index, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
