"""`inspect`: the facts of a checkpoint as tables, a tree, JSON, CSV or Markdown."""

from dataclasses import replace
from typing import Annotated

from sparseprune import api, results
from sparseprune.api.options import Option
from sparseprune.cli.command import (
    Call,
    Csv,
    Form,
    Json,
    Markdown,
    Quiet,
    Summary,
    command,
    form_of,
    refuse_lines,
)
from sparseprune.cli.console import checked, print_json, print_table, print_text
from sparseprune.errors import SparsepruneError

Tree = Annotated[
    bool, Option("--tree", help="Show tensors as a tree of the parts of their names.", group="Report")
]


def show_inspected(
    call: "Call[results.Inspection]",
    tree: Tree = False,
    summary: Summary = False,
    json: Json = False,
    csv: Csv = False,
    markdown: Markdown = False,
    quiet: Quiet = False,
) -> None:
    form = form_of(json=json, csv=csv, markdown=markdown)
    if summary:
        refuse_lines(form)
    if tree:
        _refuse_beside_tree(call.options["by"], form, summary=summary)
        call.options["sort"] = call.options["sort"] or "name"
    result, failed = call.checked()
    with checked(*failed):
        from sparseprune.report import inspect_table, inspection, tables

        if form == "json":
            print_json(_without_lines(result) if summary else result)
        elif form == "csv":
            print_text(tables.csv_text(*inspection.sheet_of(result)))
        elif form == "markdown":
            print_text(tables.markdown_text(*inspect_table.columns_and_rows(result)))
        elif not quiet:
            show = inspect_table.InspectTree if tree else inspect_table.inspect_table
            print_table((inspect_table.inspect_summary if summary else show)(result))


def _refuse_beside_tree(by: str, form: Form, *, summary: bool) -> None:
    """SparsepruneError for what a tree excludes."""
    others = {f"--by {by}": by != "tensor", f"--{form}": form != "table", "--summary": summary}
    for other in [flag for flag, given in others.items() if given]:
        raise SparsepruneError(f"--tree and {other} exclude each other; give one of them")


def _without_lines(result: "results.Inspection") -> "results.Inspection":
    """The totals of a result alone."""
    return replace(result, tensors=(), groups=None if result.groups is None else ())


inspect = command(api.inspect, show_inspected)
