"""Binding: the tables of a spec and the headers of a checkpoint become bound scopes with budgets.

Owns the order of checks; errors get their place in the spec here. Called by execution.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

from sparseprune.engine.grids import Shape, prod, surviving
from sparseprune.engine.rearranging import rearranged
from sparseprune.errors import ShapeMismatchError, SparsityError
from sparseprune.spec.bound import BoundBlock, BoundInstance, BoundRule, BoundSpec, Budget
from sparseprune.spec.checking import leaves_of_table, look_of_table
from sparseprune.spec.expressions import (
    Environment,
    ExpressionError,
    Names,
    came_to,
    misfit,
    resolve_variables,
)
from sparseprune.spec.locating import JoinedSite, Site, TensorSite, label, locate
from sparseprune.spec.problems import Misfit, Problems, shown
from sparseprune.spec.schema import ExplicitView, expressions_of, reconstruct_of, score_of, soft_of
from sparseprune.spec.shaping import (
    Layout,
    blocks_in,
    check_overlaps,
    compete,
    fuse,
    is_injective,
    scope_of,
    whole,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sparseprune.spec.bound import BoundBlockCoupling, BoundScope, BoundScopeCoupling, TensorInfo
    from sparseprune.spec.expressions import Expression, SliceEntry
    from sparseprune.spec.locating import Sites
    from sparseprune.spec.schema import BlockTable, BudgetTable, ScopeTable, Spec, TensorsTable


def budget_of(
    place: str, table: BudgetTable, label: str, blocks: int, names: Names
) -> tuple[Budget, float | None]:
    """The budget of a scope of so many blocks, and the sparsity that was asked for.

    Misfit where an expression gives no number in range, or more should survive than there is.
    """
    key = ""
    try:
        if table.threshold is not None:
            key = "threshold"
            return Budget(threshold=names.number(table.threshold, sys.float_info.max, "0 or more")), None
        sparsity, asked = None, 0
        if table.nnz is not None:
            key = "nnz"
            asked = names.integer(table.nnz, 0, f"0 to {blocks}")
            if asked > blocks:
                found = "" if isinstance(table.nnz, int) else f"{shown(table.nnz.text)}: "
                text = (
                    f"{found}found {asked}, wanted 0 to {blocks}: that many blocks has each scope of {label}"
                )
                raise Misfit(place, key, text)
        elif table.sparsity is not None:
            key = "sparsity"
            sparsity = names.number(table.sparsity, 1.0, "a number from 0 to 1")
            asked = surviving(sparsity, blocks)
        key = "multiple_of"
        unit = 1 if table.multiple_of is None else names.integer(table.multiple_of, 1, "1 or more")
    except ExpressionError as error:
        raise misfit(place, key, error, label) from error
    return Budget(nnz=min(blocks, -(-asked // unit) * unit), multiple_of=unit), sparsity


Axes = tuple[tuple[str, int], ...]


def layout_of(place: str, table: TensorsTable, tensor: TensorInfo, names: Names) -> Layout:
    """How a table looks at one of its tensors; Misfit where it cannot."""
    layout = whole(tensor.shape)
    if table.slice is None and table.view is None:
        return layout
    key = "slice"
    try:
        if table.slice is not None:
            layout = _sliced(layout, table.slice, names)
        if isinstance(table.view, ExplicitView):
            key = "view"
            layout = _explicit(tensor, table.view, names)
        elif table.view is not None:
            key = "axes"
            axes = tuple((name, names.integer(size, 1, "1 or more")) for name, size in table.axes)
            key = "view"
            layout = _rearranged(layout, table.view, axes)
    except ExpressionError as error:
        raise misfit(place, key, error, tensor.name) from error
    except SparsityError as error:
        raise Misfit(place, key, f"{tensor.name}: {error}") from error
    return layout


def _sliced(layout: Layout, entries: tuple[SliceEntry, ...], names: Names) -> Layout:
    if len(entries) != len(layout.shape):
        raise ShapeMismatchError(
            f"found {len(entries)} entries for the shape {list(layout.shape)}: "
            'give one for each dimension (":" takes all of it)'
        )
    bounds = [_bounds(entry, size, names) for entry, size in zip(entries, layout.shape, strict=True)]
    offset = sum(low * stride for (low, _), stride in zip(bounds, layout.stride, strict=True))
    return Layout(tuple([high - low for low, high in bounds]), layout.stride, offset)


def _bounds(entry: SliceEntry, size: int, names: Names) -> tuple[int, int]:
    if entry.is_whole:
        return 0, size
    low = 0 if entry.low is None else _bound(entry.low, size, size - entry.single, names)
    high = size if entry.high is None else _bound(entry.high, size, size, names)
    if entry.single:
        return low, low + 1
    if low >= high:
        raise ShapeMismatchError(f"{shown(entry.text)} is {low}:{high}, which takes nothing of {size}")
    return low, high


def _bound(bound: Expression, size: int, most: int, names: Names) -> int:
    """A bound counted from the front; ExpressionError where it lies outside."""
    found = names.value(bound)
    if isinstance(found, bool) or not isinstance(found, int) or not -size <= found <= most:
        raise came_to(bound, found, f"an integer from {-size} to {most}, as the dimension has {size}")
    return found + size if found < 0 else found


def _explicit(tensor: TensorInfo, view: ExplicitView, names: Names) -> Layout:
    shape = tuple([names.integer(size, 1, "1 or more") for size in view.shape])
    stride = tuple([names.integer(step, 0, "0 or more") for step in view.stride])
    layout = Layout(shape, stride, names.integer(view.offset, 0, "0 or more"))
    if len(shape) != len(stride):
        raise ShapeMismatchError(
            f"shape {list(shape)} and stride {list(stride)} must have one entry for each dimension"
        )
    last = layout.offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if last >= prod(tensor.shape):
        raise ShapeMismatchError(
            f"the view reaches element {last}, the tensor {list(tensor.shape)} has {prod(tensor.shape)}: "
            "strides and offset count elements of the row-major tensor"
        )
    if not is_injective(shape, stride):
        raise ShapeMismatchError(
            f"shape {list(shape)} with stride {list(stride)} has elements in common: "
            "each element may be seen at one place only"
        )
    return layout


@lru_cache(maxsize=256)
def _rearranged(layout: Layout, pattern: str, axes: Axes) -> Layout:
    seen = rearranged(layout.shape, layout.stride, pattern, dict(axes))
    return Layout(seen.shape, seen.stride, layout.offset)


Alike = tuple[str, str, Shape, str]  # a table's kind and name, the shape and dtype of tensors that it finds
Look = tuple[Layout, Shape]  # a view, and the extents of the blocks in it


@dataclass(frozen=True, slots=True)
class _Meeting:
    """A spec and what its expressions may name; `looks` are those in which no capture has a say."""

    spec: Spec
    environment: Environment
    looks: Mapping[Alike, Look]


def bind(spec: Spec, tensors: Sequence[TensorInfo], config: Mapping[str, Any] | None = None) -> BoundSpec:
    """Bind a spec to the tensors and the config.json of a checkpoint.

    Raises:
        SpecError: with every problem, each one line.
    """
    problems = Problems(spec.source)
    environment = Environment(resolve_variables(spec.variables, config, problems), config)
    sites = locate(spec, tensors, environment, problems)
    meeting = _Meeting(spec, environment, dict(_common_looks(spec, environment, sites)))
    rules = tuple(
        BoundRule(f"{kind}.{name}", tuple(_instances(meeting, kind, name, sites[kind, name], problems)))
        for kind, name in _outermost(spec)
        if sites[kind, name]
    )
    check_overlaps(rules, problems)
    problems.raise_if_any()
    if not rules:
        problems.add("", "", "no rule reaches a tensor: all of them are optional, and none is there")
    problems.raise_if_any()
    return BoundSpec(rules, spec.covers)


def _common_looks(spec: Spec, environment: Environment, sites: Sites) -> Iterator[tuple[Alike, Look]]:
    """How tables look at tensors of one shape and dtype, where it is the same for all of these.

    A look that does not fit is left out: it has to be told with the tensor that it does not fit.
    """
    for kind, name in sites:
        if (kind, name) not in leaves_of_table(spec, kind, name):
            continue
        if not environment.settles(chain(*look_of_table(spec, kind, name).values())):
            continue
        found = [site for site in sites[kind, name] if isinstance(site, TensorSite)]
        for (shape, dtype), site in {(each.tensor.shape, each.tensor.dtype): each for each in found}.items():
            with suppress(Misfit):
                yield (kind, name, shape, dtype), _look(spec, environment, kind, name, site)


def _outermost(spec: Spec) -> Iterator[tuple[str, str]]:
    coupled = spec.coupled_scopes()
    yield from (("scope", name) for name in spec.scope if name not in coupled)
    yield from (("scope_coupling", name) for name in spec.scope_coupling)


def _instances(
    meeting: _Meeting, kind: str, name: str, sites: Sequence[Site], problems: Problems
) -> Iterator[BoundInstance]:
    table: BudgetTable = getattr(meeting.spec, kind)[name]
    directory = meeting.spec.directory
    score = score_of(table.score or meeting.spec.score, directory)
    soft = soft_of(table, directory)
    reconstruct = reconstruct_of(table.reconstruct or meeting.spec.reconstruct, directory)
    entries = (table.nnz, table.sparsity, table.threshold, table.multiple_of)
    is_common = meeting.environment.settles(expressions_of(entries))
    budgets: dict[int, tuple[Budget, float | None]] = {}  # by the blocks in a scope, where they are common
    for site in sites:
        try:
            scope = _rule_scope(meeting, kind, name, site)
            blocks = scope.blocks_per_scope
            found = budgets.get(blocks)
            if found is None:
                names = Names(meeting.environment, site.captures)
                found = budget_of(f"{kind}.{name}", table, scope.label, blocks, names)
        except Misfit as misfit:
            problems.note(misfit)
        else:
            if is_common:
                budgets[blocks] = found
            yield BoundInstance(scope.label, site.captures, scope, *found, score, soft, reconstruct)


def _rule_scope(meeting: _Meeting, kind: str, name: str, site: Site) -> BoundScope | BoundScopeCoupling:
    if kind == "scope":
        return _scope(meeting, name, site)
    return _coupled_scopes(meeting, name, _joined(site))


def _coupled_scopes(meeting: _Meeting, name: str, site: JoinedSite) -> BoundScopeCoupling:
    table = meeting.spec.scope_coupling[name]
    members = [
        [_scope(meeting, scope, each) for each in sites]
        for scope, sites in zip(table.scopes, site.members, strict=True)
    ]
    try:
        return compete(label(name, site), members, table.orders)
    except SparsityError as error:
        key = "orders" if table.orders else "scopes"
        raise Misfit(f"scope_coupling.{name}", key, f"{label(name, site)}: {error}") from error


def _scope(meeting: _Meeting, name: str, site: Site) -> BoundScope:
    spec = meeting.spec
    table = spec.scope[name]
    if not isinstance(table.block, str):
        block: BoundBlock | BoundBlockCoupling = _block(meeting, "scope", name, site)
    elif table.block in spec.block:
        block = _block(meeting, "block", table.block, site)
    else:
        block = _fused_blocks(meeting, table.block, _joined(site))
    try:
        shape = Names(meeting.environment, site.captures).extents(table.shape)
        # A block of the short form has the label of its scope: one text for both.
        own = block.label if not isinstance(table.block, str) else label(name, site)
        return scope_of(own, block, shape)
    except ExpressionError as error:
        raise misfit(f"scope.{name}", "shape", error, label(name, site)) from error
    except SparsityError as error:
        raise Misfit(f"scope.{name}", "shape", f"{_where(block)}: {error}") from error


def _fused_blocks(meeting: _Meeting, name: str, site: JoinedSite) -> BoundBlockCoupling:
    table = meeting.spec.block_coupling[name]
    members = [
        [_block(meeting, "block", block, each) for each in sites]
        for block, sites in zip(table.blocks, site.members, strict=True)
    ]
    try:
        return fuse(label(name, site), members, table.orders)
    except SparsityError as error:
        key = "orders" if table.orders else "blocks"
        raise Misfit(f"block_coupling.{name}", key, f"{label(name, site)}: {error}") from error


def _block(meeting: _Meeting, kind: str, name: str, site: Site) -> BoundBlock:
    """The blocks of a tensor, as a [block] has them or the short form of a [scope]."""
    if not isinstance(site, TensorSite):
        raise TypeError(f"the instances of {kind}.{name} are tensors, not couplings")
    tensor = site.tensor
    look = meeting.looks.get((kind, name, tensor.shape, tensor.dtype))
    layout, extents = look or _look(meeting.spec, meeting.environment, kind, name, site)
    return BoundBlock(label(name, site), tensor.name, layout.shape, layout.stride, layout.offset, extents)


def _look(spec: Spec, environment: Environment, kind: str, name: str, site: TensorSite) -> Look:
    """How a table looks at one of its tensors; Misfit where it cannot."""
    table: BlockTable | ScopeTable = getattr(spec, kind)[name]
    key, tensor, place = ("shape" if kind == "block" else "block"), site.tensor, f"{kind}.{name}"
    names = Names(environment, site.captures, tensor)
    try:
        layout = layout_of(place, table, tensor, names)
        return layout, blocks_in(layout, names.extents(getattr(table, key)), tensor.shape)
    except ExpressionError as error:
        raise misfit(place, key, error, tensor.name) from error
    except SparsityError as error:
        raise Misfit(place, key, f"{tensor.name}: {error}") from error


def _joined(site: Site) -> JoinedSite:
    if not isinstance(site, JoinedSite):
        raise TypeError("the instances of a coupling are joined sites")
    return site


def _where(block: BoundBlock | BoundBlockCoupling) -> str:
    """What a user knows the block grid by: the tensor, or the coupling with its first tensor."""
    first = block.leaves[0].tensor
    return first if len(block.leaves) == 1 else f"{block.label} ({first} and others)"
