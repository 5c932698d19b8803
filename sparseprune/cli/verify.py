"""`verify`: tables of what a check against a spec or masks found."""

from sparseprune import api, results
from sparseprune.cli.command import Call, Json, Quiet, command
from sparseprune.cli.console import checked, print_json, print_table, print_text


def show_verified(
    call: "Call[results.Verification | results.MaskVerification]", json: Json = False, quiet: Quiet = False
) -> None:
    result, failed = call.checked()
    if json or quiet:
        with checked(*failed):
            if json:
                print_json(result)
    elif isinstance(result, results.Verification):
        from sparseprune.report.checks import broken_lines, verify_table

        # The table has every tensor.
        with checked(*broken_lines(result)):
            print_table(verify_table(result))
    else:
        from sparseprune.report.checks import lost_line

        with checked(*[lost_line(result)] if failed else ()):
            print_masks(result)


verify = command(api.verify, show_verified)


def print_masks(result: "results.MaskVerification") -> None:
    """The table of what masks drop and what of it is not zero, on stdout."""
    from sparseprune.report.checks import verify_masks_table
    from sparseprune.report.wording import copies_line, many

    print_table(verify_masks_table(result))
    if result.holds:
        dropped, tensors = many(result.totals.pruned, "element"), many(len(result.tensors), "tensor")
        print_text(f"masks drop {dropped} of {tensors}; all of them are zero\n")
    for line in copies_line("not looked at", result.files_not_read):
        print_text(f"{line}\n")
