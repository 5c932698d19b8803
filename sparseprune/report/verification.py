"""The result of `verify` with a spec, its table, and a line for every tensor that breaks the spec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from sparseprune.errors import printable
from sparseprune.report.coverage import coverage_text, coverage_totals
from sparseprune.report.document import copies_line, other_weights
from sparseprune.report.tables import Column, FittedTable
from sparseprune.report.wording import each_text, many, place_text
from sparseprune.results.checking import BrokenScope, CheckedRule, CheckedTensor, Verification, VerifyTotals

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import RenderableType

    from sparseprune.checkpoint import OtherFile
    from sparseprune.execution.verify_result import Verification as Found
    from sparseprune.report.coverage import Coverage


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


def make_verification(asked: AskedCheck, found: Found) -> Verification:
    """The result of `verify` with a spec."""
    return Verification(
        input=asked.input,
        spec=asked.spec,
        set=dict(asked.overrides),
        warnings=tuple(asked.warnings),
        files_not_read=other_weights(asked.not_read),
        totals=VerifyTotals(
            scopes=sum(rule.scopes for rule in found.rules),
            broken=sum(rule.broken for rule in found.rules),
            tensors=len({tensor.name for tensor in found.tensors}),
            numel=asked.coverage.numel,
            checked=asked.coverage.reached,
            **coverage_totals(asked.coverage),
        ),
        rules=found.rules,
        tensors=found.tensors,
    )


def verify_table(found: Verification) -> RenderableType:
    """The rules, broken tensors with their first places, and the totals."""
    parts: list[RenderableType] = [_rules_table(found.rules)]
    broken = [tensor for tensor in found.tensors if tensor.broken]
    if broken:
        parts += [Text(), _broken_table(broken)]
        parts.append(Text())
    totals = found.totals
    if not broken and totals.scopes:
        scopes = "the one scope is" if totals.scopes == 1 else f"all {totals.scopes:,} scopes are"
        parts.append(Text(f"{scopes} as the spec says"))
    checked = f"checked {totals.checked:,} of {many(totals.numel, 'parameter')}"
    parts.append(Text(printable(", ".join(filter(None, (checked, coverage_text(totals)))))))
    unchecked = [rule for rule in found.rules if rule.unchecked is not None]
    parts += [Text(f"{printable(rule.name)} is not checked: {rule.unchecked}") for rule in unchecked]
    parts += map(Text, copies_line("not looked at", found.files_not_read))
    return Group(*parts)


def broken_line(found: Verification) -> str:
    """One line that sums up what is broken."""
    totals = found.totals
    names = {tensor.name for tensor in found.tensors if tensor.broken}
    return (
        f"{_share(totals.broken, totals.scopes, 'scope')} broken, "
        f"in {len(names):,} of {many(totals.tensors, 'tensor')}"
    )


def failures(found: Verification) -> list[str]:
    """A line for every tensor that broken scopes reach."""
    return [_failure(tensor, tensor.first) for tensor in found.tensors if tensor.broken and tensor.first]


def _failure(tensor: CheckedTensor, first: BrokenScope) -> str:
    one = tensor.broken == 1
    name, place = printable(tensor.name), f"{place_text(first.scope)} (element {place_text(first.element)})"
    if first.allowed is None:
        limit = "the threshold" if tensor.threshold is None else f"{tensor.threshold:g}"
        share = f"{tensor.broken:,} of {many(tensor.scopes, 'block')} of {tensor.rule}"
        verb, subject = ("is", "it scores") if one else ("are", "they score")
        return f"{name}: {share} {verb} not zero though {subject} less than {limit}; the first is at {place}"
    share = f"{tensor.broken:,} of {many(tensor.scopes, 'scope')} of {tensor.rule}"
    hold = "holds" if one else "hold"
    if tensor.nnz is None:
        text = f"{name}: {share} {hold} too many non-zero blocks; the first at {place} has "
        text += f"{first.nonzero:,} where {first.allowed:,} may be"
    else:
        limit = many(tensor.nnz, "non-zero block")
        text = f"{name}: {share} {hold} more than {limit}; the first at {place} has {first.nonzero:,}"
    if tensor.torn:
        are = "is" if tensor.torn == 1 else "are"
        text += f"; {many(tensor.torn, 'fused block')} {are} not zero here but zero in another tensor"
    return text


def _rules_table(rules: Iterable[CheckedRule]) -> FittedTable:
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
            rule.name,
            f"{rule.tensors:,}",
            f"{rule.scopes:,}",
            _allowed(rule),
            f"{rule.survivors[-1][0]:,}" if rule.survivors else "",
            "not checked" if rule.unchecked is not None else f"{rule.broken:,}",
        ]
        for rule in rules
    ]
    return FittedTable(columns, rows, elsewhere=" or --json")


def _broken_table(tensors: Sequence[CheckedTensor]) -> FittedTable:
    torn = any(tensor.torn for tensor in tensors)
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
    rows = [_broken_row(tensor, tensor.first, torn=torn) for tensor in tensors if tensor.first]
    return FittedTable(columns, rows, elsewhere=" or --json")


def _broken_row(tensor: CheckedTensor, first: BrokenScope, *, torn: bool) -> list[str]:
    return [
        tensor.name,
        tensor.rule,
        f"{tensor.broken:,}",
        f"{tensor.scopes:,}",
        place_text(first.scope),
        place_text(first.element),
        f"{first.nonzero:,}",
        "none so small" if first.allowed is None else f"{first.allowed:,}",
        *([f"{tensor.torn:,}"] if torn else []),
    ]


def _allowed(rule: CheckedRule) -> str:
    if rule.nnz is None:
        return f"score >= {each_text(rule.threshold)}"
    return f"{each_text(rule.nnz)} of {each_text(rule.blocks_per_scope)}"


def _share(part: int, whole: int, noun: str) -> str:
    return f"{part:,} of {many(whole, noun)} {'is' if part == 1 else 'are'}"
