"""Widths: what every cut says of the keys of a config, and whether all of them say the same.

Owns the agreement of tensors that share units (channels, heads, experts), of layers that share a key, and of
groups. Knows the family's table and no bytes. Called by configuring.py.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.errors import CheckpointError
from sparseprune.pipeline.removal.grouping import indivisible, place_of, routing_problems, uneven_heads
from sparseprune.pipeline.removal.membership import numbered
from sparseprune.pipeline.removal.slices import Kept, kept_slices, kept_whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    from sparseprune.engine.grids import Shape
    from sparseprune.pipeline.removal.family import Part, Use
    from sparseprune.pipeline.removal.membership import Vanished
    from sparseprune.pipeline.removal.sections import Section
    from sparseprune.spec import Captures

    Flags = NDArray[np.bool_]
    Site = Captures

_OF_ONE_SITE = ("name", "kind", "member")  # captures that tell apart what has the same units


@dataclass(frozen=True, slots=True)
class Dense:
    """A checkpoint as it is, and what is kept of it: shapes by name, `kept` where something is dropped.

    `exact`: it is known which units survive, and not only how many.
    """

    shapes: Mapping[str, Shape]
    kept: Mapping[str, Kept]
    vanished: Vanished
    exact: bool = True


@dataclass(frozen=True, slots=True)
class Agreement:
    """What all cuts come to: new values of keys, what tensors keep that follow others, what is in the way."""

    values: Mapping[str, int]
    followers: Mapping[str, Kept]
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Claim:
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

    def __str__(self) -> str:
        what = f"{self.count} of {self.units.size}"
        return f"{self.name} keeps {what}" + ("" if self.dim is None else f" along dimension {self.dim}")


@dataclass(slots=True)
class _Claims:
    """All claims by key and site, dimensions that the config does not describe, what is in the way.

    `apart` has those of which a key counts the indices alone, which nevertheless are the same in one site.
    """

    of: defaultdict[str, defaultdict[Site, list[_Claim]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    apart: defaultdict[tuple[str, Site], list[_Claim]] = field(default_factory=lambda: defaultdict(list))
    misfits: list[tuple[tuple[str, ...], str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def agree(section: Section, dense: Dense) -> Agreement:
    """What is kept, as values of the config's keys."""
    claims = _Claims()
    stays = {name: shape for name, shape in dense.shapes.items() if not dense.vanished.takes(name)}
    for name, shape in stays.items():
        _claim(section, name, shape, dense, claims)
    _claim_lists(section, dense, claims)
    problems = [*claims.problems, *_beside(section, stays, dense)]
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
        first, *others = {int(np.count_nonzero(units)): site for site, units in settled[key].items()}.items()
        values[key] = first[0]
        problems += [_unlike(key, first, others[0])] if others else []
    problems += [text for keys, text in claims.misfits if not values.keys().isdisjoint(keys)]
    if dense.exact:
        problems += uneven_heads(section, {**_all_units(claims), **settled}, values)
    problems += indivisible(section, values)
    problems += routing_problems(section, settled, values, exact=dense.exact)
    problems += [
        f"config.json: {key} would be 0: nothing is left" for key, value in values.items() if not value
    ]
    refused = section.family.refused
    problems += [f"{key} cannot change: {refused[key]}" for key in values if key in refused]
    kept = {name: _with(dense, name, along) for name, along in followers.items()}
    return Agreement(values, kept, tuple(dict.fromkeys(problems)))


def use_of(section: Section, name: str) -> tuple[Use, Captures] | None:
    """What the family knows of a tensor; None where that is nothing."""
    if section.reaches(name):
        for use in section.family.uses:
            captures = use.pattern.match(name)
            if captures is not None:
                return use, captures
    return None


def _claim(section: Section, name: str, shape: Shape, dense: Dense, claims: _Claims) -> None:
    """What one tensor says, dimension by dimension."""
    found, kept = use_of(section, name), dense.kept.get(name)
    dims = {} if found is None else found[0].dims
    for dim in () if kept is None else kept.cut:
        if dim not in dims:
            lost = shape[dim] - kept.shape[dim] if kept else 0
            claims.problems.append(
                f"{name} loses {lost} of {shape[dim]} along dimension {dim}, which no key of "
                "config.json carries"
            )
    if found is None:
        return
    use, captures = found
    for dim, parts in dims.items():
        flags = np.ones(shape[dim], dtype=np.bool_) if kept is None else kept.along[dim]
        sizes = [section.value(part.key) * section.unit(part) for part in parts]
        if sum(sizes) != flags.size:
            said = " + ".join(f"{size} for {part.key}" for part, size in zip(parts, sizes, strict=True))
            text = f"{name} has {flags.size} along dimension {dim}, config.json says {said}"
            claims.misfits.append((tuple(part.key for part in parts), text))
            if not flags.all():
                claims.problems.append(text)
            continue
        begin = 0
        for part, size in zip(parts, sizes, strict=True):
            claim = _Claim(name, dim, use.follows, flags[begin : begin + size], section.unit(part))
            _add(claim, part, _site(captures), claims)
            begin += size


def _add(claim: _Claim, part: Part, site: Site, claims: _Claims) -> None:
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


def _claim_lists(section: Section, dense: Dense, claims: _Claims) -> None:
    """What lists of modules say, each by its members that stay."""
    family, vanished = section.family, dense.vanished
    members: dict[str, set[int]] = defaultdict(set)
    for name in dense.shapes:
        for before, number, _ in numbered(name):
            members[before].add(number)
    for before, numbers in members.items():
        if vanished.takes(f"{before}.x"):
            continue  # in a layer that vanishes itself
        found = next(
            (
                (each, captures)
                for each in (*family.lists, family.layers.members)
                if section.reaches(before) and (captures := each.pattern.match(f"{before}.0")) is not None
            ),
            None,
        )
        gone = vanished.numbers.get(before, ())
        if found is None:
            if gone:
                claims.problems.append(
                    f"{before} loses {len(gone)} of {len(numbers)} members, which no key of "
                    "config.json counts"
                )
            continue
        each, captures = found
        if each is family.layers.members:
            continue
        if len(numbers) != section.value(each.key) or max(numbers) >= len(numbers):
            text = f"{before} has {len(numbers)} members, config.json says {section.value(each.key)}"
            claims.misfits.append(((each.key,), text))
            if gone:
                claims.problems.append(text)
            continue
        units = ~np.isin(np.arange(len(numbers)), gone)
        claims.of[each.key][_site(captures)].append(_Claim(before, None, follows=False, units=units))


def _site(captures: Captures) -> Site:
    return tuple(pair for pair in captures if pair[0] not in _OF_ONE_SITE)


def _units(key: str, claimed: list[_Claim]) -> tuple[Flags, list[str]]:
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


def _follow(claim: _Claim, units: Flags, followers: dict[str, dict[int, Flags]]) -> None:
    """What a tensor loses that follows others."""
    if claim.follows and claim.dim is not None and claim.units.all() and not units.all():
        flags = np.repeat(units, claim.unit)
        followers.setdefault(claim.name, {})[claim.dim] = flags


def _all_units(claims: _Claims) -> dict[str, dict[Site, Flags]]:
    """The units of every key and site as the first tensor has them."""
    return {
        key: {site: claimed[0].units for site, claimed in sites.items()} for key, sites in claims.of.items()
    }


def _with(dense: Dense, name: str, along: Mapping[int, Flags]) -> Kept:
    before = dense.kept.get(name) or kept_whole(dense.shapes[name])
    return kept_slices([along.get(dim, flags) for dim, flags in enumerate(before.along)])


def _unlike(key: str, first: tuple[int, Site], other: tuple[int, Site]) -> str:
    told = (f"{count} in {place_of(site)}" for count, site in (first, other))
    return (
        f"{key} would be {' and '.join(told)}, and config.json has one for all: give every layer the "
        "same nnz or sparsity"
    )


def _beside(section: Section, stays: Iterable[str], dense: Dense) -> Iterator[str]:
    """Tensors of a module that is cut, of which nobody knows what becomes: scales, adapters and the like."""
    modules: dict[str, str] = {}
    for name, kept in dense.kept.items():
        if kept.cut and not dense.vanished.takes(name):
            modules.setdefault(name.rpartition(".")[0], name)
    for name in stays:
        cut = modules.get(name.rpartition(".")[0])
        if cut is not None and name not in dense.kept and use_of(section, name) is None:
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
