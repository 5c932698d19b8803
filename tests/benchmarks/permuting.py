"""Permutations for N:M: what a decoder loses with and without them, and what the search takes.

`python -m tests.benchmarks.permuting SCRATCH [--only PART]` prints Markdown tables. The decoder is that of
the benchmark of reconstruction, in the same folder.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import sparseprune
from sparseprune import Matrix
from sparseprune.checkpoint.statistics import STATISTICS_KEY
from sparseprune.engine.permuting import best_order, pruned
from tests.benchmarks import decoders
from tests.benchmarks.loss_metric import METHODS, ids_of, loaded, rebuilt, statistics
from tests.benchmarks.reconstruction import made, run_parts, table
from tests.benchmarks.reconstruction_measures import texts

SPEC = """
version = 1
[reconstruct]
file = "stats.safetensors"
[scope.matrix]
structure = "matrices"
block = [1, 1]
shape = [1, 4]
nnz = KEPT
permute = true
"""
KEPT = {"2:4": 2, "1:4": 1}
DRAWS = 3  # of calibration text
SIZES = ((4096, 4096), (4096, 11008))
_SEQUENCES = 128


def search(_: Path) -> None:
    """Seconds of one thread to find an order, and what N:M prunes of the scores; squares of normal weights
    whose inputs have unlike sizes."""
    lines = []
    for rows, columns in SIZES:
        chance = np.random.default_rng(0)
        sizes = np.exp(0.5 * chance.standard_normal((columns, 1)))
        scores = (chance.standard_normal((columns, rows)) ** 2 * sizes).astype(np.float32)
        for name, keep, group in (("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8)):
            began = time.process_time()
            order = best_order(scores, keep, group)
            seconds = time.process_time() - began
            shares = [pruned(scores, one, keep, group) / scores.sum() for one in (np.arange(columns), order)]
            lines.append([f"{rows}x{columns}", name, *(f"{one:.2%}" for one in shares), f"{seconds:.1f}"])
    table("Search", ["matrix", "pattern", "pruned as it lies", "in the new order", "CPU seconds"], lines)


def decoder(scratch: Path) -> None:
    """A small Llama of characters: KL to the dense model on held-out text, over three draws of text."""
    folder = made(scratch / "llama")
    calibration, held = texts(folder)
    dense = decoders.trained(folder / "dense", calibration)
    model, tokenizer = loaded(dense)
    tokens, windows = ids_of(tokenizer, held, 400), ids_of(tokenizer, calibration, DRAWS * _SEQUENCES)
    found: dict[tuple[str, str, bool], list[list[str]]] = {}
    for draw in range(DRAWS):
        own = windows[draw::DRAWS]
        given = statistics(model, own)
        for pattern, kept in KEPT.items():
            other, _ = loaded(permuted(dense, scratch / "permuted", given, kept))
            assert torch.allclose(other(tokens[:8]).logits, model(tokens[:8]).logits, atol=1e-3)
            for is_permuted, start in ((False, model), (True, other)):
                moments = statistics(start, own) if is_permuted else given
                for method in METHODS:
                    cells = rebuilt(start, moments, moments, kept, method, tokens)
                    found.setdefault((pattern, method, is_permuted), []).append(cells)
    lines = []
    for (pattern, method, is_permuted), draws in found.items():
        kl = sorted(float(cells[1]) for cells in draws)
        means = [f"{sum(float(cells[at]) for cells in draws) / DRAWS:.4f}" for at in (2, 3)]
        spread = f"{kl[0]:.5f} to {kl[-1]:.5f}"
        lines.append(
            [method, pattern, "yes" if is_permuted else "no", f"{sum(kl) / DRAWS:.5f}", spread, *means]
        )
    columns = [
        "method",
        "pattern",
        "permuted",
        "KL to dense",
        "of three draws",
        "error of outputs",
        "of the loss",
    ]
    table("2:4 and 1:4", columns, lines)


def permuted(dense: Path, folder: Path, given: dict[str, Matrix], kept: int) -> Path:
    """The dense decoder in the order that a spec with `permute` finds."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "spec.toml").write_text(SPEC.replace("KEPT", str(kept)))
    weights = {"kind": "hessian", "weights": {name: {name: 1} for name in given}}
    moments = {name: one.moment for name, one in given.items()}
    save_file(moments, folder / "stats.safetensors", {STATISTICS_KEY: json.dumps(weights)})
    sparseprune.apply(dense, folder / "spec.toml", folder / "pruned", jobs=1)
    shutil.copytree(dense, folder / "dense")
    tensors: dict[str, Tensor] = load_file(dense / "model.safetensors")
    with safe_open(folder / "pruned" / "sparseprune" / "permutations.safetensors", "pt") as file:
        for name, dim in json.loads(file.metadata()["sparseprune.permutations"]).items():
            tensors[name] = tensors[name].index_select(dim, file.get_tensor(name)).contiguous()
    save_file(tensors, folder / "dense" / "model.safetensors", {"format": "pt"})
    return folder / "dense"


PARTS: dict[str, Callable[[Path], Any]] = {"search": search, "decoder": decoder}


if __name__ == "__main__":
    run_parts(__doc__, PARTS)
