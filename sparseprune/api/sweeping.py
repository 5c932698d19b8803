"""A text instead of statistics: a model is pruned block by block, by the inputs that pruned blocks give.

Owns which work waits for which block, how much memory that takes, and what is noted so that a killed run goes
on at its last finished block. Called by pruning.py and removing.py.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import shutil
from contextlib import contextmanager
from itertools import count
from types import MappingProxyType
from typing import TYPE_CHECKING

from msgspec import Struct, structs
from msgspec.structs import replace

from sparseprune import __version__
from sparseprune.api.run import digest
from sparseprune.api.windows import folder_for_states
from sparseprune.checkpoint import Source, TensorReader
from sparseprune.checkpoint.file_io import as_bytes, checkpoint_identity
from sparseprune.checkpoint.statistics import open_statistics, statistics_in_memory
from sparseprune.engine.dtypes import torch_dtype
from sparseprune.engine.grids import prod
from sparseprune.errors import SparsepruneError, SpecError, enough, size
from sparseprune.execution.inputs import SWEPT, Sweeping
from sparseprune.execution.plan import plan_of, rests_on_few
from sparseprune.execution.regions import INTERPRETER, TORCH
from sparseprune.execution.schedule import make_schedule, resolve_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from sparseprune.api.resources import Machine
    from sparseprune.api.run import Advance, Run
    from sparseprune.api.windows import AskedText
    from sparseprune.calibration import LoadedModel, Sequences
    from sparseprune.calibration.planning import Unit
    from sparseprune.calibration.sweeping import Gathered, Sweep
    from sparseprune.checkpoint import Checkpoint, Collected, Output, StoredTensor
    from sparseprune.checkpoint.file_io import WritableBytes
    from sparseprune.execution.inputs import Left, TaskInput
    from sparseprune.execution.passes import TensorOutcome
    from sparseprune.execution.plan import Plan, Task, WorkUnit
    from sparseprune.execution.pruning import Work
    from sparseprune.execution.schedule import Schedule
    from sparseprune.spec import BoundInstance

    Scheduling = Callable[[Plan], Schedule]

_TRANSFORMERS = 200 << 20  # bytes that transformers and a model without weights take; measured
_LEAST = 32 << 20  # bytes for work on matrices beside the largest one
_BATCH_BYTES = 40  # that a token takes on its way through a block, for each input of the widest matrix
_SHARE = 3  # parts of the memory that is left for moments, for states, and for further matrices
_TUNED_BYTES = 21  # of an element that is tuned: its value, its gradient, two moments, a step, whether it may
_TAPED = (13, 4)  # hidden states, and numbers of each input of the widest matrix, that wait for the way back
_AMPLE = 1 << 60  # bytes
_GRADIENTS = "sparseprune-gradients-"  # in the name of a folder, before a digest of what they are of
_LEAST_SEQUENCES, _LEAST_TOKENS = 32, 1 << 16  # of which gradients are taken, where there are so many


class SweptText(Struct, frozen=True, eq=False):
    """A model of which only what stands outside of its blocks is in memory, a text, and what it will meet."""

    asked: AskedText
    loaded: LoadedModel
    sequences: Sequences
    units: tuple[Unit, ...]
    expected: tuple[Collected, ...]  # gradients that are not taken yet
    gradients: Mapping[str, StoredTensor]
    before: Path | None
    outside: int  # bytes of the model that are in memory
    state: int  # bytes that a sequence takes in front of a block

    def statistics(
        self,
        tokens: Mapping[str, tuple[int, ...]] | None = None,
        *,
        mixed: bool = True,
        residuals: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    ) -> Sweeping:
        """What a plan may rely on: of all matrices, or of those that met so many `tokens`."""
        tensors = [unit.collected for unit in self.units]
        if tokens is not None:
            tensors = [one for one in tensors if one.name in tokens]
        every = (*tensors, *self.expected)
        found = statistics_in_memory(SWEPT, every, tokens or {}, mixed=mixed, residuals=residuals)
        of = {
            name: replace(one, gradients=self.gradients.get(name, one.gradients))
            for name, one in found.of.items()
        }
        return Sweeping(dataclasses.replace(found, of=of), self.before)

    @property
    def identity(self) -> dict[str, str]:
        """What an unfinished run must agree with to be continued, to the same bytes."""
        drawn = hashlib.sha256(
            self.sequences.ids.numpy().tobytes() + self.sequences.counted.numpy().tobytes()
        )
        shape = list(self.sequences.ids.shape)
        return {
            "the versions of torch and transformers": self.loaded.versions,
            "the text": json.dumps([shape, drawn.hexdigest()]),
            "the device or its number of threads": self.loaded.machine,
        }


def read_text(
    run: Run, asked: AskedText, checkpoint: Checkpoint, machine: Machine, stats: Path | None
) -> SweptText:
    """Load the model without its blocks, cut the text, and look which matrices it meets.

    `stats` are statistics of the dense model, of which gradients are taken.
    """
    from sparseprune.calibration import Loss, Streaming, load_model, plan_calibration
    from sparseprune.calibration.sweeping import state_bytes

    documents = asked.windows.documents()
    run.note(f"loading the model of {checkpoint.path}")
    with TensorReader() as reader, folder_for_states(asked.scratch) as folder:
        loaded = load_model(checkpoint, resolve_device(machine.device, uses_torch=True), reader)
        sequences = asked.windows.cut(run, documents, [loaded])
        outside = _bytes_in_memory(loaded)
        run.note("finding out which matrices meet text")
        streaming = Streaming(loaded, loaded.read(reader), sequences, folder)
        loss = Loss(asked.windows.seed) if asked.gradients else None
        planned = plan_calibration(streaming, "hessian", _AMPLE, loss)
        state = state_bytes(loaded, sequences)
    # What stands outside of blocks, or in one that is met again, is summed up as long as text is on its way.
    met = (unit for one in planned.sweeps for parts in one.there.values() for part in parts for unit in part)
    inside = tuple(unit for unit in met if unit.about == "inputs")
    known = {name for unit in inside for name in unit.collected.weights}
    expected = (one for one in planned.tensors if one.about == "gradients" and known.issuperset(one.weights))
    gradients = {} if stats is None else open_statistics(stats).gradients
    return SweptText(asked, loaded, sequences, inside, tuple(expected), gradients, stats, outside, state)


def with_gradients(run: Run, text: SweptText, target: Path, machine: Machine) -> SweptText:
    """With the gradients of the dense model, of some sequences of the text; they wait beside the output.

    An earlier run may have taken them already. Forget them once the output is there, by `forget_gradients`.
    """
    if not text.asked.gradients:
        return text
    from sparseprune.api.calibrating import Collecting, calibrate

    windows, (count, length) = text.asked.windows, text.sequences.ids.shape
    some = min(count, max(_LEAST_SEQUENCES, -(-_LEAST_TOKENS // length)))
    drawn = [__version__, text.identity, windows.seed, some]
    identity = digest(json.dumps([checkpoint_identity(text.loaded.checkpoint), *drawn]))
    folder = target.with_name(f".{target.name}.{_GRADIENTS}{identity[:16]}")
    forget_gradients(target, but=folder)
    if not folder.exists():
        asked = Collecting(
            checkpoint=text.loaded.checkpoint.path,
            windows=replace(windows, sequences=some, length=length),
            output=folder,
            kind="hessian",
            device=machine.device,
            memory=machine.memory // _SHARE,
            gradients="alone",
            scratch=text.asked.scratch,
        )
        calibrate(run, asked)
    return replace(text, gradients=open_statistics(folder).gradients, expected=())


def forget_gradients(target: Path, *, but: Path | None = None) -> None:
    """Remove the gradients that wait beside an output."""
    for found in target.parent.glob(f".{glob.escape(target.name)}.{_GRADIENTS}*"):
        if found != but and found.is_dir():
            shutil.rmtree(found, ignore_errors=True)


def _bytes_in_memory(loaded: LoadedModel) -> int:
    tensors = (*loaded.model.parameters(), *loaded.model.buffers())
    found = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors if not one.is_meta
    }
    return sum(found.values())


class Rooms(Struct, frozen=True):
    """How the memory of a sweep is divided, in bytes.

    `fixed` is always there: what stands outside of blocks, and two copies of the largest one. `batch` comes
    up when a batch goes through a block. `moments` and `states` are what there is room for, `wanted` how much
    there will be of both at the most, about. `tuning` is all that is there while a block is tuned, when no
    matrix is worked on; 0 where none is.
    """

    fixed: int
    batch: int
    moments: int
    states: int
    wanted: tuple[int, int]
    tuning: int

    @property
    def taken(self) -> int:
        """By all but the work on matrices."""
        return self.fixed + self.batch + self.moments + self.states

    @property
    def expected(self) -> int:
        """The same, of what is wanted."""
        moments, states = self.wanted
        return self.fixed + max(self.batch, min(self.moments, moments)) + min(self.states, states)


class Swept(Struct, frozen=True, eq=False):
    """The work of a plan, by what it waits for: numbers of units without text, of the others by block."""

    text: SweptText
    plan: Plan
    first: tuple[int, ...]
    by_block: Mapping[str, tuple[int, ...]]
    rooms: Rooms

    @property
    def blocks(self) -> tuple[str, ...]:
        """Those that text goes through: up to the last one that is pruned."""
        names = self.text.loaded.blocks.names
        last = max((place for place, name in enumerate(names) if name in self.by_block), default=-1)
        return names[: last + 1]


def divide(plan: Plan, text: SweptText, machine: Machine) -> Swept:
    """Which work waits for which block, and the memory that this takes.

    Raises:
        SpecError: blocks of several parts of the model compete.
        SparsepruneError: the memory is too little.
    """
    blocks = text.loaded.blocks
    home = {key: name for name in blocks.names for key in blocks.stored(name)}
    first: list[int] = []
    by_block: dict[str, list[int]] = {}
    for number, unit in enumerate(plan.units):
        if not any(_waits(one) for task in unit.tasks for one in task.inputs):
            first.append(number)
            continue
        nested = next((one for one in unit.tasks if one.instance.within is not None), None)
        if nested is not None and all(one.instance.reconstruct is None for one in unit.tasks):
            where = f"[{nested.rule}] {nested.instance.label}"
            raise SpecError(
                f"{where}: a sweep decides nested scopes only where it rebuilds them: say --reconstruct admm "
                "or refit, or calibrate and give --stats"
            )
        homes = {home.get(stored.name, "") for stored in unit.tensors}
        if len(homes) > 1:
            task = unit.tasks[0]
            raise SpecError(
                f"[{task.rule}] {task.instance.label}: its blocks compete over {len(homes)} parts of the "
                'model, and a sweep decides one after the other; say allocate = "loss" and give --stats '
                "beside --text, or calibrate and give --stats alone"
            )
        by_block.setdefault(homes.pop(), []).append(number)
    rooms = _rooms(plan, text, machine)
    return Swept(text, plan, tuple(first), {name: tuple(some) for name, some in by_block.items()}, rooms)


def _rooms(plan: Plan, text: SweptText, machine: Machine) -> Rooms:
    """What is left beside a batch and the largest matrix goes to moments, states and further matrices."""
    from sparseprune.calibration.sweeping import BATCH_TOKENS

    stored, blocks = plan.checkpoint.tensors, text.loaded.blocks
    block = max([0, *(sum(stored[key].nbytes for key in blocks.stored(name)) for name in blocks.names)])
    fixed = _TRANSFORMERS + text.outside + 2 * block
    schedule = make_schedule(plan, _AMPLE, 1)
    largest = max([0, *(group.strategy.memory for group in schedule.groups)])
    names = {one.stored.name for unit in plan.units for task in unit.tasks for one in task.inputs}
    gathered = [unit for unit in text.units if unit.collected.name in names]
    least = max([0, *(_moment_bytes(unit) for unit in gathered)])
    widest = max([0, *(unit.collected.features for unit in text.units)])
    batch = _BATCH_BYTES * widest * min(BATCH_TOKENS, text.sequences.ids.numel())
    base, tuning = INTERPRETER + TORCH + schedule.limits.resident, _tuning_bytes(plan, text)
    left = machine.memory - fixed - base - max(batch + largest + _LEAST, tuning)
    if left < least:
        raise SparsepruneError(
            f"--memory {size(machine.memory)}: a block, its second moments and the work on its largest "
            f"matrix need more; give --memory {enough(machine.memory - left + least)}"
        )
    together: dict[tuple[str | None, int], int] = {}  # experts of one block have their moments together
    for unit in gathered:
        where = (blocks.owner(unit.parameter), unit.collected.features)
        together[where] = together.get(where, 0) + _moment_bytes(unit)
    moments = max(together.values(), default=0)
    room = max(least, min(left // _SHARE, moments))
    states = 2 * text.state * len(text.sequences.ids)
    parked = (left - room) // _SHARE
    tuning += (base + fixed + min(parked, states)) if tuning else 0
    return Rooms(fixed, batch, room, parked, (moments, states), tuning)


def _tuning_bytes(plan: Plan, text: SweptText) -> int:
    """Of the block that has the most that is tuned: its weights and a batch on its way; 0 where none is."""
    from sparseprune.calibration.sweeping import BATCH_TOKENS, TARGETS

    methods = (task.instance.reconstruct for unit in plan.units for task in unit.tasks)
    if not any(method is not None and method.tune for method in methods):
        return 0
    blocks, tensors = text.loaded.blocks, plan.checkpoint.tensors
    reached = set(plan.reached)
    own = (reached.intersection(blocks.stored(name)) for name in blocks.names)
    weights = max((sum(tensors[key].numel for key in some) for some in own), default=0)
    windows, length = text.sequences.ids.shape
    tokens = min(BATCH_TOKENS, windows * length)
    widest = max([0, *(unit.collected.features for unit in text.units)])
    (states, inputs), itemsize = _TAPED, int(text.loaded.model.dtype.itemsize)
    taped = states * text.state // length + inputs * widest * itemsize
    return _TUNED_BYTES * weights + taped * tokens + min(TARGETS, text.state * windows)


def _moment_bytes(unit: Unit) -> int:
    """Of second moments and mixed ones."""
    return 2 * unit.nbytes("hessian")


def _waits(one: TaskInput) -> bool:
    """Whether a task's input is made by the sweep."""
    return one.stored.shard.path == SWEPT


class _Overlay(Source):
    """Another source, and statistics that are in memory."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._tensors: dict[str, Tensor] = {}

    def close(self) -> None:
        """Nothing: whoever made the other source closes it."""

    def read_into(self, stored: StoredTensor, begin: int, buffer: WritableBytes) -> None:
        if stored.shard.path != SWEPT:
            self._source.read_into(stored, begin, buffer)
            return
        own = self._tensors[stored.name].reshape(-1).cpu().numpy().data.cast("B")
        view = as_bytes(buffer)
        view[:] = own[begin : begin + len(view)]

    @contextmanager
    def having(self, gathered: Gathered | None) -> Iterator[None]:
        """These statistics are there for a while."""
        if gathered is not None:
            self._tensors |= gathered.moments
            self._tensors |= {f"{name}.mixed": one for name, one in gathered.mixed.items()}
            self._tensors |= {f"{name}.residual": one for name, one in gathered.residuals.items()}
        try:
            yield
        finally:
            self._tensors.clear()


class _Part(Struct, frozen=True):
    """Work units of a block that are decided together, by their numbers, and what was known then.

    Of the statistics: how many tokens each rests on, by matrix, which weights have residuals, and whether
    there are mixed moments.
    """

    units: list[int]
    tokens: dict[str, list[int]]
    residuals: list[str]
    mixed: bool


class _Tuning(Struct, frozen=True):
    """How a block is tuned once it is pruned: the steps, whether by the loss, and the tensors that change."""

    steps: int
    by_loss: bool
    weights: tuple[str, ...]


class Sweeper:
    """Does the work of a plan with a text, into an output.

    Afterwards `left` tells what was not rebuilt, and `rests_on_few` by matrix whether it had few tokens;
    `tuned` has the loss of each block's outputs before and after, `untuned` blocks of which it is not known.
    """

    def __init__(self, run: Run, swept: Swept, output: Output, source: Source, schedule: Scheduling) -> None:
        self._run, self._swept, self._output = run, swept, output
        self._source = _Overlay(source)
        self._schedule = schedule
        self._decided: set[str] = set()  # tensors of which the output has what is decided
        self.left: list[Left] = []
        self.rests_on_few: dict[str, bool] = {}
        self.tuned: dict[str, tuple[float, float]] = {}
        self.untuned: list[str] = []

    def execute(self, device: str) -> Sequence[TensorOutcome]:
        """All of the work; gives the outcomes of tensors."""
        from sparseprune.execution.pruning import Work

        swept, length = self._swept, self._swept.text.sequences.ids.numel()
        work = Work(self._source, self._output, device, lambda *_: None)
        first = [swept.plan.units[number] for number in swept.first]
        work.do(self._schedule(replace(swept.plan, units=first)), "first.")
        self._decided.update(stored.name for unit in first for stored in unit.tensors)
        done = sum(_key(name) in self._output.finished for name in swept.blocks) * length
        progress = self._run.progress("pruning", len(swept.blocks) * length, done, "tokens", length)
        states = folder_for_states(swept.text.asked.scratch)
        with progress as advance, states as folder, self._sweep(folder) as sweep:
            for _ in swept.blocks:
                name = sweep.at
                if name is not None:
                    self._block(sweep, name, work, advance)
        return work.outcomes.of_plan(swept.plan)

    def _sweep(self, folder: Path) -> Sweep:
        from sparseprune.calibration.sweeping import Sweep

        swept = self._swept
        dense = swept.text.loaded.read(self._source)

        def pruned(name: str) -> Tensor:
            found = dense(name)
            if name in self._decided:
                host = found.cpu()
                self._output.read_weight(name, host.reshape(-1).view(torch_dtype("U8")).numpy().data)
                found = host.to(found.device)
            return found

        units = [swept.plan.units[number] for some in swept.by_block.values() for number in some]
        methods = [task.instance.reconstruct for unit in units for task in unit.tasks]
        targets = any(method is not None and method.target == "dense" for method in methods)
        return Sweep(
            swept.text.loaded,
            swept.text.sequences,
            (dense, pruned),
            (folder, swept.rooms.states),
            targets=targets,
        )

    def _block(self, sweep: Sweep, name: str, work: Work, advance: Advance) -> None:
        """Decide what waits for a block, and let the text through it."""
        length, label = self._swept.text.sequences.ids.numel(), self._label(name)
        sweep.open(name)
        tuning = self._tuning(name)
        tuned = self._output.finished.get(_tuned(name))
        again = self._begun(name) if tuned is None else tuned["again"]
        prefix = f"{name}.{again}." if again else f"{name}."
        known = self._output.finished.get(_key(name, again))
        if known is not None:
            for number, part in enumerate(known):
                self._do(f"{prefix}{number}.", _Part(**part), None, work)
        else:
            parts: list[_Part] = []
            stages = self._stages(sweep, name)
            share = length // (len(stages) + 1)
            for number, (needs, units, ends) in enumerate(stages):
                advance(0, f"{label}, {needs[0].collected.name.removeprefix(name).strip('.')}")
                is_last = number == len(stages) - 1 and tuning is None
                gathered = sweep.gather(name, needs, is_last=is_last)
                tokens = {one: list(counts) for one, counts in gathered.tokens.items()}
                parts.append(_Part(units, tokens, list(gathered.residuals), bool(gathered.mixed)))
                self._do(f"{prefix}{number}.", parts[-1], gathered, work)
                if ends:  # parts of a stage do not see each other, so that nothing depends on how it was cut
                    sweep.renew(name)
                advance(share)
            self._output.flush()
            self._output.note(_key(name, again), [structs.asdict(part) for part in parts])
            advance(length - share * len(stages), label)
        sweep.renew(name)
        if tuned is not None:
            self.tuned[name] = tuned["before"], tuned["after"]
        elif tuning is not None:
            self._tune(sweep, name, tuning, again, lambda: advance(0, f"{label}, tuning"))
            sweep.renew(name)
        sweep.go(name)

    def _tuning(self, name: str) -> _Tuning | None:
        """How a block is tuned; None where it is not."""
        units = [self._swept.plan.units[number] for number in self._swept.by_block.get(name, ())]
        steps, metrics, weights = 0, set(), []
        for unit in units:
            tasks = []
            for task in unit.tasks:
                method = task.instance.reconstruct
                if method is not None and method.tune:
                    tasks.append(task)
                    steps = max(steps, method.tune)
                    metrics.add(task.metric)
            weights += _reached_wholly(unit, tasks)
        return _Tuning(steps, "loss" in metrics, tuple(weights)) if weights else None

    def _begun(self, name: str) -> int:
        """How often a run ended while it wrote what it had tuned: then the block is pruned anew."""
        return next(number for number in count() if _overwriting(name, number) not in self._output.finished)

    def _tune(
        self, sweep: Sweep, name: str, tuning: _Tuning, again: int, between: Callable[[], None]
    ) -> None:
        """Tune a pruned block, and write it over what was written before."""
        if not sweep.looked_at(name):
            sweep.look(name)
        gradients = self._gradients(sweep) if tuning.by_loss else None
        if tuning.by_loss and gradients is None:
            self.untuned.append(name)
            return
        self._output.flush()
        found = sweep.tune(name, tuning.weights, gradients, tuning.steps, between)
        self._output.note(_overwriting(name, again), None)
        self._output.flush()  # from here on what was there before is lost
        for key, tensor in found.tensors.items():
            data = tensor.cpu().contiguous().reshape(-1).view(torch_dtype("U8")).numpy().data
            self._output.write_weight(key, 0, data)
        self.tuned[name] = found.before, found.after
        self._output.flush()
        told = {"again": again, "before": found.before, "after": found.after}
        self._output.note(_tuned(name), told)

    def _gradients(self, sweep: Sweep) -> Tensor | None:
        """Those at the outputs of the last matrix of a block that adds to what the block gives."""
        import torch

        of = {unit.parameter: unit.collected.weights for unit in self._swept.text.units}
        known = self._swept.text.gradients
        names = [weight for one in sweep.adding for weight in of.get(one, ()) if weight in known]
        if not names:
            return None
        stored = known[names[-1]]
        found = torch.empty(stored.shape, dtype=torch_dtype(stored.dtype))
        self._source.read_into(stored, 0, found.view(-1).view(torch.uint8).numpy().data)
        return found

    def _label(self, name: str) -> str:
        stack, _, number = name.rpartition(".")
        names = self._swept.text.loaded.blocks.names
        return f"{stack} {int(number) + 1} of {sum(one.rpartition('.')[0] == stack for one in names)}"

    def _stages(self, sweep: Sweep, name: str) -> list[tuple[list[Unit], list[int], bool]]:
        """What can be decided at one time, in order, with what has to be gathered for it.

        A flag says whether a stage ends with it.
        """
        waiting = self._swept.by_block.get(name, ())
        if not waiting:
            return []
        look = sweep.look(name)
        of_tensor = {unit.collected.name: unit for unit in self._swept.text.units}
        by_depth: dict[int, list[tuple[list[Unit], int]]] = {}
        for number in waiting:
            tasks = self._swept.plan.units[number].tasks
            names = {one.stored.name for task in tasks for one in task.inputs if _waits(one)}
            needs = [of_tensor[one] for one in sorted(names) if one in of_tensor]
            again = next((one.parameter for one in needs if one.parameter in look.again), None)
            if again is not None:
                raise SparsepruneError(
                    f"{again} is used at several places of the model, which a sweep cannot rebuild: "
                    "calibrate, and give --stats in place of --text"
                )
            depth = max(look.depths.get(one.parameter, 0) for one in needs)
            by_depth.setdefault(depth, []).append((needs, number))
        return [part for depth in sorted(by_depth) for part in self._parts(by_depth[depth])]

    def _parts(self, stage: list[tuple[list[Unit], int]]) -> Iterator[tuple[list[Unit], list[int], bool]]:
        """A stage in parts whose moments have room."""
        wanted: dict[str, Unit] = {}
        units: list[int] = []
        for needs, unit in stage:
            more = {one.collected.name: one for one in needs}
            if units and sum(map(_moment_bytes, (wanted | more).values())) > self._swept.rooms.moments:
                yield list(wanted.values()), units, False
                wanted, units = {}, []
            wanted |= more
            units.append(unit)
        yield list(wanted.values()), units, True

    def _do(self, key: str, part: _Part, gathered: Gathered | None, work: Work) -> None:
        """Decide, rebuild and write some units; those that an earlier run finished are only counted."""
        plan, tensors = self._swept.plan, self._swept.plan.checkpoint.tensors
        units = [plan.units[number] for number in part.units]
        own = {(task.rule, task.instance.label) for unit in units for task in unit.tasks}
        # That some experts are not reached is known when much of the work is done already.
        unreached = self._unreached(part)
        rules = tuple(
            replace(
                rule,
                instances=tuple(
                    _optional(one) if any(leaf.tensor in unreached for leaf in one.scope.leaves) else one
                    for one in rule.instances
                    if (rule.name, one.label) in own
                ),
            )
            for rule in plan.bound.rules
        )
        sweeping = self._swept.text.statistics(
            {name: tuple(counts) for name, counts in part.tokens.items()},
            mixed=part.mixed,
            residuals={name: tensors[name].shape for name in part.residuals},
        )
        found = plan_of(plan.checkpoint, replace(plan.bound, rules=rules), sweeping=sweeping)
        self.left += found.left
        self.rests_on_few |= rests_on_few(found)
        with self._source.having(gathered):
            work.do(self._schedule(found), key, copies=False)
        self._decided.update(stored.name for unit in units for stored in unit.tensors)

    def _unreached(self, part: _Part) -> set[str]:
        """The weights of which no token met some matrix."""
        some = {name for name, counts in part.tokens.items() if not all(counts)}
        of = (unit.collected for unit in self._swept.text.units)
        return {weight for one in of if one.name in some for weight in one.weights}


def _optional(instance: BoundInstance) -> BoundInstance:
    """Of which is rebuilt what can be."""
    method = instance.reconstruct
    return instance if method is None else replace(instance, reconstruct=replace(method, optional=True))


def _reached_wholly(unit: WorkUnit, tasks: Sequence[Task]) -> list[str]:
    """The tensors of a unit of which some tasks reach every element; nested ones lie within outer ones."""
    reached: dict[str, int] = {}
    for task in tasks:
        if task.instance.within is None:
            for leaf in task.instance.scope.leaves:
                reached[leaf.tensor] = reached.get(leaf.tensor, 0) + prod(leaf.view_shape)
    return [stored.name for stored in unit.tensors if reached.get(stored.name, 0) == stored.numel]


def _key(block: str, again: int = 0) -> str:
    """Under which it is noted that a block is pruned, for the first time or `again`."""
    return f"block {block} again {again}" if again else f"block {block}"


def _overwriting(block: str, again: int) -> str:
    """Under which it is noted that what was pruned is about to be written over."""
    return f"tuning {block} {again}"


def _tuned(block: str) -> str:
    """Under which it is noted how a block was tuned."""
    return f"tuned {block}"
