"""Specs and small tensors of every kind of structure, for tests that hold all ways of working equal."""

from collections.abc import Callable

import torch

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)

APART = """
version = 1
scope.left = { tensors = "{name}.weight", slice = [":", "0:5"], block = [1, 1], shape = [1, -1], nnz = 3 }
scope.right = { tensors = "{name}.weight", slice = [":", "6:12"], block = [1, -1], shape = [4, 1], nnz = 1 }
"""

TILED = "nnz = 2\ntransposable = true"


def one(block: str, shape: str, budget: str, tensors: str = "{name}.weight") -> str:
    return f"""
version = 1
[scope.all]
tensors = "{tensors}"
block = {block}
shape = {shape}
{budget}
"""


def experts_of(block: str, shape: str, budget: str) -> str:
    return one(block, shape, budget, "{name}.experts")


def viewed(view: str, block: str, shape: str, budget: str) -> str:
    axes = {" p": "axes = { h = 4, p = 2 }", "h": "axes = { h = 4 }"}
    more = next((text for name, text in axes.items() if name in view), "")
    return one(block, shape, f'{budget}\nview = "{view}"\n{more}')


def across(block: str, budget: str) -> str:
    """All tensors compete for one budget."""
    return f"""
version = 1
scope.each = {{ tensors = "{{name}}.weight", block = {block}, shape = [-1, -1] }}
[scope_coupling.all]
scopes = ["each"]
across = "all"
{budget}
"""


def fused(first: str, second: str, block: str, shape: str, budget: str) -> str:
    """Two slices of one tensor whose blocks are fused."""
    return f"""
version = 1
block.gate = {{ tensors = "a.weight", slice = [{first}], shape = {block} }}
block.up = {{ tensors = "a.weight", slice = [{second}], shape = {block} }}
block_coupling.pair = {{ blocks = ["gate", "up"] }}
[scope.all]
block = "pair"
shape = {shape}
{budget}
"""


def channels(shape: str, budget: str) -> str:
    return f"""
version = 1
block.up = {{ tensors = "{{layer}}.up", shape = [1, -1] }}
block.down = {{ tensors = "{{layer}}.down", shape = [-1, 1] }}
block.bias = {{ tensors = "{{layer}}.bias", shape = [1] }}
block_coupling.channel = {{ blocks = ["up", "down", "bias"], orders = [[0, 1], [1, 0], [0, 1]] }}
[scope.channels]
block = "channel"
shape = {shape}
{budget}
"""


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
    "over all tensors": across("[1, 1]", "sparsity = 0.61"),
    "rows over all tensors": across("[1, -1]", "nnz = 11"),
    "blocks over all tensors": across("[4, 4]", "sparsity = 0.5"),
    "a threshold over all": across("[1, 1]", "threshold = 0.5"),
    "other norm": one("[1, 4]", "[1, 2]", 'nnz = 1\nscore = { kind = "magnitude", norm = 1 }'),
    "maximum norm": one("[4, 8]", "[-1, -1]", 'nnz = 4\nscore = { kind = "magnitude", norm = "inf" }'),
    "root mean square": one(
        "[1, 8]", "[1, -1]", 'nnz = 1\nscore = { kind = "magnitude", normalize = "rms" }'
    ),
    "random": one("[1, 1]", "[1, 8]", 'nnz = 3\nscore = { kind = "random", seed = 5 }'),
    "random blocks": one("[4, 4]", "[-1, -1]", 'nnz = 7\nscore = { kind = "random", seed = 5 }'),
    "transposed": viewed("m k -> k m", "[1, 1]", "[1, 4]", "nnz = 1"),
    "transposed, all compete": viewed("m k -> k m", "[1, 1]", "[-1, -1]", "nnz = 100"),
    "transposed columns": viewed("m k -> k m", "[1, -1]", "[-1, 1]", "nnz = 6"),
    "heads": viewed("(h d) k -> h d k", "[1, -1, -1]", "[-1, 1, 1]", "nnz = 2"),
    "heads behind": viewed("(d h) k -> k h d", "[-1, 1, -1]", "[1, -1, 1]", "nnz = 2"),
    "pairs of columns": viewed("m (k h p) -> m k p h", "[1, 1, 1, -1]", "[1, -1, 1, 1]", "nnz = 2"),
    "fused rows": fused('"0:12", ":"', '"12:24", ":"', "[1, -1]", "[-1, 1]", "nnz = 5"),
    "fused rows, a part": fused('"0:8", ":"', '"9:17", ":"', "[1, -1]", "[-1, 1]", "nnz = 5"),
    "fused columns": fused('":", "0:8"', '":", "8:16"', "[1, 1]", "[1, 4]", "nnz = 2"),
    "fused columns, a part": fused('":", "1:8"', '":", "9:16"', "[-1, 1]", "[1, -1]", "nnz = 3"),
    "rules apart": APART,
    "transposable 2:4": one("[1, 1]", "[1, 4]", TILED),
    "transposable 1:4, turned": viewed("m k -> k m", "[1, 1]", "[1, 4]", TILED.replace("2", "1")),
    "transposable, a part": one("[1, 1]", "[1, 4]", f'slice = ["4:8", "4:12"]\n{TILED}'),
    "transposable, all survive": one("[1, 1]", "[1, 4]", TILED.replace("2", "4")),
    "soft": one("[1, 4]", "[1, 2]", 'mode = "soft"\nthreshold = 0.8'),
    "soft by budget": one("[1, 4]", "[-1, -1]", 'mode = "soft"\nnnz = 20\nk_weight = 0.5\nscale = true'),
    "soft rows": one("[1, -1]", "[4, 1]", 'mode = "soft"\nnnz = 2\nscale = true\nk_weight = 0.2'),
    "soft blocks of 4x8": one("[4, 8]", "[1, 1]", 'mode = "soft"\nthreshold = 2.5'),
    "soft blocks of 8x2": one("[8, 2]", "[-1, 2]", 'mode = "soft"\nnnz = 1'),
    "soft columns": one("[-1, 1]", "[1, -1]", 'mode = "soft"\nnnz = 9'),
    "soft transposed": viewed("m k -> k m", "[1, 4]", "[2, -1]", 'mode = "soft"\nnnz = 3'),
    "soft elements": one("[1, 1]", "[1, 4]", 'mode = "soft"\nthreshold = 0.8'),
    "soft 2:4": one("[1, 1]", "[1, 4]", 'mode = "soft"\nnnz = 2'),
    "soft columns of elements": one("[1, 1]", "[-1, 1]", 'mode = "soft"\nnnz = 3\nk_weight = 0'),
    "soft whole tensors": one("[1, 1]", "[-1, -1]", 'mode = "soft"\nsparsity = 0.5\nk_weight = 0.3'),
    "soft elements over all": across("[1, 1]", 'mode = "soft"\nsparsity = 0.6'),
    "soft, all survive": one("[1, 1]", "[1, 4]", 'mode = "soft"\nnnz = 4'),
    "soft, none survive": one("[1, 1]", "[1, 4]", 'mode = "soft"\nnnz = 0'),
    "soft over all tensors": across("[4, 4]", 'mode = "soft"\nnnz = 9'),
}
CHANNELS = {
    "channels": channels("[-1, 1]", "nnz = 7"),
    "channels in groups": channels("[4, 1]", "nnz = 1"),
    "channels, first norm": channels("[-1, 1]", 'nnz = 7\nscore = { kind = "magnitude", norm = 1 }'),
    "channels, maximum": channels("[-1, 1]", 'nnz = 7\nscore = { kind = "magnitude", norm = "inf" }'),
    "channels by threshold": channels("[-1, 1]", "threshold = 5.5"),
    "channels, random": channels("[-1, 1]", 'nnz = 7\nscore = { kind = "random" }'),
    "channels, soft": channels("[-1, 1]", 'mode = "soft"\nnnz = 7'),
}
LAYERS = {
    "experts": experts_of("[1, -1, -1]", "[-1, 1, 1]", "nnz = 2"),
    "channels of experts": experts_of("[1, 1, -1]", "[1, -1, 1]", "nnz = 3"),
    "rows over experts": experts_of("[-1, 1, 1]", "[1, -1, -1]", "nnz = 11"),
    "inputs of experts": experts_of("[-1, -1, 1]", "[1, 1, -1]", "nnz = 4"),
    "tiles of experts": experts_of("[1, 1, 1]", "[1, 1, 2]", TILED.replace("2", "1")),
    "elements of an expert": experts_of("[1, 1, 1]", "[1, -1, -1]", "nnz = 20"),
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
