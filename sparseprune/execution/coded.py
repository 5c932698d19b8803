"""Rules over codes: whether these are ranked as they are or by what they stand for, and what is refused.

Owns when one scale reaches all that competes, and what no rule can do to codes. Looks at bound scopes and at
what headers say. Called by plan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from sparseprune.engine.grids import prod
from sparseprune.execution.scores import kind_of
from sparseprune.spec import BoundBlock, BoundScope

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.checkpoint.codes import Beside
    from sparseprune.engine.grids import Shape
    from sparseprune.spec import BoundInstance

    Tensors = Mapping[str, StoredTensor]

CodesRank = Literal["values", "patterns"]
"""How codes are ranked: by the weights they stand for; or as they are, or not at all."""


def rank_of_codes(instance: BoundInstance, tensors: Tensors) -> CodesRank | None:
    """How the elements of an instance are ranked; None where it reaches no codes."""
    if not any(tensors[leaf.tensor].codes for leaf in instance.scope.leaves):
        return None
    kind = kind_of(instance.score)
    if kind.ranks_blocks or (kind.reads == "values" and kind.elements is None):
        return "patterns"
    return "patterns" if kind.ranks_weights and _have_one_scale(instance, tensors) else "values"


def refusals(
    instance: BoundInstance, tensors: Tensors, rank: CodesRank | None, *, scored: bool, writes: bool
) -> Iterator[str]:
    """A line for every tensor of codes, so ranked, with which an instance cannot do what it should.

    `scored`: blocks compete by their scores. `writes`: zeros are written or looked for; else slices are cut
    out, for which any bytes will do.
    """
    kind = kind_of(instance.score)
    for name in dict.fromkeys([leaf.tensor for leaf in instance.scope.leaves]):
        codes = tensors[name].codes
        if codes is None:
            continue
        does = "rebuilt" if instance.reconstruct else "shrunk" if instance.soft else ""
        line = ""
        if writes or not kind.ranks_blocks:
            line = codes.refusal(name, values=scored and rank == "values")
        if does and not line:
            lies = f" ({codes.beside[0]} lies beside it)" if codes.beside else ""
            line = f"{name} holds {codes.what}{lies}, which cannot be {does}: dequantize the checkpoint first"
        if line:
            yield line


def _have_one_scale(instance: BoundInstance, tensors: Tensors) -> bool:
    """Whether all that competes for a budget has one scale and no zero point, which changes no order."""
    scope = instance.scope
    is_single = isinstance(scope, BoundScope) and isinstance(scope.block, BoundBlock)
    if not is_single or instance.budget.nnz is None:
        return False
    (leaf,) = scope.leaves
    stored = tensors[leaf.tensor]
    codes = stored.codes
    if codes is None or codes.scale is None or codes.no_values or codes.no_zero or codes.zero_point:
        return False
    if codes.scale.is_one:
        return True
    extents = tuple(size * count for size, count in zip(leaf.shape, scope.members[0].shape, strict=True))
    return _lies_in_one(leaf, stored.shape, extents, codes.scale)


def _lies_in_one(leaf: BoundBlock, shape: Shape, extents: Shape, scale: Beside) -> bool:
    """Whether every scope of such extents lies under one entry; False where a view makes that hard to say."""
    steps = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
    if leaf.view_stride != steps:
        return False
    left = leaf.view_offset
    for size, step, extent, edge in zip(leaf.view_shape, steps, extents, scale.block, strict=True):
        first, left = divmod(left, step)
        is_whole = first // edge == (first + size - 1) // edge
        if not is_whole and (edge % extent or first % extent):
            return False
    return True
