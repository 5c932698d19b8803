"""Statistics files with gradients, as calibrate writes them, drawn at random."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from sparseprune.checkpoint.statistics import STATISTICS_KEY
from tests.engine.reconstruction.oracle import moments

Tensors = dict[str, torch.Tensor]


def drawn(
    tensors: Mapping[str, torch.Tensor], seed: int = 0, *, groups: int = 1, turned: bool = False
) -> tuple[Tensors, Tensors]:
    """Moments of inputs and of gradients for every matrix and every stack of them.

    Gradients are in so many groups of rows. `turned`: the inputs come first.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs, gradients = {}, {}
    for name, tensor in tensors.items():
        if tensor.ndim not in {2, 3} or "bias" in name:
            continue
        stack = tensor.shape[:-2]
        outputs, features = reversed(tensor.shape[-2:]) if turned else tensor.shape[-2:]
        count = len(tensor) if stack else 0
        inputs[name] = moments(features, 50, generator, count).contiguous()
        blocks = moments(outputs // groups, 40, generator, (count or 1) * groups)
        inner = (outputs // groups, outputs // groups)
        gradients[name] = blocks.reshape(*stack, *((groups,) if groups > 1 else ()), *inner).contiguous()
    return inputs, gradients


def save(path: Path, inputs: Tensors, gradients: Tensors, input_dim: int | None = None) -> None:
    """A file of these, with `input_dim` or the last dimension of each weight."""

    def dim(name: str) -> int:
        return inputs[name].ndim - 1 if input_dim is None else input_dim

    document = {
        "kind": "hessian",
        "weights": {name: {name: dim(name)} for name in inputs},
        "gradients": {
            f"{name}.gradients": {name: 2 * inputs[name].ndim - 3 - dim(name)} for name in gradients
        },
    }
    beside = {f"{name}.gradients": one for name, one in gradients.items()}
    save_file({**inputs, **beside}, path, metadata={STATISTICS_KEY: json.dumps(document)})
