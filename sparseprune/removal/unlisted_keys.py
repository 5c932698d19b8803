"""Keys of config.json that the table lacks: what they say of layers, as far as names and values tell.

Changes what is certain, and gives a line for what may no longer be true. Called by config.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparseprune.removal.architectures import OTHER_TOWERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sparseprune.removal.config import ConfigSection

_CONFIG = "config.json"
_LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.[0-9]+(?:\.|$)")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_LAYERS = _set("layer layers block blocks")
_COUNTS = _set("n_layer n_layers num_layers num_hidden_layers")
_NUMBERS = _set("id ids idx idxs index indices indexes numbers")
# Kinds of layers: a list of numbers under such a name says which layers are of a kind.
_KINDS = _set(
    "attention attn moe dense sparse mlp only rope nope sliding window global local full linear cross shared "
    "expert experts mamba ssm conv recurrent hybrid swa"
)
# Layers whose outputs something else uses, with a part of its own for each of them.
_TAPS = _set("target aux auxiliary output out feature features exit select")
_RULES = _set("pattern interval period offset freq frequency stride every step")
# Words of lists and dictionaries that have nothing to do with layers, and of such numbers.
_OTHERS = _set(
    "token tokens words label labels class classes architectures factor factors lang language languages mean "
    "std map dtype image pixel grid"
)
_SIZES = _set("norm scale size dim dims ratio group groups width")
# Two keys with words of the same set speak of the same thing.
_ALIKE = (
    _LAYERS | {"depth"},
    _set("head heads"),
    _set("expert experts"),
    _set("intermediate inner ffn ff mlp feedforward"),
)
_SURE = 8  # layers: a list with as many entries, and at least so many, has one for each layer
_DEEPEST = 8
_LONGEST = 9  # digits of a layer's number


@dataclass(frozen=True, slots=True)
class Changed:
    """What the table changes: `removed` layers by number, new `values` of keys, old `numbers` of keys."""

    removed: Sequence[int]
    values: Mapping[str, Any]
    numbers: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Unlisted:
    """New values of keys in the section and `outside` of it, and lines about statements that stay."""

    values: Mapping[str, Any]
    outside: Mapping[str, Any]
    remarks: tuple[str, ...]


def settle_unlisted(
    section: ConfigSection,
    config: Mapping[str, Any],
    beside: Mapping[str, Mapping[str, Any]],
    changed: Changed,
) -> Unlisted:
    """What becomes of keys that the table lacks, in a config and in the documents `beside` it."""
    reader = _KeyReader.of(section, changed)
    if not reader.numbers:
        return Unlisted({}, {}, ())
    values: dict[str, Any] = {}
    remarks: list[str] = []
    for key, value in section.values.items():
        if key in changed.values or (key in reader.known and type(value) is int):
            continue
        after = reader.cut(key, value)
        if after is None:
            remarks += reader.remarks(f"{_CONFIG}: {section.prefix}{key}", key, value, by_length=True)
        else:
            values[key] = after
    outside: dict[str, Any] = {}
    settled = {**changed.values, **values}
    for key, value in config.items() if section.key is not None else ():
        if settled.get(key) is not None and value == section.values.get(key):
            outside[key] = settled[key]
        elif key != section.key:
            remarks += reader.remarks(f"{_CONFIG}: {key}", key, value, by_length=True)
    for file, document in beside.items():
        for key, value in document.items():
            remarks += reader.remarks(f"{file}: {key}", key, value, by_length=False)
    return Unlisted(values, outside, tuple(dict.fromkeys(remarks)))


@dataclass(frozen=True, slots=True)
class _KeyReader:
    """What is looked for in keys: statements on `layers`, of which some stay, and copies of old `numbers`.

    `layers` is None if no layer is removed. `known` are the keys of the table.
    """

    layers: int | None
    stays: Sequence[int]
    numbers: Mapping[str, int]
    known: frozenset[str]

    @staticmethod
    def of(section: ConfigSection, changed: Changed) -> _KeyReader:
        key, known = section.architecture.layers.members.key, section.architecture.keys
        layers = section.value(key) if changed.removed else 0
        stays = [layer for layer in range(layers) if layer not in frozenset(changed.removed)]
        if len(stays) == layers:
            return _KeyReader(None, (), changed.numbers, known)
        return _KeyReader(layers, stays, {**changed.numbers, key: layers}, known)

    def cut(self, key: str, value: object) -> object:
        """The new value of a key that surely speaks of layers; None for other keys."""
        if self.layers is None:
            return None
        if isinstance(value, list):
            return self._cut_list(key, value)
        words = _words(key)
        if isinstance(value, dict):
            numbers = _layer_keys(value, self.layers)
            every = len(numbers) == self.layers >= _SURE and _OTHERS.isdisjoint(words)
            if numbers and (every or not _LAYERS.isdisjoint(words)):
                pairs = enumerate(self.stays)
                return {str(place): value[str(layer)] for place, layer in pairs if layer in numbers}
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
        if len(entries) != self.layers or words[-1] in _NUMBERS or entries == list(range(self.layers)):
            return None
        sure = self.layers >= _SURE and _OTHERS.isdisjoint(words)
        if sure or key in self.known or not _LAYERS.isdisjoint(words):
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
        """Lines for what may speak of layers, or copy a number that changes, and stays as it is.

        `by_length`: a list with an entry for each layer is enough.
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
            yield from self._remarks_on_number(place, words, value)
        elif self.layers is not None and isinstance(value, list | dict | str) and value:
            speaks = not _LAYERS.isdisjoint(words) or (words[-1] in _NUMBERS and not _KINDS.isdisjoint(words))
            is_long = by_length and len(value) == self.layers
            if isinstance(value, str):
                speaks = is_long and (speaks or "pattern" in words)
            if speaks or (is_long and not isinstance(value, str)):
                yield f"{place} looks like a statement about layers, and stays as it is"

    def _remarks_on_number(self, place: str, words: Sequence[str], value: int) -> Iterator[str]:
        for old, before in self.numbers.items():
            if value == before and _are_alike(words, _words(old)):
                yield f"{place} is {value}, as {old} was, and stays as it is"
                return
        if self.layers is None:
            return
        is_rule = not _RULES.isdisjoint(words)
        speaks = not _set("layer layers blocks").isdisjoint(words) and _SIZES.isdisjoint(words)
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
        return False  # such as `layer_norm_size`
    return any(not alike.isdisjoint(words) and not alike.isdisjoint(others) for alike in _ALIKE)


def _is_number(key: str) -> bool:
    return key.isascii() and key.isdecimal() and len(key) <= _LONGEST


def _names_layer(value: object) -> bool:
    return isinstance(value, str) and _LAYER.search(value) is not None


def _layer_keys(value: Mapping[str, Any], layers: int) -> frozenset[int]:
    """The keys of an object as numbers of layers; none if it has other keys."""
    if not all(map(_is_number, value)):
        return frozenset()
    numbers = frozenset(map(int, value))
    return numbers if all(number < layers for number in numbers) else frozenset()
