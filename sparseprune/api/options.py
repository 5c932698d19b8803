"""The options of the public functions, each written once: type, flags, help and default in words.

The command line makes its own options from these annotations. Owns also what is made of several of them
before a command sees it. Imports nothing that takes time.
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

_ADDRESS = re.compile(r"[a-z0-9]+:/")


class Option:
    """How a parameter is given on the command line: `usage` has its flags, if any, and its metavar.

    `group` is the heading of help under which it stands. `shown` is the default in words, `minimum` the least
    number, `typed` the type on the command line where it is not that of the parameter, and `unless` a flag
    that gives None, with its help. An option of pairs has an `example`; what stands before the equals sign
    `may_be_empty`. `among` names what a shell completes it by: words, or a kind of names.
    """

    def __init__(
        self,
        usage: str,
        help: str,
        group: str | None = None,
        *,
        shown: str | None = None,
        minimum: int | None = None,
        typed: object = None,
        unless: tuple[str, str] | None = None,
        example: str | None = None,
        may_be_empty: bool = False,
        among: str | None = None,
    ) -> None:
        words = usage.split()
        self.flags = [word for word in words if word.startswith("-")]
        self.metavar = words[-1] if len(words) > len(self.flags) else None
        self.help, self.shown, self.minimum, self.typed, self.unless = help, shown, minimum, typed, unless
        self.example, self.may_be_empty, self.group, self.among = example, may_be_empty, group, among


Place = str | PathLike[str]
_Words = Sequence[str]
Method = Literal["admm", "refit", "none"]
SPECS, VARIABLES = "specs", "variables"
"""What `among` may name beside words: the shipped specs, and the variables of the spec that was typed."""

# What is read and what decides.
Checkpoint = Annotated[
    Place,
    Option(
        "CKPT",
        "The checkpoint: a .safetensors file, or a directory with model.safetensors or with shards and their "
        "index.",
        typed=Path,
    ),
]
_SPEC = "The spec: a TOML file, or the name of a shipped spec such as 2of4."
Spec = Annotated[Place, Option("SPEC", _SPEC, typed=str, among=SPECS)]
SpecOrNone = Annotated[Place | None, Option("[SPEC]", _SPEC, typed=str, among=SPECS)]
SpecToCheck = Annotated[
    Place | None,
    Option("[SPEC]", _SPEC, shown="the spec that CKPT was pruned by", typed=str, among=SPECS),
]
SpecName = Annotated[
    Place | None,
    Option("[NAME]", "The spec to print. Without a name, all specs are listed.", typed=str, among=SPECS),
]
CheckpointToFit = Annotated[
    Place | None, Option("--for CKPT", "List only the specs that fit this checkpoint.", "Input", typed=Path)
]
Dense = Annotated[Place, Option("DENSE", "The checkpoint before pruning.", typed=Path)]
Pruned = Annotated[Place, Option("PRUNED", "The checkpoint after pruning.", typed=Path)]
Against = Annotated[
    Place | None,
    Option("--against DENSE", "Measure the distance to this dense checkpoint.", "Input", typed=Path),
]
Set = Annotated[
    Mapping[str, object] | None,
    Option(
        "--set NAME=VALUE",
        "Set a variable of the spec, or a budget, such as scope.proj.nnz=1. Repeat it for several.",
        "Pruning",
        typed=list[str],
        example="n=2",
        among=VARIABLES,
    ),
]
Goal = Annotated[
    str | None,
    Option(
        "--target KIND=NUMBER[:NAME]",
        "Find the sparsity that leaves this much: params=6B, active=1B (parameters that one token uses), or "
        "for remove size=12GB. NAME is the variable to change if the spec has several.",
        "Pruning",
    ),
]
Within = Annotated[
    Place | None,
    Option(
        "--within MASKS",
        "Go on from an earlier step: only what these masks keep competes, everything else stays zero. MASKS "
        "as in reapply.",
        "Pruning",
        typed=Path,
    ),
]
Allocation = Annotated[
    bool,
    Option(
        "--allocation",
        "Read the weights and show what each part gets where several parts share a budget.",
        "Pruning",
    ),
]
SpecOfRules = Annotated[
    Place | None,
    Option(
        "--spec SPEC",
        "The spec for --by rule and --plot.",
        "Pruning",
        shown="the spec that CKPT was pruned by",
        typed=str,
        among=SPECS,
    ),
]
ExpertsToKeep = Annotated[
    Place | Sequence[object] | Mapping[str, Sequence[int]] | None,
    Option(
        "--experts KEEP.json",
        "Keep the experts with these numbers, in place of SPEC. The file holds one list for all layers, one "
        'list for each layer with experts, or an object such as {"3": [0, 1, 5]}.',
        "Pruning",
        typed=Path,
    ),
]
TokensToKeep = Annotated[
    Place | Sequence[int] | None,
    Option(
        "--vocabulary ROWS.json",
        "Keep the tokens with these ids, in ascending order: removes rows of embeddings and output heads.",
        "Pruning",
        typed=Path,
    ),
]
AsModel = Annotated[
    str | None,
    Option(
        "--as MODEL_TYPE",
        "Write the config of another model type that computes the same, such as mistral for llama.",
        "Output",
    ),
]

# How survivors are rebuilt, and by which text.
Reconstruct = Annotated[
    Method | None,
    Option(
        "--reconstruct admm|refit|none",
        "Adjust the weights that stay, in every rule that allows it, to keep the layers' outputs. admm also "
        "chooses the mask; refit keeps the mask of the score.",
        "Rebuilding",
        shown="as the spec says; admm with --stats",
    ),
]
StatsToRebuild = Annotated[
    Place | None,
    Option(
        "--stats STATS",
        "Read the statistics that calibrate wrote here, in place of the file that the spec names.",
        "Rebuilding",
        shown="CKPT-stats with --reconstruct, if it exists",
        typed=Path,
    ),
]
Stats = Annotated[
    Place | None,
    Option(
        "--stats STATS",
        "Read the statistics that calibrate wrote, and report the error of each layer's outputs and, if they "
        "have gradients, of the loss.",
        "Report",
        typed=Path,
    ),
]
Text = Annotated[
    Sequence[Place],
    Option(
        "--text FILE",
        "Text, JSON lines (.jsonl) or a JSON list of records, which may be chats. Repeat it for several "
        "files. Only the first 64 characters for each wanted token are read.",
        "Text",
        typed=list[Path],
    ),
]
TextToSweep = Annotated[
    Sequence[Place],
    Option(
        "--text FILE",
        "Rebuild the weights layer by layer with this text, in place of --stats: text, JSON lines or a JSON "
        "list of records. Repeat it for several files.",
        "Text",
        typed=list[Path],
    ),
]
Kind = Annotated[
    Literal["hessian", "norm"],
    Option(
        "--kind hessian|norm",
        "hessian collects the second moments of each layer's inputs, norm only their diagonal.",
        "Output",
    ),
]
Sequences = Annotated[
    int,
    Option("--sequences N", "Number of token sequences, drawn at random from the text.", "Text", minimum=1),
]
_USUAL_LENGTH = "2048, or as many as the model takes"
Length = Annotated[
    int | None,
    Option("--length N", "Number of tokens in a sequence.", "Text", shown=_USUAL_LENGTH, minimum=1),
]
Field = Annotated[
    str | None,
    Option(
        "--field NAME",
        "Field of a record that holds its text or its list of messages.",
        "Text",
        shown="text, messages or conversations",
    ),
]
Seed = Annotated[
    int, Option("--seed N", "Random seed for drawing sequences from the text.", "Text", minimum=0)
]
Special = Annotated[
    bool,
    Option(
        "--special/--no-special",
        "Include special tokens such as [CLS] and BOS in sequences, or leave them out. The model sees them "
        "in use, so they are included by default.",
        "Text",
    ),
]
Gradients = Annotated[
    bool,
    Option(
        "--gradients",
        "Also collect the second moments of the loss gradients at each layer's outputs, to rebuild weights "
        "by their effect on the loss.",
        "Text",
    ),
]
GradientsFirst = Annotated[
    bool,
    Option(
        "--gradients",
        "With --text: first collect gradients of the loss in the dense model, then rebuild weights by their "
        "effect on the loss.",
        "Text",
    ),
]
Tune = Annotated[
    int | None,
    Option(
        "--tune STEPS",
        "With --text: tune what survives of each layer by so many steps of an optimizer, towards the outputs "
        "that it has in the dense model.",
        "Text",
        minimum=0,
    ),
]

# Tensors and masks.
Match = Annotated[
    _Words,
    Option(
        "--match PATTERN",
        "Use only tensors with such a name: * matches within one part of a name, ** across dots. Repeat it "
        "for several.",
        "Tensors",
    ),
]
Exclude = Annotated[
    _Words, Option("--exclude PATTERN", "Leave out tensors with such a name, as in --match.", "Tensors")
]
Masks = Annotated[
    Place | None,
    Option(
        "[MASKS]",
        "The masks: a mask file, a folder or an index of mask files, or an output of sparseprune that has "
        "masks.",
        typed=Path,
    ),
]
_MASKS = "--masks MASKS"
MasksOrNone = Annotated[
    Place | None, Option(_MASKS, "Check against these masks in place of SPEC.", "Masks", typed=Path)
]
MasksToCut = Annotated[
    Place | None, Option(_MASKS, "Remove what these masks drop, in place of SPEC.", "Masks", typed=Path)
]
ZerosOf = Annotated[
    Place | None,
    Option("--zeros-of SPARSE", "Use the zeros of this checkpoint's matrices as masks.", "Masks", typed=Path),
]
Rename = Annotated[
    Mapping[str, str] | None,
    Option(
        "--rename OLD=NEW",
        "Replace OLD by NEW in the names of masks. With an empty OLD, NEW is put before every name.",
        "Masks",
        typed=list[str],
        example="transformer.=model.",
        may_be_empty=True,
    ),
]
Partial = Annotated[
    bool, Option("--partial", "Ignore masks without a tensor and tensors without a mask.", "Masks")
]

# What is reported, and what has to hold.
By = Annotated[
    Literal["tensor", "layer", "module", "rule"],
    Option(
        "--by tensor|layer|module|rule",
        "Show one line for each tensor, layer, rule of the spec, or kind of module over all layers.",
        "Report",
    ),
]
Sort = Annotated[
    str | None,
    Option(
        "--sort COLUMN",
        "Sort lines by a column, such as name, numel or sparsity, in ascending order.",
        "Report",
        shown="as stored",
    ),
]
Reverse = Annotated[bool, Option("--reverse", "Reverse the order of lines.", "Report")]
Pattern = Annotated[
    _Words,
    Option(
        "--pattern N:M[@AXIS]",
        "Also look for this pattern, along the last dimension, along AXIS, or along the last two: @both. "
        "Repeat it for several.",
        "Report",
    ),
]
Block = Annotated[
    _Words,
    Option("--block ROWSxCOLUMNS", "Count zero blocks of this shape. Repeat it for several.", "Report"),
]
Runtimes = Annotated[
    str | None,
    Option(
        "--for RUNTIME,...",
        "Show which tensors these runtimes can use as sparse, and what prevents it for the others: "
        "torch-cutlass, tensorrt, coreml, vllm, ..., or all that use zeros.",
        "Report",
    ),
]
Plot = Annotated[
    Place | None,
    Option(
        "--plot FILE", "Write a picture of the result, as .png, .svg, .pdf or .html.", "Output", typed=Path
    ),
]
Tensor = Annotated[
    str | None,
    Option(
        "--tensor NAME",
        "With --plot: draw the mask of this tensor in close-up, with the blocks and scopes of its spec.",
        "Output",
    ),
]
Window = Annotated[
    str | None,
    Option(
        "--window ROW,COLUMN",
        "With --tensor: where the close-up begins, or BEGIN:END,BEGIN:END of rows and columns.",
        "Output",
        shown="a place with kept and zero weights",
    ),
]
_REQUIRE, _UNLESS = "--require CONDITION", "Exit with 1 unless this condition holds, such as"
Require = Annotated[
    _Words, Option(_REQUIRE, f'{_UNLESS} "sparsity>=0.5 in **.mlp.**". Repeat it for several.', "Checks")
]
RequireMean = Annotated[
    _Words, Option(_REQUIRE, f'{_UNLESS} "kl<=0.05" or "top1>=95%". Repeat it for several.', "Checks")
]
Strict = Annotated[
    bool, Option("--strict", "Turn warnings into errors, before any work if possible.", "Checks")
]

# Where results go.
Output = Annotated[
    Place | None, Option("--output -o OUT", "Write the result to this path.", "Output", typed=Path)
]
_FORMATS = ("--mask-format packed|bool", "Store one bit or one byte for each element of a mask.", "Output")
MaskFormat = Annotated[Literal["packed", "bool"], Option(*_FORMATS)]
MaskFormatOrNone = Annotated[
    Literal["packed", "bool"] | None, Option(*_FORMATS, unless=("--no-masks", "Write no masks."))
]
Force = Annotated[bool, Option("--force", "Replace an existing output.", "Output")]

# What a run may use.
_RESOURCES = "Resources"
Device = Annotated[
    str,
    Option(
        "--device auto|cpu|cuda[:N]",
        "Compute on this device. auto uses CUDA if there is a GPU.",
        _RESOURCES,
        among="auto cpu cuda",
    ),
]
Jobs = Annotated[
    int | None,
    Option(
        "--jobs -j N", "Number of parallel threads.", _RESOURCES, shown="one for each CPU core", minimum=1
    ),
]
_MEMORY, _QUARTER = "--memory SIZE", "a quarter of RAM"
Memory = Annotated[
    int | str | None,
    Option(
        _MEMORY,
        "Limit the memory of the run, such as 8GiB or 500MB.",
        _RESOURCES,
        shown=f"{_QUARTER}, at most 1GiB without --text",
        typed=str,
    ),
]
On = Annotated[
    str | None,
    Option(
        "--on auto|HOST:PORT",
        "Share the work among the machines of a Ray cluster, which all see the same files. auto takes the "
        "cluster that runs here, or starts one on this machine. --jobs and --memory count for each machine.",
        _RESOURCES,
        among="auto",
    ),
]
MomentMemory = Annotated[
    int | str | None,
    Option(
        _MEMORY,
        "Limit the memory for second moments, beside one layer of the model. With less memory, the model "
        "reads the text several times.",
        _RESOURCES,
        shown=_QUARTER,
        typed=str,
    ),
]
StateMemory = Annotated[
    int | str | None,
    Option(
        _MEMORY,
        "Limit the memory for hidden states and logits, beside one layer of the model. Hidden states over "
        "the limit are kept on disk.",
        _RESOURCES,
        shown=_QUARTER,
        typed=str,
    ),
]


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint and the spec that it is pruned by, with other values for the spec's variables.

    `goal` is what shall be left, as it was typed. `reconstruct` and `stats` are asked of every rule; None for
    what the spec says. With a `text` survivors are rebuilt in a sweep. `within` are masks of an earlier step.
    """

    checkpoint: Path
    spec: str
    overrides: Mapping[str, str]
    goal: str | None = None
    reconstruct: Method | None = None
    stats: Path | None = None
    text: AskedText | None = None
    within: Path | None = None


def source(
    checkpoint: Place,
    spec: Place,
    variables: Mapping[str, object] | None,
    goal: str | None = None,
    rebuilding: tuple[Method | None, Place | None] = (None, None),
    text: AskedText | None = None,
    *,
    within: Path | None = None,
) -> Source:
    """What was given; `rebuilding` is the method and the statistics that survivors are rebuilt by."""
    reconstruct, stats = rebuilding
    if reconstruct not in {None, *get_args(Method)}:
        raise SparsepruneError(f"--reconstruct {reconstruct}: wanted admm, refit or none")
    text = text_if_any(text)
    if text is not None and reconstruct == "none":
        raise SparsepruneError("--reconstruct none: survivors are rebuilt by --text; leave one of them out")
    where, given = located(checkpoint), path_or_none(stats)
    return Source(where, os.fspath(spec), texts(variables), goal, reconstruct, given, text, within)


def text_if_any(text: AskedText | None) -> AskedText | None:
    """The text that was asked for; SparsepruneError for its options where no text is given."""
    if text is None or text.windows.text:
        return text
    if text.words:
        option = text.words[0].partition(" ")[0]
        raise SparsepruneError(f"{option}: goes with --text FILE, which is not given")
    return None


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


def located(place: Place) -> Path:
    """The path that was given, or the address of an object store or of the hub, which reads as paths do."""
    if not _ADDRESS.match(os.fspath(place)):
        return Path(place)
    from sparseprune.checkpoint import remote

    return remote.located(place)


def path_or_none(place: Place | None) -> Path | None:
    return None if place is None else located(place)
