"""The arguments and options that several commands share, said once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from sparseprune.errors import SparsepruneError

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
JsonOption = Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Tell about every tensor.")]
NoMasksOption = Annotated[bool, typer.Option("--no-masks", help="Write no masks.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Another value for one of the spec's [vars].", show_default=False
    ),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be done, as plan does; write nothing.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def overrides_of(words: list[str] | None) -> dict[str, str]:
    """`--set` words as names and values; the last one of a name counts.

    >>> overrides_of(["n=2", "keep = [1, 2]"])
    {'n': '2', 'keep': '[1, 2]'}
    """
    overrides = {}
    for word in words or ():
        name, equals, value = word.partition("=")
        if not equals or not name.strip():
            raise SparsepruneError(f"--set {word}: wanted NAME=VALUE, such as --set n=2")
        overrides[name.strip()] = value.strip()
    return overrides


def default_jobs() -> int:
    """One job for each core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
