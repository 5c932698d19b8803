"""Telling what `verify` found: a document, a table, and a line for every tensor that breaks its spec.

Gives plain data and rich renderables; whoever calls decides on the stream. Reads no checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Group
from rich.text import Text

from sparseprune import __version__
from sparseprune.engine.sequences import Made
from sparseprune.errors import printable
from sparseprune.report.coverage import coverage_text, coverage_totals
from sparseprune.report.document import copies_line, file_entries, one_or_all
from sparseprune.report.tables import Column, FittedTable
from sparseprune.report.wording import many

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import RenderableType

    from sparseprune.checkpoint import OtherFile
    from sparseprune.report.coverage import Coverage

VERIFY_SCHEMA = "sparseprune.verify.v1"


@dataclass(frozen=True, slots=True)
class AskedCheck:
    """What was asked: the checkpoint and the spec as they were named, the variables that were set.

    `not_read` are files beside the checkpoint that hold its dense weights once more.
    """

    input: str
    spec: str
    overrides: Mapping[str, str]
    coverage: Coverage
    warnings: Sequence[str] = ()
    not_read: Sequence[OtherFile] = ()


class BrokenPlace(Protocol):
    """The first broken scope that reaches a tensor; `allowed` is None under a threshold."""

    @property
    def instance(self) -> str: ...
    @property
    def scope(self) -> tuple[int, ...]: ...
    @property
    def element(self) -> tuple[int, ...]: ...
    @property
    def nonzero(self) -> int: ...
    @property
    def allowed(self) -> int | None: ...


class CheckedTensor(Protocol):
    """What was found in the scopes of a rule that reach a tensor."""

    @property
    def name(self) -> str: ...
    @property
    def rule(self) -> str: ...
    @property
    def scopes(self) -> int: ...
    @property
    def broken(self) -> int: ...
    @property
    def torn(self) -> int: ...
    @property
    def allowed(self) -> int | None: ...
    @property
    def threshold(self) -> float | None: ...
    @property
    def first(self) -> BrokenPlace | None: ...


class CheckedRule(Protocol):
    """What was found in the scopes of a rule; budgets and sizes instance by instance."""

    @property
    def name(self) -> str: ...
    @property
    def instances(self) -> int: ...
    @property
    def tensors(self) -> int: ...
    @property
    def scopes(self) -> int: ...
    @property
    def blocks_per_scope(self) -> tuple[int, ...]: ...
    @property
    def nnz(self) -> tuple[int | None, ...]: ...
    @property
    def threshold(self) -> tuple[float | None, ...]: ...
    @property
    def broken(self) -> int: ...
    @property
    def torn(self) -> int: ...
    @property
    def survivors(self) -> Mapping[int, int]: ...
    @property
    def unchecked(self) -> str | None: ...


class CheckedSpec(Protocol):
    """Every rule, and every tensor that was looked at."""

    @property
    def rules(self) -> Sequence[CheckedRule]: ...
    @property
    def tensors(self) -> Sequence[CheckedTensor]: ...


def verify_document(asked: AskedCheck, found: CheckedSpec) -> dict[str, Any]:
    """What was found as plain data, in the shape of schemas/verify.schema.json."""
    return {
        "schema": VERIFY_SCHEMA,
        "sparseprune": __version__,
        "input": asked.input,
        "spec": asked.spec,
        "set": dict(asked.overrides),
        "warnings": list(asked.warnings),
        "files_not_read": file_entries(asked.not_read),
        "totals": {
            "scopes": sum(rule.scopes for rule in found.rules),
            "broken": sum(rule.broken for rule in found.rules),
            "tensors": len({tensor.name for tensor in found.tensors}),
            "numel": asked.coverage.numel,
            "checked": asked.coverage.reached,
            **coverage_totals(asked.coverage),
        },
        "rules": [_rule_entry(rule) for rule in found.rules],
        "tensors": Made(found.tensors, _tensor_entry),
    }


def verify_table(document: Mapping[str, Any]) -> RenderableType:
    """The rules of a document, its broken tensors with their first places, and what it comes to."""
    parts: list[RenderableType] = [_rules_table(document["rules"])]
    broken = [tensor for tensor in document["tensors"] if tensor["broken"]]
    if broken:
        parts += [Text(), _broken_table(broken)]
        parts.append(Text())
    totals = document["totals"]
    if not broken and totals["scopes"]:
        scopes = "the one scope is" if totals["scopes"] == 1 else f"all {totals['scopes']:,} scopes are"
        parts.append(Text(f"{scopes} as the spec says"))
    checked = f"checked {totals['checked']:,} of {many(totals['numel'], 'parameter')}"
    parts.append(Text(printable(", ".join(filter(None, (checked, coverage_text(totals)))))))
    unchecked = [rule for rule in document["rules"] if rule["unchecked"] is not None]
    parts += [Text(f"{printable(rule['name'])} is not checked: {rule['unchecked']}") for rule in unchecked]
    parts += map(Text, copies_line("not looked at", document["files_not_read"]))
    return Group(*parts)


def broken_line(document: Mapping[str, Any]) -> str:
    """One line that sums up what is broken."""
    totals = document["totals"]
    names = {tensor["name"] for tensor in document["tensors"] if tensor["broken"]}
    return (
        f"{_share(totals['broken'], totals['scopes'], 'scope')} broken, "
        f"in {len(names):,} of {many(totals['tensors'], 'tensor')}"
    )


def failures(document: Mapping[str, Any]) -> list[str]:
    """A line for every tensor of a document that is reached by broken scopes."""
    return [_failure(tensor) for tensor in document["tensors"] if tensor["broken"]]


def _failure(tensor: Mapping[str, Any]) -> str:
    first, one = tensor["first"], tensor["broken"] == 1
    name, place = printable(tensor["name"]), f"{first['scope']} (element {first['element']})"
    if first["allowed"] is None:
        limit = "the threshold" if tensor["threshold"] is None else f"{tensor['threshold']:g}"
        share = f"{tensor['broken']:,} of {many(tensor['scopes'], 'block')} of {tensor['rule']}"
        verb, subject = ("is", "it scores") if one else ("are", "they score")
        return f"{name}: {share} {verb} not zero though {subject} less than {limit}; the first is at {place}"
    share = f"{tensor['broken']:,} of {many(tensor['scopes'], 'scope')} of {tensor['rule']}"
    hold = "holds" if one else "hold"
    if tensor["nnz"] is None:
        text = f"{name}: {share} {hold} too many non-zero blocks; the first at {place} has "
        text += f"{first['nonzero']:,} where {first['allowed']:,} may be"
    else:
        limit = many(tensor["nnz"], "non-zero block")
        text = f"{name}: {share} {hold} more than {limit}; the first at {place} has {first['nonzero']:,}"
    if tensor["torn"]:
        are = "is" if tensor["torn"] == 1 else "are"
        text += f"; {many(tensor['torn'], 'fused block')} {are} not zero here but zero in another tensor"
    return text


def _rules_table(rules: Iterable[Mapping[str, Any]]) -> FittedTable:
    columns = [
        Column("rule", "left"),
        Column("tensors", spare=1),
        Column("scopes"),
        Column("may survive"),
        Column("fullest", spare=2),
        Column("broken"),
    ]
    rows = [
        [
            rule["name"],
            f"{rule['tensors']:,}",
            f"{rule['scopes']:,}",
            _allowed(rule),
            f"{rule['survivors'][-1][0]:,}" if rule["survivors"] else "",
            "not checked" if rule["unchecked"] is not None else f"{rule['broken']:,}",
        ]
        for rule in rules
    ]
    return FittedTable(columns, rows, elsewhere=" or --json")


def _broken_table(tensors: Sequence[Mapping[str, Any]]) -> FittedTable:
    torn = any(tensor["torn"] for tensor in tensors)
    columns = [
        Column("tensor", "left"),
        Column("rule", "left", spare=3),
        Column("broken"),
        Column("of", spare=2),
        Column("first scope", "left"),
        Column("element", "left", spare=1),
        Column("non-zero"),
        Column("allowed", spare=4),
        *([Column("torn", spare=5)] if torn else []),
    ]
    return FittedTable(
        columns, [_broken_row(tensor, torn=torn) for tensor in tensors], elsewhere=" or --json"
    )


def _broken_row(tensor: Mapping[str, Any], *, torn: bool) -> list[str]:
    first = tensor["first"]
    return [
        tensor["name"],
        tensor["rule"],
        f"{tensor['broken']:,}",
        f"{tensor['scopes']:,}",
        str(first["scope"]),
        str(first["element"]),
        f"{first['nonzero']:,}",
        "none so small" if first["allowed"] is None else f"{first['allowed']:,}",
        *([f"{tensor['torn']:,}"] if torn else []),
    ]


def _rule_entry(rule: CheckedRule) -> dict[str, Any]:
    return {
        "name": rule.name,
        "instances": rule.instances,
        "tensors": rule.tensors,
        "scopes": rule.scopes,
        "blocks_per_scope": one_or_all(rule.blocks_per_scope),
        "nnz": one_or_all(rule.nnz),
        "threshold": one_or_all(rule.threshold),
        "broken": rule.broken,
        "torn": rule.torn,
        "survivors": [[nonzero, scopes] for nonzero, scopes in sorted(rule.survivors.items())],
        "unchecked": rule.unchecked,
    }


def _tensor_entry(tensor: CheckedTensor) -> dict[str, Any]:
    first = tensor.first
    return {
        "name": tensor.name,
        "rule": tensor.rule,
        "scopes": tensor.scopes,
        "nnz": tensor.allowed,
        "threshold": tensor.threshold,
        "broken": tensor.broken,
        "torn": tensor.torn,
        "first": first
        and {
            "instance": first.instance,
            "scope": list(first.scope),
            "element": list(first.element),
            "nonzero": first.nonzero,
            "allowed": first.allowed,
        },
    }


def _allowed(rule: Mapping[str, Any]) -> str:
    if rule["nnz"] is None:
        return f"score >= {_range(rule['threshold'])}"
    return f"{_range(rule['nnz'])} of {_range(rule['blocks_per_scope'])}"


def _range(values: float | list[float | None] | None) -> str:
    told = [value for value in (values if isinstance(values, list) else [values]) if value is not None]
    ends = (min(told), max(told)) if told else ()
    return " to ".join(dict.fromkeys(f"{value:,}" for value in ends))


def _share(part: int, whole: int, noun: str) -> str:
    return f"{part:,} of {many(whole, noun)} {'is' if part == 1 else 'are'}"
