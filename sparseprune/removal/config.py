"""The config after a removal: new counts, lists by layer, nested configs, and keys that the table lacks.

Owns what a config says of layers by their number. Of keys that the table lacks it changes what is certain, as
far as names and values tell, and gives a line for what may no longer be true. Called by shrink.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from sparseprune.errors import CheckpointError
from sparseprune.removal.architectures import OTHER_TOWERS, architecture_of, model_types
from sparseprune.removal.dim_constraints import agree, dims_lookup, layer_lists, refuse
from sparseprune.results.fields import ConfigChange
from sparseprune.spec.expressions import ExpressionError, Names, parse_expression
from sparseprune.spec.problems import listed, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sparseprune.engine.grids import Shape
    from sparseprune.removal.architectures import Architecture, DimPart
    from sparseprune.removal.dim_constraints import CutModel
    from sparseprune.removal.slices import KeptIndices
    from sparseprune.spec import Captures


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


def _settle_unlisted(
    section: ConfigSection,
    config: Mapping[str, Any],
    beside: Mapping[str, Mapping[str, Any]],
    reader: _KeyReader,
    values: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """What becomes of keys that the table lacks, in a config and in the documents `beside` it.

    Returns the new `values` of the section with theirs, new values of keys outside of it, and lines about
    statements that stay.
    """
    settled, outside, remarks = {**values}, dict[str, Any](), list[str]()
    for key, value in section.values.items():
        if key in settled or (key in reader.known and type(value) is int):
            continue
        after = reader.cut(key, value)
        if after is None:
            remarks += reader.remarks(f"{_CONFIG}: {section.prefix}{key}", key, value, by_length=True)
        else:
            settled[key] = after
    for key, value in config.items() if section.key is not None else ():
        if settled.get(key) is not None and value == section.values.get(key):
            outside[key] = settled[key]
        elif key != section.key:
            remarks += reader.remarks(f"{_CONFIG}: {key}", key, value, by_length=True)
    for file, document in beside.items():
        for key, value in document.items():
            remarks += reader.remarks(f"{file}: {key}", key, value, by_length=False)
    return settled, outside, list(dict.fromkeys(remarks))


class _KeyReader(Struct, frozen=True):
    """What is looked for in keys: statements on `layers`, of which some stay, and copies of old `numbers`.

    `layers` is None if no layer is removed. `known` are the keys of the table.
    """

    layers: int | None
    stays: Sequence[int]
    numbers: Mapping[str, int]
    known: frozenset[str]

    @staticmethod
    def of(section: ConfigSection, removed: Sequence[int], numbers: Mapping[str, int]) -> _KeyReader:
        key, known = section.architecture.layers.members.key, section.architecture.keys
        layers = section.value(key) if removed else 0
        stays = [layer for layer in range(layers) if layer not in frozenset(removed)]
        if len(stays) == layers:
            return _KeyReader(None, (), numbers, known)
        return _KeyReader(layers, stays, {**numbers, key: layers}, known)

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


_TEXT = "text_config"
_NUMBERED_MODULE = re.compile(r"(?:^|\.)[0-9]+(?:\.|$)")


class ConfigSection(Struct, frozen=True):
    """An architecture and the object of a config that has its keys: the top level, or what `key` holds."""

    architecture: Architecture
    key: str | None
    values: Mapping[str, Any]

    @property
    def prefix(self) -> str:
        """The path of a key of the section before its name."""
        return "" if self.key is None else f"{self.key}."

    def reaches(self, name: str) -> bool:
        """Whether a tensor may belong to the section: towers of other kinds have configs of their own."""
        return self.key is None or OTHER_TOWERS.search(name) is None

    def spellings(self, key: str) -> tuple[str, ...]:
        """All spellings of a key that this config has, since the class takes either of two."""
        alias = self.architecture.aliases.get(key)
        found = tuple(each for each in (key, alias) if each is not None and each in self.values)
        return found or (key,)

    def value(self, key: str) -> int:
        """The number that a key stands for; CheckpointError where it is none."""
        return self.number(self.architecture.values.get(key, f"config.{self.spellings(key)[0]}"))

    def unit(self, part: DimPart) -> int:
        """How many indices one unit of a part has; CheckpointError where that is no number from 1 on."""
        return self.number(part.unit, least=1)

    def number(self, text: str, least: int = 0) -> int:
        """The value of an expression; CheckpointError where it is no integer, or less than `least`."""
        found = self._value_of(text)
        if isinstance(found, bool) or not isinstance(found, int):
            raise CheckpointError(f"config.json: {text} comes to {shown(found)}, wanted an integer")
        if found < least:
            raise CheckpointError(f"config.json: {text} comes to {shown(found)}, wanted {least} or more")
        return found

    def of_layer(self, text: str, layer: int) -> object:
        """The value of an expression over the number of a layer; CheckpointError where it has none."""
        return self._value_of(text, (("layer", layer),))

    def _value_of(self, text: str, captures: Captures = ()) -> object:
        try:
            return Names({"config": self.values}, captures).value(_parsed(text))
        except ExpressionError as error:
            raise CheckpointError(f"config.json: {error}") from error


_parsed = lru_cache(maxsize=256)(parse_expression)


def section_of(config: Mapping[str, Any] | None) -> ConfigSection:
    """The section of a config that counts layers and their parts; CheckpointError for unknown models."""
    if config is None:
        text = "give the directory of a checkpoint that has one, or use apply, which keeps all shapes"
        raise CheckpointError(f"there is no config.json, which has to say what becomes smaller; {text}")
    nested = config.get(_TEXT)
    for key, values in ((None, config), (_TEXT, nested)):
        architecture = architecture_of(values.get("model_type")) if isinstance(values, Mapping) else None
        if architecture is not None and values is not None:
            return ConfigSection(architecture, key, values)
    found = shown(nested.get("model_type") if isinstance(nested, dict) else config.get("model_type"))
    known = f"so that no key can carry the smaller shapes; known are {listed(model_types())}"
    raise CheckpointError(
        f"config.json: nothing is known of the model_type {found}, {known}; apply keeps all shapes"
    )


# -- the new config ----------------------------------------------------------------------------------


def configure(
    config: Mapping[str, Any] | None, model: CutModel, beside: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any], tuple[ConfigChange, ...], dict[str, KeptIndices], tuple[str, ...]]:
    """The config of a checkpoint that is cut like `model`; `beside` as for `make_removal`.

    Returns the config, its changes, the kept indices of tensors that follow others, and remarks.

    Raises:
        CheckpointError: what the model's classes cannot express, line by line.
    """
    section = section_of(config)
    config = config or {}
    agreed, followers, problems = agree(section, model)
    removed = _removed_layers(section, model)
    problems += _last_layers(section, removed)
    for quantization in (values.get("quantization_config") for values in (section.values, config)):
        problems += [] if quantization is None else _quantized(model, quantization)
    refuse(dict.fromkeys(problems))
    values: dict[str, Any] = {
        spelling: value
        for key, value in {**agreed, **_derived(section, agreed)}.items()
        for spelling in section.spellings(key)
    }
    remarks: list[str] = []
    if removed:
        values |= _without_layers(section, removed)
        remarks += _lost_rules(section, values)
    reader = _KeyReader.of(section, removed, {key: section.value(key) for key in agreed})
    outside: dict[str, Any] = {}
    if reader.numbers:
        values, outside, lines = _settle_unlisted(section, config, beside, reader, values)
        remarks += lines
    written = _with_values(section.values, values)
    if section.key is not None:
        written = {**_with_values(config, outside), section.key: written}
    changes = (*_changes(section.values, values, section.prefix), *_changes(config, outside, ""))
    return written, changes, followers, tuple(remarks)


def _with_values(before: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """An object of a config with new values; keys whose new value is None are removed."""
    return {key: value for key, value in {**before, **values}.items() if values.get(key, 0) is not None}


def _changes(before: Mapping[str, Any], values: Mapping[str, Any], prefix: str) -> Iterator[ConfigChange]:
    for key, after in values.items():
        if key not in before or before[key] != after:
            yield ConfigChange(key=prefix + key, before=before.get(key), after=after)


def _lost_rules(section: ConfigSection, values: Mapping[str, Any]) -> Iterator[str]:
    """A line for each rule that no value of its key makes true for the layers that stay."""
    for key, made in section.architecture.layers.rules.items():
        for spelling in (key, f"_{key}"):
            if spelling in values and values[spelling] is None:
                text = f"it is taken out, and {made} has them"
                yield f"config.json: no {spelling} makes the layers that stay: {text}"


def check_shapes(config: Mapping[str, Any], changed: Sequence[str], shapes: Mapping[str, Shape]) -> None:
    """Check that each dimension that changed keys count has the size that the config says; CheckpointError.

    `shapes` are those of the smaller checkpoint, by new names.
    """
    section = section_of(config)
    aliases = {section.spellings(key)[0]: key for key in section.architecture.aliases}
    names = [key.rpartition(".")[2] for key in changed]
    keys = {aliases.get(name, name) for name in names}
    dims_of = dims_lookup(section)
    problems = []
    for name, shape in shapes.items():
        found = dims_of(name)
        for dim, parts in found.dims.items() if found is not None else ():
            if not keys.isdisjoint(part.key for part in parts):
                wanted = sum(section.value(part.key) * section.unit(part) for part in parts)
                if shape[dim] != wanted:
                    text = f"{shape[dim]} along dimension {dim}, config.json says {wanted}"
                    problems.append(f"{name} would have {text}")
    refuse(problems)


def _derived(section: ConfigSection, values: Mapping[str, int]) -> dict[str, int]:
    """Keys that the class would derive from changed ones, and keys that must equal changed ones."""
    heads = section.architecture.heads
    if heads is None or not {heads.key, heads.groups} & values.keys():
        return {}
    derived = {key: section.number(text) for key, text in heads.pinned.items()}
    if heads.groups is not None and heads.groups not in values:
        derived[heads.groups] = section.value(heads.groups)
    return derived | {key: values[of] for key, of in heads.alike.items() if of in values}


def _quantized(model: CutModel, quantization: object) -> list[str]:
    """Problems of quantized weights: scales belong to whole modules, which the config may name by number."""
    cut = [name for name, kept in model.kept.items() if kept.cut and name not in model.gone]
    if cut:
        text = "is quantized, and its scales are those of the whole: dequantize the checkpoint first"
        return [f"{cut[0]} {text}"]
    named = next((text for text in _texts(quantization) if _NUMBERED_MODULE.search(text)), None)
    if model.removed.numbers and named is not None:
        number = "by a number, which may change: dequantize the checkpoint first"
        return [f"config.json: quantization_config names {shown(named)} {number}"]
    return []


def _texts(value: object, depth: int = 8) -> Iterator[str]:
    """All strings in a JSON value, down to this depth."""
    if isinstance(value, str):
        yield value
    elif depth and isinstance(value, dict | list):
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _texts(part, depth - 1)


# -- layers ------------------------------------------------------------------------------------------


def _removed_layers(section: ConfigSection, model: CutModel) -> tuple[int, ...]:
    """The removed layers of the list that the config counts; CheckpointError if several lists lose some."""
    lists = layer_lists(section, model)
    losing = [before for before in model.removed.numbers if before in lists]
    if not losing:
        return ()
    key, first = section.architecture.layers.members.key, losing[0]
    count = section.value(key)
    for before in losing:
        if lists[before] < count:
            refuse([f"config.json: {key} is {shown(count)}, and {before} has {lists[before]} members"])
    others = [before for before, members in lists.items() if members >= count and before != first]
    if len(losing) > 1:
        refuse([f"{losing[1]} loses layers, as another list of layers does: config.json counts one"])
    if others:
        refuse([f"{first} loses layers, and config.json counts those of {others[0]} by the same number"])
    return model.removed.numbers[first]


def _last_layers(section: ConfigSection, removed: Sequence[int]) -> Iterator[str]:
    """Why these layers cannot be removed."""
    layers = section.architecture.layers
    if removed:
        reasons = [why for key, why in layers.refused.items() if section.values.get(key)]
        yield from (f"layers cannot go: {why}" for why in reasons)
        count = section.value(layers.members.key)
        if sum(number < count for number in removed) >= count:
            yield f"config.json: {layers.members.key} would be 0: nothing is left"


def _without_layers(section: ConfigSection, removed: Sequence[int]) -> dict[str, Any]:
    """New values of all keys that refer to layers by number; None for a key to remove."""
    layers = section.architecture.layers
    number = section.value(layers.members.key)
    gone = frozenset(removed)
    stays = [layer for layer in range(number) if layer not in gone]
    values: dict[str, Any] = {layers.members.key: len(stays)}
    for key in layers.by_place:
        entries = _by_place(section, key, number)
        if entries is not None:
            values[key] = [entries[layer] for layer in stays]
    for key in layers.by_number:
        chosen = _by_number(section, key, number)
        values[key] = [place for place, layer in enumerate(stays) if layer in chosen]
        values |= layers.settled
    if layers.beyond and layers.beyond in section.values:
        behind = sum(layer >= number for layer in removed)
        values[layers.beyond] = max(0, section.value(layers.beyond) - behind)
    for key, usual in layers.up_to.items():
        first = section.value(key) if key in section.values else usual
        values[key] = sum(layer < first for layer in stays)
    for key, made in layers.rules.items():
        for spelling in {key, f"_{key}"} & section.values.keys():  # transformers keeps some as private names
            value = _settled(section, key, section.values[spelling], (made, values))
            if value != section.values[spelling]:
                values[spelling] = value
    return values


def _settled(section: ConfigSection, key: str, found: object, lists: tuple[str, Mapping[str, Any]]) -> object:
    """A value with which a rule derives the list for the layers that stay; None if no value does.

    The `found` value stays where it does, and where there is no list.
    """
    made, values = lists
    layers = section.architecture.layers
    number = values[layers.members.key]

    def makes(value: object) -> list[object]:
        ruled = replace(section, values={**section.values, key: value})
        return [ruled.of_layer(layers.implied[made], layer) for layer in range(number)]

    wanted = values.get(made)
    if made in layers.by_number and wanted is not None:
        wanted = [layer in wanted for layer in range(number)]
    if wanted is None or type(found) is not int or makes(found) == wanted:
        return found
    # 0 comes last: it is no distance between layers, but may be a number of first layers.
    return next((value for value in (*range(1, number + 2), 0) if makes(value) == wanted), None)


def _by_place(section: ConfigSection, key: str, number: int) -> Sequence[object] | None:
    """A list with an entry for each layer, from the config or as the class derives it.

    None where there is no list, and where the class derives the same for every layer, as for fewer layers.
    """
    entries = section.values.get(key)
    if entries:
        if not isinstance(entries, list) or len(entries) < number:
            raise CheckpointError(f"config.json: {key} has no entry for each of {number} layers")
        return entries
    implied = section.architecture.layers.implied.get(key)
    if implied is None:
        return None
    made = [section.of_layer(implied, layer) for layer in range(number)]
    return made if any(entry != made[0] for entry in made) else None


def _by_number(section: ConfigSection, key: str, number: int) -> set[int]:
    """The layers in a list of numbers, or those that the class puts into it."""
    layers = section.architecture.layers
    entries, implied = section.values.get(key), layers.implied[key]
    named = {layer for layer in range(number) if section.of_layer(implied, layer)}
    if entries is None:
        return named
    if not isinstance(entries, list) or not all(type(entry) is int for entry in entries):
        raise CheckpointError(f"config.json: {key} is {shown(entries)}, wanted a list of numbers of layers")
    return {*entries, *named} if layers.settled else set(entries)
