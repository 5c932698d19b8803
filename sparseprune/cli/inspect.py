"""`inspect`: the facts of a checkpoint as tables, a tree, JSON, CSV or Markdown."""

from typing import Annotated

from sparseprune import api, results
from sparseprune.api.options import Option
from sparseprune.cli.command import Call, Csv, Json, Markdown, Quiet, command, form_of
from sparseprune.cli.console import checked, print_json, print_table, print_text
from sparseprune.errors import SparsepruneError

Tree = Annotated[
    bool, Option("--tree", help="Show tensors as a tree of the parts of their names.", group="Report")
]


def show_inspected(
    call: "Call[results.Inspection]",
    tree: Tree = False,
    json: Json = False,
    csv: Csv = False,
    markdown: Markdown = False,
    quiet: Quiet = False,
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
        from sparseprune.report import inspect_table, inspection, tables

        if form == "json":
            print_json(result)
        elif form == "csv":
            print_text(tables.csv_text(*inspection.sheet_of(result)))
        elif form == "markdown":
            print_text(tables.markdown_text(*inspect_table.columns_and_rows(result)))
        elif not quiet:
            print_table(inspect_table.InspectTree(result) if tree else inspect_table.inspect_table(result))


inspect = command(api.inspect, show_inspected)
