"""Every chunk of every shipped spec is plain data: other processes do it, to the same bytes."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from sparseprune.execution import runner
from tests.commands import silent
from tests.execution.elsewhere import PoolRunner, one_thread
from tests.families.conftest import Applied
from tests.families.test_library import SERVED

pytestmark = pytest.mark.usefixtures("untraced")


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), one_thread) as processes:
        yield processes


@pytest.mark.parametrize("spec", SERVED)
def test_chunks_that_other_processes_do_give_the_same_output(
    spec: str, applied: Applied, pool: ProcessPoolExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PoolRunner, "pool", pool, raising=False)
    monkeypatch.setattr(PoolRunner, "done", [])
    monkeypatch.setattr(runner, "Runner", PoolRunner)
    silent("apply", applied.dense, *applied.words, "-o", tmp_path / "there")
    assert len(PoolRunner.done) > 1
    assert contents(tmp_path / "there") == contents(applied.folder)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of an output but the report, which says how long the run took."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "report.json"
    }
