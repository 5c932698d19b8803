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
from sparseprune.cli.help import WIDEST, Command, Commands
from sparseprune.cli.inspect import inspect
from sparseprune.cli.plan import plan
from sparseprune.cli.reapply import reapply
from sparseprune.cli.remove import remove
from sparseprune.cli.specs import specs
from sparseprune.cli.verify import verify

app = typer.Typer(
    name="sparseprune",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": WIDEST},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sparseprune {__version__}")
        raise typer.Exit


@app.callback()
def sparseprune(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Prune neural-network checkpoints as files.

    Example: sparseprune apply ./llama 2of4

    `sparseprune COMMAND --help` explains a command and its options.
    """


_COMMANDS = {
    "Prune": (apply, mask, remove, reapply),
    "Look": (plan, specs, inspect, verify, compare),
    "Use data": (calibrate, evaluate),
    "Try out": (demo,),
}
for _group, _commands in _COMMANDS.items():
    for _command in _commands:
        app.command(cls=Command, rich_help_panel=_group)(_command)
