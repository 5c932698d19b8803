"""`verify`: tables of what a check against a spec or masks found."""

from dataclasses import replace

from sparseprune import api, results
from sparseprune.cli.command import Call, Json, Quiet, Summary, command
from sparseprune.cli.console import checked, print_json, print_table, print_text


def show_verified(
    call: "Call[results.Verification | results.MaskVerification]",
    summary: Summary = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    result, failed = call.checked()
    if not summary and (json or quiet):
        with checked(*failed):
            if json:
                print_json(result)
        return
    from sparseprune.report import checks

    # The table has every tensor, and a summary none.
    total: results.Verification | results.MaskVerification
    if isinstance(result, results.Verification):
        lines, total = checks.broken_lines(result), replace(result, tensors=())
    else:
        lines, total = [checks.lost_line(result)] if failed else [], replace(result, tensors=())
    with checked(*lines):
        if json:
            print_json(total)
        elif quiet:
            return
        elif isinstance(result, results.Verification):
            print_table(checks.verify_table(result, summary=summary))
        else:
            print_masks(result, summary=summary)


verify = command(api.verify, show_verified)


def print_masks(result: "results.MaskVerification", *, summary: bool = False) -> None:
    """The table of what masks drop and what of it is not zero, on stdout; in a summary the lines below it."""
    from sparseprune.report.checks import verify_masks_table
    from sparseprune.report.wording import copies_line, many

    if not summary:
        print_table(verify_masks_table(result))
    if result.holds:
        dropped, tensors = many(result.totals.pruned, "element"), many(len(result.tensors), "tensor")
        print_text(f"masks drop {dropped} of {tensors}; all of them are zero\n")
    for line in copies_line("not looked at", result.files_not_read):
        print_text(f"{line}\n")
