"""Checkpoints of hundreds of gigabytes, whose files are holes: what their plan takes, and how work is cut."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.execution.on_paper import OnPaper
from tests.layouts import DEEPSEEK_V3, KIMI_K2, Layout, nbytes_of, on_disk, shards_of, with_layers, write

MEMORY = 640 << 20
KIMI_IN_PART, DEEPSEEK_IN_PART = with_layers(KIMI_K2, 5), with_layers(DEEPSEEK_V3, 8)
MB = 1_000_000


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from written(DEEPSEEK_V3, tmp_path_factory.mktemp("paper"))


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from written(DEEPSEEK_IN_PART, tmp_path_factory.mktemp("paper"))


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from written(KIMI_IN_PART, tmp_path_factory.mktemp("paper"))


def written(layout: Layout, at: Path) -> Iterator[Path]:
    """A checkpoint in a folder; its data are holes before and after."""
    folder = at / layout.name
    write(layout, folder)
    taken = on_disk(folder)
    assert taken < 64 * MB
    yield folder
    assert on_disk(folder) == taken
    assert sorted(at.iterdir()) == [folder]


def on_paper(folder: Path, spec: str, every: int) -> OnPaper:
    """What a process finds that is started for it."""
    module = "tests.execution.on_paper"
    command = [sys.executable, "-m", module, str(folder), spec, str(MEMORY), str(every)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return OnPaper(**json.loads(done.stdout))


def index_bytes(folder: Path) -> int:
    """The bytes of the index, which an output has as it is; config.json gets a mark."""
    return (folder / "model.safetensors.index.json").stat().st_size


def test_layouts_are_those_of_the_published_models() -> None:
    sizes = [sum(map(nbytes_of, shard)) for shard in shards_of(DEEPSEEK_V3)]
    assert (len(list(DEEPSEEK_V3.tensors())), len(sizes)) == (91_991, 163)
    assert sum(sizes) == 688_574_839_360
    assert max(sizes) < 1.2 * min(sizes)
    sizes = [sum(map(nbytes_of, shard)) for shard in shards_of(KIMI_K2)]
    assert (len(list(KIMI_K2.tensors())), len(sizes)) == (139_583, 61)
    assert sum(sizes) == 1_029_173_249_888


def test_chunks_of_a_checkpoint_write_every_byte_once_each_to_one_file(layers: Path) -> None:
    found = on_paper(layers, "2of4", every=1)
    assert found.written + found.copied == found.nbytes + index_bytes(layers)
    assert (found.split, len(found.batches)) == (0, DEEPSEEK_IN_PART.shards)
    assert found.chunks > 50_000
    check_bounds(found)


def test_blocks_that_lie_in_several_files_of_a_whole_checkpoint_are_cut_in_chunks_of_one_file(
    deepseek: Path,
) -> None:
    found = on_paper(deepseek, "mlp-channels", every=50)
    assert found.tensors == 91_991
    assert (found.split, len(found.batches)) == (0, 163)
    assert 0 < found.written < found.nbytes
    check_bounds(found)


def test_experts_that_lie_in_several_files_are_cut_in_chunks_of_one_file(layers: Path) -> None:
    found = on_paper(layers, "experts", every=1)
    assert (found.split, len(found.batches)) == (0, DEEPSEEK_IN_PART.shards)
    assert 0 < found.written < found.nbytes
    check_bounds(found)


def test_one_competition_over_a_whole_model_is_cut_file_by_file(kimi: Path) -> None:
    found = on_paper(kimi, "unstructured-global", every=1)
    assert found.jobs == 1
    assert found.written + found.copied == found.nbytes + index_bytes(kimi)
    assert (found.split, len(found.batches)) == (0, KIMI_IN_PART.shards)
    check_bounds(found)


def check_bounds(found: OnPaper) -> None:
    """No data are read, memory is what the plan tells, batches are alike, and little is sent for each."""
    assert found.read < 256 * MB < found.nbytes / 100
    assert found.planned < 60  # on a machine that does much else
    assert found.peak <= found.peak_listed < found.told < MEMORY
    assert found.largest < 1.5 * found.median
    assert found.largest_chunk < 1000
    assert found.sent < MB
