"""report.json of `remove`: what was cut out, what config.json says of it, sizes before and after; and tables.

Gives plain data in the shape of the schema, and rich renderables. Knows neither files nor streams. Called by
the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from sparseprune import __version__
from sparseprune.engine.grids import prod
from sparseprune.report.coverage import coverage_text, coverage_totals
from sparseprune.report.document import copies_line, file_entries, mean, rule_entry, summed_up
from sparseprune.report.tables import Column, FittedTable
from sparseprune.report.wording import many, percent, shape_text, size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sparseprune.checkpoint import Checkpoint, OtherFile
    from sparseprune.report.coverage import Coverage
    from sparseprune.report.document import PrunedTensor
    from sparseprune.spec import BoundSpec

REMOVE_SCHEMA = "sparseprune.remove.v1"


class ChangedKey(Protocol):
    """A key of config.json, and what it was and is."""

    @property
    def key(self) -> str: ...
    @property
    def before(self) -> object: ...
    @property
    def after(self) -> object: ...


class LeftTensor(Protocol):
    """What is left of a tensor, under its new name."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class RemovedParts(Protocol):
    """What is left, by the names that tensors had, and what config.json says of it."""

    @property
    def left(self) -> Mapping[str, LeftTensor]: ...
    @property
    def changes(self) -> Sequence[ChangedKey]: ...


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
    tensors: Sequence[PrunedTensor] = ()
    warnings: Sequence[str] = ()
    coverage: Coverage | None = None
    devices: Mapping[str, str] = field(default_factory=dict)


def removal_document(
    run: RemovalRun, checkpoint: Checkpoint, bound: BoundSpec | None, removal: RemovedParts
) -> dict[str, Any]:
    """The report as plain data, in the shape of schemas/remove.schema.json."""
    before, after = run.nbytes
    found = summed_up(run.tensors)
    return {
        "schema": REMOVE_SCHEMA,
        "sparseprune": __version__,
        "input": run.input,
        "output": run.output,
        "spec_sha256": run.spec_sha256,
        "masks": run.masks,
        "set": dict(run.overrides),
        "device": run.device,
        "seconds": round(run.seconds, 3),
        "warnings": list(run.warnings),
        "files_left_out": file_entries(run.left_out),
        "totals": {
            "tensors": len(checkpoint.tensors),
            "tensors_after": len(removal.left),
            "numel": sum(stored.numel for stored in checkpoint.tensors.values()),
            "numel_after": sum(prod(left.shape) for left in removal.left.values()),
            **coverage_totals(run.coverage),
            "bytes": before,
            "bytes_after": after,
            "output_error_masked": mean(found.output_errors_masked),
            "output_error": mean(found.output_errors),
        },
        "config": config_entries(removal.changes),
        "rules": [] if bound is None else [rule_entry(rule, found, run.devices) for rule in bound.rules],
        "tensors": list(_tensor_entries(checkpoint, removal.left)),
    }


def config_entries(changes: Sequence[ChangedKey]) -> list[dict[str, Any]]:
    """What became of keys of config.json."""
    return [{"key": one.key, "before": one.before, "after": one.after} for one in changes]


def _tensor_entries(checkpoint: Checkpoint, left: Mapping[str, LeftTensor]) -> Iterator[dict[str, Any]]:
    """The tensors that are gone, have another shape, or another name."""
    for name, stored in checkpoint.tensors.items():
        now = left.get(name)
        if now is None or now.name != name or now.shape != stored.shape:
            yield {
                "name": name,
                "name_after": None if now is None else now.name,
                "dtype": stored.dtype,
                "shape": list(stored.shape),
                "shape_after": None if now is None else list(now.shape),
            }


def changed_table(document: Mapping[str, Any]) -> FittedTable:
    """Every tensor that is gone or has another shape or name."""
    columns = (Column("tensor", "left"), *(Column(title, "left") for title in ("shape", "becomes", "named")))
    return FittedTable(columns, [_changed_row(tensor) for tensor in document["tensors"]], ", --json")


def _changed_row(tensor: Mapping[str, Any]) -> tuple[str, ...]:
    after, name = tensor["shape_after"], tensor["name_after"]
    renamed = "" if name in (None, tensor["name"]) else name
    became = "removed" if after is None else shape_text(after) if after != tensor["shape"] else "as it was"
    return (tensor["name"], shape_text(tensor["shape"]), became, renamed)


def config_lines(entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What became of config.json, a key a line; long lists by their lengths."""
    for entry in entries:
        yield f"config.json: {config_text(entry)}"


def config_text(entry: Mapping[str, Any]) -> str:
    """What became of a key."""
    return f"{entry['key']} {_value(entry['before'])} -> {_value(entry['after'])}"


def _value(value: object) -> str:
    if isinstance(value, list) and len(value) > 8:
        return f"({many(len(value), 'entry')})"
    return "absent" if value is None else str(value)


def removal_lines(document: Mapping[str, Any]) -> Iterator[str]:
    """What a run came to, for people."""
    totals = document["totals"]
    covered = coverage_text(totals)
    if covered is not None:
        yield f"reached {covered}"
    yield from config_lines(document["config"])
    if totals["tensors"] != totals["tensors_after"]:
        yield f"{totals['tensors_after']:,} of {many(totals['tensors'], 'tensor')} are left"
    fewer = (totals["numel"] - totals["numel_after"]) / max(1, totals["numel"])
    yield (f"parameters {totals['numel']:,} before, {totals['numel_after']:,} after ({percent(fewer)} fewer)")
    yield f"weights {size(totals['bytes'])} before, {size(totals['bytes_after'])} after"
    if totals["output_error"] is not None:
        yield (
            f"reconstructed matrices: output error {totals['output_error']:.3f} on average, "
            f"{totals['output_error_masked']:.3f} by the masks alone"
        )
    yield from copies_line("left out", document["files_left_out"])
