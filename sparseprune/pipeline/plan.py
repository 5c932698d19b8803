"""The plan: which independent work units a spec makes of a checkpoint, from headers alone.

Owns the border between what is asked (bound scopes) and doing it. A unit is plain data; it names the
tensors that it reads and writes, and no tensor belongs to two units. Knows no tensor data.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparseprune.checkpoint import read_config
from sparseprune.pipeline.inputs import InputFiles
from sparseprune.spec import TensorInfo, bind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sparseprune.checkpoint import Checkpoint, StoredTensor
    from sparseprune.pipeline.inputs import TaskInput
    from sparseprune.spec import BoundInstance, BoundSpec, Spec


@dataclass(frozen=True, slots=True)
class Task:
    """One instance of an outermost scope or coupling, its rule, and what it reads besides weights."""

    rule: str
    instance: BoundInstance
    inputs: tuple[TaskInput, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """Tasks that share tensors, and these tensors: nothing else is needed to do them.

    Almost always one task; several where rules reach disjoint parts of one tensor.
    """

    tasks: tuple[Task, ...]
    tensors: tuple[StoredTensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data that the unit reads, and writes."""
        return sum(stored.nbytes for stored in self.tensors)


@dataclass(frozen=True, slots=True)
class Plan:
    """A spec bound to a checkpoint, as units that may run in any order and side by side."""

    checkpoint: Checkpoint
    bound: BoundSpec
    units: tuple[WorkUnit, ...]

    @property
    def reached(self) -> tuple[str, ...]:
        """The tensors that some rule reaches, in the order of the checkpoint."""
        names = {stored.name for unit in self.units for stored in unit.tensors}
        return tuple(name for name in self.checkpoint.tensors if name in names)


def make_plan(checkpoint: Checkpoint, spec: Spec) -> Plan:
    """Bind a spec to the headers of a checkpoint and cut the work into units.

    Raises:
        SpecError: the spec does not fit the checkpoint, with every problem at once.
    """
    tensors = [TensorInfo(name, stored.dtype, stored.shape) for name, stored in checkpoint.tensors.items()]
    bound = bind(spec, tensors, read_config(checkpoint))
    files = InputFiles(checkpoint)
    tasks = [
        Task(rule.name, instance, files.of_instance(rule.name, instance))
        for rule, instance in bound.instances()
    ]
    files.raise_if_any()
    units = tuple(_unit(checkpoint, group) for group in _groups(tasks))
    return Plan(checkpoint, bound, units)


def _unit(checkpoint: Checkpoint, tasks: tuple[Task, ...]) -> WorkUnit:
    names = dict.fromkeys(leaf.tensor for task in tasks for leaf in task.instance.scope.leaves)
    return WorkUnit(tasks, tuple(checkpoint.tensors[name] for name in names))


def _groups(tasks: Iterable[Task]) -> list[tuple[Task, ...]]:
    """Tasks joined where they share a tensor, in the order of their first one."""
    group_of: dict[str, int] = {}
    members: defaultdict[int, list[Task]] = defaultdict(list)
    for number, task in enumerate(tasks):
        names = {leaf.tensor for leaf in task.instance.scope.leaves}
        touched = sorted({group_of[name] for name in names if name in group_of})
        home = touched[0] if touched else number
        for group in touched[1:]:
            moved = members.pop(group)
            members[home] += moved
            names |= {leaf.tensor for other in moved for leaf in other.instance.scope.leaves}
        members[home].append(task)
        group_of |= dict.fromkeys(names, home)
    return [tuple(group) for _, group in sorted(members.items())]
