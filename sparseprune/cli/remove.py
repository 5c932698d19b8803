"""`remove`: the summary of a smaller checkpoint."""

from typing import TYPE_CHECKING

from sparseprune import api, results
from sparseprune.cli.apply import called
from sparseprune.cli.command import Call, DryRun, Json, Verbose, command
from sparseprune.cli.console import print_json, print_outcome, print_table
from sparseprune.cli.plan import show_plan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType


def show_removed(
    call: "Call[results.Removal]",
    dry_run: DryRun = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    lists = [f"--{option}" for option in ("experts", "vocabulary") if call.options[option] is not None]
    if dry_run:
        _refuse_masks(call, lists)
    if dry_run and not lists:
        show_plan(call, json=json)
        return
    if dry_run:
        _show_expected(call(dry_run=True), json=json)
        return
    result = called(call)
    call.summarize(_summary(call.seconds, result, verbose=verbose))
    print_outcome(result, json=json)


remove = command(api.remove, show_removed)


def _refuse_masks(call: "Call[results.Removal]", lists: list[str]) -> None:
    """SparsepruneError unless there is a spec, which a plan is made by, or a list."""
    from sparseprune.api.masked import mask_source
    from sparseprune.api.removing import refuse_unclear

    given = call.options
    names = (given["match"], given["exclude"], given["rename"])
    source = mask_source(None, (given["masks"], given["zeros_of"]), names, partial=given["partial"])
    refuse_unclear(given["spec"], source, lists, given["set"], dry_run=given["spec"] is None)


def _show_expected(result: "results.Removal", *, json: bool) -> None:
    """What would be left, on stdout."""
    from rich.text import Text

    from sparseprune.errors import printable
    from sparseprune.report.pruning import removal_lines

    if json:
        print_json(result)
        return
    print_table(Text("\n".join(map(printable, removal_lines(result)))))


def _summary(seconds: float, result: "results.Removal", *, verbose: bool) -> "Iterator[RenderableType]":
    from sparseprune.report.pruning import removal_lines
    from sparseprune.report.tables import changed_table, rules_table
    from sparseprune.report.wording import size

    if verbose:
        yield changed_table(result)
    if result.rules:
        yield rules_table(result)
    yield from removal_lines(result)
    yield from result.notes
    yield f"{seconds:.1f} s, {size(result.totals.bytes / seconds)}/s, on {result.device}"
