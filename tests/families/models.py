"""One small model of each family, built from its config class, so that names and shapes are real ones."""

from collections.abc import Callable
from typing import Any

import transformers

LAYERS, HIDDEN, HEADS, KV_HEADS, WIDTH, EXPERTS, EXPERT_WIDTH = 2, 32, 8, 4, 48, 4, 24
_LAYERED: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
_TEXT: dict[str, Any] = {"vocab_size": 64, "max_position_embeddings": 64}
DECODER: dict[str, Any] = {**_LAYERED, **_TEXT, "num_key_value_heads": KV_HEADS}
_WIDE_HEADS: dict[str, Any] = {**DECODER, "head_dim": 8}
_ENDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 1}
_GPT2: dict[str, Any] = {
    "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_inner": WIDTH, "vocab_size": 64,
    "n_positions": 64,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": EXPERT_WIDTH,
}
DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": HEADS, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2,
    "moe_intermediate_size": EXPERT_WIDTH, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip


def build(family: str) -> Any:
    """A model of a family in `FAMILIES`."""
    return FAMILIES[family]()


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))


def llama_without_head() -> Any:
    """Names begin with `layers`, as in checkpoints of embedding models."""
    return transformers.LlamaModel(transformers.LlamaConfig(**DECODER))


def qwen2() -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**DECODER))


def qwen3() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_WIDE_HEADS))


def mistral() -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**_WIDE_HEADS))


def gemma() -> Any:
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**_WIDE_HEADS))


def gemma2() -> Any:
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**_WIDE_HEADS))


def gemma3() -> Any:
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**_WIDE_HEADS))


def gemma3_with_pictures() -> Any:
    """A language model whose config is nested, beside a vision tower that has layers and projections too."""
    tower: dict[str, Any] = {**_LAYERED, "image_size": 32, "patch_size": 16}
    tokens: dict[str, Any] = {"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62}
    config = transformers.Gemma3Config(
        text_config=_WIDE_HEADS, vision_config=tower, mm_tokens_per_image=4, **tokens
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def phi3() -> Any:
    sizes = {**DECODER, **_ENDS, "pad_token_id": 0, "original_max_position_embeddings": 64}
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes))


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT2, **_ENDS))


def gpt2_without_head() -> Any:
    """Names begin with `h`, as in the published checkpoints."""
    return transformers.GPT2Model(transformers.GPT2Config(**_GPT2, **_ENDS))


def mixtral() -> Any:
    sizes = {**DECODER, "intermediate_size": EXPERT_WIDTH, "num_local_experts": EXPERTS}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))


def qwen2_moe() -> Any:
    sizes = {**DECODER, **_EXPERTS, "shared_expert_intermediate_size": EXPERT_WIDTH}
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**sizes))


def qwen3_moe() -> Any:
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**DECODER, **_EXPERTS))


def deepseek_v3() -> Any:
    """Its first layer has no experts, the others share one beside those that are routed to."""
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**{**DECODER, **DEEPSEEK}))


def gpt_oss() -> Any:
    sizes = {**_WIDE_HEADS, **_ENDS, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes))


def llama4() -> Any:
    """Its first layer has no experts, the second shares one beside those that are routed to."""
    sizes = {**_WIDE_HEADS, "intermediate_size_mlp": 64, "num_local_experts": EXPERTS}
    config = transformers.Llama4TextConfig(**sizes, num_experts_per_tok=1, moe_layers=[1])
    return transformers.Llama4ForCausalLM(config)


def bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(**_LAYERED, **_TEXT))


def bert_for_masked_lm() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**_LAYERED, **_TEXT))


def roberta() -> Any:
    return transformers.RobertaModel(transformers.RobertaConfig(**_LAYERED, **_TEXT))


def xlm_roberta() -> Any:
    return transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**_LAYERED, **_TEXT))


def vit() -> Any:
    return transformers.ViTModel(transformers.ViTConfig(**_LAYERED, image_size=32, patch_size=16))


def vit_for_classification() -> Any:
    config = transformers.ViTConfig(**_LAYERED, image_size=32, patch_size=16)
    return transformers.ViTForImageClassification(config)


def resnet(layer_type: str = "basic") -> Any:
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2]}
    return transformers.ResNetModel(transformers.ResNetConfig(**sizes, layer_type=layer_type))


def resnet_with_bottlenecks() -> Any:
    return resnet("bottleneck")


def mobilenet() -> Any:
    return transformers.MobileNetV2Model(transformers.MobileNetV2Config(image_size=32, depth_multiplier=0.25))


FAMILIES: dict[str, Callable[[], Any]] = {
    function.__name__: function
    for function in (
        *(llama, llama_without_head, qwen2, qwen3, mistral, gemma, gemma2, gemma3, gemma3_with_pictures),
        *(phi3, gpt2, gpt2_without_head),
        *(mixtral, qwen2_moe, qwen3_moe, deepseek_v3, gpt_oss, llama4),
        *(bert, bert_for_masked_lm, roberta, xlm_roberta, vit, vit_for_classification),
        *(resnet, resnet_with_bottlenecks, mobilenet),
    )
}
PICTURES = ("vit", "vit_for_classification", "resnet", "resnet_with_bottlenecks", "mobilenet")
