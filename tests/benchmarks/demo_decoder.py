"""Trains the decoder of `sparseprune demo` on the first of its two texts, and writes what the package ships.

`python -m tests.benchmarks.demo_decoder [FOLDER]`: seven minutes of one core; shipped from CPython 3.11.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from sparseprune.cli.demo import SHIPPED, texts_of_help
from tests.benchmarks import decoders

WORDS = 512
CARD = """---
language: en
library_name: transformers
pipeline_tag: text-generation
---

# A small decoder to prune

A Llama of 558,208 parameters over 512 byte-level words, trained for a thousand steps on two thirds of
Python's help (`pydoc_data.topics`). It is there to try `sparseprune` on; it only knows how such text looks.
"""


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else SHIPPED
    texts = texts_of_help()
    if texts is None:
        sys.exit("this Python has no pydoc_data to train on")
    torch.set_num_threads(1)
    decoders.quiet()
    tokenizer, model = words_of(texts[0]), untrained()
    decoders.train(model, torch.tensor(tokenizer(texts[0])["input_ids"]))
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="700KB")
    (folder / "generation_config.json").unlink()
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    for path in folder.iterdir():
        path.chmod(0o644)
    with tempfile.TemporaryDirectory() as temporary:
        for name, text in zip(("trained on", "held out"), texts, strict=True):
            path = Path(temporary) / "text.txt"
            path.write_text(text)
            print(f"perplexity of the text {name}: {decoders.perplexity(folder, path):.2f}")


def words_of(text: str) -> Any:
    """A tokenizer of bytes and of what is frequent in a text, as GPT-2's is."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from tokenizers import decoders as backwards
    from transformers import PreTrainedTokenizerFast

    made: Any = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = backwards.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=WORDS, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([text], trainer)
    kind: Any = PreTrainedTokenizerFast
    return kind(tokenizer_object=made, model_max_length=decoders.LENGTH)


def untrained() -> Any:
    """Small, with all that the shipped specs look for: several layers, key/value heads, multiples of 16."""
    import transformers

    own: Any = transformers
    torch.manual_seed(0)
    config = own.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=decoders.LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return own.LlamaForCausalLM(config)


if __name__ == "__main__":
    main()
