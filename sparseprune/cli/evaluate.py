"""`eval`: what models say of text as a table or JSON."""

from sparseprune import api, results
from sparseprune.cli.command import Call, Json, Quiet, Verbose, command
from sparseprune.cli.console import checked, print_json, print_table
from sparseprune.cli.signals import temporary_folder


def show_evaluated(
    call: "Call[results.Evaluation]", json: Json = False, quiet: Quiet = False, verbose: Verbose = False
) -> None:
    with temporary_folder("sparseprune-") as scratch:
        result, failed = call.checked(scratch=scratch)
    rate = result.sequences * result.length / max(result.seconds, 1e-9)
    call.summarize([f"{result.seconds:.1f} s, {rate:,.0f} tokens/s, on {result.device}"])
    with checked(*failed):
        if json:
            print_json(result)
        elif not quiet:
            from sparseprune.report.evaluation import evaluation_table

            print_table(evaluation_table(result, all_tokens=verbose))


evaluate = command(api.evaluate, show_evaluated, "eval")
