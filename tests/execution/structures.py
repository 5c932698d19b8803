"""Specs and small tensors of every kind of structure, for tests that hold all ways of working equal."""

from __future__ import annotations

from collections.abc import Callable

import torch

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)

ONE = """
version = 1
[scope.all]
tensors = "{{name}}.weight"
block = {block}
shape = {shape}
{budget}
"""
COUPLED = """
version = 1
[block.up]
tensors = "{{layer}}.up"
shape = {up}
[block.down]
tensors = "{{layer}}.down"
shape = {down}
[block.bias]
tensors = "{{layer}}.bias"
shape = [1]
[block_coupling.channel]
blocks = ["up", "down", "bias"]
orders = [[0, 1], [1, 0], [0, 1]]
[scope.channels]
block = "channel"
shape = {shape}
{budget}
"""
ACROSS = """
version = 1
[scope.each]
tensors = "{{name}}.weight"
block = {block}
shape = [-1, -1]
[scope_coupling.all]
scopes = ["each"]
across = "all"
{budget}
"""
GLOBAL_CHANNELS = (
    COUPLED.replace("{shape}\n{{budget}}", "").replace("{budget}", "")
    + """
[scope_coupling.all]
scopes = ["channels"]
across = ["layer"]
{budget}
"""
)
VIEWED = """
version = 1
[scope.all]
tensors = "{{name}}.weight"
view = "{view}"
{axes}
block = {block}
shape = {shape}
{budget}
"""
SLICED = """
version = 1
[block.gate]
tensors = "a.weight"
slice = [{first}]
shape = {block}
[block.up]
tensors = "a.weight"
slice = [{second}]
shape = {block}
[block_coupling.pair]
blocks = ["gate", "up"]
[scope.all]
block = "pair"
shape = {shape}
{budget}
"""
APART = """
version = 1
scope.left = { tensors = "{{name}}.weight", slice = [":", "0:5"], block = [1, 1], shape = [1, -1], nnz = 3 }
[scope.right]
tensors = "{{name}}.weight"
slice = [":", "6:12"]
block = [1, -1]
shape = [4, 1]
nnz = 1
"""
EXPERTS = """
version = 1
[scope.all]
tensors = "{{name}}.experts"
block = {block}
shape = {shape}
{budget}
"""


def one(block: str, shape: str, budget: str) -> str:
    return ONE.format(block=block, shape=shape, budget=budget).replace("{{", "{").replace("}}", "}")


def _filled(template: str, **words: str) -> str:
    words["axes"] = (
        "axes = { h = 4, p = 2 }"
        if " p" in words.get("view", "")
        else "axes = { h = 4 }"
        if "h" in words.get("view", "")
        else ""
    )
    return template.format(**words).replace("{{", "{").replace("}}", "}")


SPECS = {
    "2:4": one("[1, 1]", "[1, 4]", "nnz = 2"),
    "1:2": one("[1, 1]", "[1, 2]", "nnz = 1"),
    "4:8": one("[1, 1]", "[1, 8]", "nnz = 4"),
    "3:4 in rows of scopes": one("[1, 1]", "[2, 4]", "nnz = 3"),
    "2:4 down the columns": one("[1, 1]", "[4, 1]", "nnz = 2"),
    "whole rows": one("[1, 1]", "[1, -1]", "nnz = 7"),
    "whole columns": one("[1, 1]", "[-1, 1]", "nnz = 5"),
    "whole tensors": one("[1, 1]", "[-1, -1]", "sparsity = 0.37"),
    "nothing is kept": one("[1, 1]", "[-1, -1]", "nnz = 0"),
    "all is kept": one("[1, 1]", "[1, 4]", "nnz = 4"),
    "a threshold": one("[1, 1]", "[1, 4]", "threshold = 0.7"),
    "a threshold on blocks": one("[1, 4]", "[-1, -1]", "threshold = 1.5"),
    "blocks along rows": one("[1, 4]", "[1, 2]", "nnz = 1"),
    "blocks along rows, all compete": one("[1, 8]", "[-1, -1]", "nnz = 10"),
    "rows as blocks": one("[1, -1]", "[8, 1]", "nnz = 3"),
    "rows as blocks of a tensor": one("[1, -1]", "[-1, 1]", "sparsity = 0.4"),
    "columns as blocks": one("[-1, 1]", "[1, -1]", "nnz = 9"),
    "columns as blocks in groups": one("[-1, 1]", "[1, 4]", "nnz = 1"),
    "blocks of 4x8": one("[4, 8]", "[-1, -1]", "nnz = 5"),
    "blocks of 8x4 in rows": one("[8, 4]", "[1, -1]", "nnz = 3"),
    "a tensor as a block": one("[-1, -1]", "[1, 1]", "threshold = 1e9"),
    "over all tensors": _filled(ACROSS, block="[1, 1]", budget="sparsity = 0.61"),
    "rows over all tensors": _filled(ACROSS, block="[1, -1]", budget="nnz = 11"),
    "blocks over all tensors": _filled(ACROSS, block="[4, 4]", budget="sparsity = 0.5"),
    "a threshold over all": _filled(ACROSS, block="[1, 1]", budget="threshold = 0.5"),
    "other norm": one("[1, 4]", "[1, 2]", 'nnz = 1\nscore = { kind = "magnitude", norm = 1 }'),
    "maximum norm": one("[4, 8]", "[-1, -1]", 'nnz = 4\nscore = { kind = "magnitude", norm = "inf" }'),
    "root mean square": one(
        "[1, 8]", "[1, -1]", 'nnz = 1\nscore = { kind = "magnitude", normalize = "rms" }'
    ),
    "random": one("[1, 1]", "[1, 8]", 'nnz = 3\nscore = { kind = "random", seed = 5 }'),
    "random blocks": one("[4, 4]", "[-1, -1]", 'nnz = 7\nscore = { kind = "random", seed = 5 }'),
    "transposed": _filled(VIEWED, view="m k -> k m", block="[1, 1]", shape="[1, 4]", budget="nnz = 1"),
    "transposed, all compete": _filled(
        VIEWED, view="m k -> k m", block="[1, 1]", shape="[-1, -1]", budget="nnz = 100"
    ),
    "transposed columns": _filled(
        VIEWED, view="m k -> k m", block="[1, -1]", shape="[-1, 1]", budget="nnz = 6"
    ),
    "heads": _filled(
        VIEWED, view="(h d) k -> h d k", block="[1, -1, -1]", shape="[-1, 1, 1]", budget="nnz = 2"
    ),
    "heads behind": _filled(
        VIEWED, view="(d h) k -> k h d", block="[-1, 1, -1]", shape="[1, -1, 1]", budget="nnz = 2"
    ),
    "pairs of columns": _filled(
        VIEWED, view="m (k h p) -> m k p h", block="[1, 1, 1, -1]", shape="[1, -1, 1, 1]", budget="nnz = 2"
    ),
    "fused rows": _filled(
        SLICED, first='"0:12", ":"', second='"12:24", ":"', block="[1, -1]", shape="[-1, 1]", budget="nnz = 5"
    ),
    "fused rows, a part": _filled(
        SLICED, first='"0:8", ":"', second='"9:17", ":"', block="[1, -1]", shape="[-1, 1]", budget="nnz = 5"
    ),
    "fused columns": _filled(
        SLICED, first='":", "0:8"', second='":", "8:16"', block="[1, 1]", shape="[1, 4]", budget="nnz = 2"
    ),
    "fused columns, a part": _filled(
        SLICED, first='":", "1:8"', second='":", "9:16"', block="[-1, 1]", shape="[1, -1]", budget="nnz = 3"
    ),
    "rules apart": _filled(APART),
    "soft": one("[1, 4]", "[1, 2]", 'mode = "soft"\nthreshold = 0.8'),
    "soft by budget": one("[1, 4]", "[-1, -1]", 'mode = "soft"\nnnz = 20\nk_weight = 0.5\nscale = true'),
    "soft over all tensors": _filled(ACROSS, block="[4, 4]", budget='mode = "soft"\nnnz = 9'),
}
CHANNELS = {
    "channels": _filled(COUPLED, up="[1, -1]", down="[-1, 1]", shape="[-1, 1]", budget="nnz = 7"),
    "channels in groups": _filled(COUPLED, up="[1, -1]", down="[-1, 1]", shape="[4, 1]", budget="nnz = 1"),
    "channels, first norm": _filled(
        COUPLED,
        up="[1, -1]",
        down="[-1, 1]",
        shape="[-1, 1]",
        budget='nnz = 7\nscore = { kind = "magnitude", norm = 1 }',
    ),
    "channels, maximum": _filled(
        COUPLED,
        up="[1, -1]",
        down="[-1, 1]",
        shape="[-1, 1]",
        budget='nnz = 7\nscore = { kind = "magnitude", norm = "inf" }',
    ),
    "channels by threshold": _filled(
        COUPLED, up="[1, -1]", down="[-1, 1]", shape="[-1, 1]", budget="threshold = 5.5"
    ),
    "channels, random": _filled(
        COUPLED, up="[1, -1]", down="[-1, 1]", shape="[-1, 1]", budget='nnz = 7\nscore = { kind = "random" }'
    ),
    "channels, soft": _filled(
        COUPLED, up="[1, -1]", down="[-1, 1]", shape="[-1, 1]", budget='mode = "soft"\nnnz = 7'
    ),
}
LAYERS = {
    "experts": _filled(EXPERTS, block="[1, -1, -1]", shape="[-1, 1, 1]", budget="nnz = 2"),
    "channels of experts": _filled(EXPERTS, block="[1, 1, -1]", shape="[1, -1, 1]", budget="nnz = 3"),
    "rows over experts": _filled(EXPERTS, block="[-1, 1, 1]", shape="[1, -1, -1]", budget="nnz = 11"),
    "inputs of experts": _filled(EXPERTS, block="[-1, -1, 1]", shape="[1, 1, -1]", budget="nnz = 4"),
    "elements of an expert": _filled(EXPERTS, block="[1, 1, 1]", shape="[1, -1, -1]", budget="nnz = 20"),
}


def matrices(dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Three matrices with ties, zeros of either sign, subnormal and infinite numbers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in (("a", (24, 16)), ("b", (8, 32)), ("c", (16, 16))):
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
        if not dtype.is_floating_point:
            tensors[f"{name}.weight"] = (numbers * 3).to(dtype)
            continue
        rounded = torch.where(
            torch.rand(shape, generator=generator) < 0.5, (numbers * 2).round() / 2, numbers
        )
        rounded[0, 3] = -0.0
        rounded[1, 1] = torch.finfo(dtype).smallest_normal / 4
        if name == "c":
            rounded[2, 5] = torch.finfo(dtype).max
        tensors[f"{name}.weight"] = rounded.to(dtype)
    return tensors


def mlp(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Two layers of channels over a matrix, a transposed one and a bias."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(2):
        for name, shape in (("up", (16, 24)), ("down", (12, 16)), ("bias", (16,))):
            numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
            tensors[f"{layer}.{name}"] = numbers.to(dtype)
        tensors[f"{layer}.up"][3] = tensors[f"{layer}.up"][9]  # a tie
        tensors[f"{layer}.down"][:, 3] = tensors[f"{layer}.down"][:, 9]
        tensors[f"{layer}.bias"][3] = tensors[f"{layer}.bias"][9]
    return tensors


def experts(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A stack of matrices."""
    generator = torch.Generator().manual_seed(2)
    return {"a.experts": torch.randn(4, 6, 10, generator=generator, dtype=torch.float64).to(dtype)}


CASES: dict[str, tuple[str, Callable[[torch.dtype], dict[str, torch.Tensor]]]] = {
    **{name: (spec, matrices) for name, spec in SPECS.items()},
    **{name: (spec, mlp) for name, spec in CHANNELS.items()},
    **{name: (spec, experts) for name, spec in LAYERS.items()},
}
