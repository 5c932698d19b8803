"""Sweeps: text on its way through a model, block by block, and the gradients of a loss on their way back.

Owns who is told of the products of which run, and what is kept of a block until gradients come back to it.
Knows no sums, and loads no weights. Called by planning and collecting.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import ExitStack, closing, nullcontext, suppress
from typing import TYPE_CHECKING, Any, Self

import torch
from msgspec import Struct
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from sparseprune.calibration.gradients import differentiable
from sparseprune.calibration.runs import Parking, Stream, outputs_of
from sparseprune.calibration.storing import Kept, Store
from sparseprune.calibration.watching import EnoughError, Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor
    from torch.autograd.graph import GradientEdge

    from sparseprune.calibration.blocks import Read
    from sparseprune.calibration.gradients import Loss, States
    from sparseprune.calibration.loading import LoadedModel
    from sparseprune.calibration.runs import Run
    from sparseprune.calibration.text import Sequences
    from sparseprune.calibration.watching import Watching

_ROOM = 1 << 28  # bytes of hidden states in memory, and of what is kept for the way back; more are in files


def _nothing() -> None:
    """Nobody wants to know."""


class Streaming(Struct, frozen=True, eq=False):
    """Text that is run through a model: its weights come from `read`, hidden states wait in a `folder`."""

    loaded: LoadedModel
    read: Read
    sequences: Sequences
    folder: Path

    def sweep(self, batches: Sequence[range], outer: Callable[[], Watching], loss: Loss | None) -> Sweep:
        """All text through the model, and with a loss back."""
        return Sweep(self, batches, outer, loss)


class _Made(Struct, eq=False):
    """The gradients at the outputs of a block that came until now, by the number of the output."""

    visit: int
    gradients: dict[int, Kept] = {}


class _Given(Struct, frozen=True, eq=False):
    """What a block got, in a batch: the leaves of its arguments, and where gradients of these go on."""

    leaves: tuple[Any, ...]
    spec: Any
    edges: dict[int, GradientEdge]


class _Pending(Struct, frozen=True, eq=False):
    """A gradient at an input of a block, and the visits to which the code between blocks leads it."""

    edge: GradientEdge
    gradient: Kept
    visits: frozenset[int]


class Sweep:
    """Batches in front of one and the same block; a context manager.

    Products outside of blocks are told to what `outer` makes for each batch, there and back. With a loss all
    batches go back in the end: the code between blocks is a graph that autograd has, blocks are run again.
    `visits` are the blocks in the order in which they ran.
    """

    def __init__(
        self,
        streaming: Streaming,
        batches: Sequence[range],
        outer: Callable[[], Watching],
        loss: Loss | None,
    ) -> None:
        self.visits: list[str] = []
        self._streaming = streaming
        self._loaded = streaming.loaded
        self._batches = batches
        self._loss = loss
        self._outer = outer
        self._store = Store(streaming.folder, _ROOM)
        self._given: dict[tuple[int, int], _Given] = {}
        self._made: dict[tuple[int, int], _Made] = {}
        self._pending: list[list[_Pending]] = [[] for _ in batches]
        self._anchor = torch.zeros((), requires_grad=True)

    def __enter__(self) -> Self:
        loaded, text = self._loaded, self._streaming
        with ExitStack() as stack:
            wanted = nullcontext() if self._loss is None else differentiable(loaded.model)
            states = stack.enter_context(wanted)
            stack.enter_context(self._store)
            self._watches = []
            for which in self._batches:
                watch = stack.enter_context(closing(Watch(loaded.model, self._outer())))
                watch.begin(self._counted(which), gradients=self._loss is not None)
                self._watches.append(watch)
            forwards = [self._forward(number, states) for number in range(len(self._batches))]
            parking = Parking(text.folder, _ROOM, [*loaded.model.parameters(), *loaded.model.buffers()])
            with torch.set_grad_enabled(self._loss is not None):
                self._stream = stack.enter_context(Stream(forwards, parking))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def at(self) -> str | None:
        """The block in front of which all batches are; None at the end."""
        return self._stream.at

    def through(self, watching: Watching | None, *, hand: bool, done: Callable[[], None] = _nothing) -> None:
        """Run the block, which is loaded, over all batches; `hand` its outputs on, or stay in front of it.

        `done` is called after each batch.
        """
        name, stream = str(self.at), self._stream
        if hand:
            self.visits.append(name)
        with self._watched(watching) as watch:
            for number, which in enumerate(self._batches):
                run = stream.given(number)
                if hand and self._loss is not None:
                    self._keep(number, run)
                before = tree_leaves((run.args, run.kwargs))
                outputs = None
                with self._telling(), suppress(EnoughError), torch.no_grad(), self._of(watch, which):
                    outputs = outputs_of(self._loaded.blocks.modules[name], run)
                if not hand:
                    stream.keep(number)
                else:
                    if self._loss is not None:
                        outputs = self._cut(number, run, before, outputs)
                    del before
                    stream.go(number, outputs)
                done()

    def back(
        self, visit: int, watching: Watching | None, *, hand: bool, done: Callable[[], None] = _nothing
    ) -> None:
        """Run the block of a visit, which is loaded, there and back; `hand` gradients on to earlier ones.

        Later visits must have gone back before.
        """
        block = self._loaded.blocks.modules[self.visits[visit]]
        block.requires_grad_(requires_grad=False)
        with self._watched(watching) as watch:
            for number, which in enumerate(self._batches):
                self._flush(number, visit)
                given, made = self._given[visit, number], self._made[visit, number]
                leaves = {
                    at: self._store.load(one) for at, one in enumerate(given.leaves) if isinstance(one, Kept)
                }
                for at in given.edges:
                    leaves[at].requires_grad_()
                if made.gradients:
                    with self._telling(), torch.enable_grad(), self._of(watch, which, gradients=True):
                        self._there_and_back(block, given, leaves, made, watch)
                if hand:
                    self._hand_back(number, given, leaves, made)
                done()

    def finish(self) -> None:
        """Let all gradients go back to where the text begins."""
        for number in range(len(self._batches)):
            self._flush(number, None)

    def _forward(self, number: int, states: States | None) -> Callable[[], None]:
        """The way of a batch through the model, in the thread of its run."""
        which, sequences = self._batches[number], self._streaming.sequences
        ids = sequences.ids[which.start : which.stop]

        def forward() -> None:
            with self._watches[number] as watch:
                made = self._loaded.forward(ids)
                if self._loss is None or states is None:
                    return
                with self._telling():
                    ends, gradients = self._loss.at_ends(
                        made, states, sequences, which, self._loaded.vocabulary
                    )
                    watch.turn()
                    torch.autograd.backward([ends], [gradients], retain_graph=True)

        return forward

    def _telling(self) -> Any:
        return self._loaded.telling(self._streaming.sequences.ids.shape[1])

    def _counted(self, which: range) -> Tensor:
        return self._streaming.sequences.counted[which.start : which.stop].to(self._loaded.device)

    def _watched(self, watching: Watching | None) -> Any:
        return nullcontext() if watching is None else closing(Watch(self._loaded.model, watching))

    def _of(self, watch: Watch | None, which: range, *, gradients: bool = False) -> Any:
        """A watch that begins with a batch."""
        if watch is None:
            return nullcontext()
        watch.begin(self._counted(which), gradients=gradients)
        return watch

    def _keep(self, number: int, run: Run) -> None:
        """Keep what a block gets, before it may change any of it."""
        found, spec = tree_flatten((run.args, run.kwargs))
        edges = {
            at: get_gradient_edge(one)
            for at, one in enumerate(found)
            if isinstance(one, torch.Tensor) and one.requires_grad
        }
        kept = (self._store.keep(one, number) if isinstance(one, torch.Tensor) else one for one in found)
        self._given[len(self.visits) - 1, number] = _Given(tuple(kept), spec, edges)

    def _cut(self, number: int, run: Run, before: list[Any], outputs: Any) -> Any:
        """The outputs of a block, at which gradients that come back are kept."""
        visit = len(self.visits) - 1
        made = self._made[visit, number] = _Made(visit)
        found, spec = tree_flatten(outputs)
        written = _written(before, (run.args, run.kwargs))
        places = [at for at, one in enumerate(found) if _has_gradient(one)]
        mine = [found[at] for at in places]
        mine += [
            one for container, key in written for one in tree_leaves(container[key]) if _has_gradient(one)
        ]
        if not mine:
            return outputs
        with torch.enable_grad():
            cut = list(_Edge.apply(self._anchor, self._store, made, *mine))  # type: ignore[no-untyped-call]
        for at, one in zip(places, cut, strict=False):
            found[at] = one
        rest = iter(cut[len(places) :])
        for container, key in written:
            container[key] = tree_map(lambda one: next(rest) if _has_gradient(one) else one, container[key])
        return tree_unflatten(found, spec)

    def _there_and_back(
        self, block: Any, given: _Given, leaves: dict[int, Tensor], made: _Made, watch: Watch | None
    ) -> None:
        """Run a block again over what it got, and the gradients at its outputs back to that."""
        arguments = [leaves.get(at, one) for at, one in enumerate(given.leaves)]
        # Copies, which a block may change in place.
        arguments = [one.clone() if at in given.edges else one for at, one in enumerate(arguments)]
        args, kwargs = tree_unflatten(arguments, given.spec)
        before = tree_leaves((args, kwargs))
        outputs = block(*args, **kwargs)
        found = [one for one in tree_leaves(outputs) if _has_gradient(one)]
        for container, key in _written(before, (args, kwargs)):
            found += [one for one in tree_leaves(container[key]) if _has_gradient(one)]
        ends = {at: found[at] for at in made.gradients if found[at].requires_grad}
        if ends:
            if watch is not None:
                watch.turn()
            gradients = [self._store.load(made.gradients[at]) for at in ends]
            torch.autograd.backward(list(ends.values()), gradients)

    def _hand_back(self, number: int, given: _Given, leaves: dict[int, Tensor], made: _Made) -> None:
        """Gradients at what a block got wait for the other ones that go the same way; forget the visit."""
        for at, edge in given.edges.items():
            gradient = leaves[at].grad
            if gradient is not None:
                kept = self._store.keep(gradient, None)
                self._pending[number].append(_Pending(edge, kept, _visits_before(edge)))
        for one in (*given.leaves, *made.gradients.values()):
            if isinstance(one, Kept):
                self._store.forget(one)
        del self._given[made.visit, number], self._made[made.visit, number]

    def _flush(self, number: int, visit: int | None) -> None:
        """Let gradients of a batch that lead to a visit go through the code between blocks; all for None."""
        flows = [one for one in self._pending[number] if visit is None or visit in one.visits]
        if not flows:
            return
        self._pending[number] = [one for one in self._pending[number] if one not in flows]
        gradients = [self._store.load(one.gradient) for one in flows]
        with self._telling(), self._watches[number]:
            torch.autograd.backward([one.edge for one in flows], gradients, retain_graph=True)
        for one in flows:
            self._store.forget(one.gradient)


class _Edge(torch.autograd.Function):
    """Between a block and the code behind it: gradients that come back are kept."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, store: Store, made: _Made, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.store, ctx.made = store, made
        ctx.set_materialize_grads(False)
        return tuple(one.clone() for one in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        found = ctx.made.gradients
        for at, one in enumerate(gradients):
            if one is not None:
                before = found.get(at)
                found[at] = ctx.store.keep(one if before is None else one + ctx.store.load(before), None)
                if before is not None:
                    ctx.store.forget(before)
        return (None, None, None, *(None for _ in gradients))


def _has_gradient(one: Any) -> bool:
    """Whether a leaf of outputs is a tensor that may have a gradient."""
    return isinstance(one, torch.Tensor) and one.is_floating_point()


def _written(before: list[Any], arguments: Any) -> list[tuple[Any, Any]]:
    """Where a block wrote tensors into dicts and lists that it got: such as keys that later blocks share."""
    old = {id(one) for one in before}
    return [
        (container, key)
        for container, key in _entries(arguments)
        if any(isinstance(one, torch.Tensor) and id(one) not in old for one in tree_leaves(container[key]))
    ]


def _entries(tree: Any) -> Iterator[tuple[Any, Any]]:
    """The innermost entries of dicts and lists."""
    items: Any = ()
    if isinstance(tree, MutableMapping):
        items = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    for key, value in items:
        if isinstance(value, MutableMapping | list):
            yield from _entries(value)
        elif not isinstance(tree, tuple):
            yield tree, key
        else:
            yield from _entries(value)


def _visits_before(edge: GradientEdge) -> frozenset[int]:
    """The visits of blocks from whose outputs the code between blocks made a tensor."""
    found: set[int] = set()
    known = {edge.node}
    left = [edge.node]
    while left:
        node = left.pop()
        made = getattr(node, "made", None)
        if isinstance(made, _Made):
            found.add(made.visit)
            continue
        new = {one for one, _ in node.next_functions if one is not None} - known
        known |= new
        left += new
    return frozenset(found)
