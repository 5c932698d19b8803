"""Lists of what stays: experts and tokens by their numbers, as a JSON file or a value says, without a spec.

Owns the layouts that such a list may have, and what is wrong with one. Reads no data of tensors: gives kept
indices. Called by api.
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from sparseprune.checkpoint.documents import read_json, strict_json
from sparseprune.checkpoint.remote import located
from sparseprune.errors import CheckpointError
from sparseprune.removal.counting import find_vocabularies
from sparseprune.removal.dim_constraints import refuse
from sparseprune.removal.preview import numbered
from sparseprune.removal.sections import Sections
from sparseprune.removal.slices import KeptIndices, kept_slices
from sparseprune.spec import TensorInfo
from sparseprune.spec.locating import natural_key
from sparseprune.spec.naming import EMBEDDINGS, VOCABULARY_SIZE
from sparseprune.spec.problems import nearest, shown
from sparseprune.spec.structures import Index, expert_modules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any

    from sparseprune.engine.grids import Shape
    from sparseprune.removal.counting import Counted
    from sparseprune.spec.structures import Structure


class Listed(Struct, frozen=True):
    """What stays, as a file or a value says it; `source` is the file, or the name of the option."""

    source: str
    value: Any

    @staticmethod
    def of(given: object, option: str) -> Listed:
        """The value, or what is in the file at a path; CheckpointError where that is no JSON."""
        if isinstance(given, str | PathLike):
            return Listed(str(given), read_json(located(given), strict_json))
        return Listed(option, given)


# -- experts -----------------------------------------------------------------------------------------


def kept_experts(
    listed: object, shapes: Mapping[str, Shape], config: Mapping[str, Any] | None
) -> dict[str, KeptIndices]:
    """What the tensors of experts keep if these stay, of every module that has some.

    `listed` is one list of numbers for all modules, a list with one for each of them in their natural order,
    or an object by the name of the module or the number of its layer.

    Raises:
        CheckpointError: what is listed is not what there is, line by line.
    """
    index = Index.of((TensorInfo(name, "", shape) for name, shape in shapes.items()), config)
    modules = _modules(index)
    if not modules:
        raise CheckpointError("the checkpoint has no routed experts under names that are known")
    stays: dict[str, frozenset[int]] = {}
    problems: list[str] = []
    for module, numbers in _by_module(listed, modules, problems).items():
        problems += _wrong_numbers(module, numbers, modules[module])
        stays[module] = frozenset(each for each in numbers if type(each) is int)
    refuse(problems)
    return {
        name: kept
        for module, members in modules.items()
        for name, kept in _kept(members, stays[module], shapes)
    }


class _Module(Struct, frozen=True):
    """A module with experts: its layer, and the structures of each expert or of all of them."""

    layer: int | str
    structures: Mapping[int | str, Structure]

    @property
    def experts(self) -> Sequence[int]:
        """The numbers of its experts."""
        numbers = [number for number in self.structures if isinstance(number, int)]
        return sorted(numbers) or range(next(iter(self.structures.values())).units)


def _modules(index: Index) -> dict[str, _Module]:
    """All modules with experts, in the natural order of their names."""
    found = expert_modules(index)
    layers = {module: dict(next(iter(each.values())).place)["layer"] for module, each in found.items()}
    return {module: _Module(layers[module], found[module]) for module in sorted(found, key=natural_key)}


def _by_module(
    listed: object, modules: Mapping[str, _Module], problems: list[str]
) -> dict[str, list[object]]:
    """The list of each module; none where something is wrong, which goes into the problems."""
    if isinstance(listed, dict):
        return _by_name(listed, modules, problems)
    entries = list(listed) if isinstance(listed, list | tuple) else []
    if entries and all(type(each) is int for each in entries):
        return dict.fromkeys(modules, entries)
    if not entries or not all(isinstance(each, list | tuple) for each in entries):
        problems.append(
            f"holds {shown(listed)}, wanted the numbers of experts that stay: one list for all layers, a "
            'list with one for each layer that has experts, or an object such as {"3": [0, 1, 5]}'
        )
    elif len(entries) != len(modules):
        names = list(modules)
        span = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        problems.append(f"wanted a list for each of {span}, {len(modules)} in all; found {len(entries)}")
    else:
        return {name: list(each) for name, each in zip(modules, entries, strict=True)}
    return {}


def _by_name(
    listed: Mapping[object, object], modules: Mapping[str, _Module], problems: list[str]
) -> dict[str, list[object]]:
    found: dict[str, list[object]] = {}
    for key, entries in listed.items():
        name = _named(str(key), modules, problems)
        if name is None:
            continue
        if name in found:
            problems.append(f"{name} stands twice, by its name and by the number of its layer")
        elif isinstance(entries, list | tuple):
            found[name] = list(entries)
        else:
            problems.append(f"{key}: holds {shown(entries)}, wanted a list of numbers of experts")
    if not problems:
        problems += [
            f"there is no list for {name}, which has experts" for name in modules if name not in found
        ]
    return found


def _named(key: str, modules: Mapping[str, _Module], problems: list[str]) -> str | None:
    """The module of a name or of a layer's number."""
    if key in modules:
        return key
    if key.isdecimal() and key.isascii():
        names = [name for name, module in modules.items() if str(module.layer) == key]
        if len(names) == 1:
            return names[0]
        if names:
            problems.append(f"layer {key} is {' and '.join(names)}: give their names in place of the number")
        else:
            layers = ", ".join(str(module.layer) for module in modules.values())
            problems.append(f"layer {key} has no experts; those with experts are {_shortened(layers)}")
        return None
    close = nearest(key, list(modules))
    near = close[0] if close else next(iter(modules))
    problems.append(f"{key} is no module with experts; the nearest name is {near}")
    return None


def _shortened(text: str, most: int = 100) -> str:
    return text if len(text) <= most else f"{text[:most].rpartition(',')[0]}, ..."


def _wrong_numbers(module: str, numbers: Sequence[object], there: _Module) -> Iterator[str]:
    experts, seen = there.experts, set[object]()
    known = frozenset(experts)
    for number in numbers:
        if type(number) is not int or number not in known:
            text = f"it has {len(known)} experts, {experts[0]} to {experts[-1]}"
            yield f"{module}: {shown(number)} is no expert: {text}"
        elif number in seen:
            yield f"{module}: {number} stands twice"
        seen.add(number if isinstance(number, int) else None)


def _kept(
    module: _Module, stays: frozenset[int], shapes: Mapping[str, Shape]
) -> Iterator[tuple[str, KeptIndices]]:
    """What is kept of each tensor that loses something."""
    nothing: dict[Shape, KeptIndices] = {}  # thousands of tensors lose the same
    for number, structure in module.structures.items():
        if number in stays:
            continue
        for part in structure.parts:
            shape = shapes[part.tensor]
            if isinstance(number, int):
                if shape not in nothing:
                    gone = [np.zeros(size, dtype=np.bool_) for size in shape]
                    nothing[shape] = kept_slices(gone) if shape else KeptIndices((), 0)
                yield part.tensor, nothing[shape]
            else:
                units = np.isin(np.arange(structure.units), list(stays))
                along = [np.ones(size, dtype=np.bool_) for size in shape]
                along[part.dim][part.begin : part.begin + part.size * units.size] = np.repeat(
                    units, part.size
                )
                if not units.all():
                    yield part.tensor, kept_slices(along)


# -- tokens ------------------------------------------------------------------------------------------


def kept_tokens(
    listed: object, shapes: Mapping[str, Shape], config: Mapping[str, Any] | None
) -> dict[str, KeptIndices]:
    """What embeddings and heads keep if the tokens of these ids stay, which are in ascending order.

    CheckpointError where the list is wrong, or nobody knows which tensors have a row for each token.
    """
    counted = _vocabulary(shapes, Sections.of(config))
    tokens = counted[0].count
    ids = list(listed) if isinstance(listed, list | tuple | range) else []
    if not ids or not all(type(each) is int for each in ids):
        raise CheckpointError(f"holds {shown(listed)}, wanted a list of the ids of the tokens that stay")
    for one, following in zip(ids, [*ids[1:], tokens], strict=True):
        if not 0 <= one < tokens:
            raise CheckpointError(f"{one} is no token: there are {tokens}, 0 to {tokens - 1}")
        if following <= one:
            text = "stands twice" if following == one else f"stands before {following}"
            raise CheckpointError(f"{one} {text}: wanted ids in ascending order, each once")
    flags = np.isin(np.arange(tokens), ids)
    if flags.all():
        return {}
    kept = {}
    for each in counted:
        along = [np.ones(size, dtype=np.bool_) for size in shapes[each.tensor]]
        along[each.dim or 0] = flags
        kept[each.tensor] = kept_slices(along)
    return kept


def _vocabulary(shapes: Mapping[str, Shape], sections: Sections) -> list[Counted]:
    """The dimensions that count the tokens of the model itself, not those of a tower."""
    found = {section.path: (section, counted) for section, counted in find_vocabularies(shapes, sections)}
    if not found:
        raise CheckpointError("config.json says no vocab_size that a known embedding has as many rows as")
    own = sections.path_at("")
    if own not in found and len(found) > 1:
        named = [f"{section.prefix}{VOCABULARY_SIZE}" for section, _ in found.values()]
        raise CheckpointError(f"there is not one vocabulary: {' and '.join(named)} have tensors each")
    section, counted = found.get(own) or next(iter(found.values()))
    names, tokens = {each.tensor for each in counted}, counted[0].count
    for name, shape in shapes.items():
        outside = next(numbered(name), None) is None and sections.path_at(name) == section.path
        if not outside or name in names:
            continue
        if EMBEDDINGS.search(name.removesuffix(".weight")):
            said = f"config.json says {tokens} for {section.prefix}{VOCABULARY_SIZE}"
            raise CheckpointError(f"{name} has {shape[0]} rows, {said}")
        if tokens in shape:
            what = f"{name} has {tokens} along dimension {shape.index(tokens)}"
            raise CheckpointError(f"{what}, and nothing tells whether these are tokens")
    return counted


KEPT: Mapping[str, Callable[..., dict[str, KeptIndices]]] = {
    "--experts": kept_experts,
    "--vocabulary": kept_tokens,
}
"""By the options of the command what a list keeps of tensors of some shapes, with a config."""
