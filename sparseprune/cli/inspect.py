"""`inspect`: the facts of a checkpoint as tables, a tree, JSON, CSV or Markdown."""

from typing import Annotated

from sparseprune import api, results
from sparseprune.api.options import Option
from sparseprune.cli.command import Call, Csv, Json, Markdown, Quiet, command, form_of
from sparseprune.cli.console import checked, print_json, print_table, print_text
from sparseprune.errors import SparsepruneError

Tree = Annotated[bool, Option("--tree", help="As a tree of the names' parts.")]


def show_inspected(
    call: "Call[results.Inspection]",
    tree: Tree = False,
    json: Json = False,
    csv: Csv = False,
    markdown: Markdown = False,
    quiet: Quiet = False,  # noqa: ARG001  (of the call)
) -> None:
    form = form_of(json=json, csv=csv, markdown=markdown)
    options = call.options
    if tree:
        if options["by"] != "tensor":
            raise SparsepruneError(f"--tree and --by {options['by']} exclude each other; give one of them")
        if form != "table":
            raise SparsepruneError(f"--tree and --{form} exclude each other; give one of them")
        options["sort"] = options["sort"] or "name"
    result, failed = call.checked()
    with checked(*failed):
        if form == "json":
            print_json(result)
        else:
            _print(result, form, tree=tree)


inspect = command(api.inspect, show_inspected)


def _print(result: "results.Inspection", form: str, *, tree: bool) -> None:
    from sparseprune.report.inspect_table import InspectTree, columns_and_rows, inspect_table
    from sparseprune.report.inspection import sheet_of
    from sparseprune.report.tables import csv_text, markdown_text

    if form == "csv":
        print_text(csv_text(*sheet_of(result)))
    elif form == "markdown":
        print_text(markdown_text(*columns_and_rows(result)))
    else:
        print_table(InspectTree(result) if tree else inspect_table(result))
