"""The same jobs by public tools alone, as people write them: the rows that the pipeline is compared with.

Run by pipeline.py, or by hand: `python -m tests.benchmarks.peers loop|global-unstructured CKPT OUT`.
"""

import argparse
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune

PROJECTION = re.compile(r"model\.layers\.\d+\.(?:self_attn|mlp)\.[a-z]+_proj\.weight")


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    """The weight with the two smaller of every four neighbours zero."""
    groups = weight.reshape(-1, 4)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask.scatter_(1, torch.topk(groups.abs(), 2, dim=1).indices, value=True)
    return (groups * mask).view_as(weight)


def loop(source: Path, out: Path) -> None:
    """2:4 shard by shard: open it, take each tensor, save the shard; no masks."""
    for path in sorted(source.glob("*.safetensors")):
        tensors = {}
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118  (no mapping: it has keys() only)
                tensor = shard.get_tensor(name)
                tensors[name] = two_of_four(tensor) if PROJECTION.fullmatch(name) else tensor
            metadata = shard.metadata()
        save_file(tensors, out / path.name, metadata=metadata)


def global_unstructured(source: Path, out: Path) -> None:
    """Half of all weights of all projections: the whole checkpoint loaded, torch's own global pruning."""
    files = {path.name: load_file(path) for path in sorted(source.glob("*.safetensors"))}
    holders = {}
    for tensors in files.values():
        for name in filter(PROJECTION.fullmatch, tensors):
            holders[name] = torch.nn.Module()
            holders[name].register_parameter("weight", torch.nn.Parameter(tensors[name], requires_grad=False))
    chosen = [(holder, "weight") for holder in holders.values()]
    prune.global_unstructured(chosen, pruning_method=prune.L1Unstructured, amount=0.5)
    for holder in holders.values():
        prune.remove(holder, "weight")  # type: ignore[no-untyped-call]
    for file, tensors in files.items():
        for name in filter(PROJECTION.fullmatch, tensors):
            tensors[name] = holders[name].get_parameter("weight").data
        save_file(tensors, out / file, metadata={"format": "pt"})


WAYS: dict[str, Callable[[Path, Path], None]] = {"loop": loop, "global-unstructured": global_unstructured}


def main() -> None:
    """Prune in one way; files that hold no tensors are copied."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    asked = parser.parse_args()
    asked.out.mkdir()
    for path in asked.source.glob("*.json"):
        shutil.copy(path, asked.out)
    WAYS[asked.way](asked.source, asked.out)


if __name__ == "__main__":
    main()
