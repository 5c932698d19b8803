"""The options of the public functions, each written once: type, flags, help and default in words.

The command line makes its own options from these annotations. Owns also how sizes are written, and how much
memory and how many threads a run gets by default. Imports nothing that takes time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from sparseprune.errors import SparsepruneError

if TYPE_CHECKING:
    from sparseprune.api.windows import AskedText

_GIB = 1 << 30
_SIZE = re.compile(r"(?P<number>[0-9]{1,15}(\.[0-9]*)?|\.[0-9]+) *(?P<unit>[a-z]*)", re.IGNORECASE)
_UNITS = {"": 1, "b": 1} | {
    name: base**power
    for power, letter in enumerate("kmgt", 1)
    for name, base in ((letter, 1000), (f"{letter}b", 1000), (f"{letter}ib", 1024))
}


class Option:
    """How a parameter is given on the command line: `usage` has its flags, if any, and its metavar.

    `shown` is the default in words, `minimum` the least number, `typed` the type on the command line where it
    is not that of the parameter, and `unless` a flag that gives None, with its help. An option of pairs has
    an `example`; what stands before the equals sign `may_be_empty`.
    """

    def __init__(
        self,
        usage: str,
        help: str,
        *,
        shown: str | None = None,
        minimum: int | None = None,
        typed: object = None,
        unless: tuple[str, str] | None = None,
        example: str | None = None,
        may_be_empty: bool = False,
    ) -> None:
        words = usage.split()
        self.flags = [word for word in words if word.startswith("-")]
        self.metavar = words[-1] if len(words) > len(self.flags) else None
        self.help, self.shown, self.minimum, self.typed, self.unless = help, shown, minimum, typed, unless
        self.example, self.may_be_empty = example, may_be_empty


Place = str | PathLike[str]
_Words = Sequence[str]

Checkpoint = Annotated[
    Place,
    Option(
        "CKPT",
        "A .safetensors file, or a directory with model.safetensors or with shards and their index.",
        typed=Path,
    ),
]
Spec = Annotated[Place, Option("SPEC", "A spec.toml, or the name of a shipped one, such as 2of4.", typed=str)]
SpecOrNone = Annotated[
    Place | None, Option("[SPEC]", "A spec.toml, or the name of a shipped one.", typed=str)
]
Output = Annotated[Place | None, Option("--output -o OUT", "Where the result goes.", typed=Path)]
Device = Annotated[str, Option("--device auto|cpu|cuda[:N]", "auto takes CUDA where there is one.")]
Jobs = Annotated[
    int | None,
    Option("--jobs N", "Pieces that are worked on at one time.", shown="one for each core", minimum=1),
]
_MEMORY, _QUARTER = "--memory SIZE", "a quarter of RAM"
Memory = Annotated[
    int | str | None,
    Option(
        _MEMORY,
        "Memory that a run may use, such as 8GiB or 500MB.",
        shown=f"{_QUARTER}, 1GiB at most without --text",
        typed=str,
    ),
]
_FORMATS = ("--mask-format", "One bit for each element, or one byte.")
MaskFormat = Annotated[Literal["packed", "bool"], Option(*_FORMATS)]
MaskFormatOrNone = Annotated[
    Literal["packed", "bool"] | None, Option(*_FORMATS, unless=("--no-masks", "Write no masks."))
]
Allocation = Annotated[
    bool,
    Option(
        "--allocation",
        "Where instances of a rule share a budget, read the weights and tell what each of them gets.",
    ),
]
Set = Annotated[
    Mapping[str, object] | None,
    Option(
        "--set NAME=VALUE",
        "Another value for one of the spec's [vars], or for a budget, such as scope.proj.nnz=1.",
        typed=list[str],
        example="n=2",
    ),
]
Goal = Annotated[
    str | None,
    Option(
        "--target KIND=NUMBER[:NAME]",
        "Find the sparsity that leaves so much: params=6B, active=1B (what a token uses), or for remove "
        "size=12GB. NAME is what to vary, where a spec has several numbers.",
    ),
]
Strict = Annotated[
    bool, Option("--strict", "Make every warning an error, before any work where that can be.")
]
Force = Annotated[bool, Option("--force", "Replace an output that exists.")]
ZerosOf = Annotated[
    Place | None,
    Option("--zeros-of SPARSE", "Masks are the zeros of this checkpoint's matrices.", typed=Path),
]
Rename = Annotated[
    Mapping[str, str] | None,
    Option(
        "--rename OLD=NEW",
        "Replace a text in the names of masks; NEW stands in front of all where OLD is empty.",
        typed=list[str],
        example="transformer.=model.",
        may_be_empty=True,
    ),
]
AsModel = Annotated[
    str | None,
    Option(
        "--as MODEL_TYPE",
        "Write the config of another model type whose class computes the same, such as mistral for llama.",
    ),
]
Partial = Annotated[bool, Option("--partial", "Ignore masks without a tensor and tensors without a mask.")]
Match = Annotated[
    _Words,
    Option(
        "--match PATTERN", "Only tensors of this name; * matches inside a part of it, ** across the dots."
    ),
]
Exclude = Annotated[_Words, Option("--exclude PATTERN", "No tensors of this name.")]
Sort = Annotated[
    str | None,
    Option(
        "--sort COLUMN",
        "Order by a column, such as name, numel or sparsity, the smallest first.",
        shown="as stored",
    ),
]
Reverse = Annotated[bool, Option("--reverse", "The other way round.")]
Require = Annotated[
    _Words, Option("--require CONDITION", 'Fail unless it holds, such as "sparsity>=0.5 in **.mlp.**".')
]
Plot = Annotated[Place | None, Option("--plot FILE", "Draw it, as .png, .svg or one .html page.", typed=Path)]

SpecName = Annotated[
    Place | None, Option("NAME", "The spec to print; all of them are listed without.", typed=str)
]
CheckpointToFit = Annotated[
    Place | None, Option("--for CKPT", "List the specs that fit this checkpoint.", typed=Path)
]
By = Annotated[
    Literal["tensor", "layer", "module", "rule"],
    Option("--by", "One line for each; module: what is alike in all layers."),
]
Pattern = Annotated[
    _Words,
    Option("--pattern N:M[@AXIS]", "Look for this pattern as well, along the last dimension or another."),
]
Block = Annotated[_Words, Option("--block ROWSxCOLUMNS", "Count zero blocks of this shape.")]
Runtimes = Annotated[
    str | None,
    Option(
        "--for RUNTIME,...",
        "Tell which tensors these can use sparse, and what is in the way: torch-cutlass, torch-cusparselt, "
        "tensorrt, asp.",
    ),
]
Tensor = Annotated[
    str | None,
    Option(
        "--tensor NAME", "Plot the mask of this tensor from close up, with the blocks and scopes of its spec."
    ),
]
SpecOfRules = Annotated[
    Place | None,
    Option(
        "--spec SPEC",
        "For --by rule and --plot: the spec, where the checkpoint has none in sparseprune/.",
        typed=str,
    ),
]
Dense = Annotated[Place, Option("DENSE", "The checkpoint before.", typed=Path)]
Pruned = Annotated[Place, Option("PRUNED", "The checkpoint after.", typed=Path)]
Stats = Annotated[
    Place | None,
    Option(
        "--stats STATS",
        "What calibrate wrote: tells the error of each matrix, in its outputs and, with --gradients, in "
        "units of the loss.",
        typed=Path,
    ),
]
Method = Literal["admm", "refit", "none"]
Reconstruct = Annotated[
    Method | None,
    Option(
        "--reconstruct admm|refit|none",
        "Rebuild what survives, in every rule that can; refit keeps the mask of the score.",
        shown="as the spec says; admm with --stats",
    ),
]
StatsToRebuild = Annotated[
    Place | None,
    Option(
        "--stats STATS",
        "What calibrate wrote: statistics to rebuild survivors by, in place of the spec's file.",
        shown="CKPT-stats with --reconstruct, where it is there",
        typed=Path,
    ),
]
Masks = Annotated[
    Place | None,
    Option(
        "[MASKS]",
        "A mask file, a folder or an index of some, or an output of sparseprune that has masks.",
        typed=Path,
    ),
]
MasksOrNone = Annotated[
    Place | None, Option("--masks MASKS", "Check against masks instead of a spec.", typed=Path)
]
MasksToCut = Annotated[
    Place | None, Option("--masks MASKS", "Cut out what these drop, instead of what a spec does.", typed=Path)
]
ExpertsToKeep = Annotated[
    Place | Sequence[object] | Mapping[str, Sequence[int]] | None,
    Option(
        "--experts KEEP.json",
        "The numbers of the experts that stay, instead of a spec: one list, a list with one for each layer "
        'that has experts, or an object such as {"3": [0, 1, 5]}.',
        typed=Path,
    ),
]
TokensToKeep = Annotated[
    Place | Sequence[int] | None,
    Option(
        "--vocabulary ROWS.json",
        "The ids of the tokens that stay, in ascending order: cuts embeddings and output heads.",
        typed=Path,
    ),
]
Text = Annotated[
    Sequence[Place],
    Option(
        "--text FILE",
        "Text, JSON lines (.jsonl) or a list of records (.json), which may be chats; repeat it for several. "
        "Of long files the first part is read, 64 characters for each token that is asked for.",
        typed=list[Path],
    ),
]
TextToSweep = Annotated[
    Sequence[Place],
    Option(
        "--text FILE",
        "Rebuild survivors layer by layer by what this text gives, in place of --stats: text, JSON lines or "
        "a list of records; repeat it for several.",
        typed=list[Path],
    ),
]
Kind = Annotated[
    Literal["hessian", "norm"], Option("--stats", "All second moments, or the norms of the inputs alone.")
]
Sequences = Annotated[int, Option("--sequences N", "How many, drawn at random.", minimum=1)]
_USUAL_LENGTH = "2048, or what the model takes"
Length = Annotated[int | None, Option("--length N", "Tokens in a sequence.", shown=_USUAL_LENGTH, minimum=1)]
Field = Annotated[
    str | None,
    Option(
        "--field NAME",
        "Which field of a record is text, or a list of messages.",
        shown="text, messages or conversations",
    ),
]
Seed = Annotated[int, Option("--seed", "Of the draw among all sequences of the text.", minimum=0)]
Special = Annotated[
    bool,
    Option("--special/--no-special", "Whether [CLS], BOS and the like count; in use a model meets them too."),
]
Gradients = Annotated[
    bool,
    Option(
        "--gradients",
        "Also second moments of the loss gradients at the outputs, for rebuilding in the loss metric.",
    ),
]
GradientsFirst = Annotated[
    bool,
    Option(
        "--gradients",
        "With --text: take gradients of the loss in the dense model first, and rebuild in the loss metric.",
    ),
]
MomentMemory = Annotated[
    int | str | None,
    Option(
        _MEMORY,
        "Memory for second moments, beside a layer of the model, which runs as often as it takes.",
        shown=_QUARTER,
        typed=str,
    ),
]
StateMemory = Annotated[
    int | str | None,
    Option(
        _MEMORY,
        "Memory for hidden states and logits, beside one layer; states without room there wait on disk.",
        shown=_QUARTER,
        typed=str,
    ),
]
Against = Annotated[
    Place | None, Option("--against DENSE", "The checkpoint that it was made from.", typed=Path)
]
RequireMean = Annotated[
    _Words, Option("--require CONDITION", 'Fail unless it holds, such as "kl<=0.05" or "top1>=95%".')
]


@dataclass(frozen=True, slots=True)
class Machine:
    """What a run may use: a device as it was given, threads, and bytes of memory."""

    device: str
    jobs: int
    memory: int


def machine(
    device: str = "cpu",
    jobs: int | None = None,
    memory: int | str | None = None,
    *,
    sweeps: bool = False,
) -> Machine:
    """What was given, and the defaults for the rest; SparsepruneError for a size that is none.

    One that `sweeps` a text through a model has more memory by default.
    """
    if jobs is not None and jobs < 1:
        raise SparsepruneError(f"--jobs {jobs}: wanted 1 or more")
    usual = quarter_of_memory() if sweeps else default_memory()
    nbytes = usual if memory is None else memory_of(memory)
    return Machine(device, jobs or default_jobs(), nbytes)


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint and the spec that it is pruned by, with other values for the spec's variables.

    `goal` is what shall be left, as it was typed. `reconstruct` and `stats` are asked of every rule; None for
    what the spec says. With a `text` survivors are rebuilt in a sweep.
    """

    checkpoint: Path
    spec: str
    overrides: Mapping[str, str]
    goal: str | None = None
    reconstruct: Method | None = None
    stats: Path | None = None
    text: AskedText | None = None


def source(
    checkpoint: Place,
    spec: Place,
    variables: Mapping[str, object] | None,
    goal: str | None = None,
    rebuilding: tuple[Method | None, Place | None] = (None, None),
    text: AskedText | None = None,
) -> Source:
    """What was given; `rebuilding` is the method and the statistics that survivors are rebuilt by."""
    reconstruct, stats = rebuilding
    if reconstruct not in {None, *get_args(Method)}:
        raise SparsepruneError(f"--reconstruct {reconstruct}: wanted admm, refit or none")
    if text is not None and not text.windows.text:
        if text.gradients:
            raise SparsepruneError("--gradients: goes with --text, of which they are taken")
        text = None
    if text is not None and reconstruct == "none":
        raise SparsepruneError("--reconstruct none: survivors are rebuilt by --text; leave one of them out")
    given = path_or_none(stats)
    return Source(Path(checkpoint), os.fspath(spec), texts(variables), goal, reconstruct, given, text)


def stats_beside(checkpoint: Path) -> Path:
    """Where calibrate writes statistics of a checkpoint unless it is told otherwise."""
    place = checkpoint.absolute()
    return place.with_name(f"{place.name}-stats")


def texts(variables: Mapping[str, object] | None) -> dict[str, str]:
    """Values of the variables of a spec, as TOML or as an expression would have them.

    >>> texts({"n": 2, "keep": [1, 2], "dim": "config.head_dim"})
    {'n': '2', 'keep': '[1, 2]', 'dim': 'config.head_dim'}
    """
    return {name: str(value) for name, value in (variables or {}).items()}


@dataclass(frozen=True, slots=True)
class Target:
    """Where a result goes: without a `mask_format` no masks, without `weights` masks alone.

    `resized`: slices are cut out of what is decided, and the config is one of another `model_type` if given.
    """

    output: Path | None
    mask_format: Literal["packed", "bool"] | None = None
    force: bool = False
    weights: bool = True
    resized: bool = False
    model_type: str | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """Which tensors a result has, and in which order: patterns, a column to sort by or None."""

    match: Sequence[str] = ()
    exclude: Sequence[str] = ()
    sort: str | None = None
    reverse: bool = False


def path_or_none(place: Place | None) -> Path | None:
    return None if place is None else Path(place)


def memory_of(size: int | str) -> int:
    """Bytes of a `--memory` size.

    >>> memory_of("1.5GiB"), memory_of("500 mb"), memory_of("4096")
    (1610612736, 500000000, 4096)
    """
    if isinstance(size, int):
        return size
    found = _SIZE.fullmatch(size.strip())
    nbytes = int(float(found["number"]) * _UNITS.get(found["unit"].lower(), 0)) if found else 0
    if nbytes <= 0:
        raise SparsepruneError(f"--memory {size}: wanted a size such as 8GiB or 500MB")
    return nbytes


def default_memory(root: Path = Path("/")) -> int:
    """Bytes: a quarter of the RAM that this process may use, 1 GiB at most; `root` as below."""
    return min(_GIB, quarter_of_memory(root))


def quarter_of_memory(root: Path = Path("/")) -> int:
    """Bytes: a quarter of the RAM that the machine has, or that a control group around the process allows."""
    found = _control_group(root, "", "memory.max")
    found += _control_group(root, "memory", "memory.limit_in_bytes")
    limits = [int(text) for text in found if text.isdecimal()]
    return max(1, min([*limits, _physical_memory()]) // 4)


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
    """The text of a small file, nothing where it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
