"""`compare`: what became of tensors as a table, JSON, CSV or Markdown."""

from dataclasses import replace

from sparseprune import api, results
from sparseprune.cli.command import (
    Call,
    Csv,
    Json,
    Markdown,
    Quiet,
    Summary,
    Verbose,
    command,
    form_of,
    refuse_lines,
)
from sparseprune.cli.console import checked, print_json, print_table, print_text


def show_compared(
    call: "Call[results.Comparison]",
    summary: Summary = False,
    json: Json = False,
    csv: Csv = False,
    markdown: Markdown = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    form = form_of(json=json, csv=csv, markdown=markdown)
    if summary:
        refuse_lines(form)
    result, failed = call.checked()
    with checked(*failed):
        from sparseprune.report import comparison, tables

        everything = verbose or bool(call.options["match"])  # who names tensors sees all of them in the table
        if form == "json":
            print_json(replace(result, tensors=()) if summary else result)
        elif form == "csv":
            print_text(tables.csv_text(*comparison.sheet_of(result)))
        elif form == "markdown":
            columns, rows = comparison.columns_and_rows(result, all_tensors=everything)
            print_text(tables.markdown_text(columns, rows))
        elif summary and not quiet:
            print_table(comparison.compare_summary(result))
        elif not quiet:
            print_table(comparison.compare_table(result, all_tensors=everything))


compare = command(api.compare, show_compared)
