"""Tensors summed up: by layer, by what is alike in all layers, by the rule of a spec that reached them.

Owns which group a name belongs to and how facts add up. Looks at the entries of an inspect document alone.
Called by what makes that document and by its tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparseprune.report.document import share
from sparseprune.report.listing import natural

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from sparseprune.spec import BoundSpec

    Entry = Mapping[str, Any]

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
