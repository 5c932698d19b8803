"""Constraints on dimensions: tensors whose dimension the same config key counts must keep the same units.

Owns which units tensors and lists of modules keep, their agreement, what attention heads and routers need,
and refusals. Reads no data. Called by config.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from sparseprune.errors import CheckpointError
from sparseprune.removal.counting import Counts, count_dims
from sparseprune.removal.layers import packed_parts
from sparseprune.removal.preview import numbered
from sparseprune.removal.sections import path_shown
from sparseprune.removal.slices import kept_slices, kept_whole, number_of
from sparseprune.removal.unfit import unfit_modules
from sparseprune.spec.naming import VOCABULARY_SIZE
from sparseprune.spec.problems import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from sparseprune.engine.grids import Shape
    from sparseprune.removal.counting import Counted, HeadKeys
    from sparseprune.removal.layers import Stacks
    from sparseprune.removal.preview import RemovedMembers
    from sparseprune.removal.sections import Path, Sections
    from sparseprune.removal.slices import KeptIndices

    Flags = NDArray[np.bool_]
    UnitsByKey = Mapping[Path, Mapping[str, Flags]]  # by key and group

_MATRIX = (".weight", ".bias")


class CutModel(Struct, frozen=True):
    """The tensors of a checkpoint by name, and the `kept` indices of those that lose something.

    `gone` are the tensors of `removed` members of lists. Those `beside` codes stay whole. `decisions` number
    what decides over each tensor, where only the numbers of units are known that survive.
    """

    shapes: Mapping[str, Shape]
    kept: Mapping[str, KeptIndices]
    removed: RemovedMembers
    gone: frozenset[str] = frozenset()
    beside: frozenset[str] = frozenset()
    decisions: Mapping[str, int] | None = None

    @property
    def exact(self) -> bool:
        """Whether it is known which units survive, not only how many."""
        return self.decisions is None


class Agreed(Struct, frozen=True):
    """What all tensors keep: new values of keys, kept indices of followers, and what is in the way.

    `units` has flags of the units that stay, by key and group.
    """

    values: dict[Path, int]
    followers: dict[str, KeptIndices]
    problems: list[str]
    counts: Counts
    units: UnitsByKey


def agree(sections: Sections, model: CutModel, stacks: Stacks) -> Agreed:
    """What all tensors keep, as keys of the config count their units; CheckpointError for unknown models."""
    cut = {name: kept.cut for name, kept in model.kept.items() if name not in model.gone}
    counts = count_dims(model.shapes, sections, cut, model.removed.numbers)
    refuse(counts.refused)
    lost = (name for name in model.kept if name not in model.gone and name not in counts.of)
    unknown = frozenset((*lost, *counts.strangers)) - counts.misfits.keys()
    counts.misfits |= unfit_modules(model.shapes, sections, unknown)
    found = _Constraints(model, counts, stacks)
    problems = [*found.problems, *_unknown_neighbours(found)]
    for (key, _), kept in found.by_index.items():
        problems += _shared_units(key, kept)[1]
    values: dict[Path, int] = {}
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
            if group in counts.tied and (wrong or _decided_apart(kept, model)):
                wrong = _untied(group, counts.tied[group])
            problems += wrong
            example[number_of(units[key][group])] = kept[0].name.rpartition(".")[0]
            for name, dim, flags in _followers(kept, units[key][group]):
                followers.setdefault(name, {})[dim] = flags
        values[key] = next(iter(example))
        if len(example) > 1:
            said = " and ".join(f"{count} in {module}" for count, module in list(example.items())[:2])
            advice = "keep as many in all of these"
            text = f"{path_shown(key)} would be {said}, and config.json has one for all: {advice}"
            problems.append(text)
    problems += _impossible(counts, model, units, values)
    problems += [line for key in values for line in counts.contested.get(key, ())]
    problems += _strangers(counts, values)
    for name, dim, indices in (
        part for one in stacks.of.values() for part in packed_parts(one, model.shapes)
    ):
        flags = np.zeros(model.shapes[name][dim], dtype=np.bool_)
        flags[indices] = True
        followers.setdefault(name, {})[dim] = flags
    kept_followers = {name: _with(model, name, along) for name, along in followers.items()}
    return Agreed(values, kept_followers, problems, counts, units)


def _decided_apart(kept: list[_KeptUnits], model: CutModel) -> bool:
    """Whether several decisions say which units these tensors lose, so that they may not lose the same."""
    decisions = model.decisions or {}
    return len({decisions.get(each.name) for each in kept if not each.units.all()}) > 1


def _untied(group: str, why: str) -> list[str]:
    text = "may keep other heads in one layer than in another"
    return [f"{group} {text}, and {why}: prune by heads-aligned, or couple the heads of all layers"]


def _strangers(counts: Counts, values: Mapping[Path, int]) -> Iterator[str]:
    """A line for each tensor that looks like what a changed key counts, and is not understood."""
    for name, keys in counts.strangers.items():
        changed = next((key for key in keys if key in values), None)
        if changed is not None:
            like = f"is named as what {path_shown(changed)} counts in other layers"
            yield counts.misfits.get(name, f"{name} {like}, and nothing tells what it has")


def _followers(kept: list[_KeptUnits], left: Flags) -> Iterator[tuple[str, int, Flags]]:
    """The dimensions of tensors that follow, with flags of the indices that they keep."""
    for each in kept:
        if each.counted.follows and each.dim is not None and each.units.all() and not left.all():
            flags = np.ones(each.length, dtype=np.bool_)
            counted = each.counted
            flags[counted.begin : counted.begin + left.size * counted.size] = np.repeat(left, counted.size)
            yield each.name, each.dim, flags


def refuse(problems: Iterable[str], most: int = 10) -> None:
    """CheckpointError with the problems, or the first of many; nothing without problems."""
    lines = list(problems)
    if len(lines) > most:
        lines = [*lines[:most], f"and {len(lines) - most:,} more"]
    if lines:
        raise CheckpointError(*lines)


# -- which units tensors keep ------------------------------------------------------------------------


class _KeptUnits(Struct, frozen=True, eq=False):
    """Which units of a key one tensor keeps along a dimension of a `length`, or one list of modules."""

    counted: Counted
    units: Flags
    length: int = 0

    @property
    def name(self) -> str:
        return self.counted.tensor

    @property
    def dim(self) -> int | None:
        return self.counted.dim

    @property
    def count(self) -> int:
        return number_of(self.units)

    def __str__(self) -> str:
        what = f"{self.count} of {self.units.shape[-1]}"
        return f"{self.name} keeps {what}" + ("" if self.dim is None else f" along dimension {self.dim}")


@dataclass(slots=True)
class _Constraints:
    """The kept units of all tensors, `of` each key and group, where any tensor loses units of the key.

    `by_index` has dimensions whose key counts indices, not whole units; tensors of one group must still keep
    the same ones. `stays` are the tensors that stay.
    """

    model: CutModel
    counts: Counts
    stacks: Stacks
    of: dict[Path, dict[str, list[_KeptUnits]]] = field(default_factory=dict)
    by_index: dict[tuple[Path, str], list[_KeptUnits]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    stays: list[str] = field(init=False)
    counted: Mapping[str, Sequence[Counted]] = field(init=False)

    def __post_init__(self) -> None:
        self.stays = [name for name in self.model.shapes if name not in self.model.gone]
        self.counted = {name: self._meant(name) for name in self.stays if name in self.counts.of}
        self._add_lists()
        for name in self.stays:
            if name in self.model.kept:
                self._refuse_uncounted(name)
        touched = self._touched_keys()
        for name in self.stays:
            for counted in self.counted.get(name, ()):
                if counted.key in touched:
                    self._add_tensor(counted)

    def _meant(self, name: str) -> Sequence[Counted]:
        """What is counted in a tensor; of modules that lie behind each other, these or the units in them."""
        found = self.counts.of[name]
        inner = next((each for each in found if each.flat > 1), None)
        if inner is None:
            return found
        kept = self.model.kept.get(name)
        members = np.ones((1, 1)) if kept is None else kept.along[0].reshape(inner.flat, -1)
        is_whole = bool((members == members[:, :1]).all())
        return [each for each in found if (each.flat == 1) == is_whole]

    def _touched_keys(self) -> set[Path]:
        """The keys of which some tensor or list loses units, and those that depend on them."""
        touched = {
            key for key, groups in self.of.items() for kept in groups.values() if not kept[0].units.all()
        }
        for name, kept in self.model.kept.items():
            if name not in self.model.gone:
                touched |= {each.key for each in self.counted.get(name, ()) if each.dim in kept.cut}
        for keys in self.counts.heads.values():
            pair = {keys.heads, keys.groups} - {None}
            if touched & pair:
                touched |= pair  # type: ignore[arg-type]
        return touched

    def _refuse_uncounted(self, name: str) -> None:
        """A problem for each cut dimension that no key counts, or cuts outside of what one counts."""
        shape, kept = self.model.shapes[name], self.model.kept[name]
        found = self.counted.get(name, ())
        for dim in kept.cut:
            lost = shape[dim] - number_of(kept.along[dim])
            rest = kept.along[dim].copy()
            for each in found:
                if each.dim == dim:
                    rest[..., each.begin : each.begin + each.count * each.size] = True
            if rest.all():
                continue
            if name in self.counts.misfits:
                self.problems.append(self.counts.misfits[name])
            else:
                text = f"loses {lost} of {shape[dim]} along dimension {dim}"
                self.problems.append(f"{name} {text}, which no key of config.json carries")

    def _add_tensor(self, counted: Counted) -> None:
        kept, dim = self.model.kept.get(counted.tensor), counted.dim
        if dim is None:
            return
        shape = self.model.shapes[counted.tensor]
        flags = np.ones(shape[dim], dtype=np.bool_) if kept is None else kept.along[dim]
        indices = flags[..., counted.begin : counted.begin + counted.count * counted.size]
        one = _KeptUnits(counted, indices, shape[dim])
        if counted.flat > 1:
            each = np.count_nonzero(indices.reshape(counted.flat, -1), axis=1)
            if len(set(each.tolist())) > 1:
                text = f"wanted as many in each of {counted.flat}, as {path_shown(counted.key)} counts them"
                self.problems.append(f"{one}, {text}")
            units = np.arange(counted.count // counted.flat) < int(each.max())
            self.by_index.setdefault((counted.key, counted.group), []).append(one)
        elif counted.by_index > 1:
            self.by_index.setdefault((counted.key, counted.group), []).append(one)
            count, rest = divmod(one.count, counted.by_index * counted.size)
            if rest:
                text = f"wanted a multiple of {counted.by_index}, as {path_shown(counted.key)} counts them"
                self.problems.append(f"{one}, {text}")
            units = np.arange(counted.count // counted.by_index) < count
        else:
            rows = indices.reshape(*indices.shape[:-1], -1, counted.size)
            if counted.paired:
                rows = rows.reshape(-1, 2, counted.size).swapaxes(0, 1).reshape(-1, counted.size)
            units = np.logical_and.reduce(rows, axis=-1)
            if not np.array_equal(units, np.logical_or.reduce(rows, axis=-1)):
                text = f"wanted whole units of {counted.size}, as {path_shown(counted.key)} counts them"
                self.problems.append(f"{one}, {text}")
        self._note(replace(one, units=units))

    def _note(self, kept: _KeptUnits) -> None:
        counted = kept.counted
        self.of.setdefault(counted.key, {}).setdefault(counted.group, []).append(kept)

    def _add_lists(self) -> None:
        """The members that each list of modules keeps; lists in removed members are left out."""
        members: dict[str, set[int]] = defaultdict(set)
        for name in self.model.shapes:
            for before, number, _ in numbered(name):
                members[before].add(number)
        for before, numbers in members.items():
            if self.model.removed.has(f"{before}.x"):
                continue
            gone = self.model.removed.numbers.get(before, ())
            counted = next((one for one in self.counts.of.get(before, ()) if one.dim is None), None)
            if counted is not None:
                units = ~np.isin(np.arange(counted.count), list(gone))
                if max(numbers) < counted.count:
                    self._note(_KeptUnits(counted, units))
            elif gone and before not in self.stacks.of:
                lost = f"loses {len(gone)} of {len(numbers)} members"
                text = f"{before} {lost}, which no key of config.json counts"
                self.problems.append(self.counts.misfits.get(before, text))


def _shared_units(key: Path, kept: list[_KeptUnits]) -> tuple[Flags, list[str]]:
    """The units that the tensors of a group keep, and a problem for each tensor that keeps others."""
    leaders = [each for each in kept if not each.counted.follows] or kept
    leader = min(leaders, key=lambda each: each.count)
    wrong = []
    for each in kept:
        if np.array_equal(each.units, leader.units) or (each.counted.follows and each.units.all()):
            continue
        what = f"{each.name} as many others" if each.count == leader.count else str(each)
        wrong.append(f"{leader}, {what} ({path_shown(key)}): couple them in the spec")
    return leader.units, wrong


def _with(model: CutModel, name: str, along: Mapping[int, Flags]) -> KeptIndices:
    before = model.kept.get(name) or kept_whole(model.shapes[name])
    return kept_slices([along.get(dim, flags) for dim, flags in enumerate(before.along)])


def _unknown_neighbours(found: _Constraints) -> Iterator[str]:
    """Tensors beside a cut one that the table does not know: scales, adapters and the like."""
    modules: dict[str, str] = {}
    for name, kept in found.model.kept.items():
        if kept.cut and name not in found.model.gone and not _is_logit_bias(found, name):
            modules.setdefault(name.rpartition(".")[0], name)
    for name in found.stays if modules else ():
        if name in found.model.kept or name in found.counts.of or name in found.counts.beside:
            continue
        if name in found.model.beside:
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


def _is_logit_bias(found: _Constraints, name: str) -> bool:
    """Whether a vector is all that a module has of the vocabulary, so that others in it are no part of it."""
    key = next((each.key for each in found.counts.of.get(name, ())), ("",))
    return key[-1] == VOCABULARY_SIZE and f"{name.removesuffix('.bias')}.weight" not in found.model.shapes


# -- what the model's classes need -------------------------------------------------------------------


def _impossible(counts: Counts, model: CutModel, units: UnitsByKey, values: dict[Path, int]) -> Iterator[str]:
    """What the model's classes cannot express, though all tensors agree."""
    for keys in counts.heads.values():
        if model.exact:
            yield from _uneven_heads(keys, units, values)
        yield from _unfit_heads(keys, counts, values)
    for experts in [key for key in counts.routing if key in values]:
        yield from _unfit_routing(experts, counts, units, values, exact=model.exact)
    for key, value in values.items():
        if not value:
            yield f"config.json: {path_shown(key)} would be 0: nothing is left"


def _uneven_heads(keys: HeadKeys, units: UnitsByKey, values: Mapping[Path, int]) -> Iterator[str]:
    """Key/value heads that stay with unlike numbers of query heads, or are dropped with any left."""
    if keys.groups is None or not {keys.heads, keys.groups} & values.keys():
        return
    for group, stay in units.get(keys.groups, {}).items():
        queries = units.get(keys.heads, {}).get(group)
        if queries is None or queries.size % stay.size:
            continue
        counts = queries.reshape(stay.size, -1).sum(axis=1)
        if counts[~stay].any() or len(set(counts[stay].tolist())) > 1:
            found = f"of its {stay.size} key/value heads {int(np.count_nonzero(stay))} stay"
            found = f"{found}, and they have {shown(counts.tolist())} query heads"
            yield f"{group}: {found}: each that stays must keep as many, the others none"


def _unfit_heads(keys: HeadKeys, counts: Counts, values: Mapping[Path, int]) -> Iterator[str]:
    """Numbers of heads, or of hidden channels for them, that the config's class refuses."""
    hidden = counts.hidden if counts.hidden in values else None
    if keys.heads not in values and hidden is None:
        return
    row, section = keys.section.architecture, keys.section
    whole = section.value(row.divides) if row.divides else None
    heads = values.get(keys.heads) or section.value(path_shown(keys.heads[len(section.path) :]))
    left = whole if hidden is None else values[hidden]
    if isinstance(whole, int) and isinstance(heads, int) and isinstance(left, int) and left % heads:
        found, wanted, fitting = path_shown(keys.heads), f"divisor of {row.divides}, {left}", _divisors(left)
        number = heads
        if hidden is not None:
            found, wanted, number = path_shown(hidden), f"multiple of {path_shown(keys.heads)}, {heads}", left
            fitting = [left // heads * heads, left // heads * heads + heads]
        below = [count for count in fitting if 0 < count < number][-1:]
        above = [count for count in fitting if count > number][:1]
        near = " or ".join(map(str, (*below, *above)))
        way = next((f"; or --as {kin}, whose class takes any" for kin in row.kin), "")
        yield f"{found} would be {number}, and the config's class wants a {wanted}, such as {near}{way}"
    for key in row.sized:
        factors = section.values.get(key)
        if isinstance(factors, dict) and any(factors.get(each) for each in ("short_factor", "long_factor")):
            name = path_shown(keys.heads)
            why = f"the config's class checks the length of factors in {key} by hidden_size // {name}"
            yield f"{name} cannot change: {why}"


def _divisors(whole: int) -> list[int]:
    return [count for count in range(1, whole + 1) if whole % count == 0]


def _unfit_routing(
    experts: Path, found: Counts, units: UnitsByKey, values: dict[Path, int], *, exact: bool
) -> Iterator[str]:
    """What a router needs of the experts that stay; a new number of groups goes into `values`.

    Groups are looked at only where it is `exact`ly known which experts stay.
    """
    routing = found.routing[experts]
    section, count, name = routing.section, values[experts], path_shown(experts)
    row = section.architecture
    chosen = 0 if routing.chosen is None else section.value(path_shown(routing.chosen[len(section.path) :]))
    chosen = chosen if isinstance(chosen, int) else 0
    chosen_name = "" if routing.chosen is None else path_shown(routing.chosen)
    if count < chosen:
        yield f"{name} would be {count}, fewer than the {chosen} of {chosen_name}"
        return
    if row.groups is not None and count and exact:
        yield from _unfit_groups(experts, found, units, values, chosen)


def _unfit_groups(
    experts: Path, found: Counts, units: UnitsByKey, values: dict[Path, int], chosen: int
) -> Iterator[str]:
    """What a router needs of the groups of experts that stay."""
    routing = found.routing[experts]
    section, count, name = routing.section, values[experts], path_shown(experts)
    row = section.architecture
    groups, whole = section.number(f"config.{row.groups}"), next(iter(units[experts].values())).size
    if not groups or whole % groups:
        yield f"config.json: {row.groups} is {groups}, wanted a divisor of {whole} {name}"
        return
    counts = {group: kept.reshape(groups, -1).sum(axis=1) for group, kept in units[experts].items()}
    for group, each in counts.items():
        if len(set(each[each > 0].tolist())) > 1:
            members = f"its groups of experts would have {shown(each.tolist())} members"
            why = f"{row.groups} counts groups of one size: prune the same number in each"
            yield f"{group}: {members}, and {why}"
    left = sorted({int(np.count_nonzero(each)) for each in counts.values()})
    if len(left) > 1:
        yield f"{row.groups} would be {left[0]} and {left[-1]}, and config.json has one for all"
    if not left[0]:  # some router has no experts any more
        return
    if left[0] != groups:
        path = section.path_of(str(row.groups))
        values[path], found.sections[path] = left[0], section
    serving = 1 if row.serving is None else section.number(f"config.{row.serving}")
    after, before = count // left[0], whole // groups
    if left[0] < serving:
        yield f"{row.groups} would be {left[0]}, fewer than the {serving} of {row.serving}"
    elif after < row.best:
        taken = f"the router takes the best {row.best} of each"
        members = f"its groups of experts would have {after} of {before} members each"
        yield f"{next(iter(counts))}: {members}, and {taken}"
    elif after * serving < chosen:
        key = "" if routing.chosen is None else path_shown(routing.chosen)
        yield f"{serving} groups would have fewer experts than the {chosen} of {key}"
