"""The config after a removal: new counts, lists by layer, nested configs, and keys that the table lacks.

Owns what a config says of layers by their number. Of keys that the table lacks it changes what is certain, as
far as names and values tell, and gives a line for what may no longer be true. Called by shrink.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from sparseprune.errors import CheckpointError
from sparseprune.removal.architectures import (
    EXPERT_COUNTS,
    EXPERT_WIDTHS,
    KV_COUNTS,
    SHARED_WIDTHS,
    WIDTHS,
    known_keys,
)
from sparseprune.removal.dim_constraints import agree, refuse
from sparseprune.removal.layers import Stacks, lost_rules, skipped, without_layers
from sparseprune.removal.quantized import settle_modules
from sparseprune.removal.scales import scaled_keys
from sparseprune.removal.sections import Sections, path_shown, value_at, with_value
from sparseprune.removal.tokens import renumber
from sparseprune.results.fields import ConfigChange
from sparseprune.spec.naming import HEAD_COUNTS, OTHER_TOWERS, VOCABULARY_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sparseprune.engine.grids import Shape
    from sparseprune.removal.counting import Counts
    from sparseprune.removal.dim_constraints import Agreed, CutModel
    from sparseprune.removal.layers import Stack
    from sparseprune.removal.sections import Path, Section
    from sparseprune.removal.slices import KeptIndices


_CONFIG, _GENERATION = "config.json", "generation_config.json"
_QUANTIZATION = "quantization_config"
_LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.[0-9]+(?:\.|$)")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_LAYERS = _set("layer layers block blocks")
_UNITS = {*WIDTHS, *EXPERT_WIDTHS, *SHARED_WIDTHS, *HEAD_COUNTS, *KV_COUNTS, *EXPERT_COUNTS}
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


class _KeyReader(Struct, frozen=True):
    """What is looked for in keys: statements on `layers`, of which some stay, and copies of old `numbers`.

    `layers` is None if no layer is removed. `known` are the keys of the table.
    """

    layers: int | None
    stays: Sequence[int]
    numbers: Mapping[str, int]
    known: frozenset[str]

    @staticmethod
    def of(section: Section, stacks: Sequence[Stack], agreed: Agreed) -> _KeyReader:
        """What to look for in a section of which these lists of layers lose some."""
        numbers = {
            path_shown(key[len(section.path) :]): value
            for key in agreed.values
            if agreed.counts.sections[key].path == section.path
            and type(value := section.value(path_shown(key[len(section.path) :]))) is int
        }
        known = known_keys(section.architecture)
        if not stacks or stacks[0].is_stage:  # lists beside `depths` have entries for stages
            return _KeyReader(None, (), numbers, known)
        stack = stacks[0]
        counted = {path_shown(one.key[len(section.path) :]): one.count for one in stacks}
        return _KeyReader(stack.count, stack.stays, {**numbers, **counted}, known)

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
        if sure or key in self.known or key in _UNITS or not _LAYERS.isdisjoint(words):
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
        if key == _QUANTIZATION or OTHER_TOWERS.search(key) or not _OTHERS.isdisjoint(words):
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
    if "head" in words and words[-1] in {"dim", "size"}:
        return False  # of one head
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


# -- the new config ----------------------------------------------------------------------------------


class Configured(Struct, frozen=True):
    """The config of a smaller checkpoint, its changes, what tensors keep, and remarks.

    `beside` are the documents beside it that change as well.
    """

    config: dict[str, Any]
    changes: tuple[ConfigChange, ...]
    agreed: Agreed
    remarks: tuple[str, ...]
    beside: Mapping[str, Mapping[str, Any]] = {}


def configure(
    config: Mapping[str, Any] | None, model: CutModel, beside: Mapping[str, Mapping[str, Any]]
) -> Configured:
    """The config of a checkpoint that is cut like `model`; `beside` as for `make_removal`.

    Raises:
        CheckpointError: what the model's classes cannot express, line by line.
    """
    sections = Sections.of(config)
    stacks = Stacks.find(model.shapes, model.removed, sections)
    agreed = agree(sections, model, stacks)
    problems = [*agreed.problems, *stacks.problems]
    touched = {**agreed.counts.sections, **{stack.key: stack.section for stack in stacks.of.values()}}
    used = {section.path: section for key, section in touched.items() if key in agreed.values}
    used |= {stack.section.path: stack.section for stack in stacks.of.values()}
    quantizations = {
        (*path, _QUANTIZATION): values[_QUANTIZATION]
        for path, values in {(): sections.config, **{path: one.values for path, one in used.items()}}.items()
        if values.get(_QUANTIZATION) is not None
    }
    modules = {path: settle_modules(stated, model.removed) for path, stated in quantizations.items()}
    problems += _quantized(model, agreed.counts) if quantizations else []
    problems += [problem for _, wrong in modules.values() for problem in wrong]
    documents: dict[str, Mapping[str, Any]] = {
        _CONFIG: sections.config,
        _GENERATION: beside.get(_GENERATION) or {},
    }
    remarks: list[str] = []
    for key, section in agreed.counts.sections.items():
        if key[-1] == VOCABULARY_SIZE and key in agreed.values and model.exact:
            (kept,) = agreed.units[key].values()
            renumbered = renumber(documents, section, kept)
            documents = {**renumbered.documents}
            problems += renumbered.problems
            remarks += renumbered.remarks
    refuse(dict.fromkeys(problems))
    written: dict[str, Any] = dict(documents[_CONFIG])
    for path, value in _values(agreed).items():
        written = with_value(written, path, value)
    for section in used.values():
        inner, lines = _with_layers(section, stacks, written, agreed)
        remarks += lines
        written = with_value(written, section.path, inner)
    if used:
        outside, lines = _settle_outside(sections.config, used, written, (agreed, stacks), beside)
        written = outside
        remarks += lines
    for path, (settled, _) in modules.items():
        written = with_value(written, path, settled)
    changes = tuple(_changes(sections.config, written, frozenset(used)))
    del documents[_CONFIG]
    changed = {file: each for file, each in documents.items() if each != (beside.get(file) or {})}
    return Configured(written, changes, agreed, tuple(dict.fromkeys(remarks)), changed)


def _values(agreed: Agreed) -> dict[Path, object]:
    """New values of all keys that count units, and of those that follow from them, by their paths."""
    values: dict[Path, object] = {}
    for key, value in agreed.values.items():
        section = agreed.counts.sections[key]
        hidden = agreed.counts.ratios.get(key)
        values[key] = value if hidden is None else _ratio(value, hidden)
        values |= dict.fromkeys(agreed.counts.copies.get(key, ()), values[key])
        if key in agreed.counts.routing:  # the class takes any of these names
            old = section.value(path_shown(key[len(section.path) :]))
            values |= {section.path_of(name): value for name in EXPERT_COUNTS if section.value(name) == old}
        elif key[-1] == VOCABULARY_SIZE:  # of encoder and decoder
            old = section.values[VOCABULARY_SIZE]
            alike = [name for name in section.values if name.endswith(VOCABULARY_SIZE)]
            values |= {section.path_of(name): value for name in alike if section.values[name] == old}
        elif key in agreed.counts.widths:
            values |= {
                section.path_of(name): settled for name, settled in section.architecture.settled.items()
            }
    for keys in agreed.counts.heads.values():
        section, row = keys.section, keys.section.architecture
        if {keys.heads, keys.groups} & agreed.values.keys():
            values |= {section.path_of(name): section.number(text) for name, text in row.pinned.items()}
            if keys.groups is not None and keys.groups not in agreed.values:
                values[keys.groups] = section.value(path_shown(keys.groups[len(section.path) :]))
            for name, of in row.alike.items():
                if section.path_of(of) in agreed.values:
                    values[section.path_of(name)] = agreed.values[section.path_of(of)]
    values |= scaled_keys(agreed.counts, agreed.values)
    return {key: value for key, value in values.items() if value is not None}


def _ratio(units: int, hidden: int) -> float:
    """The ratio that stands for a number of units; CheckpointError where no number does."""
    ratio = units / hidden
    if int(hidden * ratio) != units:
        raise CheckpointError(f"config.json: no ratio times {hidden} is exactly {units}: take another number")
    return ratio


def _with_layers(
    section: Section, stacks: Stacks, written: Mapping[str, Any], agreed: Agreed
) -> tuple[dict[str, Any], list[str]]:
    """The new values of a section, with those that its lost layers and its unlisted keys change."""
    inner: dict[str, Any] = dict(value_at(written, section.path))
    remarks: list[str] = []
    own = [stack for stack in stacks.of.values() if stack.section.path == section.path]
    # Lists and objects with an entry for each layer may have changed entries; other keys are as they were.
    entries = {key: value for key, value in inner.items() if isinstance(value, list | dict)}
    settled: set[str] = set()
    for stack in own:
        inner = with_value(inner, stack.key[len(section.path) :], len(stack.stays))
        values = without_layers(
            replace(stack, section=replace(section, values={**section.values, **entries}))
        )
        settled |= values.keys()
        remarks += [*skipped(stack), *lost_rules(stack, values)]
        inner = {key: each for key, each in {**inner, **values}.items() if values.get(key, 0) is not None}
    reader = _KeyReader.of(section, own, agreed)
    if reader.numbers:
        changed = {key for key in section.values if inner.get(key) != section.values[key]} - entries.keys()
        for key, value in {**section.values, **entries}.items():
            if key in changed | settled or (key in reader.known and type(value) is int):
                continue
            after = reader.cut(key, value)
            if after is None:
                remarks += reader.remarks(f"{_CONFIG}: {section.prefix}{key}", key, value, by_length=True)
            else:
                inner[key] = after
    return inner, remarks


def _settle_outside(
    config: Mapping[str, Any],
    used: Mapping[Path, Section],
    written: dict[str, Any],
    found: tuple[Agreed, Stacks],
    beside: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Any], list[str]]:
    """Copies of changed keys beside a section, and lines about statements in this and other documents."""
    agreed, stacks = found
    remarks: list[str] = []
    for path, section in used.items():
        own = [stack for stack in stacks.of.values() if stack.section.path == path]
        reader = _KeyReader.of(section, own, agreed)
        after = value_at(written, path)
        for key, value in config.items() if path else ():
            if key in after and after[key] != section.values.get(key) and value == section.values.get(key):
                written[key] = after[key]
            elif key not in {one[0] for one in used if one}:
                remarks += reader.remarks(f"{_CONFIG}: {key}", key, value, by_length=True)
        for file, document in beside.items():
            for key, value in document.items():
                remarks += reader.remarks(f"{file}: {key}", key, value, by_length=False)
    return written, remarks


def _changes(
    before: Mapping[str, Any], after: Mapping[str, Any], inside: frozenset[Path], path: Path = ()
) -> Iterator[ConfigChange]:
    """What differs between two configs, key by key; sections are looked into."""
    for key in dict.fromkeys((*after, *before)):
        one, other = before.get(key), after.get(key)
        here = (*path, key)
        if one == other:
            continue
        if any(each[: len(here)] == here for each in inside) or _is_nested(one, other):
            yield from _changes(one or {}, other or {}, inside, here)
        else:
            yield ConfigChange(key=path_shown(here), before=one, after=other)


def _is_nested(one: object, other: object) -> bool:
    """Whether two objects hold counts of their own, and not one entry for each layer."""
    both = isinstance(one, dict) and isinstance(other, dict)
    return both and not any(key.isdecimal() for key in (*one, *other))  # type: ignore[misc]


def check_shapes(agreed: Agreed, before: Mapping[str, Shape], after: Mapping[str, Shape]) -> None:
    """Check that each dimension has the size that the new values of keys say; CheckpointError.

    `before` and `after` are the shapes of tensors by their old names.
    """
    problems = []
    for name, shape in after.items():
        lost: dict[int, int] = {}
        for each in agreed.counts.of.get(name, ()):
            if each.dim is not None and each.key in agreed.values:
                left = agreed.values[each.key] * each.by_index * each.flat
                lost[each.dim] = lost.get(each.dim, 0) + (each.count - left) * each.size
        for dim, gone in lost.items():
            wanted = before[name][dim] - gone
            if shape[dim] != wanted:
                text = f"{shape[dim]} along dimension {dim}, config.json says {wanted}"
                problems.append(f"{name} would have {text}")
    refuse(problems)


def _quantized(model: CutModel, counts: Counts) -> list[str]:
    """Problems of quantized weights: scales belong to whole modules, of which experts and layers are some."""

    def has_whole_experts(name: str, kept: KeptIndices) -> bool:
        found = counts.of.get(name, ())
        return all(any(one.dim == dim and one.key in counts.routing for one in found) for dim in kept.cut)

    for name, kept in model.kept.items():
        if kept.cut and name not in model.gone and not has_whole_experts(name, kept):
            text = "is quantized, and its scales are those of the whole: dequantize the checkpoint first"
            return [f"{name} {text}"]
    return []
