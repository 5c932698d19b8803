"""Passes and chunks: the one form in which every command describes its work.

A pass is plain, picklable data that lists chunks, does one chunk anywhere, and merges what the chunks gave. A
runner owns order, memory, threads, notes and failures; a pass knows none of them. Passes are defined by the
modules that decide, cut, verify and inspect, and done by runner.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sparseprune.execution.tensor_io import TensorIO


class GivenUpError(BaseException):
    """The run ends while a chunk is at work, and does not wait until that chunk is done."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a pass, done at one time; `about` has its content, in the form of its pass.

    `nbytes` of the input are done with it, for progress; it takes `memory` bytes meanwhile. A chunk that
    writes has a `key`, unique among the passes of its job: its partial result, then a list of outcomes as
    JSON has them, is noted under the key, and a run that continues does not do the chunk again. `files` are
    those of the output that it writes, for runners that give each file one writer.
    """

    about: Any = None
    nbytes: int = 0
    memory: int = 0
    key: str = ""
    files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """What the passes so far decided, for which `nbytes` of the input were read.

    The value is made of JSON's values and of one-dimensional numpy arrays of 0 and 1 (uint8).
    """

    value: Any
    nbytes: int = 0


class Pass(ABC):
    """One step of a job over chunks that are independent of each other. Subclasses are frozen dataclasses."""

    __slots__ = ()

    @property
    def decides(self) -> str:
        """The name of the decision that this pass and those after it make; "" where they make none.

        A runner that knows the decision from an earlier run goes on with `decided` at once.
        """
        return ""

    @abstractmethod
    def chunks(self, io: TensorIO) -> Iterable[Chunk]:
        """The chunks in their order; made as they are needed."""

    @abstractmethod
    def work(self, chunk: Chunk, io: TensorIO) -> Any:  # noqa: ANN401  (each pass has its own)
        """Do one chunk and give its partial result. Reads and writes through `io` alone; any process may."""

    def total(self) -> Any:  # noqa: ANN401
        """What `add` adds the partial results to as they come, so that none is kept; None if all are kept."""
        return None

    def add(self, total: Any, partial: Any) -> Any:  # noqa: ANN401, ARG002
        """The total with one more partial result; they come in any order, and only one at a time is added."""
        return total

    def merge(self, partials: list[Any], io: TensorIO) -> Any:  # noqa: ANN401, ARG002
        """What follows from the partial results, in the order of the chunks; those with a key are left out.

        Where there is a `total`, it is the only partial result. A further Pass, a Decision, or the result of
        the job follows; None where chunks have written all there is.
        """
        return None

    def decided(self, value: Any) -> Pass | None:  # noqa: ANN401, ARG002
        """The pass that follows a decision, from this run or noted by an earlier one; None if it is none."""
        return None
