"""The arguments and options that several commands share, said once."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from sparseprune.errors import SparsepruneError

_GIB = 1 << 30
_SIZE = re.compile(r"(?P<number>[0-9]{1,15}(\.[0-9]*)?|\.[0-9]+) *(?P<unit>[a-z]*)", re.IGNORECASE)
_UNITS = {"": 1, "b": 1} | {
    name: base**power
    for power, letter in enumerate("kmgt", 1)
    for name, base in ((letter, 1000), (f"{letter}b", 1000), (f"{letter}ib", 1024))
}

CheckpointArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CKPT",
        readable=False,  # told, with its path and exit code 3, by whoever reads it
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
    typer.Option(
        "--output",
        "-o",
        metavar="OUT",
        help="Where the result goes.",
        show_default=False,
        readable=False,  # it is replaced, never read
    ),
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
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Memory that a run may use, such as 8GiB or 500MB.",
        show_default="a quarter of RAM, 1GiB at most",
    ),
]
MaskFormatOption = Annotated[
    Literal["bool", "packed"],
    typer.Option("--mask-format", help="One byte for each element, or one bit."),
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Make every warning an error, before any work where that can be.")
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
MatchOption = Annotated[
    list[str] | None,
    typer.Option(
        "--match",
        metavar="PATTERN",
        help="Only tensors of this name; * matches inside a part of it, ** across the dots.",
        show_default=False,
    ),
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="PATTERN", help="No tensors of this name.", show_default=False),
]
SortOption = Annotated[
    str | None,
    typer.Option(
        "--sort",
        metavar="COLUMN",
        help="Order by a column, such as name, numel or sparsity, the smallest first.",
        show_default="as stored",
    ),
]
ReverseOption = Annotated[bool, typer.Option("--reverse", help="The other way round.")]
RequireOption = Annotated[
    list[str] | None,
    typer.Option(
        "--require",
        metavar="CONDITION",
        help='Fail unless it holds, such as "sparsity>=0.5 in **.mlp.**".',
        show_default=False,
    ),
]
PlotOption = Annotated[
    Path | None,
    typer.Option(
        "--plot", metavar="FILE", help="Draw it, as .png, .svg or one .html page.", show_default=False
    ),
]
PartialOption = Annotated[
    bool, typer.Option("--partial", help="Let masks and tensors be that have no counterpart.")
]
CsvOption = Annotated[
    bool,
    typer.Option(
        "--csv", help="The rows as CSV on stdout; an apostrophe stands before what would be a formula."
    ),
]
MarkdownOption = Annotated[bool, typer.Option("--markdown", help="The table as Markdown on stdout.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


Form = Literal["table", "json", "csv", "markdown"]


@dataclass(frozen=True, slots=True)
class Listing:
    """Which tensors are told of, and in which order: patterns as typed, a column to sort by or None."""

    match: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    sort: str | None = None
    reverse: bool = False


def listing_of(
    match: list[str] | None, exclude: list[str] | None, sort: str | None, reverse: bool
) -> Listing:
    """The options of a listing, as they were typed."""
    return Listing(tuple(match or ()), tuple(exclude or ()), sort, reverse)


def form_of(*, json: bool, csv: bool, markdown: bool) -> Form:
    """In which form the result goes to stdout; SparsepruneError where several were asked for."""
    asked: dict[Form, bool] = {"json": json, "csv": csv, "markdown": markdown}
    chosen = [form for form, wanted in asked.items() if wanted]
    if len(chosen) > 1:
        words = " and ".join(f"--{form}" for form in chosen)
        raise SparsepruneError(f"{words} exclude each other; give one of them")
    return chosen[0] if chosen else "table"


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


def memory_of(text: str | None) -> int | None:
    """Bytes of a `--memory` size, None where none was given.

    >>> memory_of("1.5GiB"), memory_of("500 mb"), memory_of("4096"), memory_of(None)
    (1610612736, 500000000, 4096, None)
    """
    if text is None:
        return None
    found = _SIZE.fullmatch(text.strip())
    nbytes = int(float(found["number"]) * _UNITS.get(found["unit"].lower(), 0)) if found else 0
    if nbytes <= 0:
        raise SparsepruneError(f"--memory {text}: wanted a size such as 8GiB or 500MB")
    return nbytes


def default_memory(root: Path = Path("/")) -> int:
    """Bytes: a quarter of the RAM that this process may use, 1 GiB at most; `root` as below."""
    return min(_GIB, quarter_of_memory(root))


def quarter_of_memory(root: Path = Path("/")) -> int:
    """Bytes: a quarter of the RAM that this process may use.

    That is the machine's, or what the control group of the process or one around it allows; `root` is
    where /proc and /sys lie.
    """
    limits = [
        int(text)
        for text in (
            *_control_group(root, "", "memory.max"),
            *_control_group(root, "memory", "memory.limit_in_bytes"),
        )
        if text.isdecimal()
    ]
    return max(1, min(limit // 4 for limit in (*limits, _physical_memory())))


def default_jobs(root: Path = Path("/")) -> int:
    """One job for each core that this process may use; a container may allow it less than it sees."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for text in _control_group(root, "", "cpu.max"):
        quota, _, period = text.partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period):
            cores = min(cores, -(-int(quota) // int(period)))
    return max(cores, 1)


def _physical_memory() -> int:
    """Bytes of RAM of the machine, or enough where it does not say."""
    try:
        nbytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 4 * _GIB
    return nbytes if nbytes > 0 else 4 * _GIB


def _control_group(root: Path, controller: str, file: str) -> list[str]:
    """What `file` holds in the control group of this process and in each one around it.

    `controller` names a tree of version 1, "" is that of version 2. In a container the groups outside are
    not there, and the outermost one inside is that of the container.
    """
    top = root / "sys/fs/cgroup" / controller
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if path and controller in controllers.split(","):
            own = top / path.lstrip("/")
            around = [folder for folder in own.parents if folder.is_relative_to(top)]
            return [text for folder in (own, *around) if (text := _text(folder / file))]
    return []


def _text(path: Path) -> str:
    """What stands in a small file, nothing where it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
