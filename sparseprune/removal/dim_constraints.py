"""Constraints on dimensions: tensors whose dimension the same config key counts must keep the same units.

Owns which units tensors and lists of modules keep, their agreement, what attention heads and routers need,
and refusals. Reads no data. Called by config.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from sparseprune.engine.grids import prod
from sparseprune.errors import CheckpointError
from sparseprune.removal.preview import numbered
from sparseprune.removal.slices import kept_slices, kept_whole
from sparseprune.spec.problems import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    from sparseprune.engine.grids import Shape
    from sparseprune.removal.architectures import DimPart, Routing, TensorDims
    from sparseprune.removal.config import ConfigSection
    from sparseprune.removal.preview import RemovedMembers
    from sparseprune.removal.slices import KeptIndices
    from sparseprune.spec import Captures

    Flags = NDArray[np.bool_]
    Group = Captures  # what tensors share that must keep the same units: most captures of their names
    UnitsByKey = Mapping[str, Mapping[Group, Flags]]

_NUMBER = re.compile(r"(?:^|(?<=\.))[0-9]+(?=\.)")  # a piece of a name that is a number
_WITHIN_GROUP = ("name", "kind", "member")  # captures that differ among tensors with the same units
_MATRIX = (".weight", ".bias")


class CutModel(Struct, frozen=True):
    """The tensors of a checkpoint by name, and the `kept` indices of those that lose something.

    `gone` are the tensors of `removed` members of lists. `exact`: it is known which units survive, not only
    how many.
    """

    shapes: Mapping[str, Shape]
    kept: Mapping[str, KeptIndices]
    removed: RemovedMembers
    gone: frozenset[str] = frozenset()
    exact: bool = True


def agree(
    section: ConfigSection, model: CutModel
) -> tuple[dict[str, int], dict[str, KeptIndices], list[str]]:
    """What all tensors keep: new values of config keys, kept indices of followers of others, problems."""
    found = _Constraints(section, model)
    problems = [*found.problems, *_unknown_neighbours(found)]
    for (key, _), kept in found.by_index.items():
        problems += _shared_units(key, kept)[1]
    values: dict[str, int] = {}
    followers: dict[str, dict[int, Flags]] = {}
    units = {
        key: {group: kept[0].units for group, kept in groups.items()} for key, groups in found.of.items()
    }
    for key, groups in found.of.items():
        if all(each.units.all() for kept in groups.values() for each in kept):
            continue
        example: dict[int, str] = {}
        for group, kept in groups.items():
            units[key][group], wrong = _shared_units(key, kept)
            problems += wrong
            example[int(np.count_nonzero(units[key][group]))] = kept[0].name.rpartition(".")[0]
            left = units[key][group]
            for each in kept:
                if each.follows and each.dim is not None and each.units.all() and not left.all():
                    followers.setdefault(each.name, {})[each.dim] = np.repeat(left, each.unit)
        values[key] = next(iter(example))
        if len(example) > 1:
            counts = " and ".join(f"{count} in {module}" for count, module in list(example.items())[:2])
            advice = "give all of these the same nnz or sparsity"
            problems.append(f"{key} would be {counts}, and config.json has one for all: {advice}")
    problems += [text for keys, text in found.misfits if not values.keys().isdisjoint(keys)]
    problems += _impossible(section, model, units, values)
    kept_followers = {name: _with(model, name, along) for name, along in followers.items()}
    return values, kept_followers, problems


def refuse(problems: Iterable[str], most: int = 10) -> None:
    """CheckpointError with the problems, or the first of many; nothing without problems."""
    lines = list(problems)
    if len(lines) > most:
        lines = [*lines[:most], f"and {len(lines) - most:,} more"]
    if lines:
        raise CheckpointError(*lines)


def dims_lookup(section: ConfigSection) -> Callable[[str], TensorDims | None]:
    """A function from a tensor's name to its dimensions in the table, None for an unknown tensor.

    Names that differ only in numbers have the same entry, which is looked for once.
    """
    known: dict[str, TensorDims | None] = {}

    def dims_of(name: str) -> TensorDims | None:
        form = _NUMBER.sub("0", name)
        if form not in known:
            matching = (dims for dims in section.architecture.tensors if dims.pattern.match(name) is not None)
            known[form] = next(matching, None) if section.reaches(name) else None
        return known[form]

    return dims_of


def layer_lists(section: ConfigSection, model: CutModel) -> dict[str, int]:
    """The lists of layers that the config counts, with their number of members; none if none loses any.

    Of several lists with a matching name those count that have tensors in the table.
    """
    pattern = section.architecture.layers.members.pattern
    if not any(pattern.match(f"{before}.0") is not None for before in model.removed.numbers):
        return {}
    dims_of = dims_lookup(section)
    found: dict[str, set[int]] = defaultdict(set)
    known = set()
    for name in model.shapes:
        for before, number, _ in numbered(name) if section.reaches(name) else ():
            if pattern.match(f"{before}.0") is not None:
                found[before].add(number)
                if dims_of(name) is not None:
                    known.add(before)
    return {before: len(numbers) for before, numbers in found.items() if before in (known or found)}


# -- which units tensors keep ------------------------------------------------------------------------


class _KeptUnits(Struct, frozen=True, eq=False):
    """Which units of a key one tensor keeps, or one list of modules, with `dim` None.

    A unit has `unit` indices of the dimension. A tensor that `follows` loses units without being pruned.
    """

    name: str
    dim: int | None
    follows: bool
    units: Flags
    unit: int = 1

    @property
    def count(self) -> int:
        return int(np.count_nonzero(self.units))

    def __str__(self) -> str:
        what = f"{self.count} of {self.units.size}"
        return f"{self.name} keeps {what}" + ("" if self.dim is None else f" along dimension {self.dim}")


@dataclass(slots=True)
class _Constraints:
    """The kept units of all tensors, `of` each key and group, where any tensor loses units of the key.

    `by_index` has dimensions whose key counts indices, not whole units; tensors of one group must still keep
    the same ones. `misfits` are dimensions that the config does not describe, with their keys. `stays` are
    the tensors that stay, `dims` their entries in the table.
    """

    section: ConfigSection
    model: CutModel
    of: dict[str, dict[Group, list[_KeptUnits]]] = field(default_factory=dict)
    by_index: dict[tuple[str, Group], list[_KeptUnits]] = field(default_factory=dict)
    misfits: list[tuple[tuple[str, ...], str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    stays: list[str] = field(init=False)
    dims: dict[str, TensorDims] = field(init=False)
    _sizes: dict[DimPart, tuple[int, int]] = field(default_factory=dict)  # units, and indices of each

    def __post_init__(self) -> None:
        dims_of = dims_lookup(self.section)
        self.stays = [name for name in self.model.shapes if name not in self.model.gone]
        self.dims = {name: dims for name in self.stays if (dims := dims_of(name)) is not None}
        self._add_lists()
        touched = self._touched_keys()
        for name in self.stays:
            if name in self.model.kept:
                self._refuse_uncounted(name)
            dims = self.dims.get(name)
            if dims is not None and (name in self.model.kept or not touched.isdisjoint(dims.keys)):
                self._add_tensor(name, dims)

    def _touched_keys(self) -> set[str]:
        """The keys of which some tensor or list loses units, and those that depend on them."""
        touched = {
            key for key, groups in self.of.items() for kept in groups.values() if not kept[0].units.all()
        }
        for name, kept in self.model.kept.items():
            dims = self.dims[name].dims if name in self.dims else {}
            touched |= {part.key for dim in kept.cut for part in dims.get(dim, ())}
        heads = self.section.architecture.heads
        if heads is not None and heads.groups is not None and touched & {heads.key, heads.groups}:
            touched |= {heads.key, heads.groups}
        return touched

    def _refuse_uncounted(self, name: str) -> None:
        """A problem for each cut dimension that no key counts."""
        shape, kept = self.model.shapes[name], self.model.kept[name]
        for dim in kept.cut:
            if name not in self.dims or dim not in self.dims[name].dims:
                lost = f"loses {shape[dim] - kept.shape[dim]} of {shape[dim]} along dimension {dim}"
                self.problems.append(f"{name} {lost}, which no key of config.json carries")

    def _add_tensor(self, name: str, dims: TensorDims) -> None:
        shape, kept = self.model.shapes[name], self.model.kept.get(name)
        group = _group(dims.pattern.match(name) or ())
        for dim, parts in dims.dims.items():
            size = shape[dim] if dim < len(shape) else 0
            flags = np.ones(size, dtype=np.bool_) if kept is None or not size else kept.along[dim]
            sizes = [prod(self._size_of(part)) for part in parts]
            if sum(sizes) != size:
                said = " + ".join(f"{each} for {part.key}" for part, each in zip(parts, sizes, strict=True))
                text = f"{name} has {size} along dimension {dim}, config.json says {said}"
                self.misfits.append((tuple(part.key for part in parts), text))
                if not flags.all():
                    self.problems.append(text)
                continue
            begin = 0
            for part, each in zip(parts, sizes, strict=True):
                indices = flags[begin : begin + each]
                self._add(_KeptUnits(name, dim, dims.follows, indices, self._size_of(part)[1]), part, group)
                begin += each

    def _size_of(self, part: DimPart) -> tuple[int, int]:
        if part not in self._sizes:
            self._sizes[part] = (self.section.value(part.key), self.section.unit(part))
        return self._sizes[part]

    def _add(self, kept: _KeptUnits, part: DimPart, group: Group) -> None:
        """One part of a dimension, given as indices, as units of its key."""
        unit = kept.unit
        if part.by_index:
            self.by_index.setdefault((part.key, group), []).append(kept)
            count, rest = divmod(kept.count, unit)
            if rest:
                self.problems.append(f"{kept}, wanted a multiple of {unit}, as {part.key} counts them")
            units = np.arange(kept.units.size // unit) < count
        else:
            rows = kept.units.reshape(-1, unit)
            units = np.logical_and.reduce(rows, axis=1)
            if not np.array_equal(units, np.logical_or.reduce(rows, axis=1)):
                self.problems.append(f"{kept}, wanted whole units of {unit}, as {part.key} counts them")
        self.of.setdefault(part.key, {}).setdefault(group, []).append(replace(kept, units=units))

    def _add_lists(self) -> None:
        """The members that each list of modules keeps; lists in removed members are left out."""
        members: dict[str, set[int]] = defaultdict(set)
        for name in self.model.shapes:
            for before, number, _ in numbered(name):
                members[before].add(number)
        layers = layer_lists(self.section, self.model)
        for before, numbers in members.items():
            if self.model.removed.has(f"{before}.x"):
                continue
            gone = self.model.removed.numbers.get(before, ())
            lists = self.section.architecture.lists if self.section.reaches(before) else ()
            found = [(each.key, each.pattern.match(f"{before}.0")) for each in lists]
            counted = next(((key, captures) for key, captures in found if captures is not None), None)
            if counted is not None:
                self._add_list(before, counted, numbers, gone)
            elif gone and before not in layers:
                lost = f"loses {len(gone)} of {len(numbers)} members"
                self.problems.append(f"{before} {lost}, which no key of config.json counts")

    def _add_list(
        self, before: str, counted: tuple[str, Captures], numbers: Collection[int], gone: Collection[int]
    ) -> None:
        key, group = counted[0], _group(counted[1])
        if len(numbers) != self.section.value(key) or max(numbers) >= len(numbers):
            text = f"{before} has {len(numbers)} members, config.json says {self.section.value(key)}"
            self.misfits.append(((key,), text))
            if gone:
                self.problems.append(text)
            return
        units = ~np.isin(np.arange(len(numbers)), list(gone))
        kept = _KeptUnits(before, None, follows=False, units=units)
        self.of.setdefault(key, {}).setdefault(group, []).append(kept)


def _group(captures: Captures) -> Group:
    return tuple(pair for pair in captures if pair[0] not in _WITHIN_GROUP)


def _shared_units(key: str, kept: list[_KeptUnits]) -> tuple[Flags, list[str]]:
    """The units that the tensors of a group keep, and a problem for each tensor that keeps others."""
    leaders = [each for each in kept if not each.follows] or kept
    leader = min(leaders, key=lambda each: each.count)
    wrong = []
    for each in kept:
        if np.array_equal(each.units, leader.units) or (each.follows and each.units.all()):
            continue
        what = f"{each.name} as many others" if each.count == leader.count else str(each)
        wrong.append(f"{leader}, {what} ({key}): couple them in the spec")
    return leader.units, wrong


def _with(model: CutModel, name: str, along: Mapping[int, Flags]) -> KeptIndices:
    before = model.kept.get(name) or kept_whole(model.shapes[name])
    return kept_slices([along.get(dim, flags) for dim, flags in enumerate(before.along)])


def _unknown_neighbours(found: _Constraints) -> Iterator[str]:
    """Tensors beside a cut one that the table does not know: scales, adapters and the like."""
    modules: dict[str, str] = {}
    for name, kept in found.model.kept.items():
        if kept.cut and name not in found.model.gone:
            modules.setdefault(name.rpartition(".")[0], name)
    for name in found.stays if modules else ():
        if name in found.model.kept or name in found.dims:
            continue
        parent = name.rpartition(".")[0]
        above = (".".join(parent.split(".")[:depth]) for depth in range(parent.count(".") + 1))
        # Modules inside a matrix's own module are its adapters; inside other modules they are parts.
        cut = modules.get(parent) or next(
            (modules[module] for module in above if modules.get(module, "").endswith(_MATRIX)), None
        )
        if cut is not None:
            text = "nothing tells how to cut it: merge it, or take it out"
            yield f"{name} lies beside {cut}, which is cut, and {text}"


# -- what the model's classes need -------------------------------------------------------------------


def _impossible(
    section: ConfigSection, model: CutModel, units: UnitsByKey, values: dict[str, int]
) -> Iterator[str]:
    """What the model's classes cannot express, though all tensors agree."""
    if model.exact:
        yield from _uneven_heads(section, units, values)
    yield from _unfit_heads(section, values)
    yield from _unfit_routing(section, units, values, exact=model.exact)
    for key, value in values.items():
        if not value:
            yield f"config.json: {key} would be 0: nothing is left"
        if key in section.architecture.refused:
            yield f"{key} cannot change: {section.architecture.refused[key]}"


def _uneven_heads(section: ConfigSection, units: UnitsByKey, values: Mapping[str, int]) -> Iterator[str]:
    """Key/value heads that stay with unlike numbers of query heads, or are dropped with any left."""
    heads = section.architecture.heads
    if heads is None or heads.groups is None or not {heads.key, heads.groups} & values.keys():
        return
    for group, stay in units.get(heads.groups, {}).items():
        queries = units.get(heads.key, {}).get(group)
        if queries is None or queries.size % stay.size:
            continue
        counts = queries.reshape(stay.size, -1).sum(axis=1)
        if counts[~stay].any() or len(set(counts[stay].tolist())) > 1:
            found = f"of its {stay.size} key/value heads {int(np.count_nonzero(stay))} stay"
            found = f"{found}, and they have {shown(counts.tolist())} query heads"
            yield f"{_module_of(group)}: {found}: each that stays must keep as many, the others none"


def _unfit_heads(section: ConfigSection, values: Mapping[str, int]) -> Iterator[str]:
    """Numbers of heads that the config's class refuses."""
    heads = section.architecture.heads
    if heads is None or heads.key not in values:
        return
    number = values[heads.key]
    if heads.divides is not None:
        whole = section.value(heads.divides)
        if number and whole % number:
            text = f"the config's class wants a divisor of {heads.divides}, {whole}"
            yield f"{heads.key} would be {number}, and {text}"
    for key in heads.sized:
        found = section.values.get(key)
        if isinstance(found, dict) and any(found.get(each) for each in ("short_factor", "long_factor")):
            why = f"the config's class checks the length of factors in {key} by hidden_size // {heads.key}"
            yield f"{heads.key} cannot change: {why}"


def _unfit_routing(
    section: ConfigSection, units: UnitsByKey, values: dict[str, int], *, exact: bool
) -> Iterator[str]:
    """What a router needs of the experts that stay; a new number of groups goes into `values`.

    Groups are looked at only where it is `exact`ly known which experts stay.
    """
    routing = section.architecture.routing
    if routing is None or routing.experts not in values:
        return
    experts, chosen = values[routing.experts], section.value(routing.chosen)
    if experts < chosen:
        yield f"{routing.experts} would be {experts}, fewer than the {chosen} of {routing.chosen}"
        return
    if routing.groups is None or not experts or not exact:
        return
    groups, whole = section.value(routing.groups), section.value(routing.experts)
    if not groups or whole % groups:
        yield f"config.json: {routing.groups} is {groups}, wanted a divisor of {whole} {routing.experts}"
        return
    counts = {group: kept.reshape(groups, -1).sum(axis=1) for group, kept in units[routing.experts].items()}
    for group, count in counts.items():
        if len(set(count[count > 0].tolist())) > 1:
            found = f"its groups of experts would have {shown(count.tolist())} members"
            why = f"{routing.groups} counts groups of one size: prune the same number in each"
            yield f"{_module_of(group)}: {found}, and {why}"
    left = sorted({int(np.count_nonzero(count)) for count in counts.values()})
    if len(left) > 1:
        yield f"{routing.groups} would be {left[0]} and {left[-1]}, and config.json has one for all"
    if not left[0]:  # some router has no experts any more
        return
    if left[0] != groups:
        values[routing.groups] = left[0]
    sizes = experts // left[0], whole // groups
    yield from _unfit_groups(section, routing, left[0], sizes, _module_of(next(iter(counts))))


def _unfit_groups(
    section: ConfigSection, routing: Routing, groups: int, sizes: tuple[int, int], module: str
) -> Iterator[str]:
    """What a router needs of so many groups of experts; `sizes` are those of a group after and before."""
    after, before = sizes
    serving = 1 if routing.serving is None else section.value(routing.serving)
    chosen = section.value(routing.chosen)
    if groups < serving:
        yield f"{routing.groups} would be {groups}, fewer than the {serving} of {routing.serving}"
    elif after < routing.best:
        taken = f"the router takes the best {routing.best} of each"
        yield f"{module}: its groups of experts would have {after} of {before} members each, and {taken}"
    elif after * serving < chosen:
        yield f"{serving} groups would have fewer experts than the {chosen} of {routing.chosen}"


def _module_of(group: Group) -> str:
    """A group as words: the names of its modules."""
    return ".".join(str(value) for _, value in group if value != "") or "the model"
