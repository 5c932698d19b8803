"""Strategies: how a task is worked, chosen in this one place by shape, dtype, score and budget.

Owns the conditions of each strategy and what it costs in memory. A strategy is plain data; passes follow it
in tiles, radix_select, block_norms, torch_tiles, torch_out_of_core, reconstruct and nonzero_blocks. Reads no
data.
"""

from __future__ import annotations

import math
from itertools import groupby
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import prod
from sparseprune.errors import SparsepruneError, enough, size
from sparseprune.execution.regions import (
    INTERPRETER,
    TORCH,
    Part,
    Region,
    alone,
    is_row_major_run,
    is_run,
    members_of,
    memory_for_tile,
    numel_per_scope,
    regions_at,
    sweep_of,
    tile_bytes,
    whole_part,
)
from sparseprune.spec import BoundBlock, BoundScope
from sparseprune.spec.bound import Budget

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.engine.grids import Shape
    from sparseprune.execution.plan import Task
    from sparseprune.execution.regions import Limits

_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3"})
_PACKED = 8  # mask elements in a byte: slabs begin at whole bytes of a packed mask
_SCORE_BYTES = 48  # that a block costs while its score is kept: norms, keys, positions, decisions
_RANK_BYTES = 16  # that it costs more within masks: whether something is left of it, its rank
_CHUNKS_A_SLAB = 4  # elements that are float64 on the way to a norm, for each byte of a slab
_SUMMED_BYTES = 64  # that each of them costs where scores are made of files: several copies
_PLAIN_BYTES = 20  # that it costs beside its pattern where magnitudes alone count
_LOOPED_BYTES = 6  # that it costs beside its pattern where loops read this: a mask, the decision
_KEPT_BYTES = 4  # that it costs within masks: what they keep, packed and not, in two orders
_LIMIT_BYTES = 40  # that a scope costs, of one block at least, while its soft threshold is made
_SLABS_A_SCOPE = 8  # a scope of more slabs is counted: several threads share it, and less is in memory
_GROUPS = 64  # parts of a large scope whose digits are counted apart
_COUNTER_BYTES = 8 << 16  # one histogram
# That least squares need for each weight, in units of the loss beside that, and for each element of a second
# moment of inputs or gradients: float64 copies while it is looked at, its eigenvectors later. Measured.
_SOLVER_BYTES, _LOSS_BYTES, _MOMENT_BYTES = 60, 32, 32
# Of a search, measured: products with a moment, its factors, what each matrix takes beside, and what is
# computed while a byte is read.
_ROUNDS = MappingProxyType({"refit": 16, "outputs": 40, "loss": 400})
_FACTORED, _STARTED, _FLOPS_PER_BYTE = 6, 10**9, 20
_READ_SHARE = 4  # one part in so many is what was read, which the host has where a device does the rest


class Selection(Struct, frozen=True):
    """What compiled loops decide: of `blocks` blocks of `extent` elements each `nnz` survive in every scope.

    Or those that reach `threshold`, if it is given. With `k_weight` blocks shrink by the threshold, or by
    `kth_mid` of the engine, times the root of their elements if it `scales`. Scopes with `tile` rows are
    transposable. `budget` is that of the rule, for scopes within masks.
    """

    extent: Shape
    blocks: int
    nnz: int
    threshold: float | None
    norm: float
    rms: bool
    prunes_nonfinite: bool = False
    k_weight: float | None = None  # of a soft threshold
    scales: bool = False
    tile: int = 0
    budget: Budget = Budget()

    @property
    def block(self) -> int:
        """How many elements a block has."""
        return prod(self.extent)


class Strategy(Struct, frozen=True):
    """How a task is worked: about so many `elements` at one time, which take `memory` bytes.

    `held` bytes are kept from the first of its `passes` over the tensors to the last. The torch engine takes
    `on_device` bytes of a device, if it works on one.
    """

    memory: int
    elements: int
    held: int = 0
    passes: int = 1
    on_device: int = 0

    def work(self, task: Task, tensors: Mapping[str, StoredTensor]) -> int:
        """The work of a task, in bytes that are read at the same time."""
        return task.nbytes(tensors) * self.passes


class Compiled(Strategy, frozen=True, kw_only=True):
    """Small scopes of one tensor, decided by compiled loops: `Contiguous` or `Strided`."""

    selection: Selection


class Contiguous(Compiled, frozen=True):
    """Scopes that lie one after the other."""


class Strided(Compiled, frozen=True):
    """Scopes that do not lie together."""


class RadixSelect(Strategy, frozen=True):
    """Single elements in scopes larger than a slab: a histogram for each digit of the keys, then one cut."""

    @property
    def histograms(self) -> int:
        """In how many parts a scope is counted, each in a histogram of its own."""
        return self.held // _COUNTER_BYTES


class BlockNorms(Strategy, frozen=True):
    """Norms of blocks are summed up in one pass over the tensors and kept; then one pass cuts."""


class TorchInMemory(Strategy, frozen=True):
    """Whole scopes in the torch engine."""


class TorchOutOfCore(Strategy, frozen=True):
    """Whole blocks in the torch engine; ranks are found by digits."""


class Rebuild(Strategy, frozen=True, kw_only=True):
    """Survivors make up for the pruned weights: whole matrices in the engine, those of a stack one by one.

    Not `stacked` where they are no stack, or compete with each other: all that a task reaches is in memory
    then. A search ends for all its matrices at once: how many these are must not depend on the memory.
    Each of its `parts` has a `cost`: so many bytes would be read in the time that it takes.
    """

    parts: int
    cost: int

    @property
    def stacked(self) -> bool:
        return self.parts > 1

    def work(self, task: Task, tensors: Mapping[str, StoredTensor]) -> int:  # noqa: ARG002
        return self.parts * self.cost


class CountNonzero(Strategy, frozen=True, kw_only=True):
    """Blocks that are not zero are counted, in whole scopes, in whole blocks, or flagged by their elements.

    A chunk has instances of one form, up to `batch` small ones.
    """

    kind: Literal["scopes", "blocks", "elements"]
    batch: int = 1


ORDER = ("contiguous", "strided", "radix_select", "block_norms", "torch_in_memory", "torch_out_of_core")
"""The strategies in the order in which they are tried, the fastest first; the last two always work."""


def needs_torch(strategy: Strategy) -> bool:
    """Whether a strategy imports torch."""
    return isinstance(strategy, TorchInMemory | TorchOutOfCore | Rebuild)


def choose(
    task: Task, tensors: Mapping[str, StoredTensor], limits: Limits, *, compiled: bool = True
) -> Strategy:
    """The strategy for a task: the first of ORDER whose conditions hold.

    `compiled` False leaves to the torch engine, on whatever device, all blocks that fit in memory one by one.

    Raises:
        SparsepruneError: one block alone is more than the limits allow.
    """
    if task.instance.reconstruct is not None:
        return _rebuild(task, tensors, limits)
    order = ORDER if _allows_loops(task) else [name for name in ORDER if name in _TORCH]
    if any(member.transposable for member, _ in members_of(task.instance.scope)):
        order = [name for name in order if name in {"strided", "torch_in_memory"}]  # a tile fits as a whole
    if not compiled:
        order = [*_TORCH, *(name for name in order if name in {"radix_select", "block_norms"})]
    for name in (*order, *_TORCH[:1]):  # a threshold decides every block alone
        strategy = _CHOICES[name](task, tensors, limits)
        if strategy is not None:
            return strategy
    block = elements_of_block(task)
    where = f"[{task.rule}] {task.instance.label}"
    found = f"{where}: a block has {block} elements, which must be in memory together"
    if limits.device is not None and tile_bytes(block) > limits.device:
        needed = f"{size(tile_bytes(block))} of the device, of which about {size(limits.device)} are free"
        raise SparsepruneError(f"{found} and take {needed}; say --device cpu")
    raise SparsepruneError(f"{found}; give --memory {enough(limits.resident + memory_for_tile(block))}")


def by_block_norms(task: Task, tensors: Mapping[str, StoredTensor], limits: Limits) -> BlockNorms | None:
    """The strategy that decides a task with a flag for each block; None where it does not apply."""
    return _block_norms(task, tensors, limits) if _allows_loops(task) else None


def _allows_loops(task: Task) -> bool:
    """Whether compiled loops know what an instance asks for; its shapes and dtypes come on top."""
    instance = task.instance
    if instance.score.nonfinite == "prune":
        # What is not finite is below every threshold, but for negative ones.
        alone = (instance.budget.threshold or 0.0) >= 0
        if not (alone and task.ranks_patterns and task.codes is None):
            return False
    return instance.reconstruct is None


def _shrinks_by_loops(task: Task) -> bool:
    """Whether compiled loops know the mode of a task: hard, or a soft threshold without conditioners."""
    soft = task.instance.soft
    if soft is None:
        return True
    return soft.conditioners is None and not soft.eps and task.ranks_patterns and task.codes is None


def _contiguous(task: Task, tensors: Mapping[str, StoredTensor], limits: Limits) -> Contiguous | None:
    scope = task.instance.scope
    if not _has_loop(task, tensors) or not isinstance(scope, BoundScope):
        return None
    (leaf,) = scope.leaves
    if not (is_row_major_run(leaf) and is_run(leaf.shape, leaf.view_shape)):
        return None
    if not is_run(scope.shape, leaf.grid_shape):
        return None
    selection = _selection_of(task, scope)
    unit = math.lcm(selection.block * selection.blocks, _PACKED)
    size = DTYPES[tensors[leaf.tensor].dtype].itemsize
    each = _loop_bytes(task, size, selection)
    slab = unit * max(1, min(limits.slab // size, limits.memory // (2 * each)) // unit)
    memory = min(slab, prod(leaf.view_shape)) * each
    if unit > _PACKED and _is_too_large(unit * size, memory, limits):
        return None
    return Contiguous(memory, slab, selection=selection)


def _strided(task: Task, tensors: Mapping[str, StoredTensor], limits: Limits) -> Strided | None:
    scope = task.instance.scope
    if not _has_loop(task, tensors) or not isinstance(scope, BoundScope):
        return None
    (leaf,) = scope.leaves
    selection = _selection_of(task, scope)
    size = DTYPES[tensors[leaf.tensor].dtype].itemsize
    together = numel_per_scope(scope)
    elements = max(limits.slab // size, together)
    each = _loop_bytes(task, size, selection) + size  # there is a copy in the order of the scopes
    memory = min(elements, prod(leaf.view_shape)) * each
    too_large = _is_too_large(together * size, memory, limits)
    return None if too_large else Strided(memory, elements, selection=selection)


def _is_too_large(scope_bytes: int, memory: int, limits: Limits) -> bool:
    """Whether a scope is worked in several chunks, as other strategies do."""
    return scope_bytes > _SLABS_A_SCOPE * limits.slab or memory > limits.memory // 2


def _selection_of(task: Task, scope: BoundScope) -> Selection:
    """How the scopes of one leaf decide; where all or none survive no block competes."""
    budget, score, soft = task.instance.budget, task.instance.score, task.instance.soft
    nnz, threshold = budget.nnz, budget.threshold
    blocks = scope.blocks_per_scope
    (leaf,) = scope.leaves
    decided = nnz == 0 or (nnz == blocks and not (task.within and budget.share))
    if threshold is not None or (decided and soft is None):
        nnz, blocks = (0 if nnz == 0 else 1), 1
    extent = leaf.shape or (1,)
    if soft is not None:  # norms are those of the proximal operator
        plain = (extent, blocks, nnz or 0, threshold, 2.0, False)
        return Selection(*plain, k_weight=soft.k_weight, scales=soft.scale, budget=budget)
    plain = (extent, blocks, nnz or 0, threshold, score.norm, score.normalize)
    tile = max(scope.shape) if scope.transposable and blocks > 1 else 0
    return Selection(*plain, score.nonfinite == "prune", tile=tile, budget=budget)


def _loop_bytes(task: Task, size: int, selection: Selection) -> int:
    """Memory for each element that compiled loops work on: its pattern, mask, score, and float64 of norms."""
    scores = 0 if task.ranks_patterns and task.codes is None else 40
    if selection.k_weight is not None:
        scores += -(-_LIMIT_BYTES // selection.block)
    scores += size if selection.prunes_nonfinite else 0
    scores += size + _KEPT_BYTES if task.within else 0
    scores += _RANK_BYTES if task.within and selection.prunes_nonfinite else 0
    return size + 1 + scores + (1 if selection.block == 1 else -(-16 // selection.extent[-1]))


def _has_loop(task: Task, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether a task has one leaf, the blocks of which compiled loops rank as the engine would."""
    score, kind, scope = task.instance.score, task.score_kind, task.instance.scope
    if not isinstance(scope, BoundScope) or not isinstance(scope.block, BoundBlock):
        return False
    if not _shrinks_by_loops(task):
        return False
    leaf = scope.block
    dtype = tensors[leaf.tensor].dtype
    single = leaf.numel_per_block == 1
    if task.ranks_patterns:
        return dtype in _FLOATS and (single or (dtype != "F64" and score.norm in {1, 2}))
    return single and not kind.ranks_blocks and all(one.stored.dtype != "I64" for one in task.inputs)


def _radix_select(task: Task, tensors: Mapping[str, StoredTensor], limits: Limits) -> RadixSelect | None:
    scope = task.instance.scope
    leaves = [member.block for member, _ in members_of(scope) if isinstance(member.block, BoundBlock)]
    dtypes = {tensors[leaf.tensor].dtype for leaf in leaves}
    if len(leaves) != len(members_of(scope)) or task.instance.budget.nnz is None or len(dtypes) != 1:
        return None
    whole = isinstance(scope, BoundScope) or prod(scope.grid_shape) == 1
    unlike = {
        (leaf.view_shape, leaf.view_stride, leaf.shape, member.shape): leaf
        for leaf, (member, _) in zip(leaves, members_of(scope), strict=True)
    }
    together = all(
        leaf.numel_per_block == 1 and is_row_major_run(leaf) and is_run(shape, leaf.grid_shape)
        for (*_, shape), leaf in unlike.items()
    )
    (dtype,) = dtypes
    if not whole or not together or dtype not in _FLOATS or not task.ranks_patterns:
        return None
    if not _shrinks_by_loops(task) or (task.instance.soft and not task.instance.budget.nnz):
        return None
    size = DTYPES[dtype].itemsize
    slab = max(_PACKED, limits.slab // size // _PACKED * _PACKED)
    counted = max(1, min(_GROUPS, limits.held // _COUNTER_BYTES))
    passes = 1 + max(1, size // 2)  # one for each digit of 16 bits, one that cuts
    sizes = [member.blocks_per_scope for member, _ in members_of(scope)]
    prunes = task.instance.score.nonfinite == "prune"
    if task.within and prunes and dtype == "F8_E4M3":  # no pattern is left for a rank below all others
        return None
    each = (2 + prunes + bool(task.within)) * (size + 1) + (_SUMMED_BYTES if task.codes else 0)
    each += _KEPT_BYTES if task.within else 0
    memory = min(slab, max(sizes)) * each + _COUNTER_BYTES
    counters = min(counted, sum(-(-each // slab) for each in sizes))
    return RadixSelect(memory, slab, counters * _COUNTER_BYTES, passes)


def _block_norms(task: Task, tensors: Mapping[str, StoredTensor], limits: Limits) -> BlockNorms | None:
    scope, score, kind = task.instance.scope, task.instance.score, task.score_kind
    by_elements, by_value = not kind.ranks_blocks, task.codes == "values"
    if task.instance.soft is not None or (score.nonfinite == "prune" and needs_scaling(task, tensors)):
        return None
    if by_elements and not by_value and not {tensors[leaf.tensor].dtype for leaf in scope.leaves} <= _FLOATS:
        return None
    chunk = max(1, min(limits.slab // _CHUNKS_A_SLAB, limits.memory // (2 * _SUMMED_BYTES)))
    sweeps = [sweep_of(leaf, chunk) for leaf in scope.leaves] if by_elements else []
    blocks = prod(scope.grid_shape) * scope.blocks_per_scope
    each_block = _SCORE_BYTES + (_RANK_BYTES if task.within else 0)
    held = each_block * blocks + 8 * sum(sweep.numbers for sweep in sweeps if sweep is not None)
    if None in sweeps or held > limits.held:
        return None
    scaled = by_elements and needs_scaling(task, tensors)
    looped = task.ranks_patterns and not scaled and score.norm != math.inf
    each = []
    for leaf in {(leaf.view_shape, leaf.view_stride, leaf.shape): leaf for leaf in scope.leaves}.values():
        sweep = sweep_of(leaf, chunk)
        inner = sweep is not None and is_row_major_run(leaf) and (leaf.shape[-1] > 1 or sweep.inside)
        beside = _LOOPED_BYTES if looped and inner else _PLAIN_BYTES
        size = DTYPES[tensors[leaf.tensor].dtype].itemsize
        beside += _KEPT_BYTES if task.within else 0
        each.append(size + beside if task.ranks_patterns and task.codes is None else _SUMMED_BYTES)
    elements = max(prod(leaf.view_shape) for leaf in scope.leaves)
    passes = 1 + by_elements + scaled  # the cut, sums before it, maxima before these
    return BlockNorms(max(each) * min(chunk, elements), chunk, held, passes)


def needs_scaling(task: Task, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether powers of what is summed may leave the range of float64, as the engine sees it: F64 values."""
    kind = task.score_kind
    if math.isinf(kind.norm_of(task.instance.score)):
        return False
    if (
        task.codes == "values" and kind.elements is None
    ):  # codes of a byte or two by scales of F32 fit twice over
        return any(_is_wide(tensors[leaf.tensor]) for leaf in task.instance.scope.leaves)
    return "F64" in kind.dtypes(task, tensors)


def _is_wide(stored: StoredTensor) -> bool:
    """Whether weights may be as large as float64 has them."""
    scale = None if stored.codes is None else stored.codes.scale
    return "F64" in {stored.dtype, None if scale is None else scale.dtype}


def elements_together(task: Task) -> int:
    """How many elements the torch engine has to hold at one time: a scope, or a block under a threshold."""
    scope = task.instance.scope
    return numel_per_scope(alone(scope) if task.instance.budget.nnz is None else scope)


def _torch_in_memory(task: Task, _: Mapping[str, StoredTensor], limits: Limits) -> TorchInMemory | None:
    patterns = _has_patterns_alone(task)
    elements = max(limits.usual_tile(patterns=patterns), elements_together(task))
    if elements > limits.largest_tile(patterns=patterns):
        return None
    there = min(elements, sum(prod(leaf.view_shape) for leaf in task.instance.scope.leaves))
    memory = there * limits.element_bytes(patterns=patterns)
    return TorchInMemory(memory, elements, on_device=tile_bytes(there))


def _torch_out_of_core(task: Task, _: Mapping[str, StoredTensor], limits: Limits) -> TorchOutOfCore | None:
    patterns = _has_patterns_alone(task)
    elements = max(limits.usual_tile(patterns=patterns), elements_of_block(task))
    if task.instance.budget.nnz is None or elements > limits.largest_tile(patterns=patterns):
        return None
    blocks = task.instance.scope.blocks_per_scope
    candidates = min(limits.held // _SCORE_BYTES, blocks)
    passes = 2 if candidates == blocks else 3  # all ranks are kept at once, or a digit is counted before
    memory = elements * limits.element_bytes(patterns=patterns)
    held = candidates * _SCORE_BYTES
    return TorchOutOfCore(memory, elements, held, passes, on_device=tile_bytes(elements))


def _has_patterns_alone(task: Task) -> bool:
    """Whether the host makes no numbers of elements: these rank as they are, and nothing lies beside them."""
    plain = task.ranks_patterns and task.codes is None and not task.inputs and not task.within
    return plain and task.instance.score.nonfinite == "error"


def elements_of_block(task: Task) -> int:
    """How many elements the largest block has, which any strategy of the torch engine holds together."""
    return max(member.block.numel_per_block for member, _ in members_of(task.instance.scope))


def _rebuild(task: Task, tensors: Mapping[str, StoredTensor], limits: Limits) -> Rebuild:
    stacks = len(independent_parts(task, tensors))
    moments = task.with_role("moment").values()
    numel = sum(prod(leaf.view_shape) for leaf in task.instance.scope.leaves)
    dense = sum(tensors[one.key].numel for one in moments)
    beside = (task.with_role(role).values() for role in ("gradients", "mixed"))
    seconds = sum(one.stored.numel for one in (*moments, *(each for some in beside for each in some)))
    solver = _SOLVER_BYTES + (_LOSS_BYTES if task.metric == "loss" else 0)
    each = (solver * dense + tile_bytes(numel) + _MOMENT_BYTES * seconds) // max(1, stacks)
    _refuse_unseen(task, alone=stacks > 1)
    on_device = 0
    if limits.device is not None:
        on_device, each = each, each // _READ_SHARE
        if on_device > limits.device:
            raise SparsepruneError(
                f"[{task.rule}] {task.instance.label}: its matrices and their second moments take "
                f"{size(on_device)} of the device, of which about {size(limits.device)} are free; say "
                "--device cpu"
            )
    if each > limits.memory:
        needed = INTERPRETER + TORCH + limits.resident + each
        raise SparsepruneError(
            f"[{task.rule}] {task.instance.label}: its matrices and their second moments must be in memory "
            f"together to be reconstructed; give --memory {enough(needed)}"
        )
    cost = _cost(task, tensors, max(1, stacks)) // max(1, stacks)
    return Rebuild(each, numel // max(1, stacks), on_device=on_device, parts=stacks, cost=cost)


def _cost(task: Task, tensors: Mapping[str, StoredTensor], parts: int) -> int:
    """What rebuilding all parts takes, in bytes that are read in that time: it grows with cubes of sizes."""
    method, gradients = task.instance.reconstruct, task.with_role("gradients")
    is_refit = method is not None and method.method == "refit"
    rounds, flops = _ROUNDS["refit" if is_refit else task.metric or "outputs"], 0
    for name, one in task.with_role("moment").items():
        moments = [one.stored]
        if task.metric == "loss" and name in gradients:
            moments.append(gradients[name].stored)
        for moment in moments:
            size, numel = moment.shape[-1], tensors[name].numel
            flops += rounds * numel * size + _FACTORED * moment.numel * size
        flops += _STARTED * parts
    return task.nbytes(tensors) + flops // _FLOPS_PER_BYTE


def _refuse_unseen(task: Task, *, alone: bool) -> None:
    """Before any work is done: a matrix that decides by itself needs tokens that reached it."""
    counts = {name: one.tokens for name, one in task.with_role("moment").items() if one.tokens}
    method = task.instance.reconstruct
    if any(map(any, counts.values())) and (not alone or (method is not None and method.optional)):
        return
    for name, tokens in counts.items():
        if 0 in tokens:
            which = f" (matrix {tokens.index(0)})" if len(tokens) > 1 else ""
            ways = " or exclude it" if which else ", exclude it, or say optional = true"
            raise SparsepruneError(
                f"[{task.rule}] reconstruct: no token reached {name}{which} when its statistics were taken; "
                f"calibrate on more text{ways}"
            )


def independent_parts(task: Task, tensors: Mapping[str, StoredTensor]) -> list[tuple[Part, int | None]]:
    """Parts of a task's scope grid that are rebuilt one by one, each with the number of its matrix.

    They are those of a stack, in order. Else there is one part for all matrices, with None.
    """
    scope = task.instance.scope
    whole = whole_part(scope.grid_shape)
    rebuilt = {tensors[name].shape for name in task.with_role("moment")}
    counts = {tensors[leaf.tensor].shape[:1] for leaf in scope.leaves}
    together: list[tuple[Part, int | None]] = [(whole, None)]
    if len(counts) != 1 or any(len(shape) != 3 for shape in rebuilt) or not whole.numel:
        return together
    matrices: list[int | None] = []
    for place in range(scope.grid_shape[0]):
        cell = Part((place, *whole.begin[1:]), (1, *whole.extent[1:]))
        reached = {_matrix(region, tensors) for region in regions_at(scope, cell).values()}
        if len(reached) != 1 or None in reached:
            return together
        matrices += reached
    parts: list[tuple[Part, int | None]] = []
    begin = 0
    for matrix, same in groupby(matrices):
        size = len(list(same))
        parts.append((Part((begin, *whole.begin[1:]), (size, *whole.extent[1:])), matrix))
        begin += size
    ((count,),) = counts
    return parts if [matrix for _, matrix in parts] == list(range(count)) else together


def _matrix(region: Region, tensors: Mapping[str, StoredTensor]) -> int | None:
    """The matrix of its tensor in which all of a region lies; None where it lies in several."""
    size = prod(tensors[region.leaf.tensor].shape[1:])
    steps = zip(region.extent, region.leaf.view_stride, strict=True)
    last = region.first + sum((extent - 1) * step for extent, step in steps)
    return region.first // size if size and region.first // size == last // size else None


_CHOICES: Mapping[str, Callable[[Task, Mapping[str, StoredTensor], Limits], Strategy | None]] = {
    "contiguous": _contiguous,
    "strided": _strided,
    "radix_select": _radix_select,
    "block_norms": _block_norms,
    "torch_in_memory": _torch_in_memory,
    "torch_out_of_core": _torch_out_of_core,
}
_TORCH = ORDER[-2:]
