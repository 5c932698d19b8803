"""Small decoders for benchmarks: a Llama of characters, trained here, and a random mixture of experts."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from sparseprune.engine.reconstruction.matrices import output_energy

if TYPE_CHECKING:
    from pathlib import Path

LENGTH = 128
_SECONDS = 60.0  # of training
_BATCH = 32

# What is pruned, and the ends of the names of the matrices that read what went.
STRUCTURES: dict[str, tuple[str, str]] = {
    "a quarter of the key/value heads": (
        """
[vars]
kv = "config.num_key_value_heads"
[block.rows]
tensors = "model.layers.{layer}.self_attn.{name:q|k|v}_proj.weight"
view = "(kv d) k -> kv d k"
axes = { kv = "kv" }
shape = [1, -1, -1]
[block.columns]
tensors = "model.layers.{layer}.self_attn.o_proj.weight"
view = "m (kv d) -> kv m d"
axes = { kv = "kv" }
shape = [1, -1, -1]
[block_coupling.head]
blocks = ["rows", "columns"]
across = ["name"]
[scope.attention]
block = "head"
shape = []
sparsity = 0.25
""",
        "o_proj.weight",
    ),
    "a quarter of the channels of every expert": (
        """
[block.rows]
tensors = "model.layers.{layer}.block_sparse_moe.experts.{expert}.{name:w1|w3}.weight"
shape = [1, -1]
[block.column]
tensors = "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"
shape = [-1, 1]
[block_coupling.channel]
blocks = ["rows", "column"]
orders = [[0, 1], [1, 0]]
across = ["name"]
[scope.expert]
block = "channel"
shape = []
sparsity = 0.25
""",
        "w2.weight",
    ),
    "a quarter of the experts": (
        """
[block.matrix]
tensors = "model.layers.{layer}.block_sparse_moe.experts.{expert}.{name:w1|w2|w3}.weight"
shape = [-1, -1]
[block_coupling.whole]
blocks = ["matrix"]
across = ["name"]
[scope.expert]
block = "whole"
shape = []
[scope_coupling.experts]
scopes = ["expert"]
across = ["expert"]
sparsity = 0.25
""",
        "w2.weight",
    ),
}


def quiet() -> None:
    """No hints and no bars of transformers."""
    from transformers import utils

    logging: Any = utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def trained(folder: Path, text: Path) -> Path:
    """A Llama of characters, trained for a minute; made once."""
    if (folder / "model.safetensors").is_file():
        return folder
    import transformers

    own: Any = transformers
    torch.manual_seed(0)
    tokenizer = characters(text)
    model = own.LlamaForCausalLM(
        own.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
        )
    )
    train(model, torch.tensor(tokenizer(text.read_text())["input_ids"]), _SECONDS)
    return saved(model, tokenizer, folder)


def train(model: Any, ids: torch.Tensor, seconds: float) -> None:
    """Next characters, by AdamW with a warm-up and a linear end, for so long."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    began = time.perf_counter()
    step = 0
    while (passed := (time.perf_counter() - began) / seconds) < 1:
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(step / 20, 1 - 0.95 * passed)
        starts = torch.randint(len(ids) - LENGTH, (_BATCH,), generator=generator)
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"\ntrained {step} steps, loss {float(loss.detach()):.3f}")


def perplexity(folder: Path, text: Path) -> float:
    """Of a character of some text, in sequences."""
    import transformers

    own: Any = transformers
    tokenizer = own.AutoTokenizer.from_pretrained(folder)
    model = own.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor(tokenizer(text.read_text()[: 400 * LENGTH])["input_ids"])
    rows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    with torch.no_grad():
        losses = [float(model(input_ids=part, labels=part).loss) for part in torch.split(rows, 50)]
    return math.exp(sum(losses) / len(losses))


def random_mixture(folder: Path, text: Path) -> Path:
    """A Mixtral of characters with random weights; made once."""
    if (folder / "model.safetensors").is_file():
        return folder
    import transformers

    own: Any = transformers
    torch.manual_seed(1)
    tokenizer = characters(text)
    model = own.MixtralForCausalLM(
        own.MixtralConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=16,
            num_key_value_heads=8,
            num_local_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=LENGTH,
        )
    )
    return saved(model, tokenizer, folder)


def joint_error(dense: Path, pruned: Path, moments: dict[str, torch.Tensor], reads: str) -> float:
    """The relative output error of what reads what went, taken together in each layer; their mean."""
    before, after = load_file(dense / "model.safetensors"), load_file(pruned / "model.safetensors")
    lost: dict[str, float] = {}
    whole: dict[str, float] = {}
    for name, moment in moments.items():
        if name.endswith(reads):
            layer = name.split(".")[2]
            lost[layer] = lost.get(layer, 0) + output_energy(after[name] - before[name], moment)
            whole[layer] = whole.get(layer, 0) + output_energy(before[name], moment)
    return sum(math.sqrt(lost[layer] / whole[layer]) for layer in lost) / len(lost)


def characters(text: Path) -> Any:
    """A tokenizer whose words are the characters of a text."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[UNK]": 0} | {one: place for place, one in enumerate(sorted(set(text.read_text())), 1)}
    made: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    kind: Any = PreTrainedTokenizerFast
    return kind(tokenizer_object=made, unk_token="[UNK]")


def saved(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
