"""`compare`: what became of tensors as a table, JSON, CSV or Markdown."""

from sparseprune import api, results
from sparseprune.cli.command import Call, Csv, Json, Markdown, Quiet, command, form_of
from sparseprune.cli.console import checked, print_json, print_table, print_text


def show_compared(
    call: "Call[results.Comparison]",
    json: Json = False,
    csv: Csv = False,
    markdown: Markdown = False,
    quiet: Quiet = False,  # noqa: ARG001  (of the call)
) -> None:
    form = form_of(json=json, csv=csv, markdown=markdown)
    result, failed = call.checked()
    with checked(*failed):
        if form == "json":
            print_json(result)
        else:
            # Who names tensors sees all of them in the table.
            _print(result, form, all_tensors=bool(call.options["match"]))


compare = command(api.compare, show_compared)


def _print(result: "results.Comparison", form: str, *, all_tensors: bool) -> None:
    from sparseprune.report.comparison import columns_and_rows, compare_table, sheet_of
    from sparseprune.report.tables import csv_text, markdown_text

    if form == "csv":
        print_text(csv_text(*sheet_of(result)))
    elif form == "markdown":
        print_text(markdown_text(*columns_and_rows(result, all_tensors=all_tensors)))
    else:
        print_table(compare_table(result, all_tensors=all_tensors))
