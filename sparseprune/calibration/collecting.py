"""Collecting: the sums of all statistics, of one block after the other as text comes to it.

Owns the sums, what of an interrupted run counts, and the place of each sum in the output. Called by
`calibrate`.
"""

from __future__ import annotations

import threading
from collections import ChainMap, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from msgspec import Struct

from sparseprune.calibration.watching import EnoughError
from sparseprune.checkpoint.threads import side_by_side
from sparseprune.errors import SparsepruneError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from sparseprune.calibration.planning import Calibration, Parts, Summed, Unit
    from sparseprune.calibration.sweeps import Streaming, Sweep
    from sparseprune.calibration.text import Sequences
    from sparseprune.calibration.watching import Product
    from sparseprune.checkpoint import Sink, StatisticsKind

    # Of each unit: rows and divisors by matrix, and what experts did.
    Counts = list[tuple[list[int], list[int], list[list[float]]]]

_BATCH_TOKENS = 4096  # in one forward pass
# Outputs of products in one block that is differentiated, which needs about three times them.
_BATCH_VALUES = 1 << 27
BACK = 3  # times the work of a block on the way there is that on the way back


class Counted(Struct, frozen=True):
    """Rows added up for a tensor of statistics, the divisors of its sums, and sums of routing, by matrix."""

    rows: list[int]
    divisors: list[int]
    values: list[list[float]]


def _nothing(matrices: int) -> Counted:
    return Counted([0] * matrices, [0] * matrices, [[] for _ in range(matrices)])


class Work:
    """How far a calibration is, in tokens of its text: each run of a block over a batch is a share of them.

    `whole` are all runs over the text, of blocks on the way there, `skipped` those that an interrupted run
    did and that are not done again: `already` in tokens.
    """

    def __init__(self, tokens: int, whole: float, skipped: float) -> None:
        self.total = tokens
        self._share = tokens / max(1, whole)
        self._done = skipped * self._share
        self.already = int(self._done)

    @classmethod
    def of(cls, plan: Calibration, sequences: Sequences, finished: Mapping[str, Any]) -> Work:
        """That of a plan in one process."""
        whole = skipped = 0
        for number, summed in enumerate(plan.sweeps, 1):
            for name, way, weight in _ways(plan.visits, summed):
                parts = max(1, len(way.get(name, ())))
                whole += weight * parts
                if f"sweep {number}" in finished:
                    skipped += weight * parts
                elif key_of(number, name, back=weight == BACK) in finished:
                    skipped += weight * (parts - 1)
        return cls(sequences.ids.numel(), whole, skipped)

    def step(self, runs: float) -> int:
        """Tokens that are done after so many more runs, since the last step."""
        before, self._done = int(self._done), self._done + runs * self._share
        return int(self._done + 1e-6) - before


def _ways(visits: Sequence[str], summed: Summed) -> Iterator[tuple[str, Mapping[str, Parts], int]]:
    """The blocks in the order in which a sweep meets them, there and back, with the work of a run."""
    for name in visits:
        yield name, summed.there, 1
    for name in reversed(visits if summed.goes_back else ()):
        yield name, summed.back, BACK


def key_of(number: int, name: str, *, back: bool) -> str:
    """The key of a block's note in the journal."""
    return f"sweep {number} {'back' if back else 'there'} {name}"


def calibrate(
    streaming: Streaming,
    plan: Calibration,
    output: Sink,
    kind: StatisticsKind,
    progress: Callable[[int, str], None],
) -> dict[str, Counted]:
    """Run the text through the model block by block, and write the moments.

    Each sum is divided by its number of rows; moments of inputs, if a router chose the tokens of a matrix, by
    the number of tokens of the text, so that experts keep their shares; what experts did is not divided.
    With the loss of a plan its gradients go back through all blocks, too. Finished blocks are noted: a later
    run does not sum for them again, but runs them once more for those that follow, and ends in the same
    bytes. Returns the counts by tensor. `progress` gets tokens, without those that are done `already`.

    Raises:
        SparsepruneError: an input that is not finite.
    """
    work = Work.of(plan, streaming.sequences, output.finished)
    noted: dict[str, Counts] = {}
    for number, summed in enumerate(plan.sweeps, 1):
        sweep = Summing(
            streaming,
            plan,
            summed,
            number,
            output,
            kind,
            lambda runs, label: progress(work.step(runs), label),
            noted=noted,
        )
        if sweep.key not in output.finished:
            sweep.finished()
    return counted(plan, ChainMap(noted, cast("dict[str, Counts]", output.finished)))


def counted(plan: Calibration, noted: Mapping[str, Counts]) -> dict[str, Counted]:
    """The counts by tensor, from the notes of all sweeps and blocks."""
    found = {one.name: _nothing(one.experts or 1) for one in plan.tensors}
    for number, summed in enumerate(plan.sweeps, 1):
        for units, counts in _noted(number, summed, noted):
            for unit, (rows, divisors, values) in zip(units, counts, strict=True):
                part = slice(unit.place, unit.place + unit.end - unit.begin)
                found[unit.collected.name].rows[part] = rows
                found[unit.collected.name].divisors[part] = divisors
                found[unit.collected.name].values[part] = values
    return found


def _noted(
    number: int, summed: Summed, noted: Mapping[str, Counts]
) -> Iterator[tuple[tuple[Unit, ...], Counts]]:
    """The counts of all units of a sweep, part by part."""
    yield summed.standing, noted[f"sweep {number}"]
    for way, back in ((summed.there, False), (summed.back, True)):
        for name, parts in way.items():
            counts = iter(noted[key_of(number, name, back=back)])
            for units in parts:
                yield units, [next(counts) for _ in units]


@dataclass
class Summing:
    """One sweep of the text; it continues an interrupted one.

    `passed` gets how often a block ran over the text since the last call, and its label; a way back counts
    `BACK` times.
    """

    streaming: Streaming
    plan: Calibration
    summed: Summed
    number: int
    output: Sink
    kind: StatisticsKind
    passed: Callable[[float, str], None]
    stop: threading.Event = field(default_factory=threading.Event)
    noted: dict[str, Counts] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"sweep {self.number}"

    def finished(self) -> None:
        """Do what is left of it."""
        failures: list[BaseException] = []

        def work() -> None:
            try:
                self._swept()
            except BaseException as failure:  # noqa: BLE001  (raised below)
                failures.append(failure)

        # In its own thread, so that a signal is not raised while the model runs.
        side_by_side(work, 1, self.stop.set)
        if failures:
            raise failures[0]

    def _note(self, key: str, counts: Counts) -> None:
        self.noted[key] = counts
        self.output.note(key, counts)
        self.output.flush()

    def _swept(self) -> None:
        standing = _Sums(self.summed.standing, self.kind, self.streaming.loaded.device)
        loss = self.plan.loss if self.summed.goes_back else None
        batches = list(_batches(self.streaming.sequences, self.plan.values))
        with self.streaming.sweep(
            batches, lambda: self._collector(standing, self.summed.standing), loss
        ) as sweep:
            self._there(sweep, standing)
            if loss is not None:
                self._back(sweep, standing)
        self._note(self.key, [self._written(standing, unit) for unit in self.summed.standing])

    def _there(self, sweep: Sweep, standing: _Sums) -> None:
        wanted = [unit for unit in self.summed.standing if unit.about != "gradients"]
        rest = {name for name in self.summed.there if not self._has(name, back=False)}
        goes_on = bool(self.summed.standing) or self.summed.goes_back
        while (name := sweep.at) is not None and (goes_on or rest):
            rest.discard(name)

            def run(collector: _Collector | None, label: str, *, hand: bool) -> None:
                self._read_ahead(len(sweep.visits) + 1)
                done = self._stepping(collector, label, back=False)
                sweep.through(collector, hand=hand and bool(goes_on or rest), done=done)

            self._block(name, wanted, standing, run)
            if not (goes_on or rest):
                return

    def _back(self, sweep: Sweep, standing: _Sums) -> None:
        wanted = [unit for unit in self.summed.standing if unit.about == "gradients"]
        rest = {name for name in self.summed.back if not self._has(name, back=True)}
        for visit in reversed(range(len(sweep.visits))):
            if not (wanted or rest):
                return
            rest.discard(sweep.visits[visit])

            def run(collector: _Collector | None, label: str, *, hand: bool, visit: int = visit) -> None:
                self._read_ahead(visit - 1)
                done = self._stepping(collector, f"{label} back", back=True)
                sweep.back(visit, collector, hand=hand and bool(wanted or rest), done=done)

            self._block(sweep.visits[visit], wanted, standing, run, back=True)
        sweep.finish()

    def _block(
        self,
        name: str,
        wanted: Sequence[Unit],
        standing: _Sums,
        run: Callable[..., None],
        *,
        back: bool = False,
    ) -> None:
        """Load a block, run it for each of its parts, write their sums, and note it."""
        ways = self.summed.back if back else self.summed.there
        has = self._has(name, back=back)
        parts = () if has else ways.get(name, ())
        counts: Counts = []
        with self.streaming.loaded.blocks.opened(name, self.streaming.read):
            for number, units in enumerate(parts or ((),), 1):
                hand = number == max(1, len(parts))
                sums = _Sums(units, self.kind, self.streaming.loaded.device)
                label = f"{name}, run {number} of {len(parts)}" if len(parts) > 1 else name
                heard = [*units, *(wanted if hand else ())]
                collector = self._collector(sums | standing, heard, only=() if hand or back else units)
                run(collector if heard else None, label, hand=hand)
                counts += [self._written(sums, unit) for unit in units]
        if not has and name in ways:
            self._note(key_of(self.number, name, back=back), counts)

    def _read_ahead(self, visit: int) -> None:
        """Let a device have the block of another visit while it works on this one."""
        loaded, visits = self.streaming.loaded, self.plan.visits
        if loaded.device.type == "cuda" and 0 <= visit < len(visits):
            loaded.blocks.read_ahead(visits[visit], self.streaming.read)

    def _has(self, name: str, *, back: bool) -> bool:
        return key_of(self.number, name, back=back) in self.output.finished

    def _collector(self, sums: _Sums, units: Iterable[Unit], only: Sequence[Unit] = ()) -> _Collector:
        return _Collector(
            sums, units, self.stop, self.plan.first, max([unit.last for unit in only], default=None)
        )

    def _stepping(self, collector: _Collector | None, label: str, *, back: bool) -> Callable[[], None]:
        """What is called when a block has run over a batch."""
        batches = len(list(_batches(self.streaming.sequences, self.plan.values)))

        def done() -> None:
            if self.stop.is_set():
                raise _StoppedError
            if collector is not None:
                collector.begin_batch()
            self.passed((BACK if back else 1) / batches, label)

        return done

    def _written(self, sums: _Sums, unit: Unit) -> tuple[list[int], list[int], list[list[float]]]:
        one = sums.of[unit]
        rows = one.counted()
        by_rows = unit.about == "gradients" or not one.routed
        divisors = [count if count and by_rows else self.streaming.sequences.tokens for count in rows]
        if unit.about == "routing":
            divisors = [1] * len(rows)
        for place, (each, divisor) in enumerate(zip(one.sums, divisors, strict=True)):
            _write(unit, place, each / divisor, self.output)
        return rows, divisors, one.sums.tolist() if unit.about == "routing" else [[]] * len(rows)


class _StoppedError(BaseException):
    """Ends a run that a signal stopped."""


class _Sum:
    """What is summed of one unit: `sums` of its shape on a device, and rows by matrix.

    `routed` is whether a router chose its tokens.
    """

    def __init__(self, unit: Unit, kind: StatisticsKind, device: torch.device) -> None:
        self.unit = unit
        self.kind = kind
        self.routed = False
        self._device = device
        self._sums: Tensor | None = None
        self._rows = [0] * (unit.end - unit.begin)
        self._counts: list[tuple[int, Tensor]] = []  # of rows, which the device may not have yet

    @property
    def sums(self) -> Tensor:
        """Zeros until something is added."""
        if self._sums is None:
            dtype = torch.float32 if self.unit.itemsize(self.kind) == 4 else torch.float64
            self._sums = torch.zeros(self.unit.shape(self.kind), dtype=dtype, device=self._device)
        return self._sums

    def add_inputs(self, place: int, product: Product) -> None:
        rows, chosen = product.inputs, product.chosen(place)
        of_matrix = product.of_chosen(rows[place] if rows.ndim == 3 else rows, chosen)
        wide = of_matrix.to(torch.float32)
        sums = self.sums[place - self.unit.begin]
        if self.kind == "hessian":
            sums.addmm_(wide.T, wide)
        else:
            sums += wide.to(torch.float64).square().sum(0)
        self.routed |= product.routed
        self.count(place, product, chosen)

    def add_gradients(self, place: int, rows: Tensor) -> None:
        wide = rows.to(torch.float32)
        sums = self.sums[place - self.unit.begin]
        for one, group in zip(sums, wide.chunk(self.unit.groups, 1), strict=True):
            one.addmm_(group.T, group)

    def add_routing(self, place: int, sums: Tensor, count: Tensor) -> None:
        self.sums[place - self.unit.begin] += sums
        self._counts.append((place, count))

    def count(self, place: int, product: Product, chosen: Tensor | None) -> None:
        """Count the rows of a product that are chosen, None for all."""
        if chosen is None:
            self._rows[place - self.unit.begin] += product.rows
        else:
            self._counts.append((place, chosen.sum()))

    def counted(self) -> list[int]:
        """Rows by matrix; the host waits for the device."""
        counts, self._counts = self._counts, []
        numbers = torch.stack([count for _, count in counts]).tolist() if counts else []
        for (place, _), number in zip(counts, numbers, strict=True):
            self._rows[place - self.unit.begin] += number
        return self._rows


class _Sums:
    """The sums of some units."""

    def __init__(self, units: Iterable[Unit], kind: StatisticsKind, device: torch.device) -> None:
        self.of = {unit: _Sum(unit, kind, device) for unit in units}

    def __or__(self, other: _Sums) -> _Sums:
        both = _Sums((), "hessian", torch.device("cpu"))
        both.of = self.of | other.of
        return both


class _Collector:
    """Adds what it is told of to the sums of some units; ends a run at the first product after the `last`.

    Once `stop` is set, it ends it for good.
    """

    def __init__(
        self,
        sums: _Sums,
        units: Iterable[Unit],
        stop: threading.Event,
        first: Mapping[str, int],
        last: int | None,
    ) -> None:
        self._by_parameter: defaultdict[tuple[str, str], list[_Sum]] = defaultdict(list)
        for unit in units:
            self._by_parameter[unit.about, unit.parameter].append(sums.of[unit])
        self._stop = stop
        self._first = first
        self._last = last
        self._previous: tuple[tuple[Any, ...], Tensor] | None = None

    def product(self, product: Product) -> None:
        """Add the inputs of a product, and count the rows of its gradients."""
        if self._stop.is_set():
            raise _StoppedError
        inputs = product.inputs
        # Parts of one parameter (the fused rows of q, k and v) have one input, which counts once.
        this = (product.parameter, product.matrix, inputs.data_ptr(), tuple(inputs.shape), inputs._version)  # noqa: SLF001
        same = self._previous is not None and self._previous[0] == this
        self._previous = (this, inputs)  # kept alive, so that its memory is not used again
        later = self._last is not None and self._first.get(product.parameter, 0) > self._last
        if later and not product.routed:  # experts that the first sequence did not meet may follow others
            raise EnoughError
        for one, place in self._of("inputs", product) if not same else ():
            one.add_inputs(place, product)
        for one, place in self._of("gradients", product):
            one.count(place, product, product.chosen(place))

    def begin_batch(self) -> None:
        """The next products belong to another batch."""
        self._previous = None

    def gradients(self, product: Product, chosen: Mapping[int, Tensor | None], rows: Tensor) -> None:
        """Add the gradients at the outputs of a product."""
        for one, place in self._of("gradients", product):
            of_matrix = rows[place] if rows.ndim == 3 else rows.reshape(-1, rows.shape[-1])
            wanted = one.unit.outputs
            outputs = of_matrix[:, wanted.start : wanted.stop : wanted.step]
            one.add_gradients(place, product.of_chosen(outputs, chosen[place]))

    def gated(
        self, product: Product, matrix: int, chosen: Tensor | None, gates: Tensor, norms: Tensor
    ) -> None:
        """Add what an expert did: how many rows count, their gates, and gates times norms of outputs."""
        every = gates.new_full((), product.rows, dtype=torch.int64)
        count = every if chosen is None else chosen.sum()
        sums = torch.stack([count.to(gates.dtype), gates.sum(), norms.sum()])
        for one, place in self._of("routing", product):
            if place == matrix:
                one.add_routing(place, sums, count)

    def _of(self, about: str, product: Product) -> Iterator[tuple[_Sum, int]]:
        """The sums that a product adds to, each with the numbers of its matrices."""
        for one in self._by_parameter.get((about, product.parameter), ()):
            for place in range(one.unit.begin, one.unit.end):
                if product.matrix in {None, place}:
                    yield one, place


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
