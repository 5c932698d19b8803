"""The commands and their options; each hands what was typed to the module that does it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sparseprune import __version__
from sparseprune.cli.console import reported
from sparseprune.cli.options import (
    CheckpointArgument,
    CsvOption,
    DebugOption,
    DeviceOption,
    DryRunOption,
    ExcludeOption,
    ForceOption,
    JobsOption,
    JsonOption,
    MarkdownOption,
    MaskFormatOption,
    MatchOption,
    MemoryOption,
    NoMasksOption,
    OutputOption,
    PartialOption,
    PlotOption,
    QuietOption,
    RequireOption,
    ReverseOption,
    SetOption,
    SortOption,
    SpecArgument,
    VerboseOption,
    default_jobs,
    default_memory,
    form_of,
    listing_of,
    memory_of,
    overrides_of,
    quarter_of_memory,
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
        from sparseprune.cli.choosing import RemoveRequest
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
        )

        run(request)


@app.command()
def calibrate(
    checkpoint: CheckpointArgument,
    text: Annotated[
        list[Path],
        typer.Option(
            "--text",
            metavar="FILE",
            help="Text, or JSON lines (.jsonl); repeat it for several. Of long files the first part is read, "
            "64 characters for each token that is asked for.",
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
            "--field", metavar="NAME", help="Which field of JSON lines is text.", show_default="text"
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
    moment of its inputs, which [reconstruct] and the scores wanda and obd of a spec read. Needs transformers:
    pip install 'sparseprune[calibrate]'.

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
    by: Annotated[
        Literal["tensor", "layer", "module", "rule"],
        typer.Option("--by", help="One line for each; module: what is alike in all layers."),
    ] = "tensor",
    tree: Annotated[bool, typer.Option("--tree", help="As a tree of the names' parts.")] = False,
    match: MatchOption = None,
    exclude: ExcludeOption = None,
    sort: SortOption = None,
    reverse: ReverseOption = False,
    pattern: Annotated[
        list[str] | None,
        typer.Option(
            "--pattern",
            metavar="N:M[@AXIS]",
            help="Look for this pattern as well, along the last dimension or another.",
            show_default=False,
        ),
    ] = None,
    block: Annotated[
        list[str] | None,
        typer.Option(
            "--block", metavar="ROWSxCOLUMNS", help="Count zero blocks of this shape.", show_default=False
        ),
    ] = None,
    for_: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="RUNTIME,...",
            help="Tell which tensors these can use sparse, and what is in the way: torch-cutlass, "
            "torch-cusparselt, tensorrt, asp.",
            show_default=False,
        ),
    ] = None,
    require: RequireOption = None,
    plot: PlotOption = None,
    tensor: Annotated[
        str | None,
        typer.Option(
            "--tensor",
            metavar="NAME",
            help="Plot the mask of this tensor from close up, with the blocks and scopes of its spec.",
            show_default=False,
        ),
    ] = None,
    spec: Annotated[
        str | None,
        typer.Option(
            "--spec",
            metavar="SPEC",
            help="For --by rule and --plot: the spec, where the checkpoint has none in sparseprune/.",
            show_default=False,
        ),
    ] = None,
    set_: SetOption = None,
    jobs: JobsOption = default_jobs(),
    json: JsonOption = False,
    csv: CsvOption = False,
    markdown: MarkdownOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Report how sparse a checkpoint is, where, in which patterns, and which runtimes can use it.

    With --require the exit code is 1 where a tensor fails, and stderr names each.

    Example: sparseprune inspect ./llama-2of4 --require "2:4 in **_proj.weight"
    """
    with reported(debug):
        from sparseprune.cli.inspect import InspectRequest, run

        run(
            InspectRequest(
                checkpoint=checkpoint,
                by=by,
                tree=tree,
                listing=listing_of(match, exclude, sort, reverse),
                patterns=tuple(pattern or ()),
                blocks=tuple(block or ()),
                runtimes=for_,
                requirements=tuple(require or ()),
                plot=plot,
                tensor=tensor,
                spec=spec,
                overrides=overrides_of(set_),
                jobs=jobs,
                form=form_of(json=json, csv=csv, markdown=markdown),
                quiet=quiet,
            )
        )


@app.command()
def verify(
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
            "--masks", metavar="MASKS", help="Check against masks instead of a spec.", show_default=False
        ),
    ] = None,
    partial: PartialOption = False,
    set_: SetOption = None,
    jobs: JobsOption = default_jobs(),
    memory: MemoryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Check that a checkpoint is as sparse as a spec or masks say; exit 1 where it is not.

    Against a spec: no scope has more than nnz blocks that are not zero. Against masks: every weight that a
    mask drops is zero. Broken scopes and lost zeros are counted, tensor by tensor, with the first place.

    Example: sparseprune verify ./llama-2of4 2of4
    """
    with reported(debug):
        from sparseprune.cli.verify import VerifyRequest, run

        run(
            VerifyRequest(
                checkpoint=checkpoint,
                spec=spec,
                masks=masks,
                partial=partial,
                overrides=overrides_of(set_),
                jobs=jobs,
                memory=memory_of(memory) or default_memory(),
                json=json,
                quiet=quiet,
            )
        )


@app.command()
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
            )
        )


@app.command()
def compare(
    dense: Annotated[
        Path,
        typer.Argument(metavar="DENSE", readable=False, help="The checkpoint before.", show_default=False),
    ],
    pruned: Annotated[
        Path,
        typer.Argument(metavar="PRUNED", readable=False, help="The checkpoint after.", show_default=False),
    ],
    match: MatchOption = None,
    exclude: ExcludeOption = None,
    sort: SortOption = None,
    reverse: ReverseOption = False,
    require: RequireOption = None,
    stats: Annotated[
        Path | None,
        typer.Option(
            "--stats",
            metavar="STATS",
            readable=False,
            help="What calibrate wrote: tells the output error of each matrix.",
            show_default=False,
        ),
    ] = None,
    plot: PlotOption = None,
    jobs: JobsOption = default_jobs(),
    json: JsonOption = False,
    csv: CsvOption = False,
    markdown: MarkdownOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare two checkpoints: what was zeroed, what energy is kept, which survivors were altered.

    Tensors that were added, removed or reshaped are named. With --stats it tells by how much the outputs of
    matrices change, relative to the dense ones. With --require the exit code is 1 where a tensor
    fails, and stderr names each.

    Example: sparseprune compare ./llama ./llama-2of4 --require "altered==0"
    """
    with reported(debug):
        from sparseprune.cli.compare import CompareRequest, run

        run(
            CompareRequest(
                dense=dense,
                pruned=pruned,
                listing=listing_of(match, exclude, sort, reverse),
                requirements=tuple(require or ()),
                plot=plot,
                stats=stats,
                jobs=jobs,
                form=form_of(json=json, csv=csv, markdown=markdown),
                quiet=quiet,
            )
        )


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
