"""What became of zeros: put back by `reapply`, or found lost by `verify --masks`; documents and tables.

Gives plain data in the shape of the schemas, and rich renderables. Knows neither files nor streams. Called
by the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from sparseprune import __version__
from sparseprune.engine.sequences import Made
from sparseprune.errors import printable
from sparseprune.report.document import energy_kept, file_entries, share
from sparseprune.report.tables import Column, FittedTable
from sparseprune.report.wording import many, percent

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sparseprune.checkpoint import Checkpoint, OtherFile
    from sparseprune.engine.grids import Shape
    from sparseprune.engine.tally import Tally

REAPPLY_SCHEMA = "sparseprune.reapply.v1"
VERIFY_SCHEMA = "sparseprune.verify-masks.v1"


class MaskedTensor(Protocol):
    """A tensor that has a mask: the elements that it drops, and those of them that were or are not zero."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def pruned(self) -> int: ...
    @property
    def lost(self) -> int: ...


class ReappliedTensor(MaskedTensor, Protocol):
    """One whose zeros were put back."""

    @property
    def before(self) -> Tally: ...
    @property
    def after(self) -> Tally: ...


class CheckedTensor(MaskedTensor, Protocol):
    """One that was only looked at: the index of the first lost zero."""

    @property
    def first(self) -> tuple[int, ...] | None: ...


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


def reapply_document(
    run: Circumstances, checkpoint: Checkpoint, tensors: Sequence[ReappliedTensor]
) -> dict[str, Any]:
    """The report of `reapply`, in the shape of schemas/reapply.schema.json."""
    return {
        "schema": REAPPLY_SCHEMA,
        "sparseprune": __version__,
        "input": run.input,
        "masks": run.masks,
        "output": run.output,
        "set": dict(run.overrides),
        "seconds": round(run.seconds, 3),
        "warnings": list(run.warnings),
        "files_left_out": file_entries(run.files),
        "left_out": _left_out(run),
        "totals": _totals(checkpoint, tensors),
        "tensors": Made(
            tensors,
            lambda tensor: {
                **_entry(tensor, checkpoint),
                "zeros_before": tensor.before.zeros,
                "zeros_after": tensor.after.zeros,
                "energy_kept": energy_kept(tensor.before, tensor.after),
            },
        ),
    }


def verify_masks_document(
    run: Circumstances, checkpoint: Checkpoint, tensors: Sequence[CheckedTensor]
) -> dict[str, Any]:
    """What `verify --masks` found, in the shape of schemas/verify-masks.schema.json."""
    failed = sum(tensor.lost > 0 for tensor in tensors)
    return {
        "schema": VERIFY_SCHEMA,
        "sparseprune": __version__,
        "input": run.input,
        "masks": run.masks,
        "holds": not failed,
        "warnings": list(run.warnings),
        "files_not_read": file_entries(run.files),
        "left_out": _left_out(run),
        "totals": {**_totals(checkpoint, tensors), "failed": failed},
        "tensors": Made(
            tensors,
            lambda tensor: {
                **_entry(tensor, checkpoint),
                "first": None if tensor.first is None else list(tensor.first),
            },
        ),
    }


def reapply_table(document: Mapping[str, Any], most: int | None = None) -> FittedTable:
    """Lost zeros of each tensor of a `reapply` document; or of those that lost `most` of them, so many."""
    tensors, totals = document["tensors"], document["totals"]
    if most is not None:
        lost = [tensor for tensor in tensors if tensor["lost"]]
        tensors = sorted(lost, key=lambda tensor: -tensor["lost"])[:most]
    whole = len(tensors) == len(document["tensors"])
    title, *footers = _footers(totals, len(tensors)) if whole else [""] * 5
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
            tensor["name"],
            tensor["dtype"],
            *_counts(tensor),
            "?" if tensor["energy_kept"] is None else f"{tensor['energy_kept']:.4f}",
        )
        for tensor in tensors
    ]
    return FittedTable(columns, rows, elsewhere=" or --json")


def verify_masks_table(document: Mapping[str, Any]) -> FittedTable:
    """Lost zeros of each tensor of a `verify --masks` document, and where the first one is."""
    tensors = document["tensors"]
    title, *footers = _footers(document["totals"], len(tensors))
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
        (
            tensor["name"],
            tensor["dtype"],
            "x".join(map(str, tensor["shape"])) or "0-d",
            *_counts(tensor),
            "" if tensor["first"] is None else str(tensor["first"]),
        )
        for tensor in tensors
    ]
    return FittedTable(columns, rows, elsewhere=" or --json")


def lost_lines(document: Mapping[str, Any]) -> Iterable[str]:
    """A line for each tensor of a `verify --masks` document that lost zeros."""
    for tensor in document["tensors"]:
        if tensor["lost"]:
            yield (
                f"{printable(tensor['name'])}: {tensor['lost']:,} of {tensor['pruned']:,} elements that the "
                f"mask drops {'is' if tensor['lost'] == 1 else 'are'} not zero, first {tensor['first']}"
            )


def lost_line(document: Mapping[str, Any]) -> str:
    """What was lost in all, as one line."""
    totals, names = document["totals"], [tensor for tensor in document["tensors"] if tensor["lost"]]
    return (
        f"{totals['lost']:,} of {many(totals['pruned'], 'element')} that masks drop "
        f"{'is' if totals['lost'] == 1 else 'are'} not zero, in {len(names):,} of "
        f"{many(len(document['tensors']), 'tensor')}"
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


def _left_out(run: Circumstances) -> dict[str, int]:
    return {"masks": run.unused, "tensors": run.unmasked}


def _totals(checkpoint: Checkpoint, tensors: Sequence[MaskedTensor]) -> dict[str, Any]:
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


def _entry(tensor: MaskedTensor, checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "numel": checkpoint.tensors[tensor.name].numel,
        "pruned": tensor.pruned,
        "lost": tensor.lost,
    }


def _counts(counted: Mapping[str, Any]) -> tuple[str, str, str]:
    return (
        f"{counted['pruned']:,}",
        f"{counted['lost']:,}",
        percent(share(counted["lost"], counted["pruned"])),
    )


def _footers(totals: Mapping[str, Any], tensors: int) -> list[str]:
    return [f"total of {tensors:,}", *_counts(totals)]
