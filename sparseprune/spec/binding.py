"""Spec x headers -> BoundSpec: every rule as instances with resolved shapes, or every problem at once.

`locating` says which tensors belong together, `shaping` what their shapes come to, `budgets` what shall
survive; here the tables' errors get their place. Called by the pipeline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparseprune.errors import SparsityError
from sparseprune.spec.bound import BoundInstance, BoundRule, BoundSpec
from sparseprune.spec.budgets import budget_of
from sparseprune.spec.locating import locate
from sparseprune.spec.overlap import check_overlaps
from sparseprune.spec.problems import Misfit, Problems
from sparseprune.spec.shaping import block_of, compete, fuse, scope_of
from sparseprune.spec.sites import JoinedSite, Site, TensorSite, label

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sparseprune.spec.bound import (
        BoundBlock,
        BoundBlockCoupling,
        BoundScope,
        BoundScopeCoupling,
        TensorInfo,
    )
    from sparseprune.spec.schema import BudgetTable, Spec


def bind(spec: Spec, tensors: Sequence[TensorInfo]) -> BoundSpec:
    """Bind a spec to the tensors of a checkpoint; SpecError with every problem, each one line."""
    problems = Problems(spec.source)
    sites = locate(spec, tensors, problems)
    rules = tuple(
        BoundRule(f"{kind}.{name}", tuple(_instances(spec, kind, name, table, sites[kind, name], problems)))
        for kind, name, table in _outermost(spec)
    )
    check_overlaps(rules, problems)
    problems.raise_if_any()
    return BoundSpec(rules)


def _outermost(spec: Spec) -> Iterator[tuple[str, str, BudgetTable]]:
    coupled = spec.coupled_scopes()
    yield from (("scope", name, table) for name, table in spec.scope.items() if name not in coupled)
    yield from (("scope_coupling", name, table) for name, table in spec.scope_coupling.items())


def _instances(
    spec: Spec, kind: str, name: str, table: BudgetTable, sites: Sequence[Site], problems: Problems
) -> Iterator[BoundInstance]:
    for site in sites:
        try:
            scope = _rule_scope(spec, kind, name, site)
            budget = budget_of(f"{kind}.{name}", table, scope.label, scope.blocks_per_scope)
        except Misfit as misfit:
            problems.note(misfit)
        else:
            yield BoundInstance(scope.label, site.captures, scope, budget, table.sparsity)


def _rule_scope(spec: Spec, kind: str, name: str, site: Site) -> BoundScope | BoundScopeCoupling:
    return _scope(spec, name, site) if kind == "scope" else _coupled_scopes(spec, name, _joined(site))


def _coupled_scopes(spec: Spec, name: str, site: JoinedSite) -> BoundScopeCoupling:
    table = spec.scope_coupling[name]
    members = [
        [_scope(spec, scope, each) for each in sites]
        for scope, sites in zip(table.scopes, site.members, strict=True)
    ]
    try:
        return compete(label(name, site), members, table.orders)
    except SparsityError as error:
        key = "orders" if table.orders else "scopes"
        raise Misfit(f"scope_coupling.{name}", key, f"{label(name, site)}: {error}") from error


def _scope(spec: Spec, name: str, site: Site) -> BoundScope:
    table = spec.scope[name]
    if not isinstance(table.block, str):
        block: BoundBlock | BoundBlockCoupling = _block(f"scope.{name}", "block", name, table.block, site)
    elif table.block in spec.block:
        block = _block(f"block.{table.block}", "shape", table.block, spec.block[table.block].shape, site)
    else:
        block = _fused_blocks(spec, table.block, _joined(site))
    try:
        return scope_of(label(name, site), block, table.shape)
    except SparsityError as error:
        raise Misfit(f"scope.{name}", "shape", f"{_where(block)}: {error}") from error


def _fused_blocks(spec: Spec, name: str, site: JoinedSite) -> BoundBlockCoupling:
    table = spec.block_coupling[name]
    members = [
        [_block(f"block.{block}", "shape", block, spec.block[block].shape, each) for each in sites]
        for block, sites in zip(table.blocks, site.members, strict=True)
    ]
    try:
        return fuse(label(name, site), members, table.orders)
    except SparsityError as error:
        key = "orders" if table.orders else "blocks"
        raise Misfit(f"block_coupling.{name}", key, f"{label(name, site)}: {error}") from error


def _block(place: str, key: str, name: str, shape: tuple[int, ...], site: Site) -> BoundBlock:
    if not isinstance(site, TensorSite):
        raise TypeError(f"the instances of {place} are tensors, not couplings")
    try:
        return block_of(label(name, site), site.tensor, shape)
    except SparsityError as error:
        raise Misfit(place, key, f"{site.tensor.name}: {error}") from error


def _joined(site: Site) -> JoinedSite:
    if not isinstance(site, JoinedSite):
        raise TypeError("the instances of a coupling are joined sites")
    return site


def _where(block: BoundBlock | BoundBlockCoupling) -> str:
    """What a user knows the block grid by: the tensor, or the coupling with its first tensor."""
    first = block.leaves[0].tensor
    return first if len(block.leaves) == 1 else f"{block.label} ({first} and others)"
