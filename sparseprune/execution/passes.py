"""Passes and chunks: the one form in which every command describes its work, and the counts that chunks give.

A pass is plain, picklable data that lists chunks, does one chunk anywhere, and merges what the chunks gave. A
runner owns order, memory, threads, notes and failures; a pass knows none of them. Counts add up to the same
whatever the order in which chunks were finished. Passes are defined by the modules that decide, cut and
count.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from sparseprune.engine.kernels.counting import Tally, exact_sum, share_of_output, totals_in_units
from sparseprune.results.fields import Made

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from types import UnionType

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.execution.plan import Plan, Task
    from sparseprune.execution.tensor_io import Mask, TensorIO


class GivenUpError(BaseException):
    """The run ends while a chunk is at work, and does not wait until that chunk is done."""


class Chunk(Struct, frozen=True):
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


class Decision(Struct, frozen=True):
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


Outcome = list[Any]
"""[tensor, rule, elements reached, pruned, zeros before, energy before, zeros after, energy after].

For a matrix that was reconstructed the energy after is that of its survivors before, and there follow its
output energies: a list of what is lost by the mask alone, what is lost now, and that of the dense matrix,
and the power of two that these three count in. Where it has gradients another list has the same in units of
the loss.
"""
_FORM: tuple[type | UnionType, ...] = (str, str, int, int, int, int | float, int, int | float)


def is_outcome(value: object) -> bool:
    """Whether it may be an outcome that was noted by an earlier run."""
    if not isinstance(value, list) or len(value) < len(_FORM):
        return False
    outputs = value[len(_FORM) :]
    return all(isinstance(one, form) for one, form in zip(value, _FORM, strict=False)) and all(
        isinstance(one, list)
        and len(one) == 4
        and isinstance(one[3], int)
        and all(isinstance(energy, int | float) for energy in one)
        for one in outputs
    )


def finish(rule: str, stored: StoredTensor, before: Tally, after: Tally, mask: Mask) -> Outcome:
    """The outcome of elements that a rule has pruned by a mask, with what was counted before and after."""
    pruned = mask.size - int(np.count_nonzero(mask.view(np.bool_)))
    counts = [before.zeros, before.energy, after.zeros, after.energy]
    return [stored.name, rule, before.numel, pruned, *counts]


_COUNTS = 5  # numbers of a row: the rule's, elements reached, pruned, zeros before, zeros after


class Reach(Struct, frozen=True):
    """Elements of a tensor that a rule reached, and how many of them its masks drop, zero before or not."""

    numel: int = 0
    pruned: int = 0


class TensorOutcome(Struct, frozen=True):
    """Counts of one tensor before and after; `reach` has for each rule what it reached and dropped of it.

    `pruned` is what is dropped in all: of nested rules the inner ones drop what the outer ones do as well.
    Where it was reconstructed, the root of the mean squared change of its outputs relative to the dense ones:
    by its mask alone, and as it is; where it has gradients, the same in units of the loss. `metric` is the
    one that was minimized, "loss and outputs" where rules that reached it differ.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    instance: str
    reach: Mapping[str, Reach]
    pruned: int
    before: Tally
    after: Tally
    output_error_masked: float | None = None
    output_error: float | None = None
    loss_error_masked: float | None = None
    loss_error: float | None = None
    metric: str | None = None


class Outcomes:
    """Takes in the outcomes of pieces, in any order; not to be called from two threads at one time.

    Pieces are rows of numbers, some 64 bytes each, whatever the number of tensors: objects would take ten
    times as much.
    """

    def __init__(self) -> None:
        self._last: dict[str, int] = {}  # the last row of each tensor
        self._before = array("q")  # for each row, the one of the same tensor before it, or -1
        self._counts = array("q")  # for each row, what `_COUNTS` says
        self._energies = array("d")  # for each row, before and after
        self._rules: dict[str, int] = {}
        self._changes: dict[str, list[list[list[float]]]] = {}

    def add(self, outcome: Outcome) -> None:
        """One Outcome; a rule without a name reaches nothing."""
        name, rule, numel, pruned, zeros_before, energy_before, zeros_after, energy_after, *changes = outcome
        number = self._rules.setdefault(rule, len(self._rules))
        self._before.append(self._last.get(name, -1))
        self._last[name] = len(self._before) - 1
        self._counts.extend((number, numel, pruned, zeros_before, zeros_after))
        self._energies.extend((energy_before, energy_after))
        if changes:
            self._changes.setdefault(name, []).append(changes)

    def of_plan(self, plan: Plan) -> Sequence[TensorOutcome]:
        """Every tensor that the plan reaches, in the order of the checkpoint; made when it is asked for."""
        outer = plan.bound.outer
        tasks_of: dict[str, tuple[Task, ...]] = {}
        for unit in plan.units:
            for task in unit.tasks:
                alone = unit.tasks if len(unit.tasks) == 1 else (task,)
                for name in dict.fromkeys([leaf.tensor for leaf in task.instance.scope.leaves]):
                    tasks_of[name] = (*tasks_of[name], task) if name in tasks_of else alone

        def outcome(name: str) -> TensorOutcome:
            tasks = tasks_of[name]
            label = ", ".join(dict.fromkeys([task.instance.label for task in tasks]))
            rebuilt = [task for task in tasks if task.instance.reconstruct is not None]
            metrics = {task.metric for task in rebuilt if name in task.with_role("moment")}
            rules = [task.rule for task in tasks]
            found = self.of_tensor(plan.checkpoint.tensors[name], rules, label, outer)
            return replace(found, metric=" and ".join(sorted(filter(None, metrics)))) if metrics else found

        return Made(plan.reached, outcome)

    def of_tensor(
        self,
        stored: StoredTensor,
        rules: Iterable[str],
        label: str = "",
        outer: Collection[str] = (),
    ) -> TensorOutcome:
        """One tensor that these rules reach, also where nothing was gathered of it; some are `outer` ones."""
        parts = {rule: Reach() for rule in dict.fromkeys(rules)}
        zeros_before, zeros_after, dropped = 0, 0, 0
        energies: tuple[list[float], list[float]] = [], []
        names = tuple(self._rules)
        row = self._last.get(stored.name, -1)
        while row >= 0:
            number, numel, pruned, before, after = self._counts[_COUNTS * row : _COUNTS * (row + 1)]
            part = parts.get(names[number])
            if part is not None:
                parts[names[number]] = Reach(part.numel + numel, part.pruned + pruned)
            dropped += 0 if names[number] in outer else pruned
            zeros_before, zeros_after = zeros_before + before, zeros_after + after
            energies[0].append(self._energies[2 * row])
            energies[1].append(self._energies[2 * row + 1])
            row = self._before[row]
        return TensorOutcome(
            stored.name,
            stored.dtype,
            stored.shape,
            label,
            parts,
            dropped,
            Tally(stored.numel, zeros_before, exact_sum(energies[0])),
            Tally(stored.numel, zeros_after, exact_sum(energies[1])),
            *_errors(self._changes.get(stored.name, [])),
        )


class OfOuter(Outcomes):
    """Takes in the outcomes of rules that others are within; these count what is zero before and after."""

    def __init__(self, every: Outcomes) -> None:
        self._every = every

    def add(self, outcome: Outcome) -> None:
        name, rule, numel, pruned, *_ = outcome
        if rule:
            self._every.add([name, rule, numel, pruned, 0, 0.0, 0, 0.0])


_Errors = tuple[float | None, float | None, float | None, float | None]


def _errors(changes: list[list[list[float]]]) -> _Errors:
    """sqrt(tr(D H D^T) / tr(W0 H W0^T)) over all pieces, by the mask alone and as it is; None of none.

    Then the same with gradients, None unless all pieces have some.
    """
    return (*_shares(changes, 0), *_shares(changes, 1))


def _shares(changes: list[list[list[float]]], place: int) -> tuple[float | None, float | None]:
    pieces = [piece[place] for piece in changes if place < len(piece)]
    if not pieces or len(pieces) < len(changes):
        return None, None
    masked, now, dense = totals_in_units((energies, int(power)) for *energies, power in pieces)
    return share_of_output(masked, dense), share_of_output(now, dense)
