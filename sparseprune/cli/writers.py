"""The command that is still declared apart."""

from typing import Any

from sparseprune import api
from sparseprune.api.options import default_jobs, default_memory, memory_of
from sparseprune.cli.command import Call, DryRun, Json, Quiet, Verbose, command
from sparseprune.cli.console import Warnings


def _remove(
    call: "Call[Any]",
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    from sparseprune.cli.removal_source import RemoveRequest
    from sparseprune.cli.remove import run

    options = dict(call.options)
    strict = options.pop("strict")
    overrides, memory = options.pop("set"), options.pop("memory")
    options["jobs"] = options["jobs"] or default_jobs()
    request = RemoveRequest(
        **options,
        memory=memory_of(memory) if memory else default_memory(),
        overrides=overrides,
        dry_run=dry_run,
        json=json,
        quiet=quiet,
        verbose=verbose,
        warnings=Warnings(strict=strict, quiet=quiet),
    )
    run(request)


remove = command(api.remove, _remove)
