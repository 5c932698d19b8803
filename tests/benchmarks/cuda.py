"""What a CUDA device does: everything checked against the CPU, then measured, in ten minutes at most.

`python -m tests.benchmarks.cuda SCRATCH [--only PART]` prints Markdown tables; exit code 1 if a check fails.
SCRATCH takes 10 GB. What has no time left is left out. Without a device `--device cpu --small` tries the
script: the CPU is compared with itself. No torch here, see processes.py; what needs it is in cuda_parts.py.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.benchmarks.pipeline import SPARSEPRUNE, Bench
from tests.benchmarks.processes import measure, prepare

COMMANDS = ("2of4", "unstructured", "unstructured-global", "mlp-channels", "mlp-channels-global", "heads")
Line = Sequence[object]


@dataclass
class Bout:
    """What was asked for, until when, and which checks failed."""

    scratch: Path
    device: str
    small: bool
    gigabytes: float
    ends: float
    failed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def devices(self) -> tuple[str, ...]:
        return ("cpu", self.device)

    def folder(self, name: str) -> Path:
        """A new folder."""
        shutil.rmtree(self.scratch / name, ignore_errors=True)
        (self.scratch / name).mkdir(parents=True)
        return self.scratch / name

    def has_time(self, what: str, seconds: float) -> bool:
        """Whether so many seconds are left; else it is told what was left out."""
        if time.monotonic() + seconds < self.ends:
            return True
        self.left_out.append(what)
        return False

    def check(self, what: str, *, holds: bool) -> str:
        if not holds:
            self.failed.append(what)
        return "yes" if holds else "**no**"


def commands(bout: Bout) -> Iterator[Line]:
    """`apply`, no masks, 8 GiB | on | seconds | MB/s | peak MiB | as on the CPU"""
    bench = Bench(bout.scratch)
    dense = bench.decoder(bout.gigabytes)
    nbytes = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
    for spec in COMMANDS:
        outputs = []
        for number, device in enumerate(bout.devices):
            if not bout.has_time(f"apply {spec} on {device}", 15 + 15 * bout.gigabytes):
                continue
            out = bout.scratch / f"out-{number}"
            shutil.rmtree(out, ignore_errors=True)
            prepare(dense)
            options = ("--no-masks", "--memory", "8GiB", "--device", device)
            taken = measure([*SPARSEPRUNE, "apply", dense, spec, *options, "-o", out], bout.scratch / "log")
            outputs.append(out)
            told = taken.failure
            if not told:
                report = json.loads((out / "sparseprune/report.json").read_text())
                told = ", ".join(sorted({str(rule["device"]) for rule in report["rules"]}))
            alike = ""
            if taken.failure or len(outputs) == 2:
                holds = not taken.failure and same_files(*outputs)
                alike = bout.check(f"apply {spec} on {device}", holds=holds)
            rate = f"{nbytes / taken.seconds / 1e6:,.0f}"
            yield f"{spec}, {device}", told, f"{taken.seconds:.2f}", rate, taken.peak >> 20, alike
        for out in outputs:
            shutil.rmtree(out, ignore_errors=True)


def same_files(one: Path, other: Path) -> bool:
    """Whether two outputs have the same weights and masks."""
    names = sorted(file.relative_to(one) for file in one.rglob("*.safetensors"))
    theirs = sorted(file.relative_to(other) for file in other.rglob("*.safetensors"))
    return names == theirs and all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


PARTS = ("commands", "selection", "solver", "calibration", "sweeping", "specs")


def part_of(name: str, bout: Bout) -> Callable[[Bout], Iterable[Line]]:
    """The function of a part. Torch comes in after the commands, whose peak memory begins with ours."""
    if name == "commands":
        return commands
    from tests.benchmarks import cuda_parts

    cuda_parts.quiet(bout)
    return {
        "selection": cuda_parts.selection,
        "solver": cuda_parts.solver,
        "calibration": cuda_parts.calibration,
        "sweeping": cuda_parts.sweeping,
        "specs": cuda_parts.bytes_of_specs,
    }[name]


def print_part(bout: Bout, name: str) -> None:
    """A part as a table, line by line as it is measured."""
    part = part_of(name, bout)
    columns = (part.__doc__ or "").split(" | ")
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for line in part(bout):
        print(f"| {' | '.join(map(str, line))} |", flush=True)


def main() -> None:
    """Print all tables, what had no time, and what does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part; repeat it for several")
    parser.add_argument("--gigabytes", type=float, default=2.2, help="of the decoder that commands prune")
    parser.add_argument("--minutes", type=float, default=9.5, help="after which nothing new is begun")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script")
    asked = parser.parse_args()
    ends = time.monotonic() + 60 * asked.minutes
    asked.scratch.mkdir(parents=True, exist_ok=True)
    bout = Bout(asked.scratch.resolve(), asked.device, asked.small, asked.gigabytes, ends)
    for name in asked.only or PARTS:
        print_part(bout, name)
    for what in bout.left_out:
        print(f"left out, no time: {what}")
    for what in bout.failed:
        print(f"does not hold: {what}")
    print("\nall checks hold" if not bout.failed else f"\n{len(bout.failed)} checks do not hold")
    sys.exit(bool(bout.failed))


if __name__ == "__main__":
    main()
