"""How fast `verify` and `reapply` are beside `cp -r` of the same checkpoint in the same round.

Run by hand: `python -m tests.benchmarks.checking SCRATCH`. SCRATCH takes 20 GB; the checkpoints in it are
kept for the next time. No torch here, see processes.py.
"""

import argparse
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from tests.benchmarks.inspecting import pruned
from tests.benchmarks.pipeline import SPARSEPRUNE, Bench, Row, cells, table

SPECS = ("2of4", "mlp-channels", "unstructured-global")
FORMATS = ("bool", "packed")


def masks(bench: Bench, dense: Path, form: str) -> Path:
    """The masks of 2:4 in every projection."""
    out = bench.scratch / f"{dense.name}-masks-{form}"
    if not out.exists():
        words = (*SPARSEPRUNE, "mask", dense, "2of4", "--mask-format", form, "-q", "-o", out)
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return out


def verifying(bench: Bench, dense: Path) -> Iterator[tuple[Row, Path]]:
    """Each command with the checkpoint that it reads: against specs, then against masks."""
    for spec in SPECS:
        yield (
            Row("verify", f"verify {spec}", (*SPARSEPRUNE, "verify", "{source}", spec)),
            pruned(bench, dense, spec),
        )
    for form in FORMATS:
        words = (*SPARSEPRUNE, "verify", "{source}", "--masks", str(masks(bench, dense, form)))
        yield Row("verify-masks", f"verify --masks, {form}", words), pruned(bench, dense, "2of4")


def reapplying(bench: Bench, dense: Path) -> Iterator[tuple[Row, Path]]:
    """On the dense checkpoint, as if all zeros had been lost."""
    for form, options in (
        ("bool", ("--mask-format", "bool")),
        ("packed", ("--mask-format", "packed")),
        ("packed", ("--no-masks",)),
    ):
        given = str(masks(bench, dense, form))
        words = (*SPARSEPRUNE, "reapply", "{source}", given, *options, "-o", "{out}")
        yield Row("reapply", f"reapply, {form} masks, {' '.join(options)}", words), dense


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("scratch", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=2.2)
    asked = parser.parse_args()
    asked.scratch.mkdir(parents=True, exist_ok=True)
    bench = Bench(asked.scratch.resolve())
    dense = bench.decoder(asked.gigabytes)
    lines = []
    for row, source in (*verifying(bench, dense), *reapplying(bench, dense)):
        pairs = bench.rounds([row], source, asked.rounds)[row.name]
        copies, runs = zip(*pairs, strict=True)
        seconds = [f"{median(run.seconds for run in each):.2f}" for each in (copies, runs)]
        ratio = f"{median(run.seconds / copy.seconds for copy, run in pairs):.2f}x"
        lines.append([row.label, *seconds, runs[-1].failure or ratio, *cells(runs)])
    print(f"\n{asked.gigabytes:g} GB in bf16, {asked.rounds} rounds, {os.cpu_count()} cores:")
    table("command | `cp -r` | seconds | to `cp` | user | system | peak MiB", lines)


if __name__ == "__main__":
    main()
