"""Programs: the work of a task as steps of items that may run side by side.

Owns the words that the ways of working (runs, counted, summed, tiled, streamed) and the executor share. A
program yields a step and gets the results of its items, in their order; the next step is made from them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparseprune.execution.passes import Chunk, Pass

if TYPE_CHECKING:
    from sparseprune.checkpoint import StoredTensor
    from sparseprune.execution.limits import Limits
    from sparseprune.execution.tensor_io import TensorIO


@dataclass(frozen=True, slots=True)
class Item:
    """A piece of work: a function without arguments, called once from any thread.

    `nbytes` of the input that it gets done, for progress; `memory` that it takes meanwhile, in bytes. Where
    it writes it has a `key`, unique in its program: its result, then outcomes as JSON can say them, is noted
    under it, and a run that continues does not call it again.
    """

    work: Callable[[], Any]
    nbytes: int = 0
    memory: int = 0
    key: str = ""


Step = Iterable[Item]
Program = Generator[Step, list[Any], None]


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a program works: the tensors by name, the traffic, the limits, the device of the torch engine.

    `recall` gives what was noted under a key in an earlier run, `note` keeps something for a later one, with
    the bytes of input that passed for it. `passed` is told bytes that are done, and of what, by long items.
    `check` is called by items between steps that take long; it raises GivenUpError where the run ends.
    """

    tensors: Mapping[str, StoredTensor]
    traffic: TensorIO
    limits: Limits
    device: str
    recall: Callable[[str], Any]
    note: Callable[[str, Any, int], None]
    passed: Callable[[int, str], None]
    check: Callable[[], None] = lambda: None


class ProgramPass(Pass):
    """A step of a program as a pass, until all programs are passes themselves. Not to be pickled."""

    def __init__(self, program: Program, results: list[Any] | None = None) -> None:
        self._program = program
        self._results = results
        self._ended = False

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:  # noqa: ARG002
        try:
            step = next(self._program) if self._results is None else self._program.send(self._results)
        except StopIteration:
            self._ended = True
            return
        for item in step:
            yield Chunk(item.work, item.nbytes, item.memory, item.key)

    def work(self, chunk: Chunk, io: TensorIO) -> Any:  # noqa: ANN401, ARG002
        return chunk.about()

    def merge(self, partials: list[Any], io: TensorIO) -> Pass | None:  # noqa: ARG002
        return None if self._ended else ProgramPass(self._program, partials)
