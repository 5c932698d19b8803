"""The results of `apply`, `mask` and `remove`: what was pruned by rule and tensor, and what was cut out.

Owns sums and shares that other results need as well, counted in what was written, and the tables of a
removal. Called by api and by other modules of report/.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sparseprune.engine.grids import prod
from sparseprune.errors import printable
from sparseprune.report.coverage import coverage_text, coverage_totals
from sparseprune.report.tables import Column, FittedTable
from sparseprune.report.wording import many, percent, shape_text, size
from sparseprune.results.fields import ConfigChange, Made, OtherWeights, WrittenBytes, one_or_all
from sparseprune.results.pruning import (
    ChangedTensor,
    Removal,
    RemovalTotals,
    Report,
    ReportTotals,
    RuleResult,
    TensorResult,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from sparseprune.checkpoint import Checkpoint, OtherFile, ResizedTensor
    from sparseprune.engine.kernels.counting import Tally
    from sparseprune.execution.passes import TensorOutcome
    from sparseprune.removal.shrink import Removal as Shrunk
    from sparseprune.report.coverage import Coverage
    from sparseprune.spec import BoundRule, BoundSpec


_NAMED = 4  # files in one line
# A sum of squares below this has lost digits to the lower end of float64.
LEAST_ENERGY = 2.0**-960


@dataclass(frozen=True, slots=True)
class Run:
    """The circumstances of a run; `output` and `input` as they were named, `seconds` of wall time.

    `device` did the work, `devices` that of each rule. `overrides` are the variables of the spec that were
    set when it was applied, as they were typed. `left_out` are files that hold the dense weights once more,
    and that the output has not.
    """

    input: str
    output: str
    spec_sha256: str
    device: str
    seconds: float
    overrides: Mapping[str, str]
    warnings: Sequence[str] = ()
    left_out: Sequence[OtherFile] = ()
    coverage: Coverage | None = None
    devices: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    sizes: tuple[int, int] = (0, 0)


def make_report(
    run: Run, checkpoint: Checkpoint, bound: BoundSpec, tensors: Sequence[TensorOutcome]
) -> Report:
    """The result of `apply` and `mask`; its tensors are made when they are asked for."""
    numel = sum(stored.numel for stored in checkpoint.tensors.values())
    found = summed_up(tensors)
    return Report(
        input=run.input,
        output=run.output,
        spec_sha256=run.spec_sha256,
        set=dict(run.overrides),
        device=run.device,
        seconds=round(run.seconds, 3),
        warnings=tuple(run.warnings),
        notes=tuple(run.notes),
        files_left_out=other_weights(run.left_out),
        bytes=WrittenBytes(weights=run.sizes[0], masks=run.sizes[1]),
        totals=ReportTotals(
            tensors=len(checkpoint.tensors),
            numel=numel,
            pruned=found.pruned,
            sparsity=share(found.pruned, numel),
            **coverage_totals(run.coverage),
            output_error_masked=mean(found.output_errors_masked),
            output_error=mean(found.output_errors),
        ),
        rules=tuple(rule_result(rule, found, run.devices) for rule in bound.rules),
        tensors=Made(tensors, _tensor_result),
    )


def other_weights(files: Iterable[OtherFile]) -> tuple[OtherWeights, ...]:
    """Other copies of the weights in a checkpoint's folder."""
    return tuple(OtherWeights(path=str(file.path), bytes=file.nbytes) for file in files)


def copies_line(became: str, files: Sequence[OtherWeights]) -> Iterator[str]:
    """A line with what became of other copies of the weights, the first by name; none for none.

    >>> list(copies_line("left out", [OtherWeights(path="model.gguf", bytes=5_000_000)]))
    ['left out: model.gguf (5.00 MB), another copy of the weights']
    """
    if not files:
        return
    names = ", ".join(printable(file.path) for file in files[:_NAMED])
    more = f" and {len(files) - _NAMED:,} more" if len(files) > _NAMED else ""
    total = size(sum(file.bytes for file in files))
    copies = "another copy" if len(files) == 1 else "other copies"
    yield f"{became}: {names}{more} ({total}), {copies} of the weights"


@dataclass(frozen=True, slots=True)
class Sums:
    """What all tensors come to: for each rule the elements that it reached and those that it dropped.

    The output errors are those of the tensors that were reconstructed.
    """

    reach: Mapping[str, tuple[int, int]]
    output_errors_masked: Sequence[float]
    output_errors: Sequence[float]

    @property
    def pruned(self) -> int:
        """The elements that rules dropped."""
        return sum(pruned for _, pruned in self.reach.values())


def summed_up(tensors: Iterable[TensorOutcome]) -> Sums:
    """The sums over all tensors, of which each is looked at once: it may be made only then."""
    reach: dict[str, tuple[int, int]] = {}
    masked, errors = [], []
    for tensor in tensors:
        for rule, part in tensor.reach.items():
            numel, pruned = reach.get(rule, (0, 0))
            reach[rule] = numel + part.numel, pruned + part.pruned
        if tensor.output_error_masked is not None:
            masked.append(tensor.output_error_masked)
        if tensor.output_error is not None:
            errors.append(tensor.output_error)
    return Sums(reach, masked, errors)


def pruned_by_rule(tensors: Iterable[TensorOutcome]) -> dict[str, int]:
    """How many elements each rule dropped."""
    return {rule: pruned for rule, (_, pruned) in summed_up(tensors).reach.items()}


def share(part: float, whole: float) -> float:
    """The share of a part in a whole; 0 of nothing is 0."""
    return part / whole if whole else 0.0


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of those that are there; None of none.

    >>> mean([0.25, None, 0.75]), mean([None])
    (0.5, None)
    """
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def energy_kept(before: Tally, after: Tally) -> float | None:
    """||pruned||^2 / ||dense||^2; 1 of nothing, None where squares have no place in float64."""
    if not math.isfinite(before.energy) or not math.isfinite(after.energy):
        return None
    if before.energy < LEAST_ENERGY:
        return 1.0 if before.zeros == before.numel else None
    kept = after.energy / before.energy
    return kept if math.isfinite(kept) else None


def rule_result(rule: BoundRule, found: Sums, devices: Mapping[str, str]) -> RuleResult:
    """What a rule bound to, and what it pruned of the tensors that it reached."""
    names = {leaf.tensor for instance in rule.instances for leaf in instance.scope.leaves}
    numel, pruned = found.reach.get(rule.name, (0, 0))
    scopes = [instance.scope for instance in rule.instances]
    budgets = [instance.budget for instance in rule.instances]
    return RuleResult(
        name=rule.name,
        instances=len(rule.instances),
        tensors=len(names),
        scopes=sum(prod(scope.grid_shape) for scope in scopes),
        blocks_per_scope=one_or_all(scope.blocks_per_scope for scope in scopes),
        nnz=one_or_all(budget.nnz for budget in budgets),
        threshold=one_or_all(budget.threshold for budget in budgets),
        sparsity_asked=one_or_all(instance.sparsity for instance in rule.instances),
        blocks=sum(prod(scope.grid_shape) * scope.blocks_per_scope for scope in scopes),
        numel=numel,
        pruned=pruned,
        device=devices.get(rule.name),
    )


def _tensor_result(tensor: TensorOutcome) -> TensorResult:
    return TensorResult(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        numel=tensor.before.numel,
        rule=", ".join(tensor.reach),
        instance=tensor.instance,
        pruned=sum(part.pruned for part in tensor.reach.values()),
        zeros_before=tensor.before.zeros,
        zeros_after=tensor.after.zeros,
        energy_kept=energy_kept(tensor.before, tensor.after),
        output_error_masked=tensor.output_error_masked,
        output_error=tensor.output_error,
    )


@dataclass(frozen=True, slots=True)
class RemovalRun:
    """The circumstances of a run, as in `document.Run`; by a spec or by `masks`, the other one is None.

    `nbytes` are those of the weight files before and after, `left_out` as there. `tensors` is what
    became of what rules reached.
    """

    input: str
    output: str = ""
    spec_sha256: str | None = None
    masks: str | None = None
    device: str = "cpu"
    seconds: float = 0.0
    nbytes: tuple[int, int] = (0, 0)
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
        config=removal.changes,
        rules=() if bound is None else tuple(rule_result(rule, found, run.devices) for rule in bound.rules),
        tensors=tuple(_changed_tensors(checkpoint, removal.left)),
    )


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
