"""The result of `inspect`: tensors, groups of them, patterns, runtimes; selecting and sorting of tensors.

Owns grouping by name. Prints nothing. Called by the command line and requirements.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import Struct

from sparseprune.checkpoint.codes import PARAMETERS
from sparseprune.errors import SparsepruneError, printable
from sparseprune.report.runtimes import verdict
from sparseprune.report.wording import many, other_weights, share
from sparseprune.results.fields import json_value
from sparseprune.results.measuring import (
    InspectedGroup,
    InspectedTensor,
    Inspection,
    InspectTotals,
    RuntimeCount,
    RuntimeTotals,
    ZeroBlocks,
)
from sparseprune.spec.patterns import PatternError, parse_pattern
from sparseprune.spec.problems import nearest, shown, suggestion

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sparseprune.checkpoint import OtherFile
    from sparseprune.execution.inspect import Questions, TensorFacts
    from sparseprune.report.runtimes import Runtime
    from sparseprune.spec import BoundSpec
    from sparseprune.spec.patterns import TensorPattern

Row = TypeVar("Row")
_DIGITS = re.compile(r"([0-9]+)")
_MOST_COMPARED = 2000  # names of unlike form among which a nearest one is looked for
_HEADS = ("zero", "eligible")  # of a nested pair the fact itself; what stands beside it explains it
_ALSO_NAMES = {"tensor", "layer", "module", "rule"}  # titles under which tables show names


def selected(names: Iterable[str], match: Sequence[str], exclude: Sequence[str]) -> tuple[str, ...]:
    """The names that some pattern of `match` matches, or all, and none of `exclude`, as they stand.

    Patterns are those of a spec. SparsepruneError for one that cannot be read, for one of `match` that
    matches no name, and where nothing is left.

    >>> selected(["model.norm", "model.layers.0.up"], ["**.layers.{layer}.*"], [])
    ('model.layers.0.up',)
    """
    there = tuple(names)
    wanted = set() if match else set(there)
    for text in match:
        pattern = _pattern("--match", text)
        found = matching(pattern, there)
        if not found:
            hint = _hint(text, pattern, there)
            raise SparsepruneError(printable(f"--match {text}: matches none of {hint}"))
        wanted.update(found)
    unwanted = {name for text in exclude for name in matching(_pattern("--exclude", text), wanted)}
    left = tuple(name for name in there if name in wanted and name not in unwanted)
    if unwanted and not left:
        words = "--match and --exclude" if match else "--exclude"
        raise SparsepruneError(f"{words}: of {many(len(there), 'tensor')} none is left; exclude fewer")
    return left


def matching(pattern: TensorPattern, names: Iterable[str]) -> list[str]:
    """The names that a pattern matches."""
    return [name for name in names if pattern.match(name) is not None]


def nearest_names(pattern: TensorPattern, names: Iterable[str], count: int = 1) -> list[str]:
    """The names most similar to those that a pattern matches; names that differ in numbers count once."""
    forms: dict[str, str] = {}
    for name in names:
        forms.setdefault(_DIGITS.sub("0", name), name)
    return [forms[form] for form in nearest(pattern.sample, list(forms)[:_MOST_COMPARED], count)]


def ordered(rows: Iterable[Row], key: str | None, reverse: bool) -> tuple[Row, ...]:  # noqa: FBT001
    """Tensors or groups by one of their facts, the smallest first; unchanged for None.

    `key` is a flat name (`flat`), the end of one that no other has ("4x4"), or a title of a name's column.
    Names are in their natural order, unknown values come last, equal ones keep their order.
    SparsepruneError for a key that no row has, with the nearest one.
    """
    there = tuple(rows)
    if key is None or not there:
        return there[::-1] if reverse else there
    facts = [flat(row) for row in there]
    found = _key_of(key, dict.fromkeys(name for fact in facts for name in fact))
    known = [at for at, fact in enumerate(facts) if fact.get(found) is not None]
    known.sort(key=lambda at: _rank(facts[at][found]), reverse=reverse)
    unknown = sorted({*range(len(there))}.difference(known))
    return tuple(there[at] for at in (*known, *unknown))


def flat(row: object) -> dict[str, Any]:
    """The fields of a result without nesting, as a sheet of a spreadsheet names its columns.

    >>> flat(RuntimeCount(eligible=1, of=2)), flat({"zero_blocks": {"4x4": ZeroBlocks(zero=1, of=2)}})
    ({'eligible': 1, 'of': 2}, {'zero_blocks_4x4': 1, 'zero_blocks_4x4_of': 2})
    """
    return dict(_flat(row, ""))


def natural(name: str) -> tuple[tuple[str, int, str], ...]:
    """A name as a key to sort by: numbers in it count as numbers, of any length.

    >>> sorted(["h.10.w", "h.9.w", "a"], key=natural)
    ['a', 'h.9.w', 'h.10.w']
    """
    pieces = _DIGITS.split(name)
    texts, numbers = pieces[::2], [*(digits.lstrip("0") for digits in pieces[1::2]), ""]
    return tuple((text, len(digits), digits) for text, digits in zip(texts, numbers, strict=True))


def _pattern(option: str, text: str) -> TensorPattern:
    try:
        return parse_pattern(text)
    except PatternError as error:
        raise SparsepruneError(printable(f"{option} {text}: {error}")) from None


def _hint(text: str, pattern: TensorPattern, names: Sequence[str]) -> str:
    count, below = many(len(names), "tensor"), f"{text.rstrip('.')}.**"
    if text.strip(".*") and matching(parse_pattern(below), names):
        return f"{count}; did you mean {below}?"
    close = nearest_names(pattern, names) or names[:1]
    return f"{count}, such as {shown(close[0])}" if close else count


def _flat(row: object, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in (row if isinstance(row, Mapping) else json_value(row)).items():
        name = prefix if prefix and key in _HEADS else f"{prefix}_{key}" if prefix else key
        if isinstance(value, Mapping) or is_dataclass(value):
            yield from _flat(value, name)
        else:
            yield name, value


def _key_of(key: str, names: Iterable[str]) -> str:
    """The flat name that was meant."""
    plain = {_plain(name): name for name in names}
    wanted = _plain(key)
    if wanted in _ALSO_NAMES and wanted not in plain:
        wanted = "name"
    if wanted in plain:
        return plain[wanted]
    endings = [name for text, name in plain.items() if text.endswith(f"_{wanted}")]
    if len(endings) == 1:
        return endings[0]
    real = sorted(plain.values())
    hint = suggestion(key, real) or f"; there is {', '.join(real)}"
    raise SparsepruneError(printable(f"--sort {key}: there is no such column{hint}"))


def _plain(key: str) -> str:
    return re.sub(r"[ -]", "_", key.strip().lower())


def _rank(value: object) -> tuple[int, Any]:
    """What values of one fact are compared by: numbers, texts, lists."""
    if isinstance(value, str):
        return 1, natural(value)
    if isinstance(value, list | tuple):
        return 2, tuple(_rank(item) for item in value)
    return 0, value


NO_RULE = "no rule"
# Last pieces of names that tell which parameter of its module a tensor is, not which module.
_PARAMETER = frozenset({"bias", "num_batches_tracked", "running_mean", "running_var", "weight", *PARAMETERS})


class Grouping(Struct, frozen=True):
    """What tensors are grouped by, and for each the name of its group, in the order of the groups."""

    by: str
    groups: Mapping[str, str]


def grouping_of(by: str, names: Iterable[str], rules: Mapping[str, str] | None = None) -> Grouping:
    """Groups of tensors by "layer", "module" or "rule"; `rules` has those that some rule reaches.

    Layers and modules come in the natural order of their names, rules in that of `rules`, at last what
    none reaches.
    """
    if by == "rule":
        reached = rules or {}
        found = {name: reached.get(name, NO_RULE) for name in names}
        groups = [*dict.fromkeys(reached.values()), NO_RULE]
    else:
        group_of = layer_of if by == "layer" else module_of
        found = {name: group_of(name) for name in names}
        groups = sorted(dict.fromkeys(found.values()), key=natural)
    rank = {group: at for at, group in enumerate(groups)}
    return Grouping(by, {name: found[name] for name in sorted(found, key=lambda name: rank[found[name]])})


def layer_of(name: str) -> str:
    """A name up to its first piece of digits; where there is none, the module that the tensor belongs to.

    >>> layer_of("model.layers.3.mlp.experts.7.w1.weight"), layer_of("model.embed_tokens.weight")
    ('model.layers.3', 'model.embed_tokens')
    """
    pieces = name.split(".")
    first = next((at for at, piece in enumerate(pieces) if is_number(piece)), None)
    return _module(name) if first is None else ".".join(pieces[: first + 1])


def module_of(name: str) -> str:
    """The module that a tensor belongs to, with a * for every number: one for all layers and experts.

    >>> module_of("model.layers.3.mlp.experts.7.w1.weight"), module_of("model.layers.3.experts.gate_up_proj")
    ('model.layers.*.mlp.experts.*.w1', 'model.layers.*.experts.gate_up_proj')
    """
    return ".".join(["*" if is_number(piece) else piece for piece in _module(name).split(".")])


def rules_of_spec(bound: BoundSpec) -> dict[str, str]:
    """For each tensor that a spec reaches the rules that do, in the order of the spec."""
    found: dict[str, dict[str, None]] = {}
    for rule, instance in bound.instances():
        for leaf in instance.scope.leaves:
            found.setdefault(leaf.tensor, {})[rule.name] = None
    return {name: ", ".join(rules) for name, rules in found.items()}


def rules_of_report(report: Mapping[str, Any]) -> dict[str, str]:
    """For each tensor in a report.json the rules that reached it; empty where it names none."""
    entries = report.get("tensors")
    return {
        entry["name"]: entry["rule"]
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("rule"), str)
    }


def grouped(
    tensors: Sequence[InspectedTensor], grouping: Grouping, patterns: Sequence[str]
) -> tuple[InspectedGroup, ...]:
    """The groups in their order; `patterns` are those that were looked for."""
    members: dict[str, list[InspectedTensor]] = {group: [] for group in grouping.groups.values()}
    for tensor in tensors:
        members[grouping.groups[tensor.name]].append(tensor)
    return tuple(summed(group, found, patterns) for group, found in members.items())


def summed(name: str, tensors: Sequence[InspectedTensor], patterns: Sequence[str]) -> InspectedGroup:
    """A group of tensors.

    Sums are over the tensors whose elements could be counted, None if there is none, and leave out what lies
    beside codes. Of `patterns` it has those that all its matrices satisfy, if there is one that has elements.
    """
    number = len(tensors)
    tensors = [tensor for tensor in tensors if tensor.holds != "beside"]
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
    satisfied = [tensor.patterns for tensor in matrices if tensor.numel]
    sums = {key: total(getattr(tensor, key) for tensor in tensors) for key in _SUMMED}
    known = sum(tensor.numel for tensor in tensors if tensor.zeros is not None)
    return InspectedGroup(
        name=name,
        tensors=number,
        matrices=len(matrices),
        numel=sum(tensor.numel for tensor in tensors),
        **sums,
        sparsity=None if sums["zeros"] is None else share(sums["zeros"], known),
        patterns=tuple(one for one in patterns if satisfied and all(one in found for found in satisfied)),
        zero_blocks=_blocks_total(tensors),
        runtimes=_runtimes_total(tensors, matrices),
    )


def total(values: Iterable[int | None]) -> int | None:
    """The sum of the values that are known, None if none is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _blocks_total(tensors: Iterable[InspectedTensor]) -> dict[str, ZeroBlocks]:
    counts: dict[str, list[ZeroBlocks]] = {}
    for tensor in tensors:
        for shape, count in tensor.zero_blocks.items():
            counts.setdefault(shape, []).append(count)
    return {
        shape: ZeroBlocks(zero=sum(one.zero for one in found), of=sum(one.of for one in found))
        for shape, found in counts.items()
    }


def _runtimes_total(
    tensors: Sequence[InspectedTensor], matrices: Sequence[InspectedTensor]
) -> dict[str, RuntimeCount] | None:
    """How many of these matrices each runtime can run sparse, None if none was asked for."""
    names = dict.fromkeys(name for tensor in tensors for name in tensor.runtimes or ())
    verdicts = [matrix.runtimes or {} for matrix in matrices]
    return {
        name: RuntimeCount(eligible=sum(found[name].eligible for found in verdicts), of=len(matrices))
        for name in names
    } or None


def _module(name: str) -> str:
    module, dot, parameter = name.rpartition(".")
    return module if dot and module and parameter in _PARAMETER else name


def is_number(piece: str) -> bool:
    """Whether a piece of a name is the number of a layer or an expert."""
    return piece.isdigit() and piece.isascii()


_SUMMED = ("zeros", "nonfinite", "rows", "zero_rows", "columns", "zero_columns")
NUMBERS = ("numel", "zeros", "sparsity", "nonfinite", "rows", "zero_rows", "columns", "zero_columns")
"""The fields of every tensor that are one number each."""


def make_inspection(
    path: str,
    facts: Iterable[TensorFacts],
    questions: Questions,
    runtimes: Sequence[Runtime] = (),
    grouping: Grouping | None = None,
    not_read: Iterable[OtherFile] = (),
) -> Inspection:
    """The result of `inspect`, its tensors in the order of the facts.

    It has the answers to `questions`, of all that were asked for the sake of `runtimes`, and whether these
    can use each tensor. `not_read` are files beside the checkpoint with another copy of its dense weights.
    """
    patterns = [str(pattern) for pattern in questions.patterns]
    blocks = [str(block) for block in questions.blocks]
    tensors = tuple(_inspected(one, patterns, blocks, runtimes) for one in facts)
    return Inspection(
        input=path,
        files_not_read=other_weights(not_read),
        totals=_totals(tensors, patterns, blocks, runtimes),
        by=None if grouping is None else grouping.by,
        groups=None if grouping is None else grouped(tensors, grouping, patterns),
        tensors=tensors,
    )


def fields_of(questions: Questions) -> tuple[str, ...]:
    """The flat names of the numbers that every tensor of a document has."""
    return (*NUMBERS, *(f"zero_blocks_{block}" for block in questions.blocks))


def sheet_of(found: Inspection) -> tuple[list[str], list[list[object]]]:
    """The titles and rows of a sheet of the groups, or of the tensors if there are none."""
    totals = found.totals
    is_grouped = found.groups is not None
    explained = "of" if is_grouped else "reason"
    columns = [
        "name",
        *(("tensors", "matrices") if is_grouped else ("dtype", "shape")),
        *NUMBERS[:4],
        "patterns",
        *NUMBERS[4:],
        *(() if is_grouped else ("zero_slices",)),
        *(title for shape in totals.zero_blocks for title in _pair(f"zero_blocks_{shape}", "of")),
        *(title for name in totals.runtimes or () for title in _pair(f"runtimes_{name}", explained)),
    ]
    rows = []
    for row in found.tensors if found.groups is None else found.groups:
        cells = flat(row)
        if not is_grouped:
            cells["shape"] = "x".join(map(str, cells["shape"]))
        rows.append([cells.get(column) for column in columns])
    return columns, rows


def _pair(name: str, explained: str) -> tuple[str, str]:
    return name, f"{name}_{explained}"


def _inspected(
    one: TensorFacts, patterns: Sequence[str], blocks: Sequence[str], runtimes: Sequence[Runtime]
) -> InspectedTensor:
    counts, rows, columns = one.blocks or {}, one.rows, one.columns
    verdicts = {runtime.name: verdict(runtime, one) for runtime in runtimes}
    there = [shape for shape in blocks if shape in counts]
    return InspectedTensor(
        name=one.name,
        dtype=one.dtype,
        shape=one.shape,
        numel=one.numel,
        zeros=one.zeros,
        sparsity=None if one.zeros is None else share(one.zeros, one.numel),
        nonfinite=one.nonfinite,
        patterns=tuple(pattern for pattern in patterns if pattern in one.patterns),
        rows=None if rows is None else rows.of,
        zero_rows=None if rows is None else rows.zero,
        columns=None if columns is None else columns.of,
        zero_columns=None if columns is None else columns.zero,
        zero_slices=None if one.slices is None else tuple(index.zero for index in one.slices),
        zero_blocks={shape: ZeroBlocks(zero=counts[shape].zero, of=counts[shape].of) for shape in there},
        runtimes=verdicts or None,
        holds=one.holds,
    )


def _totals(
    tensors: Sequence[InspectedTensor],
    patterns: Sequence[str],
    blocks: Sequence[str],
    runtimes: Sequence[Runtime],
) -> InspectTotals:
    """Sums over all tensors; elements less than a byte are taken as not zero, packed codes are left out."""
    whole = summed("", tensors, patterns)
    weights = [one for one in tensors if one.holds != "beside"]
    sums = {key: getattr(whole, key) or 0 for key in _SUMMED}
    pruned = sums.pop("zeros")
    numel = whole.numel - sum(one.numel for one in tensors if one.holds == "packed")
    dtypes = [one.dtype for one in weights if len(one.shape) > 1]
    none = RuntimeCount(eligible=0, of=0)
    eligible = {
        one.name: RuntimeTotals(
            eligible=(whole.runtimes or {}).get(one.name, none).eligible,
            of=whole.matrices,
            device=one.device_for(dtypes),
            state=one.state,
            source=one.source,
            date=one.date,
        )
        for one in runtimes
    }
    return InspectTotals(
        tensors=len(tensors),
        matrices=whole.matrices,
        uncounted=sum(one.zeros is None for one in tensors),
        numel=numel,
        pruned=pruned,
        sparsity=share(pruned, numel),
        patterns={pattern: sum(pattern in one.patterns for one in weights) for pattern in patterns},
        **sums,
        zero_blocks={shape: whole.zero_blocks.get(shape, ZeroBlocks(zero=0, of=0)) for shape in blocks},
        runtimes=eligible or None,
    )
