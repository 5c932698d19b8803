"""Whole pruned models: what each method leaves of a model, on the same data, over several draws of text.

`python -m tests.benchmarks.pruned_models SCRATCH [--only PART] [--draws N]` prints Markdown tables:
perplexity and KL to the dense model, or the cosine of embeddings, the mean over draws ± half of their range.
All but SparseGPT are the commands themselves. Statistics and trained models stay in SCRATCH.
"""

import argparse
import json
import math
import re
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparseprune.calibration import make_sequences
from tests.benchmarks import decoders
from tests.benchmarks.loss_metric import loaded, measured
from tests.benchmarks.reconstruction import CHANNELS, DECODER, ENCODER, made, table
from tests.benchmarks.reconstruction_measures import Bench, command, embeddings, minilm, texts
from tests.benchmarks.sparsegpt import Pattern, fused, n_of_m

SEQUENCES = LENGTH = 128
HELD = 400  # sequences of held-out text
LONGER = 2000  # steps of training of the larger decoder
MIXED = 300  # of a mixture
# By name what a spec says of its scopes, and the same for SparseGPT.
PATTERNS: dict[str, tuple[str, Pattern | None]] = {
    "2:4": ("block = [1, 1]\nshape = [1, 4]\nnnz = 2", n_of_m(2, 4)),
    "1:4": ("block = [1, 1]\nshape = [1, 4]\nnnz = 1", n_of_m(1, 4)),
    "50% of each matrix": ("block = [1, 1]\nshape = [-1, -1]\nsparsity = 0.5", None),
}
_FILE = 'file = "stats"'
_ADMM = f'[reconstruct]\n{_FILE}\nmethod = "admm"\n'
OUTPUTS, LOSS = f'{_ADMM}metric = "outputs"\n', f'{_ADMM}metric = "loss"\n'
_ALLOCATED = 'allocate = "loss"\n'
# By name what stands in front of the scope, and what behind it.
METHODS: dict[str, tuple[str, str]] = {
    "magnitude": ("", ""),
    "Wanda": (f'[score]\nkind = "wanda"\n{_FILE}\n', ""),
    "ADMM": (OUTPUTS, ""),
    "ADMM, permuted": (OUTPUTS, "permute = true\n"),
    "ADMM, loss metric": (LOSS, ""),
    "ADMM, loss metric, permuted": (LOSS, "permute = true\n"),
    "ADMM, loss metric, fast": (f'{LOSS}effort = "fast"\n', ""),
    "ADMM, allocated": (f"{OUTPUTS}{_ALLOCATED}", ""),
    "ADMM, loss metric, allocated": (f"{LOSS}{_ALLOCATED}", ""),
}
# By name the target of a sweep, what its gradients come from (statistics, where budgets are allocated), and
# how many steps layers are tuned.
TUNE = 150
SWEEPS: dict[str, tuple[str, str, int]] = {
    "sweep, own targets": ("own", "", 0),
    "sweep": ("dense", "", 0),
    "sweep, tuned": ("dense", "", TUNE),
    "sweep, loss metric": ("dense", "text", 0),
    "sweep, loss metric, tuned": ("dense", "text", TUNE),
    "sweep, loss metric, allocated": ("dense", "statistics", 0),
    "sweep, loss metric, allocated, tuned": ("dense", "statistics", TUNE),
}
# By name what stands in front of the spec `experts`.
EXPERTS: dict[str, str] = {
    "magnitude": "",
    "REAP": f'score = {{ kind = "reap", {_FILE} }}\n',
    "exact, by the outputs": f'reconstruct = {{ {_FILE}, method = "admm", metric = "outputs" }}\n',
    "exact, by the loss": f'reconstruct = {{ {_FILE}, method = "admm", metric = "loss" }}\n',
}
YARDSTICKS = {"SparseGPT": False, "SparseGPT, exact in groups": True}  # whether it is the exact one
ORDER = ("magnitude", "Wanda", *YARDSTICKS, *list(METHODS)[2:], *SWEEPS)
Measure = Callable[[Path], tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Asked:
    """How often text is drawn, and which patterns and methods are wanted, all of them if none is named."""

    draws: int
    patterns: Sequence[str]
    methods: Sequence[str]


@dataclass(frozen=True, slots=True)
class Work:
    """A dense checkpoint, how good another one is, and the numbers that tell it, by their names."""

    folder: Path
    dense: Path
    measure: Measure
    numbers: tuple[str, ...]
    tensors: str

    def statistics(self, draw: int) -> Path:
        """Of this draw of the calibration text."""
        folder = made(self.folder / f"draw{draw}")
        if not (folder / "stats/sparseprune/report.json").is_file():
            text, _ = texts(self.folder)
            sizes = ["--length", LENGTH, "--sequences", SEQUENCES, "--seed", draw, "--gradients"]
            command("calibrate", self.dense, "--text", text, *sizes, "-o", folder / "stats", "-q")
        return folder

    def pruned(self, folder: Path, spec: str, *words: object) -> tuple[Path, dict[str, Any]]:
        """The output of a spec whose statistics are those of a draw, and its report."""
        (folder / "spec.toml").write_text(spec)
        out = folder / "pruned"
        command("apply", self.dense, folder / "spec.toml", "-o", out, "--no-masks", "--force", "-q", *words)
        return out, json.loads((out / "sparseprune/report.json").read_text())


def compare(work: Work, pattern: str, asked: Asked) -> None:
    """One table: every method that knows a pattern and was asked for."""
    lines, sets = PATTERNS[pattern]
    alike = sets is not None  # all groups of neighbours: there budgets cannot be shared
    unknown = ("allocated",) if alike else ("permuted", *YARDSTICKS)
    methods = [method for method in ORDER if not any(word in method for word in unknown)]
    methods = [method for method in methods if not asked.methods or method in asked.methods]
    rows = (
        [method, *spread([one(work, lines, sets, method, draw) for draw in range(asked.draws)])]
        for method in methods
    )
    table(pattern, ["method", *work.numbers, "seconds"], rows)


def one(work: Work, lines: str, sets: Pattern | None, method: str, draw: int) -> tuple[float, ...]:
    """The numbers of a method with the statistics of a draw, and its seconds."""
    folder = work.statistics(draw)
    if method in YARDSTICKS:
        bench = Bench(folder, work.dense, lambda _: math.nan)
        pruned = bench.sparsegpt(sets or fused([[(0,)]], 1), exact=YARDSTICKS[method])
        return (*work.measure(pruned.folder), pruned.seconds)
    if method in SWEEPS:
        out, report = swept(work, f"[scope.rule]\ntensors = {work.tensors}\n{lines}\n", method, draw)
        return (*work.measure(out), float(report["seconds"]))
    head, tail = METHODS[method]
    rows = lines.replace("[-1, -1]", "[1, -1]") if method == "Wanda" else lines
    out, report = work.pruned(
        folder, f"version = 1\n{head}[scope.rule]\ntensors = {work.tensors}\n{rows}\n{tail}"
    )
    return (*work.measure(out), float(report["seconds"]))


def swept(work: Work, scope: str, method: str, draw: int) -> tuple[Path, dict[str, Any]]:
    """What a sweep over the text of a draw writes, and its report."""
    target, gradients, tune = SWEEPS[method]
    allocated = _ALLOCATED if "allocated" in method else ""
    head = f'version = 1\n[reconstruct]\nmethod = "admm"\ntarget = "{target}"\ntune = {tune}\n{allocated}'
    words = ["--text", texts(work.folder)[0], "--length", LENGTH, "--sequences", SEQUENCES, "--seed", draw]
    folder = work.statistics(draw)
    of: dict[str, list[object]] = {"text": ["--gradients"], "statistics": ["--stats", folder / "stats"]}
    return work.pruned(folder, head + scope, *words, *of.get(gradients, []))


def spread(found: Sequence[tuple[float, ...]]) -> list[str]:
    """The mean of each number over the draws, and half of its range."""
    cells = []
    for values in zip(*found, strict=True):
        mean = sum(values) / len(values)
        digits = max(1, 3 - math.floor(math.log10(abs(mean) or 1))) if mean < 1 else 3 if mean < 100 else 1
        half = (max(values) - min(values)) / 2
        cells.append(f"{mean:.{digits}f} ± {half:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}")
    cells[-1] = f"{sum(values[-1] for values in found) / len(found):.1f}"
    return cells


# The models.


def decoder(scratch: Path, asked: Asked) -> None:
    """A Llama of characters, 3 layers, 96 wide, trained for 1000 steps."""
    folder = made(scratch / "llama")
    _decoder(folder, decoders.trained(folder / "dense", texts(folder)[0]), asked)


def longer(scratch: Path, asked: Asked) -> None:
    """A Llama of characters, 4 layers, 128 wide, trained for 2000 steps on the standard library's code."""
    folder = made(scratch / "longer")
    code = folder / "code.txt"
    if not code.is_file():
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        code.write_text("".join(re.sub(r"[^\n -~]", "?", file.read_text()) for file in files[::2]))
    dense = decoders.trained(folder / "dense", code, hidden=128, layers=4, steps=LONGER)
    _decoder(folder, dense, asked)


def _decoder(folder: Path, dense: Path, asked: Asked) -> None:
    work = _of_characters(folder, dense)
    for pattern in asked.patterns or PATTERNS:
        compare(work, pattern, asked)


def _of_characters(folder: Path, dense: Path) -> Work:
    model, tokenizer = loaded(dense)
    tokens = make_sequences([texts(folder)[1].read_text()], tokenizer, HELD, LENGTH, 1).ids

    def measure(pruned: Path) -> tuple[float, float]:
        return measured(loaded(pruned)[0], model, tokens)

    print(f"\ndense: perplexity {measure(dense)[0]:.3f}")
    return Work(folder, dense, measure, ("perplexity", "KL to dense"), DECODER)


def encoder(scratch: Path, asked: Asked) -> None:
    """all-MiniLM-L6-v2, the 36 matrices of its layers: cosine of sentence embeddings to the dense ones."""
    work = _encoder(scratch)
    for pattern in asked.patterns or PATTERNS:
        compare(work, pattern, asked)


def _encoder(scratch: Path) -> Work:
    folder, dense = made(scratch / "minilm"), minilm()
    held = texts(folder)[1]
    wanted = embeddings(dense, held)

    def measure(pruned: Path) -> tuple[float]:
        return (float((embeddings(pruned, held) * wanted).sum(1).mean()),)

    return Work(folder, dense, measure, ("cosine",), ENCODER)


def channels(scratch: Path, asked: Asked) -> None:
    """all-MiniLM-L6-v2, half of the channels of every MLP."""
    work = _encoder(scratch)

    def row(method: str) -> list[str]:
        found = []
        for draw in range(asked.draws):
            scope = CHANNELS.replace("SPARSITY", "0.5")
            if method in SWEEPS:
                out, report = swept(work, scope, method, draw)
            else:
                out, report = work.pruned(work.statistics(draw), f"version = 1\n{METHODS[method][0]}{scope}")
            found.append((*work.measure(out), float(report["seconds"])))
        return [method, *spread(found)]

    methods = [method for method in (*METHODS, *SWEEPS) if "permuted" not in method and "fast" not in method]
    methods = [method for method in methods if not asked.methods or method in asked.methods]
    table("50% of the channels", ["method", *work.numbers, "seconds"], map(row, methods))


def mixtures(scratch: Path, asked: Asked) -> None:
    """Two mixtures of experts over characters, 4 layers, 128 wide, 8 experts, trained for 300 steps."""
    for name in ("Mixtral", "gpt-oss"):
        folder = made(scratch / f"{name}-trained")
        work = _of_characters(folder, decoders.mixture(folder / "dense", name, texts(folder)[0], MIXED))
        for share in ("0.25", "0.5"):
            rows = (
                [method, *spread([_without_experts(work, head, share, draw) for draw in range(asked.draws)])]
                for method, head in EXPERTS.items()
            )
            table(f"{name}, {share} of the experts", ["method", *work.numbers, "seconds"], rows)


def _without_experts(work: Work, head: str, share: str, draw: int) -> tuple[float, ...]:
    """The numbers of a model that `remove` made smaller, and its seconds."""
    folder, spec = work.statistics(draw), Path("specs/experts.toml").read_text()
    (folder / "spec.toml").write_text(spec.replace("version = 1\n", f"version = 1\n{head}"))
    out = folder / "pruned"
    asked = ["--set", f"sparsity={share}", "-o", out, "--force", "-q"]
    command("remove", work.dense, folder / "spec.toml", *asked)
    report = json.loads((out / "sparseprune/report.json").read_text())
    return (*work.measure(out), float(report["seconds"]))


PARTS: dict[str, Callable[[Path, Asked], None]] = {
    "decoder": decoder,
    "encoder": encoder,
    "channels": channels,
    "longer": longer,
    "mixtures": mixtures,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--only", choices=PARTS, action="append", help="this part; repeat it for several")
    parser.add_argument("--pattern", choices=PATTERNS, action="append", help="this pattern")
    parser.add_argument("--draws", type=int, default=3, help="how often text is drawn anew")
    parser.add_argument("--method", choices=ORDER, action="append", help="this method")
    asked = parser.parse_args()
    decoders.quiet()
    torch.set_num_threads(2)
    for name in asked.only or PARTS:
        print(f"\n### {PARTS[name].__doc__}")
        PARTS[name](asked.scratch.absolute(), Asked(asked.draws, asked.pattern or (), asked.method or ()))


if __name__ == "__main__":
    main()
