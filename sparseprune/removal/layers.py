"""Lists of layers that lose members, and what a config says of layers by their number.

Owns which key counts a list, and the new values of lists, objects and rules that refer to layers. Called by
config and dim_constraints.
"""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import combinations, product
from math import sqrt
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from sparseprune.errors import CheckpointError
from sparseprune.removal.architectures import BY_PLACE, LAYER_COUNTS, SIDED_LAYERS, SIDES, TAPS
from sparseprune.removal.preview import numbered
from sparseprune.removal.sections import first_of, path_shown, value_at
from sparseprune.spec.naming import LAYER_LISTS, NO_LAYERS, OTHER_TOWERS
from sparseprune.spec.problems import listed, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sparseprune.removal.preview import RemovedMembers
    from sparseprune.removal.sections import Path, Section, Sections

    Shapes = Mapping[str, tuple[int, ...]]

_STRICT = ("layer_types", "mlp_layer_types")  # lists that no class takes with another length
_STAGE = re.compile(r"\.([0-9]+)\.")


class Stack(Struct, frozen=True):
    """A list of layers: its name, section and the key that counts `count` of its `members`; those `gone`."""

    name: str
    section: Section
    key: Path
    count: int
    members: int
    gone: tuple[int, ...]

    @property
    def stays(self) -> list[int]:
        """The layers that the key counts and that stay."""
        gone = frozenset(self.gone)
        return [layer for layer in range(self.count) if layer not in gone]

    @property
    def is_stage(self) -> bool:
        """Whether it is one of several stages, each with an entry in `depths`."""
        return type(self.key[-1]) is int

    @property
    def side(self) -> str:
        """Whether it is of an encoder or a decoder; empty where its name does not say."""
        return next((side for side in SIDES if side in self.name), "")


class Stacks(Struct, frozen=True):
    """The lists of layers that lose members, by name, and what is in the way."""

    of: Mapping[str, Stack]
    problems: tuple[str, ...] = ()

    @staticmethod
    def find(shapes: Shapes, removed: RemovedMembers, sections: Sections) -> Stacks:
        """The lists of a checkpoint that lose layers; CheckpointError for unknown models."""
        losing = {before: gone for before, gone in removed.numbers.items() if _is_list(before, sections)}
        if not losing:
            return Stacks({})
        members: dict[str, set[int]] = defaultdict(set)
        for name in shapes:
            for before, number, _ in numbered(name):
                if _is_list(before, sections):
                    members[before].add(number)
        stacks: dict[str, Stack] = {}
        problems: list[str] = []
        for before, gone in losing.items():
            stack = _stack(before, sections.at(before), len(members[before]), gone)
            stacks[before] = stack
            problems += [*_refused(stack), *_tapped(stack, sections), *_fed(stack, sections)]
        problems += _twins(stacks, {name: len(numbers) for name, numbers in members.items()}, sections)
        return Stacks(stacks, tuple(problems))


def _is_list(before: str, sections: Sections) -> bool:
    """Whether a name is that of a list of layers, or of a stage in one whose layers have no other name."""
    if NO_LAYERS.search(before):
        return False
    parent, _, last = before.rpartition(".")
    if last.isdecimal() and LAYER_LISTS.search(parent.rpartition(".")[2]):
        return isinstance(sections.even_unknown(sections.path_at(before)).value("depths"), list)
    return LAYER_LISTS.search(last) is not None


def _stack(before: str, section: Section, members: int, gone: tuple[int, ...]) -> Stack:
    """A list of layers with the key that counts it."""
    side = next((side for side in SIDES if side in before), "")
    sided = tuple(key.format(side=side) for key in SIDED_LAYERS) if side else ()
    stage = _STAGE.search(f".{before}.")
    depths = section.value("depths")
    if stage is not None and isinstance(depths, list) and int(stage[1]) < len(depths):
        return Stack(before, section, section.path_of("depths", int(stage[1])), members, members, gone)
    told = {key: value for key in (*sided, *LAYER_COUNTS) if (value := section.value(key)) is not None}
    found = {key: value for key, value in told.items() if type(value) is int}
    if told and not found:
        first, value = next(iter(told.items()))
        raise CheckpointError(f"config.json: {section.prefix}{first} is {shown(value)}, wanted an integer")
    key = next((key for key, value in found.items() if value == members), None)
    if key is None:
        key = next(iter(found), LAYER_COUNTS[0])
    return Stack(before, section, section.path_of(key), found.get(key, members), members, gone)


def _refused(stack: Stack) -> Iterator[str]:
    """Why these layers cannot be removed."""
    row, section = stack.section.architecture, stack.section
    if "layers" in row.refused:
        yield f"layers of {stack.name} cannot go: {row.refused['layers']}"
        return
    if stack.members < stack.count:
        key = path_shown(stack.key)
        yield f"config.json: {key} is {stack.count}, and {stack.name} has {stack.members} members"
        return
    yield from (
        f"layers of {stack.name} cannot go: {why}"
        for key, why in row.layers.refused.items()
        if section.values.get(key)
    )
    if not stack.stays:
        yield f"config.json: {path_shown(stack.key)} would be 0: nothing is left"
        return
    yield from _unfit_types(stack)
    yield from _at_fault(stack)


def _tapped(stack: Stack, sections: Sections) -> Iterator[str]:
    """Keys beside a tower's config that name one of its layers."""
    for key in TAPS if stack.section.path and "vision" in str(stack.section.path[-1]) else ():
        value = value_at(sections.config, (*stack.section.path[:-1], key))
        if value not in (None, -1):
            why = f"{key} {shown(value)} names the layer whose output is used"
            yield f"layers of {stack.name} cannot go: {why}"


def _unfit_types(stack: Stack) -> Iterator[str]:
    """Lists of kinds of layers in which one is missing that the class needs."""
    section, layers = stack.section, stack.section.architecture.layers
    for key, needed in layers.needs.items():
        entries = _told(stack, key)
        left = [] if entries is None else [entries[layer] for layer in stack.stays]
        if entries is not None and needed in entries and needed not in left:
            name = listed(layers.kinds.get(key, (key,)))
            yield f"layers of {stack.name} cannot go: no layer of {name} {shown(needed)} would be left"
    for key, needed in layers.last.items():
        entries, last = _by_place(section, key, stack.count), stack.stays[-1]
        if entries is not None and entries[last] != needed:
            wanted = f"and the class makes the last {shown(needed)}"
            yield f"layers of {stack.name} cannot go: layer {last} would be the last, {wanted}"
    for key in layers.needs_any:
        named = _by_number(section, key, stack.count)
        if named and named.isdisjoint(stack.stays):
            yield f"layers of {stack.name} cannot go: no layer of {key} would be left"


def _told(stack: Stack, key: str) -> Sequence[object] | None:
    """What a list, a cycle or an expression says of each layer; None where nothing tells them apart."""
    section, layers = stack.section, stack.section.architecture.layers
    if key in layers.kinds:
        return list(_kinds(stack, key, {}, stack.count))
    if key in layers.cycled:
        cycle = _cycle(section, key)
        return [cycle[layer % len(cycle)] for layer in range(stack.count)]
    return _by_place(section, key, stack.count)


def _fed(stack: Stack, sections: Sections) -> Iterator[str]:
    """The first layers of a text model, to each of which a tower adds something."""
    feeding = stack.section.architecture.layers.feeding
    if not feeding or not stack.section.path:
        return
    path = (*stack.section.path[:-1], *feeding.split("."))
    entries = value_at(sections.config, path)
    if not isinstance(entries, list):
        found = f"config.json: {path_shown(path)} is {shown(entries)}"
        yield f"{found}, wanted a list: its length says which layers of {stack.name} are fed by it"
    elif first := [layer for layer in stack.gone if layer < len(entries)]:
        why = f"the first {len(entries)} take what {path_shown(path)} sends"
        yield f"layers of {stack.name} cannot go: {why}: keep {_listed(first)}"


def _at_fault(stack: Stack) -> Iterator[str]:
    """Layers that have to stay, and those whose kind no key can say any more."""
    section, layers = stack.section, stack.section.architecture.layers
    cannot = f"layers of {stack.name} cannot go"
    if layers.first and 0 in stack.gone:
        yield f"{cannot}: {layers.first}: keep layer 0"
    for key in layers.taken:
        if section.values.get(key) is None:
            yield f"{cannot}: config.json has no {section.prefix}{key}, which names those that feed others"
        elif taken := sorted(_by_number(section, key, stack.count) & {*stack.gone}):
            yield f"{cannot}: {section.prefix}{key} names {_listed(taken)}, whose outputs are used: keep them"
    for kind in layers.kinds:
        if _new_kinds(stack, kind) is None:
            keys = [section.prefix + key.format(side=stack.side) for key in layers.kinds[kind]]
            by = f"no {listed(keys)} make" if keys else "their numbers do not make"
            wrong = _listed(_misplaced(stack, kind))
            yield f"{cannot}: {by} {wrong} what they are at their new places: remove whole periods"


def _listed(layers: Sequence[int]) -> str:
    """Layers by their numbers, as people write them.

    >>> _listed([3]), _listed([1, 2, 5])
    ('layer 3', 'layers 1, 2 and 5')
    """
    return f"layer{'s' if len(layers) > 1 else ''} {listed(first_of([*map(str, layers)], 8))}"


def _twins(stacks: Mapping[str, Stack], members: Mapping[str, int], sections: Sections) -> Iterator[str]:
    """Lists that one key counts and that do not lose the same layers."""
    for name, stack in stacks.items():
        for other, count in members.items():
            if (
                other == name
                or count != stack.members
                or numbered_inside(other)
                or OTHER_TOWERS.search(other)
            ):
                continue
            try:
                beside = stacks.get(other) or _stack(other, sections.at(other), count, ())
            except CheckpointError:
                continue
            if beside.key == stack.key and beside.gone != stack.gone:
                key = path_shown(stack.key)
                what = "loses others" if beside.gone else "loses none"
                yield f"{name} loses layers and {other} {what}, and {key} counts both"
                return


def numbered_inside(name: str) -> bool:
    """Whether a list of modules lies in a member of another list."""
    return next(numbered(f"{name}.x"), None) is not None


# -- what the config says of layers ------------------------------------------------------------------


def without_layers(stack: Stack) -> dict[str, Any]:
    """New values of all keys of a stack's section that refer to layers; None for a key to remove."""
    section, stays, number = stack.section, stack.stays, stack.count
    layers = section.architecture.layers
    values: dict[str, Any] = {**_entries(stack), **dict.fromkeys(layers.derived)}
    for key in layers.by_number:
        chosen = _by_number(section, key, number)
        values[key] = [place for place, layer in enumerate(stays) if layer in chosen]
        values |= layers.settled
    for key in layers.taken:  # each has a module of its own, in the order of the list
        values[key] = [stays.index(layer) for layer in section.values[key]]
    if layers.beyond and layers.beyond in section.values:
        behind = sum(layer >= number for layer in stack.gone)
        values[layers.beyond] = max(0, section.number(f"config.{layers.beyond}") - behind)
    for key, usual in layers.up_to.items():
        first = section.number(f"config.{key}") if key in section.values else usual
        values[key] = sum(layer < first for layer in stays)
    values |= _by_rule(stack)
    for key, made in layers.rules.items():
        for spelling in {key, f"_{key}"} & section.values.keys():  # transformers keeps some as private names
            value = _settled(stack, key, section.values[spelling], (made, values))
            if value != section.values[spelling]:
                values[spelling] = value
    return values


def _by_rule(stack: Stack) -> dict[str, Any]:
    """New values of keys from which the class derives something by the number of a layer, or of all."""
    section, layers = stack.section, stack.section.architecture.layers
    values: dict[str, Any] = {}
    for kind in layers.kinds:
        values |= _new_kinds(stack, kind) or {}
    for key, usual in layers.by_root.items():
        scale = section.values.get(key, usual)
        if isinstance(scale, int | float):
            values[key] = scale * sqrt(len(stack.stays) / stack.count)
    return values


def _entries(stack: Stack) -> dict[str, Any]:
    """Lists and objects with an entry for each layer, of which those stay whose layers do."""
    section, layers, stays = stack.section, stack.section.architecture.layers, stack.stays
    values: dict[str, Any] = {}
    for key in dict.fromkeys((*layers.by_place, *layers.implied)):
        if layers.side not in {"", stack.side}:
            values |= {key: section.values[key]} if key in section.values else {}
            continue
        entries = None if key in layers.by_number else _by_place(section, key, stack.count)
        if entries is not None:
            values[key] = [entries[layer] for layer in stays]
    for key in layers.cycled:
        cycle = _cycle(section, key)
        kinds = [cycle[layer % len(cycle)] for layer in stays]
        if kinds != [cycle[place % len(cycle)] for place in range(len(stays))]:
            values[key] = kinds
    for key in layers.by_key:
        entry = section.values.get(key)
        if isinstance(entry, dict):
            pairs = ((str(place), entry.get(str(layer))) for place, layer in enumerate(stays))
            values[key] = {place: each for place, each in pairs if each is not None}
    return values


def skipped(stack: Stack) -> Iterator[str]:
    """A line where a removed layer is not what a masked one is."""
    layers = stack.section.architecture.layers
    if layers.skipped and stack.section.evaluated(layers.skipped_where):
        what = "removed ones are skipped, while masked ones would pass on zeros"
        yield f"layers of {stack.name} {layers.skipped}: {what}"


def packed_parts(stack: Stack, shapes: Shapes) -> Iterator[tuple[str, int, list[int]]]:
    """Tensors beside a list that have parts for each of its layers: name, dimension, indices of each part.

    Raises:
        CheckpointError: a tensor that is not as long as its parts, or has scales beside it.
    """
    pieces = stack.name.split(".")
    above = [".".join(pieces[:depth]) for depth in range(len(pieces))]
    for module, dim in stack.section.architecture.layers.packed.items():
        names = (f"{each}.{module}.weight".removeprefix(".") for each in above)
        for name in (name for name in names if name in shapes):
            plain = {name, f"{name.removesuffix('weight')}bias"}
            beside = next(
                (one for one in shapes if one.startswith(name.removesuffix("weight")) and one not in plain),
                None,
            )
            if beside is not None:
                found = f"{name} has a part for each layer, and {beside} beside it"
                raise CheckpointError(f"{found}: dequantize the checkpoint first")
            size, rest = divmod(shapes[name][dim], stack.count)
            if rest:
                wanted = f"wanted a multiple of the {stack.count} layers"
                raise CheckpointError(f"{name} has {shapes[name][dim]} along dimension {dim}, {wanted}")
            yield name, dim, [layer * size + at for layer in stack.stays for at in range(size)]


def _kinds(stack: Stack, kind: str, values: Mapping[str, object], layers: int) -> Iterator[object]:
    """What the class makes of each layer by its number, with these values of keys."""
    ruled = replace(stack.section, values={**stack.section.values, **values})
    text = kind.format(side=stack.side)
    return (ruled.evaluated(text, (("layer", layer), ("layers", layers))) for layer in range(layers))


def _misplaced(stack: Stack, kind: str) -> list[int]:
    """Layers that stay, and that would be of another kind at their new places with the values there are."""
    before, stays = list(_kinds(stack, kind, {}, stack.count)), stack.stays
    after = _kinds(stack, kind, {}, len(stays))
    return [layer for layer, new in zip(stays, after, strict=True) if before[layer] != new]


def _new_kinds(stack: Stack, kind: str) -> dict[str, int] | None:
    """New values of as few keys as can be, with which layers that stay are of their kinds; None without."""
    keys = [key.format(side=stack.side) for key in stack.section.architecture.layers.kinds[kind]]
    before, stays = list(_kinds(stack, kind, {}, stack.count)), stack.stays
    wanted = [before[layer] for layer in stays]
    numbers = _candidates(wanted)
    for many in range(len(keys) + 1):
        for changed in combinations(keys, many):
            for each in product(numbers, repeat=many):
                values = dict(zip(changed, each, strict=True))
                found = _kinds(stack, kind, values, len(stays))
                if all(one == other for one, other in zip(wanted, found, strict=True)):
                    return values
    return None


def _candidates(kinds: Sequence[object]) -> list[int]:
    """Numbers that a rule may have: where kinds begin and end, how far these are apart, more than there are.

    >>> _candidates(list("aabbbb"))
    [1, 2, 3, 6, 7, 0]
    """
    changes = [at for at in range(1, len(kinds)) if kinds[at] != kinds[at - 1]]
    near = {at + by for at in (*changes[:4], *changes[-2:]) for by in (-1, 0, 1)}
    gaps = {end - begin for begin, end in combinations(changes[:4], 2)}
    # 0 comes last: it is no distance between layers, but may be a number of first layers.
    return [*sorted({1, len(kinds), len(kinds) + 1, *near, *gaps} - {0}), 0]


def lost_rules(stack: Stack, values: Mapping[str, Any]) -> Iterator[str]:
    """A line for each rule that no value of its key makes true for the layers that stay."""
    for key, made in stack.section.architecture.layers.rules.items():
        for spelling in (key, f"_{key}"):
            if spelling in values and values[spelling] is None:
                text = f"it is taken out, and {made} has them"
                yield f"config.json: no {spelling} makes the layers that stay: {text}"


def _settled(stack: Stack, key: str, found: object, lists: tuple[str, Mapping[str, Any]]) -> object:
    """A value with which a rule derives the list for the layers that stay; None if no value does.

    The `found` value stays where it does, and where there is no list.
    """
    made, values = lists
    section, layers, number = stack.section, stack.section.architecture.layers, len(stack.stays)

    def makes(value: object) -> list[object]:
        ruled = replace(section, values={**section.values, key: value})
        return [ruled.evaluated(layers.implied[made], (("layer", layer),)) for layer in range(number)]

    wanted = values.get(made)
    if made in layers.by_number and wanted is not None:
        wanted = [layer in wanted for layer in range(number)]
    if wanted is None or type(found) is not int or makes(found) == wanted:
        return found
    # 0 comes last: it is no distance between layers, but may be a number of first layers.
    return next((value for value in (*range(1, number + 2), 0) if makes(value) == wanted), None)


def _by_place(section: Section, key: str, number: int) -> Sequence[object] | None:
    """A list with an entry for each layer, from the config or as the class derives it.

    None where there is no list, and where the class derives the same for every layer, as for fewer layers.
    """
    entries = section.values.get(key)
    if key in _STRICT and entries is not None and not isinstance(entries, list):
        wanted = f"wanted a list with an entry for each of {number} layers"
        raise CheckpointError(f"config.json: {section.prefix}{key} is {shown(entries)}, {wanted}")
    if isinstance(entries, list) and entries:
        if len(entries) < number and key in BY_PLACE and key not in _STRICT:
            return None  # a list of something else
        if len(entries) < number:
            raise CheckpointError(
                f"config.json: {section.prefix}{key} has no entry for each of {number} layers"
            )
        return entries
    implied = section.architecture.layers.implied.get(key)
    if implied is None or (entries and not isinstance(entries, list)):
        return None
    made = [section.evaluated(implied, (("layer", layer),)) for layer in range(number)]
    return made if any(entry != made[0] for entry in made) else None


def _cycle(section: Section, key: str) -> Sequence[object]:
    """A list that begins anew where layers are left."""
    cycle = section.values.get(key) or section.architecture.layers.cycled[key]
    if not isinstance(cycle, list | tuple):
        raise CheckpointError(f"config.json: {section.prefix}{key} is {shown(cycle)}, wanted a list")
    return cycle


def _by_number(section: Section, key: str, number: int) -> set[int]:
    """The layers in a list of numbers, or those that the class puts into it."""
    layers = section.architecture.layers
    entries, implied = section.values.get(key), layers.implied.get(key, "False")
    named = {layer for layer in range(number) if section.evaluated(implied, (("layer", layer),))}
    if entries is None:
        return named
    if not isinstance(entries, list) or not all(type(entry) is int for entry in entries):
        found = f"{section.prefix}{key} is {shown(entries)}"
        raise CheckpointError(f"config.json: {found}, wanted a list of numbers of layers")
    return {*entries, *named} if layers.settled else set(entries)
