"""Verify in other processes: every chunk pickles, and gives there what it gives here."""

import dataclasses
import pickle
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import save_file

from sparseprune.checkpoint import TensorReader, open_checkpoint
from sparseprune.execution.passes import Chunk, Pass
from sparseprune.execution.runner import read_through
from sparseprune.execution.tensor_io import TensorIO
from sparseprune.execution.verify import Check, check_jobs, make_check
from sparseprune.spec import find_spec, parse_spec
from tests.execution.structures import CASES
from tests.families.checkpoints import make
from tests.families.test_library import SERVED
from tests.limits import AMPLE, narrow

pytestmark = pytest.mark.usefixtures("untraced")


@dataclass(frozen=True, eq=False)
class Elsewhere(Pass):
    """A pass whose chunks are done in other processes, which open the checkpoint themselves."""

    inner: Pass
    checkpoint: Path
    pool: ProcessPoolExecutor

    @property
    def decides(self) -> str:
        return self.inner.decides

    def chunks(self, io: TensorIO) -> Iterable[Chunk]:
        return self.inner.chunks(io)

    def work(self, chunk: Chunk, io: TensorIO) -> Any:
        return self.pool.submit(work_here, pickle.dumps((self.inner, chunk)), self.checkpoint).result()

    def total(self) -> Any:
        return self.inner.total()

    def add(self, total: Any, partial: Any) -> Any:
        return self.inner.add(total, partial)

    def merge(self, partials: list[Any], io: TensorIO) -> Any:
        following = self.inner.merge(partials, io)
        return dataclasses.replace(self, inner=following) if isinstance(following, Pass) else following

    def decided(self, value: Any) -> Pass | None:
        following = self.inner.decided(value)
        return None if following is None else dataclasses.replace(self, inner=following)


def work_here(pickled: bytes, checkpoint: Path) -> Any:
    """In a process of the pool: do the chunk of a pass."""
    work, chunk = pickle.loads(pickled)
    return work.work(chunk, opened(checkpoint))


@cache
def opened(checkpoint: Path) -> TensorIO:
    return TensorIO(TensorReader(), tensors=open_checkpoint(checkpoint).tensors)


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as made:
        yield made


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a family of models, made when it is first asked for."""
    return cache(lambda family: make(family, tmp_path_factory.mktemp("dense")).folder)


def assert_same_elsewhere(check: Check, checkpoint: Path, pool: ProcessPoolExecutor) -> None:
    with TensorReader() as reader:
        io = TensorIO(reader, tensors=check.plan.checkpoint.tensors)
        here = read_through(check_jobs(check), io, check.resources, lambda *_: None)
        jobs = (replace(job, first=Elsewhere(job.first, checkpoint, pool)) for job in check_jobs(check))
        assert read_through(jobs, io, check.resources, lambda *_: None) == here
    assert sum(sum(found.scopes.values()) for result in here.values() for found in result) > 0


@pytest.mark.parametrize("spec", list(SERVED)[::3])
def test_chunks_of_shipped_specs_give_the_same_in_another_process(
    spec: str, checkpoint_of: Callable[[str], Path], pool: ProcessPoolExecutor
) -> None:
    source = find_spec(spec)
    dense = checkpoint_of(SERVED[spec][0])
    asked = parse_spec(source.text, source.source, source.directory)
    assert_same_elsewhere(make_check(open_checkpoint(dense), asked, AMPLE, 2), dense, pool)


CHECKED = sorted(CASES.keys() - {"soft", "soft elements", "soft blocks of 4x8", "channels, soft"})


@pytest.mark.parametrize("name", CHECKED[::2])
def test_chunks_of_structures_give_the_same_in_another_process(
    name: str, pool: ProcessPoolExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow(monkeypatch, 64, 16)  # so that there are several chunks, also where blocks are scored
    spec, tensors = CASES[name]
    dense = tmp_path / "dense.safetensors"
    save_file(tensors(torch.bfloat16), dense)
    assert_same_elsewhere(make_check(open_checkpoint(dense), parse_spec(spec), AMPLE, 2), dense, pool)
