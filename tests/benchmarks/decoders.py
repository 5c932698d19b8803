"""Small decoders for benchmarks: a Llama of characters, trained here, and random mixtures of experts."""

import math
from pathlib import Path
from typing import Any

import torch

LENGTH = 128
STEPS = 1000  # of training: a minute
_BATCH = 16
_RATE = 5e-3

_HEADS = """
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
"""
# What a quarter is pruned of, and how the names of the matrices end that read what went.
STRUCTURES: dict[str, dict[str, tuple[str, str]]] = {
    "Mixtral": {
        "the key/value heads": (_HEADS, "o_proj.weight"),
        "the channels of every expert": (
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
        "the experts": (
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
    },
    "gpt-oss": {
        "the channels of every expert": (
            """
[block.rows]
tensors = "model.layers.{layer}.mlp.experts.gate_up_proj"
view = "e k (i two) -> e i k two"
axes = { two = 2 }
shape = [1, 1, -1, -1]
[block.bias]
tensors = "model.layers.{layer}.mlp.experts.gate_up_proj_bias"
view = "e (i two) -> e i two"
axes = { two = 2 }
shape = [1, 1, -1]
[block.reads]
tensors = "model.layers.{layer}.mlp.experts.down_proj"
shape = [1, 1, -1]
[block_coupling.channel]
blocks = ["rows", "bias", "reads"]
[scope.expert]
block = "channel"
shape = [1, -1]
sparsity = 0.25
""",
            "down_proj",
        ),
        "the experts": (
            """
[block.rows]
tensors = "model.layers.{layer}.mlp.experts.gate_up_proj"
shape = [1, -1, -1]
[block.reads]
tensors = "model.layers.{layer}.mlp.experts.down_proj"
shape = [1, -1, -1]
[block_coupling.whole]
blocks = ["rows", "reads"]
[scope.experts]
block = "whole"
shape = []
sparsity = 0.25
""",
            "down_proj",
        ),
    },
}


def quiet() -> None:
    """No hints and no bars of transformers."""
    from transformers import utils

    logging: Any = utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def trained(folder: Path, text: Path, *, hidden: int = 96, layers: int = 3, steps: int = STEPS) -> Path:
    """A Llama of characters, trained for a minute or so by default; made once."""
    if (folder / "model.safetensors").is_file():
        return folder
    import transformers

    own: Any = transformers
    torch.manual_seed(0)
    tokenizer = characters(text)
    model = own.LlamaForCausalLM(
        own.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 24 * 8,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=1,
            max_position_embeddings=LENGTH,
        )
    )
    train(model, torch.tensor(tokenizer(text.read_text())["input_ids"]), steps)
    return saved(model, tokenizer, folder)


def train(model: Any, ids: torch.Tensor, steps: int = STEPS) -> None:
    """Next characters, by AdamW with a warm-up and a linear end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * min((step + 1) / 30, 1 - 0.95 * step / steps)
        starts = torch.randint(len(ids) - LENGTH, (_BATCH,), generator=generator)
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


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


def mixture(folder: Path, model: str, text: Path, steps: int = 0) -> Path:
    """A mixture of experts over characters, with random weights or trained for some steps; made once."""
    if (folder / "model.safetensors").is_file():
        return folder
    import transformers

    own: Any = transformers
    torch.manual_seed(1)
    tokenizer = characters(text)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": LENGTH,
        "head_dim": 8,
    }
    if model == "Mixtral":
        made = own.MixtralForCausalLM(own.MixtralConfig(**sizes))
    else:
        made = own.GptOssForCausalLM(own.GptOssConfig(**sizes))
    if steps:
        train(made, torch.tensor(tokenizer(text.read_text())["input_ids"]), steps)
    return saved(made, tokenizer, folder)


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
