"""A sweep: two passes of a text through a model, block by block, one of them with what is pruned so far.

Owns the moments by which the matrices of a stage are rebuilt, which tokens of both passes belong to each
other, and what a block is tuned for. Knows no specs; who decides what survives stands above. Called by
`apply` with a text.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, Self

import torch
from msgspec import Struct
from torch.utils._pytree import tree_leaves, tree_map

from sparseprune.calibration.runs import Parking, Run, Stream
from sparseprune.calibration.stages import Depths, Following
from sparseprune.calibration.stored import as_stored, siblings, stored_as
from sparseprune.calibration.storing import Store
from sparseprune.calibration.tuning import Tuned, difference, root_of, tuned
from sparseprune.calibration.watching import EnoughError
from sparseprune.errors import SparsepruneError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from sparseprune.calibration.blocks import Read
    from sparseprune.calibration.loading import LoadedModel
    from sparseprune.calibration.planning import Unit
    from sparseprune.calibration.text import Sequences
    from sparseprune.calibration.watching import Product

BATCH_TOKENS = 4096  # in one forward pass
TARGETS = 1 << 28  # bytes of outputs to tune for that stay in memory; more are in files
_TOKENS_AN_INPUT = 8  # fewer, and what residuals differ by is learned by heart; measured on MiniLM


class Look(Struct, frozen=True, eq=False):
    """What the first sequence shows of a block: by parameter its depth and its first and last product.

    `again` are parameters that are used at several places, `routed` those of experts, `summed` those whose
    outputs are added to something else. `overwrites`: the block changes what it gets.
    """

    depths: Mapping[str, int]
    first: Mapping[str, int]
    last: Mapping[str, int]
    again: Collection[str]
    routed: Collection[str]
    summed: Collection[str]
    overwrites: bool = False


class Gathered(Struct, frozen=True, eq=False):
    """Moments by the names of tensors of statistics, mixed ones where there are some; see `Statistic`.

    `residuals` are by the names of weights, in their shape. `tokens` counts rows, by matrix.
    """

    moments: Mapping[str, Tensor]
    mixed: Mapping[str, Tensor]
    residuals: Mapping[str, Tensor]
    tokens: Mapping[str, tuple[int, ...]]


class Sweep:
    """A text in front of a block of a dense model, and in front of the same block of the pruned one.

    `reads` are how tensors of the dense model and of the pruned one are read. With `targets` the outputs of
    the dense model are what pruned matrices aim at; else there is no dense pass. `states` are a folder for
    hidden states, and how many bytes of them stay in memory.
    A context manager: leaving it drops all passes.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        sequences: Sequences,
        reads: tuple[Read, Read],
        states: tuple[Path, int],
        *,
        targets: bool,
    ) -> None:
        self._loaded = loaded
        self._sequences = sequences
        self._dense_read, self._pruned_read = reads
        self._batches = list(_batches(sequences))
        model = loaded.model
        self._folder = states[0]
        parking = Parking(*states, [*model.parameters(), *model.buffers()])
        self._forwards = [self._forward(which) for which in self._batches]
        with torch.no_grad():
            self._pruned = Stream(self._forwards, parking)
            self._dense = Stream(self._forwards, parking) if targets else None
        self._seen = Look({}, {}, {}, (), (), ())
        self._looked: str | None = None
        self._ahead: set[int] = set()  # batches whose dense pass is in front of the next block
        self._parameters: dict[str, Any] = {}
        self._pruned_parameters: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pruned.drop()
        if self._dense is not None:
            self._dense.drop()

    def _forward(self, which: range) -> Callable[[], None]:
        ids = self._sequences.ids[which.start : which.stop]

        def forward() -> None:
            self._loaded.forward(ids)  # its outputs are wanted by nobody

        return forward

    @property
    def at(self) -> str | None:
        """The block in front of which everything halts."""
        return self._pruned.at

    def open(self, name: str) -> None:
        """Read the block in front of which everything halts."""
        self._parameters = dict(self._loaded.blocks.load(name, self._dense_read))
        self.renew(name)

    def renew(self, name: str) -> None:
        """Read the pruned block anew, since more of it is pruned."""
        self._pruned_parameters = dict(self._loaded.blocks.load(name, self._pruned_read))

    def look(self, name: str) -> Look:
        """One sequence through the dense block."""
        blocks, model = self._loaded.blocks, self._loaded.model
        blocks.put(name, self._parameters)
        stream = self._pruned if self._dense is None else self._dense
        own = [one for one in self._shapes(name) if self._dense is not None]
        following = Following(model, lambda _: None, own)
        with closing(Depths(model)) as depths, closing(following), torch.no_grad():
            for watch in (depths, following):
                watch.begin(self._counted(0))
            run = stream.given(0)
            args, kwargs = _copied((run.args, run.kwargs))
            tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
            before = [one._version for one in tensors]  # noqa: SLF001  (counts changes in place)
            with depths, following:
                blocks.modules[name](*args, **kwargs)
            overwrites = before != [one._version for one in tensors]  # noqa: SLF001
            summed = {one for one in own if following.beside(one) is not None}
            stream.keep(0)
        found = dict(depths.of)
        for other, like in siblings(depths.of, model).items():
            if blocks.owner(other) == name:
                found[other] = depths.of[like]
        numbers = (depths.first, depths.last, depths.again, depths.routed)
        self._seen, self._looked = Look(found, *numbers, summed, overwrites), name
        return self._seen

    def gather(self, name: str, units: Sequence[Unit], *, is_last: bool) -> Gathered:
        """The moments of some units of a block, whose inputs depend on nothing that is not decided yet.

        With the last ones of a block the dense pass goes on to the next one, where it comes to the end.
        """
        blocks = self._loaded.blocks
        wanted, look = {unit.parameter for unit in units}, self._seen
        end = max((look.last[one] for one in wanted if one in look.last), default=0)
        depth = max((look.depths.get(one, 0) for one in wanted), default=0)
        behind = {one for one, other in look.depths.items() if other > depth}
        later = {one for one, first in look.first.items() if end and first > end and one in behind}
        sums = _Sums(units, self._loaded.device, mixed=self._dense is not None)
        homes = self._homes(name, units)
        # Nothing more is wanted of a pass than the inputs of these.
        enough = () if homes or wanted & set(look.routed) or not wanted <= look.last.keys() else wanted
        passes = []
        for parameters, stream, seen in (
            (self._parameters, self._dense, sums.dense),
            (self._pruned_parameters, self._pruned, sums.pruned),
        ):
            if stream is None:
                continue
            blocks.put(name, parameters)
            tell = _until(later, enough, seen)
            passes.append((parameters, stream, Following(self._loaded.model, tell, homes)))
        try:
            with torch.no_grad():
                for batch in range(len(self._batches)):
                    ends = [self._through(name, batch, *one) for one in passes]
                    if len(passes) == 2:
                        sums.residuals(*({one: watch.beside(one) for one in homes} for *_, watch in passes))
                    sums.end_batch()
                    for (_, stream, watch), end in zip(passes, ends, strict=True):
                        watch.forget()  # it may keep what a block got, which has no memory while it waits
                        if is_last and stream is self._dense and end is not None:
                            self._ahead.add(batch)
                            stream.go(batch, end)
                        else:
                            stream.keep(batch)
                    del ends
        finally:
            for *_, watch in passes:
                watch.close()
        return sums.gathered(self._sequences.tokens, homes)

    def _through(self, name: str, batch: int, parameters: Any, stream: Stream, watch: Following) -> Any:
        """One batch through a block with some parameters: its outputs, None where it does not come so far."""
        self._loaded.blocks.put(name, parameters)
        watch.begin(self._counted(batch))
        args, kwargs = self._given(stream, batch)
        with self._loaded.telling(self._sequences.ids.shape[1]), suppress(EnoughError), watch:
            return self._loaded.blocks.modules[name](*args, **kwargs)
        return None

    def looked_at(self, name: str) -> bool:
        """Whether it is this block that `look` saw last."""
        return self._looked == name

    @property
    def adding(self) -> tuple[str, ...]:
        """Of the block that was looked at last: matrices whose outputs are added to others, as they run."""
        seen = self._seen
        return tuple(sorted(set(seen.summed) - set(seen.routed), key=lambda one: seen.last[one]))

    def tune(
        self,
        name: str,
        weights: Collection[str],
        gradients: Tensor | None,
        steps: int,
        between: Callable[[], None],
    ) -> Tuned:
        """Weights of the checkpoint, of a pruned block, whose outputs are more like those of the dense one.

        Survivors alone change, within `weights`; those that are no parameters as they are stay, too. Outputs
        differ in the metric of `gradients` at them, without any in all numbers alike. The dense pass goes on.
        """
        blocks, dense, every = self._loaded.blocks, self._dense, range(len(self._batches))
        if dense is None:
            raise TypeError("there is no dense pass")
        start = {key: one.detach() for key, one in self._pruned_parameters.items()}
        free = self._free(name, weights, start)
        root = None if gradients is None else root_of(gradients).to(self._loaded.device)
        with Store(self._folder, TARGETS) as store, self._loaded.telling(self._sequences.ids.shape[1]):
            wanted = []
            blocks.put(name, self._parameters)
            for batch in every:
                with torch.no_grad():
                    args, kwargs = self._given(dense, batch)
                    made = blocks.modules[name](*args, **kwargs)
                    del args, kwargs
                wanted.append(store.keep(self._chosen(made, batch), None))
                self._ahead.add(batch)
                dense.go(batch, made)
                del made

            def loss(parameters: Mapping[str, Tensor], batch: int) -> Tensor:
                run = self._pruned.given(batch)
                args, kwargs = _copied(
                    (run.args, run.kwargs)
                )  # which the way back needs when they are parked
                self._pruned.keep(batch)
                made = torch.func.functional_call(blocks.modules[name], dict(parameters), args, kwargs)
                return difference(self._chosen(made, batch), store.load(wanted[batch]), root)

            found = tuned(loss, start, free, _turns(every), steps, between)
        stored = self._as_stored(name, found.tensors)
        return Tuned({key: stored[key] for key in weights if key in stored}, found.before, found.after)

    def _given(self, stream: Stream, batch: int) -> tuple[Any, Any]:
        """What the block gets of a batch, which it may change; `keep` or `go` follows."""
        run = stream.given(batch)
        given = (run.args, run.kwargs)
        return _copied(given) if self._seen.overwrites else given

    def _chosen(self, made: Any, batch: int) -> Tensor:
        """Of the outputs of a block the hidden states, (tokens that count, features)."""
        counted = self._counted(batch)
        states = next(
            one for one in tree_leaves(made) if isinstance(one, torch.Tensor) and one.is_floating_point()
        )
        if states.shape[:2] == counted.shape:
            return states[counted]
        return states.reshape(-1, states.shape[-1])

    def _free(
        self, name: str, weights: Collection[str], parameters: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Which elements may move, by parameter: survivors of weights that are parameters."""
        stored = self._as_stored(name, parameters)
        kept = {key: self._pruned_read(key) for key in weights if key in stored}
        own = {key for key, one in kept.items() if torch.equal(one, stored[key].to(one.device))}
        del stored, kept

        def read(key: str) -> Tensor:
            found = self._pruned_read(key)
            return (found != 0).to(found.dtype) if key in own else torch.zeros_like(found)

        marks = self._loaded.blocks.load(name, read)
        return {key: one.detach() != 0 for key, one in marks.items() if bool(one.any())}

    def _as_stored(self, name: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = {f"{name}.{key}": one for key, one in parameters.items()}
        return as_stored(self._loaded.model, named, self._loaded.checkpoint)

    def _shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """The parameters of a block that are matrices."""
        blocks = self._loaded.blocks
        return {
            one: tuple(parameter.shape)
            for one, parameter in self._loaded.model.named_parameters()
            if parameter.ndim == 2 and blocks.owner(one) == name
        }

    def _homes(self, name: str, units: Sequence[Unit]) -> dict[str, _Home]:
        """The parameters whose sums are followed: whole matrices that enough tokens meet."""
        summed = set(self._seen.summed)
        shapes = {one: shape for one, shape in self._shapes(name).items() if one in summed}
        found = {}
        for unit in units:
            many = self._sequences.tokens >= _TOKENS_AN_INPUT * unit.collected.features
            if many and unit.collected.experts is None:
                for weight, dim in unit.collected.weights.items():
                    home = self._stored_as(weight, dim, shapes)
                    if home is not None:
                        found[home] = _Home(weight, dim == 0, unit)
        return found

    def _stored_as(self, weight: str, dim: int, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """The parameter that is stored as a weight, whole and as it is."""
        checkpoint = self._loaded.checkpoint
        stored = checkpoint.tensors[weight]
        for one, shape in shapes.items():
            if shape == stored.shape and (weight.endswith(one) or one.endswith(weight)):
                (found,) = stored_as(self._loaded.model, {one: dim}, {}, checkpoint).values()
                if [each.name for each in found] == [weight] and found[0].outputs == range(shape[1 - dim]):
                    return one
        return None

    def go(self, name: str) -> None:
        """Let everything go on to the next block."""
        blocks, every = self._loaded.blocks, range(len(self._batches))
        behind = [batch for batch in every if batch not in self._ahead]
        both = (
            (self._parameters, self._dense, behind),
            (self._pruned_parameters, self._pruned, every),
        )
        with torch.no_grad(), self._loaded.telling(self._sequences.ids.shape[1]):
            for parameters, stream, batches in both:
                if stream is None:
                    continue
                blocks.put(name, parameters)
                for batch in batches:
                    run = stream.given(batch)
                    stream.go(batch, blocks.modules[name](*run.args, **run.kwargs))
        self._parameters, self._pruned_parameters = {}, {}
        self._ahead.clear()
        blocks.free(name)

    def _counted(self, batch: int) -> Tensor:
        which = self._batches[batch]
        return self._sequences.counted[which.start : which.stop].to(self._loaded.device)


class _Home(Struct, frozen=True, eq=False):
    """Where the residuals of a parameter go: to this weight, maybe transposed, of this unit."""

    weight: str
    is_turned: bool
    unit: Unit


class _Rows(Struct, frozen=True, eq=False):
    """The inputs of a matrix in one batch: rows that count, and the tokens that they belong to."""

    rows: Tensor
    tokens: Tensor | None


class _Sums:
    """The sums of some units over both passes."""

    def __init__(self, units: Sequence[Unit], device: torch.device, *, mixed: bool) -> None:
        self._units = units
        self._mixed = mixed
        self._device = device
        self._of: defaultdict[str, list[Unit]] = defaultdict(list)
        for unit in units:
            self._of[unit.parameter].append(unit)
        self._moments = {unit: self._zeros(unit) for unit in units}
        self._others = {unit: self._zeros(unit) for unit in units} if mixed else {}
        self._rows = {unit: [0] * (unit.end - unit.begin) for unit in units}
        self._routed: set[Unit] = set()
        self._dense: defaultdict[tuple[Unit, int], list[_Rows]] = defaultdict(list)
        self._inputs: dict[str, Product] = {}
        self._residuals: dict[str, Tensor] = {}

    def _zeros(self, unit: Unit) -> Tensor:
        return torch.zeros(unit.shape("hessian"), device=self._device)

    def dense(self, product: Product) -> None:
        """A product of the dense pass."""
        for unit, place in self._places(product):
            self._dense[unit, place].append(_chosen(product, place))

    def pruned(self, product: Product) -> None:
        """A product of the pruned pass."""
        self._inputs[product.parameter] = product
        for unit, place in self._places(product):
            mine = _chosen(product, place)
            self._moments[unit][place - unit.begin].addmm_(mine.rows.T, mine.rows)
            self._rows[unit][place - unit.begin] += len(mine.rows)
            if product.routed:
                self._routed.add(unit)
            if self._mixed:
                kept = self._dense[unit, place]
                theirs = kept.pop(0) if kept else None
                self._others[unit][place - unit.begin].addmm_(_paired(mine, theirs).T, mine.rows)

    def _places(self, product: Product) -> Iterator[tuple[Unit, int]]:
        for unit in self._of.get(product.parameter, ()):
            for place in range(unit.begin, unit.end):
                if product.matrix in {None, place}:
                    yield unit, place

    def residuals(self, dense: Mapping[str, Tensor | None], pruned: Mapping[str, Tensor | None]) -> None:
        """What outputs were added to in both passes of a batch, by parameter."""
        for name, mine in pruned.items():
            theirs, product = dense[name], self._inputs.get(name)
            if mine is None or theirs is None or product is None or mine.shape != theirs.shape:
                continue
            rows, chosen = product.inputs, product.chosen(0)
            if len(mine) != len(rows):
                continue
            lacking = product.of_chosen(theirs - mine, chosen)
            inputs = product.of_chosen(rows, chosen).to(self._device, torch.float32)
            if name not in self._residuals:
                self._residuals[name] = torch.zeros(lacking.shape[1], inputs.shape[1], device=self._device)
            self._residuals[name].addmm_(lacking.T, inputs)

    def end_batch(self) -> None:
        """Forget what belongs to a batch."""
        self._dense.clear()
        self._inputs.clear()

    def gathered(self, tokens: int, homes: Mapping[str, _Home]) -> Gathered:
        """The means: over rows, or over all tokens where a router chose some."""
        moments, mixed, counts = {}, {}, {}
        for unit in self._units:
            name = unit.collected.name
            divisors = [tokens if unit in self._routed or not count else count for count in self._rows[unit]]
            scale = torch.tensor(divisors, dtype=torch.float32, device=self._device).reshape(-1, 1, 1)
            shape = unit.collected.shape("hessian")
            moments[name] = _symmetric(self._moments[unit].div_(scale)).reshape(shape)
            _refuse_nonfinite(name, moments[name])
            if self._mixed:
                mixed[name] = self._others[unit].div_(scale).reshape(shape)
            counts[name] = tuple(self._rows[unit])
        residuals = {}
        for parameter, home in homes.items():
            found = self._residuals.get(parameter)
            if found is not None:
                found = found.div_(max(1, self._rows[home.unit][0]))
                residuals[home.weight] = (found.T if home.is_turned else found).contiguous()
        return Gathered(moments, mixed, residuals, counts)


def state_bytes(loaded: LoadedModel, sequences: Sequences) -> int:
    """Bytes of what a sequence has in front of the first block."""
    with torch.no_grad():
        run = Run(lambda: loaded.forward(sequences.ids[:1]))
    tensors = [one for one in tree_leaves((run.args, run.kwargs)) if isinstance(one, torch.Tensor)]
    found = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    run.drop()
    return sum(found.values())


def _copied(given: Any) -> Any:
    """Arguments of a block, with tensors of their own."""
    return tree_map(lambda one: one.clone() if isinstance(one, torch.Tensor) else one, given)


def _batches(sequences: Sequences) -> Iterator[range]:
    """The numbers of the sequences in each batch; the first one is by itself, to look at a block."""
    total, length = sequences.ids.shape
    step = max(1, BATCH_TOKENS // length)
    yield range(1)
    begin = 1
    while begin < total:
        end = min(begin + step, total)
        if end - begin == length > 1:  # as many sequences as tokens would not tell which is which
            end -= 1
        yield range(begin, end)
        begin = end


def _turns(batches: Sequence[int]) -> list[list[int]]:
    """Batches that take turns in steps; the first one, a sequence by itself, goes with the second."""
    return [list(batches[:2]), *([one] for one in batches[2:])]


def _until(
    later: Collection[str], enough: Collection[str], seen: Callable[[Product], None]
) -> Callable[[Product], None]:
    """`seen`, which ends a pass at a product of a later stage, or once it has all that is `enough`."""
    met: set[str] = set()

    def tell(product: Product) -> None:
        if product.parameter in later:
            raise EnoughError
        seen(product)
        met.add(product.parameter)
        if enough and met.issuperset(enough):
            met.clear()
            raise EnoughError

    return tell


def _chosen(product: Product, place: int) -> _Rows:
    """The rows of a matrix that count, with their tokens."""
    chosen = product.chosen(place)
    rows = product.inputs[place] if product.inputs.ndim == 3 else product.inputs
    tokens = product.tokens
    if product.inputs.ndim == 3:
        tokens = torch.arange(len(rows), device=rows.device)
    if chosen is not None:
        rows, tokens = rows[chosen], None if tokens is None else tokens[chosen]
    return _Rows(rows.to(torch.float32), tokens)


def _paired(mine: _Rows, theirs: _Rows | None) -> Tensor:
    """For each row of the pruned pass that of the same token in the dense one, else itself.

    Where a router sends a token elsewhere, nothing says what the dense matrix would have got.
    """
    if theirs is None:
        return mine.rows
    if mine.tokens is None or theirs.tokens is None:
        return theirs.rows if theirs.rows.shape == mine.rows.shape else mine.rows
    if not len(mine.rows) or not len(theirs.rows):
        return mine.rows
    most = 1 + int(torch.maximum(mine.tokens.max(), theirs.tokens.max()))
    places = torch.full((most,), -1, dtype=torch.int64, device=mine.rows.device)
    places[theirs.tokens] = torch.arange(len(theirs.tokens), device=mine.rows.device)
    there = places[mine.tokens]
    return torch.where((there >= 0).unsqueeze(-1), theirs.rows[there.clamp_min(0)], mine.rows)


def _symmetric(moments: Tensor) -> Tensor:
    return (moments + moments.mT).mul_(0.5)


def _refuse_nonfinite(name: str, moment: Tensor) -> None:
    if not bool(moment.isfinite().all()):
        raise SparsepruneError(
            f"{name}: some of its inputs are not finite: the model does not run in its dtype"
        )
