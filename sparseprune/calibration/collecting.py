"""Collecting: the sums of all statistics, in as many passes over the text as the memory requires.

Owns the sums, the content and the end of a pass, how an interrupted pass continues, and the place of each
sum in the output. Called by `calibrate`.
"""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections import defaultdict
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from msgspec import Struct

from sparseprune.calibration.gradients import differentiable
from sparseprune.calibration.watching import EnoughError, Watch
from sparseprune.checkpoint.threads import side_by_side
from sparseprune.errors import MachineError, SparsepruneError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from io import BufferedReader

    from torch import Tensor

    from sparseprune.calibration.gradients import States
    from sparseprune.calibration.loading import LoadedModel
    from sparseprune.calibration.planning import Calibration, Unit
    from sparseprune.calibration.text import Sequences
    from sparseprune.calibration.watching import Product
    from sparseprune.checkpoint import Sink, StatisticsKind

_BATCH_TOKENS = 4096  # in one forward pass
# Outputs of products in one forward pass that is followed by a pass back, which needs about three times them.
_BATCH_VALUES = 1 << 27
# The sums of a pass are saved every _PAUSE seconds, or after _PAUSE_SHARE times the time that saving takes.
_PAUSE, _PAUSE_SHARE = 120.0, 20


class Counted(Struct, frozen=True):
    """Rows added up for a tensor of statistics, the divisors of its sums, and sums of routing, by matrix."""

    rows: list[int]
    divisors: list[int]
    values: list[list[float]]


def _nothing(matrices: int) -> Counted:
    return Counted([0] * matrices, [0] * matrices, [[] for _ in range(matrices)])


def already_run(sequences: Sequences, plan: Calibration, output: Sink) -> int:
    """Tokens that an interrupted run already put through the model."""
    finished = sum(f"pass {number}" in output.finished for number in range(1, len(plan.passes) + 1))
    done = finished * sequences.ids.numel()
    file = output.aside()
    if file is not None:
        with file:
            head = aside_head(file.readline())
        if head is not None and f"pass {head['pass']}" not in output.finished:
            batches = list(_batches(sequences, plan.values))[: head["batch"]]
            done += sum(map(len, batches)) * sequences.ids.shape[1]
    return done


def calibrate(
    loaded: LoadedModel,
    sequences: Sequences,
    plan: Calibration,
    output: Sink,
    kind: StatisticsKind,
    progress: Callable[[int, str], None],
) -> dict[str, Counted]:
    """Run the text through the model once for each pass, and write the moments.

    Each sum is divided by its number of rows; moments of inputs, if a router chose the tokens of a matrix, by
    the number of tokens of the text, so that experts keep their shares; what experts did is not divided.
    With the loss of a plan all passes go back, too. Finished passes are noted. The sums of the current
    pass are saved at intervals and when the run is interrupted: a later run continues there, with the same
    bytes. Returns the counts by tensor. `progress` gets tokens, without those of `already_run`.

    Raises:
        SparsepruneError: an input that is not finite.
    """
    found = {one.name: _nothing(one.experts or 1) for one in plan.tensors}
    for number, units in enumerate(plan.passes, 1):
        label = f"pass {number} of {len(plan.passes)}" if len(plan.passes) > 1 else ""
        counts = output.finished.get(f"pass {number}")
        if counts is None:
            counts = _Pass(loaded, sequences, output, number, label, plan).collected(
                _Collector(units, plan.first, kind, loaded.device), progress
            )
            output.note(f"pass {number}", counts)
            output.flush()
        for unit, (rows, divisors, values) in zip(units, counts, strict=True):
            part = slice(unit.place, unit.place + unit.end - unit.begin)
            found[unit.collected.name].rows[part] = rows
            found[unit.collected.name].divisors[part] = divisors
            found[unit.collected.name].values[part] = values
    return found


@dataclass
class _Pass:
    """One pass of the text through the model; it continues an interrupted one."""

    loaded: LoadedModel
    sequences: Sequences
    output: Sink
    number: int
    label: str
    plan: Calibration
    batch: int = 0
    saved: float = field(default_factory=time.monotonic)
    pause: float = field(default_factory=lambda: _PAUSE)

    def collected(
        self, collector: _Collector, progress: Callable[[int, str], None]
    ) -> list[tuple[list[int], list[int], list[list[float]]]]:
        """Write all sums; return the rows and divisors of each unit, and what experts did."""
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
        batches = list(_batches(self.sequences, self.plan.values))
        wanted = nullcontext() if self.plan.loss is None else differentiable(self.loaded.model)
        with closing(Watch(self.loaded.model, collector)) as watch, wanted as states:
            while self.batch < len(batches) and not collector.stop.is_set():
                which = batches[self.batch]
                counted = self.sequences.counted[which.start : which.stop]
                watch.begin(counted.to(self.loaded.device), gradients=collector.wants_gradients)
                with suppress(EnoughError), watch:
                    self._through(watch, states, which)
                if collector.stop.is_set():
                    return
                self.batch += 1
                collector.begin_batch()
                progress(counted.numel(), self.label)
                if time.monotonic() - self.saved >= self.pause and self.batch < len(batches):
                    self._save(collector)

    def _through(self, watch: Watch, states: States | None, which: range) -> None:
        if self.plan.loss is None or states is None:
            self.loaded.run(self.sequences.ids[which.start : which.stop])
        else:
            self.plan.loss.run(self.loaded, watch, states, self.sequences, which)

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

    def _written(self, collector: _Collector, unit: Unit) -> tuple[list[int], list[int], list[list[float]]]:
        rows = collector.rows[unit]
        by_rows = unit.about == "gradients" or unit not in collector.routed
        divisors = [one if one and by_rows else self.sequences.tokens for one in rows]
        if unit.about == "routing":
            divisors = [1] * len(rows)
        for place, (one, divisor) in enumerate(zip(collector.sums(unit), divisors, strict=True)):
            _write(unit, place, one / divisor, self.output)
        return rows, divisors, collector.sums(unit).tolist() if unit.about == "routing" else [[]] * len(rows)


class _Collector:
    """The sums of one pass, on a device; ends a forward pass at the first product that it no longer needs.

    `rows` are the numbers of rows added up, by unit and matrix, until the last batch that ended; `routed` are
    units whose tokens a router chose. Once `stop` is set, it adds nothing more.
    """

    def __init__(
        self, units: Sequence[Unit], first: dict[str, int], kind: StatisticsKind, device: torch.device
    ) -> None:
        self.units = units
        self.rows: dict[Unit, list[int]] = {unit: [0] * (unit.end - unit.begin) for unit in units}
        self.routed: set[Unit] = set()
        self.stop = threading.Event()
        self._by_parameter: defaultdict[tuple[str, str], list[Unit]] = defaultdict(list)
        for unit in units:
            self._by_parameter[unit.about, unit.parameter].append(unit)
        self.wants_gradients = any(unit.about == "gradients" for unit in units)
        self._last = max(unit.last for unit in units)
        self._first = first
        self._kind = kind
        self._device = device
        self._counts: list[tuple[Unit, int, Tensor]] = []  # of rows, which the device may not have yet
        self._sums: dict[Unit, Tensor] = {}
        # How often rows were added in this batch, and how often an earlier run added rows in the same batch.
        self._added: dict[Unit, int] = dict.fromkeys(units, 0)
        self._before: dict[Unit, int] = dict.fromkeys(units, 0)
        self._previous: tuple[tuple[Any, ...], Tensor] | None = None

    def product(self, product: Product) -> None:
        """Add the inputs of a product, and count the rows of its gradients."""
        if self.stop.is_set():
            raise EnoughError
        inputs = product.inputs
        # Parts of one parameter (the fused rows of q, k and v) have one input, which counts once.
        this = (product.parameter, product.matrix, inputs.data_ptr(), tuple(inputs.shape), inputs._version)  # noqa: SLF001
        same = self._previous is not None and self._previous[0] == this
        self._previous = (this, inputs)  # kept alive, so that its memory is not used again
        if self._first.get(product.parameter, 0) > self._last and not self.wants_gradients:
            raise EnoughError
        for unit, place in self._of("inputs", product) if not same else ():
            if product.routed:
                self.routed.add(unit)
            self._add(unit, partial(self._add_inputs, unit, place, product))
        for unit, place in self._of("gradients", product):
            self._add(unit, partial(self._count_rows, unit, place, product))

    def gradients(self, product: Product, chosen: Mapping[int, Tensor | None], rows: Tensor) -> None:
        """Add the gradients at the outputs of a product."""
        if self.stop.is_set():
            raise EnoughError
        for unit, place in self._of("gradients", product):
            of_matrix = rows[place] if rows.ndim == 3 else rows.reshape(-1, rows.shape[-1])
            outputs = of_matrix[:, unit.outputs.start : unit.outputs.stop : unit.outputs.step]
            wanted = product.of_chosen(outputs, chosen[place])
            self._add(unit, partial(self._add_gradients, unit, place, wanted))

    def gated(
        self, product: Product, matrix: int, chosen: Tensor | None, gates: Tensor, norms: Tensor
    ) -> None:
        """Add what an expert did: how many rows count, their gates, and gates times norms of outputs."""
        every = gates.new_full((), product.rows, dtype=torch.int64)
        count = every if chosen is None else chosen.sum()
        sums = torch.stack([count.to(gates.dtype), gates.sum(), norms.sum()])
        for unit, place in self._of("routing", product):
            if place == matrix:
                self._add(unit, partial(self._add_routing, unit, place, sums, count))

    def _of(self, about: str, product: Product) -> Iterator[tuple[Unit, int]]:
        """The units that a product adds to, each with the numbers of its matrices."""
        for unit in self._by_parameter.get((about, product.parameter), ()):
            for place in range(unit.begin, unit.end):
                if product.matrix in {None, place}:
                    yield unit, place

    def begin_batch(self) -> None:
        """The next products belong to another batch."""
        self._count_all()
        self._added = dict.fromkeys(self.units, 0)
        self._before = dict.fromkeys(self.units, 0)
        self._previous = None

    def sums(self, unit: Unit) -> Tensor:
        """The sums of a unit, of its shape."""
        if unit not in self._sums:
            self._sums[unit] = self._zeros(unit, self._device)
        return self._sums[unit]

    def _zeros(self, unit: Unit, device: torch.device) -> Tensor:
        dtype = torch.float32 if unit.itemsize(self._kind) == 4 else torch.float64
        return torch.zeros(unit.shape(self._kind), dtype=dtype, device=device)

    def pieces(self, head: dict[str, int]) -> Iterator[bytes | memoryview]:
        """The saved state of a pass: a line of JSON with `head` and the counts, the sums, a checksum."""
        self._count_all()
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
            sums = self._zeros(unit, torch.device("cpu"))
            memory = sums.numpy().reshape(-1).data.cast("B")
            file.readinto(memory)
            check = zlib.crc32(memory, check)
            self._sums[unit] = sums.to(self._device)
        if file.read() != check.to_bytes(4, "little"):
            self._sums.clear()
            return None
        for unit, one in zip(self.units, head["units"], strict=True):
            self.rows[unit], self._before[unit] = one["rows"], one["added"]
            if one["routed"]:
                self.routed.add(unit)
        return head

    def _add(self, unit: Unit, add: Callable[[], None]) -> None:
        """Add something to a unit, unless an earlier run did."""
        if self._added[unit] >= self._before[unit]:
            add()
        self._added[unit] += 1

    def _add_inputs(self, unit: Unit, place: int, product: Product) -> None:
        rows, chosen = product.inputs, product.chosen(place)
        of_matrix = product.of_chosen(rows[place] if rows.ndim == 3 else rows, chosen)
        wide = of_matrix.to(self._device, torch.float32)  # parts of a model may run elsewhere
        sums = self.sums(unit)[place - unit.begin]
        if self._kind == "hessian":
            sums.addmm_(wide.T, wide)
        else:
            sums += wide.to(torch.float64).square().sum(0)
        self._count(unit, place, product, chosen)

    def _add_gradients(self, unit: Unit, place: int, rows: Tensor) -> None:
        wide = rows.to(self._device, torch.float32)
        sums = self.sums(unit)[place - unit.begin]
        for one, group in zip(sums, wide.chunk(unit.groups, 1), strict=True):
            one.addmm_(group.T, group)

    def _add_routing(self, unit: Unit, place: int, sums: Tensor, count: Tensor) -> None:
        self.sums(unit)[place - unit.begin] += sums.to(self._device)
        self._counts.append((unit, place, count))

    def _count_rows(self, unit: Unit, place: int, product: Product) -> None:
        self._count(unit, place, product, product.chosen(place))

    def _count(self, unit: Unit, place: int, product: Product, chosen: Tensor | None) -> None:
        if chosen is None:
            self.rows[unit][place - unit.begin] += product.rows
        else:
            self._counts.append((unit, place, chosen.sum()))

    def _count_all(self) -> None:
        """Add the counts of a batch to `rows`: once, since the host waits for the device."""
        counts, self._counts = self._counts, []
        numbers = torch.stack([one.to(self._device) for *_, one in counts]).tolist() if counts else []
        for (unit, place, _), number in zip(counts, numbers, strict=True):
            self.rows[unit][place - unit.begin] += number


def aside_head(line: bytes) -> dict[str, Any] | None:
    """The first line of `pieces`; None if it is incomplete."""
    try:
        head = json.loads(line)
    except ValueError:
        return None
    return head if isinstance(head, dict) and {"pass", "batch", "units"} <= head.keys() else None


def _batches(sequences: Sequences, values: int | None) -> Iterator[range]:
    """The numbers of the sequences in each batch; fewer where each makes many values on its way."""
    total, length = sequences.ids.shape
    step = max(1, _BATCH_TOKENS // length)
    if values is not None:
        step = max(1, min(step, _BATCH_VALUES // max(1, values)))
    for begin in range(0, total, step):
        end = min(begin + step, total)
        # As many sequences as tokens in each would not tell which of the two dimensions is which.
        cuts = (begin, end - 1, end) if end - begin == length > 1 else (begin, end)
        for first, last in pairwise(cuts):
            yield range(first, last)


def _write(unit: Unit, place: int, moment: Tensor, output: Sink) -> None:
    """One matrix of a unit, its groups, its norms or what it did, at its place in its tensor."""
    one = moment.cpu()
    if not bool(one.isfinite().all()):
        what = {"inputs": "inputs", "gradients": "gradients", "routing": "outputs"}[unit.about]
        raise SparsepruneError(
            f"{unit.collected.name}: some of its {what} are not finite: the model does not run in its dtype"
        )
    if one.ndim > 1:
        values = (one + one.mT).mul_(0.5)
    else:
        values = one if unit.about == "routing" else one.sqrt().to(torch.float32)
    size = values.element_size() * values.numel() // unit.groups
    output.write_weight(unit.collected.name, unit.first_group(place) * size, values.numpy().reshape(-1).data)
