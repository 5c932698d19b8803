"""Reconstruction: `calibrate` and `apply` beside magnitude, Wanda and SparseGPT, on the same data.

`python -m tests.benchmarks.reconstruction SCRATCH [--only PART] [--pattern PATTERN]` prints Markdown tables.
Text is the documentation of the standard library, every second topic for calibration, the others held out.
Statistics and trained models stay in SCRATCH, for the next run; remove it to begin anew.
"""

import argparse
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from tests.benchmarks import decoders
from tests.benchmarks.reconstruction_measures import LENGTH, Bench, Pruned, embeddings, minilm, texts
from tests.benchmarks.sparsegpt import Pattern, check, fused, n_of_m, rows_apart

ENCODER = """[
    "encoder.layer.{layer}.attention.self.{name:query|key|value}.weight",
    "encoder.layer.{layer}.{name:attention.output|intermediate|output}.dense.weight",
]"""
DECODER = '"model.layers.{layer}.{part}.{name}_proj.weight"'
# What a spec says of a scope behind its tensors, and the same for SparseGPT.
PATTERNS: dict[str, tuple[str, Pattern]] = {
    "2:4": ("block = [1, 1]\nshape = [1, 4]\nnnz = 2", n_of_m(2, 4)),
    "4:8": ("block = [1, 1]\nshape = [1, 8]\nnnz = 4", n_of_m(4, 8)),
    "4:8 in pairs of columns": (
        "block = [1, 2]\nshape = [1, 4]\nnnz = 2",
        fused([[(place, place + 1) for place in range(0, 8, 2)]], 2),
    ),
    "2:4 coupled 8 columns apart": (
        (
            'view = "m (k p j) -> m k j p"\naxes = { p = 2, j = 8 }\n'
            "block = [1, 1, 1, 2]\nshape = [1, 1, 4, 1]\nnnz = 2"
        ),
        fused([[(place, place + 8) for place in range(begin, begin + 4)] for begin in (0, 4)], 2),
    ),
    "16-column blocks coupled over 8 rows": (
        (
            'view = "(m p j) k -> m j p k"\naxes = { p = 2, j = 8 }\n'
            "block = [1, 1, 1, 16]\nshape = [1, 1, 2, 1]\nnnz = 1"
        ),
        rows_apart(8, 16),
    ),
}
OURS = "ADMM (sparseprune)"
REFIT_WANDA = '[score]\nkind = "wanda"\nfile = "stats"\n[reconstruct]\nfile = "stats"\nmethod = "refit"\n'
METHODS = {
    "magnitude": "",
    "wanda": '[score]\nkind = "wanda"\nfile = "stats"\n',
    "wanda mask, refitted": REFIT_WANDA,
    OURS: '[reconstruct]\nfile = "stats"\nmethod = "admm"\n',
}
# Whether it is the exact one.
YARDSTICKS = {"SparseGPT": False, "SparseGPT, exact in groups": True}
ORDER = ("magnitude", "wanda", *YARDSTICKS, "wanda mask, refitted", OURS)
CHANNELS = """
[block.row]
tensors = "encoder.layer.{layer}.intermediate.dense.weight"
shape = [1, -1]
[block.bias]
tensors = "encoder.layer.{layer}.intermediate.dense.bias"
shape = [1]
[block.column]
tensors = "encoder.layer.{layer}.output.dense.weight"
shape = [-1, 1]
[block_coupling.channel]
blocks = ["row", "bias", "column"]
orders = [[0, 1], [0, 1], [1, 0]]
[scope.ffn]
block = "channel"
shape = []
sparsity = SPARSITY
"""


@dataclass(frozen=True, slots=True)
class Measured:
    """One row of a table of methods."""

    method: str
    pruned: Pruned
    held: float
    calibration: float
    quality: float

    def cells(self, yardstick: float) -> list[str]:
        return [
            self.method,
            f"{self.held:.4f}",
            f"{self.held / yardstick:.2f}",
            f"{self.calibration:.4f}",
            f"{self.quality:.3f}",
            f"{self.pruned.seconds:.1f}",
            f"{self.pruned.process:.1f}",
        ]


def compare(bench: Bench, pattern: str, tensors: str, quality: str) -> None:
    """One table: every method at one pattern."""
    lines, sets = PATTERNS[pattern]
    rule = f"[scope.rule]\ntensors = {tensors}\n{lines}\n"
    rows = []
    for method in ORDER:
        if method in YARDSTICKS:
            pruned = bench.sparsegpt(sets, exact=YARDSTICKS[method])
        else:
            pruned = bench.apply(f"version = 1\n{METHODS[method]}{rule}")
        held, own = (mean(bench.errors(pruned.folder, stats).values()) for stats in ("held", "stats"))
        rows.append(Measured(method, pruned, held, own, bench.quality(pruned.folder)))
    columns = ["held-out error", "to SparseGPT", "calibration error", quality, "seconds", "process"]
    yardstick = next(one.held for one in rows if one.method == "SparseGPT")
    table(pattern, ["method", *columns], [one.cells(yardstick) for one in rows])


def mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print(f"\n{title}:\n")
    for cells in chain([columns, ["---"] * len(columns)], rows):  # each as soon as it is known
        print(f"| {' | '.join(cells)} |", flush=True)


def encoder_bench(scratch: Path) -> Bench:
    folder = made(scratch / "minilm")
    dense = minilm()
    _, held = texts(folder)
    wanted = embeddings(dense, held)
    bench = Bench(folder, dense, lambda pruned: float((embeddings(pruned, held) * wanted).sum(1).mean()))
    bench.calibrate(LENGTH)
    return bench


def encoder(scratch: Path, patterns: Sequence[str]) -> None:
    """all-MiniLM-L6-v2, the 36 matrices of its layers."""
    bench = encoder_bench(scratch)
    for pattern in patterns or PATTERNS:
        compare(bench, pattern, ENCODER, "cosine")


def channels(scratch: Path, patterns: Sequence[str]) -> None:
    """all-MiniLM-L6-v2, a part of the channels of every MLP."""
    bench = encoder_bench(scratch)
    rows = []
    for sparsity in ("0.25", "0.5"):
        for method, head in METHODS.items():
            pruned = bench.apply(f"version = 1\n{head}{CHANNELS.replace('SPARSITY', sparsity)}")
            errors = bench.errors(pruned.folder)
            ends = mean(value for one, value in errors.items() if re.search(r"\d\.output\.dense", one))
            cosine = bench.quality(pruned.folder)
            rows.append([sparsity, method, f"{ends:.3f}", f"{cosine:.3f}", f"{pruned.seconds:.1f}"])
    columns = ["pruned", "method", "held-out error of the output matrix", "cosine", "seconds"]
    table("MLP channels", columns, rows)


def decoder(scratch: Path, patterns: Sequence[str]) -> None:
    """A small Llama of characters, trained here: perplexity on held-out text."""
    folder = made(scratch / "llama")
    calibration, held = texts(folder)
    dense = decoders.trained(folder / "dense", calibration)
    bench = Bench(folder, dense, lambda pruned: decoders.perplexity(pruned, held))
    bench.calibrate(decoders.LENGTH)
    print(f"\ndense: perplexity {bench.quality(dense):.3f} a character")
    for pattern in patterns or ("2:4", "4:8"):
        compare(bench, pattern, DECODER, "perplexity")


def experts(scratch: Path, patterns: Sequence[str]) -> None:
    """Small random mixtures of experts, separate (Mixtral) and stacked (gpt-oss)."""
    rows = []
    for model, structures in decoders.STRUCTURES.items():
        folder = made(scratch / model)
        calibration, _ = texts(folder)
        bench = Bench(folder, decoders.mixture(folder / "dense", model, calibration), lambda _: math.nan)
        bench.calibrate(decoders.LENGTH)
        for structure, (spec, reads) in structures.items():
            errors = [
                bench.joint_error(bench.apply(f"version = 1\n{METHODS[method]}{spec}").folder, reads)
                for method in ("magnitude", OURS)
            ]
            ratio = errors[1] / errors[0]
            rows.append([model, structure, *(f"{error:.3f}" for error in errors), f"{ratio:.2f}"])
    table(
        "Held-out error of the matrices that read what went",
        ["model", "a quarter of", "magnitude", OURS, "ratio"],
        rows,
    )


def run_parts(doc: str | None, parts: Mapping[str, Callable[[Path], object]]) -> None:
    """The command line of a benchmark: a folder, and which of its parts to run there, with one thread."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--only", choices=parts, action="append", help="this part; repeat it for several")
    asked = parser.parse_args()
    decoders.quiet()
    torch.set_num_threads(1)
    for name in asked.only or parts:
        print(f"\n### {parts[name].__doc__}")
        parts[name](asked.scratch)


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


PARTS: dict[str, Callable[[Path, Sequence[str]], None]] = {
    "encoder": encoder,
    "channels": channels,
    "decoder": decoder,
    "experts": experts,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--only", choices=PARTS, action="append", help="this part; repeat it for several")
    parser.add_argument("--pattern", choices=PATTERNS, action="append", help="of encoder and decoder")
    asked = parser.parse_args()
    check()
    decoders.quiet()
    torch.set_num_threads(2)
    for name in asked.only or PARTS:
        print(f"\n### {PARTS[name].__doc__}")
        PARTS[name](asked.scratch, asked.pattern or ())


if __name__ == "__main__":
    main()
