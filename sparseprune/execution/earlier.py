"""Earlier patterns: zeros that a checkpoint has from a run before, and that this run may bring back or shift.

Owns which tensors are at risk, how their patterns are found (by the spec beside the weights, else in a few
of their bytes) and what became of them. Gives lines; called by the command line before and after the work.
"""

from __future__ import annotations

from contextlib import suppress
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from sparseprune.checkpoint import TensorReader
from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import identity_order
from sparseprune.errors import SpecError
from sparseprune.execution.plan import make_plan
from sparseprune.execution.verify import count_survivors, make_check
from sparseprune.spec import BoundBlock, BoundScope

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    from sparseprune.checkpoint import Checkpoint, Source, StoredTensor
    from sparseprune.engine.grids import Shape
    from sparseprune.execution.plan import Plan
    from sparseprune.execution.regions import AnyScope
    from sparseprune.results.checking import CheckedTensor
    from sparseprune.spec import BoundInstance, Spec

    Flags = NDArray[np.bool_]

_TENSORS = 64  # that are looked into where no spec tells
_ROWS, _BYTES = 64, 1 << 16  # of each of them
_PATTERNS = ((2, 4), (4, 8))
_FULL = 0.6  # of what N:M allows is there at least, else it is sparser than that and means something else
_SCOPES = 32  # and so many scopes are no accident
_SIDE = 4  # blocks of zeros are looked for in pieces so long
_WHOLE = 0.99  # of these pieces are all zero or have none, since a survivor may be zero too


class Touched(Struct, frozen=True):
    """A tensor in which zeros may come back or move: its name in the output, and why.

    `rules` are those by which its weights are rebuilt; `cut` the dimensions in which something is cut out.
    """

    name: str
    rules: tuple[BoundInstance, ...] = ()
    cut: tuple[int, ...] = ()


def rebuilt(plan: Plan) -> dict[str, Touched]:
    """The tensors whose survivors make up for what is pruned; nothing else that prunes takes a zero away."""
    found: dict[str, tuple[BoundInstance, ...]] = {}
    for task in (task for unit in plan.units for task in unit.tasks):
        if task.instance.reconstruct is not None:
            for name in dict.fromkeys(one.key for one in task.inputs if one.role == "moment"):
                found[name] = (*found.get(name, ()), task.instance)
    return {name: Touched(name, rules) for name, rules in found.items()}


class Earlier(Struct, frozen=True):
    """What is known of the patterns of `checkpoint` before a run that touches some of its tensors.

    `spec` was applied to it; `risks` are its rules and the tensors in which they may be broken, with what
    they allow. In other tensors patterns were `seen`. A search takes up to `memory` and `workers` threads.
    """

    checkpoint: Checkpoint
    touched: Mapping[str, Touched]
    memory: int
    workers: int
    spec: Spec | None
    risks: Mapping[tuple[str, str], str]
    seen: Mapping[str, _Seen]

    def may_break(self) -> list[str]:
        """A line where this run may break a pattern; none where it cannot."""
        parts = []
        if self.risks:
            names = dict.fromkeys(name for _, name in self.risks)
            parts.append(f"was pruned by its sparseprune/spec.toml ({self._rules()}) in {_many(names)}")
        if self.seen:
            what = " and ".join(dict.fromkeys(one.what for one in self.seen.values()))
            parts.append(f"has {what} in {_many(self.seen)}")
        if not parts:
            return []
        does = "cuts slices out" if any(one.cut for one in self.touched.values()) else "rebuilds weights"
        return [f"{self.checkpoint.path} {' and '.join(parts)}: this run {does} there and may break that"]

    def broken(self, output: Checkpoint) -> list[str]:
        """A line that counts what the output has of it no longer; none where all is as it was."""
        parts = [] if self.spec is None or not self.risks else self._broken_rules(output, self.spec)
        counts = {name: self._broken_places(output, name, seen) for name, seen in self.seen.items()}
        for what in dict.fromkeys(self.seen[name].what for name, (lost, _) in counts.items() if lost):
            own = {name: counts[name] for name, seen in self.seen.items() if seen.what == what}
            lost, looked = map(sum, zip(*own.values(), strict=True))
            names = _many(name for name, (count, _) in own.items() if count)
            parts.append(f"{what} in {lost} of {looked} places that were looked at, in {names}")
        return [f"the output breaks a pattern of its input: {' and '.join(parts)}"] if parts else []

    def _broken_rules(self, output: Checkpoint, spec: Spec) -> list[str]:
        names = {(rule, self.touched[name].name) for rule, name in self.risks}
        try:
            now = self._verdicts(output, spec, names)
        except SpecError as error:
            return [f"{self._rules()} no longer fits, {error.args[0]}"]
        lost = sorted(name for _, name in names.difference((one.rule, one.name) for one in now))
        gone = [f"{self._rules()} no longer fits {_many(dict.fromkeys(lost))}"] if lost else []
        broken, scopes = sum(one.broken for one in now), sum(one.scopes for one in now)
        if not broken:
            return gone
        before = self._verdicts(self.checkpoint, spec, set(self.risks))
        if broken <= sum(one.broken for one in before):
            return gone
        where = _many(dict.fromkeys(one.name for one in now if one.broken))
        return [*gone, f"{self._rules()} in {broken} of {scopes} scopes, in {where}"]

    def _rules(self) -> str:
        """The rules at risk and what they allow: each once, as most have one budget for all instances."""
        return " and ".join(dict.fromkeys(f"{rule}: {nnz}" for (rule, _), nnz in self.risks.items()))

    def _verdicts(
        self, checkpoint: Checkpoint, spec: Spec, names: set[tuple[str, str]]
    ) -> list[CheckedTensor]:
        """What these rules find in these tensors."""
        check = make_check(checkpoint, spec, self.memory, self.workers)
        with TensorReader() as reader:
            found = count_survivors(check, reader, lambda *_: None).tensors
        return [one for one in found if (one.rule, one.name) in names]

    def _broken_places(self, output: Checkpoint, name: str, seen: _Seen) -> tuple[int, int]:
        stored = output.tensors.get(self.touched[name].name)
        with TensorReader() as reader:
            flags = None if stored is None else _nonzero(stored, reader)
        return (0, 0) if flags is None else seen.lost(flags)


def earlier_of(
    checkpoint: Checkpoint, touched: Mapping[str, Touched], spec: Spec | None, limits: tuple[int, int]
) -> Earlier:
    """What a run that touches these tensors may break; `limits` are memory and threads for the search.

    `spec` was applied to the checkpoint, if any was. Patterns of other tensors are found by some bytes.
    """
    risks: dict[tuple[str, str], str] = {}
    reached: tuple[str, ...] = ()
    with suppress(SpecError):  # it may fit no more
        if spec is not None:
            plan = make_plan(checkpoint, spec, lambda _: False)
            risks, reached = _risks(plan, touched), plan.reached
    others = [name for name in touched if all(name != known for _, known in risks)]
    with TensorReader() as reader:
        seen = {
            name: found
            for name in others[:_TENSORS]
            if (found := _seen(checkpoint.tensors[name], touched[name], reader, blocks=name not in reached))
        }
    return Earlier(checkpoint, touched, *limits, spec, risks, seen)


def _risks(plan: Plan, touched: Mapping[str, Touched]) -> dict[tuple[str, str], str]:
    """Rules of an earlier spec, with tensors in which they may be broken, and what they allow there."""
    found = {}
    for rule, old in plan.bound.instances():
        if old.budget.nnz is None or old.soft is not None:
            continue
        for leaf, extent in _extents(old.scope):
            one = touched.get(leaf.tensor)
            if one is None:
                continue
            shape = plan.checkpoint.tensors[leaf.tensor].shape
            moved = any(1 < size < whole for size, whole in _cut_sizes(leaf, extent, shape, one.cut))
            if moved or (one.rules and not any(_keeps(new, old, leaf, extent) for new in one.rules)):
                found[rule.name, leaf.tensor] = f"{old.budget.nnz} of {old.scope.blocks_per_scope}"
    return found


def _cut_sizes(leaf: BoundBlock, extent: Shape, shape: Shape, cut: tuple[int, ...]) -> Iterator[Shape]:
    """How long a scope is, and how long what it lies in, along dimensions in which something is cut out."""
    if leaf.view_shape == shape:
        yield from ((extent[dim], shape[dim]) for dim in cut)
    elif cut:  # whatever the view makes of these dimensions
        yield from zip(extent, leaf.view_shape, strict=True)


def _keeps(new: BoundInstance, old: BoundInstance, leaf: BoundBlock, extent: Shape) -> bool:
    """Whether a new rule leaves no more in each scope of an old one than that allowed."""
    if new.budget.nnz is None or old.budget.nnz is None or new.budget.nnz > old.budget.nnz:
        return False
    if new.scope == old.scope:
        return True
    return any(
        replace(block, label=leaf.label) == leaf and own == extent
        for _, scope, block in _uncoupled((new,))
        for _, own in _extents(scope)
        for _ in _uncoupled((old,))
    )


def _uncoupled(rules: Iterable[BoundInstance]) -> Iterator[tuple[BoundInstance, BoundScope, BoundBlock]]:
    """The rules over one tensor, with their scopes and blocks."""
    for rule in rules:
        if isinstance(rule.scope, BoundScope) and isinstance(rule.scope.block, BoundBlock):
            yield rule, rule.scope, rule.scope.block


def _extents(scope: AnyScope) -> Iterator[tuple[BoundBlock, Shape]]:
    """Each leaf, and how many elements a scope has of it along the dimensions of its view."""
    for member in (scope,) if isinstance(scope, BoundScope) else scope.members:
        block, own = member.block, identity_order(len(member.shape))
        orders = (own,) if isinstance(block, BoundBlock) else block.orders
        for leaf, order in zip(block.leaves, orders, strict=True):
            extent = list(leaf.shape)
            for size, dim in zip(member.shape, order, strict=True):
                if dim < len(extent):  # grids of lower rank are padded with ones
                    extent[dim] *= size
            yield leaf, tuple(extent)


class _Seen(Struct, frozen=True):
    """A pattern that was found in the first rows and columns of a matrix.

    Of each `of` neighbours along `axis` so many are `allowed`; where places are `empty` (their numbers among
    all), these alone count.
    """

    what: str
    allowed: int = 0
    of: int = 0
    axis: int = -1
    empty: tuple[int, ...] = ()

    def lost(self, flags: Flags) -> tuple[int, int]:
        """How many places break it, and how many there are, of flags (rows, columns) of what is not zero."""
        counts = _counts(flags, self.of, self.axis)
        if self.empty:
            counts = counts[list(self.empty)]
        return int((counts > self.allowed).sum()), counts.size


def _seen(stored: StoredTensor, touched: Touched, reader: Source, *, blocks: bool) -> _Seen | None:
    """What the first rows and columns have of a pattern that may be broken: `blocks` of zeros, else N:M."""
    flags = _nonzero(stored, reader)
    if flags is None or not flags.any():
        return None
    blocks = blocks and bool(touched.rules)
    rank = len(stored.shape)
    found = _blocks_of_zeros(flags) if blocks else None
    if found is not None:
        return None if _in_blocks(touched, stored.shape, rank + found.axis) else found
    axes = (axis for axis in (-1, -2) if touched.rules or rank + axis in touched.cut)
    for axis, (allowed, of) in product(axes, _PATTERNS):
        counts = _counts(flags, of, axis)
        full = counts.size >= _SCOPES and counts.mean() >= _FULL * allowed
        if full and (counts <= allowed).all():
            imposed = _imposed(touched, allowed, of, rank + axis)
            return None if imposed else _Seen(f"{allowed}:{of} zeros", allowed, of, axis)
    empty = _empty(_counts(flags, len(flags), -2))
    if blocks and empty and len(flags) >= _SCOPES:
        return _Seen("columns of zeros", of=len(flags), axis=-2, empty=empty)
    return None


def _blocks_of_zeros(flags: Flags) -> _Seen | None:
    """Pieces of columns or rows that went whole, where not all of them lie in lines of zeros.

    Rows of zeros stay: nothing makes up for what is zero already.
    """
    for axis in (-2, -1):
        counts = _counts(flags, _SIDE, axis)
        empty, full = counts == 0, counts == _SIDE
        lines = int((~flags.any(axis)).sum()) * (flags.shape[axis] // _SIDE)
        many = int(empty.sum()) - lines >= _SCOPES and int(full.sum()) >= _SCOPES
        if many and (empty | full).mean() >= _WHOLE:
            return _Seen("blocks of zeros", of=_SIDE, axis=axis, empty=_empty(counts))
    return None


def _empty(counts: NDArray[np.int64]) -> tuple[int, ...]:
    return tuple(int(one) for one in np.flatnonzero(counts == 0))


def _imposed(touched: Touched, allowed: int, of: int, dim: int) -> bool:
    """Whether a rule of this run leaves no more in the same scopes."""
    return any(
        block.shape[dim : dim + 1] == (1,)
        and scope.shape == tuple(of if place == dim else 1 for place in range(len(scope.shape)))
        and rule.budget.nnz is not None
        and rule.budget.nnz <= allowed
        for rule, scope, block in _uncoupled(touched.rules)
    )


def _in_blocks(touched: Touched, shape: Shape, dim: int) -> bool:
    """Whether a rule of this run keeps such pieces whole: its blocks are longer than one, and no lines."""
    return any(
        block.view_shape == shape and block.shape[dim] % _SIDE == 0 and block.shape[dim] < shape[dim]
        for _, _, block in _uncoupled(touched.rules)
    )


def _counts(flags: Flags, of: int, axis: int) -> NDArray[np.int64]:
    """How many of each `of` neighbours along an axis are not zero; what is left over is not looked at."""
    lines = flags if axis == -1 else flags.T
    width = lines.shape[1] // of * of
    groups = np.ascontiguousarray(lines[:, :width]).reshape(-1, of)
    counts: NDArray[np.int64] = np.count_nonzero(groups, axis=1)
    return counts


def _nonzero(stored: StoredTensor, reader: Source) -> Flags | None:
    """Which of the first rows and columns of the first matrix are not zero; None where nobody can tell."""
    dtype = DTYPES[stored.dtype]
    if stored.codes is not None and (not stored.is_counted or stored.codes.zero_point is not None):
        return None
    if len(stored.shape) not in {2, 3} or not stored.numel or not dtype.zero_bits or dtype.bits % 8:
        return None
    rows, columns = min(stored.shape[-2], _ROWS), stored.shape[-1]
    size = dtype.itemsize
    width = min(columns, _BYTES // (_ROWS * size))
    bits = np.empty((rows, width), dtype=f"u{size}")
    for row in range(rows):
        reader.read_into(stored, row * columns * size, bits[row])
    flags: Flags = (bits & bits.dtype.type(dtype.zero_bits)) != 0
    return flags


def _many(names: Iterable[str]) -> str:
    first, *others = names
    return f"{len(others) + 1:,} tensors, such as {first}" if others else first
