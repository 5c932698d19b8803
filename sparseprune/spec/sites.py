"""Sites: where in a checkpoint an instance of a table lies, before any shape is looked at.

A block's site is a tensor, a coupling's site holds those of its members. Owns how instances are
labelled (`channel[layer=3]`) and ordered (`layer=2` before `layer=10`). Knows neither tables nor shapes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from sparseprune.spec.bound import Captures, TensorInfo
    from sparseprune.spec.patterns import TensorPattern
    from sparseprune.spec.regexes import RegexPattern

    Pattern = TensorPattern | RegexPattern

_DIGITS = re.compile(r"([0-9]+)")
NaturalKey = tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class TensorSite:
    """A tensor that a pattern matches; `tag` tells it apart from all others of its table."""

    captures: Captures
    tag: str
    tensor: TensorInfo


@dataclass(frozen=True, slots=True)
class JoinedSite:
    """One instance of a coupling: for each member that it lists, the sites that take part."""

    captures: Captures
    tag: str
    members: tuple[tuple[Site, ...], ...]


Site = TensorSite | JoinedSite


def label(table: str, site: Site) -> str:
    """The name of an instance: the table's, with the captures or what else tells it apart.

    >>> label("channel", JoinedSite((("layer", 3),), "layer=3", ()))
    'channel[layer=3]'
    """
    return f"{table}[{site.tag}]" if site.tag else table


def captured(captures: Captures) -> str:
    """Captures as labels and errors show them; those that hold nothing are left out.

    >>> captured((("stem", ""), ("layer", 3), ("name", "up")))
    'layer=3,name=up'
    """
    return ",".join([f"{name}={value}" for name, value in captures if value != ""])


def find_tensors(
    patterns: Sequence[Pattern],
    tensors: Iterable[TensorInfo],
    keep: Callable[[TensorInfo, Captures], bool] | None = None,
) -> tuple[TensorSite, ...]:
    """The tensors that a pattern matches, the first one that does, in the natural order of the captures.

    `keep` says which of those that match are taken, if not all.
    """
    found: dict[Captures, list[TensorInfo]] = {}
    for tensor in tensors:
        for pattern in patterns:
            captures = pattern.match(tensor.name)
            if captures is not None:
                if pattern.names != patterns[0].names:
                    captures = _reordered(captures, patterns[0].names)
                if keep is None or keep(tensor, captures):
                    found.setdefault(captures, []).append(tensor)
                break
    sites: list[TensorSite] = []
    for captures in in_natural_order(found):
        alike = found[captures]
        if len(alike) == 1:
            sites.append(TensorSite(captures, captured(captures), alike[0]))
        else:
            alike.sort(key=lambda tensor: natural_key(tensor.name))
            sites += [TensorSite(captures, tensor.name, tensor) for tensor in alike]
    return tuple(sites)


def _reordered(captures: Captures, names: Sequence[str]) -> Captures:
    """In the order in which the first pattern has the captures, so that alike captures are equal."""
    return tuple(sorted(captures, key=lambda pair: names.index(pair[0]) if pair[0] in names else len(names)))


def in_natural_order(several: Iterable[Captures]) -> list[Captures]:
    """Captures sorted by their values, numbers by size wherever they stand."""
    rows = list(several)
    values = {value for captures in rows for _, value in captures}
    keys = {value: natural_key(str(value)) for value in values}
    places = {key: place for place, key in enumerate(sorted(set(keys.values())))}
    ranks = {value: places[key] for value, key in keys.items()}  # many rows hold few values: compare numbers
    return sorted(rows, key=lambda captures: [ranks[value] for _, value in captures])


def natural_key(text: str) -> NaturalKey:
    """A key that sorts digits in a text by the number that they are.

    >>> sorted(["layer10", "layer2"], key=natural_key)
    ['layer2', 'layer10']
    """
    parts = _DIGITS.split(text)  # text and digits in turn, so that like is compared with like
    digits = (part.lstrip("0") for part in parts[1::2])
    numbers = [(len(number), number) for number in digits]
    texts = [(0, part) for part in parts[0::2]]
    return tuple(key for pair in zip_longest(texts, numbers) for key in pair if key is not None)
