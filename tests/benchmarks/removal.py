"""Removal: how large and how fast a model is once channels are gone, and what it still tells.

`python -m tests.benchmarks.removal SCRATCH` prints a Markdown table for all-MiniLM-L6-v2: channels rebuilt by
ADMM and cut out. Statistics stay in SCRATCH. How fast `remove` itself is tells pipeline.py.
"""

import argparse
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tests.benchmarks.reconstruction import encoder_bench, table
from tests.benchmarks.reconstruction_measures import Bench, command

ROUNDS, BATCH, LENGTH = 15, 32, 128


def loaded(folder: Path) -> Any:
    import transformers

    own: Any = transformers
    model, report = own.AutoModel.from_pretrained(folder, output_loading_info=True)
    if any(report.values()):
        raise SystemExit(f"{folder}: not loaded as it is: {report}")
    return model.eval()


def forward_seconds(folders: list[Path]) -> list[float]:
    """Seconds of one forward pass of each model, medians over rounds in which all have their turn."""
    models = [loaded(folder) for folder in folders]
    ids = torch.randint(1000, 20000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    taken: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for number in range(ROUNDS + 1):
            for model, seconds in zip(models, taken, strict=True):
                began = time.perf_counter()
                model(input_ids=ids, attention_mask=torch.ones_like(ids))
                if number:  # the first one is not counted
                    seconds.append(time.perf_counter() - began)
    return [median(seconds) for seconds in taken]


def removed(bench: Bench, sparsity: float) -> tuple[Path, Path]:
    """The checkpoint with zeros, and the smaller one."""
    folders = []
    for verb in ("apply", "remove"):
        out = bench.folder / f"{verb}-{sparsity}"
        words = (bench.dense, "mlp-channels-admm", "--set", f"sparsity={sparsity}", "-o", out)
        command(verb, *words, "--force")
        folders.append(out)
    return folders[0], folders[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("scratch", type=Path)
    bench = encoder_bench(parser.parse_args().scratch.resolve())
    os.chdir(bench.folder)  # where shipped specs look for statistics
    named = {"dense": bench.dense}
    for sparsity in (0.25, 0.5):
        share = f"{sparsity:.0%} of the channels"
        zeros, smaller = removed(bench, sparsity)
        named |= {f"{share} zero": zeros, f"{share} removed": smaller}
    seconds = forward_seconds(list(named.values()))
    rows = []
    for (name, folder), spent in zip(named.items(), seconds, strict=True):
        parameters = sum(parameter.numel() for parameter in loaded(folder).parameters())
        size = (folder / "model.safetensors").stat().st_size
        speed = f"{spent / seconds[0]:.2f}"
        cosine = f"{bench.quality(folder):.3f}"
        rows.append([name, f"{parameters:,}", f"{size / 1e6:.2f}", f"{1000 * spent:.0f}", speed, cosine])
    columns = ["", "parameters", "MB", f"ms for {BATCH} x {LENGTH} tokens", "to dense", "cosine"]
    table("all-MiniLM-L6-v2", columns, rows)


if __name__ == "__main__":
    main()
