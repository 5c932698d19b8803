"""The executor: work side by side within memory, errors in order, and a disk that is heard."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import save_file

from sparseprune.checkpoint import StagedOutput
from sparseprune.checkpoint.journal import Notes, note_text
from sparseprune.execution import executor, runs
from sparseprune.execution.crew import Crew
from sparseprune.execution.limits import INTERPRETER, TORCH, TORCH_THREAD
from sparseprune.execution.outcomes import Outcomes
from sparseprune.execution.programs import GivenUpError, Item
from tests.checkpoint.files import layout_of, single
from tests.samples import TWO_OF_FOUR, mlp_tensors, run, write_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from sparseprune.execution.programs import Program


@dataclass(frozen=True)
class Given:
    """A program as the crew wants it."""

    key: str
    program: Program
    held: int = 0
    order: int = 0
    label: str = ""


@dataclass
class Heard:
    """What is known beforehand, and what the crew tells."""

    before: set[str] = field(default_factory=set)
    done_keys: list[str] = field(default_factory=list)

    def known(self, key: str) -> bool:
        return key in self.before

    def done(self, item: Item, key: str, label: str, result: Any) -> None:
        self.done_keys.append(key)


def one_step(*items: Item) -> Program:
    yield items


def work(given: Iterable[Given], *, memory: int = 100, workers: int = 4, heard: Heard | None = None) -> Heard:
    register = heard or Heard()
    numbered = [replace(one, order=number) for number, one in enumerate(given)]
    Crew(numbered, register, memory).run(workers)
    return register


@pytest.fixture
def command(tmp_path: Path) -> tuple[object, ...]:
    save_file(mlp_tensors(), tmp_path / "m.safetensors")
    return ("apply", tmp_path / "m.safetensors", write_spec(tmp_path, TWO_OF_FOUR))


def test_steps_get_the_results_of_the_step_before_in_the_order_of_its_items() -> None:
    seen: list[list[int]] = []

    def slow(number: int) -> int:
        time.sleep(0.002 * (4 - number))
        return number

    def program() -> Program:
        results = yield [Item(lambda n=n: slow(n)) for n in range(4)]  # type: ignore[misc]
        seen.append(results)
        seen.append((yield [Item(lambda: sum(results))]))
        seen.append((yield []))

    work([Given("a", program())])
    assert seen == [[0, 1, 2, 3], [6], []]


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

    items = [Item(lambda: busy(40), memory=40) for _ in range(20)]
    work([Given(str(number), one_step(*items[number::4])) for number in range(4)], memory=100)
    assert most == 80
    most, wanted = 0, 40
    work([Given("a", one_step(*items), held=70)], memory=100)  # what a program holds counts as well
    assert most == 40


def test_an_item_larger_than_all_memory_runs_alone() -> None:
    running = threading.Semaphore(1)

    def alone() -> None:
        assert running.acquire(blocking=False)
        time.sleep(0.002)
        running.release()

    assert len(work([Given("a", one_step(*(Item(alone, memory=500) for _ in range(5))))]).done_keys) == 5


def test_known_items_are_passed_over_and_the_others_are_told() -> None:
    called: list[str] = []
    items = [Item(lambda key=key: called.append(key), key=key) for key in "xyz"]  # type: ignore[misc]
    heard = work([Given("a", one_step(*items))], heard=Heard(before={"a.y"}), workers=1)
    assert called == ["x", "z"]
    assert heard.done_keys == ["a.x", "a.z"]


def test_of_several_failures_the_first_in_the_order_of_the_programs_is_raised_and_nothing_new_is_begun() -> (
    None
):
    later = threading.Event()
    begun: list[int] = []

    def first() -> None:
        assert later.wait(10)
        raise MemoryError("first")

    def second() -> None:
        later.set()
        raise MemoryError("second")

    rest = [Item(lambda n=n: begun.append(n)) for n in range(100)]  # type: ignore[misc]
    with pytest.raises(MemoryError, match="first"):
        work(
            [
                Given("a", one_step(Item(first))),
                Given("b", one_step(Item(second))),
                Given("c", one_step(*rest)),
            ],
            workers=2,
        )
    assert not begun


def test_an_item_at_work_is_given_up_where_something_else_ends_the_run() -> None:
    given_up, begun = threading.Event(), threading.Event()
    told: list[str] = []

    def wait() -> None:
        begun.set()
        assert given_up.wait(10)
        raise GivenUpError

    def end() -> None:
        assert begun.wait(10)
        crew.give_up(OSError("the disk"))

    program = one_step(Item(wait, memory=60), Item(end), *(Item(lambda: told.append("begun")),) * 3)
    crew = Crew([Given("a", program)], Heard(), 100, given_up)
    with pytest.raises(OSError, match="the disk"):
        crew.run(2)
    assert told == []


def test_a_program_that_fails_between_its_steps_fails_the_run() -> None:
    def program() -> Program:
        yield [Item(lambda: 1)]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work([Given("a", program()), Given("b", one_step(Item(lambda: 2)))])


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

    original: Callable[..., object] = executor._copy_program
    monkeypatch.setattr(os, "fdatasync", fail)
    monkeypatch.setattr(executor, "_FLUSH_SECONDS", 0.001)
    monkeypatch.setattr(executor, "_copy_program", wait_for_it)
    said = run(*command)
    assert (said.code, said.out) == (3, "")
    assert "Input/output error" in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors", "spec.toml"]


def test_the_first_error_in_the_order_of_the_plan_is_the_one_that_is_told(
    monkeypatch: pytest.MonkeyPatch, command: tuple[object, ...]
) -> None:
    def fail(loaded: Any, *arguments: Any) -> None:
        name = loaded.box.stored.name
        if name == "0.up.weight":
            time.sleep(0.05)  # fails last, and is told first: 0.down.weight before it is fine
            raise ZeroDivisionError("first")
        if name.startswith("1."):
            raise ZeroDivisionError("later")
        cut(loaded, *arguments)

    cut = runs._cut
    monkeypatch.setattr(runs, "_cut", fail)
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
    record = executor.Record(output, Outcomes(), lambda *_: None)
    assert [record.known(key) for key in ("0.0.0", "0.0.1", "0.0.2")] == [True, False, False]
    assert len(taken) == 1
    assert dict(output.finished) == {key: lines[key] for key in ("0.0.decision", "0.0.1")}
    assert record.recall("0.0.decision") == "abc"


def test_what_torch_keeps_for_each_thread_is_taken_from_what_the_crew_may_use(
    monkeypatch: pytest.MonkeyPatch, command: tuple[object, ...], tmp_path: Path
) -> None:
    crews: list[tuple[int, int]] = []

    class Seen(Crew):
        def run(self, workers: int) -> None:
            crews.append((self._memory, workers))
            super().run(workers)

    monkeypatch.setattr(executor, "Crew", Seen)
    assert run(*command, "--jobs", 64, "--memory", "300MB", "--force").code == 0
    soft = write_spec(tmp_path, TWO_OF_FOUR + 'mode = "soft"\n')
    base = INTERPRETER + TORCH
    for jobs in (1, 4, 64):
        memory = base + 100_000_000
        assert run(*command[:2], soft, "--jobs", jobs, "--memory", memory, "--force").code == 0
    compiled, *of_torch = crews
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
        assert run(*command[:2], spec, "--jobs", 3).code == 0
        assert torch.get_num_threads() == 5
    finally:
        torch.set_num_threads(usual)
