"""Checkpoints that fit nowhere here: what their plans take, and how N machines on one store would do them.

`python -m tests.benchmarks.machines SCRATCH [--only plans|machines]`. `plans` are made here, of files with
holes, and take minutes; `machines` is a simulation (its model is in simulation.py) with the rates below, and
takes half a minute of CPU.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tests.benchmarks.simulation import Batch, Lost, Machine, Store, ideal, in_pieces, simulate
from tests.execution.on_paper import OnPaper
from tests.layouts import DEEPSEEK_V3, KIMI_K2, LLAMA_405B, Layout, Tensor, nbytes_of, shards_of, write

LAYOUTS = (DEEPSEEK_V3, KIMI_K2, LLAMA_405B)
SPECS = {"2of4": 1, "experts": 1, "mlp-channels": 1, "unstructured-global": 1}
MEMORY = 1 << 30
MACHINES = (1, 2, 4, 8, 16, 32, 64)
MACHINE, STORE = Machine(), Store()
PIECE = 256 << 20  # bytes of a batch that is less than a file

# Measured (README.md): CPU seconds for each byte that 2:4 with packed masks reads, the kernel's included.
TWO_OF_FOUR = 1.0e-9
# Assumed: CPU seconds of the client for each byte that it reads or writes, with TLS.
CLIENT = 1.0e-9
# Fitted by hand to eight measured sizes up to 4096x4096 (README.md): CPU seconds of ADMM at 2:4, one thread,
# for rows x columns x columns, and for columns^3.
BY_ROWS, BY_COLUMNS = 6.2e-10, 6.0e-11


def plans(scratch: Path) -> Iterator[list[str]]:
    """Rows of the table of plans."""
    for layout in LAYOUTS:
        folder = scratch / layout.name
        write(layout, folder)
        for spec in SPECS:
            if spec == "experts" and layout is LLAMA_405B:
                continue
            yield [layout.name, spec, *_planned(folder, spec)]
        shutil.rmtree(folder)


def _planned(folder: Path, spec: str) -> Iterator[str]:
    words = ("-m", "tests.execution.on_paper", folder, spec, str(MEMORY), str(SPECS[spec]))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, check=True, env=environment)
    found = OnPaper(**json.loads(done.stdout))
    yield f"{found.planned:.1f}"
    yield f"{found.peak / 2**20:.0f}"
    yield f"{found.told / 2**20:.0f}"
    yield f"{found.jobs:,}"
    yield f"{found.chunks:,}"
    yield f"{found.listed:.1f}"
    yield f"{len(found.batches)}"
    yield f"{found.largest / 1e9:.2f}"
    yield f"{found.median / 1e9:.2f}"
    yield f"{found.sent / 1e6:.2f}"
    yield f"{found.flags / 1e6:.2f}"


def data_free(layout: Layout) -> list[Batch]:
    """2:4 with packed masks: a batch for each shard, which all cores share."""
    return [_batch(shard, lambda _: 0.0, TWO_OF_FOUR) for shard in shards_of(layout)]


def rebuilt(layout: Layout) -> list[Batch]:
    """ADMM at 2:4: a batch for each shard, a matrix on one core."""
    return [_batch(shard, admm_seconds, 0.0) for shard in shards_of(layout)]


def _batch(shard: Iterable[Tensor], seconds: Callable[[Tensor], float], rate: float) -> Batch:
    tensors = list(shard)
    read = sum(map(nbytes_of, tensors))
    masks = sum(rows * columns // 8 for _, _, (rows, columns) in filter(is_pruned, tensors))
    written = read + masks
    pieces = tuple(seconds(tensor) for tensor in tensors if is_pruned(tensor))
    return Batch(read, written, tuple(filter(None, pieces)), rate * read + CLIENT * (read + written))


def is_pruned(tensor: Tensor) -> bool:
    """Whether it is a matrix of the layers, and no router."""
    name, _, shape = tensor
    return name.endswith(("_proj.weight", "_proj_with_mqa.weight")) and len(shape) == 2


def admm_seconds(tensor: Tensor) -> float:
    """What a matrix takes one core."""
    _, _, (rows, columns) = tensor
    return BY_ROWS * rows * columns**2 + BY_COLUMNS * columns**3


def machines(of_layout: Callable[[Layout], list[Batch]]) -> Iterator[list[str]]:
    """Rows: seconds, shares of the ideal by the way that work is cut, and what a lost machine costs."""
    one_by_one, side_by_side = replace(MACHINE, files=1), replace(MACHINE, files=MACHINE.cores)
    for layout in LAYOUTS:
        files = of_layout(layout)
        pieces = in_pieces(files, PIECE)
        matrices = tuple(piece for batch in files for piece in batch.pieces)
        for count in MACHINES:
            least = ideal(files, count, MACHINE, STORE)
            usual = simulate(files, count, MACHINE, STORE)
            ways = (usual, *(simulate(files, count, each, STORE) for each in (one_by_one, side_by_side)))
            shares = [f"{least / seconds:.2f}" for seconds in ways]
            if matrices:  # on all cores of all machines; what is moved takes next to no time
                smallest = Batch(0, 0, matrices).seconds(count * MACHINE.cores)
            else:
                smallest = simulate(pieces, count, MACHINE, STORE)
            shares.append(f"{least / smallest:.2f}")
            lost = "" if count == 1 else f"{_with_a_loss(files, count, usual) / usual:.2f}"
            yield [layout.name, str(count), f"{usual:,.0f}", *shares, lost]


def _with_a_loss(files: Sequence[Batch], count: int, whole: float) -> float:
    """Seconds where a machine is lost when half of the time has passed."""
    return simulate(files, count, MACHINE, STORE, Lost(whole / 2))


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table, row by row."""
    print(f"\n{title}:\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("scratch", type=Path, help="a directory that does not exist")
    parser.add_argument("--only", choices=("plans", "machines"))
    asked = parser.parse_args()
    if asked.only != "machines":
        sizes = ["batches", "largest GB", "median GB", "sent MB", "flags MB"]
        work = ["CPU s", "peak MiB", "told MiB", "jobs", "chunks", "CPU s to list them"]
        table("Plans", ["layout", "spec", *work, *sizes], plans(asked.scratch))
        asked.scratch.rmdir()
    if asked.only != "plans":
        head = ["layout", "machines", "seconds", "4 files", "1 file", "16 files", "less", "with a loss"]
        table("2:4", head, machines(data_free))
        table("ADMM", head, machines(rebuilt))


if __name__ == "__main__":
    main()
