"""The application: its commands in the order in which help lists them, and the version."""

from __future__ import annotations

from typing import Annotated

import typer

from sparseprune import __version__
from sparseprune.cli.apply import apply, mask
from sparseprune.cli.calibrate import calibrate
from sparseprune.cli.compare import compare
from sparseprune.cli.demo import demo
from sparseprune.cli.evaluate import evaluate
from sparseprune.cli.inspect import inspect
from sparseprune.cli.plan import plan
from sparseprune.cli.reapply import reapply
from sparseprune.cli.remove import remove
from sparseprune.cli.specs import specs
from sparseprune.cli.verify import verify

app = typer.Typer(
    name="sparseprune",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sparseprune {__version__}")
        raise typer.Exit


@app.callback()
def sparseprune(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Prune neural-network checkpoints as files.

    Example: sparseprune apply ./llama 2of4
    """


_COMMANDS = (apply, mask, plan, remove, calibrate, evaluate, specs, inspect, verify, reapply, compare, demo)
for _command in _COMMANDS:
    app.command()(_command)
