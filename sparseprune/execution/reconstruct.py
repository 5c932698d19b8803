"""Reconstruction: matrices whose survivors make up for what was pruned, by their inputs' second moments.

Owns the way from a task to matrices of the engine: what of a tensor is fixed, which members follow others,
how outputs change. Stacks are worked a matrix at a time. Imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from sparseprune.engine import View
from sparseprune.engine.block import zero_pruned
from sparseprune.engine.grids import prod
from sparseprune.engine.reconstruction import (
    Matrix,
    admm,
    keep_rows,
    output_losses,
    projection,
    refit,
    units_of,
)
from sparseprune.errors import SparsityError
from sparseprune.execution.passes import Chunk, Pass
from sparseprune.execution.plan import holds_rows
from sparseprune.execution.ranking import Elements, Ranking, refuse_nonfinite
from sparseprune.execution.regions import block_part, leaves_of, members_of, regions_at
from sparseprune.execution.strategy import StackPart, stacked_parts
from sparseprune.execution.torch_tiles import build_scope, decide, load_tile, store_tile, stream_of, tensor_of
from sparseprune.spec import BoundBlock, BoundScope

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.engine import BlockSpec, SparseScope
    from sparseprune.execution.passes import Outcome
    from sparseprune.execution.plan import Task, TaskInput
    from sparseprune.execution.regions import AnyBlock, AnyScope, Region
    from sparseprune.execution.strategy import Rebuild
    from sparseprune.execution.tensor_io import TensorIO
    from sparseprune.execution.torch_tiles import Tile
    from sparseprune.spec import Reconstruct


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
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
        for number, part in enumerate(stacked_parts(self.task, io.tensors)):
            if part.cell.numel:
                nbytes = sum(map(io.nbytes, regions_at(self.task.instance.scope, part.cell).values()))
                yield Chunk(part, nbytes, self.strategy.memory, str(number), files)

    def work(self, chunk: Chunk, io: TensorIO) -> list[Outcome]:
        return _Piece(self.task, chunk.about, io).work()


class _Piece:
    """The matrices that are in memory at one time, and the steps over them."""

    def __init__(self, task: Task, part: StackPart, io: TensorIO) -> None:
        self._task = task
        self._part = part
        self._ranking = Ranking(task, io)
        self._io = io
        self._scope = task.instance.scope
        self._blocks = [
            (member.block, block_part(member, order, part.cell)) for member, order in members_of(self._scope)
        ]

    def work(self) -> list[Outcome]:
        """Read, decide and rebuild, write."""
        with stream_of(self._io.device):
            tile = load_tile(regions_at(self._scope, self._part.cell), self._io)
            for loaded in tile.loaded.values():
                refuse_nonfinite(loaded)
            engine = build_scope(self._scope, tile.views)
            sides = self._sides(tile)
            reconstruct = self._task.instance.reconstruct
            if reconstruct is None:
                raise TypeError(f"{self._task.instance.label} is not reconstructed")
            if reconstruct.method == "admm":
                masks, weights, kept = self._alternated(engine, sides, reconstruct)
            else:
                masks, weights, kept = self._refitted(engine, tile, sides, reconstruct)
            outputs = {
                side.name: _output_energies(side.matrix, kept[side.name], weights[side.name])
                for side in sides
            }
            return self._stored(tile, engine, masks, sides, weights, outputs)

    def _refitted(
        self, engine: SparseScope, tile: Tile, sides: Sequence[_Side], reconstruct: Reconstruct
    ) -> tuple[dict[BlockSpec, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Masks by the score, the weights that follow, and the masks of whole tensors."""
        masks = decide(self._task, engine, self._blocks, tile, self._ranking)
        by_leaf = {leaf: masks[spec] for leaf, spec in zip(self._scope.leaves, engine.blocks(), strict=True)}
        weights, kept = {}, {}
        for side in sides:
            mask = torch.ones(side.matrix.dense.shape, dtype=torch.bool, device=side.matrix.dense.device)
            for region in side.regions:
                side.view(region, mask).copy_(by_leaf[region.leaf])
            kept[side.name] = mask
            weights[side.name] = refit(side.matrix, mask, damp=reconstruct.damp, between=self._io.check)
        return masks, weights, kept

    def _alternated(
        self, engine: SparseScope, sides: Sequence[_Side], reconstruct: Reconstruct
    ) -> tuple[dict[BlockSpec, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Masks and weights, found together; members that take no part follow their blocks."""
        nnz = self._task.instance.budget.nnz
        if nnz is None:
            raise TypeError(f"{self._task.instance.label} has no nnz")
        params = [torch.empty_like(side.matrix.dense, dtype=side.matrix.work_dtype) for side in sides]
        views = {
            region.leaf: View(param, region.extent, region.leaf.view_stride, region.first - side.first)
            for side, param in zip(sides, params, strict=True)
            for region in side.regions
        }
        scope = build_scope(_only(self._scope, frozenset(views)), views)
        project = projection(scope, nnz, params)
        matrices = [side.matrix for side in sides]
        if self._holds_rows(sides):
            found = keep_rows(matrices, project, damp=reconstruct.damp)
        else:
            found = admm(
                matrices,
                project,
                damp=reconstruct.damp,
                joint=not self._part.end,
                between=self._io.check,
            )
        kept = {side.name: one.mask for side, one in zip(sides, found, strict=True)}
        by_leaf = {
            region.leaf: side.view(region, kept[side.name]) for side in sides for region in side.regions
        }
        decision = [
            _decided(block, spec.block.members, by_leaf)
            for (block, _), (spec, _) in zip(self._blocks, engine.members, strict=True)
        ]
        masks = engine.get_masks(nnz, block_mask=engine.gather(decision))
        weights = {side.name: one.weights for side, one in zip(sides, found, strict=True)}
        return masks, weights, kept

    def _holds_rows(self, sides: Sequence[_Side]) -> bool:
        """Whether all blocks hold whole rows of matrices."""
        stored = {one.key: one for one in self._task.inputs if one.role == "moment"}
        return all(
            holds_rows(region.leaf, shape, stored[side.name].dim % len(shape))
            for side in sides
            for shape in [self._io.tensors[side.name].shape]
            for region in side.regions
        )

    def _stored(
        self,
        tile: Tile,
        engine: SparseScope,
        masks: Mapping[BlockSpec, Tensor],
        sides: Sequence[_Side],
        weights: Mapping[str, Tensor],
        outputs: dict[str, list[float]],
    ) -> list[Outcome]:
        for side in sides:
            for region in side.regions:
                tile.views[region.leaf].copy_(side.view(region, weights[side.name]))
        zero_pruned(masks)
        by_leaf = {leaf: masks[spec] for leaf, spec in zip(self._scope.leaves, engine.blocks(), strict=True)}
        outcomes = store_tile(self._task, tile, by_leaf, self._io)
        for outcome in outcomes:
            if outcome[0] in outputs:  # once for each tensor, whatever leaves it has
                outcome.append(outputs.pop(outcome[0]))
        return outcomes

    def _sides(self, tile: Tile) -> list[_Side]:
        """The tensors that have second moments, each whole or the matrix that this piece is about.

        Where a matrix competes with others nothing need be known of it: it then ranks below them.
        """
        regions = [loaded.region for loaded in tile.loaded.values()]
        inputs = {one.key: one for one in self._task.inputs if one.role == "moment"}
        sides = [
            self._side(one, [region for region in regions if region.leaf.tensor == key])
            for key, one in inputs.items()
        ]
        unseen = {side.name: side.matrix.unseen for side in sides}
        matrices = sum(side.matrix.moment.diagonal(dim1=-2, dim2=-1)[..., 0].numel() for side in sides)
        for name, numbers in unseen.items():
            if numbers and (self._part.end or sum(map(len, unseen.values())) == matrices):
                which = (
                    f" (matrix {self._part.begin + numbers[0]})" if len(inputs[name].stored.shape) > 2 else ""
                )
                raise SparsityError(
                    f"{name}{which}: its statistics are zero: nothing was seen of its inputs; calibrate on "
                    f"more text, or exclude it ({inputs[name].stored.shard.path})"
                )
        return sides

    def _side(self, one: TaskInput, regions: Sequence[Region]) -> _Side:
        stored = self._io.tensors[one.key]
        dense, first = self._matrices(stored)
        moment, _ = self._matrices(one.stored)
        fixed = torch.ones(dense.shape, dtype=torch.bool, device=dense.device)
        for region in regions:
            fixed.as_strided(region.extent, region.leaf.view_stride, region.first - first).fill_(value=False)
        try:
            matrix = Matrix(dense, moment, one.dim, fixed if bool(fixed.any()) else None)
        except SparsityError as error:
            raise SparsityError(f"{one.key}: {error} ({one.stored.shard.path})") from error
        return _Side(one.key, matrix, tuple(regions), first)

    def _matrices(self, stored: StoredTensor) -> tuple[Tensor, int]:
        """The elements of a tensor that this piece is about, and the number of the first one."""
        size = prod(stored.shape[1:])
        begin, end = self._part.begin, self._part.end or stored.shape[0]
        bits = self._io.load_run(stored, (begin * size, (end - begin) * size))
        device = torch.device(self._io.device)
        elements = tensor_of(Elements(bits, stored.dtype), device)
        return elements.reshape(end - begin, *stored.shape[1:]), begin * size


def _output_energies(matrix: Matrix, mask: Tensor, weights: Tensor) -> list[float]:
    """What the outputs of a matrix lose by its mask alone and lose now, and what they were: see Outcome."""
    units = units_of([matrix])
    masked = torch.where(mask, matrix.dense.to(matrix.work_dtype), 0.0)
    energies = [float(lost.sum()) for lost in output_losses(matrix, [masked, weights, None], units)]
    return [*energies, units.energy]


def _only(scope: AnyScope, leaves: frozenset[BoundBlock]) -> AnyScope:
    """A scope whose fused blocks have these members alone."""
    if not isinstance(scope, BoundScope):
        return replace(scope, members=tuple(_members_only(member, leaves) for member in scope.members))
    return _members_only(scope, leaves)


def _members_only(scope: BoundScope, leaves: frozenset[BoundBlock]) -> BoundScope:
    if isinstance(scope.block, BoundBlock):
        return scope
    pairs = [pair for pair in zip(scope.block.members, scope.block.orders, strict=True) if pair[0] in leaves]
    members, orders = zip(*pairs, strict=True)
    return replace(scope, block=replace(scope.block, members=members, orders=orders))


def _decided(
    block: AnyBlock, members: Sequence[tuple[BlockSpec, tuple[int, ...]]], masks: Mapping[BoundBlock, Tensor]
) -> Tensor:
    """Which blocks of a grid survive, bool, by the mask of a leaf that took part."""
    for (leaf, _), (spec, order) in zip(leaves_of(block), members, strict=True):
        if leaf in masks:
            fused = spec.fuse(masks[leaf].contiguous(), order)
            return fused.flatten(len(spec.shape)).select(-1, 0)
    raise TypeError(f"{block.label} has no member with statistics")
