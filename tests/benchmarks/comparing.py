"""How fast `compare` is beside `cp -r` of one of the two checkpoints, in the same round.

Run by hand: `python -m tests.benchmarks.comparing SCRATCH`. A decoder beside itself, its 2:4 pruned self, and
itself with every element altered. SCRATCH takes four times the decoder. No torch here, see processes.py.
"""

import argparse
import os
import shutil
import subprocess
from pathlib import Path
from statistics import median

from tests.benchmarks.pipeline import INDEX, SPARSEPRUNE, Bench, cells, table
from tests.benchmarks.processes import Measured, prepare

_LENGTH_BYTES = 8
_LOWEST_BIT = bytes(byte ^ 1 for byte in range(256))
_PIECE = 8 << 20


def pruned(bench: Bench, source: Path) -> Path:
    """The decoder with 2 of 4 weights of every projection."""
    folder = bench.scratch / f"{source.name}-2of4"
    if not (folder / INDEX).exists():
        words = (*SPARSEPRUNE, "apply", source, "2of4", "-o", folder, "--no-masks", "--force", "-q")
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(folder / "sparseprune")  # the report: what is measured has the files of the decoder
    return folder


def altered(bench: Bench, source: Path) -> Path:
    """The decoder with the lowest bit of every element flipped; its index is written last."""
    folder = bench.scratch / f"{source.name}-altered"
    if (folder / INDEX).exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in source.glob("*.safetensors"):
        with path.open("rb") as dense, (folder / path.name).open("wb") as out:
            length = dense.read(_LENGTH_BYTES)
            out.write(length + dense.read(int.from_bytes(length, "little")))
            while piece := bytearray(dense.read(_PIECE)):
                piece[::2] = piece[::2].translate(_LOWEST_BIT)
                out.write(piece)
    shutil.copy(source / INDEX, folder / INDEX)
    return folder


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("scratch", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=2.2)
    asked = parser.parse_args()
    asked.scratch.mkdir(parents=True, exist_ok=True)
    bench = Bench(asked.scratch.resolve())
    source = bench.decoder(asked.gigabytes)
    others = {"itself": source, "2:4": pruned(bench, source), "every element altered": altered(bench, source)}
    pairs: dict[str, list[tuple[Measured, Measured]]] = {name: [] for name in others}
    for _ in range(asked.rounds):
        for name, other in others.items():
            copy = bench.run("cp", ("cp", "-r", "{source}", "{out}"), source)
            prepare(other)
            words = (*SPARSEPRUNE, "compare", "{source}", str(other), "--quiet")
            pairs[name].append((copy, bench.run("compare", words, source)))
    copies = [copy for each in pairs.values() for copy, _ in each]
    lines = [["`cp -r`", f"{median(copy.seconds for copy in copies):.2f}", "1.00x", *cells(copies)[:2], ""]]
    for name, each in pairs.items():
        runs = [run for _, run in each]
        seconds = f"{median(run.seconds for run in runs):.2f}"
        ratio = f"{median(run.seconds / copy.seconds for copy, run in each):.2f}x"
        lines.append([f"compare with {name}", seconds, runs[-1].failure or ratio, *cells(runs)])
    print(f"\n{asked.gigabytes:g} GB in bf16, {asked.rounds} rounds, {os.cpu_count()} cores:")
    table("command | seconds | to `cp` | user | system | peak MiB", lines)


if __name__ == "__main__":
    main()
