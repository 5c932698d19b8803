"""Small random models with a tokenizer of as many words as they know, as checkpoints for calibrate."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch

from tests.families.models import build

if TYPE_CHECKING:
    from pathlib import Path

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
        tokenizer_object=made,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        model_max_length=64,
    )


def save(model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A model with random weights, norms near 1, and the tokenizer, in a folder."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                norm = tensor.ndim == 1 and name.endswith("weight")
                tensor.copy_(1 + 0.2 * noise if norm else 0.3 * noise)
    model.to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_family(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """One of the families, as `save`."""
    return save(build(family), folder, dtype)


def text(words: int = 400, seed: int = 3) -> str:
    """Random words."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))
