"""Spec x headers -> BoundSpec: every rule as instances with resolved shapes, or every problem at once.

`locating` says which tensors belong together, `viewing` and `shaping` what their shapes come to, `budgets`
what shall survive; here the tables' errors get their place. Called by execution.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from sparseprune.engine.grids import Shape
from sparseprune.errors import SparsityError
from sparseprune.spec.bound import BoundBlock, BoundInstance, BoundRule, BoundSpec
from sparseprune.spec.budgets import budget_of
from sparseprune.spec.captures import leaves_of_table, look_of_table
from sparseprune.spec.expressions import ExpressionError
from sparseprune.spec.locating import locate
from sparseprune.spec.methods import reconstruct_of, score_of, soft_of
from sparseprune.spec.names import Environment, Names, misfit
from sparseprune.spec.overlap import check_overlaps
from sparseprune.spec.problems import Misfit, Problems
from sparseprune.spec.schema import expressions_of
from sparseprune.spec.shaping import Layout, blocks_in, compete, fuse, scope_of
from sparseprune.spec.sites import JoinedSite, Site, TensorSite, label
from sparseprune.spec.variables import resolve_variables
from sparseprune.spec.viewing import layout_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sparseprune.spec.bound import (
        BoundBlockCoupling,
        BoundScope,
        BoundScopeCoupling,
        Budget,
        TensorInfo,
    )
    from sparseprune.spec.locating import Sites
    from sparseprune.spec.schema import BlockTable, BudgetTable, ScopeTable, Spec

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
