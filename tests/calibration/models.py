"""Small random models with a tokenizer of as many words as they know, as checkpoints for calibrate."""

import random
from pathlib import Path
from typing import Any

import torch

from tests.families.models import build

WORDS = [f"w{number}" for number in range(50)]
BEGIN, END = 1, 2  # the ids of the special tokens around a sequence


def tokenizer() -> Any:
    """Words by spaces; every sequence stands between two special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[UNK]": 0, "[CLS]": BEGIN, "[SEP]": END, "[PAD]": 3}
    vocabulary |= {word: number for number, word in enumerate(WORDS, len(vocabulary))}
    made: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", BEGIN), ("[SEP]", END)]
    )
    kind: Any = PreTrainedTokenizerFast
    return kind(
        tokenizer_object=made, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
        model_max_length=64,
    )  # fmt: skip


def save(model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A model with random weights, norms near 1, and the tokenizer, in a folder."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                norm = tensor.ndim == 1 and name.endswith("weight")
                tensor.copy_(1 + 0.2 * noise if norm else 0.3 * noise)
    if dtype != torch.float32:  # buffers may be complex
        model.to(dtype)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_family(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """One of the families, as `save`."""
    return save(build(family), folder, dtype)


def made(folder: Path, *families: str) -> Path:
    """A folder with a text and a model of each family."""
    (folder / "words.txt").write_text(text())
    for family in families:
        save_family(family, folder / family)
    return folder


def text(words: int = 400, seed: int = 3) -> str:
    """Random words."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def deberta(*, share_att_key: bool) -> Any:
    """Its queries and keys meet the embeddings of relative positions too, its values do not."""
    import transformers

    kind: Any = transformers.DebertaV2Config
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    relative = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
    return transformers.DebertaV2Model(
        kind(
            **small, num_attention_heads=4, share_att_key=share_att_key, norm_rel_ebd="layer_norm", **relative
        )
    )


def albert() -> Any:
    """Three layers that are one."""
    import transformers

    kind: Any = transformers.AlbertConfig
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    return transformers.AlbertModel(kind(**small, num_attention_heads=4, embedding_size=16))


def nomic_bert() -> Any:
    """Stored with queries, keys and values in one tensor, which the model has apart."""
    import transformers

    kind: Any = transformers.NomicBertConfig
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return transformers.NomicBertModel(kind(**small, num_attention_heads=4))


def dbrx() -> Any:
    """Its experts lie one below another in matrices."""
    import transformers

    kind: Any = transformers.DbrxConfig
    small = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}
    experts = {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}
    return transformers.DbrxForCausalLM(
        kind(**small, ffn_config=experts, attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4})
    )


def longformer() -> Any:
    """Its attention has the places of a text in front, the sequences behind them."""
    import transformers

    kind: Any = transformers.LongformerConfig
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return transformers.LongformerModel(
        kind(**small, num_attention_heads=4, attention_window=8, pad_token_id=3, max_position_embeddings=70)
    )


def llama4_with_pictures() -> Any:
    """A whole model of text inside one of text and images."""
    import transformers

    from tests.families.models import DECODER, EXPERTS

    tower = {
        "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
        "image_size": 16, "patch_size": 8, "projector_input_dim": 24, "projector_output_dim": 24,
        "vision_output_dim": 24,
    }  # fmt: skip
    words = {**DECODER, "head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": EXPERTS}
    words |= {"num_experts_per_tok": 1, "moe_layers": [1], "pad_token_id": 3}
    kind: Any = transformers.Llama4Config
    config = kind(text_config=words, vision_config=tower, image_token_index=60, boi_token_index=61)
    return transformers.Llama4ForConditionalGeneration(config)


def whisper() -> Any:
    """Takes sound."""
    import transformers

    kind: Any = transformers.WhisperConfig
    small = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    wide = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 3, "decoder_start_token_id": 1}
    return transformers.WhisperForConditionalGeneration(
        kind(**small, **heads, **wide, max_source_positions=20, max_target_positions=32)
    )


def t5() -> Any:
    """An encoder whose outputs the decoder meets, a head that is the embedding."""
    import transformers

    kind: Any = transformers.T5Config
    small = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(kind(**small, decoder_start_token_id=3))
