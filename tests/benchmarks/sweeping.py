"""What pruning with a text takes: resident memory layer by layer, and time beside `calibrate` and `apply`.

Run by hand: `python -m tests.benchmarks.sweeping SCRATCH [--only PART]`; results are in README.md beside this
file. SCRATCH takes 60 GB for the part `larger`, 6 GB for the others; checkpoints are kept for the next time.
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.benchmarks.checkpoints import INDEX, SHARD_BYTES, Decoder, write, write_hollow
from tests.benchmarks.pipeline import SPARSEPRUNE, mebibytes, table

SMALL = Decoder(512, 512, 8, 2, 4000, num_hidden_layers=24)
USUAL = Decoder(2048, 5632, 32, 4, 32000, num_hidden_layers=22)  # 1.1e9 parameters
LARGE = Decoder(4096, 11008, 32, 8, 32000, num_hidden_layers=78)  # 28 GB
TOLD_AT = (1, 4, 12, 24)  # finished layers
SECONDS = 0.2  # between two looks at a process
WORDS = 60_000  # of text
TUNE = 6  # steps
SPEC = """version = 1

[reconstruct]
file = "stats"
method = "admm"
effort = "fast"

[scope.matrix]
{which}
block = [1, 1]
shape = [1, 4]
nnz = 2
"""
MATRICES = 'structure = "matrices"'
# The last layer is one of them: a sweep ends with the last layer that is pruned.
KEYS = 'tensors = "model.layers.{{layer:0|{last}}}.self_attn.k_proj.weight"'


@dataclass
class Watched:
    """A process that has ended: seconds, the most resident memory, and that by finished layers, in bytes."""

    seconds: float = 0.0
    peak: int = 0
    within: dict[int, int] = field(default_factory=dict)

    @property
    def cells(self) -> tuple[str, str]:
        """Seconds, and the peak in MiB."""
        return f"{self.seconds:.0f}", mebibytes(self.peak)


@dataclass(frozen=True)
class Bench:
    """A folder to work in, and how many layers models have at most."""

    scratch: Path
    layers: int | None

    def model(self, name: str, sizes: Decoder, *, hollow: bool = False) -> tuple[Path, Path]:
        """A checkpoint with a tokenizer, and a text of its words; written unless they are there."""
        folder, text = self.scratch / name, self.scratch / f"{name}.txt"
        if not (folder / "tokenizer.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            if hollow:
                write_hollow(folder, sizes, (0, sizes.num_hidden_layers - 1))
            else:
                write(folder, sizes, torch.bfloat16, SHARD_BYTES)
            draw = random.Random(0)
            text.write_text(" ".join(f"w{draw.randrange(sizes.vocab_size)}" for _ in range(WORDS)))
            write_tokenizer(folder, sizes.vocab_size)
        return folder, text

    def spec(self, which: str) -> Path:
        """2:4 in these tensors, rebuilt."""
        path = self.scratch / "spec.toml"
        path.write_text(SPEC.format(which=which))
        return path

    def run(self, name: str, *words: object) -> Watched:
        """A command to its end; its output goes to `out`, and is removed before the next one."""
        out, log = self.scratch / "out", self.scratch / f"{name}.log"
        shutil.rmtree(out, ignore_errors=True)
        command = [*SPARSEPRUNE, *map(str, words), *(() if words[0] == "eval" else ("-o", str(out)))]
        journal = self.scratch / ".out.sparseprune-partial" / "journal"
        found, began = Watched(), time.monotonic()
        with log.open("wb") as said:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
            while process.poll() is None:
                look(process.pid, journal, found)
                time.sleep(SECONDS)
        found.seconds = time.monotonic() - began
        if process.returncode:
            raise SystemExit(f"{name}: exit {process.returncode}, see {log}")
        return found

    def planned(self, *words: object) -> str:
        """MiB that `plan` expects a run to need at most."""
        command = [*SPARSEPRUNE, "plan", *map(str, words), "--json"]
        done = subprocess.run(command, capture_output=True, check=True)
        return mebibytes(json.loads(done.stdout)["bytes"]["peak"])


def look(process: int, journal: Path, found: Watched) -> None:
    """Note the resident memory of a process, beside the layers that its journal has."""
    status = Path(f"/proc/{process}/status").read_text()
    kilobytes = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", status))
    if len(kilobytes) < 2:  # it has ended
        return
    found.peak = max(found.peak, int(kilobytes["VmHWM"]) << 10)
    done = journal.read_bytes().count(b'"block ') if journal.exists() else 0
    found.within[done] = max(found.within.get(done, 0), int(kilobytes["VmRSS"]) << 10)


def write_tokenizer(folder: Path, words: int) -> None:
    """A tokenizer of words between spaces: w0, w1 and so on."""
    model = {"type": "WordLevel", "vocab": {f"w{number}": number for number in range(words)}}
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    own = {"pre_tokenizer": {"type": "WhitespaceSplit"}, "model": {**model, "unk_token": "w0"}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    whole = {"version": "1.0", "added_tokens": [], **parts, **own}
    (folder / "tokenizer.json").write_text(json.dumps(whole))  # last: it says that all is there


def windows(text: Path, sequences: int, length: int) -> tuple[object, ...]:
    return ("--text", text, "--sequences", sequences, "--length", length)


def growth(bench: Bench) -> Iterator[Sequence[str]]:
    """in layer | most resident MiB | with layers tuned"""
    dense, text = bench.model("small", SMALL)
    usual = (dense, bench.spec(MATRICES), *windows(text, 16, 256), "--jobs", 1, "--no-masks")
    ways = [usual, (*usual, "--tune", TUNE)]
    found = [bench.run("growth", "apply", *asked) for asked in ways]
    for layer in TOLD_AT:
        yield str(layer), *(mebibytes(one.within.get(layer - 1, 0)) for one in found)
    yield "the whole run", *(mebibytes(one.peak) for one in found)
    yield "told by `plan --text`", *(bench.planned(*asked) for asked in ways)


def usual(bench: Bench) -> Iterator[Sequence[str]]:
    """command | seconds | peak MiB"""
    layers = min(bench.layers or USUAL.num_hidden_layers, USUAL.num_hidden_layers)
    sizes = Decoder(**{**vars(USUAL), "num_hidden_layers": layers})
    dense, text = bench.model(f"usual-{layers}", sizes)
    spec, stats = bench.spec(MATRICES), bench.scratch / "stats"
    shutil.rmtree(stats, ignore_errors=True)
    swept = bench.run("swept", "apply", dense, spec, *windows(text, 16, 256), "--no-masks")
    yield f"apply --text, {layers} layers", *swept.cells
    taken = bench.run("calibrate", "calibrate", dense, *windows(text, 16, 256))
    yield "calibrate", *taken.cells
    (bench.scratch / "out").rename(stats)
    asked = (dense, spec, "--stats", stats, "--memory", "4GB", "--no-masks")  # of one matrix and its moment
    applied = bench.run("applied", "apply", *asked)
    yield "apply --stats", *applied.cells


def itself(bench: Bench) -> Iterator[Sequence[str]]:
    """command | seconds | peak MiB"""
    dense, text = bench.model(f"usual-{USUAL.num_hidden_layers}", USUAL)
    for against in ((), ("--against", dense)):
        found = bench.run("eval", "eval", dense, *against, *windows(text, 16, 256))
        yield " ".join(["eval", *map(str, against[:1])]), *found.cells


def larger(bench: Bench) -> Iterator[Sequence[str]]:
    """GB | of this machine's memory, GB | --memory | seconds | peak MiB"""
    sizes = LARGE if bench.layers is None else Decoder(**{**vars(LARGE), "num_hidden_layers": bench.layers})
    dense, text = bench.model(f"large-{sizes.num_hidden_layers}", sizes, hollow=True)
    spec = bench.spec(KEYS.format(last=sizes.num_hidden_layers - 1))
    asked = (dense, spec, *windows(text, 2, 64), "--memory", "4GB", "--no-masks")
    found = bench.run("larger", "apply", *asked)
    size = json.loads((dense / INDEX).read_text())["metadata"]["total_size"] / 1e9
    whole = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    there = int(whole[1]) * 1024 / 1e9 if whole else 0
    yield f"{size:.1f}", f"{there:.1f}", "4GB", *found.cells
    shutil.rmtree(bench.scratch / "out")


PARTS: dict[str, Callable[[Bench], Iterable[Sequence[str]]]] = {
    "growth": growth,
    "usual": usual,
    "eval": itself,
    "larger": larger,
}


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--only", choices=PARTS, action="append", help="this part; repeat it for several")
    parser.add_argument("--layers", type=int, help="of `usual` and `larger`, to take less time")
    asked = parser.parse_args()
    asked.scratch.mkdir(parents=True, exist_ok=True)
    bench = Bench(asked.scratch.resolve(), asked.layers)
    for name in asked.only or PARTS:
        part = PARTS[name]
        table(part.__doc__ or "", part(bench))


if __name__ == "__main__":
    main()
