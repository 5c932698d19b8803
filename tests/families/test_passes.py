"""Every chunk of every shipped spec is plain data: other processes do it, to the same bytes."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from sparseprune.execution import runner
from tests.commands import ok, silent
from tests.execution.elsewhere import PoolRunner, one_thread
from tests.families.checkpoints import Checkpoint, write_statistics
from tests.families.test_library import OPTIONS, SERVED
from tests.limits import narrow

pytestmark = pytest.mark.usefixtures("untraced")


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), one_thread) as processes:
        yield processes


@pytest.mark.parametrize("spec", SERVED)
def test_chunks_that_other_processes_do_give_the_same_output(
    spec: str,
    checkpoint_of: Callable[[str], Checkpoint],
    pool: ProcessPoolExecutor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense = checkpoint_of(SERVED[spec][0])
    monkeypatch.chdir(tmp_path)
    write_statistics(dense, tmp_path)
    narrow(monkeypatch, 4096, 1024)  # several chunks a pass
    words = ("apply", dense.folder, spec, "-q", "--mask-format", "packed", *OPTIONS.get(spec, ()))
    ok(*words, "-o", tmp_path / "here")
    monkeypatch.setattr(PoolRunner, "pool", pool, raising=False)
    monkeypatch.setattr(PoolRunner, "done", [])
    monkeypatch.setattr(runner, "Runner", PoolRunner)
    silent(*words, "-o", tmp_path / "there")
    assert len(PoolRunner.done) > 1
    here, there = (contents(tmp_path / name) for name in ("here", "there"))
    assert here == there


def contents(folder: Path) -> dict[str, bytes]:
    """All files of an output but the report, which says how long the run took."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "report.json"
    }
