"""What `verify` and `reapply` show: results of checks with a spec or with masks, and their tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from sparseprune.engine.grids import prod
from sparseprune.errors import printable
from sparseprune.report.coverage import coverage_text, coverage_totals
from sparseprune.report.tables import Column, Fact, FittedTable, budget_text, filled
from sparseprune.report.wording import (
    copies_line,
    energy_kept,
    many,
    number_text,
    percent,
    place_text,
    shape_text,
    share,
)
from sparseprune.results.checking import MaskCheckedTensor, MaskedTotals, ReappliedTensor, VerifyTotals

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import RenderableType

    from sparseprune.checkpoint import Checkpoint
    from sparseprune.execution.reapply import LostZeros, Reapplied
    from sparseprune.execution.verify import Verification as Found
    from sparseprune.report.coverage import Coverage
    from sparseprune.results import MaskVerification, Reapplication, Verification
    from sparseprune.results.checking import BrokenScope, CheckedRule, CheckedTensor, LeftOut, MaskedTensor


def verify_totals(found: Found, coverage: Coverage) -> VerifyTotals:
    """The totals of `verify` with a spec."""
    return VerifyTotals(
        scopes=sum(rule.scopes for rule in found.rules),
        broken=sum(rule.broken for rule in found.rules),
        tensors=len({tensor.name for tensor in found.tensors}),
        numel=coverage.numel,
        checked=coverage.reached,
        **coverage_totals(coverage),
    )


def verify_table(found: Verification, *, summary: bool = False) -> RenderableType:
    """The rules, broken tensors with their first places unless in a summary, and the totals."""
    totals = found.totals
    parts: list[RenderableType] = [_rules_table(found.rules)]
    if any(tensor.broken for tensor in found.tensors):
        parts += [] if summary else [Text(), _broken_table(found.tensors), Text()]
    elif totals.scopes and not any(map(_is_over, found.rules)):
        scopes = "the one scope is" if totals.scopes == 1 else f"all {totals.scopes:,} scopes are"
        parts.append(Text(f"{scopes} as the spec says"))
    checked = f"checked {totals.checked:,} of {many(totals.numel, 'parameter')}"
    parts.append(Text(printable(", ".join(filter(None, (checked, coverage_text(totals)))))))
    unchecked = [rule for rule in found.rules if rule.unchecked is not None]
    parts += [Text(f"{printable(rule.name)} is not checked: {rule.unchecked}") for rule in unchecked]
    parts += map(Text, _together_lines([rule for rule in found.rules if not _is_over(rule)]))
    return Group(*parts, *map(Text, copies_line("not looked at", found.files_not_read)))


def broken_lines(found: Verification) -> list[str]:
    """Lines that sum up what is broken."""
    scopes = [_broken_line(found)] if found.totals.broken else []
    return [*scopes, *_together_lines(filter(_is_over, found.rules))]


def _together_lines(rules: Iterable[CheckedRule]) -> Iterator[str]:
    """A line for each rule whose instances share a budget of which no parts are known."""
    for rule in rules:
        if rule.together is not None:
            nonzero, allowed = rule.together.nonzero, rule.together.allowed
            kept = f"{nonzero:,} of {allowed:,} elements that may survive together do"
            yield f"{printable(rule.name)} shares one budget, and no report tells its parts: {kept}"


def _is_over(rule: CheckedRule) -> bool:
    return rule.together is not None and rule.together.nonzero > rule.together.allowed


def _broken_line(found: Verification) -> str:
    """One line that sums up which scopes are broken."""
    broken, scopes, tensors = found.totals.broken, found.totals.scopes, found.totals.tensors
    names = {tensor.name for tensor in found.tensors if tensor.broken}
    share = f"{broken:,} of {many(scopes, 'scope')} {_are(broken)} broken"
    return f"{share}, in {len(names):,} of {many(tensors, 'tensor')}"


def failures(found: Verification) -> list[str]:
    """A line for every tensor that broken scopes reach, and for every rule that keeps too much together."""
    scopes = [_failure(tensor, tensor.first) for tensor in found.tensors if tensor.broken and tensor.first]
    return [*scopes, *_together_lines(filter(_is_over, found.rules))]


def _failure(tensor: CheckedTensor, first: BrokenScope) -> str:
    one = tensor.broken == 1
    noun = "block" if first.allowed is None else "scope"
    share = f"{printable(tensor.name)}: {tensor.broken:,} of {many(tensor.scopes, noun)}"
    share += f" of {_rule_text(tensor.rule, tensor.along)}"
    place = f"{place_text(first.scope)} (element {place_text(first.element)})"
    if first.allowed is None:
        limit = "the threshold" if tensor.threshold is None else f"{tensor.threshold:g}"
        though = f"{_are(tensor.broken)} not zero though {'it scores' if one else 'they score'}"
        return f"{share} {though} less than {limit}; the first is at {place}"
    limit, where = "too many non-zero blocks", f" where {first.allowed:,} may be"
    if tensor.nnz is not None:
        limit, where = f"more than {many(tensor.nnz, 'non-zero block')}", ""
    text = f"{share} {'holds' if one else 'hold'} {limit}; the first at {place} has {first.nonzero:,}{where}"
    if tensor.torn:
        torn = f"{many(tensor.torn, 'fused block')} {_are(tensor.torn)}"
        text += f"; {torn} not zero here but zero in another tensor"
    return text


def _rule_text(rule: str, along: str | None) -> str:
    """A rule's name, and the lines of tiles that are its scopes."""
    return f"{rule} {along}" if along else rule


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _rules_table(rules: Sequence[CheckedRule]) -> FittedTable:
    facts: list[Fact[CheckedRule]] = [
        Fact(Column("rule", "left"), lambda one: _rule_text(one.name, one.along)),
        Fact(Column("tensors", spare=1), lambda one: f"{one.tensors:,}"),
        Fact(Column("scopes"), lambda one: f"{one.scopes:,}"),
        Fact(Column("may survive"), lambda one: budget_text(one, "score")),
        Fact(Column("fullest", spare=2), lambda one: f"{one.survivors[-1][0]:,}" if one.survivors else ""),
        Fact(Column("broken"), lambda one: "not checked" if one.unchecked is not None else f"{one.broken:,}"),
    ]
    return FittedTable(*filled(facts, rules), elsewhere=" or --json")


def _broken_table(tensors: Iterable[CheckedTensor]) -> FittedTable:
    facts: list[Fact[tuple[CheckedTensor, BrokenScope]]] = [
        Fact(Column("tensor", "left"), lambda one: one[0].name),
        Fact(Column("rule", "left", spare=3), lambda one: _rule_text(one[0].rule, one[0].along)),
        Fact(Column("broken"), lambda one: f"{one[0].broken:,}"),
        Fact(Column("of", spare=2), lambda one: f"{one[0].scopes:,}"),
        Fact(Column("first scope", "left"), lambda one: place_text(one[1].scope)),
        Fact(Column("element", "left", spare=1), lambda one: place_text(one[1].element)),
        Fact(Column("non-zero"), lambda one: f"{one[1].nonzero:,}"),
        Fact(Column("allowed", spare=4), lambda one: number_text(one[1].allowed, "none so small")),
        Fact(Column("torn", spare=5), lambda one: f"{one[0].torn:,}", frozenset({"0"})),
    ]
    broken = [(tensor, tensor.first) for tensor in tensors if tensor.broken and tensor.first]
    return FittedTable(*filled(facts, broken), elsewhere=" or --json")


def masked_totals(checkpoint: Checkpoint, tensors: Sequence[Reapplied | LostZeros]) -> MaskedTotals:
    """The totals of `reapply`, and of `verify --masks` but for how many tensors failed."""
    stored = checkpoint.tensors
    numel = sum(one.numel for one in stored.values())
    pruned = sum(tensor.pruned for tensor in tensors)
    return MaskedTotals(
        tensors=len(stored),
        numel=numel,
        masked=sum(stored[tensor.name].numel for tensor in tensors),
        pruned=pruned,
        lost=sum(tensor.lost for tensor in tensors),
        sparsity=share(pruned, numel),
    )


def reapplied_tensor(tensor: Reapplied) -> ReappliedTensor:
    """A tensor that got its zeros back."""
    return ReappliedTensor(
        **_counted(tensor),
        zeros_before=tensor.before.zeros,
        zeros_after=tensor.after.zeros,
        energy_kept=energy_kept(tensor.before, tensor.after),
    )


def mask_checked_tensor(tensor: LostZeros) -> MaskCheckedTensor:
    """A tensor that may have lost zeros."""
    return MaskCheckedTensor(**_counted(tensor), first=tensor.first)


def _counted(tensor: Reapplied | LostZeros) -> dict[str, Any]:
    same = {key: getattr(tensor, key) for key in ("name", "dtype", "shape", "pruned", "lost")}
    return {**same, "numel": prod(tensor.shape)}


def reapply_table(found: Reapplication, most: int | None = None) -> FittedTable:
    """Lost zeros of each tensor; or of those that lost `most` of them, so many."""
    tensors = found.tensors
    if most is not None:
        lost = [tensor for tensor in tensors if tensor.lost]
        tensors = sorted(lost, key=lambda tensor: -tensor.lost)[:most]
    totals = found.totals if len(tensors) == len(found.tensors) else None
    energy: Fact[ReappliedTensor] = Fact(Column("energy kept", spare=1), lambda one: percent(one.energy_kept))
    name, dtype, *counts = _masked_facts(totals, len(tensors))
    return FittedTable(*filled([name, dtype, *counts, energy], tensors), elsewhere=" or --json")


def verify_masks_table(found: MaskVerification) -> FittedTable:
    """Lost zeros of each tensor, and where the first one is."""
    name, dtype, *counts = _masked_facts(found.totals, len(found.tensors))
    facts: list[Fact[MaskCheckedTensor]] = [
        name,
        dtype,
        Fact(Column("shape", "left", spare=1), lambda one: shape_text(one.shape)),
        *counts,
        Fact(Column("first lost", "left"), lambda one: place_text(one.first)),
    ]
    return FittedTable(*filled(facts, found.tensors), elsewhere=" or --json")


def _masked_facts(totals: MaskedTotals | None, tensors: int) -> list[Fact[MaskedTensor]]:
    footers = ("", "", "", "") if totals is None else (f"total of {tensors:,}", *_counts(totals))
    return [
        Fact(Column("tensor", "left", footers[0]), lambda one: one.name),
        Fact(Column("dtype", "left", spare=2), lambda one: one.dtype),
        Fact(Column("dropped", footer=footers[1]), lambda one: _counts(one)[0]),
        Fact(Column("lost", footer=footers[2]), lambda one: _counts(one)[1]),
        Fact(Column("of dropped", footer=footers[3]), lambda one: _counts(one)[2]),
    ]


def _counts(counted: MaskedTensor | MaskedTotals) -> tuple[str, str, str]:
    return f"{counted.pruned:,}", f"{counted.lost:,}", percent(share(counted.lost, counted.pruned))


def lost_lines(found: MaskVerification) -> Iterator[str]:
    """A line for each tensor that lost zeros."""
    for one in found.tensors:
        if one.lost:
            lost = f"{one.lost:,} of {one.pruned:,} elements that the mask drops {_are(one.lost)} not zero"
            yield f"{printable(one.name)}: {lost}, first {place_text(one.first)}"


def lost_line(found: MaskVerification) -> str:
    """How much was lost in all, as one line."""
    totals = found.totals
    lost = f"{totals.lost:,} of {many(totals.pruned, 'element')} that masks drop {_are(totals.lost)} not zero"
    return f"{lost}, in {totals.failed:,} of {many(len(found.tensors), 'tensor')}"


def left_out_text(found: LeftOut) -> str | None:
    """The masks without a tensor and the tensors without a mask that are ignored; None if there are none."""
    counts = (found.masks, "mask", "tensor"), (found.tensors, "tensor", "mask")
    parts = [f"{many(count, noun)} without a {other}" for count, noun, other in counts if count]
    return f"{' and '.join(parts)} left out" if parts else None
