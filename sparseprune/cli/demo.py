"""`demo`: a small checkpoint that it makes itself, pruned twice and shown."""

import json
import shlex
from contextlib import chdir
from pathlib import Path
from typing import Annotated

from sparseprune import api
from sparseprune.api.options import Option
from sparseprune.cli.apply import show_pruned
from sparseprune.cli.command import Call, command
from sparseprune.cli.inspect import show_inspected
from sparseprune.cli.signals import temporary_folder
from sparseprune.errors import CheckpointError

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KEY_VALUE_HEADS, VOCABULARY = 64, 192, 2, 4, 2, 256


def write_decoder(folder: Path) -> int:
    """Write config.json and two bf16 shards with their index; gives the number of parameters."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else torch.randn(shape, generator=generator).mul_(0.02).to(torch.bfloat16)
        for name, shape in _shapes().items()
    }
    names = list(tensors)
    shards = (names[: len(names) // 2], names[len(names) // 2 :])
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensors[name] for name in shard}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(_config(), indent=2) + "\n")
    return sum(tensor.numel() for tensor in tensors.values())


def _shapes() -> dict[str, tuple[int, ...]]:
    key_value = HIDDEN // HEADS * KEY_VALUE_HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": (key_value, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": (key_value, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            f"{prefix}.input_layernorm.weight": (HIDDEN,),
            f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
        }
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def _config() -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "vocab_size": VOCABULARY,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


_DENSE = Path("decoder")
_STEPS = (
    ("Keep 2 of every 4 neighbours in every projection:", "2of4", "half"),
    ("Prune a quarter of the MLP channels, fused over three matrices:", "mlp-channels", "channels"),
)


Folder = Annotated[
    Path | None,
    Option("[FOLDER]", help="A new folder for all files.", shown="a temporary folder", typed=Path),
]


def _demo_options() -> None:
    """Make a small decoder checkpoint, prune it twice, and show what came out.

    Example: sparseprune demo ./demo
    """


def show_demo(call: "Call[None]", folder: Folder = None) -> None:  # noqa: ARG001
    """Make, prune, inspect; in a new folder that is kept, or in one that is gone afterwards."""
    if folder is None:
        with temporary_folder("sparseprune-demo-") as temporary:
            _demo(Path(temporary))
        print("\nAll of it was in a temporary folder; `sparseprune demo FOLDER` keeps it.")
        return
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already; name a folder that is not there yet")
    folder.mkdir(parents=True)
    _demo(folder)
    print(f"\nAll of it is in {folder}.")


demo = command(_demo_options, show_demo, "demo", works=False)


def _demo(folder: Path) -> None:
    with chdir(folder):
        parameters = write_decoder(_DENSE)
        print(f"A decoder of {parameters:,} random parameters, in two shards: {_DENSE}")
        for title, spec, name in _STEPS:
            output = Path(f"{_DENSE}-{name}")
            print(f"\n{title}\n")
            _show("apply", _DENSE, spec, "-o", output)
            show_pruned(
                Call(api.apply, {"checkpoint": _DENSE, "spec": spec, "output": output, "device": "cpu"})
            )
            print()
            _show("inspect", output)
            show_inspected(Call(api.inspect, {"checkpoint": output}, quiet=True))


def _show(*words: object) -> None:
    print(f"$ sparseprune {shlex.join(map(str, words))}", flush=True)
