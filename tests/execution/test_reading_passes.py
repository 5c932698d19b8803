"""Chunks of inspect and compare are plain data: another process finds the same in them."""

import multiprocessing
import pickle
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseprune.checkpoint import StoredTensor, TensorReader, lay_out, open_checkpoint
from sparseprune.checkpoint.statistics import Statistic
from sparseprune.execution.compare import MeasureErrors, Pair, compare_jobs
from sparseprune.execution.inspect import BLOCKS, PATTERNS, Pattern, Questions, inspect_jobs
from sparseprune.execution.regions import Resources
from sparseprune.execution.runner import Job, read_through
from sparseprune.execution.tensor_io import TensorIO
from tests.execution.elsewhere import MOST, do

SLAB = 4096
SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "a": ("BF16", (96, 130)), "b": ("F32", (7,)), "c": ("BF16", (6, 40)), "d": ("BF16", (6, 40)),
    "e": ("F4", (2, 8)), "f": ("I8", (3, 64, 64)), "g": ("F32", (0, 4)), "h": ("F32", (30, 30)),
    "moment": ("F32", (30, 30)),
}  # fmt: skip


def written(path: Path, share: float) -> Mapping[str, StoredTensor]:
    """Tensors of which a share is not zero; small ones beside each other, and larger than a slab."""
    drawn = np.random.default_rng(0)
    header = lay_out([(name, dtype, shape) for name, (dtype, shape) in SHAPES.items()], {})
    data = []
    for entry in header.entries:
        numbers = drawn.integers(1, 60, entry.nbytes, dtype=np.uint8)
        numbers[drawn.random(entry.nbytes // 4).repeat(4) > share] = 0
        data.append(numbers.tobytes() if entry.name != "moment" else np.eye(30, dtype=np.float32).tobytes())
    path.write_bytes(header.raw + b"".join(data))
    return open_checkpoint(path).tensors


def results_elsewhere(jobs: Iterable[Job]) -> dict[int, Any]:
    """What the chunks find in processes that know nothing else."""
    results = {}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool, TensorReader() as reader:
        io = TensorIO(reader)
        for job in jobs:
            chunks = list(job.first.chunks(io))
            assert all(len(pickle.dumps(chunk)) < MOST for chunk in chunks)
            works = [pickle.dumps((job.first, chunk, {}, "cpu")) for chunk in chunks]
            partials = [pickle.loads(found)[0] for found in pool.map(do, works)]
            results[job.order] = job.first.merge(partials, io)
    return results


def results_here(jobs: Iterable[Job]) -> dict[int, Any]:
    with TensorReader() as reader:
        return read_through(jobs, TensorIO(reader), Resources(2, 1 << 20), lambda *_: None)


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Mapping[str, StoredTensor], Mapping[str, StoredTensor]]:
    return written(tmp_path / "dense.safetensors", 1), written(tmp_path / "pruned.safetensors", 0.3)


def test_chunks_of_inspect_find_the_same_in_another_process(
    sides: tuple[Mapping[str, StoredTensor], Mapping[str, StoredTensor]],
) -> None:
    questions = Questions((*PATTERNS, Pattern(2, 4, 0), Pattern(1, 3, -3)), BLOCKS)
    tensors = tuple(sides[1].values())
    jobs = list(inspect_jobs(tensors, questions, SLAB))
    assert len(jobs) > 4
    here = results_here(jobs)
    assert results_elsewhere(jobs) == here
    assert [one.name for order in sorted(here) for one in here[order]] == list(SHAPES)


def test_chunks_of_compare_find_the_same_in_another_process(
    sides: tuple[Mapping[str, StoredTensor], Mapping[str, StoredTensor]],
) -> None:
    pairs = [Pair(sides[0][name], sides[1][name]) for name in SHAPES]
    jobs = list(compare_jobs(pairs, SLAB))
    outputs = MeasureErrors(pairs[-2], Statistic(sides[0]["moment"], "hessian", 1))
    jobs.append(Job(len(pairs), "outputs", "h", outputs))
    here = results_here(jobs)
    assert results_elsewhere(jobs) == here
    assert [one.name for order in sorted(here)[:-1] for one in here[order]] == list(SHAPES)
    assert 0 < here[len(pairs)].outputs < 2
