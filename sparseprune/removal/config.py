"""The config after a removal: new counts, lists by layer, nested configs, and keys that the table lacks.

Owns what a config says of layers by their number. Reads no files. Called by shrink.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sparseprune.errors import CheckpointError
from sparseprune.removal.architectures import OTHER_TOWERS, architecture_of, model_types
from sparseprune.removal.dim_constraints import agree, dims_lookup, layer_lists, refuse
from sparseprune.removal.unlisted_keys import Changed, settle_unlisted
from sparseprune.spec.expressions import Environment, Expression, ExpressionError, Names, parse_expression
from sparseprune.spec.problems import listed, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sparseprune.engine.grids import Shape
    from sparseprune.removal.architectures import Architecture, DimPart
    from sparseprune.removal.dim_constraints import CutModel
    from sparseprune.removal.slices import KeptIndices
    from sparseprune.spec import Captures

_TEXT = "text_config"
_NUMBERED_MODULE = re.compile(r"(?:^|\.)[0-9]+(?:\.|$)")


@dataclass(frozen=True, slots=True)
class ConfigSection:
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
            return Names(Environment({}, self.values), captures).value(_parsed(text))
        except ExpressionError as error:
            raise CheckpointError(f"config.json: {error}") from error


@lru_cache(maxsize=256)
def _parsed(text: str) -> Expression:
    return parse_expression(text)


def section_of(config: Mapping[str, Any] | None) -> ConfigSection:
    """The section of a config that counts layers and their parts; CheckpointError for unknown models."""
    if config is None:
        raise CheckpointError(
            "there is no config.json, which has to say what becomes smaller; give the directory of a "
            "checkpoint that has one, or use apply, which keeps all shapes"
        )
    nested = config.get(_TEXT)
    for key, values in ((None, config), (_TEXT, nested)):
        architecture = architecture_of(values.get("model_type")) if isinstance(values, Mapping) else None
        if architecture is not None and values is not None:
            return ConfigSection(architecture, key, values)
    found = shown(nested.get("model_type") if isinstance(nested, dict) else config.get("model_type"))
    raise CheckpointError(
        f"config.json: nothing is known of the model_type {found}, so that no key can carry the smaller "
        f"shapes; known are {listed(model_types())}; apply keeps all shapes"
    )


# -- the new config ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """A changed key of config.json, dotted where it is nested; None stands for an absent key."""

    key: str
    before: object
    after: object


@dataclass(frozen=True, slots=True)
class Configured:
    """The config of the smaller model, its changes, and kept indices of tensors that follow others."""

    config: Mapping[str, Any]
    changes: tuple[Change, ...]
    followers: Mapping[str, KeptIndices]
    remarks: tuple[str, ...]


def configure(
    config: Mapping[str, Any] | None, model: CutModel, beside: Mapping[str, Mapping[str, Any]]
) -> Configured:
    """The config of a checkpoint that is cut like `model`; `beside` as for `make_removal`.

    Raises:
        CheckpointError: what the model's classes cannot express, line by line.
    """
    section = section_of(config)
    config = config or {}
    agreement = agree(section, model)
    removed, problems = _removed_layers(section, model)
    for quantization in (values.get("quantization_config") for values in (section.values, config)):
        problems += [] if quantization is None else _quantized(model, quantization)
    refuse(dict.fromkeys([*agreement.problems, *problems]))
    agreed = {**agreement.values, **_derived(section, agreement.values)}
    values: dict[str, Any] = {
        spelling: value for key, value in agreed.items() for spelling in section.spellings(key)
    }
    remarks: list[str] = []
    if removed:
        values |= _without_layers(section, removed)
        remarks += _lost_rules(section, values)
    numbers = {key: section.value(key) for key in agreement.values}
    unlisted = settle_unlisted(section, config, beside, Changed(removed, values, numbers))
    remarks += unlisted.remarks
    values |= unlisted.values
    written = _with_values(section.values, values)
    if section.key is not None:
        written = {**_with_values(config, unlisted.outside), section.key: written}
    changes = (*_changes(section.values, values, section.prefix), *_changes(config, unlisted.outside, ""))
    return Configured(written, changes, agreement.followers, tuple(remarks))


def _with_values(before: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """An object of a config with new values; keys whose new value is None are removed."""
    return {key: value for key, value in {**before, **values}.items() if values.get(key, 0) is not None}


def _changes(before: Mapping[str, Any], values: Mapping[str, Any], prefix: str) -> Iterator[Change]:
    for key, after in values.items():
        if key not in before or before[key] != after:
            yield Change(prefix + key, before.get(key), after)


def _lost_rules(section: ConfigSection, values: Mapping[str, Any]) -> Iterator[str]:
    """A line for each rule that no value of its key makes true for the layers that stay."""
    for key, made in section.architecture.layers.rules.items():
        for spelling in (key, f"_{key}"):
            if spelling in values and values[spelling] is None:
                yield (
                    f"config.json: no {spelling} makes the layers that stay: it is taken out, and {made} has "
                    "them"
                )


def check_shapes(config: Mapping[str, Any], changed: Sequence[str], shapes: Mapping[str, Shape]) -> None:
    """Check that each dimension that changed keys count has the size that the config says; CheckpointError.

    `shapes` are those of the smaller checkpoint, by new names.
    """
    section = section_of(config)
    aliases = {section.spellings(key)[0]: key for key in section.architecture.aliases}
    keys = {key.rpartition(".")[2] for key in changed}
    refuse(_unfit(section, {aliases.get(key, key) for key in keys}, shapes))


def _unfit(section: ConfigSection, keys: set[str], shapes: Mapping[str, Shape]) -> Iterator[str]:
    dims_of = dims_lookup(section)
    for name, shape in shapes.items():
        found = dims_of(name)
        if found is None or keys.isdisjoint(found.keys):
            continue
        for dim, parts in found.dims.items():
            if keys.isdisjoint(part.key for part in parts):
                continue
            wanted = sum(section.value(part.key) * section.unit(part) for part in parts)
            if shape[dim] != wanted:
                yield f"{name} would have {shape[dim]} along dimension {dim}, config.json says {wanted}"


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
        return [
            f"{cut[0]} is quantized, and its scales are those of the whole: dequantize the checkpoint first"
        ]
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


def _removed_layers(section: ConfigSection, model: CutModel) -> tuple[tuple[int, ...], list[str]]:
    """The numbers of the removed layers, and the problems."""
    layers = section.architecture.layers
    removed = _losing_layers(section, model)
    problems = []
    if removed:
        problems += [
            f"layers cannot go: {why}" for key, why in layers.refused.items() if section.values.get(key)
        ]
        count = section.value(layers.members.key)
        if sum(number < count for number in removed) >= count:
            problems.append(f"config.json: {layers.members.key} would be 0: nothing is left")
    return removed, problems


def _losing_layers(section: ConfigSection, model: CutModel) -> tuple[int, ...]:
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
