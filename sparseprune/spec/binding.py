"""Binding: the tables of a spec and the headers of a checkpoint become bound scopes with budgets.

Owns the order of checks, which instances have one form, how a table looks at a tensor (slices, views,
strides), and grids that align in couplings. Errors get their place in the spec here. Called by execution.
"""

from __future__ import annotations

import dataclasses
import sys
from contextlib import contextmanager
from itertools import accumulate, chain, count
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from sparseprune.engine.grids import (
    LARGEST_TILE,
    Shape,
    align,
    block_extents,
    divide,
    identity_order,
    prod,
    rearranged,
    scope_extents,
    surviving,
)
from sparseprune.errors import ShapeMismatchError, SparsityError
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
from sparseprune.spec.expressions import (
    RESERVED,
    ExpressionError,
    Names,
    came_to,
    expressions_of,
    misfit,
    resolve_variables,
)
from sparseprune.spec.locating import JoinedSite, Model, TensorSite, label, locate
from sparseprune.spec.nesting import bounded
from sparseprune.spec.overlaps import check_overlaps, is_injective
from sparseprune.spec.problems import Misfit, Problems, shown
from sparseprune.spec.schema import (
    BlockTable,
    BudgetTable,
    CouplingTable,
    ExplicitView,
    ScopeTable,
    TensorsTable,
    allocate_of,
    reconstruct_of,
    score_of,
    soft_of,
)

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

    from sparseprune.spec.bound import TensorInfo
    from sparseprune.spec.expressions import Expression, SliceEntry
    from sparseprune.spec.locating import Site
    from sparseprune.spec.schema import Spec
    from sparseprune.spec.structures import Outlook


class Layout(Struct, frozen=True):
    """The elements of a view: `stride` and `offset` count elements of the row-major tensor."""

    shape: Shape
    stride: Shape
    offset: int = 0


@contextmanager
def _placed(place: str, key: str, what: str) -> Iterator[None]:
    """Errors of expressions and shapes become Misfits of a table's key and its tensor or instance."""
    try:
        yield
    except ExpressionError as error:
        raise misfit(place, key, error, what) from error
    except SparsityError as error:
        raise Misfit(place, key, f"{what}: {error}") from error


def layout_of(
    place: str, table: TensorsTable, tensor: TensorInfo, names: Names, seen: Outlook | None = None
) -> Layout:
    """The view that a table has of a tensor, `seen` as part of a structure; Misfit where it does not fit."""
    layout = Layout(tensor.shape, _contiguous_stride(tensor.shape))
    if seen is not None:
        layout = Layout(seen.shape, seen.stride, seen.offset)
    if table.slice is not None:
        with _placed(place, "slice", tensor.name):
            layout = _sliced(layout, table.slice, names)
    if isinstance(table.view, ExplicitView):
        with _placed(place, "view", tensor.name):
            layout = _explicit(tensor, table.view, names)
    elif table.view is not None:
        with _placed(place, "axes", tensor.name):
            axes = {name: names.integer(size, 1, "1 or more") for name, size in table.axes}
        with _placed(place, "view", tensor.name):
            pattern = table.view if seen is None else _with_leading(table.view, seen.leading)
            outline = rearranged(layout.shape, layout.stride, pattern, axes)
            layout = Layout(outline.shape, outline.stride, layout.offset)
    return layout


def _with_leading(pattern: str, leading: int) -> str:
    """An einops pattern of one matrix as that of a stack of them.

    >>> _with_leading("m (k p) -> m k p", 1)
    'stack0 m (k p) -> stack0 m k p'
    """
    names = "".join(f"stack{number} " for number in range(leading))
    return " -> ".join(names + side.strip() for side in pattern.split("->"))


def _padded(extents: Shape, rank: int, seen: Outlook | None) -> Shape:
    """Extents of a block or scope of one matrix of a stack, or of units with all that belongs to them."""
    if seen is None or not extents:
        return extents
    padded = (1,) * seen.leading + extents
    return padded + (-1,) * (rank - len(padded))


def _sliced(layout: Layout, entries: tuple[SliceEntry, ...], names: Names) -> Layout:
    if len(entries) != len(layout.shape):
        found = f"found {len(entries)} entries for the shape {list(layout.shape)}"
        raise ShapeMismatchError(f'{found}: give one for each dimension (":" takes all of it)')
    bounds = [_bounds(entry, size, names) for entry, size in zip(entries, layout.shape, strict=True)]
    offset = sum(low * stride for (low, _), stride in zip(bounds, layout.stride, strict=True))
    return Layout(tuple([high - low for low, high in bounds]), layout.stride, offset)


def _bounds(entry: SliceEntry, size: int, names: Names) -> tuple[int, int]:
    if entry.low is None and entry.high is None:
        return 0, size
    low = 0 if entry.low is None else _bound(entry.low, size, size - entry.single, names)
    high = size if entry.high is None else _bound(entry.high, size, size, names)
    if entry.single:
        return low, low + 1
    if low >= high:
        text = f"is {low}:{high}, which is empty in a dimension of {size}"
        raise ShapeMismatchError(f"{shown(entry.text)} {text}")
    return low, high


def _bound(bound: Expression, size: int, most: int, names: Names) -> int:
    """A bound counted from the front; ExpressionError if it lies outside."""
    found = names.value(bound)
    if isinstance(found, bool) or not isinstance(found, int) or not -size <= found <= most:
        raise came_to(bound, found, f"an integer from {-size} to {most}, as the dimension has {size}")
    return found + size if found < 0 else found


def _explicit(tensor: TensorInfo, view: ExplicitView, names: Names) -> Layout:
    shape = tuple([names.integer(size, 1, "1 or more") for size in view.shape])
    stride = tuple([names.integer(step, 0, "0 or more") for step in view.stride])
    layout = Layout(shape, stride, names.integer(view.offset, 0, "0 or more"))
    seen = f"shape {list(shape)} and stride {list(stride)}"
    if len(shape) != len(stride):
        raise ShapeMismatchError(f"{seen} must have one entry for each dimension")
    last = layout.offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if last >= prod(tensor.shape):
        there = f"the tensor {list(tensor.shape)} has {prod(tensor.shape)}"
        text = "strides and offset count elements of the row-major tensor"
        raise ShapeMismatchError(f"the view reaches element {last}, {there}: {text}")
    if not is_injective(shape, stride):
        seen = f"shape {list(shape)} with stride {list(stride)}"
        text = "a view may reach each element once"
        raise ShapeMismatchError(f"{seen} reaches some elements twice: {text}")
    return layout


Member = TypeVar("Member", BoundBlock, BoundScope)


def coupled(
    groups: Sequence[Sequence[Member]], orders: Sequence[Shape] | None
) -> tuple[tuple[Member, ...], tuple[Shape, ...]]:
    """The members of a coupling in one list, all of one rank, with an order each.

    `orders` has one for each group. CouplingError where the grids of members do not align.
    """
    rank = max(len(member.shape) for group in groups for member in group)
    given = orders or [identity_order(rank)] * len(groups)
    pairs = [(member, order) for group, order in zip(groups, given, strict=True) for member in group]
    full = tuple([_widened_order(order, len(member.shape), rank) for member, order in pairs])
    members = tuple([_widened(member, rank) for member, _ in pairs])
    distinct: dict[tuple[Shape, Shape], str] = {}  # thousands of members have a handful of grids
    for member, order in zip(members, full, strict=True):
        distinct.setdefault((member.grid_shape, order), member.label)
    align([grid for grid, _ in distinct], [order for _, order in distinct], list(distinct.values()))
    return members, full


def _widened(part: Member, rank: int) -> Member:
    """The same elements with unit dimensions appended until the grid has this rank."""
    if len(part.shape) == rank:
        return part
    ones = (1,) * (rank - len(part.shape))
    if isinstance(part, BoundScope):
        return replace(part, block=_widened_block(part.block, rank), shape=part.shape + ones)
    view_shape, view_stride = part.view_shape + ones, part.view_stride + ones
    return replace(part, view_shape=view_shape, view_stride=view_stride, shape=part.shape + ones)


def _widened_block(block: BoundBlock | BoundBlockCoupling, rank: int) -> BoundBlock | BoundBlockCoupling:
    if isinstance(block, BoundBlock):
        return _widened(block, rank)
    members = tuple(_widened(member, rank) for member in block.members)
    orders = tuple(_widened_order(order, len(order), rank) for order in block.orders)
    return replace(block, members=members, orders=orders)


def _widened_order(order: Shape, grid_rank: int, rank: int) -> Shape:
    """An order of a member's own grid, extended for unit dimensions appended to it; others unchanged."""
    return (*order, *range(grid_rank, rank)) if len(order) == grid_rank < rank else order


def _contiguous_stride(shape: Shape) -> Shape:
    """Elements from one index to the next in each dimension of a row-major tensor.

    >>> _contiguous_stride((4, 3, 2))
    (6, 2, 1)
    """
    sizes = [max(size, 1) for size in shape[:0:-1]]
    return tuple(accumulate(sizes, int.__mul__, initial=1))[::-1] if shape else ()


def check_shares(rules: Iterable[BoundRule], problems: Problems) -> None:
    """A problem for every rule whose instances shall share one budget and cannot have unlike ones."""
    for rule in rules:
        first_of_forms = [members[0] for members in rule.forms().values()]
        if first_of_forms and first_of_forms[0].allocate is not None:
            why = _cannot_share(first_of_forms, len(rule.instances))
            if why is not None:
                instead = 'write reconstruct = { allocate = "uniform" }'
                problems.add(rule.name, "reconstruct.allocate", f"{why}; {instead}")


def _cannot_share(forms: Sequence[BoundInstance], instances: int) -> str | None:
    """Why instances, of which there is one of each form, have no budget to share; None where they have."""
    for one in forms:
        for member in one.scope.members:
            sizes = list(zip(member.shape, member.block.grid_shape, strict=True))
            if not any(size == whole > 1 for size, whole in sizes) and any(whole > 1 for _, whole in sizes):
                found = f"{one.label} has scopes of {list(member.shape)} blocks"
                return f"{found}, a pattern that has to be the same everywhere"
    first = forms[0]
    if instances == 1 and len(first.scope.members) > 1:
        return f"{first.label} alone is the rule: its scopes compete for one budget already"
    blocks = [one.scope.blocks_per_scope for one in forms]
    clamp = 0.0 if first.allocate is None else first.allocate.clamp
    if not clamp or any(surviving(clamp, each) < each for each in blocks):
        return None
    return f"clamp {clamp:g} moves none of {max(blocks)} blocks: give {1 / max(1, *blocks):.2g} or more"


Part = BoundBlock | BoundBlockCoupling | BoundScope | BoundScopeCoupling


def bind(spec: Spec, tensors: Sequence[TensorInfo], config: Mapping[str, Any] | None = None) -> BoundSpec:
    """Bind a spec to the tensors and the config.json of a checkpoint.

    Raises:
        SpecError: with every problem, each one line.
    """
    problems = Problems(spec.source)
    shared = resolve_variables(spec.variables, config, problems)
    structures = [table.structure for table in spec.tables.values() if isinstance(table, TensorsTable)]
    kinds = [kind for kind in structures if kind is not None]
    model = Model.of(tensors, config, kinds)
    sites = locate(spec, model, shared, problems)
    binder = _Binder(spec, shared)
    coupled = spec.coupled_scopes()
    rules = tuple(
        BoundRule(place, tuple(binder.instances(place, table, sites[place], problems)))
        for place, table in spec.tables.items()
        if isinstance(table, BudgetTable) and place not in coupled and sites[place]
    )
    check_overlaps(rules, spec.nested(), problems)
    check_shares(rules, problems)
    problems.raise_if_any()
    for inner, outer in spec.nested().items():
        if sites[inner] and not sites[outer]:
            text = f"[{outer}] is optional, and the checkpoint has none of its tensors"
            problems.add(inner, "within", f"{text}: make this rule fit what is there, or leave this key out")
    if not rules:
        why = "all rules are optional, and the checkpoint has none of their tensors"
        problems.add("", "", f"no rule reaches a tensor: {why}")
    problems.raise_if_any()
    return BoundSpec(bounded(rules), spec.covers)


class _Binder:
    """Binds the sites of tables: the first one of each form by the tables, the others as its copies.

    Sites have one form if their tensors agree in shape and dtype, and their captures as far as expressions
    use them. Sites that do not fit are not copied, so that each one is reported under its own name.
    """

    def __init__(self, spec: Spec, shared: Mapping[str, object]) -> None:
        self._spec = spec
        self._shared = shared
        self._parts: dict[Hashable, Part] = {}
        self._used: dict[str, frozenset[str]] = {}
        self._numbers = count()

    def instances(
        self, place: str, table: BudgetTable, sites: Sequence[Site], problems: Problems
    ) -> Iterator[BoundInstance]:
        """The instances of an outermost table; what does not fit is a problem."""
        first_of: dict[Hashable, BoundInstance] = {}
        used = self._captures_used(place)
        for site in sites:
            own = self._allocated(place, site)
            form = (_form(site, used), own)
            first = first_of.get(form)
            if first is not None:
                scope: Any = _renamed(first.scope, site)
                yield replace(first, label=scope.label, captures=site.captures, scope=scope)
                continue
            try:
                first_of[form] = self._instance(place, table, site, own)
            except Misfit as misfit:
                problems.note(misfit)
            else:
                yield first_of[form]

    def _instance(self, place: str, table: BudgetTable, site: Site, own: int | None) -> BoundInstance:
        """An instance whose part of a common budget is its `own`, where that is known."""
        spec, scope = self._spec, self._part(place, site)
        names = Names(self._shared, site.captures)
        budget, sparsity = budget_of(place, table, scope.label, scope.blocks_per_scope, names)
        score = score_of(table.score or spec.score, spec.directory)
        soft = soft_of(table, spec.directory)
        rebuilt = reconstruct_of(table.reconstruct or spec.reconstruct, spec.directory)
        shared = allocate_of(table.reconstruct or spec.reconstruct, spec.directory, budget.nnz)
        if shared is not None and own is not None:
            shared, budget = replace(shared, decided=True), dataclasses.replace(budget, nnz=own)
        permute = isinstance(table, ScopeTable) and _is_true(place, "permute", table, scope, names)
        if isinstance(table, ScopeTable) and _is_true(place, "transposable", table, scope, names):
            if permute:
                raise Misfit(
                    place, "transposable", f"{scope.label}: permute moves inputs alone: leave one out"
                )
            scope, budget = _tiled(place, scope, budget), _budget_of_tile(scope, budget)
        what = (scope.label, site.captures, scope, budget, sparsity)
        number, within = next(self._numbers), spec.outer(place)
        found = BoundInstance(*what, score, soft, rebuilt, shared, number, permute, within)
        least, most = found.kept_range or (0, scope.blocks_per_scope)
        if own is not None and not least <= own <= most:
            text = f"{scope.label}: found {own} as its part of the common budget, wanted {least} to {most}"
            raise Misfit(place, "reconstruct.allocate", f"{text}: it is that of another spec")
        return found

    def _allocated(self, place: str, site: Site) -> int | None:
        """What a scope keeps of a budget that instances share; None where nobody knows."""
        known = self._spec.allocated.get(place)
        return None if known is None else known.get(label(place, site))

    def _captures_used(self, place: str) -> frozenset[str]:
        """The captures that expressions of a table and of those below it use."""
        if place not in self._used:
            tables = [self._spec.tables[each] for each in self._spec.tables_in(place)]
            values = tuple(value for table in tables for key, value in table if key != "where")
            names = {name for expression in expressions_of(values) for name in expression.names}
            self._used[place] = frozenset(names.difference(self._shared, RESERVED))
        return self._used[place]

    def _part(self, place: str, site: Site) -> Any:  # noqa: ANN401  (which part, the kind of table says)
        """What a table makes of one of its sites; Misfit where it cannot."""
        form = place, _form(site, self._captures_used(place))
        known = self._parts.get(form)
        if known is not None:
            return _renamed(known, site)
        table = self._spec.tables[place]
        if isinstance(table, CouplingTable):
            part: Part = self._coupling(place, table, site)
        elif isinstance(table, ScopeTable):
            part = self._scope(place, table, site)
        else:
            part = self._block(place, table, "shape", site)
        self._parts[form] = part
        return part

    def _scope(self, place: str, table: ScopeTable, site: Site) -> BoundScope:
        (named,) = self._spec.parts(place) or ("",)
        block = self._part(named, site) if named else self._block(place, table, "block", site)
        with _placed(place, "shape", label(place, site)):
            extents = Names(self._shared, site.captures).extents(table.shape)
        with _placed(place, "shape", _where(block)):
            shape = scope_extents(
                block.grid_shape, _padded(extents, len(block.grid_shape), _outlook_of(site))
            )
            divide(block.grid_shape, shape, "scope", "block grid")
        return BoundScope(label(place, site), block, shape)

    def _coupling(self, place: str, table: CouplingTable, site: Site) -> Part:
        if not isinstance(site, JoinedSite):
            raise TypeError("the instances of a coupling are joined sites")
        of_members = zip(self._spec.parts(place), site.members, strict=True)
        parts = [[self._part(member, each) for each in sites] for member, sites in of_members]
        with _placed(place, "orders" if table.orders else table.members_key, label(place, site)):
            members, orders = coupled(parts, table.orders)
        make = BoundScopeCoupling if isinstance(table, BudgetTable) else BoundBlockCoupling
        return make(label(place, site), members, orders)

    def _block(self, place: str, table: BlockTable | ScopeTable, key: str, site: Site) -> BoundBlock:
        """The blocks of a tensor, whose shape is under `key`."""
        if not isinstance(site, TensorSite):
            raise TypeError(f"the instances of {place} are tensors, not couplings")
        tensor = site.tensor
        names = Names(self._shared, site.captures, tensor)
        layout = layout_of(place, table, tensor, names, site.outlook)
        with _placed(place, key, tensor.name):
            given = _padded(names.extents(getattr(table, key)), len(layout.shape), site.outlook)
            extents = block_extents(layout.shape, given)
            divide(layout.shape, extents, "block", "tensor" if layout.shape == tensor.shape else "view")
        view = (layout.shape, layout.stride, layout.offset)
        return BoundBlock(label(place, site), tensor.name, *view, extents)


def _is_true(place: str, key: str, table: ScopeTable, scope: BoundScope, names: Names) -> bool:
    """Whether a key for N:M holds; Misfit where a scope is not N:M of single elements."""
    asked = getattr(table, key)
    if asked is None:
        return False
    with _placed(place, key, scope.label):
        found = names.value(asked)
        if not isinstance(found, bool):
            raise came_to(asked, found, "true or false")
    wide = [size for size in scope.shape if size > 1]
    if found and (scope.block.leaves[0].numel_per_block > 1 or len(wide) != 1):
        what = f"{scope.label} has scopes {list(scope.shape)} of blocks {list(scope.block.leaves[0].shape)}"
        wanted = "wanted single elements, several along one dimension, such as shape [1, 4] of blocks [1, 1]"
        raise Misfit(place, key, f"{what}: {wanted}")
    return found


def _tiled(place: str, scope: BoundScope, budget: Budget) -> BoundScope:
    """N:M as square tiles of the last two dimensions of a view; Misfit where these do not fit."""
    size, rank = max(scope.shape), len(scope.shape)
    grid = scope.block.grid_shape
    if size > LARGEST_TILE:
        text = f"found groups of {size}, wanted 2 to {LARGEST_TILE}: larger tiles have too many patterns"
    elif isinstance(scope.block, BoundBlockCoupling):
        text = "its blocks are fused over tensors, wanted single elements of one"
    elif budget.nnz is None:
        text = "a threshold keeps no fixed number: give nnz or sparsity"
    elif rank < 2 or size not in scope.shape[-2:]:
        text = f"scopes {list(scope.shape)} lie along none of the last two dimensions of the view"
    elif grid[-1] % size or grid[-2] % size:
        text = f"{list(grid)} has no whole tiles: both of the last two must be multiples of {size}"
    else:
        return replace(scope, shape=(*scope.shape[:-2], size, size), transposable=True)
    raise Misfit(place, "transposable", f"{_where(scope.block)}: {text}")


def _budget_of_tile(scope: BoundScope, budget: Budget) -> Budget:
    """The budget of all rows of a tile, from that of one."""
    size = max(scope.shape)
    nnz = None if budget.nnz is None else budget.nnz * size
    return dataclasses.replace(budget, nnz=nnz, multiple_of=budget.multiple_of * size)


def _outlook_of(site: Site) -> Outlook | None:
    """The outlook of a site's tensor, or of the first of a coupling."""
    while isinstance(site, JoinedSite):
        site = next(each for sites in site.members for each in sites)
    return site.outlook


def _form(site: Site, used: frozenset[str]) -> Hashable:
    """What all sites share that are bound alike, up to their names."""
    if isinstance(site, TensorSite):
        form: Hashable = site.tensor.shape, site.tensor.dtype, site.outlook
    else:
        form = tuple([tuple([_form(each, used) for each in sites]) for sites in site.members])
    return (form, *[pair for pair in site.captures if pair[0] in used]) if used else form


def _renamed(part: Part, site: Site) -> Part:
    """A part of the same form for another site: its labels and tensors are those of that site."""
    if isinstance(part, BoundScope):
        block: Any = _renamed(part.block, site)
        if part.label == part.block.label:  # the short form: scope and block share one text
            return BoundScope(block.label, block, part.shape, part.transposable)
        return BoundScope(_relabelled(part, site), block, part.shape, part.transposable)
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
    if table.threshold is not None:
        with _placed(place, "threshold", label):
            return Budget(threshold=names.number(table.threshold, sys.float_info.max, "0 or more")), None
    sparsity, asked, unit = None, 0, 1
    if table.nnz is not None:
        with _placed(place, "nnz", label):
            asked = names.integer(table.nnz, 0, f"0 to {blocks}")
        if asked > blocks:
            found = "" if isinstance(table.nnz, int) else f"{shown(table.nnz.text)}: "
            text = f"found {asked}, wanted 0 to {blocks}: that many blocks has each scope of {label}"
            raise Misfit(place, "nnz", found + text)
    elif table.sparsity is not None:
        with _placed(place, "sparsity", label):
            sparsity = names.number(table.sparsity, 1.0, "a number from 0 to 1")
        asked = surviving(sparsity, blocks)
    if table.multiple_of is not None:
        with _placed(place, "multiple_of", label):
            unit = names.integer(table.multiple_of, 1, "1 or more")
    share = None if table.within is None else sparsity
    return Budget(nnz=min(blocks, -(-asked // unit) * unit), multiple_of=unit, share=share), sparsity
