"""Layering: what a config says of layers by their number, when some of them go.

Owns lists with an entry for each layer, lists of numbers, and rules that the class applies in their place, as
the table of families has them; what it has not is unlisted.py's part. Called by configuring.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sparseprune.errors import CheckpointError
from sparseprune.removal.claiming import layer_lists
from sparseprune.removal.refusing import refuse
from sparseprune.spec.problems import shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sparseprune.removal.claiming import Dense
    from sparseprune.removal.sections import Section


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
