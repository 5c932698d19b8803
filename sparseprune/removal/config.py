"""The config after removal: counts, per-layer lists, nested configs, keys that the table does not list."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sparseprune.errors import CheckpointError
from sparseprune.removal.architectures import family_of, model_types
from sparseprune.removal.dim_constraints import agree, layer_lists, refuse, users
from sparseprune.spec.expressions import Environment, Expression, ExpressionError, Names, parse_expression
from sparseprune.spec.problems import listed, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sparseprune.engine.grids import Shape
    from sparseprune.removal.architectures import Family, Part
    from sparseprune.removal.dim_constraints import Dense
    from sparseprune.removal.slices import KeptIndices
    from sparseprune.spec import Captures


_TEXT = "text_config"
OTHER_TOWERS = re.compile("vision|visual|audio|image|speech|resampler|perceiver|connector|projector|qformer")


@dataclass(frozen=True, slots=True)
class Section:
    """A family, and the object of a config that its keys stand in: at the top, or under `key`."""

    family: Family
    key: str | None
    values: Mapping[str, Any]

    def reaches(self, name: str) -> bool:
        """Whether a tensor may be one of its layers': towers of other kinds have configs of their own."""
        return self.key is None or OTHER_TOWERS.search(name) is None

    def spellings(self, key: str) -> tuple[str, ...]:
        """All spellings of a key that this config has: of two the class takes either."""
        alias = self.family.aliases.get(key)
        found = tuple(each for each in (key, alias) if each is not None and each in self.values)
        return found or (key,)

    def value(self, key: str) -> int:
        """What a key comes to; CheckpointError where it is no number."""
        return self.number(self.family.values.get(key, f"config.{self.spellings(key)[0]}"))

    def unit(self, part: Part) -> int:
        """How many indices one unit of a part has; CheckpointError where that is no number from 1 on."""
        return self.number(part.unit, least=1)

    def number(self, text: str, least: int = 0) -> int:
        """What an expression comes to; CheckpointError where that is no number, or less than `least`."""
        found = self.worth(text)
        if isinstance(found, bool) or not isinstance(found, int):
            raise CheckpointError(f"config.json: {text} comes to {shown(found)}, wanted an integer")
        if found < least:
            raise CheckpointError(f"config.json: {text} comes to {shown(found)}, wanted {least} or more")
        return found

    def of_layer(self, text: str, layer: int) -> object:
        """The value of an expression over the number of a layer; CheckpointError where it has none."""
        return self.worth(text, (("layer", layer),))

    def worth(self, text: str, captures: Captures = ()) -> object:
        """The value of an expression; CheckpointError where it has none."""
        try:
            return Names(Environment({}, self.values), captures).value(_parsed(text))
        except ExpressionError as error:
            raise CheckpointError(f"config.json: {error}") from error


def section_of(config: Mapping[str, Any] | None) -> Section:
    """The part of a config that counts layers and what they are made of; CheckpointError for unknown ones."""
    if config is None:
        raise CheckpointError(
            "there is no config.json, which has to say what becomes smaller; give the directory of a "
            "checkpoint that has one, or use apply, which keeps all shapes"
        )
    family = family_of(config.get("model_type"))
    if family is not None:
        return Section(family, None, config)
    nested = config.get(_TEXT)
    if isinstance(nested, dict):
        family = family_of(nested.get("model_type"))
        if family is not None:
            return Section(family, _TEXT, nested)
    found = shown(nested.get("model_type") if isinstance(nested, dict) else config.get("model_type"))
    raise CheckpointError(
        f"config.json: nothing is known of the model_type {found}, so that no key can carry the smaller "
        f"shapes; known are {listed(model_types())}; apply keeps all shapes"
    )


@lru_cache(maxsize=256)
def _parsed(text: str) -> Expression:
    return parse_expression(text)


def removed_layers(section: Section, dense: Dense) -> tuple[tuple[int, ...], list[str]]:
    """The numbers of the layers that go, and what is in the way."""
    layers = section.family.layers
    removed = _losing_layers(section, dense)
    problems = []
    if removed:
        problems += [
            f"layers cannot go: {why}" for key, why in layers.refused.items() if section.values.get(key)
        ]
        count = section.value(layers.members.key)
        if sum(number < count for number in removed) >= count:
            problems.append(f"config.json: {layers.members.key} would be 0: nothing is left")
    return removed, problems


def _losing_layers(section: Section, dense: Dense) -> tuple[int, ...]:
    """The layers that go of the one list that the config counts, by number; CheckpointError for several."""
    lists = layer_lists(section, dense)
    losing = [before for before in dense.vanished.numbers if before in lists]
    if not losing:
        return ()
    key, first = section.family.layers.members.key, losing[0]
    count = section.value(key)
    for before in losing:
        if lists[before] < count:
            refuse([f"config.json: {key} is {shown(count)}, and {before} has {lists[before]} members"])
    others = [before for before, members in lists.items() if members >= count and before != first]
    if len(losing) > 1:
        refuse([f"{losing[1]} loses layers, as another list of layers does: config.json counts one"])
    if others:
        refuse([f"{first} loses layers, and config.json counts those of {others[0]} by the same number"])
    return dense.vanished.numbers[first]


def without_layers(section: Section, removed: Sequence[int]) -> dict[str, Any]:
    """What the config says of layers by their number, without those that go; None for a key that goes."""
    layers = section.family.layers
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


def _settled(section: Section, key: str, found: object, lists: tuple[str, Mapping[str, Any]]) -> object:
    """A value with which a rule makes the list that was written, or the same as before where none was.

    The one that was `found` if it does, None if no value does.
    """
    made, values = lists
    layers = section.family.layers
    number = values[layers.members.key]

    def makes(value: object) -> list[object]:
        ruled = replace(section, values={**section.values, key: value})
        return [ruled.of_layer(layers.implied[made], layer) for layer in range(number)]

    wanted = values.get(made)
    if made in layers.by_number and wanted is not None:
        wanted = [layer in wanted for layer in range(number)]
    if wanted is None or type(found) is not int or makes(found) == wanted:
        return found
    # 0 comes last: of a distance between layers it is none, of the first ones that are meant it may be.
    return next((value for value in (*range(1, number + 2), 0) if makes(value) == wanted), None)


def _by_place(section: Section, key: str, number: int) -> Sequence[object] | None:
    """A list with an entry for each layer, as the config has it or the class makes it; None for none.

    What the class makes for every layer alike it makes for fewer ones too.
    """
    entries = section.values.get(key)
    if entries:
        if not isinstance(entries, list) or len(entries) < number:
            raise CheckpointError(f"config.json: {key} has no entry for each of {number} layers")
        return entries
    implied = section.family.layers.implied.get(key)
    if implied is None:
        return None
    made = [section.of_layer(implied, layer) for layer in range(number)]
    return made if any(entry != made[0] for entry in made) else None


def _by_number(section: Section, key: str, number: int) -> set[int]:
    """The layers that a list names, by their number, or that the class takes for named."""
    layers = section.family.layers
    entries, implied = section.values.get(key), layers.implied[key]
    named = {layer for layer in range(number) if section.of_layer(implied, layer)}
    if entries is None:
        return named
    if not isinstance(entries, list) or not all(type(entry) is int for entry in entries):
        raise CheckpointError(f"config.json: {key} is {shown(entries)}, wanted a list of numbers of layers")
    return {*entries, *named} if layers.settled else set(entries)


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


_MODULE = re.compile(r"(?:^|\.)[0-9]+(?:\.|$)")  # a name that has a number in it


@dataclass(frozen=True, slots=True)
class Change:
    """A key of config.json, dotted where it is nested: what it was and is, None where there is none."""

    key: str
    before: object
    after: object


@dataclass(frozen=True, slots=True)
class Configured:
    """A config for what is left, its changes, and what tensors keep that follow others."""

    config: Mapping[str, Any]
    changes: tuple[Change, ...]
    followers: Mapping[str, KeptIndices]
    remarks: tuple[str, ...]


def configure(
    config: Mapping[str, Any] | None,
    dense: Dense,
    beside: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> Configured:
    """The config of a checkpoint that keeps what `dense` says; `beside` as for `make_removal`.

    Raises:
        CheckpointError: what the model's classes cannot express, line by line.
    """
    section = section_of(config)
    agreement = agree(section, dense)
    removed, problems = removed_layers(section, dense)
    for quantization in (values.get("quantization_config") for values in (section.values, config or {})):
        problems += [] if quantization is None else _quantized(dense, quantization)
    refuse(dict.fromkeys([*agreement.problems, *problems]))
    agreed = {**agreement.values, **_derived(section, agreement.values)}
    values: dict[str, Any] = {
        spelling: value for key, value in agreed.items() for spelling in section.spellings(key)
    }
    remarks: list[str] = []
    if removed:
        values |= without_layers(section, removed)
        remarks += _taken_out(section, values)
    resized = {key: section.value(key) for key in agreement.values}
    unlisted = settle_unlisted(section, config or {}, beside, Gone(removed, values, resized))
    values |= unlisted.values
    written = _with_values(section.values, values)
    if section.key is not None:
        written = {**_with_values(config or {}, unlisted.outside), section.key: written}
    prefix = "" if section.key is None else f"{section.key}."
    changes = [
        *_changes(section.values, values, prefix),
        *_changes(config or {}, unlisted.outside, ""),
    ]
    return Configured(written, tuple(changes), agreement.followers, (*remarks, *unlisted.remarks))


def _with_values(before: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """An object of a config with other values; without the keys whose value is None."""
    return {key: value for key, value in {**before, **values}.items() if values.get(key, 0) is not None}


def _changes(before: Mapping[str, Any], values: Mapping[str, Any], prefix: str) -> Iterator[Change]:
    for key, after in values.items():
        if key not in before or before[key] != after:
            yield Change(prefix + key, before.get(key), after)


def _taken_out(section: Section, values: Mapping[str, Any]) -> Iterator[str]:
    """A line for each rule that no value of makes the layers that stay."""
    for key, made in section.family.layers.rules.items():
        for spelling in (key, f"_{key}"):
            if spelling in values and values[spelling] is None:
                yield (
                    f"config.json: no {spelling} makes the layers that stay: it is taken out, and {made} has "
                    "them"
                )


def check_shapes(config: Mapping[str, Any], changed: Sequence[str], shapes: Mapping[str, Shape]) -> None:
    """Every dimension that changed keys count has the size that the config says; CheckpointError.

    `shapes` are those of what is left, by the names that it has now.
    """
    section = section_of(config)
    aliases = {section.spellings(key)[0]: key for key in section.family.aliases}
    keys = {key.rpartition(".")[2] for key in changed}
    refuse(_unfit(section, {aliases.get(key, key) for key in keys}, shapes))


def _unfit(section: Section, keys: set[str], shapes: Mapping[str, Shape]) -> Iterator[str]:
    use_of = users(section)
    for name, shape in shapes.items():
        found = use_of(name)
        if found is None or keys.isdisjoint(found.keys):
            continue
        for dim, parts in found.dims.items():
            if keys.isdisjoint(part.key for part in parts):
                continue
            wanted = sum(section.value(part.key) * section.unit(part) for part in parts)
            if shape[dim] != wanted:
                yield f"{name} would have {shape[dim]} along dimension {dim}, config.json says {wanted}"


def _derived(section: Section, values: Mapping[str, int]) -> dict[str, int]:
    """Keys that the class would derive from others which change, and such as are the same."""
    heads = section.family.heads
    if heads is None or not {heads.key, heads.groups} & values.keys():
        return {}
    derived = {key: section.number(text) for key, text in heads.pinned.items()}
    if heads.groups is not None and heads.groups not in values:
        derived[heads.groups] = section.value(heads.groups)
    return derived | {key: values[of] for key, of in heads.alike.items() if of in values}


def _quantized(dense: Dense, quantization: object) -> list[str]:
    """Scales of quantized weights go with whole modules, whose numbers a quantizer may have written down."""
    cut = [name for name, kept in dense.kept.items() if kept.cut and name not in dense.gone]
    if cut:
        return [
            f"{cut[0]} is quantized, and its scales are those of the whole: dequantize the checkpoint first"
        ]
    named = next((text for text in _texts(quantization) if _MODULE.search(text)), None)
    if dense.vanished.numbers and named is not None:
        number = "by a number, which may change: dequantize the checkpoint first"
        return [f"config.json: quantization_config names {shown(named)} {number}"]
    return []


def _texts(value: object, depth: int = 8) -> Iterator[str]:
    """All texts in an object of JSON that lie so deep in it or less."""
    if isinstance(value, str):
        yield value
    elif depth and isinstance(value, dict | list):
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _texts(part, depth - 1)
