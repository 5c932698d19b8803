"""Parts of the results of `apply`, `mask` and `remove`, and what `remove` shows.

What was pruned by rule and tensor, and what was cut out, is counted in what was written.

Owns sums and shares that other results need as well. Called by api and by other modules of report/.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec import field as struct_field

from sparseprune.engine.grids import prod
from sparseprune.report.allocation import allocated_instances, allocation_lines
from sparseprune.report.coverage import coverage_text, coverage_totals
from sparseprune.report.wording import (
    copies_line,
    energy_kept,
    left_text,
    many,
    mean,
    percent,
    share,
    size,
)
from sparseprune.results.fields import ConfigChange, one_or_all
from sparseprune.results.pruning import (
    ChangedTensor,
    RemovalTotals,
    ReportTotals,
    RuleResult,
    TargetReached,
    TensorResult,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from sparseprune.checkpoint import Checkpoint, ResizedTensor
    from sparseprune.execution.passes import TensorOutcome
    from sparseprune.execution.plan import Rebuilds
    from sparseprune.report.coverage import Coverage
    from sparseprune.results.pruning import Removal
    from sparseprune.spec import BoundSpec


ERRORS = ("output_error_masked", "output_error", "loss_error_masked", "loss_error")
"""The fields of a tensor that was reconstructed which say what is lost."""


class Sums(Struct, frozen=True):
    """Elements that each rule reached and dropped, and the errors of reconstructed tensors by their names.

    `dropped` counts the elements that are dropped in all, `metrics` are those that were minimized.
    """

    dropped: list[int] = struct_field(default_factory=list)
    numel: Counter[str] = struct_field(default_factory=Counter)
    pruned: Counter[str] = struct_field(default_factory=Counter)
    errors: Mapping[str, list[float | None]] = struct_field(
        default_factory=lambda: {name: [] for name in ERRORS}
    )
    metrics: set[str] = struct_field(default_factory=set)

    @property
    def lost(self) -> dict[str, Any]:
        """The mean of each error over the tensors that have it, and the metric that was minimized."""
        each = {one for metric in self.metrics for one in metric.split(" and ")}
        means = {name: mean(errors) for name, errors in self.errors.items()}
        return {**means, "metric": " and ".join(sorted(each)) or None}


def summed_up(tensors: Iterable[TensorOutcome]) -> Sums:
    """The sums over all tensors; looks at each one once, as it may be made only then."""
    found = Sums()
    for tensor in tensors:
        found.dropped.append(tensor.pruned)
        for rule, part in tensor.reach.items():
            found.numel[rule] += part.numel
            found.pruned[rule] += part.pruned
        for name, errors in found.errors.items():
            errors.append(getattr(tensor, name))
        found.metrics.update([] if tensor.metric is None else [tensor.metric])
    return found


def report_totals(checkpoint: Checkpoint, found: Sums, coverage: Coverage | None) -> ReportTotals:
    """The totals of `apply` and `mask`."""
    numel, pruned = sum(stored.numel for stored in checkpoint.tensors.values()), sum(found.dropped)
    return ReportTotals(
        tensors=len(checkpoint.tensors),
        numel=numel,
        covered=coverage.reached if coverage else 0,
        pruned=pruned,
        sparsity=share(pruned, numel),
        **coverage_totals(coverage),
        **found.lost,
    )


def rule_results(
    bound: BoundSpec, found: Sums, devices: Mapping[str, str], rebuilds: Mapping[str, Rebuilds]
) -> tuple[RuleResult, ...]:
    """What each rule bound to, what it pruned, which device did its work, and how survivors were rebuilt."""
    results = []
    for rule in bound.rules:
        scopes = [instance.scope for instance in rule.instances]
        budgets = [instance.budget for instance in rule.instances]
        result = RuleResult(
            name=rule.name,
            instances=len(rule.instances),
            tensors=len({leaf.tensor for scope in scopes for leaf in scope.leaves}),
            scopes=sum(prod(scope.grid_shape) for scope in scopes),
            blocks_per_scope=one_or_all(scope.blocks_per_scope for scope in scopes),
            nnz=one_or_all(budget.nnz for budget in budgets),
            threshold=one_or_all(budget.threshold for budget in budgets),
            sparsity_asked=one_or_all(instance.sparsity for instance in rule.instances),
            blocks=sum(prod(scope.grid_shape) * scope.blocks_per_scope for scope in scopes),
            numel=found.numel[rule.name],
            pruned=found.pruned[rule.name],
            device=devices.get(rule.name),
            reconstructed=rebuilds[rule.name].method if rule.name in rebuilds else None,
            metric=rebuilds[rule.name].metric if rule.name in rebuilds else None,
            allocation=allocated_instances(rule),
            within=rule.within,
        )
        results.append(result)
    return tuple(results)


def tensor_result(tensor: TensorOutcome) -> TensorResult:
    """A tensor that rules reached, before and after."""
    return TensorResult(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        numel=tensor.before.numel,
        rule=", ".join(tensor.reach),
        instance=tensor.instance,
        pruned=tensor.pruned,
        zeros_before=tensor.before.zeros,
        zeros_after=tensor.after.zeros,
        energy_kept=energy_kept(tensor.before, tensor.after),
        **{name: getattr(tensor, name) for name in ERRORS},
        metric=tensor.metric,
    )


def errors_text(totals: ReportTotals | RemovalTotals) -> str:
    """By how much reconstructed matrices differ from the dense ones, first in what was minimized."""
    errors = {
        "output error": (totals.output_error, totals.output_error_masked),
        "loss error": (totals.loss_error, totals.loss_error_masked),
    }
    known = {what: pair for what, pair in errors.items() if None not in pair}
    first = "output error" if totals.metric == "outputs" else "loss error"
    (what, (now, masked)), *others = sorted(known.items(), key=lambda one: one[0] != first)
    text = f"{what} {percent(now)} on average, {percent(masked)} by the masks alone"
    if not others:
        return text
    what, (now, masked) = others[0]
    mixed = totals.metric == "loss and outputs"
    minimized, rest = (" where there are gradients", ", minimized elsewhere") if mixed else ("", "")
    return f"{text}, minimized{minimized}; {what} {percent(now)} and {percent(masked)}{rest}"


def changed_tensors(checkpoint: Checkpoint, left: Mapping[str, ResizedTensor]) -> Iterator[ChangedTensor]:
    """The tensors that were removed, or have another shape or name."""
    for name, stored in checkpoint.tensors.items():
        now = left.get(name)
        name_after, shape_after = (None, None) if now is None else (now.name, now.shape)
        if (name_after, shape_after) != (name, stored.shape):
            yield ChangedTensor(
                name=name,
                name_after=name_after,
                dtype=stored.dtype,
                shape=stored.shape,
                shape_after=shape_after,
            )


def config_text(one: ConfigChange) -> str:
    """The change of a key of config.json; long lists by their lengths."""
    after = "null" if one.before is None and one.after is None else _value(one.after)
    return f"{one.key} {_value(one.before)} -> {after}"


def _value(value: object) -> str:
    if isinstance(value, list) and len(value) > 8:
        return f"({many(len(value), 'entry')})"
    return "absent" if value is None else str(value)


def target_text(found: TargetReached) -> str:
    """Which number was found for a target, and what is left with it."""
    asked, reached = (left_text(found.unit, amount) for amount in (found.asked, found.reached))
    return f"{asked}: {found.name}={found.value} leaves {reached}"


def removal_lines(removal: Removal) -> Iterator[str]:
    """What a run did, for people."""
    totals = removal.totals
    covered = coverage_text(totals)
    if covered is not None:
        yield f"reached {covered}"
    if removal.target is not None:
        yield f"target {target_text(removal.target)}"
    yield from allocation_lines(removal.rules)
    for one in removal.config:
        yield f"config.json: {config_text(one)}"
    if totals.tensors != totals.tensors_after:
        yield f"{totals.tensors_after:,} of {many(totals.tensors, 'tensor')} are left"
    fewer = (totals.numel - totals.numel_after) / max(1, totals.numel)
    yield f"parameters {totals.numel:,} before, {totals.numel_after:,} after ({percent(fewer)} fewer)"
    yield f"weights {size(totals.bytes)} before, {size(totals.bytes_after)} after"
    if totals.output_error is not None:
        yield f"reconstructed matrices: {errors_text(totals)}"
    if removal.faster is not None:
        yield removal.faster
    yield from copies_line("left out", removal.files_left_out)
