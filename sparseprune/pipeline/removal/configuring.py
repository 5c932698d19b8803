"""Configuring: the config.json of what is left, and every shape checked against it.

Owns what is written: keys of widths and heads, lists with an entry for each layer. Changes nothing that it is
given. Called by removing.py.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparseprune.errors import CheckpointError
from sparseprune.pipeline.removal.claiming import layer_lists, users
from sparseprune.pipeline.removal.sections import Section, section_of
from sparseprune.pipeline.removal.widths import agree, refuse
from sparseprune.spec.problems import shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sparseprune.engine.grids import Shape
    from sparseprune.pipeline.removal.claiming import Dense
    from sparseprune.pipeline.removal.slices import Kept


@dataclass(frozen=True, slots=True)
class Change:
    """A key of config.json (dotted where it is nested), what it was, None where it was not there, and is."""

    key: str
    before: object
    after: object


@dataclass(frozen=True, slots=True)
class Configured:
    """A config for what is left, its changes, and what tensors keep that follow others."""

    config: Mapping[str, Any]
    changes: tuple[Change, ...]
    followers: Mapping[str, Kept]


def configure(config: Mapping[str, Any] | None, dense: Dense) -> Configured:
    """The config of a checkpoint that keeps what `dense` says.

    Raises:
        CheckpointError: what the model's classes cannot express, line by line.
    """
    section = section_of(config)
    agreement = agree(section, dense)
    removed, problems = _removed_layers(section, dense)
    if any(values.get("quantization_config") is not None for values in (section.values, config or {})):
        problems += _quantized(dense)
    refuse([*agreement.problems, *problems])
    agreed = {**agreement.values, **_derived(section, agreement.values)}
    values: dict[str, Any] = {
        spelling: value for key, value in agreed.items() for spelling in section.spellings(key)
    }
    if removed:
        values |= _with_layers(section, removed)
    written = deepcopy(dict(config or {}))
    target = written if section.key is None else written[section.key]
    target.update(values)
    prefix = "" if section.key is None else f"{section.key}."
    changes = (
        Change(prefix + key, section.values.get(key), after)
        for key, after in values.items()
        if key not in section.values or section.values[key] != after
    )
    return Configured(written, tuple(changes), agreement.followers)


def check_shapes(config: Mapping[str, Any], changed: Sequence[str], shapes: Mapping[str, Shape]) -> None:
    """Every dimension that changed keys count has the size that the config says; CheckpointError.

    `shapes` are those of what is left, by the names that it has now.
    """
    section = section_of(config)
    aliases = {section.spelled(key): key for key in section.family.aliases}
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
    pinned = {key: section.number(text) for key, text in heads.pinned.items()}
    groups = {} if heads.groups is None else {heads.groups: section.value(heads.groups)}
    alike = {key: values[of] for key, of in heads.alike.items() if of in values}
    return {**groups, **{key: values[key] for key in groups if key in values}, **pinned, **alike}


def _removed_layers(section: Section, dense: Dense) -> tuple[tuple[int, ...], list[str]]:
    """The numbers of the layers that go, and what is in the way."""
    layers = section.family.layers
    removed = _losing_layers(section, dense) if dense.vanished.numbers else ()
    problems = []
    if removed:
        refused = {**layers.refused, **section.family.refused}
        problems += [
            f"layers cannot go: {why}"
            for key, why in refused.items()
            if key == layers.members.key or (key in layers.refused and section.values.get(key))
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


def _with_layers(section: Section, removed: Sequence[int]) -> dict[str, Any]:
    """What the config says of layers by their number, without those that go."""
    layers = section.family.layers
    number = section.value(layers.members.key)
    stays = [layer for layer in range(number) if layer not in set(removed)]
    values: dict[str, Any] = {layers.members.key: len(stays)}
    for key in layers.by_place:
        entries = _by_place(section, key, number)
        if entries is not None:
            values[key] = [entries[layer] for layer in stays]
    for key in layers.by_number:
        chosen = _by_number(section, key, number)
        values[key] = [place for place, layer in enumerate(stays) if layer in chosen]
        values |= layers.settled
    for key, usual in layers.up_to.items():
        first = section.value(key) if key in section.values else usual
        values[key] = sum(layer < first for layer in stays)
    return values


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


def _quantized(dense: Dense) -> list[str]:
    """Scales of quantized weights go with whole modules, not with a part of one."""
    cut = [name for name, kept in dense.kept.items() if kept.cut and name not in dense.gone]
    if not cut:
        return []
    return [f"{cut[0]} is quantized, and its scales are those of the whole: dequantize the checkpoint first"]
