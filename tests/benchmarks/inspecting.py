"""How fast `inspect` is beside `cp -r` of the same checkpoint in the same round, whatever is zero in it.

Run by hand: `python -m tests.benchmarks.inspecting SCRATCH`. SCRATCH takes 14 GB; the checkpoints in it are
kept for the next time. No torch here, see processes.py.
"""

import argparse
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from tests.benchmarks.pipeline import SPARSEPRUNE, Bench, Row, cells, table

KINDS = {
    "dense": "",
    "2:4": "2of4",
    "half of each row": "unstructured",
    "a quarter of the MLP channels": "mlp-channels",
    "half of the 16x16 blocks": "block16x16",
}
RARELY = {
    "patterns": ("--pattern", "16:128", "--pattern", "2:3", "--pattern", "2:4@0"),
    "blocks": ("--block", "3x5", "--block", "100x100"),
}


def pruned(bench: Bench, dense: Path, spec: str) -> Path:
    """What `apply` makes of the dense checkpoint."""
    out = bench.scratch / f"{dense.name}-{spec}"
    if not out.exists():
        words = (*SPARSEPRUNE, "apply", dense, spec, "--no-masks", "-q", "-o", out)
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(out / "sparseprune")  # its report: what is measured has the files of the dense one
    return out


def rows(more: bool, other: Path | None) -> Iterator[Row]:
    """Commands to measure: `inspect`, that of another checkout, and with what is asked for rarely."""
    words = (*SPARSEPRUNE, "inspect", "{source}")
    yield Row("inspect", "inspect", words)
    if other is not None:
        yield Row("other", f"inspect of {other.name}", ("env", f"--chdir={other}", *words))
    for name, options in RARELY.items() if more else ():
        yield Row(f"inspect-{name}", f"inspect {' '.join(options)}", (*words, *options))


def main() -> None:
    """Print one table: every kind of checkpoint, each command beside a copy right before it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("scratch", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument(
        "--more", action="store_true", help="also patterns and blocks that are asked for rarely"
    )
    parser.add_argument("--other", type=Path, metavar="CHECKOUT", help="also the package of another checkout")
    asked = parser.parse_args()
    asked.scratch.mkdir(parents=True, exist_ok=True)
    bench = Bench(asked.scratch.resolve())
    dense = bench.decoder(asked.gigabytes)
    lines = []
    for kind, spec in KINDS.items():
        source = pruned(bench, dense, spec) if spec else dense
        commands = list(rows(asked.more, asked.other and asked.other.resolve()))
        pairs = bench.rounds(commands, source, asked.rounds)
        for row in commands:
            copies, runs = zip(*pairs[row.name], strict=True)
            seconds = [f"{median(run.seconds for run in each):.2f}" for each in (copies, runs)]
            ratio = median(run.seconds / copy.seconds for copy, run in pairs[row.name])
            lines.append([kind, row.label, *seconds, runs[-1].failure or f"{ratio:.2f}x", *cells(runs)])
    print(f"\n{asked.gigabytes:g} GB in bf16, {asked.rounds} rounds, {os.cpu_count()} cores:")
    table("checkpoint | command | `cp -r` | seconds | to `cp` | user | system | peak MiB", lines)


if __name__ == "__main__":
    main()
