"""Collecting: the second moments of all inputs, in as many passes over the text as memory asks for.

Owns the accumulators, what a pass is about and where it ends, and the way of a moment to its place.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from sparseprune.calibration.naming import StoredAs, renumbered, siblings, stored_as, without_statistics
from sparseprune.calibration.watching import EnoughError, Product, SharedInputs, Watch
from sparseprune.checkpoint import Collected
from sparseprune.errors import SparsepruneError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from sparseprune.calibration.loading import LoadedModel
    from sparseprune.calibration.sequences import Sequences
    from sparseprune.checkpoint import Checkpoint, StagedOutput, StatisticsKind

_BATCH_TOKENS = 4096  # that go through the model at one time


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """What is accumulated for one tensor of statistics: of a stack the matrices [begin, end).

    `last` is the number of the last product with the parameter in a forward pass.
    """

    collected: Collected
    parameter: str
    begin: int
    end: int
    last: int

    @property
    def place(self) -> int:
        """Where its first matrix lies in its tensor; that of an expert may be a tensor of its own."""
        return 0 if self.collected.experts is None else self.begin

    def nbytes(self, kind: StatisticsKind) -> int:
        """Memory that its accumulators take."""
        one = self.collected.features
        return (self.end - self.begin) * (4 * one * one if kind == "hessian" else 8 * one)


@dataclass(frozen=True)
class Calibration:
    """What will be collected: tensors of statistics in their order, what gets none and why, the passes."""

    tensors: tuple[Collected, ...]
    without: tuple[tuple[str, str], ...]
    passes: tuple[tuple[Unit, ...], ...]
    first: dict[str, int] = field(repr=False)


def plan_calibration(
    loaded: LoadedModel, sequences: Sequences, checkpoint: Checkpoint, kind: StatisticsKind, memory: int
) -> Calibration:
    """Find what meets text, by the first sequence; cut it into passes whose accumulators take `memory` bytes.

    Raises:
        SparsepruneError: nothing of the checkpoint is multiplied with text, or one matrix needs more memory.
    """
    _refuse_lacking(loaded, checkpoint)
    shared = SharedInputs()
    with closing(Watch(loaded.model, shared)) as watch:
        watch.begin(sequences.counted[:1])
        with watch:
            loaded.run(sequences.ids[:1])
    groups = dict(shared.groups)
    dims = dict(shared.input_dims)
    last = dict(shared.last)
    for name, like in siblings(shared.groups, loaded.model).items():
        groups[name] = renumbered(groups[like], name, like)
        dims[name], last[name] = dims[like], last[like]
    stored = stored_as(loaded.model, dims, checkpoint)
    units = sorted(_units(loaded, groups, dims, last, stored), key=lambda unit: unit.last)
    if not units:
        raise SparsepruneError(
            f"{checkpoint.path}: no matrix of it is multiplied with text, as far as transformers' model goes"
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


def calibrate(
    loaded: LoadedModel,
    sequences: Sequences,
    plan: Calibration,
    output: StagedOutput,
    kind: StatisticsKind,
    progress: Callable[[int, str], None],
) -> dict[str, list[int]]:
    """Run the text through the model once for each pass, and write what was collected.

    Gives the tokens that were counted for each tensor, one number for each matrix. `progress` is told tokens.

    Raises:
        SparsepruneError: an input that is not finite.
    """
    tokens: dict[str, list[int]] = {one.name: [0] * (one.experts or 1) for one in plan.tensors}
    total = sequences.tokens
    for number, units in enumerate(plan.passes, 1):
        label = f"pass {number} of {len(plan.passes)}" if len(plan.passes) > 1 else ""
        collector = _Collector(units, plan.first, kind)
        with closing(Watch(loaded.model, collector)) as watch:
            for ids, counted in _batches(sequences):
                watch.begin(counted.to(loaded.device))
                with suppress(EnoughError), watch:
                    loaded.run(ids)
                progress(ids.numel(), label)
        for unit in units:
            sums, counts = collector.taken_out(unit)
            tokens[unit.collected.name][unit.place : unit.place + len(counts)] = counts
            for place, one in enumerate(sums):
                _write(unit, place, one.div_(total), output)
    return tokens


def _refuse_lacking(loaded: LoadedModel, checkpoint: Checkpoint) -> None:
    """Random numbers stand for weights that a checkpoint lacks: of a head at the end, but not of a layer."""
    lacking = [name for name in loaded.missing if any(piece.isdigit() for piece in name.split("."))]
    if lacking:
        raise SparsepruneError(
            f"{checkpoint.path}: lacks {len(lacking)} weights of the model that config.json describes, such "
            f"as {lacking[0]}, so that it cannot be run"
        )


class _Collector:
    """The sums of one pass; ends a forward pass at the first product after the last one that it needs."""

    def __init__(self, units: Sequence[Unit], first: dict[str, int], kind: StatisticsKind) -> None:
        self._units: defaultdict[str, list[Unit]] = defaultdict(list)
        for unit in units:
            self._units[unit.parameter].append(unit)
        self._last = max(unit.last for unit in units)
        self._first = first
        self._kind = kind
        self._sums: dict[Unit, Tensor] = {}
        self._counts: dict[Unit, list[int]] = {unit: [0] * (unit.end - unit.begin) for unit in units}
        self._previous: tuple[tuple[Any, ...], Tensor] | None = None

    def __call__(self, product: Product) -> None:
        """Takes a product in."""
        wanted = self._units.get(product.parameter)
        if wanted is None:
            if self._first.get(product.parameter, 0) > self._last:
                raise EnoughError
            return
        inputs = product.inputs
        # Parts of one parameter (the rows of q, k and v in one) meet one input, which counts once.
        this = (product.parameter, product.matrix, inputs.data_ptr(), tuple(inputs.shape), inputs._version)  # noqa: SLF001
        if self._previous is not None and self._previous[0] == this:
            return
        self._previous = (this, inputs)  # kept alive, so that its memory is nobody else's
        for unit in wanted:
            for place in range(unit.begin, unit.end):
                if product.matrix in {None, place}:
                    self._add(unit, place - unit.begin, _counted_rows(product, place))

    def taken_out(self, unit: Unit) -> tuple[Tensor, list[int]]:
        """The sums of a unit, (matrices, features[, features]), kept no longer, and tokens by matrix."""
        sums = self._of(unit, torch.device("cpu"))
        del self._sums[unit]
        return sums, self._counts[unit]

    def _add(self, unit: Unit, place: int, rows: Tensor) -> None:
        wide = rows.to(torch.float32)
        if self._kind == "hessian":
            self._of(unit, rows.device)[place].addmm_(wide.T, wide)
        else:
            self._of(unit, rows.device)[place] += wide.to(torch.float64).square().sum(0)
        self._counts[unit][place] += len(rows)

    def _of(self, unit: Unit, device: torch.device) -> Tensor:
        sums = self._sums.get(unit)
        if sums is None:
            shape = (
                unit.end - unit.begin,
                *[unit.collected.features] * (2 if self._kind == "hessian" else 1),
            )
            dtype = torch.float32 if self._kind == "hessian" else torch.float64
            sums = self._sums[unit] = torch.zeros(shape, dtype=dtype, device=device)
        return sums


def _counted_rows(product: Product, place: int) -> Tensor:
    """The inputs of tokens that count, (tokens, features)."""
    rows, counted = product.inputs, product.counted
    if rows.ndim == 3:
        # Every token came to every matrix of the stack, as zeros where it was not routed there.
        rows = rows[place] if counted is None else rows[place][counted.to(rows.device)]
        return rows[rows.any(-1)]
    return rows if counted is None else rows[counted.to(rows.device)]


def _batches(sequences: Sequences) -> Iterator[tuple[Tensor, Tensor]]:
    step = max(1, _BATCH_TOKENS // sequences.ids.shape[1])
    for begin in range(0, len(sequences.ids), step):
        yield sequences.ids[begin : begin + step], sequences.counted[begin : begin + step]


def _write(unit: Unit, place: int, moment: Tensor, output: StagedOutput) -> None:
    """One matrix of a unit, or its norms, at its place in its tensor."""
    one = moment.cpu()
    if not bool(one.isfinite().all()):
        raise SparsepruneError(
            f"{unit.collected.name}: its inputs are not finite somewhere: the model does not run in its dtype"
        )
    values = (one + one.T).mul_(0.5) if one.ndim == 2 else one.sqrt().to(torch.float32)
    begin = (unit.place + place) * values.numel() * values.element_size()
    output.write_weight(unit.collected.name, begin, values.numpy().reshape(-1).data)


def _units(
    loaded: LoadedModel,
    groups: dict[str, str],
    dims: dict[str, int],
    last: dict[str, int],
    stored: dict[str, list[StoredAs]],
) -> Iterator[Unit]:
    """One for each tensor of statistics, that of a whole stack in one."""
    parameters = dict(loaded.model.named_parameters())
    members: defaultdict[str, list[str]] = defaultdict(list)
    for name, leader in groups.items():
        members[leader].append(name)
    for leader, names in members.items():
        if leader not in parameters:
            continue
        parameter = parameters[leader]
        features = int(parameter.shape[dims[leader]])
        found = [one for name in names for one in stored[name]]
        whole = {one.name: one.input_dim for one in found if one.matrix is None}
        if whole:
            experts = int(parameter.shape[0]) if parameter.ndim == 3 else None
            yield Unit(Collected(features, experts, whole), leader, 0, experts or 1, last[leader])
        for matrix in sorted({one.matrix for one in found if one.matrix is not None}):
            weights = {one.name: one.input_dim for one in found if one.matrix == matrix}
            yield Unit(Collected(features, None, weights), leader, matrix, matrix + 1, last[leader])


def _passes(units: Sequence[Unit], kind: StatisticsKind, memory: int) -> Iterator[tuple[Unit, ...]]:
    """Units in their order, as many as fit; stacks are cut between matrices."""
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
