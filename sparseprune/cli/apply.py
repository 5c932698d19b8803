"""`apply` and `mask`: from a request to an output under its name, and what is told about it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sparseprune.checkpoint import StagedOutput, refuse_changed
from sparseprune.cli.applied import rebuilt_by, warn_of_broken, warn_of_earlier
from sparseprune.cli.console import print_json, print_result, stderr_console, tell_lines
from sparseprune.cli.gc_pause import collector_paused
from sparseprune.cli.progress import progress
from sparseprune.cli.request import Request, as_applied, few_tokens, identity_of, prepare, score_shards, warn
from sparseprune.cli.writing import digest, interrupts_told, output_shown, report_bytes, write_output

if TYPE_CHECKING:
    from sparseprune.checkpoint import OutputLayout, TensorReader
    from sparseprune.cli.request import Prepared
    from sparseprune.execution import Plan
    from sparseprune.results import Report


def run(request: Request) -> None:
    """Plan, execute, commit, tell."""
    began = time.perf_counter()
    with collector_paused():
        prepared = prepare(request)
    warn(request, prepared)
    plan, layout = prepared.plan, prepared.layout
    output = StagedOutput(layout, request.force, identity=identity_of(request, prepared))
    with interrupts_told(output):
        report = write_output(
            output,
            lambda reader: _worked(request, prepared, output, reader, began),
            lambda: refuse_changed(plan.checkpoint, score_shards(plan)),
            quiet=request.quiet,
            warnings=request.warnings,
        )
        if not request.quiet:
            _tell(request, plan, layout, report, time.perf_counter() - began)
        if request.json:
            print_json(report)
        else:
            print_result(output_shown(request, layout))


def _worked(
    request: Request, prepared: Prepared, output: StagedOutput, reader: TensorReader, began: float
) -> Report:
    """Do the work, and write the report and the spec beside it."""
    # Numpy and the compiled loops come in here, after everything that can be refused without them.
    from sparseprune.execution import device_text, devices_of_rules, execute, resolve_device, work_bytes
    from sparseprune.report.coverage import unpruned_lines
    from sparseprune.report.document import Run, make_report, pruned_by_rule

    source, plan, schedule, layout = prepared.source, prepared.plan, prepared.schedule, prepared.layout
    device = resolve_device(request.device, uses_torch=schedule.uses_torch)
    limits = request.memory, request.jobs
    touched = rebuilt_by(plan) if request.weights else {}
    earlier = warn_of_earlier(plan.checkpoint, touched, limits, request.warnings)
    total, already = work_bytes(schedule, output)
    what = "pruning" if request.weights else "masking"
    with progress(what, total, quiet=request.quiet, already=already) as advance:
        outcomes = execute(schedule, reader, output, device, advance)
    request.warnings.add(*unpruned_lines(plan.bound.rules, pruned_by_rule(outcomes)))
    warn_of_broken(earlier, output, request.warnings)
    circumstances = Run(
        input=str(request.checkpoint),
        output=output_shown(request, layout),
        spec_sha256=digest(source.text),
        device=device_text(schedule.jobs, device),
        devices=devices_of_rules(schedule, device),
        seconds=time.perf_counter() - began,
        overrides=request.overrides,
        warnings=request.warnings.lines,
        left_out=layout.left_out,
        coverage=prepared.coverage,
    )
    report = make_report(circumstances, plan.checkpoint, plan.bound, outcomes)
    output.add_file(layout.report_file, report_bytes(report))
    if layout.spec_file is not None:
        output.add_file(layout.spec_file, as_applied(request, source.text).encode())
    return report


def _tell(request: Request, plan: Plan, layout: OutputLayout, report: Report, seconds: float) -> None:
    from sparseprune.report.coverage import coverage_text
    from sparseprune.report.document import copies_line
    from sparseprune.report.tables import outcome_table, rules_table
    from sparseprune.report.wording import percent, size

    console = stderr_console()
    if request.verbose:
        console.print(outcome_table(report))
    console.print(rules_table(report))
    totals = report.totals
    reached = sum(rule.numel for rule in report.rules)
    masks = sum(place.nbytes for place in layout.masks.values())
    lines = [
        f"pruned {totals.pruned:,} of {totals.numel:,} parameters ({percent(totals.sparsity)})",
        (
            f"left alone {totals.tensors - len(report.tensors)} of {totals.tensors} tensors, "
            f"{totals.numel - reached:,} parameters"
        ),
    ]
    covered = coverage_text(totals)
    if covered is not None:
        lines.append(f"reached {covered}")
    if request.weights:
        lines.append(
            f"weights {size(layout.input_bytes)} before and after (zeros do not shrink a file)"
            + (f", masks {size(masks)}" if masks else ", no masks")
        )
    else:
        lines.append(f"weights {size(layout.input_bytes)}, masks {size(masks)}")
    if totals.output_error is not None:
        matrices = sum(tensor.output_error is not None for tensor in report.tensors)
        lines.append(
            f"reconstructed {matrices} matrices: output error {totals.output_error:.3f} on average, "
            f"{totals.output_error_masked:.3f} by the masks alone"
        )
        lines += few_tokens(plan)
    lines += copies_line("left out", report.files_left_out)
    work = sum(stored.nbytes for stored in plan.checkpoint.tensors.values())
    lines.append(f"{seconds:.1f} s, {size(work / seconds)}/s, on {report.device}")
    tell_lines(*lines)
