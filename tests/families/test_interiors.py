"""Interiors of real model classes: any order of their units leaves what a model computes as it is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseprune.checkpoint import open_checkpoint, read_config
from sparseprune.execution.permuting import orders_of
from sparseprune.execution.plan import tensor_infos
from sparseprune.spec.structures import Index, Interior, find_interiors
from tests.families.harness import settle
from tests.families.zoo import SPECIES, output

MOVED = {
    "llama": {"mlp", "heads"},
    "mixtral": {"mlp", "heads"},
    "bert": {"mlp", "heads"},
    "gpt2": {"mlp", "heads"},
    "t5_gated": {"mlp", "heads"},
    "gpt_oss": {"mlp", "heads"},
    "gemma4_shared": {"mlp", "heads"},
    "gpt_neox": {"mlp"},
    "deepseek_v3": {"mlp"},
    "qwen3_next": {"mlp"},
}
"""What moves in a type; where a kind is missing its order is known elsewhere."""
Orders = dict[str, dict[int, np.ndarray[Any, np.dtype[np.int32]]]]
CLOSE = 2e-4  # sums in another order; where a class normalizes values, in float32


def random_orders(one: Interior, chance: np.random.Generator) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.stack([chance.permutation(one.size).astype(np.int32) for _ in range(one.sets)])


@pytest.mark.parametrize("name", MOVED)
def test_a_model_in_another_order_computes_the_same(name: str, tmp_path: Path) -> None:
    species = SPECIES[name]
    zoo = settle(species, tmp_path)
    checkpoint, chance = open_checkpoint(zoo.folder), np.random.default_rng(0)
    index = Index.of(tensor_infos(checkpoint), read_config(checkpoint))
    movable = [one for one in find_interiors(index) if not one.problem]
    assert {one.kind for one in movable} == MOVED[name]
    orders: Orders = {}
    for kind in sorted(MOVED[name]):
        orders = {}
        for one in movable:
            if one.kind == kind:
                orders |= orders_of(one, random_orders(one, chance), checkpoint.tensors)
        permute(zoo.folder, orders)
        found = output(species, zoo.load(zoo.folder))
        assert float((found - zoo.dense).abs().max() / zoo.dense.abs().max()) < CLOSE, kind
    first = next(iter(orders))
    permute(zoo.folder, {first: {dim: order[:, ::-1] for dim, order in orders[first].items()}})
    broken = output(species, zoo.load(zoo.folder))
    assert float((broken - zoo.dense).abs().max() / zoo.dense.abs().max()) > 10 * CLOSE


def permute(folder: Path, orders: Orders) -> None:
    """Write the tensors of a checkpoint in other orders."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors.keys() & orders.keys():
            ((dim, order),) = orders[name].items()
            own = torch.from_numpy(np.ascontiguousarray(order)).long()
            shape = [1] * tensors[name].ndim
            shape[dim] = -1
            if len(own) > 1:
                shape[0] = len(own)
            places = own.reshape(shape).expand(tensors[name].shape)
            tensors[name] = tensors[name].gather(dim, places).contiguous()
        save_file(tensors, file, {"format": "pt"})
