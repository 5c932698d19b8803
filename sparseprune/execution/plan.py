"""The plan: which independent work units a spec makes of a checkpoint, from headers alone.

Owns the border between what a spec asks for (bound scopes) and the work. A unit is plain data; no tensor
belongs to two units. Reads no tensor data.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Literal

from msgspec import Struct
from msgspec.structs import replace

from sparseprune.checkpoint import read_config
from sparseprune.checkpoint.codes import codes_in, names_beside
from sparseprune.checkpoint.not_safetensors import MERGE, is_adapter
from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import prod
from sparseprune.errors import SpecError, UnboundError, one_of_many
from sparseprune.execution.coded import rank_of_codes, refusals
from sparseprune.execution.inputs import InputFiles, Left, Role, Sweeping, TaskInput
from sparseprune.execution.permutable import Permutations, permutations_of
from sparseprune.execution.scores import kind_of
from sparseprune.results.fields import Made
from sparseprune.spec import TensorInfo, bind
from sparseprune.spec.patterns import shared_beginning

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence

    from sparseprune.checkpoint import Checkpoint, StoredMask, StoredTensor
    from sparseprune.execution.coded import CodesRank
    from sparseprune.execution.scores import ScoreKind
    from sparseprune.spec import BoundInstance, BoundSpec, Metric, Spec


class Task(Struct, frozen=True):
    """One instance of an outermost scope or coupling, its rule, and what it reads besides weights.

    `codes`: how elements are ranked where some are codes; None where all are weights. `within`: masks of an
    earlier step, or of outer scopes, for some of its tensors; only what they keep competes. `levels`: tasks
    of nested scopes that are reconstructed together, outer ones first; the instance has all their tensors.
    """

    rule: str
    instance: BoundInstance
    inputs: tuple[TaskInput, ...] = ()
    codes: CodesRank | None = None
    within: tuple[StoredMask, ...] = ()
    levels: tuple[Task, ...] = ()

    @property
    def score_kind(self) -> ScoreKind:
        """The row of its score in the table of kinds."""
        return kind_of(self.instance.score)

    @property
    def ranks_patterns(self) -> bool:
        """Whether the magnitudes of what is stored are the scores: weights, or codes of one scale."""
        return self.score_kind.ranks_weights and self.codes != "values"

    @property
    def metric(self) -> Metric | None:
        """In what its change is minimized; None where survivors keep their bits.

        Matrices of which some have gradients and others have not cannot compete in units of the loss.
        """
        method = self.instance.reconstruct
        if method is None:
            return None
        moments, gradients = (self.with_role(role) for role in ("moment", "gradients"))
        if not moments:
            return None
        return method.metric or ("loss" if len(gradients) == len(moments) else "outputs")

    def with_role(self, role: Role) -> dict[str, TaskInput]:
        """Its inputs of one role, by what they are for."""
        return {one.key: one for one in self.inputs if one.role == role}

    @property
    def part(self) -> str:
        """The part of the model that it reaches, for people: its tensor, or where several of them are.

        Without a place that they share it is the first of them.
        """
        names = list(dict.fromkeys([leaf.tensor for leaf in self.instance.scope.leaves]))
        return names[0] if len(names) == 1 else shared_beginning(names) or f"{names[0]}, ..."

    def nbytes(self, tensors: Mapping[str, StoredTensor]) -> int:
        """Bytes of what it reaches: what one pass reads."""
        each = [(prod(leaf.view_shape), tensors[leaf.tensor]) for leaf in self.instance.scope.leaves]
        return sum([numel * stored.nbytes // max(1, stored.numel) for numel, stored in each])


def is_undecided(instance: BoundInstance) -> bool:
    """Whether its budget is a part of a common one, and not known yet."""
    return instance.allocate is not None and not instance.allocate.decided


class WorkUnit(Struct, frozen=True):
    """Tasks that share tensors, and these tensors: nothing else is needed to do them.

    Almost always one task; several where rules reach disjoint parts of one tensor, or are nested. `within`
    has masks for some of the tensors: what they drop is zero, also where no task reaches it.
    """

    tasks: tuple[Task, ...]
    tensors: tuple[StoredTensor, ...]
    within: tuple[StoredMask, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data that the unit reads, and writes."""
        return sum(stored.nbytes for stored in self.tensors)

    def having(self, masks: Mapping[str, StoredMask]) -> WorkUnit:
        """The unit and its tasks within masks, by the names of tensors."""

        def task_within(task: Task) -> Task:
            names = dict.fromkeys(leaf.tensor for leaf in task.instance.scope.leaves)
            return replace(task, within=tuple([masks[name] for name in names if name in masks]))

        own = tuple([masks[stored.name] for stored in self.tensors if stored.name in masks])
        return replace(self, tasks=tuple(map(task_within, self.tasks)), within=own)


class Plan(Struct, frozen=True):
    """A spec bound to a checkpoint, as units that may run in any order and side by side.

    What has `permutations` is permuted before, and then the units are as if it had been stored so. `beyond`
    are tensors that have a mask of an earlier step and that no rule reaches.
    """

    checkpoint: Checkpoint
    bound: BoundSpec
    units: Sequence[WorkUnit]
    permutations: Permutations = Permutations()
    left: tuple[Left, ...] = ()
    beyond: tuple[str, ...] = ()

    @property
    def reached(self) -> tuple[str, ...]:
        """The tensors that some rule reaches, in the order of the checkpoint."""
        names = {stored.name for unit in self.units for stored in unit.tensors}
        return tuple(name for name in self.checkpoint.tensors if name in names)


def make_plan(
    checkpoint: Checkpoint,
    spec: Spec,
    needs_inputs: Callable[[BoundInstance], bool] = lambda _: True,
    *,
    writes: bool = True,
    permutes: bool = False,
    sweeping: Sweeping | None = None,
) -> Plan:
    """Bind a spec to the headers of a checkpoint and cut the work into units; arguments as for `plan_of`.

    Raises:
        SpecError: the spec does not fit the checkpoint, with every problem at once.
    """
    bound = bind_to(checkpoint, spec)
    return plan_of(checkpoint, bound, needs_inputs, writes=writes, permutes=permutes, sweeping=sweeping)


def bind_to(checkpoint: Checkpoint, spec: Spec) -> BoundSpec:
    """A spec bound to the headers of a checkpoint; SpecError where it does not fit."""
    try:
        return bind(spec, tensor_infos(checkpoint), read_config(checkpoint))
    except UnboundError as error:
        *lines, last = error.args
        there = f"`sparseprune specs --for {shlex.quote(str(checkpoint.path))}` lists the specs that fit"
        if is_adapter(checkpoint.tensors):
            there = MERGE
        raise UnboundError(*lines, f"{last}; {there}") from error


def plan_of(
    checkpoint: Checkpoint,
    bound: BoundSpec,
    needs_inputs: Callable[[BoundInstance], bool] = lambda _: True,
    *,
    writes: bool = True,
    permutes: bool = False,
    sweeping: Sweeping | None = None,
) -> Plan:
    """The work of a bound spec, cut into units.

    `needs_inputs` says for which instances the files of scores and conditioners are looked for, by default
    for all; the tasks of the others have no inputs, and their files may be gone. `writes`: zeros are written
    or looked for, so that it must be known of codes which of them are zero. `permutes`: what a spec wants to
    be permuted is looked for, as somebody will do it. `sweeping` has statistics that are in no file.

    Raises:
        SpecError: files of scores, statistics or codes do not fit, with every problem at once.
    """
    files = InputFiles(checkpoint, sweeping)
    ranks = _ranks_of_codes(bound, checkpoint, needs_inputs, writes=writes)
    tasks = [
        _task(rule.name, instance, files.of_instance(rule.name, instance) if needs_inputs(instance) else ())
        for rule, instance in bound.instances()
    ]
    files.raise_if_any()
    if ranks:
        tasks = [replace(task, codes=rank) for task, rank in zip(tasks, ranks, strict=True)]
    permutations = Permutations()
    if permutes:
        permutations = permutations_of(checkpoint, tensor_infos(checkpoint), tasks)
    return Plan(checkpoint, bound, _units(checkpoint, tasks), permutations, files.left())


def plan_within(plan: Plan, masks: Sequence[StoredMask]) -> Plan:
    """The plan whose tasks have the masks of an earlier step; SpecError where a rule forbids them."""
    problems: dict[str, None] = {}
    for rule, instance in plan.bound.instances():
        does = {
            "rebuilds weights, also those that are pruned": instance.reconstruct or instance.allocate,
            "permutes, and the masks are in the order before": instance.permute,
            "is transposable, and the tiles of the masks may have no pattern inside of them": any(
                member.transposable for member in instance.scope.members
            ),
        }
        problems |= dict.fromkeys(
            f"[{rule.name}] {what}: leave --within or that out" for what, so in does.items() if so
        )
    if problems:
        raise SpecError(*problems)
    named = {mask.name: mask for mask in masks}
    reached = frozenset(plan.bound.covered)
    beyond = tuple(name for name in named if name not in reached)
    return replace(plan, units=Made(plan.units, lambda unit: unit.having(named)), beyond=beyond)


def rests_on_few(plan: Plan) -> dict[str, bool]:
    """By matrix whether its statistics rest on fewer tokens than it has inputs."""
    inputs = (one for unit in plan.units for task in unit.tasks for one in task.inputs)
    return {
        one.key: any(count < one.stored.shape[-1] for count in one.tokens)
        for one in inputs
        if one.role in {"moment", "loss"}
    }


def _task(rule: str, instance: BoundInstance, inputs: tuple[TaskInput, ...]) -> Task:
    """An instance, which rebuilds nothing where it may do without statistics and has none."""
    method = instance.reconstruct
    if method is not None and method.optional and not any(one.role == "moment" for one in inputs):
        instance = replace(instance, reconstruct=None)
    return Task(rule, instance, inputs)


class Rebuilds(Struct, frozen=True):
    """How a rule rebuilds survivors: its method, and what is minimized, such as "loss and outputs"."""

    method: Literal["admm", "refit"]
    metric: str


def rebuilding_rules(plan: Plan) -> dict[str, Rebuilds]:
    """How each rule rebuilds what survives; rules that keep all bits of survivors are left out."""
    metrics: dict[str, set[Metric]] = {}
    methods: dict[str, Literal["admm", "refit"]] = {}
    for task in (task for unit in plan.units for task in unit.tasks):
        if task.metric is not None and task.instance.reconstruct is not None:
            metrics.setdefault(task.rule, set()).add(task.metric)
            methods[task.rule] = task.instance.reconstruct.method
    return {rule: Rebuilds(methods[rule], " and ".join(sorted(each))) for rule, each in metrics.items()}


def tensor_infos(checkpoint: Checkpoint) -> list[TensorInfo]:
    """The tensors that rules may reach: scales and zero points go with their codes, and are none."""
    stored = checkpoint.tensors.values()
    if not codes_in(checkpoint.tensors):
        return [TensorInfo(entry.name, entry.dtype, entry.shape) for entry in [one.entry for one in stored]]
    beside = names_beside(checkpoint.tensors)
    return [
        TensorInfo(one.name, one.dtype, one.shape, codes=_has_other_elements(one))
        for one in stored
        if one.name not in beside
    ]


def _has_other_elements(stored: StoredTensor) -> bool:
    """Whether codes are more than their dtype says: several in a byte, or above a zero point."""
    codes, dtype = stored.codes, DTYPES[stored.dtype]
    return codes is not None and dtype.bits >= 8 and (bool(codes.packed) or stored.dtype == "U8")


def _ranks_of_codes(
    bound: BoundSpec, checkpoint: Checkpoint, is_scored: Callable[[BoundInstance], bool], *, writes: bool
) -> list[CodesRank | None]:
    """How each instance ranks codes; none where no tensor holds any.

    SpecError for all with which a rule cannot do what it should; one that is not scored needs no weights.
    """
    tensors = checkpoint.tensors
    if not codes_in(tensors):
        return []
    problems: dict[str, list[str]] = {}
    known: dict[Hashable, CodesRank | None] = {}  # of what has one form and can be done
    ranks: list[CodesRank | None] = []
    for rule, instance in bound.instances():
        codes = [tensors[leaf.tensor].codes for leaf in instance.scope.leaves]
        form = (instance.form, is_scored(instance), *[one and one.form for one in codes])
        if form in known:
            ranks.append(known[form])
            continue
        ranks.append(rank_of_codes(instance, tensors))
        found = refusals(instance, tensors, ranks[-1], scored=is_scored(instance), writes=writes)
        lines = [f"[{rule.name}] {line}" for line in found]
        problems.setdefault(rule.name, []).extend(lines)
        if not lines and all(one is None or one.form for one in codes):
            known[form] = ranks[-1]
    told = [one_of_many(list(dict.fromkeys(lines))) for lines in problems.values() if lines]
    if told:
        raise SpecError(*told)
    return ranks


def together(collections: Iterable[Collection[Hashable]]) -> list[list[int]]:
    """The numbers of collections in groups that share members, also by way of others, by their first ones.

    >>> together([{"a"}, {"b"}, {"c"}, {"a", "c"}])
    [[0, 2, 3], [1]]
    """
    listed = list(collections)
    home_of: dict[Hashable, int] = {}  # for each member, its group by the number of the first in it
    groups: dict[int, list[int]] = {}
    for number, own in enumerate(listed):
        home, members = number, own
        if not home_of.keys().isdisjoint(own):
            home, *others = sorted({home_of[member] for member in own if member in home_of})
            moved = [one for other in others for one in groups.pop(other)]
            members = {*own, *(member for one in moved for member in listed[one])}
            groups[home] += moved
        groups.setdefault(home, []).append(number)
        home_of.update(dict.fromkeys(members, home))
    return [groups[home] for home in sorted(groups)]


def _units(checkpoint: Checkpoint, tasks: Sequence[Task]) -> Sequence[WorkUnit]:
    """Tasks joined where they share a tensor, in the order of their first one."""
    stored = checkpoint.tensors

    def unit(numbers: list[int]) -> WorkUnit:
        own = tuple([tasks[number] for number in numbers])
        names = dict.fromkeys([leaf.tensor for task in own for leaf in task.instance.scope.leaves])
        return WorkUnit(own, tuple([stored[name] for name in names]))

    return Made(together([[leaf.tensor for leaf in task.instance.scope.leaves] for task in tasks]), unit)
