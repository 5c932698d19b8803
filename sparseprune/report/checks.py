"""What `verify` and `reapply` show: results of checks with a spec or with masks, and their tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

from rich.console import Group
from rich.text import Text

from sparseprune.errors import printable
from sparseprune.report.coverage import coverage_text, coverage_totals
from sparseprune.report.pruning import copies_line, energy_kept, other_weights, share
from sparseprune.report.tables import Column, FittedTable
from sparseprune.report.wording import each_text, many, percent, place_text, shape_text
from sparseprune.results.checking import (
    BrokenScope,
    CheckedRule,
    CheckedTensor,
    LeftOut,
    MaskCheckedTensor,
    MaskedTensor,
    MaskedTotals,
    MaskVerification,
    MaskVerifyTotals,
    Reapplication,
    ReappliedTensor,
    Verification,
    VerifyTotals,
)
from sparseprune.results.fields import Made, WrittenBytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import RenderableType

    from sparseprune.checkpoint import Checkpoint, OtherFile
    from sparseprune.engine.grids import Shape
    from sparseprune.execution.reapply import LostZeros, Reapplied
    from sparseprune.execution.verify import Verification as Found
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


@dataclass(frozen=True, slots=True)
class Circumstances:
    """Input and masks as they were named; how many masks and tensors without a counterpart were let be.

    `files` are other copies of the weights beside those that were read: left out of the output of a run that
    writes, not looked at by others. For a run that writes: its `output`, `seconds` of wall time, and the
    variables that were set when the spec was applied that made the masks, as they were typed.
    """

    input: str
    masks: str
    unused: int
    unmasked: int
    output: str = ""
    seconds: float = 0.0
    overrides: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    files: Sequence[OtherFile] = ()
    sizes: tuple[int, int] = (0, 0)


def make_reapply_result(
    run: Circumstances, checkpoint: Checkpoint, tensors: Sequence[Reapplied]
) -> Reapplication:
    """The result of `reapply`."""
    return Reapplication(
        input=run.input,
        masks=run.masks,
        output=run.output,
        set=dict(run.overrides),
        seconds=round(run.seconds, 3),
        warnings=tuple(run.warnings),
        files_left_out=other_weights(run.files),
        left_out=LeftOut(masks=run.unused, tensors=run.unmasked),
        bytes=WrittenBytes(weights=run.sizes[0], masks=run.sizes[1]),
        totals=MaskedTotals(**_totals(checkpoint, tensors)),
        tensors=Made(
            tensors,
            lambda tensor: ReappliedTensor(
                **_counted(tensor, checkpoint),
                zeros_before=tensor.before.zeros,
                zeros_after=tensor.after.zeros,
                energy_kept=energy_kept(tensor.before, tensor.after),
            ),
        ),
    )


def make_mask_verification(
    run: Circumstances, checkpoint: Checkpoint, tensors: Sequence[LostZeros]
) -> MaskVerification:
    """The result of `verify --masks`."""
    failed = sum(tensor.lost > 0 for tensor in tensors)
    return MaskVerification(
        input=run.input,
        masks=run.masks,
        holds=not failed,
        warnings=tuple(run.warnings),
        files_not_read=other_weights(run.files),
        left_out=LeftOut(masks=run.unused, tensors=run.unmasked),
        totals=MaskVerifyTotals(**_totals(checkpoint, tensors), failed=failed),
        tensors=Made(
            tensors, lambda tensor: MaskCheckedTensor(**_counted(tensor, checkpoint), first=tensor.first)
        ),
    )


def reapply_table(found: Reapplication, most: int | None = None) -> FittedTable:
    """Lost zeros of each tensor; or of those that lost `most` of them, so many."""
    tensors = found.tensors
    if most is not None:
        lost = [tensor for tensor in tensors if tensor.lost]
        tensors = sorted(lost, key=lambda tensor: -tensor.lost)[:most]
    whole = len(tensors) == len(found.tensors)
    title, *footers = _footers(found.totals, len(tensors)) if whole else [""] * 5
    columns = [
        Column("tensor", "left", title),
        Column("dtype", "left", spare=2),
        Column("dropped", "right", footers[0]),
        Column("lost", "right", footers[1]),
        Column("of dropped", "right", footers[2]),
        Column("energy kept", "right", spare=1),
    ]
    rows = [
        (
            tensor.name,
            tensor.dtype,
            *_counts(tensor),
            "?" if tensor.energy_kept is None else f"{tensor.energy_kept:.4f}",
        )
        for tensor in tensors
    ]
    return FittedTable(columns, rows, elsewhere=" or --json")


def verify_masks_table(found: MaskVerification) -> FittedTable:
    """Lost zeros of each tensor, and where the first one is."""
    title, *footers = _footers(found.totals, len(found.tensors))
    columns = [
        Column("tensor", "left", title),
        Column("dtype", "left", spare=2),
        Column("shape", "left", spare=1),
        Column("dropped", "right", footers[0]),
        Column("lost", "right", footers[1]),
        Column("of dropped", "right", footers[2]),
        Column("first lost", "left"),
    ]
    rows = [
        (tensor.name, tensor.dtype, shape_text(tensor.shape), *_counts(tensor), place_text(tensor.first))
        for tensor in found.tensors
    ]
    return FittedTable(columns, rows, elsewhere=" or --json")


def lost_lines(found: MaskVerification) -> Iterable[str]:
    """A line for each tensor that lost zeros."""
    for tensor in found.tensors:
        if tensor.lost:
            yield (
                f"{printable(tensor.name)}: {tensor.lost:,} of {tensor.pruned:,} elements that the "
                f"mask drops {'is' if tensor.lost == 1 else 'are'} not zero, first {place_text(tensor.first)}"
            )


def lost_line(found: MaskVerification) -> str:
    """What was lost in all, as one line."""
    totals = found.totals
    return (
        f"{totals.lost:,} of {many(totals.pruned, 'element')} that masks drop "
        f"{'is' if totals.lost == 1 else 'are'} not zero, in {totals.failed:,} of "
        f"{many(len(found.tensors), 'tensor')}"
    )


def left_out_text(unused: int, unmasked: int) -> str | None:
    """How many masks without a tensor and tensors without a mask are left out, as one line; None if none."""
    parts = [
        f"{count:,} {noun if count == 1 else noun + 's'} without a {other}"
        for count, noun, other in ((unused, "mask", "tensor"), (unmasked, "tensor", "mask"))
        if count
    ]
    return f"{' and '.join(parts)} left out" if parts else None


class _Totals(TypedDict):
    tensors: int
    numel: int
    masked: int
    pruned: int
    lost: int
    sparsity: float


def _totals(checkpoint: Checkpoint, tensors: Sequence[Reapplied] | Sequence[LostZeros]) -> _Totals:
    stored = checkpoint.tensors
    numel = sum(one.numel for one in stored.values())
    pruned = sum(tensor.pruned for tensor in tensors)
    return {
        "tensors": len(stored),
        "numel": numel,
        "masked": sum(stored[tensor.name].numel for tensor in tensors),
        "pruned": pruned,
        "lost": sum(tensor.lost for tensor in tensors),
        "sparsity": share(pruned, numel),
    }


class _Counted(TypedDict):
    name: str
    dtype: str
    shape: Shape
    numel: int
    pruned: int
    lost: int


def _counted(tensor: Reapplied | LostZeros, checkpoint: Checkpoint) -> _Counted:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": tensor.shape,
        "numel": checkpoint.tensors[tensor.name].numel,
        "pruned": tensor.pruned,
        "lost": tensor.lost,
    }


def _counts(counted: MaskedTensor | MaskedTotals) -> tuple[str, str, str]:
    return f"{counted.pruned:,}", f"{counted.lost:,}", percent(share(counted.lost, counted.pruned))


def _footers(totals: MaskedTotals, tensors: int) -> list[str]:
    return [f"total of {tensors:,}", *_counts(totals)]
