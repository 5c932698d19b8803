"""Collecting: the second moments of all inputs, in as many passes over the text as the memory requires.

Owns the sums, the content and the end of a pass, how an interrupted pass continues, and the place of each
moment in the output. Called by `calibrate`.
"""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections import defaultdict
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from msgspec import Struct

from sparseprune.calibration.watching import (
    EnoughError,
    Product,
    SharedInputs,
    StoredAs,
    Watch,
    renumbered,
    siblings,
    stored_as,
    without_statistics,
)
from sparseprune.checkpoint import Collected
from sparseprune.checkpoint.threads import side_by_side
from sparseprune.errors import MachineError, SparsepruneError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from io import BufferedReader

    from torch import Tensor

    from sparseprune.calibration.loading import LoadedModel
    from sparseprune.calibration.text import Sequences
    from sparseprune.checkpoint import Checkpoint, Sink, StatisticsKind

_BATCH_TOKENS = 4096  # in one forward pass
# The sums of a pass are saved every _PAUSE seconds, or after _PAUSE_SHARE times the time that saving takes.
_PAUSE, _PAUSE_SHARE = 120.0, 20
_CPU = torch.device("cpu")


class Unit(Struct, frozen=True, eq=False):
    """The sums for one tensor of statistics, for a stack those of the matrices [begin, end).

    `last` is the number of the last product with the parameter in a forward pass.
    """

    collected: Collected
    parameter: str
    begin: int
    end: int
    last: int

    @property
    def place(self) -> int:
        """The place of its first matrix in its tensor: 0 if an expert has a tensor of its own."""
        return 0 if self.collected.experts is None else self.begin

    def nbytes(self, kind: StatisticsKind) -> int:
        """Memory that its sums take."""
        one = self.collected.features
        return (self.end - self.begin) * (4 * one * one if kind == "hessian" else 8 * one)


class Counted(Struct, frozen=True):
    """Rows added up for a tensor of statistics, and the divisors of its sums, by matrix."""

    rows: list[int]
    divisors: list[int]


@dataclass(frozen=True)
class Calibration:
    """The plan of a calibration: tensors of statistics in order, tensors without any and why, the passes."""

    tensors: tuple[Collected, ...]
    without: tuple[tuple[str, str], ...]
    passes: tuple[tuple[Unit, ...], ...]
    first: dict[str, int] = field(repr=False)


def plan_calibration(
    loaded: LoadedModel, sequences: Sequences, checkpoint: Checkpoint, kind: StatisticsKind, memory: int
) -> Calibration:
    """Run the first sequence to find which matrices text reaches; split them into passes of `memory` bytes.

    Raises:
        SparsepruneError: no matrix of the checkpoint is multiplied with text, or one needs more memory.
    """
    # transformers fills missing weights with random numbers: allowed for a head, refused for a layer.
    lacking = [name for name in loaded.missing if any(piece.isdigit() for piece in name.split("."))]
    if lacking:
        raise SparsepruneError(
            f"{checkpoint.path}: lacks {len(lacking)} weights of the model that config.json describes, such "
            f"as {lacking[0]}, so that it cannot be run"
        )
    shared = SharedInputs()
    with closing(Watch(loaded.model, shared)) as watch:
        watch.begin(sequences.counted[:1])
        with watch:
            loaded.run(sequences.ids[:1])
    groups = shared.groups
    dims, below = dict(shared.input_dims), dict(shared.below)
    last = dict(shared.last)
    for name, like in siblings(shared.last, loaded.model).items():
        groups[name] = renumbered(groups[like], name, like)
        dims[name], last[name] = dims[like], last[like]
        below |= {name: below[like]} if like in below else {}
    stored = stored_as(loaded.model, dims, groups, checkpoint)
    inputs = _inputs_of(loaded, dims, below)
    units = sorted(_units(groups, inputs, last, stored), key=lambda unit: unit.last)
    if not units:
        raise SparsepruneError(
            f"{checkpoint.path}: the model that transformers builds multiplies none of its matrices with text"
        )
    tensors = tuple(dict.fromkeys(unit.collected.name for unit in units))
    by_name = {unit.collected.name: unit.collected for unit in units}
    named = frozenset(name for unit in units for name in unit.collected.weights)
    passes = tuple(_passes(units, kind, memory))
    return Calibration(
        tuple(by_name[name] for name in tensors),
        tuple(without_statistics(loaded.model, named, checkpoint)),
        passes,
        shared.first,
    )


def already_run(sequences: Sequences, plan: Calibration, output: Sink) -> int:
    """Tokens that an interrupted run already put through the model."""
    finished = sum(f"pass {number}" in output.finished for number in range(1, len(plan.passes) + 1))
    done = finished * sequences.ids.numel()
    file = output.aside()
    if file is not None:
        with file:
            head = aside_head(file.readline())
        if head is not None and f"pass {head['pass']}" not in output.finished:
            done += sum(ids.numel() for ids, _ in list(_batches(sequences))[: head["batch"]])
    return done


def passes_digest(plan: Calibration) -> str:
    """A text that is equal for plans whose passes collect the same sums in the same order."""
    units = [
        [(one.collected.name, one.begin, one.end, dict(one.collected.weights)) for one in units]
        for units in plan.passes
    ]
    return json.dumps(units)


def calibrate(
    loaded: LoadedModel,
    sequences: Sequences,
    plan: Calibration,
    output: Sink,
    kind: StatisticsKind,
    progress: Callable[[int, str], None],
) -> dict[str, Counted]:
    """Run the text through the model once for each pass, and write the moments.

    Each sum is divided by its number of rows; if a router chose the tokens of a matrix, by the number of
    tokens of the text, so that experts keep their shares. Finished passes are noted. The sums of the current
    pass are saved at intervals and when the run is interrupted: a later run continues there, with the same
    bytes. Returns the counts by tensor. `progress` gets tokens, without those of `already_run`.

    Raises:
        SparsepruneError: an input that is not finite.
    """
    found = {one.name: Counted(*([0] * (one.experts or 1) for _ in "rd")) for one in plan.tensors}
    for number, units in enumerate(plan.passes, 1):
        label = f"pass {number} of {len(plan.passes)}" if len(plan.passes) > 1 else ""
        counts = output.finished.get(f"pass {number}")
        if counts is None:
            counts = _Pass(loaded, sequences, output, number, label).collected(
                _Collector(units, plan.first, kind), progress
            )
            output.note(f"pass {number}", counts)
            output.flush()
        for unit, (rows, divisors) in zip(units, counts, strict=True):
            part = slice(unit.place, unit.place + unit.end - unit.begin)
            found[unit.collected.name].rows[part] = rows
            found[unit.collected.name].divisors[part] = divisors
    return found


@dataclass
class _Pass:
    """One pass of the text through the model; it continues an interrupted one."""

    loaded: LoadedModel
    sequences: Sequences
    output: Sink
    number: int
    label: str
    batch: int = 0
    saved: float = field(default_factory=time.monotonic)
    pause: float = field(default_factory=lambda: _PAUSE)

    def collected(
        self, collector: _Collector, progress: Callable[[int, str], None]
    ) -> list[tuple[list[int], list[int]]]:
        """Write all moments; return the rows and divisors of each unit."""
        self._continue(collector)
        failures: list[BaseException] = []

        def work() -> None:
            try:
                self._run(collector, progress)
            except BaseException as failure:  # noqa: BLE001  (raised below)
                failures.append(failure)

        try:
            # In its own thread, so that a signal is not raised between a sum and its count.
            side_by_side(work, 1, collector.stop.set)
            if failures:
                raise failures[0]
            return [self._written(collector, unit) for unit in collector.units]
        except KeyboardInterrupt:
            if not failures:
                self._save(collector)
            raise

    def _run(self, collector: _Collector, progress: Callable[[int, str], None]) -> None:
        batches = list(_batches(self.sequences))
        with closing(Watch(self.loaded.model, collector)) as watch:
            while self.batch < len(batches) and not collector.stop.is_set():
                ids, counted = batches[self.batch]
                watch.begin(counted.to(self.loaded.device))
                with suppress(EnoughError), watch:
                    self.loaded.run(ids)
                if collector.stop.is_set():
                    return
                self.batch += 1
                collector.begin_batch()
                progress(ids.numel(), self.label)
                if time.monotonic() - self.saved >= self.pause and self.batch < len(batches):
                    self._save(collector)

    def _save(self, collector: _Collector) -> None:
        """Save the sums for a later run; continue without if there is no room for them."""
        began = time.monotonic()
        with suppress(MachineError):
            self.output.put_aside(collector.pieces({"pass": self.number, "batch": self.batch}))
        self.saved = time.monotonic()
        self.pause = max(_PAUSE, _PAUSE_SHARE * (self.saved - began))

    def _continue(self, collector: _Collector) -> None:
        file = self.output.aside()
        if file is not None:
            with file:
                head = collector.restored(file, self.number)
            self.batch = 0 if head is None else head["batch"]

    def _written(self, collector: _Collector, unit: Unit) -> tuple[list[int], list[int]]:
        rows = collector.rows[unit]
        tokens = self.sequences.tokens
        divisors = [one if one and unit not in collector.routed else tokens for one in rows]
        for place, (one, divisor) in enumerate(zip(collector.sums(unit), divisors, strict=True)):
            _write(unit, place, one / divisor, self.output)
        return rows, divisors


class _Collector:
    """The sums of one pass; ends a forward pass at the first product that it no longer needs.

    `rows` are the numbers of rows added up, by unit and matrix; `routed` are units whose tokens a router
    chose. Once `stop` is set, it adds nothing more.
    """

    def __init__(self, units: Sequence[Unit], first: dict[str, int], kind: StatisticsKind) -> None:
        self.units = units
        self.rows: dict[Unit, list[int]] = {unit: [0] * (unit.end - unit.begin) for unit in units}
        self.routed: set[Unit] = set()
        self.stop = threading.Event()
        self._by_parameter: defaultdict[str, list[Unit]] = defaultdict(list)
        for unit in units:
            self._by_parameter[unit.parameter].append(unit)
        self._last = max(unit.last for unit in units)
        self._first = first
        self._kind = kind
        self._sums: dict[Unit, Tensor] = {}
        # How often rows were added in this batch, and how often an earlier run added rows in the same batch.
        self._added: dict[Unit, int] = dict.fromkeys(units, 0)
        self._before: dict[Unit, int] = dict.fromkeys(units, 0)
        self._previous: tuple[tuple[Any, ...], Tensor] | None = None

    def __call__(self, product: Product) -> None:
        """Add the inputs of a product."""
        if self.stop.is_set():
            raise EnoughError
        inputs = product.inputs
        # Parts of one parameter (the fused rows of q, k and v) have one input, which counts once.
        this = (product.parameter, product.matrix, inputs.data_ptr(), tuple(inputs.shape), inputs._version)  # noqa: SLF001
        same = self._previous is not None and self._previous[0] == this
        self._previous = (this, inputs)  # kept alive, so that its memory is not used again
        wanted = self._by_parameter.get(product.parameter)
        if wanted is None:
            if self._first.get(product.parameter, 0) > self._last:
                raise EnoughError
            return
        for unit in wanted if not same else ():
            if product.routed:
                self.routed.add(unit)
            for place in range(unit.begin, unit.end):
                if product.matrix in {None, place}:
                    self._add(unit, place - unit.begin, product, place)

    def begin_batch(self) -> None:
        """The next products belong to another batch."""
        self._added = dict.fromkeys(self.units, 0)
        self._before = dict.fromkeys(self.units, 0)
        self._previous = None

    def sums(self, unit: Unit, device: torch.device = _CPU) -> Tensor:
        """The sums of a unit, (matrices, features[, features]), on a device or the CPU."""
        sums = self._sums.get(unit)
        if sums is None:
            features = [unit.collected.features] * (2 if self._kind == "hessian" else 1)
            shape = (unit.end - unit.begin, *features)
            dtype = torch.float32 if self._kind == "hessian" else torch.float64
            sums = self._sums[unit] = torch.zeros(shape, dtype=dtype, device=device)
        elif sums.device != device != _CPU:  # sums of an earlier run
            sums = self._sums[unit] = sums.to(device)
        return sums

    def pieces(self, head: dict[str, int]) -> Iterator[bytes | memoryview]:
        """The saved state of a pass: a line of JSON with `head` and the counts, the sums, a checksum."""
        counts = []
        for unit in self.units:
            added = max(self._added[unit], self._before[unit])
            counts.append({"rows": self.rows[unit], "routed": unit in self.routed, "added": added})
        first = json.dumps({**head, "units": counts}).encode() + b"\n"
        check = zlib.crc32(first)
        yield first
        for unit in self.units:
            memory = self.sums(unit).cpu().numpy().reshape(-1).data.cast("B")
            check = zlib.crc32(memory, check)
            yield memory
        yield check.to_bytes(4, "little")

    def restored(self, file: BufferedReader, number: int) -> dict[str, Any] | None:
        """Load the `pieces` of a pass; returns their head, None if they are of another pass or incomplete."""
        head = aside_head(first := file.readline())
        if head is None or head["pass"] != number or len(head["units"]) != len(self.units):
            return None
        check = zlib.crc32(first)
        for unit in self.units:
            memory = self.sums(unit).numpy().reshape(-1).data.cast("B")
            file.readinto(memory)
            check = zlib.crc32(memory, check)
        if file.read() != check.to_bytes(4, "little"):
            self._sums.clear()
            return None
        for unit, one in zip(self.units, head["units"], strict=True):
            self.rows[unit], self._before[unit] = one["rows"], one["added"]
            if one["routed"]:
                self.routed.add(unit)
        return head

    def _add(self, unit: Unit, place: int, product: Product, matrix: int) -> None:
        if self._added[unit] >= self._before[unit]:
            rows = _counted_rows(product, matrix)
            wide = rows.to(torch.float32)
            if self._kind == "hessian":
                self.sums(unit, rows.device)[place].addmm_(wide.T, wide)
            else:
                self.sums(unit, rows.device)[place] += wide.to(torch.float64).square().sum(0)
            self.rows[unit][place] += len(rows)
        self._added[unit] += 1


def aside_head(line: bytes) -> dict[str, Any] | None:
    """The first line of `pieces`; None if it is incomplete."""
    try:
        head = json.loads(line)
    except ValueError:
        return None
    return head if isinstance(head, dict) and {"pass", "batch", "units"} <= head.keys() else None


def _counted_rows(product: Product, place: int) -> Tensor:
    """The inputs of tokens that count, (tokens, features)."""
    rows, counted = product.inputs, product.counted
    if rows.ndim == 3:
        # Every token reaches every matrix of the stack, as zeros unless it was routed there.
        rows = rows[place] if counted is None else rows[place][counted.to(rows.device)]
        return rows[rows.any(-1)]
    return rows if counted is None else rows[counted.to(rows.device)]


def _batches(sequences: Sequences) -> Iterator[tuple[Tensor, Tensor]]:
    length = sequences.ids.shape[1]
    step = max(1, _BATCH_TOKENS // length)
    for begin in range(0, len(sequences.ids), step):
        end = min(begin + step, len(sequences.ids))
        # As many sequences as tokens in each would not tell which of the two dimensions is which.
        cuts = (begin, end - 1, end) if end - begin == length > 1 else (begin, end)
        for first, last in pairwise(cuts):
            yield sequences.ids[first:last], sequences.counted[first:last]


def _write(unit: Unit, place: int, moment: Tensor, output: Sink) -> None:
    """One matrix of a unit, or its norms, at its place in its tensor."""
    one = moment.cpu()
    if not bool(one.isfinite().all()):
        raise SparsepruneError(
            f"{unit.collected.name}: some of its inputs are not finite: the model does not run in its dtype"
        )
    values = (one + one.T).mul_(0.5) if one.ndim == 2 else one.sqrt().to(torch.float32)
    begin = (unit.place + place) * values.numel() * values.element_size()
    output.write_weight(unit.collected.name, begin, values.numpy().reshape(-1).data)


def _inputs_of(
    loaded: LoadedModel, dims: dict[str, int], below: dict[str, int]
) -> dict[str, tuple[int, int | None]]:
    """The inputs of a row of each parameter, and how many matrices it is a stack of, None for one matrix."""
    found: dict[str, tuple[int, int | None]] = {}
    for name, parameter in loaded.model.named_parameters():
        if name in dims:
            matrices = int(parameter.shape[0]) if parameter.ndim == 3 else below.get(name)
            features = int(parameter.shape[dims[name]])
            apart = below.get(name, 1) if dims[name] == 0 else 1
            found[name] = (features // apart, matrices)
    return found


def _units(
    groups: dict[str, str],
    inputs: dict[str, tuple[int, int | None]],
    last: dict[str, int],
    stored: dict[str, list[StoredAs]],
) -> Iterator[Unit]:
    """One unit for each tensor of statistics, one for a whole stack."""
    members: defaultdict[str, list[str]] = defaultdict(list)
    for name, leader in groups.items():
        members[leader].append(name)
    for leader, names in members.items():
        if leader not in inputs:
            continue
        features, experts = inputs[leader]
        found = [one for name in names for one in stored[name]]
        whole = {one.name: one.input_dim for one in found if one.matrix is None}
        if whole:
            yield Unit(Collected(features, experts, whole), leader, 0, experts or 1, last[leader])
        for matrix in sorted({one.matrix for one in found if one.matrix is not None}):
            weights = {one.name: one.input_dim for one in found if one.matrix == matrix}
            yield Unit(Collected(features, None, weights), leader, matrix, matrix + 1, last[leader])


def _passes(units: Sequence[Unit], kind: StatisticsKind, memory: int) -> Iterator[tuple[Unit, ...]]:
    """Units in order, as many in each pass as fit; stacks are split between matrices."""
    taken: list[Unit] = []
    left = memory
    for unit in units:
        begin = unit.begin
        while begin < unit.end:
            each = Unit(unit.collected, unit.parameter, begin, begin + 1, unit.last).nbytes(kind)
            if each > memory:
                raise SparsepruneError(
                    f"--memory {memory}: the second moment of {unit.collected.name} takes {each} bytes; "
                    "give that or more"
                )
            if each > left:
                yield tuple(taken)
                taken, left = [], memory
            end = min(unit.end, begin + max(1, left // each))
            taken.append(Unit(unit.collected, unit.parameter, begin, end, unit.last))
            left -= (end - begin) * each
            begin = end
    yield tuple(taken)
