"""Binding: the tables of a spec and the headers of a checkpoint become bound scopes with budgets.

Owns the order of checks and which instances have one form; errors get their place in the spec here.
Called by execution.
"""

from __future__ import annotations

import sys
from itertools import chain, count
from typing import TYPE_CHECKING, Any

from sparseprune.engine.grids import block_extents, divide, scope_extents, surviving
from sparseprune.errors import SparsityError
from sparseprune.spec.bound import (
    BoundBlock,
    BoundBlockCoupling,
    BoundInstance,
    BoundRule,
    BoundScope,
    BoundScopeCoupling,
    BoundSpec,
    Budget,
)
from sparseprune.spec.checking import leaves_of, table_of
from sparseprune.spec.expressions import (
    RESERVED,
    Environment,
    ExpressionError,
    Names,
    expressions_of,
    misfit,
    resolve_variables,
)
from sparseprune.spec.locating import JoinedSite, TensorSite, label, locate
from sparseprune.spec.problems import Misfit, Problems, shown
from sparseprune.spec.schema import reconstruct_of, score_of, soft_of
from sparseprune.spec.shaping import check_overlaps, coupled, layout_of

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping, Sequence

    from sparseprune.spec.bound import TensorInfo
    from sparseprune.spec.checking import Table
    from sparseprune.spec.locating import Site
    from sparseprune.spec.schema import BudgetTable, Spec

Part = BoundBlock | BoundBlockCoupling | BoundScope | BoundScopeCoupling


def bind(spec: Spec, tensors: Sequence[TensorInfo], config: Mapping[str, Any] | None = None) -> BoundSpec:
    """Bind a spec to the tensors and the config.json of a checkpoint.

    Raises:
        SpecError: with every problem, each one line.
    """
    problems = Problems(spec.source)
    environment = Environment(resolve_variables(spec.variables, config, problems), config)
    sites = locate(spec, tensors, environment, problems)
    binder = _Binder(spec, environment)
    rules = tuple(
        BoundRule(".".join(table), tuple(binder.instances(table, sites[table], problems)))
        for table in _outermost(spec)
        if sites[table]
    )
    check_overlaps(rules, problems)
    problems.raise_if_any()
    if not rules:
        problems.add(
            "",
            "",
            "no rule reaches a tensor: all rules are optional, and the checkpoint has none of their tensors",
        )
    problems.raise_if_any()
    return BoundSpec(rules, spec.covers)


def _outermost(spec: Spec) -> Iterator[Table]:
    members = spec.coupled_scopes()
    yield from (("scope", name) for name in spec.scope if name not in members)
    yield from (("scope_coupling", name) for name in spec.scope_coupling)


class _Binder:
    """Binds the sites of tables: the first one of each form by the tables, the others as its copies.

    Sites have one form if their tensors agree in shape and dtype, and their captures as far as expressions
    use them. Sites that do not fit are not copied, so that each one is reported under its own name.
    """

    def __init__(self, spec: Spec, environment: Environment) -> None:
        self._spec = spec
        self._environment = environment
        self._parts: dict[Hashable, Part] = {}
        self._used: dict[Table, frozenset[str]] = {}
        self._numbers = count()

    def instances(self, table: Table, sites: Sequence[Site], problems: Problems) -> Iterator[BoundInstance]:
        """The instances of an outermost table; what does not fit is a problem."""
        first_of: dict[Hashable, BoundInstance] = {}
        used = self._captures_used(table)
        for site in sites:
            form = _form(site, used)
            first = first_of.get(form)
            if first is not None:
                scope: Any = _renamed(first.scope, site)
                method = (first.budget, first.sparsity, first.score, first.soft, first.reconstruct)
                yield BoundInstance(scope.label, site.captures, scope, *method, first.form)
                continue
            try:
                first_of[form] = self._instance(table, site)
            except Misfit as misfit:
                problems.note(misfit)
            else:
                yield first_of[form]

    def _instance(self, table: Table, site: Site) -> BoundInstance:
        spec, read = self._spec, table_of(self._spec, table)
        scope: Any = self._part(table, site)
        names = Names(self._environment, site.captures)
        budget, sparsity = budget_of(".".join(table), read, scope.label, scope.blocks_per_scope, names)
        score = score_of(read.score or spec.score, spec.directory)
        soft = soft_of(read, spec.directory)
        reconstruct = reconstruct_of(read.reconstruct or spec.reconstruct, spec.directory)
        form = next(self._numbers)
        return BoundInstance(
            scope.label, site.captures, scope, budget, sparsity, score, soft, reconstruct, form
        )

    def _captures_used(self, table: Table) -> frozenset[str]:
        """The captures that expressions of a table and of those below it use."""
        if table not in self._used:
            kind, name = table
            tables = {table, *leaves_of(self._spec, table)}
            if kind == "scope_coupling":
                tables |= {("scope", scope) for scope in self._spec.scope_coupling[name].scopes}
            values = [value for each in tables for key, value in table_of(self._spec, each) if key != "where"]
            names = {name for expression in expressions_of(tuple(values)) for name in expression.names}
            self._used[table] = frozenset(names.difference(self._environment.variables, RESERVED))
        return self._used[table]

    def _part(self, table: Table, site: Site) -> Any:  # noqa: ANN401  (which part, the kind of table says)
        """What a table makes of one of its sites; Misfit where it cannot."""
        form = table, _form(site, self._captures_used(table))
        known = self._parts.get(form)
        if known is not None:
            return _renamed(known, site)
        kind, name = table
        if kind == "scope":
            part: Part = self._scope(name, site)
        else:
            part = self._block(table, site) if kind == "block" else self._coupling(table, site)
        self._parts[form] = part
        return part

    def _scope(self, name: str, site: Site) -> BoundScope:
        table = self._spec.scope[name]
        block: BoundBlock | BoundBlockCoupling
        if isinstance(table.block, str):
            kind = "block" if table.block in self._spec.block else "block_coupling"
            block = self._part((kind, table.block), site)
        else:
            block = self._block(("scope", name), site)
        grid = block.grid_shape
        try:
            shape = scope_extents(grid, Names(self._environment, site.captures).extents(table.shape))
            divide(grid, shape, "scope", "block grid")
        except ExpressionError as error:
            raise misfit(f"scope.{name}", "shape", error, label(name, site)) from error
        except SparsityError as error:
            raise Misfit(f"scope.{name}", "shape", f"{_where(block)}: {error}") from error
        return BoundScope(label(name, site), block, shape)

    def _coupling(self, table: Table, site: Site) -> BoundBlockCoupling | BoundScopeCoupling:
        kind, name = table
        if not isinstance(site, JoinedSite):
            raise TypeError("the instances of a coupling are joined sites")
        read = table_of(self._spec, table)
        parts = [
            [self._part((read.member_kind, member), each) for each in sites]
            for member, sites in zip(read.members, site.members, strict=True)
        ]
        try:
            members, orders = coupled(parts, read.orders)
        except SparsityError as error:
            key = "orders" if read.orders else read.members_key
            raise Misfit(".".join(table), key, f"{label(name, site)}: {error}") from error
        make = BoundBlockCoupling if kind == "block_coupling" else BoundScopeCoupling
        return make(label(name, site), members, orders)

    def _block(self, table: Table, site: Site) -> BoundBlock:
        """The blocks of a tensor, as a [block] has them or the short form of a [scope]."""
        if not isinstance(site, TensorSite):
            raise TypeError(f"the instances of {'.'.join(table)} are tensors, not couplings")
        kind, name = table
        key, tensor, read = (
            ("shape" if kind == "block" else "block"),
            site.tensor,
            table_of(self._spec, table),
        )
        names = Names(self._environment, site.captures, tensor)
        layout = layout_of(".".join(table), read, tensor, names)
        try:
            extents = block_extents(layout.shape, names.extents(getattr(read, key)))
            divide(layout.shape, extents, "block", "tensor" if layout.shape == tensor.shape else "view")
        except ExpressionError as error:
            raise misfit(".".join(table), key, error, tensor.name) from error
        except SparsityError as error:
            raise Misfit(".".join(table), key, f"{tensor.name}: {error}") from error
        return BoundBlock(label(name, site), tensor.name, layout.shape, layout.stride, layout.offset, extents)


def _form(site: Site, used: frozenset[str]) -> Hashable:
    """What all sites share that are bound alike, up to their names."""
    if isinstance(site, TensorSite):
        form: Hashable = site.tensor.shape, site.tensor.dtype
    else:
        form = tuple([tuple([_form(each, used) for each in sites]) for sites in site.members])
    return (form, *[pair for pair in site.captures if pair[0] in used]) if used else form


def _renamed(part: Part, site: Site) -> Part:
    """A part of the same form for another site: its labels and tensors are those of that site."""
    if isinstance(part, BoundScope):
        block: Any = _renamed(part.block, site)
        if part.label == part.block.label:  # the short form: scope and block share one text
            return BoundScope(block.label, block, part.shape)
        return BoundScope(_relabelled(part, site), block, part.shape)
    if isinstance(part, BoundBlock):
        tensor = site.tensor.name if isinstance(site, TensorSite) else ""
        own = _relabelled(part, site)
        return BoundBlock(own, tensor, part.view_shape, part.view_stride, part.view_offset, part.shape)
    sites = chain.from_iterable(site.members if isinstance(site, JoinedSite) else ())
    parts: tuple[Part, ...] = part.members
    members: Any = tuple([_renamed(member, each) for member, each in zip(parts, sites, strict=True)])
    return type(part)(_relabelled(part, site), members, part.orders)


def _relabelled(part: Part, site: Site) -> str:
    return label(part.label.partition("[")[0], site)


def _where(block: BoundBlock | BoundBlockCoupling) -> str:
    """How a user knows the block grid: the tensor, or the coupling with its first tensor."""
    first = block.leaves[0].tensor
    return first if len(block.leaves) == 1 else f"{block.label} ({first} and others)"


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
