"""What `inspect` finds as a document: tensors, groups of alike tensors, patterns, runtimes.

Owns grouping by name and how names are listed. Prints nothing. Called by the command line and requirements.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparseprune import __version__
from sparseprune.errors import SparsepruneError, printable
from sparseprune.report.document import file_entries, share
from sparseprune.report.runtimes import verdict
from sparseprune.report.wording import many
from sparseprune.spec.patterns import PatternError, parse_pattern
from sparseprune.spec.problems import nearest, shown, suggestion

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from sparseprune.checkpoint import OtherFile
    from sparseprune.report.facts import Questions, TensorFacts
    from sparseprune.report.runtimes import Runtime
    from sparseprune.spec import BoundSpec
    from sparseprune.spec.patterns import TensorPattern

    Entry = Mapping[str, Any]

"""A tensor or a group in a document: a mapping of names to numbers, texts, lists and mappings."""

_DIGITS = re.compile(r"([0-9]+)")
_MOST_COMPARED = 1000
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
    wanted = _matched(match, there) if match else set(there)
    patterns = [_pattern("--exclude", text) for text in exclude]
    unwanted = {name for name in wanted if any(pattern.match(name) is not None for pattern in patterns)}
    left = tuple(name for name in there if name in wanted and name not in unwanted)
    if unwanted and not left:
        words = "--match and --exclude" if match else "--exclude"
        raise SparsepruneError(f"{words}: of {many(len(there), 'tensor')} none is left; exclude fewer")
    return left


def ordered(entries: Iterable[Entry], key: str | None, reverse: bool) -> list[Entry]:  # noqa: FBT001
    """Entries by one of their facts, the smallest first; as they stand for None.

    `key` is a flat name (`flat`), the end of one that no other has ("4x4"), or a title of a name's column.
    Names are in their natural order, what is not known comes last, equals stay as they stand.
    SparsepruneError for a key that no entry has, with the nearest one.

    >>> [entry["name"] for entry in ordered([{"name": "h.10"}, {"name": "h.9"}], "name", False)]
    ['h.9', 'h.10']
    """
    there = list(entries)
    if key is None or not there:
        return there[::-1] if reverse else there
    facts = [flat(entry) for entry in there]
    found = _key_of(key, dict.fromkeys(name for fact in facts for name in fact))
    values = [fact.get(found) for fact in facts]
    known = [at for at, value in enumerate(values) if value is not None]
    unknown = [at for at, value in enumerate(values) if value is None]
    known.sort(key=lambda at: _rank(values[at]), reverse=reverse)
    return [there[at] for at in (*known, *unknown)]


def flat(entry: Entry) -> dict[str, Any]:
    """The facts of an entry without nesting, as a sheet of a spreadsheet names its columns.

    >>> flat({"name": "w", "shape": [8, 4], "zero_blocks": {"4x4": {"zero": 1, "of": 2}}})
    {'name': 'w', 'shape': [8, 4], 'zero_blocks_4x4': 1, 'zero_blocks_4x4_of': 2}
    """
    return dict(_flat(entry, ""))


def natural(name: str) -> tuple[tuple[str, int, str], ...]:
    """A name as a key to sort by: numbers in it count as numbers, of any length.

    >>> sorted(["h.10.w", "h.9.w", "a"], key=natural)
    ['a', 'h.9.w', 'h.10.w']
    """
    pieces = _DIGITS.split(name)
    texts, numbers = pieces[::2], [*(digits.lstrip("0") for digits in pieces[1::2]), ""]
    return tuple((text, len(digits), digits) for text, digits in zip(texts, numbers, strict=True))


def _matched(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    """The names that some of the patterns match; each has to match one."""
    matched: set[str] = set()
    for text in patterns:
        pattern = _pattern("--match", text)
        found = [name for name in names if pattern.match(name) is not None]
        if not found:
            hint = _hint(text, pattern, names)
            raise SparsepruneError(printable(f"--match {text}: matches none of {hint}"))
        matched.update(found)
    return matched


def _pattern(option: str, text: str) -> TensorPattern:
    try:
        return parse_pattern(text)
    except PatternError as error:
        raise SparsepruneError(printable(f"{option} {text}: {error}")) from None


def _hint(text: str, pattern: TensorPattern, names: Sequence[str]) -> str:
    """How many tensors there are, and what was meant or what one of them is called."""
    count = many(len(names), "tensor")
    below = f"{text.rstrip('.')}.**"
    if names and text.strip(".*") and any(parse_pattern(below).match(name) is not None for name in names):
        return f"{count}; did you mean {below}?"
    forms: dict[str, str] = {}  # names that differ in numbers resemble the pattern equally
    for name in names:
        forms.setdefault(_DIGITS.sub("0", name), name)
    close = [forms[form] for form in nearest(pattern.sample, list(forms)[:_MOST_COMPARED])] or names[:1]
    return f"{count}, such as {shown(close[0])}" if close else count


def _flat(entry: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in entry.items():
        name = prefix if prefix and key in _HEADS else f"{prefix}_{key}" if prefix else key
        if isinstance(value, dict):
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
_REPEATED = "*"
# Last pieces of names that tell which parameter of its module a tensor is, not which module.
_PARAMETERS = {
    "bias",
    "g_idx",
    "input_scale",
    "num_batches_tracked",
    "qweight",
    "qzeros",
    "running_mean",
    "running_var",
    "scales",
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_scale_inv",
    "weight_shape",
    "weight_zero_point",
}


@dataclass(frozen=True, slots=True)
class Grouping:
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
        rank = {rule: at for at, rule in enumerate(dict.fromkeys(reached.values()))}
        found = {name: reached.get(name, NO_RULE) for name in names}
        ordered = sorted(found, key=lambda name: rank.get(found[name], len(rank)))
    else:
        group_of: Callable[[str], str] = layer_of if by == "layer" else module_of
        found = {name: group_of(name) for name in names}
        ordered = sorted(found, key=lambda name: natural(found[name]))
    return Grouping(by, {name: found[name] for name in ordered})


def layer_of(name: str) -> str:
    """A name up to its first piece of digits; where there is none, the module that the tensor belongs to.

    >>> layer_of("model.layers.3.mlp.experts.7.w1.weight"), layer_of("model.embed_tokens.weight")
    ('model.layers.3', 'model.embed_tokens')
    """
    pieces = name.split(".")
    for at, piece in enumerate(pieces):
        if _is_number(piece):
            return ".".join(pieces[: at + 1])
    return _module(name)


def module_of(name: str) -> str:
    """The module that a tensor belongs to, with a * for every number: one for all layers and experts.

    >>> module_of("model.layers.3.mlp.experts.7.w1.weight"), module_of("model.layers.3.experts.gate_up_proj")
    ('model.layers.*.mlp.experts.*.w1', 'model.layers.*.experts.gate_up_proj')
    """
    return ".".join([_REPEATED if _is_number(piece) else piece for piece in _module(name).split(".")])


def rules_of_spec(bound: BoundSpec) -> dict[str, str]:
    """For each tensor that a spec reaches the rules that do, in the order of the spec."""
    found: dict[str, dict[str, None]] = {}
    for rule, instance in bound.instances():
        for leaf in instance.scope.leaves:
            found.setdefault(leaf.tensor, {})[rule.name] = None
    return {name: ", ".join(rules) for name, rules in found.items()}


def rules_of_report(report: Mapping[str, Any]) -> dict[str, str]:
    """For each tensor that a report.json tells of the rules that reached it; empty where it names none."""
    entries = report.get("tensors")
    return {
        entry["name"]: entry["rule"]
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("rule"), str)
    }


def grouped(entries: Sequence[Entry], grouping: Grouping, patterns: Sequence[str]) -> list[dict[str, Any]]:
    """An entry for each group, in their order; `patterns` are those that were looked for."""
    members: dict[str, list[Entry]] = {group: [] for group in grouping.groups.values()}
    for entry in entries:
        members[grouping.groups[entry["name"]]].append(entry)
    return [{"name": group, **summed(found, patterns)} for group, found in members.items()]


def summed(entries: Sequence[Entry], patterns: Sequence[str]) -> dict[str, Any]:
    """The facts of several tensors as those of one.

    Sums are over the tensors whose elements could be looked at, None where there is none. Of `patterns`
    those are given that all its matrices satisfy, if there is one that has elements.
    """
    matrices = [entry for entry in entries if len(entry["shape"]) > 1]
    filled = [entry for entry in matrices if entry["numel"]]
    zeros = total(entries, "zeros")
    known = sum(entry["numel"] for entry in entries if entry["zeros"] is not None)
    facts: dict[str, Any] = {
        "tensors": len(entries),
        "matrices": len(matrices),
        "numel": sum(entry["numel"] for entry in entries),
        "zeros": zeros,
        "sparsity": None if zeros is None else share(zeros, known),
        "nonfinite": total(entries, "nonfinite"),
        "patterns": [one for one in patterns if filled and all(one in entry["patterns"] for entry in filled)],
        **{key: total(entries, key) for key in ("rows", "zero_rows", "columns", "zero_columns")},
        "zero_blocks": blocks_total(entries),
    }
    runtimes = dict.fromkeys(name for entry in entries for name in entry.get("runtimes", ()))
    if runtimes:
        facts["runtimes"] = {
            name: {
                "eligible": sum(entry["runtimes"][name]["eligible"] for entry in matrices),
                "of": len(matrices),
            }
            for name in runtimes
        }
    return facts


def total(entries: Iterable[Entry], key: str) -> int | None:
    """The sum of a fact over the entries that have it, None where none has."""
    known = [entry[key] for entry in entries if entry[key] is not None]
    return sum(known) if known else None


def blocks_total(entries: Iterable[Entry]) -> dict[str, dict[str, int]]:
    """Zero blocks by their shape, and how many there are."""
    sums: dict[str, dict[str, int]] = {}
    for entry in entries:
        for shape, count in entry["zero_blocks"].items():
            before = sums.get(shape, {"zero": 0, "of": 0})
            sums[shape] = {key: before[key] + count[key] for key in ("zero", "of")}
    return sums


def _module(name: str) -> str:
    module, dot, parameter = name.rpartition(".")
    return module if dot and module and parameter in _PARAMETERS else name


def _is_number(piece: str) -> bool:
    return piece.isdigit() and piece.isascii()


INSPECT_SCHEMA = "sparseprune.inspect.v2"
NUMBERS = (
    "numel",
    "zeros",
    "sparsity",
    "nonfinite",
    "rows",
    "zero_rows",
    "columns",
    "zero_columns",
)
"""The facts of every tensor that are one number each."""


@dataclass(frozen=True, slots=True)
class Telling:
    """What is told besides the facts.

    `questions` are those whose answers are told: more have to be asked for the sake of the `runtimes`, which
    are asked whether they can use each tensor.
    """

    questions: Questions
    runtimes: tuple[Runtime, ...] = ()
    grouping: Grouping | None = None


def inspect_document(
    path: str, facts: Iterable[TensorFacts], telling: Telling, not_read: Iterable[OtherFile] = ()
) -> dict[str, Any]:
    """The facts as plain data, in the shape of schemas/inspect.schema.json; tensors as they stand.

    `not_read` are files beside the checkpoint that hold its dense weights once more.
    """
    patterns = [str(pattern) for pattern in telling.questions.patterns]
    blocks = [str(block) for block in telling.questions.blocks]
    tensors = [_tensor_entry(one, patterns, blocks, telling.runtimes) for one in facts]
    document: dict[str, Any] = {
        "schema": INSPECT_SCHEMA,
        "sparseprune": __version__,
        "input": path,
        "files_not_read": file_entries(not_read),
        "totals": _totals(tensors, patterns, blocks, telling.runtimes),
    }
    if telling.grouping is not None:
        document["by"] = telling.grouping.by
        document["groups"] = grouped(tensors, telling.grouping, patterns)
    return document | {"tensors": tensors}


def fields_of(questions: Questions) -> tuple[str, ...]:
    """The flat names of the numbers that every tensor of a document has."""
    return (*NUMBERS, *(f"zero_blocks_{block}" for block in questions.blocks))


def sheet_of(document: Mapping[str, Any]) -> tuple[list[str], list[list[object]]]:
    """The titles and rows of a sheet of the groups, or of the tensors where there are none."""
    totals = document["totals"]
    is_grouped = "groups" in document
    explained = "of" if is_grouped else "reason"
    columns = [
        "name",
        *(("tensors", "matrices") if is_grouped else ("dtype", "shape")),
        *NUMBERS[:4],
        "patterns",
        *NUMBERS[4:],
        *(() if is_grouped else ("zero_slices",)),
        *(title for shape in totals["zero_blocks"] for title in _pair(f"zero_blocks_{shape}", "of")),
        *(title for name in totals.get("runtimes", ()) for title in _pair(f"runtimes_{name}", explained)),
    ]
    rows = []
    for entry in document["groups" if is_grouped else "tensors"]:
        cells = flat(entry)
        if not is_grouped:
            cells["shape"] = "x".join(map(str, entry["shape"]))
        rows.append([cells.get(column) for column in columns])
    return columns, rows


def _pair(name: str, explained: str) -> tuple[str, str]:
    return name, f"{name}_{explained}"


def _tensor_entry(
    one: TensorFacts,
    patterns: Sequence[str],
    blocks: Sequence[str],
    runtimes: Sequence[Runtime],
) -> dict[str, Any]:
    counts = one.blocks or {}
    entry: dict[str, Any] = {
        "name": one.name,
        "dtype": one.dtype,
        "shape": list(one.shape),
        "numel": one.numel,
        "zeros": one.zeros,
        "sparsity": None if one.zeros is None else share(one.zeros, one.numel),
        "nonfinite": one.nonfinite,
        "patterns": [pattern for pattern in patterns if pattern in one.patterns],
        "rows": one.rows and one.rows.of,
        "zero_rows": one.rows and one.rows.zero,
        "columns": one.columns and one.columns.of,
        "zero_columns": one.columns and one.columns.zero,
        "zero_slices": None if one.slices is None else [index.zero for index in one.slices],
        "zero_blocks": {
            shape: {"zero": counts[shape].zero, "of": counts[shape].of} for shape in blocks if shape in counts
        },
    }
    if runtimes:
        given = {runtime.name: verdict(runtime, one) for runtime in runtimes}
        entry["runtimes"] = {
            name: {"eligible": found.eligible, "reason": found.reason} for name, found in given.items()
        }
    return entry


def _totals(
    tensors: Sequence[Mapping[str, Any]],
    patterns: Sequence[str],
    blocks: Sequence[str],
    runtimes: Sequence[Runtime],
) -> dict[str, Any]:
    """Sums over all tensors; what cannot be looked at counts as not zero."""
    facts = summed(tensors, patterns)
    zeros = facts["zeros"] or 0
    none = {"zero": 0, "of": 0}
    totals = {
        "tensors": len(tensors),
        "matrices": facts["matrices"],
        "uncounted": sum(one["zeros"] is None for one in tensors),
        "numel": facts["numel"],
        "pruned": zeros,
        "sparsity": share(zeros, facts["numel"]),
        "nonfinite": facts["nonfinite"] or 0,
        "patterns": {
            pattern: sum(pattern in tensor["patterns"] for tensor in tensors) for pattern in patterns
        },
        **{key: facts[key] or 0 for key in ("rows", "zero_rows", "columns", "zero_columns")},
        "zero_blocks": {shape: facts["zero_blocks"].get(shape, none) for shape in blocks},
    }
    if runtimes:
        found = facts.get("runtimes", {})
        dtypes = [one["dtype"] for one in tensors if len(one["shape"]) > 1]
        totals["runtimes"] = {
            one.name: {**found.get(one.name, {"eligible": 0, "of": 0}), "device": one.device_for(dtypes)}
            for one in runtimes
        }
    return totals
