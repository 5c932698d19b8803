"""Budgets in units of the loss: `allocate = "loss"` beside uniform budgets, and how long it takes.

`python -m tests.benchmarks.allocation SCRATCH [--only PART]` prints Markdown tables. The decoder is that of
the benchmark of the loss metric, in the same folder, with the same statistics.
"""

import copy
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import sparseprune
from sparseprune import BlockSpec, Matrix, ScopeSpec, admm, projection
from sparseprune.checkpoint.statistics import STATISTICS_KEY
from tests.benchmarks import decoders
from tests.benchmarks.loss_metric import SEQUENCES, ids_of, loaded, quality, statistics
from tests.benchmarks.reconstruction import made, run_parts, table
from tests.benchmarks.reconstruction_measures import texts

SCOPES = {"rows": (1, -1), "matrix": (-1, -1)}
METHODS = ("magnitude", "ADMM", "ADMM, loss metric")
CLAMPS = (0.05, 0.1, 0.15, 0.2, 0.3)
SPEC = """
version = 1
[reconstruct]
file = "{file}"
method = "none"
allocate = "{allocate}"
{clamp}
[scope.matrix]
tensors = "model.layers.{{layer}}.{{module}}.{{part}}_proj.weight"
block = [1, 1]
shape = {shape}
sparsity = {sparsity}
"""
CHANNELS = """
version = 1
covers = "mlp"
[reconstruct]
file = "{file}"
method = "none"
allocate = "{allocate}"
{clamp}
[block.part]
structure = "mlp"
shape = [1]
[block_coupling.channel]
blocks = ["part"]
across = ["part"]
[scope.mlp]
block = "channel"
shape = [-1]
sparsity = {sparsity}
"""


def decoder(scratch: Path) -> None:
    """A small Llama of characters: perplexity and KL to the dense model on held-out text."""
    dense, model, given, tokens = taken(scratch)
    lines = [["dense", "", "", *quality(model, model, tokens), ""]]
    for scope, shape in SCOPES.items():
        for clamp in (0.0, 0.1):
            parts = parts_of(dense, scratch, SPEC, 0.5, clamp, shape=str(list(shape)))
            parts = {tensor_of(label): share for label, share in parts.items()}
            apart = f"{min(parts.values()):.3f} to {max(parts.values()):.3f}"
            for method in METHODS:
                other = pruned(model, given, parts, method, shape)
                budget = f"clamp {clamp}" if clamp else "uniform"
                lines.append([scope, budget, method, *quality(other, model, tokens), apart])
    columns = ["scope", "budget", "method", "perplexity", "KL to dense", "share pruned"]
    table("50%, unstructured", columns, lines)


def clamps(scratch: Path) -> None:
    """The same decoder with several clamps, over 100 windows."""
    dense, model, given, tokens = taken(scratch, windows=100)
    lines = []
    for clamp in (0.0, *CLAMPS):
        parts = parts_of(dense, scratch, SPEC, 0.5, clamp, shape="[]")
        parts = {tensor_of(label): share for label, share in parts.items()}
        cells = [quality(pruned(model, given, parts, one, (-1, -1)), model, tokens)[1] for one in METHODS]
        lines.append([f"{clamp or 'uniform'}", *cells])
    table("50% of each matrix: KL to dense", ["clamp", *METHODS], lines)


def channels(scratch: Path) -> None:
    """The channels of the same decoder, chosen by the columns that read them."""
    dense, model, given, tokens = taken(scratch, windows=100)
    lines = []
    for sparsity in (0.25, 0.5):
        for clamp in (0.0, 0.1, 0.2, 0.3):
            parts = parts_of(dense, scratch, CHANNELS, sparsity, clamp)
            found = {f"model.layers.{n}.mlp.down_proj.weight": one for n, one in enumerate(parts.values())}
            cells = [
                quality(pruned(model, given, found, method, (-1, -1), rows=-1), model, tokens)[1]
                for method in METHODS
            ]
            apart = " ".join(f"{one:.3f}" for one in parts.values())
            lines.append([f"{sparsity:.0%}", f"{clamp or 'uniform'}", *cells, apart])
    table("channels: KL to dense", ["sparsity", "clamp", *METHODS, "pruned of each layer"], lines)


def taken(scratch: Path, windows: int = 400) -> tuple[Path, Any, dict[str, Matrix], Tensor]:
    """The dense checkpoint, its model, statistics of its matrices, which are written, and held-out text."""
    folder = made(scratch / "llama")
    calibration, held = texts(folder)
    dense = decoders.trained(folder / "dense", calibration)
    model, tokenizer = loaded(dense)
    given = statistics(model, ids_of(tokenizer, calibration, SEQUENCES))
    write_statistics(scratch / "stats.safetensors", given)
    return dense, model, given, ids_of(tokenizer, held, windows)


def pruned(
    model: Any,
    given: Mapping[str, Matrix],
    parts: Mapping[str, float],
    method: str,
    shape: tuple[int, ...],
    rows: int = 1,
) -> Any:
    """The model with the share `parts` of the blocks (rows, 1) of each scope pruned."""
    other = copy.deepcopy(model)
    weights = dict(other.named_parameters())
    for name, share in parts.items():
        matrix = given[name]
        buffer = torch.empty_like(matrix.dense)
        scope = ScopeSpec(BlockSpec(buffer, (rows, 1)), shape)
        nnz = round((1 - share) * scope.numblk_per_scope())
        if method == METHODS[0]:
            scope.blocks()[0].set_data(matrix.dense.clone())
            (mask,) = scope.get_masks(nnz).values()
            weights[name].data.copy_(matrix.dense * mask)
            continue
        used = matrix if method == METHODS[2] else Matrix(matrix.dense, matrix.moment)
        (found,) = admm([used], projection(scope, nnz, [buffer]))
        weights[name].data.copy_(found.weights)
    return other


def parts_of(
    checkpoint: Path, scratch: Path, spec: str, sparsity: float, clamp: float, **more: str
) -> dict[str, float]:
    """The share that goes of each instance; uniform budgets for a clamp of 0."""
    keys = {"allocate": "loss", "clamp": f"clamp = {clamp}"}
    text = spec.format(file=scratch / "stats.safetensors", sparsity=sparsity, **keys, **more)
    plan = sparseprune.plan(checkpoint, text, allocation=True, jobs=1, memory="8GiB")
    return {one.instance: one.sparsity for one in plan.rules[0].allocation or ()}


def tensor_of(label: str) -> str:
    """The weight that is an instance of the rule of matrices."""
    captures = dict(pair.split("=") for pair in label.partition("[")[2].rstrip("]").split(","))
    return "model.layers.{layer}.{module}.{part}_proj.weight".format(**captures)


def write_statistics(path: Path, given: Mapping[str, Matrix]) -> None:
    """As calibrate writes them."""
    tensors: dict[str, Tensor] = {}
    for name, matrix in given.items():
        if matrix.gradients is not None:
            tensors |= {name: matrix.moment, f"{name}.gradients": matrix.gradients}
    document = {
        "kind": "hessian",
        "weights": {name: {name: 1} for name in given},
        "gradients": {f"{name}.gradients": {name: 0} for name in given},
    }
    save_file(tensors, path, metadata={STATISTICS_KEY: json.dumps(document)})


def speed(scratch: Path) -> None:
    """`plan --allocation` of one matrix: seconds of one thread."""
    lines = []
    for size in (64, 1024, 2048, 4096):
        generator = torch.Generator().manual_seed(0)
        moment = torch.randn(size, size, generator=generator)
        matrix = Matrix(torch.randn(size, size, generator=generator), torch.eye(size))
        name = "model.layers.0.mlp.up_proj.weight"
        folder = made(scratch / f"matrix-{size}")
        save_file({name: matrix.dense.to(torch.bfloat16)}, folder / "model.safetensors")
        stats = {name: moment @ moment.T / size + torch.eye(size), f"{name}.gradients": torch.eye(size)}
        document = {
            "kind": "hessian",
            "weights": {name: {name: 1}},
            "gradients": {f"{name}.gradients": {name: 0}},
        }
        save_file(stats, scratch / "stats.safetensors", metadata={STATISTICS_KEY: json.dumps(document)})
        began, used = time.perf_counter(), time.process_time()
        parts_of(folder, scratch, SPEC, 0.5, 0.1, shape="[1, -1]")
        lines.append(
            [f"{size}x{size}", f"{time.perf_counter() - began:.1f}", f"{time.process_time() - used:.1f}"]
        )
    table(
        "One matrix", ["matrix", "seconds", "CPU seconds"], lines[1:]
    )  # the first one loads what others use


PARTS: dict[str, Callable[[Path], None]] = {
    "decoder": decoder,
    "clamps": clamps,
    "channels": channels,
    "speed": speed,
}


if __name__ == "__main__":
    run_parts(__doc__, PARTS)
