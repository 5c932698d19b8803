"""What `permute` moves in a plan: interiors whose N:M lies along their units, and all that goes with them.

Owns which interiors stay as they are, with the reason, and which statistics and score files move with their
tensors. Reads headers alone and needs no numpy. Called by plan; permuting.py finds the orders.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from sparseprune.checkpoint import read_config
from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import prod
from sparseprune.results.pruning import UnmovedModule
from sparseprune.spec.structures import Index, find_interiors
from sparseprune.spec.structures.index import steps_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from sparseprune.checkpoint import Checkpoint, StoredTensor
    from sparseprune.execution.inputs import TaskInput
    from sparseprune.execution.plan import Task
    from sparseprune.spec import BoundBlock, BoundScope, TensorInfo
    from sparseprune.spec.structures import Inside, Interior

    Numbers = tuple[int, ...]
    Leaves = Mapping[str, Sequence[tuple[Task, BoundScope, BoundBlock]]]
    Moves = Literal["alike", "last", "both"]

SAMPLED = 1 << 24  # elements of a matrix by which an order is looked for; of larger ones rows far apart
_FLOATS = frozenset(name for name in (row.name for row in DTYPES.values() if row.prunable) if name[0] != "I")
_UNIT_BYTES, _MOVED_BYTES = 16, 3000  # of each unit and of each tensor that moves, kept while a run lasts
_SEARCHED, _MOMENT_BYTES, _BESIDE = 12, 20, 24 << 20  # bytes of an element; of a moment; of slabs


class Weighed(Struct, frozen=True):
    """A tensor with `keep` of every `group` along the units of an interior, and what ranks its elements.

    `moment` has the second moments of its inputs where it is reconstructed, `score` what its score reads.
    """

    part: Inside
    keep: int
    group: int
    task: Task
    moment: TaskInput | None = None
    score: TaskInput | None = None


class Beside(Struct, frozen=True):
    """A tensor of another file that moves with a part: alike, along the last dimension, or the last two."""

    stored: StoredTensor
    part: Inside
    moves: Moves


class Permutation(Struct, frozen=True):
    """An interior that will be permuted; `cells`: for each set those of its groups, which no unit leaves."""

    interior: Interior
    weighed: tuple[Weighed, ...]
    beside: tuple[Beside, ...] = ()
    cells: tuple[Numbers, ...] = ()

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all tensors that move, each once."""
        return tuple(dict.fromkeys(part.tensor for part in self.interior.parts))

    def memory(self, tensors: Mapping[str, StoredTensor]) -> int:
        """Bytes that the search for its orders takes, at the most."""
        elements, inputs = 0, 0
        for one in self.weighed:
            stored = tensors[one.part.tensor]
            own = stored.numel // (stored.shape[0] if one.part.stacked else 1)
            elements += min(own, SAMPLED)
            if one.moment is not None:
                inputs = max(inputs, one.moment.stored.shape[-1])
        return _SEARCHED * elements + _MOMENT_BYTES * inputs**2 + _BESIDE


class Permutations(Struct, frozen=True):
    """What a plan permutes, and what it does not though a rule asks for it."""

    found: tuple[Permutation, ...] = ()
    unmoved: tuple[UnmovedModule, ...] = ()

    @property
    def moved(self) -> frozenset[str]:
        """The names of all tensors that move."""
        return frozenset(name for one in self.found for name in one.tensors)

    @property
    def resident_bytes(self) -> int:
        """Memory that all orders take from the search to the end, with what serves tensors in them."""
        units = sum(one.interior.sets * one.interior.size for one in self.found)
        return _UNIT_BYTES * units + _MOVED_BYTES * sum(len(one.tensors) for one in self.found)

    def search_bytes(self, tensors: Mapping[str, StoredTensor]) -> int:
        """Bytes of weights that the search for orders reads, about."""
        names = [weighed.part.tensor for one in self.found for weighed in one.weighed]
        return sum(tensors[name].nbytes for name in names)


class _StaysError(Exception):
    """Why an interior stays as it is."""


def permutations_of(
    checkpoint: Checkpoint, infos: Iterable[TensorInfo], tasks: Sequence[Task]
) -> Permutations:
    """What tasks with `permute` move."""
    if not any(task.instance.permute for task in tasks):
        return Permutations()
    leaves: dict[str, list[tuple[Task, BoundScope, BoundBlock]]] = {}
    for task in tasks:
        for member in task.instance.scope.members:
            for leaf in member.leaves:
                leaves.setdefault(leaf.tensor, []).append((task, member, leaf))
    planner = _Planner(checkpoint.tensors, leaves, _users(tasks), {})
    found, unmoved = [], []
    for interior in find_interiors(Index.of(infos, read_config(checkpoint))):
        weighed = tuple(planner.weighed(interior))
        if not weighed:
            continue
        try:
            found.append(planner.permutation(interior, weighed))
        except _StaysError as reason:
            unmoved.append(UnmovedModule(module=interior.module, reason=str(reason)))
        else:
            planner.claimed.update(dict.fromkeys(found[-1].tensors, interior.module))
    return Permutations(tuple(found), tuple(unmoved))


def _users(tasks: Iterable[Task]) -> dict[tuple[Path, str], set[str]]:
    """The weights that each tensor of statistics is about."""
    users: dict[tuple[Path, str], set[str]] = {}
    for task in tasks:
        for one in task.inputs:
            if one.role in {"moment", "vector"}:
                users.setdefault((one.stored.shard.path, one.stored.name), set()).add(one.key)
    return users


class _Planner(Struct, frozen=True):
    """What is known of a plan; `claimed` has the module in which each moved tensor moves."""

    tensors: Mapping[str, StoredTensor]
    leaves: Leaves
    users: Mapping[tuple[Path, str], set[str]]
    claimed: dict[str, str]

    def weighed(self, interior: Interior) -> Iterator[Weighed]:
        """The parts with N:M along their units that may be permuted."""
        for part in interior.parts:
            for task, member, leaf in self.leaves.get(part.tensor, ()):
                shape = self.tensors[part.tensor].shape
                extents = _extents(member, leaf, shape, part.dim)
                nnz = task.instance.budget.nnz
                if not task.instance.permute or extents is None or nnz is None:
                    continue
                group = extents[0] * extents[1]
                if 1 < group < shape[part.dim] and group == member.blocks_per_scope:
                    own = [one for one in task.inputs if one.key == part.tensor]
                    moment = next((one for one in own if one.role == "moment"), None)
                    score = next((one for one in own if one.role in {"vector", "values"}), None)
                    yield Weighed(part, nnz, group, task, moment, score)

    def permutation(self, interior: Interior, weighed: tuple[Weighed, ...]) -> Permutation:
        """An interior with all that moves; _StaysError where it cannot."""
        if interior.problem:
            raise _StaysError(interior.problem)
        patterns = {(one.keep, one.group) for one in weighed}
        if len(patterns) > 1:
            raise _StaysError("its tensors have unlike patterns along the same units")
        ((_, group),) = patterns
        for one in weighed:
            _refuse_broken_groups(interior, one.part, group)
        beside: list[Beside] = []
        for part in interior.parts:
            self._refuse_unmovable(part)
            beside += self._inputs(part)
        sizes = [(one.part, one.stored.shape[-1]) for one in beside if one.moves == "both"]
        grouped = [(part, size) for part, size in sizes if size < self.tensors[part.tensor].shape[part.dim]]
        return Permutation(interior, weighed, tuple(beside), _cells(interior, grouped, group))

    def _refuse_unmovable(self, part: Inside) -> None:
        """_StaysError for a tensor of codes, or one that a rule sees in another way than whole."""
        stored = self.tensors[part.tensor]
        if stored.codes is not None or stored.dtype not in _FLOATS:
            raise _StaysError(f"{stored.name} holds {stored.dtype} codes, which have scales beside them")
        if stored.name in self.claimed:
            raise _StaysError(f"{stored.name} moves with {self.claimed[stored.name]}")
        size = stored.shape[part.dim]
        for task, member, leaf in self.leaves.get(part.tensor, ()):
            extents = _extents(member, leaf, stored.shape, part.dim)
            if extents is None:
                raise _StaysError(f"{task.rule} looks at {stored.name} by a view of its own")
            block, blocks = extents
            whole = block * blocks in {1, size} and block in {1, size}
            if not whole and not task.instance.permute:
                raise _StaysError(
                    f"{task.rule} has groups of {block * blocks} in {stored.name} where it moves"
                )

    def _inputs(self, part: Inside) -> Iterator[Beside]:
        """What tasks read beside a tensor that moves with it."""
        name, rank = part.tensor, len(self.tensors[part.tensor].shape)
        tasks = {id(task): task for task, _, _ in self.leaves.get(name, ())}.values()
        inputs = [each for task in tasks for each in task.inputs if each.key == name]
        along_inputs = part.dim in {each.dim % rank for each in inputs if each.role == "moment"}
        for one in inputs:
            stored = one.stored
            if one.role == "loss":
                continue  # budgets are shared before any order
            if one.role == "gradients":
                if not along_inputs and part.dim >= rank - 2:
                    yield Beside(stored, part, "both")
            elif one.role in {"values", "conditioners"}:
                yield Beside(stored, part, "alike")
            elif one.role == "blocks":
                raise _StaysError(f"scores of blocks rank {name}")
            elif one.dim % rank == part.dim:
                both = one.role == "moment" or one.form == "hessian"
                leading = len(stored.shape) - (2 if both else 1)
                if leading != part.stacked:
                    raise _StaysError(f"{stored.name} in {stored.shard.path} is about all of its experts")
                if len(self.users.get((stored.shard.path, stored.name), ())) > 1:
                    raise _StaysError(f"{stored.name} in {stored.shard.path} is about other matrices, too")
                yield Beside(stored, part, "both" if both else "last")


def _extents(member: BoundScope, leaf: BoundBlock, shape: Numbers, dim: int) -> tuple[int, int] | None:
    """The extent of a block along a dimension of a tensor, and how many blocks of a scope lie along it.

    None where the leaf is no view of the whole tensor by its dimensions, or is fused with others.
    """
    if member.block is not leaf or leaf.view_offset or prod(leaf.view_shape) != prod(shape):
        return None
    steps = list(steps_of(shape))
    found = (1, 1) if shape[dim] == 1 else None
    for size, step, block, blocks in zip(
        leaf.view_shape, leaf.view_stride, leaf.shape, member.shape, strict=True
    ):
        if size == 1:
            continue
        places = [at for at, each in enumerate(shape) if each == size and steps[at] == step]
        if not places:
            return None
        if places[0] == dim:
            found = block, blocks
    return found


def _refuse_broken_groups(interior: Interior, part: Inside, group: int) -> None:
    """_StaysError where units of a set share a group of the pattern with what does not move with them."""
    step = 0 if part.stacked else part.step
    if part.width > 1 or interior.size % group or part.begin % group or step % group:
        raise _StaysError(f"its {interior.size} units are no whole groups of {group} in {part.tensor}")
    if interior.size == group:
        raise _StaysError(f"its {interior.size} units are one group")


def _cells(interior: Interior, labels: Sequence[tuple[Inside, int]], group: int) -> tuple[Numbers, ...]:
    """For each set the cell of each group of units, where gradients have groups; () without any."""
    if not labels:
        return ()
    found = []
    for one in range(interior.sets):
        groups = []
        for first in range(0, interior.size, group):
            cell = [
                {
                    (part.begin + (0 if part.stacked else one * part.step) + unit * part.width) // size
                    for unit in range(first, first + group)
                }
                for part, size in labels
            ]
            if any(len(each) > 1 for each in cell):
                sizes = " or ".join(str(size) for size in dict.fromkeys(size for _, size in labels))
                raise _StaysError(
                    f"its gradients are kept in groups of {sizes}, in which {group} units break"
                )
            groups.append(tuple(each.pop() for each in cell))
        numbers = {cell: number for number, cell in enumerate(dict.fromkeys(groups))}
        found.append(tuple(numbers[cell] for cell in groups))
    return tuple(found)
