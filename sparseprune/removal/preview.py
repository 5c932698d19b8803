"""What removal will leave, from shapes alone, before any data is read.

Owns blocks as whole slices of a tensor, and numbered lists of modules. Needs no numpy until flags are folded.
Called by `plan`, and by `remove` before it works.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from sparseprune.checkpoint.codes import codes_in
from sparseprune.engine.grids import Shape, prod
from sparseprune.errors import CheckpointError
from sparseprune.execution.plan import is_undecided
from sparseprune.spec import BoundScope
from sparseprune.spec.naming import MEMBER

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.execution.plan import Plan
    from sparseprune.removal.shrink import Removal
    from sparseprune.spec import BoundBlock, BoundInstance, BoundRule

    Look = Callable[[BoundBlock], "Sliced | None"]

_DEEPEST = 16  # lists in lists: no model has so many


class RemovedMembers(Struct, frozen=True):
    """By the name of each list the numbers of the members that it loses, in ascending order.

    `orphans` are tensors that keep nothing although other tensors of their member do, or belong to no list.

    >>> RemovedMembers({"layers": (0, 2)}).renamed("layers.3.up.weight")
    'layers.1.up.weight'
    """

    numbers: Mapping[str, tuple[int, ...]]
    orphans: tuple[str, ...] = ()

    def has(self, name: str) -> bool:
        """Whether a tensor belongs to a member that is removed."""
        members = numbered(name) if self.numbers else ()
        return any(number in self.numbers.get(before, ()) for before, number, _ in members)

    def renamed(self, name: str) -> str:
        """The new name of a tensor that stays: members move up into the gaps."""
        pieces = name.split(".")
        for before, number, place in numbered(name):
            gone = self.numbers.get(before, ())
            if gone:
                kind = pieces[place].removesuffix(str(number))
                pieces[place] = f"{kind}{number - bisect_left(gone, number)}"
        return ".".join(pieces)


def numbered(name: str) -> Iterator[tuple[str, int, int]]:
    """The lists that a name passes through: the list's name, the member's number, the place of that piece.

    >>> list(numbered("layers.3.experts.10.up"))
    [('layers', 3, 1), ('layers.3.experts', 10, 3)]
    """
    modules = (found for found in MEMBER.finditer(name) if found.start() > 0 and found.end() < len(name))
    for found in islice(modules, _DEEPEST):
        before = name[: found.start() - 1]
        yield before, int(found[1]), before.count(".") + 1


def removed_members(names: Iterable[str], empty: Collection[str]) -> RemovedMembers:
    """The outermost members of lists of which all tensors are `empty`."""
    lists_of = {name: list(numbered(name)) for name in names}
    all_of = Counter((before, number) for lists in lists_of.values() for before, number, _ in lists)
    empty_of = Counter((before, number) for name in empty for before, number, _ in lists_of.get(name, ()))
    numbers: dict[str, set[int]] = {}
    orphans = []
    for name in (name for name in lists_of if name in empty):
        members = ((before, number) for before, number, _ in lists_of[name])
        gone = next((member for member in members if all_of[member] == empty_of[member]), None)
        if gone is None:
            orphans.append(name)
        else:
            numbers.setdefault(gone[0], set()).add(gone[1])
    return RemovedMembers({before: tuple(sorted(found)) for before, found in numbers.items()}, tuple(orphans))


class _Axis(Struct, frozen=True):
    """A dimension of a view with more than one place: the stored dimension in which it lies, and its step."""

    view_dim: int
    dim: int
    step: int
    size: int


class Sliced(Struct, frozen=True):
    """Blocks of a leaf as slices along the dimension `dim` of its tensor, which has `size` indices there.

    The leaf reaches indices from `begin` on. `stacked`: each index of the first dimension, a member of a
    stack, has blocks of its own.
    """

    leaf: BoundBlock
    dim: int
    size: int
    begin: int
    axes: tuple[_Axis, ...]
    stacked: bool = False

    def kept(self, blocks: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Flags of the indices that survive with these blocks (flat); indices out of reach survive.

        Of a stack whose members keep unlike ones there is a row of flags for each member.
        """
        import numpy as np  # noqa: PLC0415  (a plan of what cannot be removed does without)

        index, block = np.full(1, self.begin), np.zeros(1, dtype=np.int64)
        grid = self.leaf.grid_shape
        for axis in self.axes:
            if axis.dim == self.dim:
                places = np.arange(axis.size)
                within = places // self.leaf.shape[axis.view_dim] * prod(grid[axis.view_dim + 1 :])
                index = (index[:, None] + places * axis.step).reshape(-1)
                block = (block[:, None] + within).reshape(-1)
        if not self.stacked:
            flags = np.ones(self.size, dtype=np.bool_)
            if blocks.size:
                flags[index] = blocks[block]
            return flags
        (members,) = (axis for axis in self.axes if axis.dim == 0)
        first = np.arange(members.size) * prod(grid[members.view_dim + 1 :])
        flags = np.ones((members.size, self.size), dtype=np.bool_)
        flags[:, index] = blocks[first[:, None] + block]
        return flags[0] if bool((flags == flags[0]).all()) else flags


def sliced(leaf: BoundBlock, shape: Shape) -> Sliced | None:
    """The blocks of a leaf as slices of its tensor of this shape; None where they are no whole slices.

    A slice has every element of the tensor at its indices. A block that is the whole tensor is a slice with
    all indices of the first dimension.
    """
    shape = shape or (1,)
    if 0 in shape:
        return Sliced(leaf, 0, shape[0], 0, ())
    steps = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
    begin = tuple(leaf.view_offset // step % size for step, size in zip(steps, shape, strict=True))
    axes = []
    for view_dim, (size, stride) in enumerate(zip(leaf.view_shape, leaf.view_stride, strict=True)):
        if size > 1:
            axis = _axis(view_dim, size, stride, shape, steps)
            if axis is None:
                return None
            axes.append(axis)
    reach, last = [1] * len(shape), list(begin)
    for axis in axes:
        reach[axis.dim] *= axis.size
        last[axis.dim] += (axis.size - 1) * axis.step
    if any(end >= size for end, size in zip(last, shape, strict=True)):
        return None
    grid = leaf.grid_shape
    cut = {dim for dim, (size, whole) in enumerate(zip(reach, shape, strict=True)) if size < whole}
    cut |= {axis.dim for axis in axes if grid[axis.view_dim] > 1}
    members = [axis for axis in axes if axis.dim == 0]
    if len(cut) > 1:
        # A matrix is no stack of its rows; of two dimensions is the stack of biases.
        stack = len(shape) > 2 or leaf.tensor.endswith("bias")
        one = len(members) == 1 and members[0].size == shape[0] and leaf.shape[members[0].view_dim] == 1
        if not stack or len(cut) > 2 or 0 not in cut or not one:
            return None
    dim = max(cut) if cut else 0
    return Sliced(leaf, dim, shape[dim], begin[dim], tuple(axes), stacked=len(cut) > 1)


def _axis(view_dim: int, size: int, stride: int, shape: Shape, steps: Shape) -> _Axis | None:
    """The stored dimension in which a dimension of the view lies."""
    for dim, (step, whole) in enumerate(zip(steps, shape, strict=True)):
        if whole > 1 and step <= stride:
            return _Axis(view_dim, dim, stride // step, size) if stride % step == 0 else None
    return None


_LARGEST = 1 << 27  # indices of a dimension, for which a plan has memory


class Preview(Struct, frozen=True):
    """What removing by a spec would leave, as far as shapes and budgets tell.

    `reasons` say why the blocks of a rule cannot be cut out, by its name; removable rules have none. `shapes`
    are the new shapes of tensors that removable rules cut, None for a tensor of which nothing is left; the
    mapping is None where only the data tells how much survives. `removal` is the whole smaller checkpoint,
    with its elements and bytes; None where it is not known, or where `reasons` or `problems` are in the way.
    """

    reasons: Mapping[str, str]
    shapes: Mapping[str, Shape | None] | None = None
    removal: Removal | None = None
    problems: tuple[str, ...] = ()
    numel: int | None = None
    nbytes: int | None = None

    def refusals(self, spec: str) -> list[str]:
        """Why nothing can be removed by a spec of this name, line by line; none where something can."""
        how = "use apply, which writes zeros"
        lines = [f"{rule} cannot be removed: {why}; {how}" for rule, why in self.reasons.items()]
        return [f"{spec}: {line}" for line in lines or self.problems]


def preview(
    plan: Plan,
    config: Mapping[str, Any] | None,
    beside: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> Preview:
    """What removing by a plan would leave; `beside` as for `make_removal`."""
    tensors = plan.checkpoint.tensors
    known: dict[object, Sliced | None] = {}
    look = looker(tensors, known)
    rules = plan.bound.outermost.rules  # what others drop inside of these stays as zeros
    found = {rule.name: _not_removable(rule, plan, look) for rule in rules}
    reasons = {name: reason for name, reason in found.items() if reason is not None}
    instances = [instance for rule in rules if rule.name not in reasons for instance in rule.instances]
    fits = all(one is None or one.size <= _LARGEST for one in known.values())
    if not instances or not fits or not all(map(_tells_counts, instances)):
        return Preview(reasons)
    # Here numpy is imported.
    from sparseprune.removal.shrink import make_removal  # noqa: PLC0415
    from sparseprune.removal.slices import kept_of  # noqa: PLC0415

    shapes = {name: stored.shape for name, stored in tensors.items()}
    kept = kept_of((one for instance in instances for one in _first_blocks(instance)), look, shapes)
    after = {name: None if each.is_empty and not each.is_whole else each.shape for name, each in kept.items()}
    if reasons:
        return Preview(reasons, after)
    try:
        decisions = {leaf.tensor: number for number, one in enumerate(instances) for leaf in one.scope.leaves}
        codes = codes_in(tensors)
        removal = make_removal(shapes, kept, config, codes=codes, decisions=decisions, beside=beside)
    except CheckpointError as error:
        return Preview(reasons, after, problems=error.args)
    numel = {name: prod(left.shape) for name, left in removal.left.items()}
    sizes = (count * tensors[name].nbytes // max(1, tensors[name].numel) for name, count in numel.items())
    return Preview(reasons, after, removal, (), sum(numel.values()), sum(sizes))


def looker(tensors: Mapping[str, StoredTensor], known: dict[object, Sliced | None] | None = None) -> Look:
    """`sliced`, computed once for all leaves that look alike; the results are in `known`."""
    known = {} if known is None else known

    def look(leaf: BoundBlock) -> Sliced | None:
        shape = tensors[leaf.tensor].shape
        key = (shape, leaf.view_shape, leaf.view_stride, leaf.view_offset, leaf.shape)
        if key not in known:
            known[key] = sliced(leaf, shape)
        return known[key]

    return look


def _not_removable(rule: BoundRule, plan: Plan, look: Look) -> str | None:
    """Why a rule's blocks cannot be cut out: the first leaf whose blocks are no whole slices."""
    for instance in rule.instances:
        for leaf in instance.scope.leaves:
            if look(leaf) is None:
                shape = list(plan.checkpoint.tensors[leaf.tensor].shape)
                return f"its blocks {list(leaf.shape)} are not whole slices of {leaf.tensor}, {shape}"
    return None


def _tells_counts(instance: BoundInstance) -> bool:
    """Whether the budget tells how much each member keeps.

    It does for a single member, and for single blocks that are alike members of one list, since then it does
    not matter which of them are dropped.
    """
    if instance.budget.nnz is None or is_undecided(instance):
        return False
    scope = instance.scope
    members = (scope,) if isinstance(scope, BoundScope) else scope.members
    if len(members) == 1:
        return True
    shapes = {tuple((leaf.view_shape, leaf.shape) for leaf in member.leaves) for member in members}
    single = len(shapes) == 1 and all(view == block for view, block in next(iter(shapes)))
    return single and len({_list_of([leaf.tensor for leaf in member.leaves]) for member in members}) == 1


def _list_of(names: Sequence[str]) -> str:
    """The innermost list whose member all of these tensors belong to."""
    for before, number, _ in reversed(list(numbered(names[0]))):
        member = f"{before}.{number}."
        if all(name.startswith(member) for name in names):
            return before
    return ""


def _first_blocks(instance: BoundInstance) -> Iterator[tuple[BoundBlock, NDArray[np.bool_]]]:
    """Every leaf that loses blocks if the first ones of each scope survive, with flat flags of its blocks."""
    import numpy as np  # noqa: PLC0415

    from sparseprune.execution.block_norms import by_leaf  # noqa: PLC0415

    scope, nnz = instance.scope, instance.budget.nnz
    members = () if isinstance(scope, BoundScope) else scope.members
    if prod(scope.grid_shape) == 1 and scope.blocks_per_scope == len(members):
        for member in members[nnz:]:  # single blocks; much faster for thousands of members
            yield from ((leaf, np.zeros(1, dtype=np.bool_)) for leaf in member.leaves)
        return
    keep = np.zeros((prod(scope.grid_shape), scope.blocks_per_scope), dtype=np.bool_)
    keep[:, :nnz] = True
    for leaf, blocks in by_leaf(scope, keep).items():
        if not blocks.all():
            yield leaf, np.ascontiguousarray(blocks).reshape(-1)
