"""Constraints on dimensions: tensors whose dimension one config key counts keep the same indices.

Owns claims of tensors on dimensions, head groups, members of numbered lists, and refusals with the nearest
legal numbers.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.grids import prod
from sparseprune.errors import CheckpointError
from sparseprune.removal.slices import KeptIndices, kept_slices, kept_whole
from sparseprune.spec.problems import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from sparseprune.engine.grids import Shape
    from sparseprune.removal.architectures import Part, Routing, Use
    from sparseprune.removal.config import Section
    from sparseprune.removal.slices import KeptIndices
    from sparseprune.spec import Captures

    Units = Mapping[Captures, NDArray[np.bool_]]
    Flags = NDArray[np.bool_]
    Site = Captures


def uneven_heads(section: Section, units: Mapping[str, Units], values: Mapping[str, int]) -> Iterator[str]:
    """Where a key/value head that stays has more query heads than another, or one that goes has any."""
    heads = section.family.heads
    if heads is None or heads.groups is None or not {heads.key, heads.groups} & values.keys():
        return
    for site, groups in units.get(heads.groups, {}).items():
        queries = units.get(heads.key, {}).get(site)
        if queries is None or queries.size % groups.size:
            continue
        counts = queries.reshape(groups.size, -1).sum(axis=1)
        if counts[~groups].any() or len(set(counts[groups].tolist())) > 1:
            yield (
                f"{place_of(site)}: of its {groups.size} key/value heads {int(np.count_nonzero(groups))} "
                f"stay, and they have {shown(counts.tolist())} query heads: each that stays must keep as "
                "many, the others none"
            )


def sized_lists(section: Section, values: Mapping[str, int]) -> Iterator[str]:
    """Where the class of the config checks the length of a list by a size of heads that it derives itself."""
    heads = section.family.heads
    if heads is None or heads.key not in values:
        return
    for key in heads.sized:
        found = section.values.get(key)
        if isinstance(found, dict) and any(found.get(each) for each in ("short_factor", "long_factor")):
            yield (
                f"{heads.key} cannot change: the config's class checks the length of factors in {key} by "
                f"hidden_size // {heads.key}"
            )


def indivisible(section: Section, values: Mapping[str, int]) -> Iterator[str]:
    """Where the class of the config wants the number of heads to divide another."""
    heads = section.family.heads
    if heads is None or heads.divides is None or heads.key not in values:
        return
    whole, number = section.value(heads.divides), values[heads.key]
    if number and whole % number:
        wanted = f"a divisor of {heads.divides}, {whole}"
        yield f"{heads.key} would be {number}, and the config's class wants {wanted}"


def routing_problems(
    section: Section, units: Mapping[str, Units], values: dict[str, int], *, exact: bool
) -> list[str]:
    """What a router asks of the experts that stay; a new number of groups goes into `values`.

    Where it is not `exact` which experts these are, groups are not looked at.
    """
    routing = section.family.routing
    if routing is None or routing.experts not in values:
        return []
    experts, chosen = values[routing.experts], section.value(routing.chosen)
    if experts < chosen:
        return [f"{routing.experts} would be {experts}, fewer than the {chosen} of {routing.chosen}"]
    if routing.groups is None or not experts or not exact:
        return []
    groups, whole = section.value(routing.groups), section.value(routing.experts)
    if not groups or whole % groups:
        return [f"config.json: {routing.groups} is {groups}, wanted a divisor of {whole} {routing.experts}"]
    counts = {site: kept.reshape(groups, -1).sum(axis=1) for site, kept in units[routing.experts].items()}
    problems = [_uneven(site, count.tolist(), routing.groups) for site, count in counts.items()]
    left = sorted({int(np.count_nonzero(count)) for count in counts.values()})
    if len(left) > 1:
        problems.append(f"{routing.groups} would be {_both(left)}, and config.json has one for all")
    if left[0] != groups:
        values[routing.groups] = left[0]
    of_each = (experts // left[0], whole // groups)
    problems += _served(section, routing, left[0], of_each, place_of(next(iter(counts))))
    return [problem for problem in problems if problem]


def _served(
    section: Section, routing: Routing, groups: int, of_each: tuple[int, int], place: str
) -> Iterator[str]:
    """What is in the way of a router with so many groups, of which each has, and had, so many members."""
    left, had = of_each
    serving = 1 if routing.serving is None else section.value(routing.serving)
    chosen = section.value(routing.chosen)
    if groups < serving:
        yield f"{routing.groups} would be {groups}, fewer than the {serving} of {routing.serving}"
    elif left < routing.best:
        taken = f"the router takes the best {routing.best} of each"
        yield f"{place}: its groups of experts would have {left} of {had} members each, and {taken}"
    elif left * serving < chosen:
        yield f"{serving} groups would have fewer experts than the {chosen} of {routing.chosen}"


def _both(numbers: Sequence[int]) -> str:
    return f"{numbers[0]} and {numbers[-1]}"


def place_of(site: Captures) -> str:
    """A site as words: the names of its modules."""
    return ".".join(str(value) for _, value in site if value != "") or "the model"


def _uneven(site: Captures, counts: list[int], key: str) -> str:
    """What to say where groups that keep anything keep unlike numbers; nothing where they do not."""
    if len({count for count in counts if count}) < 2:
        return ""
    return (
        f"{place_of(site)}: its groups of experts would have {shown(counts)} members, and {key} counts "
        "groups of one size: prune the same number in each"
    )


_INDEX = re.compile(r"(?<=\.)(?:0|[1-9][0-9]{0,17})(?=\.)")  # a piece as a list of modules writes it
_DEEPEST = 16  # lists in lists: no model has so many


@dataclass(frozen=True, slots=True)
class Vanished:
    """By the name of each list, in ascending order the numbers of the members that it loses.

    >>> Vanished({"layers": (0, 2)}).renamed("layers.3.up.weight")
    'layers.1.up.weight'
    """

    numbers: Mapping[str, tuple[int, ...]]
    orphans: tuple[str, ...] = field(default=())

    def takes(self, name: str) -> bool:
        """Whether a tensor vanishes with a member that it belongs to."""
        members = numbered(name) if self.numbers else ()
        return any(number in self.numbers.get(before, ()) for before, number, _ in members)

    def renamed(self, name: str) -> str:
        """What a tensor that stays is called: members move up to where others were."""
        pieces = name.split(".")
        for before, number, place in numbered(name):
            gone = self.numbers.get(before, ())
            if gone:
                pieces[place] = str(number - bisect_left(gone, number))
        return ".".join(pieces)


def numbered(name: str) -> Iterator[tuple[str, int, int]]:
    """Where a name passes through a list: the list's name, the member's number, the place of that piece.

    >>> list(numbered("layers.3.experts.10.up"))
    [('layers', 3, 1), ('layers.3.experts', 10, 3)]
    """
    for found in islice(_INDEX.finditer(name), _DEEPEST):
        before = name[: found.start() - 1]
        yield before, int(found[0]), before.count(".") + 1


def find_vanished(names: Iterable[str], empty: Collection[str]) -> Vanished:
    """The outermost members of lists of which nothing is left; `orphans` are empty and belong to none."""
    passed = {name: list(numbered(name)) for name in names}
    all_of = Counter((before, number) for through in passed.values() for before, number, _ in through)
    empty_of = Counter((before, number) for name in empty for before, number, _ in passed.get(name, ()))
    numbers: dict[str, set[int]] = {}
    orphans = []
    for name in (name for name in passed if name in empty):
        members = ((before, number) for before, number, _ in passed[name])
        gone = next((member for member in members if all_of[member] == empty_of[member]), None)
        if gone is None:
            orphans.append(name)
        else:
            numbers.setdefault(gone[0], set()).add(gone[1])
    return Vanished({before: tuple(sorted(found)) for before, found in numbers.items()}, tuple(orphans))


_NUMBER = re.compile(r"(?:^|(?<=\.))[0-9]+(?=\.)")  # a piece of a name that is one
_OF_ONE_SITE = ("name", "kind", "member")  # captures that tell apart what has the same units


@dataclass(frozen=True, slots=True)
class Dense:
    """A checkpoint as it is, and what is kept of it: shapes by name, `kept` where something is dropped.

    `gone` are the tensors of the members that have `vanished`. `exact`: it is known which units survive, and
    not only how many.
    """

    shapes: Mapping[str, Shape]
    kept: Mapping[str, KeptIndices]
    vanished: Vanished
    gone: frozenset[str] = frozenset()
    exact: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """Which units of a key one tensor (or list) keeps.

    `dim` is None for a list; each unit has `unit` indices of it.
    """

    name: str
    dim: int | None
    follows: bool
    units: Flags
    unit: int = 1

    @property
    def count(self) -> int:
        return int(np.count_nonzero(self.units))

    @property
    def module(self) -> str:
        """What a list or a tensor is a part of."""
        return self.name.rpartition(".")[0]

    def __str__(self) -> str:
        what = f"{self.count} of {self.units.size}"
        return f"{self.name} keeps {what}" + ("" if self.dim is None else f" along dimension {self.dim}")


@dataclass(slots=True)
class Claims:
    """All claims by key and site, dimensions that the config does not describe, what is in the way.

    A site is the captures that tensors with the same units share. `stays` are the tensors that do not vanish,
    `uses` what the family knows of them, `units` how many units parts have, of how many indices each. `apart`
    has claims of which a key counts the indices alone; in one site they are the same nevertheless.
    """

    of: defaultdict[str, defaultdict[Captures, list[Claim]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    apart: defaultdict[tuple[str, Captures], list[Claim]] = field(default_factory=lambda: defaultdict(list))
    misfits: list[tuple[tuple[str, ...], str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    stays: list[str] = field(default_factory=list)
    uses: dict[str, Use] = field(default_factory=dict)
    units: dict[Part, tuple[int, int]] = field(default_factory=dict)


def collect(section: Section, dense: Dense) -> Claims:
    """What is said of all keys of which anything loses units."""
    claims = Claims()
    use_of = users(section)
    claims.stays += [name for name in dense.shapes if name not in dense.gone]
    claims.uses |= {name: use for name in claims.stays if (use := use_of(name)) is not None}
    _claim_lists(section, dense, claims)
    touched = _touched(section, dense, claims)
    for name in claims.stays:
        use = claims.uses.get(name)
        if name in dense.kept:
            _refuse_uncounted(name, use, dense, claims)
        if use is not None and (name in dense.kept or not touched.isdisjoint(use.keys)):
            _claim(section, name, use, dense, claims)
    return claims


def users(section: Section) -> Callable[[str], Use | None]:
    """A function that tells what the family knows of a tensor, None where that is nothing.

    Names that differ in pieces that are numbers are known by the same use, which is looked for once.
    """
    known: dict[str, Use | None] = {}

    def use_of(name: str) -> Use | None:
        form = _NUMBER.sub("0", name)
        if form not in known:
            matching = (use for use in section.family.uses if use.pattern.match(name) is not None)
            known[form] = next(matching, None) if section.reaches(name) else None
        return known[form]

    return use_of


def _touched(section: Section, dense: Dense, claims: Claims) -> set[str]:
    """The keys of which some tensor or list loses units, and those that go with them."""
    touched = {
        key for key, sites in claims.of.items() for claimed in sites.values() if not claimed[0].units.all()
    }
    for name, kept in dense.kept.items():
        dims = claims.uses[name].dims if name in claims.uses else {}
        touched |= {part.key for dim in kept.cut for part in dims.get(dim, ())}
    heads = section.family.heads
    if heads is not None and heads.groups is not None and touched & {heads.key, heads.groups}:
        touched |= {heads.key, heads.groups}
    return touched


def _refuse_uncounted(name: str, use: Use | None, dense: Dense, claims: Claims) -> None:
    """What is said where a tensor is cut along a dimension that no key counts."""
    shape, left = dense.shapes[name], dense.kept[name].shape
    for dim in dense.kept[name].cut:
        if use is None or dim not in use.dims:
            claims.problems.append(
                f"{name} loses {shape[dim] - left[dim]} of {shape[dim]} along dimension {dim}, which no key "
                "of config.json carries"
            )


def _claim(section: Section, name: str, use: Use, dense: Dense, claims: Claims) -> None:
    """What one tensor says, dimension by dimension."""
    shape, kept = dense.shapes[name], dense.kept.get(name)
    captures = use.pattern.match(name) or ()
    for dim, parts in use.dims.items():
        size = shape[dim] if dim < len(shape) else 0
        flags = np.ones(size, dtype=np.bool_) if kept is None or not size else kept.along[dim]
        for part in parts:
            if part not in claims.units:
                claims.units[part] = (section.value(part.key), section.unit(part))
        sizes = [prod(claims.units[part]) for part in parts]
        if sum(sizes) != size:
            said = " + ".join(f"{each} for {part.key}" for part, each in zip(parts, sizes, strict=True))
            text = f"{name} has {size} along dimension {dim}, config.json says {said}"
            claims.misfits.append((tuple(part.key for part in parts), text))
            if not flags.all():
                claims.problems.append(text)
            continue
        begin = 0
        for part, each in zip(parts, sizes, strict=True):
            claim = Claim(name, dim, use.follows, flags[begin : begin + each], claims.units[part][1])
            _add(claim, part, _site(captures), claims)
            begin += each


def _add(claim: Claim, part: Part, site: Captures, claims: Claims) -> None:
    """One part of a dimension, as units of its key."""
    unit = claim.unit
    if part.apart:
        claims.apart[part.key, site].append(claim)
        count, rest = divmod(claim.count, unit)
        if rest:
            claims.problems.append(f"{claim}, wanted a multiple of {unit}, as {part.key} counts them")
        units = np.arange(claim.units.size // unit) < count
    else:
        rows = claim.units.reshape(-1, unit)
        units = np.logical_and.reduce(rows, axis=1)
        if not np.array_equal(units, np.logical_or.reduce(rows, axis=1)):
            claims.problems.append(f"{claim}, wanted whole units of {unit}, as {part.key} counts them")
    claims.of[part.key][site].append(replace(claim, units=units))


def _claim_lists(section: Section, dense: Dense, claims: Claims) -> None:
    """What lists of modules say, each by its members that stay."""
    vanished = dense.vanished
    members: dict[str, set[int]] = defaultdict(set)
    for name in dense.shapes:
        for before, number, _ in numbered(name):
            members[before].add(number)
    layers = layer_lists(section, dense)
    for before, numbers in members.items():
        if vanished.takes(f"{before}.x"):
            continue  # in a layer that vanishes itself
        gone = vanished.numbers.get(before, ())
        found = _counted(section, before)
        if found is not None:
            _claim_list(section, before, found, (numbers, gone), claims)
        elif gone and before not in layers:
            claims.problems.append(
                f"{before} loses {len(gone)} of {len(numbers)} members, which no key of config.json counts"
            )


def _counted(section: Section, before: str) -> tuple[str, Captures] | None:
    """The key that counts the members of a list, and the captures of its name; None for layers."""
    for each in section.family.lists if section.reaches(before) else ():
        captures = each.pattern.match(f"{before}.0")
        if captures is not None:
            return each.key, captures
    return None


def _claim_list(
    section: Section,
    before: str,
    found: tuple[str, Captures],
    members: tuple[Collection[int], Collection[int]],
    claims: Claims,
) -> None:
    """What one list says, of which these are all members, and those that go."""
    (key, captures), (numbers, gone) = found, members
    if len(numbers) != section.value(key) or max(numbers) >= len(numbers):
        text = f"{before} has {len(numbers)} members, config.json says {section.value(key)}"
        claims.misfits.append(((key,), text))
        if gone:
            claims.problems.append(text)
        return
    units = ~np.isin(np.arange(len(numbers)), list(gone))
    claims.of[key][_site(captures)].append(Claim(before, None, follows=False, units=units))


def layer_lists(section: Section, dense: Dense) -> dict[str, int]:
    """The lists of layers that the config counts, and how many members they have; none if none loses any.

    Where several lists are called so, those count of whose tensors the family knows some.
    """
    pattern = section.family.layers.members.pattern
    if not any(pattern.match(f"{before}.0") is not None for before in dense.vanished.numbers):
        return {}
    use_of = users(section)
    found: dict[str, set[int]] = defaultdict(set)
    known = set()
    for name in dense.shapes:
        for before, number, _ in numbered(name) if section.reaches(name) else ():
            if pattern.match(f"{before}.0") is not None:
                found[before].add(number)
                if use_of(name) is not None:
                    known.add(before)
    return {before: len(numbers) for before, numbers in found.items() if before in (known or found)}


def _site(captures: Captures) -> Captures:
    return tuple(pair for pair in captures if pair[0] not in _OF_ONE_SITE)


_MATRIX = (".weight", ".bias")


@dataclass(frozen=True, slots=True)
class Agreement:
    """What all cuts come to: new values of keys, what tensors keep that follow others, what is in the way."""

    values: Mapping[str, int]
    followers: Mapping[str, KeptIndices]
    problems: tuple[str, ...]


def agree(section: Section, dense: Dense) -> Agreement:
    """What is kept, as values of the config's keys."""
    claims = collect(section, dense)
    problems = [*claims.problems, *_beside(claims, dense)]
    for (key, _), claimed in claims.apart.items():
        problems += _units(key, claimed)[1]
    values: dict[str, int] = {}
    followers: dict[str, dict[int, Flags]] = {}
    settled: dict[str, dict[Site, Flags]] = {}
    for key, sites in claims.of.items():
        if all(claim.units.all() for claimed in sites.values() for claim in claimed):
            continue
        settled[key] = {}
        for site, claimed in sites.items():
            units, wrong = _units(key, claimed)
            settled[key][site] = units
            problems += wrong
            for claim in claimed:
                _follow(claim, units, followers)
        first, *others = {
            int(np.count_nonzero(units)): sites[site][0].module for site, units in settled[key].items()
        }.items()
        values[key] = first[0]
        problems += [_unlike(key, first, others[0])] if others else []
    problems += [text for keys, text in claims.misfits if not values.keys().isdisjoint(keys)]
    problems += _impossible(section, dense, {**_all_units(claims), **settled}, values)
    kept = {name: _with(dense, name, along) for name, along in followers.items()}
    return Agreement(values, kept, tuple(dict.fromkeys(problems)))


def _impossible(
    section: Section, dense: Dense, units: Mapping[str, Mapping[Site, Flags]], values: dict[str, int]
) -> Iterator[str]:
    """What classes cannot have, though all tensors agree."""
    if dense.exact:
        yield from uneven_heads(section, units, values)
    yield from indivisible(section, values)
    yield from sized_lists(section, values)
    yield from routing_problems(section, units, values, exact=dense.exact)
    for key, value in values.items():
        if not value:
            yield f"config.json: {key} would be 0: nothing is left"
        if key in section.family.refused:
            yield f"{key} cannot change: {section.family.refused[key]}"


def _units(key: str, claimed: list[Claim]) -> tuple[Flags, list[str]]:
    """The units that survive at a site, and which of its tensors say otherwise."""
    leaders = [claim for claim in claimed if not claim.follows] or claimed
    leader = min(leaders, key=lambda claim: claim.count)
    wrong = []
    for claim in claimed:
        if np.array_equal(claim.units, leader.units) or (claim.follows and claim.units.all()):
            continue
        what = f"{claim.name} as many others" if claim.count == leader.count else str(claim)
        wrong.append(f"{leader}, {what} ({key}): couple them in the spec")
    return leader.units, wrong


def _follow(claim: Claim, units: Flags, followers: dict[str, dict[int, Flags]]) -> None:
    """What a tensor loses that follows others."""
    if claim.follows and claim.dim is not None and claim.units.all() and not units.all():
        flags = np.repeat(units, claim.unit)
        followers.setdefault(claim.name, {})[claim.dim] = flags


def _all_units(claims: Claims) -> dict[str, dict[Site, Flags]]:
    """The units of every key and site as the first tensor has them."""
    return {
        key: {site: claimed[0].units for site, claimed in sites.items()} for key, sites in claims.of.items()
    }


def _with(dense: Dense, name: str, along: Mapping[int, Flags]) -> KeptIndices:
    before = dense.kept.get(name) or kept_whole(dense.shapes[name])
    return kept_slices([along.get(dim, flags) for dim, flags in enumerate(before.along)])


def _unlike(key: str, first: tuple[int, str], other: tuple[int, str]) -> str:
    told = (f"{count} in {module}" for count, module in (first, other))
    return (
        f"{key} would be {' and '.join(told)}, and config.json has one for all: give all of these the same "
        "nnz or sparsity"
    )


def _beside(claims: Claims, dense: Dense) -> Iterator[str]:
    """Tensors of a module that is cut, of which nobody knows what becomes: scales, adapters and the like."""
    modules: dict[str, str] = {}
    for name, kept in dense.kept.items():
        if kept.cut and name not in dense.gone:
            modules.setdefault(name.rpartition(".")[0], name)
    for name in claims.stays if modules else ():
        if name in dense.kept or name in claims.uses:
            continue
        parent = name.rpartition(".")[0]
        above = (".".join(parent.split(".")[:depth]) for depth in range(parent.count(".") + 1))
        # Modules below a matrix's own are adapters of it; those below others are their parts.
        cut = modules.get(parent) or next(
            (modules[module] for module in above if modules.get(module, "").endswith(_MATRIX)), None
        )
        if cut is not None:
            yield (
                f"{name} lies beside {cut}, which is cut, and nothing tells how to cut it: merge it, or "
                "take it out"
            )


def refuse(problems: Iterable[str], most: int = 10) -> None:
    """CheckpointError with all that is in the way, or the first of it; nothing where that is nothing."""
    lines = list(problems)
    if len(lines) > most:
        lines = [*lines[:most], f"and {len(lines) - most:,} more"]
    if lines:
        raise CheckpointError(*lines)
