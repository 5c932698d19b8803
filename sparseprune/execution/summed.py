"""Summed: blocks too large or too scattered for one slab; their norms are summed up as tensors pass by.

Channels over three matrices, heads, experts, filters. Every tensor is read from its beginning to its end,
once for the norms (twice where they need scaling) and once more to be cut; what is held is one score a block.
Norms are those of engine.scoring, bit for bit.
"""

from __future__ import annotations

import base64
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseprune.engine.grids import prod
from sparseprune.engine.kernels.selecting import cut_blocks, select_keys
from sparseprune.engine.tally import tally
from sparseprune.execution.arranging import by_leaf, by_scope, inverse
from sparseprune.execution.cells import leaves_of, members_of, whole_part
from sparseprune.execution.outcomes import Outcome, finish
from sparseprune.execution.passing import LeafMaxima, LeafSums
from sparseprune.execution.plan import task_bytes
from sparseprune.execution.programs import Item, Program
from sparseprune.execution.ranking import Ranking, refuse_nonfinite
from sparseprune.execution.recipes import needs_scaling
from sparseprune.execution.sweeps import sweep_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from sparseprune.execution.boxes import Box
    from sparseprune.execution.cells import AnyBlock
    from sparseprune.execution.plan import Task
    from sparseprune.execution.programs import Setting
    from sparseprune.execution.recipes import Summed
    from sparseprune.execution.sweeps import Sweep
    from sparseprune.execution.tensor_io import Mask
    from sparseprune.spec import BoundBlock, BoundScope

    Floats = NDArray[np.float64]

_DECISION = "decision"
_MOST_EXPONENT = 1000


def run_program(task: Task, recipe: Summed, setting: Setting) -> Program:
    """Steps that score, then one that cuts; the decision between them is noted."""
    scope = task.instance.scope
    keep = yield from _decision(task, recipe, setting)
    decisions = by_leaf(scope, keep)

    def prune(box: Box) -> list[Outcome]:
        loaded = setting.traffic.load(box)
        before = tally(loaded.flat, box.stored.dtype)
        mask, mask_view = loaded.masked()
        mask_view[...] = _spread(decisions[box.leaf], box)
        cut_blocks(loaded.flat, mask, 1, mask)
        setting.traffic.store(loaded, mask)
        return [finish(task, box.stored, before, loaded.flat, mask)]

    def items() -> Iterator[Item]:
        number = 0
        for leaf in scope.leaves:
            for box in _sweep(leaf, recipe).chunks(setting.tensors[leaf.tensor]):
                yield Item(lambda box=box: prune(box), box.nbytes, recipe.memory, str(number))  # type: ignore[misc]
                number += 1

    yield items()


def decide_program(
    task: Task, recipe: Summed, setting: Setting, decided: Callable[[NDArray[np.uint8]], None]
) -> Program:
    """Steps that score; `decided` gets the flags of all blocks."""
    decided((yield from _decision(task, recipe, setting)))


def _decision(task: Task, recipe: Summed, setting: Setting) -> Any:  # noqa: ANN401  (a part of a program)
    scope = task.instance.scope
    keep = _recalled(setting, prod(scope.grid_shape) * scope.blocks_per_scope)
    if keep is None:
        scores = yield from _scores(task, recipe, setting)
        keep = _decide(task, scores)
        passed = (recipe.passes - 1) * task_bytes(task, setting.tensors)
        setting.note(_DECISION, base64.b85encode(np.packbits(keep).tobytes()).decode(), passed)
    return keep


def _recalled(setting: Setting, count: int) -> NDArray[np.uint8] | None:
    """The decision on so many blocks that an earlier run noted, one 0 or 1 each; None if it is none."""
    noted = setting.recall(_DECISION)
    if not isinstance(noted, str):
        return None
    try:
        packed = np.frombuffer(base64.b85decode(noted), dtype=np.uint8)
    except ValueError:
        return None
    return np.unpackbits(packed, count=count) if packed.size == -(-count // 8) else None


def _scores(task: Task, recipe: Summed, setting: Setting) -> Any:  # noqa: ANN401  (a part of a program)
    """A program that gives the scores of every member's blocks, on its block grid."""
    ranking = Ranking(task, setting.traffic)
    scope = task.instance.scope
    members = [member for member, _ in members_of(scope)]
    ready = [ranking.block_scores(each.block, whole_part(each.block.grid_shape)) for each in members]
    if all(scores is not None for scores in ready):
        return ready
    sweeps = [_sweep(leaf, recipe) for leaf in scope.leaves]
    exponents: dict[BoundBlock, NDArray[np.int64]] = {}
    if math.isinf(ranking.norm) or needs_scaling(task, setting.tensors):
        found = yield [_passed(LeafMaxima(each), each, ranking, recipe, setting) for each in sweeps]
        maxima = dict(zip(scope.leaves, found, strict=True))
        tops = [_largest(member.block, maxima) for member in members]
        if math.isinf(ranking.norm):
            return [_normalized(top, member, task) for top, member in zip(tops, members, strict=True)]
        for top, member in zip(tops, members, strict=True):
            for leaf, order in leaves_of(member.block):
                exponents[leaf] = _exponents(top).transpose(inverse(order))
    power = int(ranking.norm)
    sums = yield [
        _passed(LeafSums(each, power, exponents.get(each.leaf)), each, ranking, recipe, setting)
        for each in sweeps
    ]
    of_leaf = dict(zip(scope.leaves, sums, strict=True))
    norms = [_norms(member.block, of_leaf, exponents, power) for member in members]
    return [_normalized(norm, member, task) for norm, member in zip(norms, members, strict=True)]


def _norms(
    block: AnyBlock,
    sums: Mapping[BoundBlock, Floats],
    exponents: Mapping[BoundBlock, NDArray[np.int64]],
    power: int,
) -> Floats:
    """The norms of fused blocks: leaves are summed in their order, as engine.scoring does."""
    (first, order), *others = leaves_of(block)
    total = sums[first].transpose(order)
    for leaf, own in others:
        total = total + sums[leaf].transpose(own)
    root = total if power == 1 else np.sqrt(total)
    return root * np.ldexp(1.0, exponents[first].transpose(order).astype(np.int32)) if exponents else root


def _sweep(leaf: BoundBlock, recipe: Summed) -> Sweep:
    sweep = sweep_of(leaf, recipe.chunk)
    if sweep is None:
        raise TypeError(f"{leaf.label} cannot be swept")
    return sweep


def _passed(
    sums: LeafSums | LeafMaxima, sweep: Sweep, ranking: Ranking, recipe: Summed, setting: Setting
) -> Item:
    """All of a leaf, chunk after chunk: the order is that of the tree."""
    stored = setting.tensors[sweep.leaf.tensor]

    def work() -> Floats:
        for box in sweep.chunks(stored):
            loaded = setting.traffic.load(box)
            elements = ranking.elements(loaded)
            refuse_nonfinite(loaded, elements)
            sums.add(loaded, elements)
            setting.passed(box.nbytes, sweep.leaf.label)
        return sums.result()

    return Item(work, memory=recipe.memory)


def _largest(block: AnyBlock, maxima: Mapping[BoundBlock, Floats]) -> Floats:
    tops: Floats = np.stack([maxima[leaf].transpose(order) for leaf, order in leaves_of(block)])
    largest: Floats = tops.max(axis=0)
    return largest


def _exponents(top: Floats) -> NDArray[np.int64]:
    """As engine.scoring.block_exponents: scaled by 2 ** -exponent the largest finite number is below 1."""
    finite = np.where(np.isfinite(top), top, 1.0)
    return np.clip(np.frexp(finite)[1], -_MOST_EXPONENT, _MOST_EXPONENT).astype(np.int64)


def _normalized(norms: Floats, member: BoundScope, task: Task) -> Floats:
    if not task.instance.score.normalize:
        return norms
    scaled: Floats = norms / math.sqrt(member.block.numel_per_block)
    return scaled


def _decide(task: Task, scores: list[Floats]) -> Mask:
    """Bytes, scope after scope in the order of ties: 1 for the blocks that survive."""
    budget, scope = task.instance.budget, task.instance.scope
    ordered = by_scope(scope, scores)
    if budget.nnz is None:
        limit = 0.0 if budget.threshold is None else budget.threshold
        kept: Mask = (ordered >= limit).view(np.uint8).reshape(-1)
        return kept
    # As unsigned integers in the order of the numbers, -0.0 and 0.0 as one.
    bits = (ordered.reshape(-1) + 0.0).view(np.uint64)
    negative = bits >> np.uint64(63) == 1
    keys = np.where(negative, ~bits, bits | np.uint64(1 << 63))
    keep = np.empty(keys.size, dtype=np.uint8)
    select_keys(keys, (1 << 64) - 1, scope.blocks_per_scope, budget.nnz, keep)
    return keep


def _spread(keep: Mask, box: Box) -> Mask:
    """A decision on a leaf's block grid for each element of a box."""
    for axis, (begin, size, extent) in enumerate(zip(box.begin, box.extent, box.leaf.shape, strict=True)):
        blocks = slice(begin // extent, (begin + size - 1) // extent + 1)
        keep = keep[(slice(None),) * axis + (blocks,)]
        if extent > 1 and keep.shape[axis] > 1:
            keep = np.repeat(keep, extent, axis=axis)
            skipped = begin % extent
            keep = keep[(slice(None),) * axis + (slice(skipped, skipped + size),)]
    return keep
