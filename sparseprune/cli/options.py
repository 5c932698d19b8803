"""The arguments and options that several commands share, said once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

CheckpointArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CKPT",
        help="A .safetensors file, or a directory with model.safetensors or with shards and their index.",
        show_default=False,
    ),
]
SpecArgument = Annotated[
    str,
    typer.Argument(
        metavar="SPEC", help="A spec.toml, or the name of a shipped one, such as 2of4.", show_default=False
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="OUT", help="Where the result goes.", show_default=False),
]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="auto|cpu|cuda[:N]", help="auto takes CUDA where there is one.")
]
JobsOption = Annotated[
    int,
    typer.Option(
        "--jobs",
        metavar="N",
        min=1,
        help="Pieces that are worked on at one time.",
        show_default="one for each core",
    ),
]
MaskFormatOption = Annotated[
    Literal["bool", "packed"],
    typer.Option("--mask-format", help="One byte for each element, or one bit."),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
JsonOption = Annotated[bool, typer.Option("--json", help="The report as JSON on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Tell about every tensor.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def default_jobs() -> int:
    """One job for each core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
