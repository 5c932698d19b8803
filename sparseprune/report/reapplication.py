"""The results of `reapply` and `verify --masks`: zeros that were lost, and their tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

from sparseprune.engine.sequences import Made
from sparseprune.errors import printable
from sparseprune.report.document import energy_kept, other_weights, share
from sparseprune.report.tables import Column, FittedTable
from sparseprune.report.wording import many, percent, place_text, shape_text
from sparseprune.results.checking import (
    LeftOut,
    MaskCheckedTensor,
    MaskedTensor,
    MaskedTotals,
    MaskVerification,
    MaskVerifyTotals,
    Reapplication,
    ReappliedTensor,
)
from sparseprune.results.fields import WrittenBytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sparseprune.checkpoint import Checkpoint, OtherFile
    from sparseprune.engine.grids import Shape
    from sparseprune.execution.reapply import LostZeros, Reapplied


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


def left_out_line(run: Circumstances) -> str | None:
    """What has no counterpart and is let be, as one line; None if nothing."""
    return left_out_text(run.unused, run.unmasked)


def left_out_text(unused: int, unmasked: int) -> str | None:
    """As `left_out_line`, for so many masks without a tensor and tensors without a mask."""
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
