"""Widths: what every cut says of the keys of a config, and whether all of them say the same.

Owns the agreement of tensors that share units (channels, heads, experts), of layers that share a key, and of
groups. Called by configuring.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.removal.claiming import Claim, Claims, Dense, collect
from sparseprune.removal.grouping import (
    indivisible,
    routing_problems,
    sized_lists,
    uneven_heads,
)
from sparseprune.removal.slices import Kept, kept_slices, kept_whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from sparseprune.removal.sections import Section
    from sparseprune.spec import Captures

    Flags = NDArray[np.bool_]
    Site = Captures

_MATRIX = (".weight", ".bias")


@dataclass(frozen=True, slots=True)
class Agreement:
    """What all cuts come to: new values of keys, what tensors keep that follow others, what is in the way."""

    values: Mapping[str, int]
    followers: Mapping[str, Kept]
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


def _with(dense: Dense, name: str, along: Mapping[int, Flags]) -> Kept:
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
