"""Planning: which statistics a checkpoint gets of which products, and which of them are summed together.

Owns the units that are summed, the memory that they take, and why a matrix has no statistics. Runs the first
sequence to see what text reaches. Called by `calibrate`.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from sparseprune.calibration.stored import renumbered, siblings, stored_as, without_statistics
from sparseprune.checkpoint import Collected
from sparseprune.checkpoint.statistics import ROUTING
from sparseprune.errors import SparsepruneError, enough, size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from sparseprune.calibration.gradients import Loss
    from sparseprune.calibration.loading import LoadedModel
    from sparseprune.calibration.stored import StoredAs
    from sparseprune.calibration.sweeps import Streaming
    from sparseprune.calibration.watching import Product
    from sparseprune.checkpoint import StatisticsKind

    Parts = tuple[tuple["Unit", ...], ...]

_REMEMBERED = 8  # inputs that are kept alive, to recognize later products with the same input
_GROUP = 4096  # outputs of a matrix at most whose gradients are multiplied with one another
_SMALLER = 4  # times at most that groups are, so that all are equal; a diagonal alone is worth little


class Unit(Struct, frozen=True, eq=False):
    """The sums for one tensor of statistics, for a stack those of the matrices [begin, end).

    `last` is the number of the last product with the parameter in a forward pass. Of gradients: `outputs`
    are those of the parameter whose gradients are summed, in `groups` of the tensor's from `group` on.
    """

    collected: Collected
    parameter: str
    begin: int
    end: int
    last: int
    outputs: range = range(0)
    group: int = 0
    groups: int = 1

    @property
    def about(self) -> str:
        return self.collected.about

    @property
    def place(self) -> int:
        """The place of its first matrix in its tensor: 0 if an expert has a tensor of its own."""
        return 0 if self.collected.experts is None else self.begin

    def shape(self, kind: StatisticsKind) -> tuple[int, ...]:
        """The shape of its sums, matrices in front."""
        matrices, features = self.end - self.begin, self.collected.features
        if self.about == "routing":
            return (matrices, len(ROUTING))
        if self.about == "gradients":
            size = len(self.outputs) // self.groups
            return (matrices, self.groups, size, size)
        return (matrices, features, features) if kind == "hessian" else (matrices, features)

    def itemsize(self, kind: StatisticsKind) -> int:
        """Bytes of a number of its sums."""
        return 8 if self.about == "routing" or (self.about, kind) == ("inputs", "norm") else 4

    def nbytes(self, kind: StatisticsKind) -> int:
        """Memory that its sums take."""
        numel = 1
        for extent in self.shape(kind):
            numel *= extent
        return numel * self.itemsize(kind)

    def bytes_of_one(self, kind: StatisticsKind) -> int:
        """Memory that the sums of one of its matrices take."""
        return self.nbytes(kind) // (self.end - self.begin)

    def first_group(self, place: int) -> int:
        """Where the sums of a matrix begin in its tensor, in sums of this size."""
        each = self.collected.groups if self.about == "gradients" else 1
        return (self.place + place) * each + self.group


class Summed(Struct, frozen=True):
    """What is summed in one sweep of the text: of each block some parts, for each of which it runs once.

    `there` are the parts on the way there, `back` those on the way back. The units of `standing` are summed
    as long as the sweep lasts: those outside of blocks, and of blocks that are met again.
    """

    standing: tuple[Unit, ...]
    there: Mapping[str, Parts]
    back: Mapping[str, Parts]

    @property
    def goes_back(self) -> bool:
        """Whether gradients are wanted."""
        return bool(self.back) or any(unit.about == "gradients" for unit in self.standing)

    @property
    def runs(self) -> int:
        """How often the block with the most parts runs over the text."""
        return max([1, *(len(parts) for way in (self.there, self.back) for parts in way.values())])


@dataclass(frozen=True)
class Calibration:
    """The plan of a calibration: tensors of statistics in order, tensors without any and why, the sweeps.

    `visits` are the blocks in the order in which text meets them. `values` are the numbers that a sequence
    makes in a block that is differentiated, at most; None without gradients. `without_gradients` are the
    matrices that have moments of inputs alone. `crowded` says in a line that a device makes more passes than
    the memory of the host would.
    """

    tensors: tuple[Collected, ...]
    without: tuple[tuple[str, str], ...]
    sweeps: tuple[Summed, ...]
    visits: tuple[str, ...]
    first: dict[str, int] = field(repr=False)
    without_gradients: tuple[tuple[str, str], ...] = ()
    loss: Loss | None = None
    values: int | None = None
    crowded: str | None = None

    @property
    def passes(self) -> int:
        """How often the block that runs most often does so, over all of the text."""
        return _passes(self.sweeps)


def plan_calibration(
    streaming: Streaming,
    kind: StatisticsKind,
    memory: int,
    loss: Loss | None = None,
    *,
    alone: bool = False,
) -> Calibration:
    """Run the first sequence to find which matrices text reaches; group their sums by `memory` bytes.

    On a device sums take no more than its room, either. With a `loss` for whose gradients there is a way
    back; `alone` leaves out all but these.

    Raises:
        SparsepruneError: no matrix of the checkpoint is multiplied with text, or one needs more memory.
    """
    loaded, checkpoint = streaming.loaded, streaming.loaded.checkpoint
    room = loaded.room  # before anything but the model is there
    # transformers fills missing weights with random numbers: allowed for a head, refused for a layer.
    lacking = [name for name in loaded.missing if any(piece.isdigit() for piece in name.split("."))]
    if lacking:
        raise SparsepruneError(
            f"{checkpoint.path}: lacks {len(lacking)} weights of the model that config.json describes, such "
            f"as {lacking[0]}, so that it cannot be run"
        )
    seen, visits = _seen(streaming, loss)
    groups = seen.groups
    for name, like in siblings(seen.last, loaded.model).items():
        groups[name] = renumbered(groups[like], name, like)
        seen.suppose(name, like)
    stored = stored_as(loaded.model, seen.input_dims, groups, checkpoint)
    shapes = _shapes_of(loaded, seen.input_dims, seen.below)
    units = [*_units_of_inputs(groups, shapes, seen.last, stored)]
    if not units:
        raise SparsepruneError(
            f"{checkpoint.path}: the model that transformers builds multiplies none of its matrices with text"
        )
    units += _units_of_routing(seen, shapes, stored)
    named = {name for unit in units for name in unit.collected.weights}
    without: dict[str, str] = {}
    if loss is not None:
        units = [*(units if not alone else ()), *_units_of_gradients(seen, shapes, stored, without)]
    units.sort(key=lambda unit: unit.last)
    by_name = {unit.collected.name: unit.collected for unit in units}
    _refuse_lack(units, kind, memory, room, loaded.place)

    def sweeps(nbytes: int) -> tuple[Summed, ...]:
        return tuple(_sweeps(units, _homes(units, loaded, visits), kind, nbytes))

    found = sweeps(memory if room is None else min(memory, room))
    return Calibration(
        tuple(by_name.values()),
        tuple(without_statistics(loaded.model, frozenset(named), checkpoint)),
        found,
        visits,
        seen.first,
        tuple((name, why) for name, why in without.items() if name in named),
        loss,
        None if loss is None else max(seen.values),
        _crowded(_passes(found), _passes(sweeps(memory)), loaded.place, room),
    )


def plan_digest(plan: Calibration) -> str:
    """A text that is equal for plans that collect the same sums in the same order."""

    def told(units: Iterable[Unit]) -> list[Any]:
        return [
            (one.collected.name, one.begin, one.end, one.group, dict(one.collected.weights)) for one in units
        ]

    return json.dumps(
        [
            [
                told(one.standing),
                *(
                    {name: [*map(told, parts)] for name, parts in way.items()}
                    for way in (one.there, one.back)
                ),
            ]
            for one in plan.sweeps
        ]
    )


def _seen(streaming: Streaming, loss: Loss | None) -> tuple[Seen, tuple[str, ...]]:
    """What the first sequence meets, with a loss on its way back, too; and the blocks in their order."""
    seen, back = Seen(), Seen()
    blocks, read = streaming.loaded.blocks, streaming.read
    with streaming.sweep([range(1)], lambda: seen, loss) as sweep:
        while (name := sweep.at) is not None:
            with blocks.opened(name, read):
                seen.values.append(0)
                sweep.through(seen, hand=True)
        for visit in reversed(range(len(sweep.visits) if loss else 0)):
            with blocks.opened(sweep.visits[visit], read):
                sweep.back(visit, back, hand=True)
        sweep.finish()
    seen.reached |= back.reached
    return seen, tuple(sweep.visits)


class Seen:
    """What is seen of the parameters on the way of a sequence there and back.

    By parameter: `groups` has the first parameter with the same inputs in every product, `input_dims` the
    dimension along which inputs lie, `first` and `last` the numbers of its first and last product, `below`
    the matrices that lie one below another in it, `outputs` the numbers of outputs of its products.
    `reached` are those that gradients reach, `gates` those whose outputs a router weighs. `values` has how
    many outputs there are in front of all blocks, and in each block and behind it.
    """

    def __init__(self) -> None:
        self.input_dims: dict[str, int] = {}
        self.first: dict[str, int] = {}
        self.last: dict[str, int] = {}
        self.below: dict[str, int] = {}
        self.outputs: defaultdict[str, set[int]] = defaultdict(set)
        self.reached: set[str] = set()
        self.gates: set[str] = set()
        self.values = [0]
        self._met: dict[str, list[int]] = {}
        self._previous = ("", 0)
        self._recent: deque[tuple[tuple[Any, ...], Tensor, int]] = deque(maxlen=_REMEMBERED)
        self._products = 0

    def product(self, product: Product) -> None:
        """Note a product."""
        self._products += 1
        name, inputs = product.parameter, product.inputs
        key = (inputs.data_ptr(), tuple(inputs.shape), inputs.stride(), inputs._version)  # noqa: SLF001
        # The number of an input is that of the first product with it.
        number = next((first for same, _, first in self._recent if same == key), self._products)
        if self._previous != (name, number):  # parts of one parameter have one input, which counts once
            self._met.setdefault(name, []).append(number)
        self._previous = (name, number)
        self.input_dims.setdefault(name, product.input_dim)
        self.first.setdefault(name, self._products)
        self.last[name] = self._products
        self.outputs[name].add(product.outputs)
        self.values[-1] += inputs.numel() // inputs.shape[-1] * product.outputs
        if product.below:
            self.below[name] = product.below
        self._recent.append((key, inputs, number))

    def gradients(self, product: Product, chosen: Mapping[int, Tensor | None], rows: Tensor) -> None:  # noqa: ARG002
        """Note that gradients reach a product."""
        self.reached.add(product.parameter)

    def gated(self, product: Product, matrix: int, *rows: Tensor | None) -> None:  # noqa: ARG002
        """Note that a product is the last of an expert."""
        self.gates.add(product.parameter)

    def suppose(self, name: str, like: str) -> None:
        """Take a parameter that was not seen for like one that was."""
        for numbers in (self.input_dims, self.last, self.below):
            if like in numbers:
                numbers[name] = numbers[like]
        self.outputs[name] = self.outputs[like]
        for some in (self.reached, self.gates):
            some.update({name} if like in some else ())

    @property
    def groups(self) -> dict[str, str]:
        """From the products until now."""
        leaders: dict[tuple[int, ...], str] = {}
        return {name: leaders.setdefault(tuple(met), name) for name, met in self._met.items()}


class _Shape(Struct, frozen=True):
    """Inputs and outputs of each matrix of a parameter; `matrices` None for one matrix that is no stack."""

    features: int
    outputs: int
    matrices: int | None


def _shapes_of(loaded: LoadedModel, dims: dict[str, int], below: dict[str, int]) -> dict[str, _Shape]:
    """The shapes of the matrices in each parameter."""
    found: dict[str, _Shape] = {}
    for name, parameter in loaded.model.named_parameters():
        if name in dims:
            dim = dims[name]
            matrices = int(parameter.shape[0]) if parameter.ndim == 3 else below.get(name)
            features, outputs = (int(parameter.shape[one]) for one in (dim, (parameter.ndim * 2 - 3) - dim))
            if dim == 0:
                features //= below.get(name, 1)
            else:
                outputs //= below.get(name, 1)
            found[name] = _Shape(features, outputs, matrices)
    return found


def _units_of_inputs(
    groups: Mapping[str, str],
    shapes: Mapping[str, _Shape],
    last: Mapping[str, int],
    stored: Mapping[str, Sequence[StoredAs]],
) -> Iterator[Unit]:
    """One unit for each tensor of moments, one for a whole stack."""
    members: defaultdict[str, list[str]] = defaultdict(list)
    for name, leader in groups.items():
        members[leader].append(name)
    for leader, names in members.items():
        if leader not in shapes:
            continue
        shape = shapes[leader]
        found = [one for name in names for one in stored[name]]
        whole = {one.name: one.input_dim for one in found if one.matrix is None}
        if whole:
            collected = Collected(shape.features, shape.matrices, whole)
            yield Unit(collected, leader, 0, shape.matrices or 1, last[leader])
        for matrix in sorted({one.matrix for one in found if one.matrix is not None}):
            weights = {one.name: one.input_dim for one in found if one.matrix == matrix}
            yield Unit(Collected(shape.features, None, weights), leader, matrix, matrix + 1, last[leader])


def _units_of_routing(
    seen: Seen, shapes: Mapping[str, _Shape], stored: Mapping[str, Sequence[StoredAs]]
) -> Iterator[Unit]:
    """One unit for the last matrices of experts, one for each where they are stored apart."""
    for name in sorted(seen.gates & shapes.keys()):
        for one in stored[name]:
            collected = Collected(len(ROUTING), None, {one.name: one.input_dim}, "routing")
            yield _unit(collected, name, one, seen, shapes)


def _units_of_gradients(
    seen: Seen,
    shapes: Mapping[str, _Shape],
    stored: Mapping[str, Sequence[StoredAs]],
    without: dict[str, str],
) -> Iterator[Unit]:
    """One unit for each tensor and each parameter that it is made of; tells of tensors `without` any."""
    for name, found in stored.items():
        for one in found if name in shapes else ():
            why = _why_without_gradients(one, name, seen, shapes[name])
            without.update({one.name: why} if why else {})
    for name, found in stored.items():
        for one in found if name in shapes else ():
            if one.outputs and one.name not in without:
                outputs = _outputs_of_one(one, shapes[name])
                groups = _groups(len(outputs))
                size, weights = len(outputs) * one.of, {one.name: one.output_dim}
                collected = Collected(size, None, weights, "gradients", groups * one.of)
                unit = _unit(collected, name, one, seen, shapes)
                yield replace(unit, outputs=outputs, group=groups * one.number, groups=groups)


def _why_without_gradients(one: StoredAs, name: str, seen: Seen, shape: _Shape) -> str:
    """Why a tensor that stores a parameter has no gradients; "" where it has some."""
    if name not in seen.reached:
        return "no gradient of the loss reaches it"
    if seen.outputs[name] != {shape.outputs}:
        return "its products are with parts of it, one after another"
    if not one.outputs:
        return "it is stored in another order of its outputs than the model has them"
    outputs = len(_outputs_of_one(one, shape))
    if not _groups(outputs):
        return f"its {outputs} outputs make no equal groups of {_GROUP // _SMALLER} to {_GROUP}"
    return ""


def _unit(collected: Collected, name: str, one: StoredAs, seen: Seen, shapes: Mapping[str, _Shape]) -> Unit:
    """A unit of its own for one tensor that stores a parameter."""
    if one.matrix is not None:
        return Unit(collected, name, one.matrix, one.matrix + 1, seen.last[name])
    matrices = shapes[name].matrices
    return Unit(replace(collected, experts=matrices), name, 0, matrices or 1, seen.last[name])


def _outputs_of_one(stored: StoredAs, shape: _Shape) -> range:
    """The outputs of a matrix that a tensor has; those that lie one below another have their own."""
    return stored.outputs[: shape.outputs]


def _groups(outputs: int) -> int:
    """The fewest equal groups of at most `_GROUP` outputs and not many less; 0 where there are none.

    >>> [_groups(size) for size in (4096, 14336, 50257, 30522)]
    [1, 4, 29, 0]
    """
    ways = range(-(-outputs // _GROUP), max(1, _SMALLER * outputs // _GROUP) + 1)
    return next((groups for groups in ways if outputs % groups == 0), 0)


def _refuse_lack(
    units: Iterable[Unit], kind: StatisticsKind, memory: int, room: int | None, device: str
) -> None:
    """SparsepruneError for a matrix whose sums alone are too large for the memory of the host or a device."""
    for unit in units:
        each = unit.bytes_of_one(kind)
        what = "second moment" if unit.about == "inputs" else f"statistics ({unit.about})"
        if each > memory:
            raise SparsepruneError(
                f"--memory {size(memory)}: the {what} of {unit.collected.name} takes {size(each)}; give "
                f"--memory {enough(each)}"
            )
        if room is not None and each > room:
            raise SparsepruneError(
                f"--device {device}: about {size(room)} are free for sums beside the model, the {what} of "
                f"{unit.collected.name} takes {size(each)}; free some of it, or say --device cpu"
            )


def _crowded(passes: int, on_host: int, device: str, room: int | None) -> str | None:
    """A line that says why there are more passes than the memory of the host makes; None if there are not."""
    if passes <= on_host:
        return None
    return (
        f"about {size(room or 0)} of {device} are free for sums beside the model: the text passes {passes} "
        f"times, where --memory would make it {on_host}"
    )


def _passes(sweeps: Sequence[Summed]) -> int:
    return sum(one.runs for one in sweeps)


def _homes(units: Iterable[Unit], loaded: LoadedModel, visits: Sequence[str]) -> dict[Unit, str]:
    """The block in which each unit is summed, if that is met once."""
    met = Counter(visits)
    owners = {unit: loaded.blocks.owner(unit.parameter) for unit in units}
    return {unit: owner for unit, owner in owners.items() if owner is not None and met[owner] == 1}


def _sweeps(
    units: Sequence[Unit], homes: Mapping[Unit, str], kind: StatisticsKind, memory: int
) -> Iterator[Summed]:
    """As few sweeps as units allow whose sums last for a whole one."""
    standing = [unit for unit in units if unit not in homes]
    rest = memory - sum(unit.nbytes(kind) for unit in standing)
    together = rest >= max((unit.bytes_of_one(kind) for unit in homes), default=0)
    ways: tuple[defaultdict[str, list[Unit]], ...] = (defaultdict(list), defaultdict(list))
    for unit in units:
        if unit in homes:
            ways[unit.about == "gradients"][homes[unit]].append(unit)
    there, back = (
        {name: tuple(_parts(some, kind, rest if together else memory)) for name, some in way.items()}
        for way in ways
    )
    if homes or not standing:
        yield Summed(tuple(standing if together else ()), there, back)
    if not (homes and together):
        for part in _parts(standing, kind, memory):
            yield Summed(part, {}, {})


def _parts(units: Iterable[Unit], kind: StatisticsKind, memory: int) -> Iterator[tuple[Unit, ...]]:
    """Units in order, as many in each part as fit; stacks are split between matrices.

    There is room for each matrix alone.
    """
    taken: list[Unit] = []
    left = memory
    for unit in units:
        begin = unit.begin
        while begin < unit.end:
            each = unit.bytes_of_one(kind)
            if each > left:
                yield tuple(taken)
                taken, left = [], memory
            end = min(unit.end, begin + max(1, left // each))
            taken.append(replace(unit, begin=begin, end=end))
            left -= (end - begin) * each
            begin = end
    if taken:
        yield tuple(taken)
