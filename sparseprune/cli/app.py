"""The commands and their options; each hands what was typed to the module that does it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparseprune import __version__
from sparseprune.cli.console import reported
from sparseprune.cli.options import (
    CheckpointArgument,
    DebugOption,
    DeviceOption,
    DryRunOption,
    ForceOption,
    JobsOption,
    JsonOption,
    MaskFormatOption,
    MemoryOption,
    NoMasksOption,
    OutputOption,
    QuietOption,
    SetOption,
    SpecArgument,
    VerboseOption,
    default_jobs,
    default_memory,
    memory_of,
    overrides_of,
)

if TYPE_CHECKING:
    from sparseprune.cli.request import Request

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
    memory: MemoryOption = None,
    mask_format: MaskFormatOption = "bool",
    no_masks: NoMasksOption = False,
    set_: SetOption = None,
    dry_run: DryRunOption = False,
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
        from sparseprune.cli.request import Request

        request = Request(
            checkpoint=checkpoint,
            spec=spec,
            output=output,
            device=device,
            jobs=jobs,
            memory=memory_of(memory) or default_memory(),
            mask_format=None if no_masks else mask_format,
            overrides=overrides_of(set_),
            force=force,
            json=json,
            quiet=quiet,
            verbose=verbose,
        )
        _apply(request, dry_run=dry_run)


@app.command()
def mask(
    checkpoint: CheckpointArgument,
    spec: SpecArgument,
    output: OutputOption = None,
    device: DeviceOption = "auto",
    jobs: JobsOption = default_jobs(),
    memory: MemoryOption = None,
    mask_format: MaskFormatOption = "bool",
    set_: SetOption = None,
    dry_run: DryRunOption = False,
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
        from sparseprune.cli.request import Request

        request = Request(
            checkpoint=checkpoint,
            spec=spec,
            output=output,
            device=device,
            jobs=jobs,
            memory=memory_of(memory) or default_memory(),
            mask_format=mask_format,
            overrides=overrides_of(set_),
            force=force,
            json=json,
            quiet=quiet,
            verbose=verbose,
            weights=False,
        )
        _apply(request, dry_run=dry_run)


@app.command()
def plan(
    checkpoint: CheckpointArgument,
    spec: SpecArgument,
    output: OutputOption = None,
    jobs: JobsOption = default_jobs(),
    memory: MemoryOption = None,
    mask_format: MaskFormatOption = "bool",
    no_masks: NoMasksOption = False,
    set_: SetOption = None,
    draw: Annotated[
        str | None,
        typer.Option(
            "--draw",
            metavar="RULE|all|none",
            help="Draw the blocks and scopes of a rule; on a terminal the first one is drawn anyway.",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what a spec binds to and what it would do, without reading tensor data.

    Rule by rule: tensors, views, block grids, scopes, what survives. Then what no rule reaches, and the
    size of the output.

    Example: sparseprune plan ./llama 2of4
    """
    with reported(debug):
        from sparseprune.cli.plan import run
        from sparseprune.cli.request import Request

        request = Request(
            checkpoint=checkpoint,
            spec=spec,
            output=output,
            device="cpu",
            jobs=jobs,
            memory=memory_of(memory) or default_memory(),
            mask_format=None if no_masks else mask_format,
            overrides=overrides_of(set_),
            json=json,
        )
        run(request, draw)


@app.command()
def specs(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="The spec to print; all of them are listed without.", show_default=False
        ),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """List the specs that ship with sparseprune, or print one.

    Example: sparseprune specs 2of4
    """
    with reported(debug):
        from sparseprune.cli.specs import run

        run(name)


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


def _apply(request: Request, *, dry_run: bool) -> None:
    """Do it, or show what would be done."""
    if dry_run:
        from sparseprune.cli.plan import run as show

        show(request)
    else:
        from sparseprune.cli.apply import run

        run(request)
