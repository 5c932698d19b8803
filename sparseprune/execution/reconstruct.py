"""Reconstruction: matrices whose survivors make up for what was pruned, by their inputs' second moments.

Owns the way from a task to matrices of the engine: what of a tensor is fixed, which members follow others,
how outputs change. Stacks are worked a matrix at a time. Imports torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from msgspec import Struct

from sparseprune.engine import View
from sparseprune.engine.block import zero_pruned
from sparseprune.engine.energies import energies, output_losses
from sparseprune.engine.grids import prod
from sparseprune.engine.matrices import Matrix, units_of
from sparseprune.engine.projections import projection
from sparseprune.engine.reconstruction import Reconstructed, admm, keep_rows, refit
from sparseprune.engine.targets import target_weights
from sparseprune.errors import SparsityError
from sparseprune.execution import nested_tasks
from sparseprune.execution.inputs import holds_rows
from sparseprune.execution.passes import Chunk, Pass
from sparseprune.execution.ranking import Elements, refuse_nonfinite
from sparseprune.execution.regions import leaves_of
from sparseprune.execution.strategy import independent_parts
from sparseprune.execution.torch_tiles import Tile, build_scope, only, parts_at, tensor_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.engine import BlockSpec
    from sparseprune.engine.projections import Projection
    from sparseprune.execution.inputs import TaskInput
    from sparseprune.execution.nested_tasks import Kept
    from sparseprune.execution.passes import Outcome
    from sparseprune.execution.plan import Task
    from sparseprune.execution.regions import AnyBlock, Part, Region
    from sparseprune.execution.strategy import Rebuild
    from sparseprune.execution.tensor_io import TensorIO
    from sparseprune.spec import BoundBlock, Reconstruct


# Of a search, measured: of all matrices together, then of each one by itself.
_USUAL_ROUNDS = MappingProxyType({"refit": (0, 30), "outputs": (10, 8), "loss": (70, 16)})
_MOST = 0.85


class _Side(Struct, frozen=True, eq=False):
    """A tensor that takes part, or a matrix of it from element `first` on; `regions` are its leaves'."""

    name: str
    matrix: Matrix
    regions: tuple[Region, ...]
    first: int

    def view(self, region: Region, tensor: Tensor) -> Tensor:
        """A region's elements in a contiguous tensor of the matrix's shape."""
        return tensor.as_strided(region.extent, region.leaf.view_stride, region.first - self.first)


@dataclass(frozen=True, slots=True)
class RebuildMatrices(Pass):
    """Matrices that do not depend on each other, those of a stack one by one."""

    task: Task
    strategy: Rebuild

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:
        files = io.files(self.task.instance.scope.leaves)
        for number, (cell, matrix) in enumerate(independent_parts(self.task, io.tensors)):
            if cell.numel:
                yield Chunk((cell, matrix), self.strategy.cost, self.strategy.memory, str(number), files)

    def work(self, chunk: Chunk, io: TensorIO) -> list[Outcome]:
        cell, matrix = chunk.about
        rounds = _Rounds(self.task, chunk.nbytes, io)
        with io.lane(self.strategy.on_device):
            found = _Piece(self.task, cell, matrix, io, rounds).rebuilt()
        rounds.end()
        return found


class _Rounds:
    """Tells of a search for how far it has come, and lets it be given up: called between its iterations.

    All matrices go through the first rounds together, and through the others one by one. How many there will
    be is not known: most of the work counts as done after the usual number, the rest little by little.
    """

    def __init__(self, task: Task, work: int, io: TensorIO) -> None:
        self._io, self._label, self._work = io, task.part, work
        self._matrices = max(1, len(task.with_role("moment")))
        method = task.instance.reconstruct
        is_refit = method is not None and method.method == "refit"
        self._together, self._alone = _USUAL_ROUNDS["refit" if is_refit else task.metric or "outputs"]
        self._rounds = self._told = 0

    def __call__(self) -> None:
        self._io.check()
        self._rounds += 1
        together = min(self._rounds, self._together)
        share = (together + (self._rounds - together) / self._matrices) / (self._together + self._alone)
        self._tell(int(self._work * (_MOST * share if share < 1 else 1 - (1 - _MOST) / share)))

    def end(self) -> None:
        """Take back what was told: the runner tells of the whole."""
        self._tell(0)

    def _tell(self, done: int) -> None:
        self._io.passed(done - self._told, self._label)
        self._told = done


class _Piece:
    """The matrices that are in memory at one time: all that a task reaches, or one `matrix` of each stack."""

    def __init__(
        self, task: Task, cell: Part, matrix: int | None, io: TensorIO, between: Callable[[], None]
    ) -> None:
        self._task = task
        self._between = between
        self._matrix = matrix
        self._io = io
        self._tile = Tile(task, task.instance.scope, parts_at(task.instance.scope, cell), io)
        for loaded in self._tile.loaded.values():
            refuse_nonfinite(loaded)
        self._inputs = task.with_role("moment")
        self._gradients = task.with_role("gradients")
        self._method = self._reconstruct()
        self._sides = [self._side(one) for one in self._inputs.values()]
        self._kept: Kept = {}  # by nested scopes

    def rebuilt(self) -> list[Outcome]:
        """Decide and rebuild, then write."""
        method = self._method
        if self._is_unseen():
            masks = self._decided()
            zero_pruned(masks)
            return self._shared_out(self._tile.store(masks))
        masks, found = self._alternated(method) if method.method == "admm" else self._refitted(method)
        kept, changes = self._tile.kept(masks), {}
        for side, one in zip(self._sides, found, strict=True):
            changes[side.name] = _changes(self._measured(side), one)
            for region in side.regions:
                self._tile.views[region.leaf].copy_(side.view(region, one.weights))
        zero_pruned(masks)
        outcomes = self._tile.store(masks)
        for outcome, energy in zip(outcomes, kept, strict=True):
            outcome[7] = energy  # of survivors as they were: rebuilt ones may have more than all had before
            if outcome[0] in changes:  # once for each tensor, whatever leaves it has
                outcome.extend(changes.pop(outcome[0]))
        return self._shared_out(outcomes)

    def _decided(self) -> dict[BlockSpec, Tensor]:
        """The masks by the score."""
        if not self._task.levels:
            return self._tile.decide()
        self._kept = nested_tasks.decide(self._task.levels, self._io)
        return self._seen_by_tile()

    def _seen_by_tile(self) -> dict[BlockSpec, Tensor]:
        """What nested scopes keep, for the blocks of the tile, which are whole tensors."""
        return {
            spec: nested_tasks.seen(self._kept[one.region.leaf.tensor], one.region.leaf).to(self._io.device)
            for spec, one in self._tile.leaves()
        }

    def _shared_out(self, outcomes: list[Outcome]) -> list[Outcome]:
        levels = self._task.levels
        return nested_tasks.share_out(outcomes, levels, self._kept) if levels else outcomes

    def _leaves(self, name: str) -> list[BoundBlock]:
        """The leaves of nested scopes in a tensor."""
        leaves = (leaf for task in self._task.levels for leaf in task.instance.scope.leaves)
        return [leaf for leaf in leaves if leaf.tensor == name]

    def _reconstruct(self) -> Reconstruct:
        method = self._task.instance.reconstruct
        if method is None:
            raise TypeError(f"{self._task.instance.label} is not reconstructed")
        return method

    def _refitted(self, method: Reconstruct) -> tuple[dict[BlockSpec, Tensor], list[Reconstructed]]:
        """Masks by the score, and the weights that follow."""
        masks = self._decided()
        by_leaf = {one.region.leaf: masks[spec] for spec, one in self._tile.leaves()}
        found = []
        for side in self._sides:
            mask = torch.ones_like(side.matrix.dense, dtype=torch.bool)
            for region in side.regions:
                side.view(region, mask).copy_(by_leaf[region.leaf])
            weights = refit(side.matrix, mask, damp=method.damp, between=self._between)
            found.append(Reconstructed(weights, mask))
        return masks, found

    def _alternated(self, method: Reconstruct) -> tuple[dict[BlockSpec, Tensor], list[Reconstructed]]:
        """Masks and weights, found together; members that take no part follow their blocks."""
        params = [torch.empty_like(side.matrix.dense, dtype=side.matrix.work_dtype) for side in self._sides]
        project = self._projection(params)
        matrices = [side.matrix for side in self._sides]
        if self._holds_rows():
            found = keep_rows(matrices, project, damp=method.damp)
        else:
            joint = self._matrix is None
            found = admm(
                matrices,
                project,
                damp=method.damp,
                effort=method.effort,
                joint=joint,
                between=self._between,
            )
        return self._followed(found), found

    def _projection(self, params: Sequence[Tensor]) -> Projection:
        """That onto what the scope allows, for tensors in the order of the sides."""
        instance, levels = self._task.instance, self._task.levels
        if levels:
            named = {side.name: param for side, param in zip(self._sides, params, strict=True)}
            return nested_tasks.project_onto(levels, named)
        if instance.budget.nnz is None:
            raise TypeError(f"{instance.label} has no nnz")
        views = {
            region.leaf: View(param, region.extent, region.leaf.view_stride, region.first - side.first)
            for side, param in zip(self._sides, params, strict=True)
            for region in side.regions
        }
        scope = build_scope(only(instance.scope, frozenset(views)), views)
        return projection(scope, instance.budget.nnz, params)

    def _followed(self, found: Sequence[Reconstructed]) -> dict[BlockSpec, Tensor]:
        """Masks of all tensors, from those of the matrices."""
        if self._task.levels:
            self._kept = nested_tasks.all_kept(self._task.levels, self._io)
            for side, one in zip(self._sides, found, strict=True):
                self._kept[side.name] = one.mask.reshape(-1).cpu()
            nested_tasks.follow(self._task.levels, self._kept, {side.name for side in self._sides})
            return self._seen_by_tile()
        kept = {
            region.leaf: side.view(region, one.mask)
            for side, one in zip(self._sides, found, strict=True)
            for region in side.regions
        }
        engine = self._tile.engine
        decision = [
            _decided(block, spec.block.members, kept)
            for (block, _), (spec, _) in zip(self._tile.parts, engine.members, strict=True)
        ]
        return engine.get_masks(0, block_mask=engine.gather(decision))

    def _holds_rows(self) -> bool:
        """Whether all blocks hold whole rows of matrices."""
        return all(
            holds_rows(leaf, *self._seen(side))
            for side in self._sides
            for leaf in self._leaves(side.name) or [region.leaf for region in side.regions]
        )

    def _seen(self, side: _Side) -> tuple[tuple[int, ...], int]:
        """The shape of a tensor, in matrices if it has some, and the dimension of its inputs."""
        shape = self._io.tensors[side.name].shape
        if len(shape) == 2 and side.matrix.dense.ndim == 3:
            shape = tuple(side.matrix.dense.shape)
        return shape, side.matrix.input_dim % len(shape)

    def _is_unseen(self) -> bool:
        """Whether nothing was seen of the inputs of any matrix, so that the score alone says what survives.

        One that competes with others ranks last instead. SparsityError where that is not `optional`.
        """
        unseen = {side.name: side.matrix.unseen for side in self._sides}
        matrices = sum(side.matrix.moment.diagonal(dim1=-2, dim2=-1)[..., 0].numel() for side in self._sides)
        for name, numbers in unseen.items():
            if numbers and (self._matrix is not None or sum(map(len, unseen.values())) == matrices):
                if self._method.optional:
                    return True
                stored = self._inputs[name].stored
                which = f" (matrix {(self._matrix or 0) + numbers[0]})" if len(stored.shape) > 2 else ""
                raise SparsityError(
                    f"{name}{which}: its statistics are zero: nothing was seen of its inputs; calibrate on "
                    f"more text, or exclude it ({stored.shard.path})"
                )
        return False

    def _side(self, one: TaskInput) -> _Side:
        """A tensor that has second moments."""
        dense, first = self._matrices(self._io.tensors[one.key])
        moment, _ = self._matrices(one.stored)
        dim = one.dim
        if dense.ndim == 2 and moment.ndim == 3:  # of matrices that lie one below another
            dense, dim = dense.reshape(len(moment), -1, dense.shape[1]), dim % 2 + 1
        regions = [loaded.region for leaf, loaded in self._tile.loaded.items() if leaf.tensor == one.key]
        fixed = torch.ones_like(dense, dtype=torch.bool)
        if self._task.levels:
            for leaf in self._leaves(one.key):
                nested_tasks.seen(fixed, leaf).fill_(value=False)
        else:
            for region in regions:
                fixed.as_strided(region.extent, region.leaf.view_stride, region.first - first).fill_(
                    value=False
                )
        is_fixed = bool(fixed.any())
        if not is_fixed:  # what stays as it is takes no part in a target
            dense = self._target(one, dense, moment, dim)
        try:
            gradients = self._gradients_of(one.key) if self._task.metric == "loss" else None
            matrix = Matrix(dense, moment, dim, fixed if is_fixed else None, gradients)
        except SparsityError as error:
            raise SparsityError(f"{one.key}: {error} ({one.stored.shard.path})") from error
        return _Side(one.key, matrix, tuple(regions), first)

    def _target(self, one: TaskInput, dense: Tensor, moment: Tensor, dim: int) -> Tensor:
        """The weights that are wanted: the dense ones, or those with their outputs for other inputs."""
        mixed = self._task.with_role("mixed").get(one.key)
        if mixed is None:
            return dense
        residual = self._task.with_role("residual").get(one.key)
        beside = None if residual is None else self._matrices(residual.stored)[0].reshape(dense.shape)
        others, _ = self._matrices(mixed.stored)
        return target_weights(dense, moment, others, beside, damp=self._method.damp, input_dim=dim)

    def _gradients_of(self, name: str) -> Tensor | None:
        """The second moments of the gradients of a weight, as they are stored; None where there are none."""
        return self._matrices(self._gradients[name].stored)[0] if name in self._gradients else None

    def _measured(self, side: _Side) -> Matrix:
        """A matrix with its gradients if there are some, in whatever metric it was solved."""
        gradients = self._gradients_of(side.name) if side.matrix.gradients is None else None
        if gradients is None:
            return side.matrix
        try:
            return dataclasses.replace(side.matrix, gradients=gradients)
        except SparsityError as error:
            raise SparsityError(
                f"{side.name}: {error} ({self._gradients[side.name].stored.shard.path})"
            ) from error

    def _matrices(self, stored: StoredTensor) -> tuple[Tensor, int]:
        """The elements of a tensor that this piece is about, and the number of the first one."""
        size = prod(stored.shape[1:])
        begin, count = (0, stored.shape[0]) if self._matrix is None else (self._matrix, 1)
        bits = self._io.load_run(stored, (begin * size, count * size))
        elements = tensor_of(Elements(bits, stored.dtype), self._io.device)
        return elements.reshape(count, *stored.shape[1:]), begin * size


def _changes(matrix: Matrix, found: Reconstructed) -> list[list[float]]:
    """What is lost by a mask alone and lost now, and what there was: of outputs and of the loss.

    See Outcome; without gradients the loss is left out.
    """
    units = units_of([matrix])
    masked = torch.where(found.mask, matrix.dense.to(matrix.work_dtype), 0.0)
    three = [masked, found.weights, None]
    if matrix.gradients is None:
        return [[*(float(lost.sum()) for lost in output_losses(matrix, three, units)), units.energy]]
    each = [energies(matrix, one, units) for one in three]
    return [
        [*(float(one.outputs.sum()) for one in each), units.energy],
        [*(float(one.loss.sum()) for one in each), units.loss],
    ]


def _decided(
    block: AnyBlock, members: Sequence[tuple[BlockSpec, tuple[int, ...]]], masks: Mapping[BoundBlock, Tensor]
) -> Tensor:
    """Which blocks of a grid survive, bool, by the mask of a leaf that took part."""
    for (leaf, _), (spec, order) in zip(leaves_of(block), members, strict=True):
        if leaf in masks:
            fused = spec.fuse(masks[leaf].contiguous(), order)
            return fused.flatten(len(spec.shape)).select(-1, 0)
    raise TypeError(f"{block.label} has no member with statistics")
