"""The runner: work side by side within memory, errors in order, decisions noted, a disk that is heard."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from msgspec.structs import replace
from safetensors.torch import save_file

from sparseprune.checkpoint import StagedOutput, TensorReader
from sparseprune.checkpoint.output import Notes, note_text
from sparseprune.execution import runner
from sparseprune.execution.passes import Chunk, Decision, GivenUpError, Outcomes, Pass
from sparseprune.execution.regions import INTERPRETER, TORCH, TORCH_THREAD
from sparseprune.execution.runner import Copying, Job, Runner
from sparseprune.execution.tensor_io import TensorIO
from tests.checkpoint.files import layout_of, single
from tests.commands import ok, run
from tests.faults import failing
from tests.samples import TWO_OF_FOUR, mlp_tensors, write_spec

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from sparseprune.execution.tensor_io import Loaded, Mask

Call = Callable[[], Any]


@dataclass(frozen=True)
class Calls(Pass):
    """Chunks that are calls, and what follows from what they give; `name` is that of a decision."""

    calls: tuple[Chunk, ...]
    then: Callable[[list[Any]], Any] = lambda _: None
    name: str = ""
    after: Callable[[Any], Pass | None] = lambda _: None

    @property
    def decides(self) -> str:
        return self.name

    def chunks(self, io: TensorIO) -> Iterable[Chunk]:
        return self.calls

    def work(self, chunk: Chunk, io: TensorIO) -> Any:
        return chunk.about()

    def merge(self, partials: list[Any], io: TensorIO) -> Any:
        return self.then(partials)

    def decided(self, value: Any) -> Pass | None:
        return self.after(value)


@dataclass
class Heard:
    """What is known beforehand, and what the runner tells."""

    before: set[str] = field(default_factory=set)
    done_keys: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def known(self, key: str) -> bool:
        return key in self.before

    def done(self, chunk: Chunk, key: str, label: str, partial: Any) -> None:
        self.done_keys.append(key)

    def recall(self, key: str) -> Any:
        return self.notes.get(key)

    def note(self, key: str, value: Any, nbytes: int) -> None:
        self.notes[key] = json.loads(json.dumps(value))


def calls(*made: Call | Chunk, **others: Any) -> Calls:
    return Calls(tuple(one if isinstance(one, Chunk) else Chunk(one) for one in made), **others)


def job(first: Pass, held: int = 0, key: str = "a") -> Job:
    return Job(0, key, "", first, held)


def work(*given: Job, memory: int = 100, workers: int = 4, heard: Heard | None = None) -> dict[int, Any]:
    numbered = [replace(one, order=number) for number, one in enumerate(given)]
    done = Runner(numbered, TensorIO(TensorReader()), heard or Heard(), memory)
    done.run(workers)
    return done.results


@pytest.fixture
def command(tmp_path: Path) -> tuple[object, ...]:
    save_file(mlp_tensors(), tmp_path / "m.safetensors")
    return ("apply", tmp_path / "m.safetensors", write_spec(tmp_path, TWO_OF_FOUR))


def test_passes_get_the_partial_results_of_the_one_before_in_the_order_of_its_chunks() -> None:
    seen: list[list[int]] = []

    def slow(number: int) -> int:
        time.sleep(0.002 * (4 - number))
        return number

    def second(partials: list[int]) -> Pass:
        seen.append(partials)
        return calls(lambda: sum(partials), then=third)

    def third(partials: list[int]) -> Pass:
        seen.append(partials)
        return calls(then=seen.append)

    assert work(job(calls(*(lambda n=n: slow(n) for n in range(4)), then=second))) == {}
    assert seen == [[0, 1, 2, 3], [6], []]


@dataclass(frozen=True)
class Sum(Calls):
    """Adds up what its calls give, as they give it."""

    def total(self) -> Any:
        return 0

    def add(self, total: Any, partial: Any) -> Any:
        return total + partial


def test_where_there_is_a_total_partial_results_are_added_to_it_and_it_alone_is_merged() -> None:
    adding = Sum(tuple(Chunk(lambda n=n: n) for n in range(5)), lambda partials: partials)
    assert work(job(adding), job(Sum((), lambda partials: partials))) == {0: [10], 1: [0]}


def test_what_fails_while_it_is_added_ends_the_run() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        work(job(Sum((Chunk(lambda: None),))))


def test_what_the_last_pass_of_a_job_merges_to_is_its_result() -> None:
    jobs = (job(calls(partial(int, n), lambda: 10, then=sum)) for n in range(3))
    assert work(*jobs) == {0: 10, 1: 11, 2: 12}


def test_what_is_in_flight_stays_within_memory() -> None:
    lock = threading.Lock()
    now, most = 0, 0
    wanted = 80
    together = threading.Event()

    def busy(size: int) -> None:
        nonlocal now, most
        with lock:
            now += size
            most = max(most, now)
            if now >= wanted:
                together.set()
        together.wait(60)  # as many as may be are there at one time, however slow threads begin
        time.sleep(0.002)
        with lock:
            now -= size

    chunks = [Chunk(lambda: busy(40), memory=40) for _ in range(20)]
    work(*(job(calls(*chunks[number::4])) for number in range(4)), memory=100)
    assert most == 80
    most, wanted = 0, 40
    work(job(calls(*chunks), held=70), memory=100)  # what a job holds counts as well
    assert most == 40


def test_a_chunk_larger_than_all_memory_runs_alone() -> None:
    running = threading.Semaphore(1)
    heard = Heard()

    def alone() -> None:
        assert running.acquire(blocking=False)
        time.sleep(0.002)
        running.release()

    work(job(calls(*(Chunk(alone, memory=500) for _ in range(5)))), heard=heard)
    assert len(heard.done_keys) == 5


def test_known_chunks_are_passed_over_and_the_others_are_told() -> None:
    called: list[str] = []
    heard = Heard(before={"a.y"})
    chunks = [Chunk(lambda key=key: called.append(key), key=key) for key in "xyz"]
    work(job(calls(*chunks)), heard=heard, workers=1)
    assert called == ["x", "z"]
    assert heard.done_keys == ["a.x", "a.z"]


@pytest.mark.parametrize(
    "value", [[3, 1 << 63], "all", 0.1, np.array([1, 0, 1, 1, 0, 0, 0, 1, 1], dtype=np.uint8)], ids=str
)
def test_a_decision_is_noted_and_what_leads_to_it_is_not_done_again(value: Any) -> None:
    heard, asked, given = Heard(), [], []

    def last(decided: Any) -> Pass:
        given.append(decided)
        return calls(lambda: "done", then=list)

    def search() -> None:
        asked.append("search")

    first = calls(search, then=lambda _: Decision(value, 5), name="cut", after=last)
    for _ in range(2):
        assert work(job(first), heard=heard) == {0: ["done"]}
    assert asked == ["search"]
    assert list(heard.notes) == ["a.cut"]
    assert all(np.array_equal(one, value) and type(one) is type(value) for one in given)


@pytest.mark.parametrize("noted", [{"flags": "~", "count": 3}, {"flags": 1}, {"count": 8}, "junk"])
def test_a_note_that_is_no_decision_is_searched_again(noted: Any) -> None:
    heard = Heard(notes={"a.cut": noted})

    def last(decided: Any) -> Pass | None:
        return calls(then=lambda _: decided) if decided == 7 else None

    first = calls(then=lambda _: Decision(7), name="cut", after=last)
    assert work(job(first), heard=heard) == {0: 7}
    assert heard.notes == {"a.cut": 7}


def test_of_several_failures_the_first_in_the_order_of_the_jobs_is_raised_and_nothing_new_is_begun() -> None:
    later = threading.Event()
    begun: list[int] = []

    def first() -> None:
        assert later.wait(10)
        raise MemoryError("first")

    def second() -> None:
        later.set()
        raise MemoryError("second")

    rest = [lambda n=n: begun.append(n) for n in range(100)]
    with pytest.raises(MemoryError, match="first"):
        work(job(calls(first)), job(calls(second)), job(calls(*rest)), workers=2)
    assert not begun


def test_a_chunk_at_work_is_given_up_where_something_else_ends_the_run() -> None:
    given_up, begun = threading.Event(), threading.Event()
    told: list[str] = []

    def wait() -> None:
        begun.set()
        assert given_up.wait(10)
        raise GivenUpError

    def end() -> None:
        assert begun.wait(10)
        running.give_up(OSError("the disk"))

    first = calls(Chunk(wait, memory=60), end, *(lambda: told.append("begun"),) * 3)
    running = Runner([job(first)], TensorIO(TensorReader()), Heard(), 100, given_up)
    with pytest.raises(OSError, match="the disk"):
        running.run(2)
    assert told == []


@pytest.mark.parametrize("others", [0, 1])
def test_a_pass_that_fails_to_merge_fails_the_run(others: int) -> None:

    with pytest.raises(ZeroDivisionError):
        work(
            *[job(calls(lambda: 2))] * others,
            job(calls(lambda: 1, then=failing(ZeroDivisionError))),
            job(calls(lambda: 2)),
        )


def test_a_disk_that_fails_while_the_work_goes_on_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[object, ...]
) -> None:
    failed = threading.Event()

    def fail(_: int) -> None:
        failed.set()
        raise OSError(5, "Input/output error")

    def wait_for_it(*arguments: object) -> object:
        assert failed.wait(10)
        return original(*arguments)

    original: Callable[..., object] = Copying.work
    monkeypatch.setattr(os, "fdatasync", fail)
    monkeypatch.setattr(runner, "_FLUSH_SECONDS", 0.001)
    monkeypatch.setattr(Copying, "work", wait_for_it)
    said = run(*command)
    assert (said.code, said.out) == (3, "")
    assert "Input/output error" in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors", "spec.toml"]


def test_the_first_error_in_the_order_of_the_plan_is_the_one_that_is_told(
    monkeypatch: pytest.MonkeyPatch, command: tuple[object, ...]
) -> None:
    def fail(io: TensorIO, loaded: Loaded, mask: Mask) -> None:
        name = loaded.stored.name
        if name == "0.up.weight":
            time.sleep(0.05)  # fails last, and is told first: 0.down.weight before it is fine
            raise ZeroDivisionError("first")
        if name.startswith("1."):
            raise ZeroDivisionError("later")
        store(io, loaded, mask)

    store = TensorIO.store
    monkeypatch.setattr(TensorIO, "store", fail)
    with pytest.raises(ZeroDivisionError, match="first"):
        run(*command, "--jobs", 4)


def test_what_an_earlier_run_noted_is_forgotten_once_it_is_taken_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    taken: list[Outcomes] = []
    monkeypatch.setattr(Outcomes, "add", lambda self, _: taken.append(self))
    outcome = ["w", "scope.proj", 16, 8, 0, 1.5, 8, 1.0]
    lines = {"0.0.0": [64, [outcome]], "0.0.decision": [0, "abc"], "0.0.1": [64, ["no outcome"]]}
    output = StagedOutput(layout_of(single(tmp_path)))
    output.finished = Notes({key: note_text(key, record) for key, record in lines.items()})
    record = runner.Record(output, Outcomes(), lambda *_: None)
    assert [record.known(key) for key in ("0.0.0", "0.0.1", "0.0.2")] == [True, False, False]
    assert len(taken) == 1
    assert dict(output.finished) == {key: lines[key] for key in ("0.0.decision", "0.0.1")}
    assert record.recall("0.0.decision") == "abc"


def test_what_torch_keeps_for_each_thread_is_taken_from_what_the_runner_may_use(
    monkeypatch: pytest.MonkeyPatch, command: tuple[object, ...], tmp_path: Path
) -> None:
    runners: list[tuple[int, int]] = []

    class Seen(Runner):
        def run(self, workers: int) -> None:
            runners.append((self._memory, workers))
            super().run(workers)

    monkeypatch.setattr(runner, "Runner", Seen)
    ok(*command, "--jobs", 64, "--memory", "300MB", "--force")
    soft = write_spec(tmp_path, TWO_OF_FOUR + 'mode = "soft"\neps = 1e-9\n')
    base = INTERPRETER + TORCH
    for jobs in (1, 4, 64):
        memory = base + 100_000_000
        ok(*command[:2], soft, "--jobs", jobs, "--memory", memory, "--force")
    compiled, *of_torch = runners
    threads = [workers for _, workers in of_torch]
    assert threads[:2] == [1, 4]
    assert 4 < threads[2] < 13  # 8 MiB for each of 64 threads would be more than there is
    for left, workers in of_torch:
        assert 99_000_000 < left + (workers - 1) * TORCH_THREAD < 100_000_000
    assert compiled[1] == 64


def test_torch_keeps_its_threads(tmp_path: Path, command: tuple[object, ...]) -> None:
    import torch

    spec = write_spec(tmp_path, TWO_OF_FOUR.replace("shape = [1, 4]", "shape = [4, 1]"))  # by the engine
    usual = torch.get_num_threads()
    try:
        torch.set_num_threads(5)  # what no sharing of cores among three jobs comes to here
        ok(*command[:2], spec, "--jobs", 3)
        assert torch.get_num_threads() == 5
    finally:
        torch.set_num_threads(usual)
