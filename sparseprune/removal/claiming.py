"""Claims: what every tensor and list that is cut says of the keys of a config, unit by unit.

Owns the way from flags of indices to units of channels, heads and experts, by the family's table. Judges
nothing: whether all say the same is for widths.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.grids import prod
from sparseprune.removal.membership import numbered

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from numpy.typing import NDArray

    from sparseprune.engine.grids import Shape
    from sparseprune.removal.family import Part, Use
    from sparseprune.removal.membership import Vanished
    from sparseprune.removal.sections import Section
    from sparseprune.removal.slices import Kept
    from sparseprune.spec import Captures

    Flags = NDArray[np.bool_]

_NUMBER = re.compile(r"(?:^|(?<=\.))[0-9]+(?=\.)")  # a piece of a name that is one
_OF_ONE_SITE = ("name", "kind", "member")  # captures that tell apart what has the same units


@dataclass(frozen=True, slots=True)
class Dense:
    """A checkpoint as it is, and what is kept of it: shapes by name, `kept` where something is dropped.

    `gone` are the tensors of the members that have `vanished`. `exact`: it is known which units survive, and
    not only how many.
    """

    shapes: Mapping[str, Shape]
    kept: Mapping[str, Kept]
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
