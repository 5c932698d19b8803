"""`apply` and `mask`: the summary of a pruned output."""

from typing import TYPE_CHECKING

from sparseprune import api, results
from sparseprune.cli.command import Call, DryRun, Json, Result, Verbose, command
from sparseprune.cli.console import print_outcome
from sparseprune.cli.plan import show_plan
from sparseprune.cli.signals import temporary_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType


def show_pruned(
    call: "Call[results.Report]",
    dry_run: DryRun = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    if dry_run:
        show_plan(call, json=json)
        return
    report = called(call)
    call.summarize(_summary(call, report, verbose=verbose))
    print_outcome(report, json=json)


def called(call: "Call[Result]") -> "Result":
    """What a call gives; one that sweeps a text has a folder for hidden states meanwhile."""
    if not call.options.get("text"):
        return call()
    with temporary_folder("sparseprune-") as scratch:
        return call(scratch=scratch)


apply = command(api.apply, show_pruned)
mask = command(api.mask, show_pruned)


def _summary(
    call: "Call[results.Report]", report: "results.Report", *, verbose: bool
) -> "Iterator[RenderableType]":
    from sparseprune.report.allocation import allocation_lines
    from sparseprune.report.coverage import coverage_text
    from sparseprune.report.faster import faster_line
    from sparseprune.report.permuted import permuted_lines
    from sparseprune.report.pruning import errors_text, target_text
    from sparseprune.report.tables import outcome_table, rules_table
    from sparseprune.report.wording import copies_line, many, percent, size

    if verbose:
        yield outcome_table(report)
    yield rules_table(report)
    totals, sizes = report.totals, report.bytes
    masks = f", masks {size(sizes.masks)}" if sizes.masks else ", no masks"
    lines = [
        f"pruned {totals.pruned:,} of {totals.numel:,} parameters ({percent(totals.sparsity)})",
        (
            f"left alone {totals.tensors - len(report.tensors)} of {totals.tensors} tensors, "
            f"{totals.numel - totals.covered:,} parameters"
        ),
    ]
    if report.target is not None:
        lines.append(f"target {target_text(report.target)}")
    covered = coverage_text(totals)
    if covered is not None:
        lines.append(f"reached {covered}")
    lines += allocation_lines(report.rules)
    if call.function is api.apply:
        lines.append(f"weights {size(sizes.weights)} before and after (zeros do not shrink a file){masks}")
    else:
        lines.append(f"weights {size(sizes.weights)}, masks {size(sizes.masks)}")
    if totals.output_error is not None:
        matrices = sum(tensor.output_error is not None for tensor in report.tensors)
        lines.append(f"reconstructed {many(matrices, 'matrix')}: {errors_text(totals)}")
    lines += filter(None, [faster_line(report)])
    lines += permuted_lines(report.permuted, report.not_permuted)
    lines += [*report.notes, *copies_line("left out", report.files_left_out)]
    lines.append(f"{call.seconds:.1f} s, {size(sizes.weights / call.seconds)}/s, on {report.device}")
    yield from lines
