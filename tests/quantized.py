"""Small checkpoints of codes in every layout, with the weights that the codes stand for."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu


@dataclass(frozen=True)
class Coded:
    """Tensors as they are stored; of those that hold codes the weights, and the code of zero everywhere."""

    stored: Tensors
    weights: Tensors = field(default_factory=dict)
    zeros: Tensors = field(default_factory=dict)
    config: dict[str, Any] | None = None


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stretched(entries: torch.Tensor, shape: torch.Size, block: tuple[int, ...]) -> torch.Tensor:
    """The entry of each element, float64, by plain loops: one for each block."""
    found = torch.empty(shape, dtype=torch.float64)
    for place in (
        torch.cartesian_prod(*(torch.arange(size) for size in shape)).reshape(-1, len(shape)).tolist()
    ):
        at = tuple(one // edge for one, edge in zip(place, block, strict=True))
        found[tuple(place)] = float(entries[at])
    return found


def coded(
    name: str,
    codes: torch.Tensor,
    scale: torch.Tensor,
    block: tuple[int, ...],
    zero: torch.Tensor | None = None,
    end: str = "_scale",
) -> Coded:
    """Codes with scales and zero points that have an entry for each block."""
    shape = codes.shape
    tensors = {name: codes, name + end: scale}
    zeros = torch.zeros(shape, dtype=torch.float64)
    if zero is not None:
        tensors[f"{name}_zero_point"] = zero
        zeros = stretched(zero.reshape([-(-a // b) for a, b in zip(shape, block, strict=True)]), shape, block)
    grid = scale.to(torch.float64).reshape([-(-a // b) for a, b in zip(shape, block, strict=True)])
    weights = (codes.to(torch.float64) - zeros) * stretched(grid, shape, block)
    return Coded(tensors, {name: weights}, {name: zeros.to(codes.dtype)})


def floats(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = E4M3) -> torch.Tensor:
    return (torch.randn(shape, generator=draw(seed)) * 30).to(dtype)


def integers(shape: tuple[int, ...], seed: int = 0, low: int = -128, high: int = 128) -> torch.Tensor:
    kind = torch.uint8 if low == 0 else torch.int8
    return torch.randint(low, high, shape, generator=draw(seed)).to(kind)


def scales(shape: tuple[int, ...], seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of very unlike sizes, so that codes alone rank otherwise."""
    return torch.exp2(torch.randint(-6, 7, shape, generator=draw(seed)) + torch.rand(shape)).to(dtype)


def _per_tensor(shape: tuple[int, ...]) -> Coded:
    return coded("a.weight", floats((8, 16)), scales(shape), (8, 16))


def _fp8_blocks() -> Coded:
    found = coded("a.weight", floats((10, 20)), scales((3, 3)), (4, 8), end="_scale_inv")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 8]}}
    return Coded(found.stored, found.weights, found.zeros, config)


def _exponents(stored_as: torch.dtype) -> Coded:
    exponents = torch.randint(115, 135, (4, 2), generator=draw()).to(torch.uint8)
    grid = torch.exp2(exponents.to(torch.float64) - 127)
    found = coded("a.weight", floats((4, 64)), grid, (1, 32))
    return Coded({**found.stored, "a.weight_scale": exponents.view(stored_as)}, found.weights, found.zeros)


def _negative() -> Coded:
    sign = torch.tensor([1.0, -1.0] * 4).reshape(8, 1)
    return coded("a.weight", integers((8, 16)), scales((8, 1)) * sign, (1, 16))


def _rows_of_127() -> Coded:
    rows = scales((8,))
    found = coded("a.weight", integers((8, 16)), rows.to(torch.float64) * (1 / 127), (1, 16))
    return Coded({"a.weight": found.stored["a.weight"], "a.SCB": rows}, found.weights, found.zeros)


def _columns() -> Coded:
    return coded("a.weight", integers((8, 16)), scales((16,)), (8, 1))


def _channels(bits: int) -> Coded:
    low, high = -(1 << bits - 1), 1 << bits - 1
    zero = integers((8, 1), 3, low, high)
    return coded("a.weight", integers((8, 16), 0, low, high), scales((8, 1)), (1, 16), zero)


LAYOUTS: dict[str, Callable[[], Coded]] = {
    "fp8, blocks cut at the edges": _fp8_blocks,
    "fp8, a scale without dimensions": lambda: _per_tensor(()),
    "fp8, a scale of one element": lambda: _per_tensor((1,)),
    "fp8, a scale of two dimensions": lambda: _per_tensor((1, 1)),
    "fp8, scales of rows": lambda: coded("a.weight", floats((8, 16)), scales((8,)), (1, 16)),
    "fp8 e5m2, scales of rows": lambda: coded(
        "a.weight", floats((8, 16), dtype=E5M2), scales((8, 1), dtype=torch.bfloat16), (1, 16)
    ),
    "mxfp8": lambda: _exponents(E8M0),
    "mxfp8, scales in plain bytes": lambda: _exponents(torch.uint8),
    "fp8, a stack with blocks": lambda: coded(
        "l.experts.gate_up_proj", floats((3, 8, 16)), scales((3, 2, 2)), (1, 4, 8), end="_scale_inv"
    ),
    "fp8, a stack with a scale for each": lambda: coded(
        "l.experts.gate_up_proj", floats((3, 8, 16)), scales((3,)), (1, 8, 16)
    ),
    "int8": lambda: coded("a.weight", integers((8, 16)), scales((1,)), (8, 16)),
    "int8, scales of rows": lambda: coded(
        "a.weight", integers((8, 16)), scales((8, 1), dtype=torch.float16), (1, 16)
    ),
    "int8, scales of columns": _columns,
    "int8, scales of groups": lambda: coded("a.weight", integers((8, 16)), scales((8, 4)), (1, 4)),
    "int8, negative scales": _negative,
    "int8, rows of 127": _rows_of_127,
    "int8, a zero point": lambda: coded(
        "a.weight", integers((8, 16)), scales((1,)), (8, 16), torch.tensor([-77], dtype=torch.int8)
    ),
    "int8, zero points of rows": lambda: _channels(8),
    "int8, zero points of groups": lambda: coded(
        "a.weight", integers((8, 16)), scales((8, 4)), (1, 4), integers((8, 4), 3)
    ),
    "four bits in an int8, zero points of rows": lambda: _channels(4),
    "uint8, zero points of rows": lambda: coded(
        "a.weight", integers((8, 16), 0, 0, 256), scales((8, 1)), (1, 16), integers((8, 1), 3, 0, 256)
    ),
}


def _words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, generator=draw()).to(torch.int32)


def _bytes(*shape: int) -> torch.Tensor:
    return integers(shape, 0, 0, 256)


PACKED: dict[str, tuple[Callable[[], Coded], str]] = {
    "gptq": (
        lambda: Coded(
            {
                "a.qweight": _words(2, 8),
                "a.qzeros": _words(2, 1),
                "a.scales": scales((2, 8), dtype=torch.float16),
                "a.g_idx": torch.arange(16).to(torch.int32) // 8,
            },
            config={"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 8}},
        ),
        "a.qweight holds GPTQ codes, eight in an int32",
    ),
    "awq": (
        lambda: Coded(
            {"a.qweight": _words(16, 1), "a.qzeros": _words(2, 1), "a.scales": scales((2, 8))},
            config={"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 8}},
        ),
        "a.qweight holds AWQ codes, eight in an int32",
    ),
    "compressed-tensors": (
        lambda: Coded(
            {
                "a.weight_packed": _words(8, 2),
                "a.weight_scale": scales((8, 2)),
                "a.weight_zero_point": _words(1, 2),
                "a.weight_shape": torch.tensor([8, 16]),
            }
        ),
        "a.weight_packed holds integer codes, several in an int32",
    ),
    "mxfp4 blocks": (
        lambda: Coded(
            {
                "l.experts.gate_up_proj_blocks": _bytes(2, 4, 3, 16),
                "l.experts.gate_up_proj_scales": _bytes(2, 4, 3),
            }
        ),
        "l.experts.gate_up_proj_blocks holds MXFP4 codes, two in a byte",
    ),
    "mxfp4 pairs": (
        lambda: Coded({"a.weight": integers((4, 32)), "a.weight_scale": _bytes(4, 2).view(E8M0)}),
        "a.weight holds MXFP4 codes, two in a byte",
    ),
    "nvfp4 pairs": (
        lambda: Coded({"a.weight": integers((4, 32)), "a.weight_scale": floats((4, 4)).abs()}),
        "a.weight holds NVFP4 codes, two in a byte",
    ),
    "nvfp4": (
        lambda: Coded(
            {
                "a.weight_packed": _bytes(4, 32),
                "a.weight_scale": floats((4, 4)),
                "a.weight_global_scale": torch.ones(1),
                "a.input_global_scale": torch.ones(1),
            }
        ),
        "a.weight_packed holds NVFP4 codes, two in a byte",
    ),
    "modelopt": (
        lambda: Coded(
            {
                "a.weight": _bytes(4, 32),
                "a.weight_scale": floats((4, 4)),
                "a.weight_scale_2": torch.ones(()),
                "a.input_scale": torch.ones(()),
            }
        ),
        "a.weight holds NVFP4 codes, two in a byte",
    ),
    "bitsandbytes": (
        lambda: Coded(
            {
                "a.weight": _bytes(64, 1),
                "a.weight.absmax": scales((2,)),
                "a.weight.quant_map": torch.randn(16),
                "a.weight.quant_state.bitsandbytes__nf4": _bytes(80),
            }
        ),
        "a.weight holds bitsandbytes codes, two in a byte",
    ),
    "mlx": (
        lambda: Coded(
            {
                "a.weight": _words(8, 2).view(torch.uint32),
                "a.scales": scales((8, 2)),
                "a.biases": scales((8, 2)),
            }
        ),
        "a.weight holds integer codes, several in an int32",
    ),
    "torchao": (
        lambda: Coded({"a._weight_qdata": _bytes(8, 8), "a._weight_scale": scales((8, 2))}),
        "a._weight_qdata holds four-bit codes, two in a byte",
    ),
}

BESIDE = " (a.weight_scale lies beside it)"
UNKNOWN: dict[str, tuple[Callable[[], Coded], str]] = {
    "no scale": (
        lambda: Coded({"a.weight": floats((8, 16))}, config={"quantization_config": {"quant_method": "fp8"}}),
        "a.weight holds FP8 codes, and no scale lies beside it",
    ),
    "scales of fused matrices": (
        lambda: Coded({"a.weight": floats((9, 16)), "a.weight_scale": scales((3,))}),
        f"a.weight holds FP8 codes{BESIDE}, whose scales a.weight_scale, F32 of shape [3], do not fit",
    ),
    "groups in another order": (
        lambda: Coded(
            {
                "a.weight": integers((8, 16)),
                "a.weight_scale": scales((8, 2)),
                "a.weight_g_idx": torch.arange(16).to(torch.int32) % 2,
            }
        ),
        f"a.weight holds int8 codes{BESIDE}, whose groups are in the order of a.weight_g_idx",
    ),
    "zero points that are no integers": (
        lambda: Coded(
            {
                "a.weight": integers((8, 16)),
                "a.weight_scale": scales((8, 1)),
                "a.weight_zero_point": torch.full((8, 1), 0.5),
            }
        ),
        f"a.weight holds int8 codes{BESIDE}, whose zero points a.weight_zero_point, F32 of shape",
    ),
}


def write(folder: Path, found: Coded, *, shards: bool = False) -> Path:
    """A directory with these tensors and their config; with `shards`, every tensor in one of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards:
        files = {
            name: f"model-{at + 1:05}-of-{len(found.stored):05}.safetensors"
            for at, name in enumerate(found.stored)
        }
        for name, file in files.items():
            save_file({name: found.stored[name]}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        save_file(found.stored, folder / "model.safetensors")
    if found.config is not None:
        (folder / "config.json").write_text(json.dumps(found.config))
    return folder
