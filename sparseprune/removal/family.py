"""A family of models: the words in which it is said which key of config.json counts which dimensions.

Plain data without behaviour; families.py has what is said of real ones. Knows no checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparseprune.spec.patterns import TensorPattern


@dataclass(frozen=True, slots=True)
class Part:
    """A run of indices of a dimension: `key` of the config, times `unit` indices for each.

    `unit` is an expression over the config. Units go whole, unless `apart`: then indices are only counted.
    """

    key: str
    unit: str = "1"
    apart: bool = False


@dataclass(frozen=True, slots=True)
class Use:
    """What the dimensions of some tensors are made of, part after part; all others are no business of ours.

    Tensors whose captures agree, but for {name} and {kind}, have the same units. `follows`: it acts only
    through units that others drop, so that it loses what they lose without being pruned itself.
    """

    pattern: TensorPattern
    dims: Mapping[int, tuple[Part, ...]]
    follows: bool = False
    keys: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        found = frozenset(part.key for parts in self.dims.values() for part in parts)
        object.__setattr__(self, "keys", found)


@dataclass(frozen=True, slots=True)
class Members:
    """A numbered list of modules, by the pattern of a member's name, and the key that counts it."""

    pattern: TensorPattern
    key: str


@dataclass(frozen=True, slots=True)
class Routing:
    """What a router asks of its experts: at least `chosen`, in `groups` of one size, `serving` at a time.

    Groups are ranked by the `best` of their members, of which each has so many.
    """

    experts: str
    chosen: str
    groups: str | None = None
    serving: str | None = None
    best: int = 1


@dataclass(frozen=True, slots=True)
class Heads:
    """The key that counts query heads; `groups` counts key/value heads, each of which has as many of them.

    `pinned` keys are written out once heads go, since the class would derive them from the number of heads.
    `alike` keys take the value of another. `divides` is a key of which heads have to be a divisor. `sized`
    keys may have lists whose length the class derives from the number of heads, whatever is pinned.
    """

    key: str
    groups: str | None = None
    divides: str | None = None
    pinned: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    alike: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    sized: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Layers:
    """Where the config speaks of layers by their number: what is cut, or said in another way, with them.

    `by_place`: lists with an entry for each; `by_number`: lists of numbers; `up_to`: counts of the first
    ones, and what they are where the config has none; `beyond` counts those behind all that the key counts.
    `implied` are lists that the class makes where the config has none: an expression over `layer`, for lists
    of numbers whether it is one of them. `settled` keys say the same by a rule that ends with the list:
    layers are in it by either, and the keys get values that say no more. `rules` are keys of which the class
    makes a list where there is none: they get values that still make it, or are taken out. Where one of the
    `refused` keys is set no layer can go, with the reason.
    """

    members: Members
    by_place: tuple[str, ...] = ("layer_types", "mlp_layer_types")
    by_number: tuple[str, ...] = ()
    up_to: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    implied: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    beyond: str = ""
    settled: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    rules: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    refused: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Family:
    """Model types that lay their tensors out alike; of several uses the first that matches a name counts.

    `values` are expressions for keys that the config may leave out, `aliases` other spellings of them.
    `refused` are keys that cannot change, with the reason.
    """

    models: tuple[str, ...]
    layers: Layers
    uses: tuple[Use, ...]
    lists: tuple[Members, ...] = ()
    values: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    aliases: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    heads: Heads | None = None
    routing: Routing | None = None
    refused: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
