"""The commands that write an output, and their options; each hands on what was typed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sparseprune.cli.console import Warnings, reported
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
    PartialOption,
    QuietOption,
    SetOption,
    SpecArgument,
    StrictOption,
    VerboseOption,
    default_jobs,
    default_memory,
    memory_of,
    overrides_of,
    quarter_of_memory,
)

if TYPE_CHECKING:
    from sparseprune.cli.request import Request


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
    strict: StrictOption = False,
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
            warnings=Warnings(strict=strict, quiet=quiet),
        )
        _apply(request, dry_run=dry_run)


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
    strict: StrictOption = False,
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
            warnings=Warnings(strict=strict, quiet=quiet),
            weights=False,
        )
        _apply(request, dry_run=dry_run)


def remove(
    checkpoint: CheckpointArgument,
    spec: Annotated[
        str | None,
        typer.Argument(
            metavar="[SPEC]", help="A spec.toml, or the name of a shipped one.", show_default=False
        ),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(
            "--masks",
            metavar="MASKS",
            help="Cut out what these drop, instead of what a spec does.",
            show_default=False,
        ),
    ] = None,
    output: OutputOption = None,
    partial: PartialOption = False,
    device: DeviceOption = "auto",
    jobs: JobsOption = default_jobs(),
    memory: MemoryOption = None,
    set_: SetOption = None,
    dry_run: DryRunOption = False,
    strict: StrictOption = False,
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a smaller dense checkpoint: channels, heads, experts or layers that lose are cut out.

    The config is rewritten, so that the model's own class loads it; it computes what the zeroed checkpoint
    does. The output is CKPT-smaller beside the directory unless --output says otherwise.

    Example: sparseprune remove ./llama decoder-mlp-channels -o ./llama-smaller
    """
    with reported(debug):
        from sparseprune.cli.removal_source import RemoveRequest
        from sparseprune.cli.remove import run

        request = RemoveRequest(
            checkpoint=checkpoint,
            spec=spec,
            masks=masks,
            output=output,
            device=device,
            jobs=jobs,
            memory=memory_of(memory) or default_memory(),
            partial=partial,
            overrides=overrides_of(set_),
            dry_run=dry_run,
            force=force,
            json=json,
            quiet=quiet,
            verbose=verbose,
            warnings=Warnings(strict=strict, quiet=quiet),
        )

        run(request)


def calibrate(
    checkpoint: CheckpointArgument,
    text: Annotated[
        list[Path],
        typer.Option(
            "--text",
            metavar="FILE",
            help="Text, JSON lines (.jsonl) or a list of records (.json), which may be chats; repeat it for "
            "several. Of long files the first part is read, 64 characters for each token that is asked for.",
            show_default=False,
        ),
    ],
    output: OutputOption = None,
    stats: Annotated[
        Literal["hessian", "norm"],
        typer.Option("--stats", help="All second moments, or the norms of the inputs alone."),
    ] = "hessian",
    sequences: Annotated[
        int, typer.Option("--sequences", metavar="N", min=1, help="How many, drawn at random.")
    ] = 128,
    length: Annotated[
        int | None,
        typer.Option(
            "--length",
            metavar="N",
            min=1,
            help="Tokens in a sequence.",
            show_default="2048, or what the model takes",
        ),
    ] = None,
    field: Annotated[
        str | None,
        typer.Option(
            "--field",
            metavar="NAME",
            help="Which field of a record is text, or a list of messages.",
            show_default="text, messages or conversations",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Of the draw among all sequences of the text.")
    ] = 0,
    special: Annotated[
        bool,
        typer.Option(help="Whether [CLS], BOS and the like count; in use a model meets them too."),
    ] = True,
    device: DeviceOption = "auto",
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="Memory for second moments, beside the model; the text passes as often as it takes.",
            show_default="a quarter of RAM",
        ),
    ] = None,
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Run text through the checkpoint's model and write what its matrices are multiplied with.

    The output is CKPT-stats beside the directory unless --output says otherwise: for every matrix the second
    moment of its inputs, which [reconstruct] and the scores wanda and obd of a spec read. A run that was
    interrupted is continued by the same command. Needs transformers: pip install 'sparseprune[calibrate]'.

    Example: sparseprune calibrate ./llama --text corpus.txt -o stats
    """
    with reported(debug):
        from sparseprune.cli.calibrate import Request, run

        request = Request(
            checkpoint=checkpoint,
            text=tuple(text),
            output=output,
            kind=stats,
            sequences=sequences,
            length=length,
            field=field,
            seed=seed,
            device=device,
            memory=memory_of(memory) or quarter_of_memory(),
            special=special,
            force=force,
            json=json,
            quiet=quiet,
            verbose=verbose,
        )
        run(request)


def reapply(
    checkpoint: CheckpointArgument,
    masks: Annotated[
        Path,
        typer.Argument(
            metavar="MASKS",
            help="A mask file, a folder or an index of some, or an output of sparseprune that has masks.",
            show_default=False,
        ),
    ],
    output: OutputOption = None,
    partial: PartialOption = False,
    jobs: JobsOption = default_jobs(),
    memory: MemoryOption = None,
    mask_format: MaskFormatOption = "bool",
    no_masks: NoMasksOption = False,
    strict: StrictOption = False,
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Put the zeros of masks back, after fine-tuning, merging or quantization; tell how many were lost.

    The output is CKPT-pruned beside a directory, or m.pruned.safetensors beside m.safetensors, unless
    --output says otherwise.

    Example: sparseprune reapply ./llama-tuned ./llama-2of4 -o ./llama-tuned-2of4
    """
    with reported(debug):
        from sparseprune.cli.reapply import ReapplyRequest, run

        run(
            ReapplyRequest(
                checkpoint=checkpoint,
                masks=masks,
                output=output,
                partial=partial,
                jobs=jobs,
                memory=memory_of(memory) or default_memory(),
                mask_format=None if no_masks else mask_format,
                force=force,
                json=json,
                quiet=quiet,
                verbose=verbose,
                warnings=Warnings(strict=strict, quiet=quiet),
            )
        )


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
