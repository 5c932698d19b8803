"""The commands that read and tell, and their options; each hands on what was typed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sparseprune.cli.console import Warnings, reported
from sparseprune.cli.options import (
    CheckpointArgument,
    CsvOption,
    DebugOption,
    ExcludeOption,
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
    StrictOption,
    default_jobs,
    default_memory,
    form_of,
    listing_of,
    memory_of,
    overrides_of,
)


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
    strict: StrictOption = False,
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
            warnings=Warnings(strict=strict),
        )
        run(request, draw)


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
    strict: StrictOption = False,
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
                warnings=Warnings(strict=strict, quiet=quiet),
            )
        )


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
