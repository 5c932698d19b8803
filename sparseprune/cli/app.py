"""The commands and their options; each hands what was typed to the module that does it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparseprune import __version__
from sparseprune.cli.console import reported
from sparseprune.cli.options import (
    CheckpointArgument,
    DebugOption,
    DeviceOption,
    ForceOption,
    JobsOption,
    JsonOption,
    MaskFormatOption,
    OutputOption,
    QuietOption,
    SpecArgument,
    VerboseOption,
    default_jobs,
)

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


@app.command()
def apply(
    checkpoint: CheckpointArgument,
    spec: SpecArgument,
    output: OutputOption = None,
    device: DeviceOption = "auto",
    jobs: JobsOption = default_jobs(),
    mask_format: MaskFormatOption = "bool",
    no_masks: Annotated[bool, typer.Option("--no-masks", help="Write no masks.")] = False,
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Prune a checkpoint: write its weights with the losers zero, masks and a report.

    The output is CKPT-pruned beside a directory, or m.pruned.safetensors beside m.safetensors, unless
    --output says otherwise. Its path is printed on stdout, all else on stderr.

    Example: sparseprune apply ./llama 2of4 -o ./llama-2of4
    """
    with reported(debug):
        from sparseprune.cli.apply import Request, run

        run(
            Request(
                checkpoint=checkpoint,
                spec=spec,
                output=output,
                device=device,
                jobs=jobs,
                mask_format=None if no_masks else mask_format,
                force=force,
                json=json,
                quiet=quiet,
                verbose=verbose,
            )
        )


@app.command()
def mask(
    checkpoint: CheckpointArgument,
    spec: SpecArgument,
    output: OutputOption = None,
    device: DeviceOption = "auto",
    jobs: JobsOption = default_jobs(),
    mask_format: MaskFormatOption = "bool",
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Write only the masks of a spec, True where a weight is kept, and a report.

    The output is CKPT-masks beside a directory, or m.masks.safetensors beside m.safetensors, unless
    --output says otherwise.

    Example: sparseprune mask ./llama 2of4 --mask-format packed
    """
    with reported(debug):
        from sparseprune.cli.apply import Request, run

        run(
            Request(
                checkpoint=checkpoint,
                spec=spec,
                output=output,
                device=device,
                jobs=jobs,
                mask_format=mask_format,
                force=force,
                json=json,
                quiet=quiet,
                verbose=verbose,
                weights=False,
            )
        )


@app.command()
def inspect(
    checkpoint: CheckpointArgument,
    jobs: JobsOption = default_jobs(),
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Report the zeros, the sparsity and the N:M patterns of every tensor.

    Example: sparseprune inspect ./llama-2of4
    """
    with reported(debug):
        from sparseprune.cli.inspect import run

        run(checkpoint, jobs=jobs, as_json=json, quiet=quiet)


@app.command()
def demo(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER",
            help="A new folder that keeps everything; a temporary one otherwise.",
            show_default=False,
        ),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Make a small decoder checkpoint, prune it twice, and show what came out.

    Example: sparseprune demo ./demo
    """
    with reported(debug):
        from sparseprune.cli.demo import run

        run(folder)
