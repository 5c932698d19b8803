"""`reapply`: the summary of an output that has its zeros again."""

from inspect import signature
from typing import TYPE_CHECKING

from sparseprune import api, results
from sparseprune.cli.command import Call, DryRun, Json, Verbose, command
from sparseprune.cli.console import print_json, print_outcome, print_text
from sparseprune.cli.verify import print_masks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

_WORST = 10  # tensors that are shown without -v


def show_reapplied(
    call: "Call[results.Reapplication]", dry_run: DryRun = False, json: Json = False, verbose: Verbose = False
) -> None:
    given = call.options["masks"], call.options["zeros_of"]
    if dry_run and given != (None, None):
        _show_expected(call, json=json)
        return
    result = call()
    call.summarize(_summary(call.seconds, result, verbose=verbose))
    print_outcome(result, json=json)


reapply = command(api.reapply, show_reapplied)


def _show_expected(call: "Call[results.Reapplication]", *, json: bool) -> None:
    """Which zeros are lost, as `verify --masks` has it, on stdout; with these options nothing is written."""
    from sparseprune.report.wording import many

    taken = signature(api.verify).parameters
    options = {name: value for name, value in call.options.items() if name in taken}
    result, _ = Call(api.verify, options, quiet=call.quiet, log=call.log).checked()
    if json:
        print_json(result)
    elif isinstance(result, results.MaskVerification) and not call.quiet:
        print_masks(result)
        lost = many(result.totals.lost, "zero")
        print_text(f"reapply would put back {lost} in {many(result.totals.failed, 'tensor')}\n")


def _summary(seconds: float, result: "results.Reapplication", *, verbose: bool) -> "Iterator[RenderableType]":
    from sparseprune.report.checks import reapply_table
    from sparseprune.report.wording import copies_line, percent, size

    totals, tensors, sizes = result.totals, result.tensors, result.bytes
    lost = sum(tensor.lost > 0 for tensor in tensors)
    if verbose:
        yield reapply_table(result)
    elif lost:
        yield reapply_table(result, _WORST)
        if lost > _WORST:
            yield f"and {lost - _WORST:,} more tensors that had lost zeros; -v shows all"
    yield from (
        (
            f"put back {totals.lost:,} of {totals.pruned:,} zeros "
            f"({percent(totals.lost / max(1, totals.pruned))}), "
            f"lost in {lost:,} of {len(tensors):,} tensors with masks"
        ),
        f"masks drop {totals.pruned:,} of {totals.numel:,} parameters ({percent(totals.sparsity)})",
        (
            f"left alone {totals.tensors - len(tensors):,} of {totals.tensors:,} tensors, "
            f"{totals.numel - totals.masked:,} parameters"
        ),
        (
            f"folded {result.folded:,} weights with their masks: weights {size(sizes.weights)} after"
            if result.folded
            else f"weights {size(sizes.weights)} before and after (zeros do not shrink a file)"
        )
        + (f", masks {size(sizes.masks)}" if sizes.masks else ", no masks"),
        *copies_line("left out", result.files_left_out),
        f"{seconds:.1f} s, {size(sizes.weights / seconds)}/s",
    )
