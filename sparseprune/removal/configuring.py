"""Configuring: the config.json of what is left, and every shape checked against it.

Owns what is written: keys of widths and heads, and what layering.py and unlisted.py say. Changes nothing
that it is given. Called by removing.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sparseprune.removal.claiming import users
from sparseprune.removal.layering import removed_layers, without_layers
from sparseprune.removal.refusing import refuse
from sparseprune.removal.sections import Section, section_of
from sparseprune.removal.unlisted import Gone, settle_unlisted
from sparseprune.removal.widths import agree
from sparseprune.spec.problems import shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sparseprune.engine.grids import Shape
    from sparseprune.removal.claiming import Dense
    from sparseprune.removal.slices import Kept

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
    followers: Mapping[str, Kept]
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
