"""Unlisted keys: what a config says of layers and widths under names that the table of families has not.

Owns how a key is seen to speak of layers: by its words, its length, its numbers. What is certain is cut, what
may be is told, and so are numbers that look like copies of those that change. Called by configuring.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparseprune.removal.sections import OTHER_TOWERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sparseprune.removal.family import Family
    from sparseprune.removal.sections import Section

_CONFIG = "config.json"
_LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.[0-9]+(?:\.|$)")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")


def _these(words: str) -> frozenset[str]:
    return frozenset(words.split())


_LAYERS = _these("layer layers block blocks")
_COUNTS = _these("n_layer n_layers num_layers num_hidden_layers")
_NUMBERS = _these("id ids idx idxs index indices indexes numbers")
# What layers are: a list of numbers under such a name says which layers are of a kind.
_KINDS = _these(
    "attention attn moe dense sparse mlp only rope nope sliding window global local full linear cross shared "
    "expert experts mamba ssm conv recurrent hybrid swa"
)
# Layers that are looked at from elsewhere: something has a part for each of them.
_TAPS = _these("target aux auxiliary output out feature features exit select")
_RULES = _these("pattern interval period offset freq frequency stride every step")
# Words of lists and dictionaries that have nothing to do with layers, and of numbers that have not.
_OTHERS = _these(
    "token tokens words label labels class classes architectures factor factors lang language languages mean "
    "std map dtype image pixel grid"
)
_SIZES = _these("norm scale size dim dims ratio group groups width")
# Words by which a key speaks of the same as one that changes.
_ALIKE = (
    _LAYERS | {"depth"},
    _these("head heads"),
    _these("expert experts"),
    _these("intermediate inner ffn ff mlp feedforward"),
)
_SURE = 8  # layers, from which on a list of just as many entries has one for each
_DEEPEST = 8
_LONGEST = 9  # digits of a number of a layer


@dataclass(frozen=True, slots=True)
class Gone:
    """Layers that go, by number; the values that keys get; and the numbers that widths had, by their keys."""

    removed: Sequence[int]
    values: Mapping[str, Any]
    widths: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Unlisted:
    """Keys of the section, and those `outside` of it, with what they become; and lines on what stays."""

    values: Mapping[str, Any]
    outside: Mapping[str, Any]
    remarks: tuple[str, ...]


def settle_unlisted(
    section: Section, config: Mapping[str, Any], beside: Mapping[str, Mapping[str, Any]], gone: Gone
) -> Unlisted:
    """What becomes of keys that the table has not, in a config and in the documents `beside` it."""
    look = _Look.at(section, gone)
    if not look.numbers:
        return Unlisted({}, {}, ())
    values: dict[str, Any] = {}
    remarks: list[str] = []
    prefix = f"{_CONFIG}: " if section.key is None else f"{_CONFIG}: {section.key}."
    for key, value in section.values.items():
        if key in gone.values or (key in look.known and type(value) is int):
            continue
        after = look.cut(key, value)
        if after is None:
            remarks += look.remarks(prefix + key, key, value, by_length=True)
        else:
            values[key] = after
    outside: dict[str, Any] = {}
    for key, value in config.items() if section.key is not None else ():
        changed = {**gone.values, **values}
        if key in changed and changed[key] is not None and value == section.values.get(key):
            outside[key] = changed[key]
        elif key != section.key:
            remarks += look.remarks(f"{_CONFIG}: {key}", key, value, by_length=True)
    for file, document in beside.items():
        for key, value in document.items():
            remarks += look.remarks(f"{file}: {key}", key, value, by_length=False)
    return Unlisted(values, outside, tuple(dict.fromkeys(remarks)))


@dataclass(frozen=True, slots=True)
class _Look:
    """How keys are looked at: these of so many `layers` stay, None if none goes; `numbers` are to change."""

    layers: int | None
    stays: Sequence[int]
    numbers: Mapping[str, int]
    known: frozenset[str]

    @staticmethod
    def at(section: Section, gone: Gone) -> _Look:
        key = section.family.layers.members.key
        known = _known(section.family)
        if not gone.removed:
            return _Look(None, (), gone.widths, known)
        layers = section.value(key)
        stays = [layer for layer in range(layers) if layer not in frozenset(gone.removed)]
        if len(stays) == layers:
            return _Look(None, (), gone.widths, known)
        return _Look(layers, stays, {**gone.widths, key: layers}, known)

    def cut(self, key: str, value: object) -> object:
        """What a key of the section becomes where it is certain what it says of layers; None elsewhere."""
        if self.layers is None:
            return None
        if isinstance(value, list):
            return self._cut_list(key, value)
        words = _words(key)
        if isinstance(value, dict):
            numbers = _keyed_by_number(value, self.layers)
            every = len(numbers) == self.layers >= _SURE and _OTHERS.isdisjoint(words)
            if numbers and (every or not _LAYERS.isdisjoint(words)):
                return {
                    str(place): value[str(layer)]
                    for place, layer in enumerate(self.stays)
                    if layer in numbers
                }
        if key in _COUNTS and type(value) is int and value == self.layers:
            return len(self.stays)
        return None

    def _cut_list(self, key: str, entries: list[Any]) -> object:
        words = _words(key)
        if self._names_layers(words, entries):
            places = {layer: place for place, layer in enumerate(self.stays)}
            left = [places[layer] for layer in entries if layer in places]
            is_kind = not _KINDS.isdisjoint(words) and _TAPS.isdisjoint(words)
            return left if is_kind or len(left) == len(entries) else None
        if len(entries) != self.layers or words[-1] in _NUMBERS:
            return None
        sure = self.layers >= _SURE and _OTHERS.isdisjoint(words)
        if (sure or key in self.known or not _LAYERS.isdisjoint(words)) and entries != list(
            range(self.layers)
        ):
            return [entries[layer] for layer in self.stays]
        return None

    def _names_layers(self, words: Sequence[str], entries: list[Any]) -> bool:
        """Whether a list says which layers: by its name, and by numbers of layers in ascending order."""
        layers = self.layers or 0
        if not entries or not all(type(entry) is int and 0 <= entry < layers for entry in entries):
            return False
        if entries != sorted(set(entries)):
            return False
        if words[-1] in _NUMBERS:
            return not (_LAYERS | _KINDS).isdisjoint(words)
        return words[-1] in _LAYERS and len(entries) < layers

    def remarks(
        self, place: str, key: str, value: object, *, by_length: bool, depth: int = _DEEPEST
    ) -> Iterator[str]:
        """Lines for what may speak of layers, or be a copy of a number that changes; and stays as it is.

        `by_length`: a list of as many entries as there are layers is enough.
        """
        words = _words(key)
        if key == "quantization_config" or OTHER_TOWERS.search(key) or not _OTHERS.isdisjoint(words):
            return
        if self.layers is not None and isinstance(value, list | dict) and any(map(_names_layer, value)):
            yield f"{place} names layers by their numbers, and stays as it is"
        elif isinstance(value, dict) and not all(map(_is_number, value)):
            for inner, each in value.items() if depth else ():
                yield from self.remarks(f"{place}.{inner}", inner, each, by_length=by_length, depth=depth - 1)
        elif type(value) is int:
            yield from self._remarks_on_number(place, key, value)
        elif self.layers is not None and isinstance(value, list | dict | str) and value:
            speaks = not _LAYERS.isdisjoint(words) or (words[-1] in _NUMBERS and not _KINDS.isdisjoint(words))
            if isinstance(value, str):
                speaks = by_length and (speaks or "pattern" in words) and len(value) == self.layers
            elif by_length and len(value) == self.layers:
                speaks = True
            if speaks:
                yield f"{place} looks like a statement about layers, and stays as it is"

    def _remarks_on_number(self, place: str, key: str, value: int) -> Iterator[str]:
        words = _words(key)
        copied = next(
            (
                old
                for old, before in self.numbers.items()
                if value == before and _are_alike(words, _words(old))
            ),
            None,
        )
        if copied is not None:
            yield f"{place} is {value}, as {copied} was, and stays as it is"
        if self.layers is None or copied is not None:
            return
        is_rule = not _RULES.isdisjoint(words)
        speaks = not frozenset({"layer", "layers", "blocks"}).isdisjoint(words) and _SIZES.isdisjoint(words)
        if (speaks or (is_rule and not _KINDS.isdisjoint(words))) and not (is_rule and value == 1):
            yield f"{place} {value} looks like a statement about layers, and stays as it is"


def _words(key: str) -> list[str]:
    """The words of a name, in lower case.

    >>> _words("per_layer_window"), _words("numLayers")
    (['per', 'layer', 'window'], ['num', 'layers'])
    """
    return [word.lower() for word in _WORD.findall(key)] or [""]


def _are_alike(words: Sequence[str], others: Sequence[str]) -> bool:
    """Whether two names speak of the same: heads, experts, channels, layers; of keys and values only both."""
    if {"kv", "key"}.isdisjoint(words) != {"kv", "key"}.isdisjoint(others):
        return False
    if not _LAYERS.isdisjoint(words) and not _SIZES.isdisjoint(words):
        return False  # as `layer_norm_size`
    return any(not alike.isdisjoint(words) and not alike.isdisjoint(others) for alike in _ALIKE)


def _is_number(key: str) -> bool:
    return key.isascii() and key.isdecimal() and len(key) <= _LONGEST


def _names_layer(value: object) -> bool:
    return isinstance(value, str) and _LAYER.search(value) is not None


def _keyed_by_number(value: Mapping[str, Any], layers: int) -> frozenset[int]:
    """The keys of an object as numbers of layers; none if it has other keys."""
    if not all(map(_is_number, value)):
        return frozenset()
    numbers = frozenset(map(int, value))
    return numbers if all(number < layers for number in numbers) else frozenset()


def _known(family: Family) -> frozenset[str]:
    """The keys that the table has of a family."""
    layers, heads, routing = family.layers, family.heads, family.routing
    keys: set[str | None] = {layers.members.key, layers.beyond, *layers.by_place, *layers.by_number}
    for named in (layers.up_to, layers.settled, layers.rules, layers.refused, family.values, family.aliases):
        keys.update(named)
    keys.update(f"_{rule}" for rule in layers.rules)
    keys.update(family.aliases.values())
    keys.update(members.key for members in family.lists)
    for use in family.uses:
        keys |= use.keys
    if heads is not None:
        keys |= {heads.key, heads.groups, heads.divides, *heads.pinned, *heads.alike}
    if routing is not None:
        keys |= {routing.experts, routing.chosen, routing.groups, routing.serving}
    return frozenset(key for key in keys if key)
