"""The result of `remove`: what was cut out, changes of config.json, sizes before and after; its tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sparseprune.engine.grids import prod
from sparseprune.report.coverage import coverage_text, coverage_totals
from sparseprune.report.document import copies_line, mean, other_weights, rule_result, summed_up
from sparseprune.report.tables import Column, FittedTable
from sparseprune.report.wording import many, percent, shape_text, size
from sparseprune.results.fields import ConfigChange
from sparseprune.results.pruning import ChangedTensor, Removal, RemovalTotals

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sparseprune.checkpoint import Checkpoint, OtherFile, ResizedTensor
    from sparseprune.execution import TensorOutcome
    from sparseprune.removal.config import Change
    from sparseprune.removal.shrink import Removal as Shrunk
    from sparseprune.report.coverage import Coverage
    from sparseprune.spec import BoundSpec


@dataclass(frozen=True, slots=True)
class RemovalRun:
    """The circumstances of a run, as in `document.Run`; by a spec or by `masks`, the other one is None.

    `nbytes` are those of the weight files before and after, `left_out` as there. `tensors` is what
    became of what rules reached.
    """

    input: str
    output: str
    spec_sha256: str | None
    masks: str | None
    device: str
    seconds: float
    nbytes: tuple[int, int]
    overrides: Mapping[str, str] = field(default_factory=dict)
    left_out: Sequence[OtherFile] = ()
    tensors: Sequence[TensorOutcome] = ()
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    coverage: Coverage | None = None
    devices: Mapping[str, str] = field(default_factory=dict)


def make_removal_result(
    run: RemovalRun, checkpoint: Checkpoint, bound: BoundSpec | None, removal: Shrunk
) -> Removal:
    """The result of `remove`."""
    before, after = run.nbytes
    found = summed_up(run.tensors)
    return Removal(
        input=run.input,
        output=run.output,
        spec_sha256=run.spec_sha256,
        masks=run.masks,
        set=dict(run.overrides),
        device=run.device,
        seconds=round(run.seconds, 3),
        warnings=tuple(run.warnings),
        notes=tuple(run.notes),
        files_left_out=other_weights(run.left_out),
        totals=RemovalTotals(
            tensors=len(checkpoint.tensors),
            tensors_after=len(removal.left),
            numel=sum(stored.numel for stored in checkpoint.tensors.values()),
            numel_after=sum(prod(left.shape) for left in removal.left.values()),
            **coverage_totals(run.coverage),
            bytes=before,
            bytes_after=after,
            output_error_masked=mean(found.output_errors_masked),
            output_error=mean(found.output_errors),
        ),
        config=config_changes(removal.changes),
        rules=() if bound is None else tuple(rule_result(rule, found, run.devices) for rule in bound.rules),
        tensors=tuple(_changed_tensors(checkpoint, removal.left)),
    )


def config_changes(changes: Sequence[Change]) -> tuple[ConfigChange, ...]:
    """The keys of config.json that changed."""
    return tuple(ConfigChange(key=one.key, before=one.before, after=one.after) for one in changes)


def _changed_tensors(checkpoint: Checkpoint, left: Mapping[str, ResizedTensor]) -> Iterator[ChangedTensor]:
    """The tensors that were removed, or have another shape or name."""
    for name, stored in checkpoint.tensors.items():
        now = left.get(name)
        if now is None or now.name != name or now.shape != stored.shape:
            yield ChangedTensor(
                name=name,
                name_after=None if now is None else now.name,
                dtype=stored.dtype,
                shape=stored.shape,
                shape_after=None if now is None else now.shape,
            )


def changed_table(removal: Removal) -> FittedTable:
    """Every tensor that was removed, or has another shape or name."""
    columns = (Column("tensor", "left"), *(Column(title, "left") for title in ("shape", "becomes", "named")))
    return FittedTable(columns, [_changed_row(tensor) for tensor in removal.tensors], ", --json")


def _changed_row(tensor: ChangedTensor) -> tuple[str, ...]:
    after, name = tensor.shape_after, tensor.name_after
    renamed = "" if name in (None, tensor.name) else str(name)
    became = "removed" if after is None else shape_text(after) if after != tensor.shape else "as it was"
    return (tensor.name, shape_text(tensor.shape), became, renamed)


def config_lines(changes: Sequence[ConfigChange]) -> Iterator[str]:
    """The changes of config.json, a key a line; long lists by their lengths."""
    for one in changes:
        yield f"config.json: {config_text(one)}"


def config_text(one: ConfigChange) -> str:
    """The change of a key."""
    return f"{one.key} {_value(one.before)} -> {_value(one.after)}"


def _value(value: object) -> str:
    if isinstance(value, list) and len(value) > 8:
        return f"({many(len(value), 'entry')})"
    return "absent" if value is None else str(value)


def removal_lines(removal: Removal) -> Iterator[str]:
    """What a run did, for people."""
    totals = removal.totals
    covered = coverage_text(totals)
    if covered is not None:
        yield f"reached {covered}"
    yield from config_lines(removal.config)
    if totals.tensors != totals.tensors_after:
        yield f"{totals.tensors_after:,} of {many(totals.tensors, 'tensor')} are left"
    fewer = (totals.numel - totals.numel_after) / max(1, totals.numel)
    yield f"parameters {totals.numel:,} before, {totals.numel_after:,} after ({percent(fewer)} fewer)"
    yield f"weights {size(totals.bytes)} before, {size(totals.bytes_after)} after"
    if totals.output_error is not None:
        yield (
            f"reconstructed matrices: output error {totals.output_error:.3f} on average, "
            f"{totals.output_error_masked:.3f} by the masks alone"
        )
    yield from copies_line("left out", removal.files_left_out)
