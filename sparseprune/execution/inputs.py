"""Inputs: which tensors of score, statistics and conditioner files each rule reads beside weights.

Owns what a file must hold for a weight, which weights take part, and what is said where something does not
fit. Reads headers alone. Called by the plan.
"""

from __future__ import annotations

import shlex
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from msgspec import Struct
from msgspec.structs import replace

from sparseprune.checkpoint import Statistic, open_statistics
from sparseprune.checkpoint.statistics import ROUTING, statistics_beside
from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import prod
from sparseprune.errors import CheckpointError, SpecError
from sparseprune.execution.experts import Routed
from sparseprune.execution.scores import kind_of
from sparseprune.spec import BoundBlock, BoundScope
from sparseprune.spec.problems import nearest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sparseprune.checkpoint import Checkpoint, Statistics, StatisticsKind, StoredTensor
    from sparseprune.engine.grids import Shape
    from sparseprune.execution.regions import AnyBlock, AnyScope
    from sparseprune.spec import Allocate, BoundInstance, Reconstruct, Score

Role = Literal[
    "values", "vector", "blocks", "conditioners", "moment", "gradients", "mixed", "residual", "loss"
]
_NUMBERS = frozenset(row.name for row in DTYPES.values() if row.prunable)
_FLOATS = frozenset(name for name in _NUMBERS if not name.startswith("I"))
_MOMENTS = frozenset({"F64", "F32", "F16", "BF16"})
_NO_STATISTICS = "there is no file: give what calibrate wrote, as file here or by --stats"
_OF_CALIBRATE: frozenset[Role] = frozenset({"moment", "gradients", "loss", "vector"})
_UNSEEN, _WHOLE_ROWS = "there are no statistics of", "nothing can make up for the whole rows of"
_UNREACHED = "no token reached"
_WITHOUT_SWEEP = "leave that out, or calibrate and give --stats in place of --text"
_MOST_NAMED = 3  # weights without statistics; more of them mean another checkpoint
SWEPT = Path("/--text")  # the path of statistics that are in no file
# Others belong to the score.
_TABLE_OF: Mapping[Role, str] = dict.fromkeys(("moment", "gradients", "loss"), "reconstruct")


class TaskInput(Struct, frozen=True):
    """A stored tensor that a task reads: `key` is the weight, or for block scores the block, that it is for.

    `dim` is the dimension of the weight along which a vector lies, or the inputs of a second moment, or the
    outputs of one of gradients. `form`
    tells what a vector is made from: second moments, or the roots of their diagonal; None where it is ready.
    `tokens` were counted, a number for each matrix; () where nothing did. Of a tensor with a number or, along
    `dim`, a row for each expert of a layer, the blocks are `experts`: the first one, and how many. A "loss"
    is told by a second moment and by `gradients`, where there are some.
    """

    role: Role
    key: str
    stored: StoredTensor
    dim: int = -1
    form: StatisticsKind | None = None
    tokens: tuple[int, ...] = ()
    experts: tuple[int, int] | None = None
    gradients: StoredTensor | None = None


def told(path: Path | None) -> str:
    """The path of statistics as people know it."""
    return SWEPT.name if path == SWEPT else str(path)


class Left(Struct, frozen=True):
    """What a rule does not rebuild and why, by the first weight of each instance."""

    rule: str
    why: str
    weights: tuple[str, ...]


class Sweeping(Struct, frozen=True):
    """Statistics that a run makes of a model while it prunes it, in place of a file: their path is `SWEPT`.

    What is needed before, such as losses, is in the file `before`.
    """

    statistics: Statistics
    before: Path | None = None


class InputFiles:
    """The files that a spec names, each opened once; collects their problems."""

    def __init__(self, weights: Checkpoint, sweeping: Sweeping | None = None) -> None:
        self._weights = weights
        self._sweeping = sweeping
        self._routed: Routed | None = None
        self._files: dict[Path, Statistics | None] = {}
        if sweeping is not None:
            self._files[SWEPT] = sweeping.statistics
        self._problems: dict[str, None] = {}
        self._missing: dict[tuple[str, Role, Path], list[str]] = {}
        self._left: dict[tuple[str, str, Path], list[str]] = {}
        self._rebuilds = False

    def of_instance(self, rule: str, instance: BoundInstance) -> tuple[TaskInput, ...]:
        """The inputs of one instance; what is missing is noted and left out."""
        score, soft, scope, kind = instance.score, instance.soft, instance.scope, kind_of(instance.score)
        found: list[TaskInput] = []
        if kind.reads == "vector":
            found += self._statistics(rule, score, scope, "vector")
        elif kind.reads == "router":
            found += self._routers(rule, scope)
        elif kind.reads == "routing":
            found += self._routings(rule, score.file, scope)
        elif kind.reads is not None and score.file is not None:
            found += self._ready(rule, score.file, scope, kind.reads)
        if instance.reconstruct is not None:
            found += self._moments(rule, instance.reconstruct, scope)
        if instance.allocate is not None:
            found += self._losses(rule, instance.allocate, scope)
        if soft is not None and not kind.ranks_weights:
            text = f"mode soft shrinks the norms of the weights themselves; kind {score.kind} has no part"
            self._note(rule, text)
        if soft is not None and soft.conditioners is not None:
            found += self._ready(rule, soft.conditioners, scope, "conditioners")
        return tuple(found)

    def raise_if_any(self) -> None:
        """SpecError with every problem that was noted; where much is missing one line says so."""
        for (rule, role, path), names in self._missing.items():
            file = self._files[path]
            named = names if len(names) <= _MOST_NAMED else names[:1]
            for name in named:
                what = name if len(named) > 1 or len(names) == 1 else f"{len(names)} weights, such as {name}"
                if role == "gradients":
                    text = f'has no gradients of {what}, which metric = "loss" needs: calibrate --gradients'
                elif path == SWEPT:
                    text = f"a sweep rebuilds what one block has for itself, not {what}: {_WITHOUT_SWEEP}"
                else:
                    near = "" if file is None else _nearest(name, list(file.of))
                    text = f"has no statistics of {what}{near}"
                self._note(rule, f"{told(path)}: {text}", role)
        if self._left and not self._rebuilds:
            (rule, why, path), names = next(iter(self._left.items()))
            if why == _UNSEEN:
                self._note(rule, f"{told(path)}: has statistics of no weight that it could rebuild", "moment")
        if self._problems:
            raise SpecError(*self._problems)

    def left(self) -> tuple[Left, ...]:
        """What is not rebuilt although that was asked for."""
        return tuple(Left(rule, why, tuple(names)) for (rule, why, _), names in self._left.items())

    def _ready(self, rule: str, path: Path, scope: AnyScope, role: Role) -> Iterator[TaskInput]:
        """Tensors of the weights' shapes, or for "blocks" of those of the block grids."""
        if role == "blocks":
            for block in _blocks(scope):
                yield from self._of_blocks(rule, path, block)
        else:
            for name in dict.fromkeys(leaf.tensor for leaf in scope.leaves):
                yield from self._get(rule, path, role, (name,), self._weights.tensors[name].shape)

    def _of_blocks(self, rule: str, path: Path, block: AnyBlock) -> Iterator[TaskInput]:
        """A tensor for the blocks of a grid; that of experts may be one for all experts of a layer."""
        names = (block.label, block.tensor) if isinstance(block, BoundBlock) else (block.label,)
        file = self._open(rule, path, "values")
        there = () if file is None else file.checkpoint.tensors
        experts = None if any(name in there for name in names) else self._experts().of(block)
        if experts is None:
            yield from self._get(rule, path, "blocks", names, block.grid_shape)
        elif experts.module in there:
            for one in self._get(rule, path, "blocks", (experts.module,), (experts.count,)):
                yield replace(one, key=block.label, experts=(experts.first, experts.number))
        elif file is not None:
            grid, near = list(block.grid_shape), _nearest(experts.module, list(there))
            what = f"{experts.module} of shape [{experts.count}], nor {block.label} of shape {grid}"
            self._note(rule, f"{told(path)}: there is no tensor {what}{near}")

    def _experts(self) -> Routed:
        """The routed experts of the checkpoint, looked for once."""
        if self._routed is None:
            self._routed = Routed.find(self._weights)
        return self._routed

    def _routers(self, rule: str, scope: AnyScope) -> Iterator[TaskInput]:
        """The router of the experts that are blocks, a matrix of the checkpoint itself."""
        for block in _blocks(scope):
            experts = self._experts().of(block)
            router = None if experts is None else self._experts().router(experts)
            if experts is None:
                self._note(rule, _no_expert(block, "router"))
            elif router is None:
                where = experts.module.rpartition(".")[0]
                self._note(rule, f"no matrix beside {experts.module} has a row for each expert, in {where}")
            elif (line := _unreadable(self._weights.tensors[router[0]])) is not None:
                self._note(rule, line)
            else:
                stored, these = self._weights.tensors[router[0]], (experts.first, experts.number)
                yield TaskInput("blocks", block.label, stored, router[1], experts=these)

    def _routings(self, rule: str, path: Path | None, scope: AnyScope) -> Iterator[TaskInput]:
        """What the experts that are blocks did, noted for the last matrix of each."""
        file = None if path is None else self._open(rule, path, "values")
        for block in () if file is None else _blocks(scope):
            experts = self._experts().of(block)
            named = [file.of[leaf.tensor] for leaf in block.leaves if file and leaf.tensor in file.of]
            stored = next((one.routing for one in named if one.routing is not None), None)
            if experts is None:
                self._note(rule, _no_expert(block, "reap"))
            elif stored is None:
                lacks = f"does not tell what {block.label} did on text: calibrate again"
                self._note(rule, f"{told(path)}: {lacks}")
            elif stored.shape not in {(experts.count, len(ROUTING)), (len(ROUTING),)}:
                wanted = f"is of shape {list(stored.shape)}, wanted [{experts.count}, {len(ROUTING)}]"
                self._note(rule, f"{told(path)}: {stored.name} {wanted}: calibrate again")
            else:
                first = experts.first if len(stored.shape) > 1 else 0
                yield TaskInput("blocks", block.label, stored, experts=(first, experts.number))

    def _moments(self, rule: str, method: Reconstruct, scope: AnyScope) -> Iterator[TaskInput]:
        """The second moments that weights are rebuilt by, and those of gradients where there are some.

        It is noted where the loss was asked for and a weight has no gradients.
        """
        path = method.file
        if path is None:
            self._note(rule, _NO_STATISTICS, "moment")
        file = None if path is None else self._open(rule, path, "moment")
        if path is None or file is None:
            return
        why = self._why_left(method, scope, file) if method.optional else ""
        if why:
            self._left.setdefault((rule, why, path), []).append(scope.leaves[0].tensor)
            return
        self._rebuilds = True
        for one in self._statistics(rule, method, scope, "moment"):
            yield one
            statistic = file.of[one.key]
            if statistic.mixed is not None and method.target == "dense":
                yield TaskInput("mixed", one.key, statistic.mixed, one.dim)
            if statistic.residual is not None and method.target == "dense":
                yield TaskInput("residual", one.key, statistic.residual, one.dim)
            if method.optional and not all(one.tokens):
                some = [f"{one.key} (matrix {place})" for place, count in enumerate(one.tokens) if not count]
                self._left.setdefault((rule, _UNREACHED, path), []).extend(some)
            if statistic.gradients is not None:
                yield from self._gradients(rule, path, one, statistic)
            elif method.metric == "loss":
                self._missing.setdefault((rule, "gradients", path), []).append(one.key)

    def _losses(self, rule: str, asked: Allocate, scope: AnyScope) -> Iterator[TaskInput]:
        """What tells by how much the loss grows, which has to be known before anything is pruned."""
        file, sweeping = asked.file, self._sweeping
        if sweeping is not None and file == SWEPT:
            file = sweeping.before
        if file is None:
            self._note(rule, _NO_STATISTICS, "loss")
        else:
            yield from self._statistics(rule, replace(asked, file=file), scope, "loss")

    def _why_left(self, method: Reconstruct, scope: AnyScope, file: Statistics) -> str:
        """Why nothing is rebuilt in a scope for which that is optional; "" where something is."""
        if not all(any(leaf.tensor in file.of for leaf in block.leaves) for block in _blocks(scope)):
            return _UNSEEN
        tokens = [file.of[leaf.tensor].tokens for leaf in scope.leaves if leaf.tensor in file.of]
        if not any(not counts or any(counts) for counts in tokens):  # not counted is not none
            return _UNREACHED
        if method.method == "admm":
            return ""
        for leaf in scope.leaves:
            statistic, weight = file.of.get(leaf.tensor), self._weights.tensors[leaf.tensor].shape
            if statistic is not None:
                dim = next(one for one in (method.input_dim, statistic.input_dim, -1) if one is not None)
                if not holds_rows(leaf, *statistic.stacked(weight, dim % len(weight))):
                    return ""
        return _WHOLE_ROWS

    def _gradients(
        self, rule: str, path: Path, moment: TaskInput, statistic: Statistic
    ) -> Iterator[TaskInput]:
        """The second moments of the gradients of a weight that has those of inputs; none that do not fit."""
        weight, stored = self._weights.tensors[moment.key], statistic.gradients
        if stored is None:
            return
        shape, dim = statistic.stacked(weight.shape, moment.dim)
        if not is_gradients(stored.shape, shape, dim):
            outputs = shape[output_dim(shape, dim)]
            wanted = [*shape[:-2], outputs, outputs]
            text = f"{stored.name} has shape {list(stored.shape)}, wanted {wanted}, or groups of its rows"
        elif stored.dtype not in _MOMENTS:
            text = f"{stored.name} is {stored.dtype}, wanted one of {', '.join(sorted(_MOMENTS))}"
        else:
            yield TaskInput("gradients", moment.key, stored, output_dim(shape, dim))
            return
        self._note(rule, f"{told(path)}: {text}", "gradients")

    def _statistics(
        self, rule: str, method: Score | Reconstruct | Allocate, scope: AnyScope, role: Role
    ) -> Iterator[TaskInput]:
        """One input for each weight that takes part; of a fused block some may be missing, but not all."""
        path = method.file
        file = None if path is None else self._open(rule, path, role)
        if path is None or file is None:
            return
        for block in _blocks(scope):
            found = self._found(rule, path, role, block, file, method.input_dim)
            if found is not None and not found:
                missing = self._missing.setdefault((rule, role, path), [])
                missing += dict.fromkeys(leaf.tensor for leaf in block.leaves)
            yield from found or ()

    def _found(
        self, rule: str, path: Path, role: Role, block: AnyBlock, file: Statistics, asked: int | None
    ) -> list[TaskInput] | None:
        """The inputs of a block's weights that take part; None where something was noted."""
        known = [leaf for leaf in block.leaves if leaf.tensor in file.of]
        dims = {}
        for name in dict.fromkeys(leaf.tensor for leaf in known):
            statistic, weight = file.of[name], self._weights.tensors[name]
            dim = next(one for one in (asked, statistic.input_dim, -1) if one is not None)
            if not -len(weight.shape) <= dim < len(weight.shape):
                text = f"input_dim {dim} is no dimension of {name}, whose shape is {list(weight.shape)}"
                self._note(rule, text, role)
                return None
            dims[name] = dim % len(weight.shape)
        # Whoever made vectors chose which weights take part; every weight has moments.
        if any(file.of[leaf.tensor].kind or len(file.of[leaf.tensor].stored.shape) > 1 for leaf in known):
            seen = {
                name: file.of[name].stacked(self._weights.tensors[name].shape, dim)
                for name, dim in dims.items()
            }
            shapes = {name: shape for name, (shape, _) in seen.items()}
            known = taking_part(known, shapes, {name: dim for name, (_, dim) in seen.items()})
        found = []
        for name in dict.fromkeys(leaf.tensor for leaf in known):
            one = self._checked(rule, path, role, name, file.of[name], dims[name])
            if one is None:
                return None
            found.append(one)
        return found

    def _checked(
        self, rule: str, path: Path, role: Role, name: str, statistic: Statistic, dim: int
    ) -> TaskInput | None:
        """A statistic as the input of a weight; None, with a note, where it does not fit."""
        weight, stored = self._weights.tensors[name], statistic.stored
        seen, along = statistic.stacked(weight.shape, dim)
        forms = _shapes(seen, along, role, statistic.kind)
        form, gradients = forms.get(stored.shape), statistic.gradients if role == "loss" else None
        allowed = _NUMBERS if role == "vector" and form is None else _MOMENTS
        problem = ""
        if role in _TABLE_OF and statistic.kind == "norm":
            problem = f"has norms of inputs alone, for {name}: calibrate with --kind hessian"
        elif role in _TABLE_OF and (len(weight.shape) not in {2, 3} or weight.dtype not in _FLOATS):
            problem = f"{name} is {weight.dtype} of shape {list(weight.shape)}, wanted a matrix of floats"
        elif stored.shape not in forms:
            wanted = " or ".join(str(list(shape)) for shape in forms)
            problem = f"{name} has shape {list(stored.shape)}, wanted {wanted}"
        elif stored.dtype not in allowed:
            problem = f"{name} is {stored.dtype}, wanted one of {', '.join(sorted(allowed))}"
        elif gradients is not None and prod(gradients.shape[:-1]) * seen[along] != prod(seen):
            problem = f"{gradients.name} has shape {list(gradients.shape)}, which fits no {list(seen)}"
        if problem:
            self._note(rule, f"{told(path)}: {problem}", role)
            return None
        return TaskInput(role, name, stored, dim, form, statistic.tokens, gradients=gradients)

    def _get(
        self, rule: str, path: Path, role: Role, names: tuple[str, ...], shape: Shape
    ) -> Iterator[TaskInput]:
        """The tensor of the first of some names that is there; none, with a note, where it does not fit."""
        file = self._open(rule, path, "values")
        if file is None:
            return
        tensors = file.checkpoint.tensors
        stored = next((tensors[name] for name in names if name in tensors), None)
        if stored is None:
            what = f"there is no tensor {names[-1]} of shape {list(shape)}"
            self._note(rule, f"{told(path)}: {what}{_nearest(names[-1], list(tensors))}")
        elif stored.shape != shape:
            found = f"{stored.name} has shape {list(stored.shape)}"
            self._note(rule, f"{told(path)}: {found}, wanted {list(shape)}")
        elif stored.dtype not in _NUMBERS:
            wanted = ", ".join(sorted(_NUMBERS))
            self._note(rule, f"{told(path)}: {stored.name} is {stored.dtype}, wanted one of {wanted}")
        else:
            yield TaskInput(role, names[0], stored)

    def _open(self, rule: str, path: Path, role: Role) -> Statistics | None:
        if path not in self._files:
            try:
                self._files[path] = open_statistics(path)
            except CheckpointError as error:
                self._files[path] = None
                makes = role in _OF_CALIBRATE and isinstance(error.__cause__, FileNotFoundError)
                self._note(rule, self._to_calibrate(path) if makes else str(error), role)
        return self._files[path]

    def _to_calibrate(self, path: Path) -> str:
        """What to do about statistics that are not there: the command that makes them."""
        source = self._weights.path
        usual, then = statistics_beside(source), ""
        words = ["sparseprune", "calibrate", str(source), "--text", "corpus.txt"]
        if path.suffix == ".safetensors":  # calibrate writes a folder
            then = f", and give --stats {shlex.quote(str(usual))}"
        elif path != usual:
            words += ["-o", str(path)]
        return f"there are no statistics in {path}; make them from a text: {shlex.join(words)}{then}"

    def _note(self, rule: str, text: str, role: Role = "values") -> None:
        self._problems[f"[{rule}] {_TABLE_OF.get(role, 'score')}: {text}"] = None


def _shapes(
    weight: Shape, dim: int, role: Role, kind: StatisticsKind | None
) -> dict[Shape, StatisticsKind | None]:
    """The shapes that statistics of a weight may have, with what they are; stacks have matrices in front."""
    features = weight[dim]
    stack = weight[:1] if len(weight) == 3 else ()
    moments: dict[Shape, StatisticsKind | None] = {(*stack, features, features): "hessian"}
    if role in _TABLE_OF or kind == "hessian":
        return moments
    if kind == "norm":
        return {(*stack, features): "norm"}
    return {(features,): None, (*stack, features): None, **moments}


def output_dim(shape: Shape, dim: int) -> int:
    """The dimension of a matrix, or of a stack, along which its outputs lie, where inputs lie along `dim`."""
    return 2 * len(shape) - 3 - dim


def is_gradients(found: Shape, weight: Shape, dim: int) -> bool:
    """Whether a tensor may be the second moments of gradients of a weight with inputs along `dim`.

    They are (outputs, outputs), or (groups, size, size) of equal groups; stacks have matrices in front.

    >>> is_gradients((3, 4, 4), (12, 8), 1), is_gradients((3, 4, 4), (3, 8, 4), 1)
    (True, True)
    """
    outputs, stack = weight[output_dim(weight, dim)], weight[:-2]
    own = found[len(stack) :]
    if found[: len(stack)] != stack or len(own) not in {2, 3} or own[-1] != own[-2]:
        return False
    return prod(own[:-1]) == outputs


def _unreadable(stored: StoredTensor) -> str | None:
    """Why a tensor has no weights that can be read; None where it has."""
    if stored.codes is not None:
        return stored.codes.refusal(stored.name) or None
    wanted = ", ".join(sorted(_FLOATS))
    return None if stored.dtype in _FLOATS else f"{stored.name} is {stored.dtype}, wanted one of {wanted}"


def _nearest(name: str, names: list[str]) -> str:
    close = nearest(name, names)
    return f"; the nearest name is {close[0]}" if close else ""


def _no_expert(block: AnyBlock, kind: str) -> str:
    return (
        f"{block.label} is no expert, and kind {kind} ranks experts: wanted "
        'structure = "experts" and blocks of shape [1]'
    )


def _blocks(scope: AnyScope) -> list[AnyBlock]:
    return [member.block for member in ((scope,) if isinstance(scope, BoundScope) else scope.members)]


def taking_part(
    leaves: Sequence[BoundBlock], shapes: Mapping[str, Shape], dims: Mapping[str, int]
) -> list[BoundBlock]:
    """The leaves whose blocks hold some of the inputs of a row; all of them where each holds all.

    A block that holds all inputs of its rows (an MLP channel in `up`, a head in `q`) makes rows vanish,
    which nothing in that matrix can make up for, and which nothing reads where the block's columns of
    another matrix vanish too.

    `shapes` and `dims` have the shape of each leaf's tensor and the dimension along which its inputs lie.
    """
    some = [leaf for leaf in leaves if not holds_rows(leaf, shapes[leaf.tensor], dims[leaf.tensor])]
    return some or list(leaves)


def holds_rows(leaf: BoundBlock, shape: Shape, dim: int) -> bool:
    """Whether a block holds every input of the rows that it reaches."""
    inner, features = prod(shape[dim + 1 :]), shape[dim]
    steps = [
        (size, step)
        for size, step in zip(leaf.shape, leaf.view_stride, strict=True)
        if size > 1 and step % (inner * features)  # whole rows lead to no other input
    ]
    beside = [(size, step) for size, step in steps if size * step <= inner]
    if leaf.view_offset % inner + sum((size - 1) * step for size, step in beside) < inner:
        steps = [one for one in steps if one not in beside]  # nor what stays inside of one place
    if prod(tuple(size for size, _ in steps)) < features:
        return False
    import numpy as np  # noqa: PLC0415  (most plans do without)

    lines = [np.arange(size, dtype=np.int64) * step for size, step in steps]
    places = reduce(np.add.outer, lines, np.asarray(leaf.view_offset))
    return len(np.unique(places // inner % features)) == features
