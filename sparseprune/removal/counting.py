"""Counting: which key of the config counts the units of which dimension of which tensor.

Owns the choice of a key by its value, and what has no key. Reads names, shapes and the config. Called by
dim_constraints and config.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from sparseprune.errors import CheckpointError
from sparseprune.removal.architectures import (
    CHOSEN,
    DERIVED,
    EXPERT_COUNTS,
    EXPERT_WIDTHS,
    KV_COUNTS,
    RATIOS,
    SHARED_WIDTHS,
    SIDED_HEADS,
    SIDED_KV_COUNTS,
    SIDED_WIDTHS,
    SUBTRACTED,
    WIDTHS,
    architecture_of,
)
from sparseprune.removal.sections import path_shown
from sparseprune.spec import TensorInfo
from sparseprune.spec.naming import (
    DELTA_KEYS,
    DELTA_NETS,
    DELTA_VALUES,
    EMBEDDINGS,
    EXPERTS,
    HEAD_COUNTS,
    HIDDEN_SIZES,
    LOGIT_BIASES,
    NORMS,
    OTHER_TOWERS,
    ROUTER,
    VOCABULARIES,
    VOCABULARY_SIZE,
)
from sparseprune.spec.problems import shown
from sparseprune.spec.structures import (
    Index,
    find_attentions,
    find_experts,
    find_mlps,
    hidden_size,
    module_of,
    with_expert,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from sparseprune.engine.grids import Shape
    from sparseprune.removal.sections import Path, Section, Sections
    from sparseprune.spec import Captures
    from sparseprune.spec.structures import Structure, Units

_SHARED = re.compile("shared")
_LAYERS = "model.layers"  # a name of the text model
_WHAT = {"mlp": "channels", "heads": "heads", "experts": "experts"}


class Counted(Struct, frozen=True):
    """Consecutive indices of a dimension: `count` units of `size` indices each from `begin`, as `key` says.

    Tensors of one `group` keep the same units. `by_index`: the key counts `by_index` indices as one,
    whichever they are. `flat` modules lie behind each other in the dimension, and each keeps as many. Where
    units are `paired`, each of the first half has its counterpart of the second half beside it. A tensor that
    `follows` is not pruned itself: it loses the units that the others lose. `averaged`: a norm divides by the
    root mean square of these units. Of a list of modules `tensor` is its name and `dim` None.
    """

    tensor: str
    dim: int | None
    key: Path
    group: str
    count: int
    size: int = 1
    begin: int = 0
    by_index: int = 1
    flat: int = 1
    paired: bool = False
    follows: bool = False
    averaged: bool = False


class HeadKeys(Struct, frozen=True):
    """The keys that count query heads and key/value heads, None where one counts both; and their section."""

    heads: Path
    groups: Path | None
    section: Section


class Routing(Struct, frozen=True):
    """The keys of a router: how many experts it chooses, and groups of them; with its section."""

    chosen: Path | None
    section: Section


@dataclass(slots=True)
class Counts:
    """What keys count, by the names of tensors and of lists of modules.

    Biases `beside` matrices that read units are as wide as what they write to, and stay whole.
    `misfits` are tensors whose structure no key counts, each with a line that says so; `contested` has the
    lines by the keys that should count them. `strangers` are uncounted tensors with the keys that count
    their like. `refused` lines say what the table refuses. `ratios` are keys whose value is the number of
    units by another number. `hidden` is the key of the hidden size where that changes. `copies` are keys of
    other layers that count the same units as one. `tied` has why the layers of a stack keep the same heads,
    by their group.
    """

    of: dict[str, list[Counted]] = field(default_factory=lambda: defaultdict(list))
    beside: set[str] = field(default_factory=set)
    misfits: dict[str, str] = field(default_factory=dict)
    contested: dict[Path, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))
    strangers: dict[str, set[Path]] = field(default_factory=dict)
    refused: dict[str, None] = field(default_factory=dict)
    heads: dict[Path, HeadKeys] = field(default_factory=dict)
    routing: dict[Path, Routing] = field(default_factory=dict)
    ratios: dict[Path, int] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    copies: dict[Path, set[Path]] = field(default_factory=lambda: defaultdict(set))
    widths: set[Path] = field(default_factory=set)  # keys that count channels
    hidden: Path | None = None
    sections: dict[Path, Section] = field(default_factory=dict)  # by the key

    def add(self, counted: Iterable[Counted], section: Section) -> None:
        for each in counted:
            self.of[each.tensor].append(each)
            self.sections[each.key] = section
            self.beside.update((f"{each.tensor.removesuffix('.weight')}.bias", f"{each.tensor}_bias"))


def count_dims(
    shapes: Mapping[str, Shape], sections: Sections, cut: Mapping[str, Collection[int]], lists: Iterable[str]
) -> Counts:
    """What the keys of a config count in tensors of these shapes.

    `cut` are the dimensions of tensors along which something goes; structures that lose nothing are counted
    where their section is known. `lists` are lists of modules that lose members.

    Raises:
        CheckpointError: a structure that loses units is of a model that the table does not know, or refuses.
    """
    counts = Counts()
    index = Index.of((TensorInfo(name, "", shape) for name, shape in shapes.items()), sections.config)
    losing = frozenset(lists)
    others: list[Structure] = []
    for kind, find, count in (
        ("mlp", find_mlps, _count_mlp),
        ("heads", find_attentions, _count_heads),
        ("experts", _find_joined, _count_experts),
    ):
        for structure in find(index) if cut or (kind == "experts" and losing) else ():
            others.append(structure)
            is_list = kind == "experts" and dict(structure.place)["expert"] == ""
            is_touched = module_of(structure) in losing if kind == "experts" else False
            is_touched |= not is_list and any(
                part.dim in cut.get(part.tensor, ()) for part in structure.parts
            )
            try:
                section = sections.at(module_of(structure))
            except CheckpointError:
                if is_touched:
                    raise
                continue
            why = _why_refused(section, kind)
            if why is None:
                count(structure, section, counts)
            elif is_touched:
                stack = dict(structure.place)["stack"]
                counts.refused[f"{_WHAT[kind]} of {stack} cannot go: {why}{_way_out(section, kind)}"] = None
    hidden = hidden_size(index, others) if cut else ""
    if not isinstance(hidden, str) and _loses_hidden(hidden, cut):
        _count_hidden(hidden, sections, counts)
    _note_strangers(index, counts)
    _count_routers(index, counts)
    for section, counted in find_vocabularies(shapes, sections) if cut else ():
        counts.add(counted, section)
    return counts


def _note_strangers(index: Index, counts: Counts) -> None:
    """Note tensors that no key counts, though it counts others of the same names but for numbers."""
    for members in index.forms.values():
        keys = {each.key for tensor in members.values() for each in counts.of.get(tensor.name, ())}
        strangers = (one.name for one in members.values() if keys and one.name not in counts.of)
        stranger = next(strangers, None)
        if stranger is not None and stranger not in counts.misfits:
            counts.strangers[stranger] = keys


def _why_refused(section: Section, kind: str) -> str | None:
    """Why the table lets no units of a structure go."""
    row = section.architecture
    by_key = (
        why for key, (what, why) in row.refused_where.items() if what == kind and section.values.get(key)
    )
    return row.refused.get(kind) or next(by_key, None)


def _way_out(section: Section, kind: str) -> str:
    """That another class, which computes the same, lets units of a structure go."""
    rows = {kin: architecture_of(kin) for kin in section.architecture.kin}
    taking = (kin for kin, row in rows.items() if row is not None and kind not in row.refused)
    return next((f"; or --as {kin}, whose class takes any" for kin in taking), "")


def _layer(structure: Structure) -> int | None:
    layer = dict(structure.place)["layer"]
    return layer if isinstance(layer, int) else None


def _layers(structure: Structure) -> set[int]:
    """The numbers of all layers that a structure has parts of."""
    begin = len(f"{dict(structure.place)['stack']}.")
    pieces = {part.tensor[begin:].partition(".")[0] for part in structure.parts}
    return {int(piece) for piece in pieces}


def _side(name: str) -> str:
    """Of encoder and decoder the one that a module belongs to."""
    return next((side for side in ("decoder", "encoder") if side in name), "")


def _sided(keys: Sequence[str], side: str) -> tuple[str, ...]:
    return tuple(key.format(side=side) for key in keys) if side else ()


def _fitting(section: Section, keys: Iterable[str], layer: int | None, units: int) -> Path | None:
    """The path of the first key whose value is the number of units."""
    for key in keys:
        value = section.value(key, layer)
        if type(value) is int and value == units:
            return section.path_of(key, layer)
    return None


def said(section: Section, keys: Iterable[str], layer: int | None, most: int = 2) -> str:
    """What a config says under keys of which none fits, with the first ones that it has."""
    found = {key: value for key in keys if (value := section.value(key, layer)) is not None}
    texts = [f"{shown(value)} for {path_shown(section.path_of(key, layer))}" for key, value in found.items()]
    return f"config.json says {' and '.join(texts[:most])}" if texts else "no key of config.json counts them"


# -- channels ----------------------------------------------------------------------------------------


def _count_mlp(structure: Structure, section: Section, counts: Counts) -> None:
    module = module_of(structure)
    keys = width_keys(section, module, expert=dict(structure.place)["expert"] != "")
    path, by_index = _width(structure, section, counts, keys)
    if path is None:
        first = structure.parts[0]
        text = f"{first.tensor} has {structure.units} channels along dimension {first.dim}"
        _misfit(structure, counts, text, (section, keys))
        return
    parts = (
        Counted(
            *(one.tensor, one.dim, path, module, one.count * one.flat, one.size, one.begin),
            by_index=by_index,
            flat=one.flat,
            follows=one.follows,
            averaged=_is_averaged(one, section),
        )
        for one in structure.parts
    )
    counts.widths.add(path)
    counts.add(parts, section)


def _width(
    structure: Structure, section: Section, counts: Counts, keys: Sequence[str]
) -> tuple[Path | None, int]:
    """The path of the key that counts the channels of an MLP, and how many channels it counts as one."""
    module, layer, units = module_of(structure), _layer(structure), structure.units
    path = _fitting(section, keys, layer, units)
    if path is not None:
        return path, 1
    if path is None and _SHARED.search(module):  # several shared experts are one wide one
        values = {key: section.value(key, layer) for key in keys}
        whole = ((key, value) for key, value in values.items() if isinstance(value, int) and value > 0)
        key, value = next((pair for pair in whole if units % pair[1] == 0), ("", 1))
        if key:
            return section.path_of(key, layer), units // value
    path, by_index = _ratio(section, units, counts)
    # A rule of the class makes them from the key, or a config leaves out what the class has by default.
    left_out = all(section.value(key, layer) is None for key in keys)
    if path is None and (section.architecture.settled or left_out):
        default = "intermediate_size" if not _side(module) or _side(module) in section.prefix else keys[0]
        path = section.path_of(default)
    return path, by_index


def width_keys(section: Section, module: str, *, expert: bool) -> tuple[str, ...]:
    """The keys that may count the channels of an MLP, the likeliest first."""
    own = tuple(key for text, key in section.architecture.widths.items() if text and text in module)
    if expert:
        return (*own, *EXPERT_WIDTHS, *_sided(SIDED_WIDTHS, _side(module)))
    if _SHARED.search(module):
        return (*own, *SHARED_WIDTHS)
    return (*own, *_sided(SIDED_WIDTHS, _side(module)), *WIDTHS)


def _ratio(section: Section, units: int, counts: Counts) -> tuple[Path | None, int]:
    """The path of a key whose value times the hidden size is the number of units, and what it counts as one.

    An integer counts the hidden size as one, any other number no whole units.
    """
    hidden = next(
        (
            found
            for key in ("embed_dim", "hidden_size", "d_model")
            if isinstance(found := section.value(key), int)
        ),
        0,
    )
    for key in RATIOS:
        ratio = section.value(key)
        if isinstance(ratio, int | float) and hidden and int(hidden * ratio) == units:
            if isinstance(ratio, int):
                return section.path_of(key), hidden
            counts.ratios[section.path_of(key)] = hidden
            return section.path_of(key), 1
    return None, 1


def _misfit(structure: Structure, counts: Counts, found: str, asked: tuple[Section, Sequence[str]]) -> None:
    """Note what was `found` of a structure, and what the keys of a section say instead."""
    section, keys = asked
    module, layer = module_of(structure), _layer(structure)
    first = next((key for key in keys if section.value(key, layer) is not None), None)
    text = f"{found}, {said(section, keys, layer)}"
    if first is not None:
        path, value = section.path_of(first, layer), section.value(first, layer)
        if type(value) is not int:
            text = f"config.json: {path_shown(path)} is {shown(value)}, wanted an integer"
        if not OTHER_TOWERS.search(module):  # a tower may lack a section, and then is not spoken of
            counts.contested[path][text] = None
    counts.misfits.setdefault(module, text)
    for part in structure.parts:
        counts.misfits.setdefault(part.tensor, text)


# -- heads -------------------------------------------------------------------------------------------


def _count_heads(structure: Structure, section: Section, counts: Counts) -> None:
    module, layer = module_of(structure), _layer(structure)
    side = _side(module)
    heads = structure.heads
    grouped = any(part.keys for part in structure.parts)
    runs = max(part.runs for part in structure.parts)
    groups = structure.units * runs if grouped else 1
    is_delta = DELTA_NETS.search(module) is not None
    keys = DELTA_VALUES[:1] if is_delta else (*_sided(SIDED_HEADS, side), *HEAD_COUNTS)
    path = _fitting(section, keys, layer, heads)
    if path is None and all(section.value(key, layer) is None for key in keys):
        path = section.path_of(HEAD_COUNTS[0])  # a class has a default for what a config leaves out
    first = structure.parts[0]
    if path is None:
        text = f"{first.tensor} has {heads} heads along dimension {first.dim}"
        _misfit(structure, counts, text, (section, keys))
        return
    kv_keys = DELTA_KEYS[:1] if is_delta else (*_sided(SIDED_KV_COUNTS, side), *KV_COUNTS)
    kv_path = _fitting(section, kv_keys, layer, groups)
    if kv_path is None and grouped and groups != heads:
        if any(section.value(key, layer) is not None for key in kv_keys):
            first = next(part for part in structure.parts if part.keys)
            text = f"{first.tensor} has {groups} key/value heads along dimension {first.dim}"
            _misfit(structure, counts, text, (section, kv_keys))
            return
        kv_path = section.path_of("num_key_value_heads")
    counts.heads.setdefault(path, HeadKeys(path, kv_path if grouped else None, section))
    for key in kv_keys if kv_path is not None else ():
        if section.path_of(key, layer) == kv_path:  # of the layers that read these keys and values
            sharing = _layers(structure) - {layer}
            counts.copies[kv_path] |= {section.path_of(key, other) for other in sharing} - {kv_path}
    # Where each query head has a key/value head of its own, a matrix that holds both is counted by the first.
    of_both = path if kv_path is None or groups == heads else kv_path
    group = _tied_group(structure, section, counts)
    for part in structure.parts:
        one = _elementary(part, (path, kv_path or path, of_both), group)
        averaged = _is_averaged(part, section)
        counts.add([replace(one, paired=part.runs < runs, averaged=averaged)], section)


def _tied_group(structure: Structure, section: Section, counts: Counts) -> str:
    """The name that all attentions share which must keep the same heads as this one."""
    module, place = module_of(structure), dict(structure.place)
    for text, why in section.architecture.tied.items():
        if text in module:
            group = f"{place['stack']}.*.{place['module']}"
            counts.tied[group] = why
            return group
    return module


def _elementary(part: Units, keys: tuple[Path, Path, Path], group: str) -> Counted:
    """The units of a tensor of attention as single heads, as far as its rows tell them apart.

    `keys` count query heads, key/value heads, and units of both.
    """
    of_queries, of_keys, of_both = keys
    count, size = part.count * part.runs, part.size
    if part.keys:
        key = of_both if part.queries else of_keys
    else:
        key, count, size = of_queries, count * part.queries, size // part.queries
    return Counted(part.tensor, part.dim, key, group, count, size, part.begin, follows=part.follows)


def _is_averaged(part: Units, section: Section) -> bool:
    """Whether a vector is the weight of a norm over all units of a module."""
    return part.tensor.rpartition(".")[0].rpartition(".")[2] in section.architecture.wide_norms


# -- the hidden size ---------------------------------------------------------------------------------


def _loses_hidden(structure: Structure, cut: Mapping[str, Collection[int]]) -> bool:
    """Whether hidden channels are cut, and not only inputs or outputs of single matrices."""
    of_all = [part for part in structure.parts if NORMS.search(part.part) or EMBEDDINGS.search(part.part)]
    return any(part.dim in cut.get(part.tensor, ()) for part in of_all)


def _count_hidden(structure: Structure, sections: Sections, counts: Counts) -> None:
    section = sections.at(_LAYERS)
    row, path = section.architecture, _fitting(section, HIDDEN_SIZES, None, structure.units)
    norms = {part.tensor for part in structure.parts if NORMS.search(part.part)}
    why = row.refused.get("hidden") or row.refused.get("heads" if row.refused.get("heads") == DERIVED else "")
    if any(name.endswith(".bias") for name in norms):
        why = SUBTRACTED
    if why is not None:
        counts.refused[f"hidden channels cannot go: {why}{_way_out(section, 'hidden')}"] = None
        return
    if path is None:
        text = f"its tensors have {structure.units} hidden channels"
        counts.refused[f"hidden channels cannot go: {text}, {said(section, HIDDEN_SIZES, None)}"] = None
        return
    parts = (
        Counted(
            *(one.tensor, one.dim, path, "the hidden size", one.count, one.size, one.begin),
            follows=one.tensor in norms or one.tensor.endswith("bias"),  # masks may be of matrices alone
            averaged=one.tensor in norms,
        )
        for one in structure.parts
    )
    counts.hidden = path
    counts.add(parts, section)


# -- experts -----------------------------------------------------------------------------------------


def _find_joined(index: Index) -> list[Structure]:
    """Experts with one structure for each module: of a list the one with the number of its members."""
    lists: dict[Captures, list[Structure]] = defaultdict(list)
    joined = []
    for structure in find_experts(index):
        if isinstance(structure.place[-1][1], int):
            lists[structure.place[:3]].append(structure)
        else:
            joined.append(structure)
    for members in lists.values():
        parts = tuple(part for each in members for part in each.parts)
        place = with_expert(members[0].place, "")
        joined.append(replace(members[0], place=place, units=len(members), parts=parts))
    return joined


def _count_experts(structure: Structure, section: Section, counts: Counts) -> None:
    module, layer, units = module_of(structure), _layer(structure), structure.units
    is_list = dict(structure.place)["expert"] == ""
    members = {one.tensor[len(module) + 1 :].partition(".")[0] for one in structure.parts if is_list}
    numbers = {int(name.rpartition("_")[2]) for name in members}
    missing = next((number for number in range(max(numbers, default=-1)) if number not in numbers), None)
    path = None if missing is not None else _fitting(section, EXPERT_COUNTS, layer, units)
    if path is None:
        text = f"{module} has {units} members"
        if missing is not None:
            text = f"{module} has a member {max(numbers)} and none with the number {missing}"
        whole = replace(structure, parts=() if is_list else structure.parts)
        _misfit(whole, counts, text, (section, EXPERT_COUNTS))
        return
    chosen = next(
        (section.path_of(key, layer) for key in CHOSEN if section.value(key, layer) is not None), None
    )
    counts.routing.setdefault(path, Routing(chosen, section))
    if not is_list:
        parts = [
            Counted(one.tensor, one.dim, path, module, one.count * one.flat, one.size)
            for one in structure.parts
        ]
    else:
        parts = [Counted(module, None, path, module, units)]
    counts.add(parts, section)


def _count_routers(index: Index, counts: Counts) -> None:
    """What of a module with experts has a row or an element for each of them: it follows."""
    parents: dict[str, Counted] = {}
    for each in [one for listed in counts.of.values() for one in listed if one.key in counts.routing]:
        parents.setdefault(each.group.removesuffix(f".{EXPERTS}"), each)
    for form, members in index.forms.items():
        if not any(word in form for word in ("gate", "router", "bias", "moe_statics")):
            continue
        for tensor in members.values():
            for counted in _router(tensor, parents):
                counts.add([counted], counts.sections[counted.key])


def _router(tensor: TensorInfo, parents: Mapping[str, Counted]) -> Iterator[Counted]:
    pieces = tensor.name.split(".")
    for depth in range(len(pieces) - 1, 0, -1):
        parent = parents.get(".".join(pieces[:depth]))
        if parent is None:
            continue
        rest = ".".join(pieces[depth:])
        if ROUTER.match(rest):
            dim = next((dim for dim, size in enumerate(tensor.shape[:2]) if size == parent.count), None)
            if dim is not None:
                yield Counted(tensor.name, dim, parent.key, parent.group, parent.count, follows=True)
        return


# -- vocabularies ------------------------------------------------------------------------------------


def find_vocabularies(shapes: Mapping[str, Shape], sections: Sections) -> list[tuple[Section, list[Counted]]]:
    """The dimensions that count tokens, by the sections of the config that say how many there are."""
    found: dict[Path, tuple[Section, list[Counted]]] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight").removesuffix(".bias")
        if not LOGIT_BIASES.search(name) and (module == name or not VOCABULARIES.search(module)):
            continue
        path = sections.path_at(name)
        if path not in found:
            found[path] = sections.even_unknown(path), []
        section, counted = found[path]
        tokens = section.values.get(VOCABULARY_SIZE)
        dim = next((dim for dim, size in enumerate(shape[:2]) if size == tokens), None)
        if type(tokens) is int and dim is not None:
            key = section.path_of(VOCABULARY_SIZE)
            counted.append(Counted(name, dim, key, "the vocabulary", tokens))
    return [each for each in found.values() if each[1]]
