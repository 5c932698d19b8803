"""Statistics files: second moments of inputs and gradients, and what experts do, in safetensors files.

Owns their names, metadata and layout, and which tensors belong to a weight: matrices with a common input
share that of their inputs. A file without our metadata holds ready tensors, named by the weights. Knows no
models; written by calibration, read by execution and the reports.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import prod
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from sparseprune.checkpoint.discovery import INDEX_SUFFIX, RESULTS, SUFFIX
from sparseprune.checkpoint.documents import read_object_if_any, strict_json
from sparseprune.checkpoint.header import Header, TensorEntry, lay_out
from sparseprune.checkpoint.layout import (
    OutputFile,
    OutputLayout,
    absolute,
    index_file,
    numbered,
    places_in,
    refuse_read_only,
    results_mode,
)
from sparseprune.checkpoint.remote import beside
from sparseprune.checkpoint.source import Checkpoint, Shard, StoredTensor, open_checkpoint
from sparseprune.engine.dtypes import DTYPES
from sparseprune.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sparseprune.checkpoint.layout import Place

StatisticsKind = Literal["hessian", "norm"]
STATISTICS_KEY = "sparseprune.statistics"
# What is kept of each expert, in this order: how many tokens were routed to it, and the sums over these
# of its gate and of its gate times the norm of its output.
ROUTING = ("tokens", "gate", "gated_norm")
SHARD_BYTES = 5_000_000_000  # a file of this size is full
_STEM = "statistics"
_BESIDE = ("gradients", "routing")  # what there may be beside the moments of inputs
_REPORT = PurePosixPath(RESULTS, "report.json")


class Collected(Struct, frozen=True):
    """One tensor of statistics over `features`: of one matrix, or of each of `experts`.

    Of "inputs": `weights` are the tensors that are multiplied with one input, each with the dimension of its
    input features; the first one gives the tensor its name. Of "gradients": one weight, with the dimension
    of its outputs, in `groups` of consecutive ones. Of "routing": one weight, the last of each expert.
    """

    features: int
    experts: int | None
    weights: Mapping[str, int]
    about: Literal["inputs", "gradients", "routing"] = "inputs"
    groups: int = 1

    @property
    def name(self) -> str:
        first = next(iter(self.weights))
        return first if self.about == "inputs" else f"{first}.{self.about}"

    def shape(self, kind: StatisticsKind) -> tuple[int, ...]:
        """(features, features) or (features,), with the experts in front where there are some.

        Groups of gradients are (groups, features / groups, features / groups), routing is `ROUTING` numbers.
        """
        size = self.features // self.groups
        if self.about == "routing":
            one: tuple[int, ...] = (len(ROUTING),)
        elif self.about == "gradients":
            one = (size, size) if self.groups == 1 else (self.groups, size, size)
        else:
            one = (size, size) if kind == "hessian" else (size,)
        return one if self.experts is None else (self.experts, *one)

    @property
    def dtype(self) -> str:
        return "F64" if self.about == "routing" else "F32"


class Statistic(Struct, frozen=True):
    """The statistics of a weight; `kind` None is a ready tensor, of which only its name is known.

    "hessian" is the mean of x x^T over the rows x that the weight multiplied (for an expert, their sum
    divided by all tokens of the text), "norm" the root of its diagonal; `input_dim` is None where the file
    does not have it. `tokens` counts these rows, one number for each matrix; () where it is not known.
    `gradients` is the mean of g g^T over the same rows (for an expert, those that were routed to it), g the
    gradient of the loss at the outputs; `routing` is what its experts did, see `ROUTING`. Where inputs are
    those of a pruned model, `mixed` is the mean of z x^T, z the inputs in the dense one, and `residual` that
    of r x^T in the shape of the weight, see `target_weights`.
    """

    stored: StoredTensor
    kind: StatisticsKind | None = None
    input_dim: int | None = None
    tokens: tuple[int, ...] = ()
    gradients: StoredTensor | None = None
    routing: StoredTensor | None = None
    mixed: StoredTensor | None = None
    residual: StoredTensor | None = None

    def stacked(self, shape: tuple[int, ...], dim: int) -> tuple[tuple[int, ...], int]:
        """The shape of the weight as a stack and the dimension of its inputs there, where it is one.

        Experts may lie one below another in a matrix (DBRX): then there are statistics of each. Other shapes
        stay as they are.
        """
        own = self.stored.shape
        apart = len(shape) == 2 and len(own) == {"hessian": 3, "norm": 2}.get(self.kind or "", 0)
        if not apart or not own[0] or shape[0] % own[0]:
            return shape, dim
        return (own[0], shape[0] // own[0], shape[1]), dim % 2 + 1


@dataclass(frozen=True)
class Statistics:
    """A file or directory of statistics, its headers read; `of` has one entry for every weight.

    `gradients` has those of every weight, also of one without a moment of its inputs.
    """

    checkpoint: Checkpoint
    of: Mapping[str, Statistic] = field(repr=False)
    gradients: Mapping[str, StoredTensor] = field(repr=False)


def statistics_beside(checkpoint: Path) -> Path:
    """Where calibrate writes statistics of a checkpoint unless it is told otherwise."""
    place = beside(checkpoint)
    return place.with_name(f"{place.name}-stats")


def open_statistics(path: Path) -> Statistics:
    """The statistics in a safetensors file or directory; CheckpointError where they contradict themselves."""
    checkpoint = open_checkpoint(path)
    counts = _counts(path) if checkpoint.is_directory else {}
    found: dict[str, Statistic] = {}
    beside: dict[str, dict[str, StoredTensor]] = {about: {} for about in _BESIDE}
    for shard, header in checkpoint.headers.items():
        described = _described(shard, header)
        for entry in checkpoint.counted(shard):
            stored = checkpoint.tensors[entry.name]
            if described is None:
                found[entry.name] = Statistic(stored)
                continue
            for about, tensors in beside.items():
                tensors.update(dict.fromkeys(_new(described.of(about, entry.name), tensors, shard), stored))
            for weight, dim in _new(described.of("weights", entry.name), found, shard).items():
                found[weight] = Statistic(stored, described.kind, dim, counts.get(entry.name, ()))
    for about, tensors in beside.items():
        for weight in tensors.keys() & found.keys():
            found[weight] = replace(found[weight], **{about: tensors[weight]})
    gradients = MappingProxyType(beside["gradients"])
    return Statistics(checkpoint, MappingProxyType(found), gradients)


def statistics_in_memory(
    path: Path,
    tensors: Iterable[Collected],
    tokens: Mapping[str, tuple[int, ...]],
    *,
    mixed: bool,
    residuals: Mapping[str, tuple[int, ...]],
) -> Statistics:
    """Statistics that are in no file: under `path` they are known by the headers that a file would have.

    `tokens` are counted by the names of `tensors`, `residuals` have shapes by the names of weights.
    """
    shard = Shard(path, PurePosixPath(path.name))
    found: dict[str, StoredTensor] = {}
    of: dict[str, Statistic] = {}

    def add(name: str, shape: tuple[int, ...]) -> StoredTensor:
        begin = 0 if not found else next(reversed(found.values())).entry.end
        entry = TensorEntry(name, "F32", shape, begin, begin + 4 * prod(shape))
        return found.setdefault(name, StoredTensor(entry, shard))

    for one in tensors:
        if one.about == "inputs":
            moment = add(one.name, one.shape("hessian"))
            beside = add(f"{one.name}.mixed", one.shape("hessian")) if mixed else None
            for weight, dim in one.weights.items():
                counts = tokens.get(one.name, ())
                of[weight] = Statistic(moment, "hessian", dim, counts, mixed=beside)
        elif one.about == "gradients":
            (weight,) = one.weights
            of[weight] = replace(of[weight], gradients=add(one.name, one.shape("hessian")))
    for weight, shape in residuals.items():
        of[weight] = replace(of[weight], residual=add(f"{weight}.residual", shape))
    header = Header(tuple(one.entry for one in found.values()), {}, b"")
    checkpoint = Checkpoint(path, {shard: header}, is_directory=False, others=(), tensors=found)
    gradients = {name: one.gradients for name, one in of.items() if one.gradients is not None}
    return Statistics(checkpoint, MappingProxyType(of), MappingProxyType(gradients))


def _new(weights: Mapping[str, int], found: Mapping[str, Any], shard: Shard) -> Mapping[str, int]:
    """CheckpointError if some of these weights were met before."""
    for weight in weights.keys() & found.keys():
        raise CheckpointError(f"{shard.path}: has statistics of {weight} twice; calibrate again")
    return weights


def lay_out_statistics(
    checkpoint: Checkpoint,
    target: Path,
    kind: StatisticsKind,
    tensors: Sequence[Collected],
    shard_bytes: int = SHARD_BYTES,
) -> OutputLayout:
    """The output that holds these statistics of a checkpoint, in this order, and a report: a directory."""
    groups = list(_shards(kind, tensors, shard_bytes))
    paths = numbered(_STEM, len(groups)) if len(groups) > 1 else [PurePosixPath(_STEM + SUFFIX)]
    mode = results_mode(checkpoint)
    files: list[OutputFile] = []
    places: dict[str, Place] = {}
    for path, group in zip(paths, groups, strict=True):
        header = lay_out(((one.name, one.dtype, one.shape(kind)) for one in group), _metadata(kind, group))
        files.append(OutputFile(path, header.file_size, header.raw, mode))
        places |= places_in(path, header)
    if len(groups) > 1:
        files.append(index_file(PurePosixPath(_STEM + INDEX_SUFFIX), places, mode))
    refuse_read_only(target)
    return OutputLayout(
        checkpoint=checkpoint,
        target=absolute(target),
        is_directory=True,
        files=tuple(files),
        report_file=_REPORT,
        spec_file=None,
        weights=MappingProxyType(places),
        results_mode=mode,
    )


def _shards(kind: StatisticsKind, tensors: Sequence[Collected], limit: int) -> Iterable[list[Collected]]:
    group: list[Collected] = []
    held = 0
    for one in tensors:
        nbytes = DTYPES[one.dtype].itemsize * prod(one.shape(kind))
        if group and held + nbytes > limit:
            yield group
            group, held = [], 0
        group.append(one)
        held += nbytes
    yield group


def _metadata(kind: StatisticsKind, group: Sequence[Collected]) -> dict[str, str]:
    weights = {
        key: {one.name: dict(one.weights) for one in group if one.about == about}
        for key, about in (("weights", "inputs"), *((about, about) for about in _BESIDE))
    }
    # Files without gradients have the bytes that they had before there were any.
    document = {"kind": kind, **{key: some for key, some in weights.items() if some or key == "weights"}}
    return {"format": "pt", STATISTICS_KEY: json.dumps(document, ensure_ascii=False, separators=(",", ":"))}


class _Described(Struct, frozen=True):
    """What our metadata says: by tensor its weights, each with a dimension."""

    kind: StatisticsKind
    tensors: Mapping[str, Mapping[str, Mapping[str, int]]]

    def of(self, about: str, tensor: str) -> Mapping[str, int]:
        return self.tensors[about].get(tensor, {})


def _described(shard: Shard, header: Header) -> _Described | None:
    """Kind and weights by tensor from our metadata; None for a shard without it."""
    text = header.metadata.get(STATISTICS_KEY)
    if text is None:
        return None
    try:
        document = strict_json(text)
        kind = document["kind"]
        tensors = {"weights": document["weights"], **{about: document.get(about, {}) for about in _BESIDE}}
        right = kind in {"hessian", "norm"} and all(
            isinstance(dim, int) and dim >= 0
            for named in tensors.values()
            for weights in named.values()
            for dim in weights.values()
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        right = False
    if not right:
        raise CheckpointError(
            f"{shard.path}: its metadata {STATISTICS_KEY} is not that of a statistics file; calibrate again"
        )
    return _Described(kind, tensors)


def _counts(path: Path) -> dict[str, tuple[int, ...]]:
    """The tokens that were counted for each tensor, from the report beside the files; {} without one."""
    report = read_object_if_any(path / _REPORT) or {}
    counts: dict[str, tuple[int, ...]] = {}
    matrices = report.get("matrices")
    for matrix in matrices if isinstance(matrices, list) else []:
        if isinstance(matrix, dict) and isinstance(matrix.get("name"), str):
            tokens = matrix.get("tokens")
            listed: list[Any] = tokens if isinstance(tokens, list) else [tokens]
            if all(isinstance(count, int) for count in listed):
                counts[matrix["name"]] = tuple(listed)
    return counts
