"""Programs: the work of a task as steps of items that may run side by side.

Owns the words that the ways of working (runs, counted, summed, tiled, streamed) and the executor share. A
program yields a step and gets the results of its items, in their order; the next step is made from them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseprune.engine.tally import Tally, tally

if TYPE_CHECKING:
    from types import UnionType

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.execution.limits import Limits
    from sparseprune.execution.plan import Task
    from sparseprune.execution.traffic import Bits, Mask, Traffic


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


class GivenUpError(BaseException):
    """The run ends while an item is at work, and does not wait until that one is done."""


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
    traffic: Traffic
    limits: Limits
    device: str
    recall: Callable[[str], Any]
    note: Callable[[str, Any, int], None]
    passed: Callable[[int, str], None]
    check: Callable[[], None] = lambda: None


Outcome = list[Any]
"""[tensor, rule, elements reached, pruned, zeros before, energy before, zeros after, energy after].

For a matrix that was reconstructed there follow its output energies: a list of what is lost by the mask
alone, what is lost now, and that of the dense matrix, and the power of two that these three count in.
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


def outcome(task: Task, stored: StoredTensor, pruned: int, before: Tally, after: Tally) -> Outcome:
    """What became of a part of a tensor that a task reached."""
    return [
        stored.name,
        task.rule,
        before.numel,
        pruned,
        before.zeros,
        before.energy,
        after.zeros,
        after.energy,
    ]


def finish(task: Task, stored: StoredTensor, before: Tally, bits: Bits, mask: Mask) -> Outcome:
    """The outcome of elements (flat) that have been pruned by a mask: `before` was counted before."""
    pruned = mask.size - int(np.count_nonzero(mask.view(np.bool_)))
    return outcome(task, stored, pruned, before, tally(bits, stored.dtype))
