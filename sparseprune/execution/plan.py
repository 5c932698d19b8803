"""The plan: which independent work units a spec makes of a checkpoint, from headers alone.

Owns the border between what a spec asks for (bound scopes) and the work. A unit is plain data; it names the
tensors that it reads and writes, and no tensor belongs to two units. Knows no tensor data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparseprune.checkpoint import read_config
from sparseprune.engine.grids import prod
from sparseprune.engine.sequences import Made
from sparseprune.execution.inputs import InputFiles
from sparseprune.spec import TensorInfo, bind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from sparseprune.checkpoint import Checkpoint, StoredTensor
    from sparseprune.execution.inputs import TaskInput
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
    units: Sequence[WorkUnit]

    @property
    def reached(self) -> tuple[str, ...]:
        """The tensors that some rule reaches, in the order of the checkpoint."""
        names = {stored.name for unit in self.units for stored in unit.tensors}
        return tuple(name for name in self.checkpoint.tensors if name in names)


def task_bytes(task: Task, tensors: Mapping[str, StoredTensor]) -> int:
    """Bytes of what a task reaches: what one pass reads."""
    total = 0
    for leaf in task.instance.scope.leaves:
        stored = tensors[leaf.tensor]
        total += prod(leaf.view_shape) * stored.nbytes // max(1, stored.numel)
    return total


def make_plan(
    checkpoint: Checkpoint, spec: Spec, needs_inputs: Callable[[BoundInstance], bool] = lambda _: True
) -> Plan:
    """Bind a spec to the headers of a checkpoint and cut the work into units.

    `needs_inputs` says for which instances the files of scores and conditioners are looked for, by default
    for all; the tasks of the others have no inputs, and their files may be gone.

    Raises:
        SpecError: the spec does not fit the checkpoint, with every problem at once.
    """
    entries = [stored.entry for stored in checkpoint.tensors.values()]
    tensors = [TensorInfo(entry.name, entry.dtype, entry.shape) for entry in entries]
    bound = bind(spec, tensors, read_config(checkpoint))
    files = InputFiles(checkpoint)
    tasks = [
        Task(
            rule.name,
            instance,
            files.of_instance(rule.name, instance) if needs_inputs(instance) else (),
        )
        for rule, instance in bound.instances()
    ]
    files.raise_if_any()
    return Plan(checkpoint, bound, _units(checkpoint, tasks))


def _units(checkpoint: Checkpoint, tasks: Iterable[Task]) -> Sequence[WorkUnit]:
    """Tasks joined where they share a tensor, in the order of their first one."""
    home_of: dict[str, int] = {}  # for each tensor, the number of its group, which is that of the first task
    tasks_of: dict[int, list[Task]] = {}
    for number, task in enumerate(tasks):
        names = {leaf.tensor: None for leaf in task.instance.scope.leaves}
        home = number
        if not home_of.keys().isdisjoint(names):
            home, *others = sorted({home_of[name] for name in names if name in home_of})
            moved = [task for other in others for task in tasks_of.pop(other)]
            names |= {leaf.tensor: None for task in moved for leaf in task.instance.scope.leaves}
            tasks_of[home] += moved
        tasks_of.setdefault(home, []).append(task)
        home_of.update(dict.fromkeys(names, home))
    stored = checkpoint.tensors

    def unit(tasks: tuple[Task, ...]) -> WorkUnit:
        names = dict.fromkeys([leaf.tensor for task in tasks for leaf in task.instance.scope.leaves])
        return WorkUnit(tasks, tuple([stored[name] for name in names]))

    return Made([tuple(tasks_of.pop(home)) for home in sorted(tasks_of)], unit)
