"""How fast whole commands are beside `cp -r` of the same checkpoint to the same disk, in the same round.

Run by hand: `python -m tests.benchmarks.pipeline SCRATCH`; results are kept in README.md beside this file.
SCRATCH takes some 30 GB; the checkpoints in it are kept for the next time. No torch here, see processes.py.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from tests.benchmarks.processes import Measured, measure, prepare

SPARSEPRUNE = (sys.executable, "-m", "sparseprune")
PEERS = (sys.executable, "-m", "tests.benchmarks.peers")
CHECKPOINTS = (sys.executable, "-m", "tests.benchmarks.checkpoints")
STARTS = 9  # rounds of what takes a second or two
PEAK_LIMIT = 20 << 30
INDEX = "model.safetensors.index.json"

Pair = tuple[Measured, Measured]  # of a copy, and of the command right after it


@dataclass(frozen=True)
class Row:
    """One command: `{source}` and `{out}` in its words are paths; `reach` has the ratio to reach by GB.

    `plan` is the spec and the mask options from which `sparseprune plan` tells the memory to expect.
    """

    name: str
    label: str
    words: tuple[str, ...]
    plan: tuple[str, ...] = ()
    reach: Mapping[float, float] = field(default_factory=dict)
    by_name_only: bool = False


def applied(name: str, spec: str, *options: str, reach: Mapping[float, float] | None = None) -> Row:
    """A row of `sparseprune apply`."""
    words = (*SPARSEPRUNE, "apply", "{source}", spec, *options, "-o", "{out}")
    return Row(name, " ".join(["apply", spec, *options]), words, (spec, *options), reach or {})


ROWS = (
    applied("2of4", "2of4", "--no-masks", reach={2.2: 1.4, 8: 1.2}),
    applied("2of4-packed", "2of4", "--mask-format", "packed", reach={2.2: 1.45, 8: 1.25}),
    applied("2of4-bool", "2of4", "--mask-format", "bool", reach={2.2: 1.7, 8: 1.5}),
    applied("transposable", "nofm", "--set", "n=2", "--set", "transposable=true", "--no-masks"),
    applied("global", "unstructured-global", "--no-masks", reach={2.2: 2.5}),
    Row(
        "global-mask",
        "mask unstructured-global",
        (*SPARSEPRUNE, "mask", "{source}", "unstructured-global", "-o", "{out}"),
        ("unstructured-global",),
    ),
    applied("channels", "mlp-channels", "--mask-format", "bool"),
    applied("channels-global", "mlp-channels-global", "--no-masks"),
    Row(
        "remove-channels",
        "remove mlp-channels",
        (*SPARSEPRUNE, "remove", "{source}", "mlp-channels", "-o", "{out}"),
        ("mlp-channels", "--no-masks"),
    ),
    Row("inspect", "inspect", (*SPARSEPRUNE, "inspect", "{source}"), reach={2.2: 1.0}),
    Row("loop", "2:4 by safe_open, torch.topk, save_file", (*PEERS, "loop", "{source}", "{out}")),
    Row(
        "torch-global",
        "torch's global_unstructured",
        (*PEERS, "global-unstructured", "{source}", "{out}"),
        by_name_only=True,
    ),
)
STARTING = (
    Row("plan-2of4", "plan 2of4", (*SPARSEPRUNE, "plan", "{source}", "2of4"), reach={0: 2.0}),
    Row("plan-experts", "plan experts", (*SPARSEPRUNE, "plan", "{source}", "experts"), reach={0: 2.0}),
    Row("help", "--help", (*SPARSEPRUNE, "--help"), reach={0: 0.25}),
    Row("version", "--version", (*SPARSEPRUNE, "--version"), reach={0: 0.25}),
)
GROWTH = "growth"


@dataclass(frozen=True)
class Bench:
    """A folder to work in; everything in it is the benchmark's own."""

    scratch: Path

    def checkpoint(self, name: str, *options: str) -> Path:
        """A checkpoint by checkpoints.py, written unless it is there with its index, which comes last."""
        folder = self.scratch / name
        if not (folder / INDEX).exists():
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([*CHECKPOINTS, folder, *options], check=True, stdout=sys.stderr)
        return folder

    def decoder(self, gigabytes: float) -> Path:
        """A bf16 decoder of this size."""
        return self.checkpoint(f"decoder-{gigabytes:g}", "--gigabytes", f"{gigabytes:g}")

    def run(self, name: str, words: Iterable[str], source: Path) -> Measured:
        """One command from a fresh state; what it wrote is removed again, what it said is kept."""
        out = self.scratch / "out"
        shutil.rmtree(out, ignore_errors=True)
        prepare(source)
        command = [word.format(source=source, out=out) for word in words]
        log = self.scratch / f"{name}.log"
        measured = measure(command, log, PEAK_LIMIT)
        shutil.rmtree(out, ignore_errors=True)
        failure = f", {measured.failure}, see {log}" if measured.failure else ""
        print(f"{name}: {measured.seconds:.2f} s{failure}", file=sys.stderr)
        return measured

    def pair(self, row: Row, source: Path) -> Pair:
        """A copy of the checkpoint, then the command."""
        copy = self.run("cp", ("cp", "-r", "{source}", "{out}"), source)
        return copy, self.run(row.name, row.words, source)

    def rounds(self, rows: Sequence[Row], source: Path, rounds: int) -> dict[str, list[Pair]]:
        """All rows in turn, so that what drifts meets them all; a row that fails is not tried again."""
        pairs: dict[str, list[Pair]] = {row.name: [] for row in rows}
        for _ in range(rounds):
            for row in rows:
                before = pairs[row.name]
                if not (before and before[-1][1].failure):
                    before.append(self.pair(row, source))
        return pairs


def expected_peak(source: Path, plan: Sequence[str]) -> str:
    """MiB that `sparseprune plan` expects a run to need at most."""
    if not plan:
        return ""
    done = subprocess.run([*SPARSEPRUNE, "plan", source, *plan, "--json"], capture_output=True, check=False)
    return mebibytes(json.loads(done.stdout)["bytes"]["peak"]) if done.returncode == 0 else ""


def mebibytes(size: float) -> str:
    return f"{size / 2**20:.0f}"


def cells(runs: Sequence[Measured]) -> list[str]:
    """CPU seconds, user and system, and the peak in MiB."""
    user, system = (median(getattr(run, name) for run in runs) for name in ("user", "system"))
    return [f"{user:.2f}", f"{system:.2f}", mebibytes(max(run.peak for run in runs))]


def table(header: str, lines: Iterable[Sequence[str]]) -> None:
    """Print a table in Markdown; `header` has its columns with bars between."""
    print(f"\n| {header} |\n|{'---|' * len(header.split('|'))}")
    for line in lines:
        print(f"| {' | '.join(line)} |")


def print_rows(bench: Bench, rows: Sequence[Row], gigabytes: float, rounds: int) -> None:
    """Every command beside the copies, ratios being medians over the rounds."""
    source = bench.decoder(gigabytes)
    pairs = bench.rounds(rows, source, rounds)
    copies = [copy for each in pairs.values() for copy, _ in each]
    seconds = f"{median(copy.seconds for copy in copies):.2f}"
    lines = [["`cp -r`", seconds, "1.00x", *cells(copies)[:2], "", "", ""]]  # its peak cannot be seen
    for row in rows:
        runs = [run for _, run in pairs[row.name]]
        seconds = f"{median(run.seconds for run in runs):.2f}"
        ratio = f"{median(run.seconds / copy.seconds for copy, run in pairs[row.name]):.2f}x"
        reach = f"{row.reach[gigabytes]:g}x" if gigabytes in row.reach else ""
        shown = [seconds, runs[-1].failure or ratio, *cells(runs), expected_peak(source, row.plan), reach]
        lines.append([row.label, *shown])
    size = sum(path.stat().st_size for path in source.iterdir()) / 1e9
    print(f"\n{size:.2f} GB in bf16, {rounds} rounds, {os.cpu_count()} cores:")
    table("command | seconds | to `cp` | user | system | peak MiB | planned MiB | to reach", lines)


def print_starting(bench: Bench, rows: Sequence[Row]) -> None:
    """Commands that read headers or nothing, in seconds: medians after a first round that is not counted."""
    source = bench.checkpoint("many-tensors", "--kind", "many-tensors")
    lines = []
    for row in rows:
        runs = [bench.run(row.name, row.words, source) for _ in range(STARTS + 1)][1:]
        failure = next((run.failure for run in runs if run.failure), "")
        seconds = failure or f"{median(run.wall for run in runs):.2f}"
        lines.append([row.label, seconds, *cells(runs), f"{row.reach[0]:g}"])
    print(f"\n50,000 tensors, {STARTS} rounds:")
    table("command | seconds | user | system | peak MiB | to reach", lines)


def print_growth(bench: Bench, sizes: Sequence[float], rounds: int) -> None:
    """2:4 without masks: seconds for each GB, which should stay as they are while the checkpoint grows."""
    lines = []
    for size in sizes:
        source = bench.decoder(size)
        pairs = bench.rounds(ROWS[:1], source, rounds)[ROWS[0].name]
        gigabytes = sum(path.stat().st_size for path in source.iterdir()) / 1e9
        copy, run = (median(pair[side].seconds for pair in pairs) / gigabytes for side in (0, 1))
        peak = mebibytes(max(run.peak for _, run in pairs))
        shown = [f"{run:.3f}", f"{copy:.3f}", pairs[-1][1].failure or f"{run / copy:.2f}x", peak]
        lines.append([f"{gigabytes:.2f}", *shown])
    print(f"\n{ROWS[0].label} by size, {rounds} rounds; seconds a GB to stay within 5%:")
    table("GB | seconds a GB | `cp -r` | to `cp` | peak MiB", lines)


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("scratch", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--growth", type=float, nargs="+", default=[0.5, 2.2, 8.0], metavar="GB")
    names = [*(row.name for row in (*ROWS, *STARTING)), GROWTH]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    asked = parser.parse_args()
    only = asked.only or [
        name for name in names if name not in {row.name for row in ROWS if row.by_name_only}
    ]
    asked.scratch.mkdir(parents=True, exist_ok=True)
    bench = Bench(asked.scratch.resolve())
    if rows := [row for row in ROWS if row.name in only]:
        print_rows(bench, rows, asked.gigabytes, asked.rounds)
    if rows := [row for row in STARTING if row.name in only]:
        print_starting(bench, rows)
    if GROWTH in only:
        print_growth(bench, asked.growth, asked.rounds)


if __name__ == "__main__":
    main()
