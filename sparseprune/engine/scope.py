"""Scopes: the decision units, in which blocks compete for a budget.

Owns `SparseScope`, `ScopeSpec` and `ScopeCoupling`: gathering scores by scope, budgets, masks. Which blocks
are the largest of a scope `selection` finds. Imports torch.
"""

from __future__ import annotations

import math
import operator
from abc import abstractmethod
from math import prod
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from sparseprune.engine import grids
from sparseprune.engine.block import (
    BlockSpec,
    Grid,
    by_cell,
    over_cells,
    refuse_shared_elements,
    where_marked,
    zero_pruned,
)
from sparseprune.engine.proximal import distinct
from sparseprune.engine.scoring import first_nan, magnitude_keys, order_keys
from sparseprune.engine.selection import kth_largest, select
from sparseprune.engine.transposing import select_transposable
from sparseprune.errors import NanScoreError, ShapeMismatchError, SparsityError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sparseprune.engine.block import SparseBlock, Values
    from sparseprune.engine.grids import Orders, Shape


class SparseScope(Grid):
    """Scopes on a grid: in each of the `numscp()` scopes `numblk_per_scope()` blocks compete.

    Invariant: every block of every member belongs to one scope, and within a scope blocks are numbered
    member by member, each in row-major order; that number breaks ties.
    """

    _misfit = "do not fit the grid of scopes"

    @property
    @abstractmethod
    def members(self) -> tuple[tuple[ScopeSpec, Shape], ...]:
        """The ScopeSpecs with the order that permutes each one's grid of scopes onto `grid_shape`."""

    def numscp(self) -> int:
        """How many scopes there are."""
        return prod(self.grid_shape)

    def numblk(self) -> int:
        """How many blocks there are, over all scopes and members."""
        return sum(spec.block.numblk() for spec, _ in self.members)

    def numblk_per_scope(self) -> int:
        """How many blocks compete in one scope."""
        return sum(prod(spec.shape) for spec, _ in self.members)

    def numel_per_scope(self) -> int:
        """How many elements the blocks of one scope have."""
        return sum(prod(spec.shape) * spec.block.numel_per_block() for spec, _ in self.members)

    def blocks(self) -> tuple[BlockSpec, ...]:
        return tuple(leaf for spec, _ in self.members for leaf in spec.block.blocks())

    def sparsity_to_nnz(self, sparsity: float) -> int:
        """The budget of one scope: blocks per scope - floor(sparsity * blocks per scope), never below 0.

        >>> from sparseprune.engine import ScopeSpec
        >>> ScopeSpec(BlockSpec(torch.zeros(2, 8), ()), (1, 4)).sparsity_to_nnz(0.3)
        3
        """
        if math.isnan(sparsity) or sparsity < 0:
            raise SparsityError(f"{self.name}: sparsity {sparsity} is no share of blocks: wanted 0 to 1")
        return grids.surviving(sparsity, self.numblk_per_scope())

    def trusting(self) -> Self:
        """The same scope, which refuses no NaN any more: its caller has looked, and a look costs time."""
        self.trusted = True
        for spec, _ in self.members:
            spec.trusted = spec.block.trusted = True
        return self

    def block_norms(self, values: Values = None, p: float = 2, *, rms: bool = False) -> Tensor:
        """The p-norm of each block by scope: float64 (*grid_shape, blocks per scope).

        `rms` divides by the square root of a block's elements, so that blocks of unlike size compare.

        Raises:
            SparsityError: NaN, naming the tensor and the first place.
        """
        norms = []
        for spec, some in self._each(values):
            spec.block.refuse_nan(spec.block.resolve(some))
            scale = math.sqrt(spec.block.numel_per_block()) if rms else 1.0
            norms.append(spec.block.norms(some, p) / scale)
        return self.gather(norms)

    def get_masks(
        self,
        nnz: int,
        values: Values = None,
        block_scores: Tensor | None = None,
        block_mask: Tensor | None = None,
        *,
        p: float = 2,
        rms: bool = False,
    ) -> dict[BlockSpec, Tensor]:
        """View-shaped bool masks for every BlockSpec, exactly `nnz` blocks True in each scope.

        `block_scores` (*grid_shape, blocks per scope) rank the blocks instead of norms. `block_mask`, of
        that shape, is a decision already made: it is only laid out, and `nnz` is ignored. `p` and `rms`
        choose the norm, as in `block_norms`.

        Raises:
            SparsityError: nnz out of range, NaN scores, a norm chosen where no norms are compared.
            ShapeMismatchError: scores or mask of a wrong shape.
        """
        if (p != 2 or rms) and not (block_scores is None and block_mask is None):
            given = "block_scores" if block_mask is None else "block_mask"
            raise SparsityError(f"{self.name}: {given} is used in place of norms: leave p and rms out")
        if block_mask is None:
            block_mask = self._selected(self._budget(nnz), values, block_scores, p=p, rms=rms)
        keep = self._by_scope(block_mask.to(torch.bool), "block mask")
        masks: dict[BlockSpec, Tensor] = {}
        for spec, part in self._scatter(keep):
            masks |= spec.block.get_masks(part)
        return masks

    def _selected(
        self, nnz: int, values: Values, block_scores: Tensor | None, *, p: float, rms: bool
    ) -> Tensor:
        """Which blocks survive, by scope: the `nnz` largest."""
        return select(self.keys(values, block_scores, p=p, rms=rms), nnz)

    def left(self, among: Values) -> Tensor:
        """The blocks of which masks, as `get_masks` gives them, keep an element, by scope.

        Bool (*grid_shape, blocks per scope).
        """
        return self.gather([spec.block.marked(some) for spec, some in self._each(among)])

    def masks_among(self, among: Values, nnz: int | Tensor, values: Values = None) -> dict[BlockSpec, Tensor]:
        """The masks of a scope that is nested in what `among` keeps, masks as `get_masks` gives them.

        Norms are over what is left of each block, ties go to the lower index, and blocks of which nothing is
        left are out: of each scope `nnz` survive, or all that are left where these are fewer. There may be an
        nnz for each scope (`grid_shape`). The masks lie inside of `among`.

        Raises:
            SparsityError: nnz out of range, NaN in what is left, a transposable scope.
        """
        inside: dict[BlockSpec, Tensor] = {}
        marks: dict[BlockSpec, Tensor] = {}
        for (spec, some), (_, own) in zip(self._each(values), self._each(among), strict=True):
            if spec.transposable:
                raise SparsityError(
                    f"{self.name}: tiles that are transposable compete whole, not within masks"
                )
            marks |= (marked := spec.block.marks(own))
            elements = spec.block.resolve(some)
            inside |= {leaf: where_marked(one, marked[leaf]) for leaf, one in elements.items()}
        if isinstance(nnz, Tensor) and nnz.ndim:
            counts = self._on_grid(nnz, "nnz")
            for extreme in (counts.amin(), counts.amax()) if counts.numel() else ():
                self._budget(int(extreme))
        else:
            counts = torch.tensor(self._budget(int(nnz))).expand(self.grid_shape)
        keys, left = self.keys(inside), self.left(among)
        lowest = torch.iinfo(keys.dtype).min  # below the keys of all numbers
        chosen = select(keys.masked_fill(~left, lowest), counts) & left
        masks = self.get_masks(0, block_mask=chosen)
        return {leaf: mask & marks[leaf] for leaf, mask in masks.items()}

    def threshold_masks(
        self, thresholds: Tensor | float, values: Values = None, block_scores: Tensor | None = None
    ) -> dict[BlockSpec, Tensor]:
        """View-shaped bool masks, True for the blocks whose norm is at least their scope's threshold.

        `block_scores` (*grid_shape, blocks per scope) are compared instead of norms.
        """
        if block_scores is not None:
            scores = self._by_scope(block_scores, "block scores")
            self._refuse_nan_scores(scores)
            reaches = scores.to(torch.float64) >= self._thresholds(thresholds).unsqueeze(-1)
            return self.get_masks(0, block_mask=reaches)
        masks: dict[BlockSpec, Tensor] = {}
        limits = self._by_block(self._thresholds(thresholds))
        for (spec, some), limit in zip(self._each(values), limits, strict=True):
            masks |= spec.block.get_masks(spec.block.reaches(limit, some))
        return masks

    def hard_threshold(
        self, thresholds: Tensor | float | None = None, nnz: int | None = None, values: Values = None
    ) -> None:
        """Zero blocks in place: all but `nnz` in each scope, or those whose norm is below their threshold.

        `thresholds` is a number or a tensor of `grid_shape`; a block whose norm equals it is kept.

        Raises:
            SparsityError: both or neither of `thresholds` and `nnz` given, nnz out of range, NaN.
        """
        if nnz is not None and thresholds is None:
            zero_pruned(self.get_masks(nnz, values))
        elif thresholds is not None and nnz is None:
            zero_pruned(self.threshold_masks(thresholds, values))
        else:
            raise SparsityError(f"{self.name}: give exactly one of thresholds and nnz")

    def soft_threshold(
        self,
        thresholds: Tensor | float,
        conditioners: Values = None,
        scale: bool = False,  # noqa: FBT001, FBT002  (a fixed signature)
        max_iter: int = 20,
        atol: float = 1e-8,
        eps: float | None = None,
    ) -> None:
        """Shrink every block in place by its scope's threshold (a number, or of `grid_shape`).

        `scale` multiplies the threshold by the square root of the block's number of elements. The rest
        is as in `SparseBlock.soft_threshold`.
        """
        shrinking = []
        limits = self._by_block(self._thresholds(thresholds))
        for (spec, diagonal), limit in zip(self._each(conditioners), limits, strict=True):
            own = limit
            if scale:
                own = (distinct(limit) * math.sqrt(spec.block.numel_per_block())).expand(limit.shape)
            shrinking.append(spec.block.shrinking(own, diagonal, max_iter, atol, eps))
        for shrink in shrinking:  # nothing is written before all was looked at
            shrink()

    def kth_mid(self, element_values: Values, nnz: int, k_weight: float = 1.0) -> Tensor:
        """`(kth + k_weight * (k+1)th) / (1 + k_weight)` of the norms in each scope, float64 of `grid_shape`.

        k is `nnz`; the norm before the first block of a scope is infinity, after the last one 0.
        """
        kth = self._kth(element_values, nnz)
        if k_weight == 0:
            return kth  # 0 times an infinite norm would be NaN
        return (kth + k_weight * self._kth(element_values, nnz, following=1)) / (1 + k_weight)

    def soft_budget(self, nnz: int, k_weight: float = 1.0) -> Tensor:
        """The thresholds that leave about `nnz` blocks of each scope: `kth_mid` of the weights themselves."""
        return self.kth_mid(None, nnz, k_weight)

    def _budget(self, nnz: int) -> int:
        count = operator.index(nnz)
        if not 0 <= count <= self.numblk_per_scope():
            raise SparsityError(
                f"{self.name}: nnz {count} is out of range: a scope has {self.numblk_per_scope()} blocks, "
                f"so that nnz lies within 0 and {self.numblk_per_scope()}"
            )
        return count

    def keys(
        self,
        values: Values = None,
        block_scores: Tensor | None = None,
        *,
        as_norms: bool = False,
        p: float = 2,
        rms: bool = False,
    ) -> Tensor:
        """Signed integers (*grid_shape, blocks per scope), ordered as the blocks are ranked.

        Norms are those of `block_norms`; of a single element all of them are its magnitude.
        `as_norms` takes norms even where single elements could be compared by their own patterns.
        """
        if block_scores is not None:
            self._refuse_nan_scores(self._by_scope(block_scores, "block scores"))
            return order_keys(block_scores.detach().to(self._device()))
        given = self._each(values)
        kinds = {spec.block.key_dtype(some) for spec, some in given}
        if len(kinds) == 1 and None not in kinds and not as_norms and p > 0:
            return self.gather([spec.block.keys(some) for spec, some in given])
        return magnitude_keys(self.block_norms(values, p, rms=rms))

    def _kth(self, values: Values, k: int, following: int = 0) -> Tensor:
        """The (k + following)-th largest norm of each scope; inf before the first, 0 behind the last."""
        rank = self._budget(k) + following
        norms = self.block_norms(values)
        if 1 <= rank <= self.numblk_per_scope():
            return kth_largest(norms, rank)
        return torch.full(self.grid_shape, 0.0 if rank else math.inf, dtype=norms.dtype, device=norms.device)

    def _by_block(self, per_scope: Tensor) -> list[Tensor]:
        """One number per scope as one per block, on each member's block grid."""
        inverse = grids.inverse_order
        return [spec.scope_to_block(per_scope.permute(inverse(order))) for spec, order in self.members]

    def _each(self, values: Values) -> list[tuple[ScopeSpec, Values]]:
        """Each member with its part of the values."""
        specs = [spec for spec, _ in self.members]
        if values is None:
            return [(spec, None) for spec in specs]
        leaves = self.blocks()
        if isinstance(values, Tensor):
            if len(leaves) != 1:
                raise SparsityError(
                    f"{self.name} has {len(leaves)} blocks: give values as a mapping from block to tensor"
                )
            return [(spec, values) for spec in specs]
        return [
            (spec, {leaf: values[leaf] for leaf in spec.block.blocks() if leaf in values}) for spec in specs
        ]

    def gather(self, per_block: Sequence[Tensor]) -> Tensor:
        """One tensor per member, its block grid in front, as (*grid_shape, blocks per scope, trailing)."""
        rank = len(self.grid_shape)
        parts = []
        for (spec, order), part in zip(self.members, per_block, strict=True):
            merged = spec.block_to_scope(part, merge=True)
            parts.append(merged.permute(*order, *range(rank, merged.ndim)).to(self._device()))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=rank)

    def _scatter(self, by_scope: Tensor) -> list[tuple[ScopeSpec, Tensor]]:
        """The inverse of `gather`: (*grid_shape, blocks per scope) to each member's block grid."""
        rank = len(self.grid_shape)
        parts = torch.split(by_scope, [prod(spec.shape) for spec, _ in self.members], dim=-1)
        pairs = [dim for d in range(rank) for dim in (d, rank + d)]
        scattered = []
        for (spec, order), part in zip(self.members, parts, strict=True):
            split = part.permute(*grids.inverse_order(order), rank).reshape((*spec.grid_shape, *spec.shape))
            scattered.append((spec, split.permute(pairs).reshape(spec.block.grid_shape)))
        return scattered

    def _by_scope(self, tensor: Tensor, what: str) -> Tensor:
        wanted = (*self.grid_shape, self.numblk_per_scope())
        if tuple(tensor.shape) != wanted:
            raise ShapeMismatchError(
                f"{self.name}: {what} of shape {list(tensor.shape)}, wanted {list(wanted)}: the grid of "
                "scopes, then the blocks of a scope"
            )
        return tensor

    def _refuse_nan_scores(self, scores: Tensor) -> None:
        place = None if self.trusted else first_nan(scores)
        if place is not None:
            raise NanScoreError(f"block scores of {self.name}", place)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.name}, {self.numscp()} scopes of {self.numblk_per_scope()} blocks)"
        )


class ScopeSpec(SparseScope):
    """Scopes of one block grid, all of one shape in blocks; -1 and missing dimensions are spanned.

    >>> import torch
    >>> from sparseprune.engine import BlockSpec
    >>> w = torch.tensor([[1.0, -4.0, 3.0, 2.0], [0.5, 0.5, 0.5, 0.5]])
    >>> ScopeSpec(BlockSpec(w, (1, 1)), (1, 4)).hard_threshold(nnz=2)
    >>> w
    tensor([[ 0.0000, -4.0000,  3.0000,  0.0000],
            [ 0.5000,  0.5000,  0.0000,  0.0000]])

    `transposable`: scopes are tiles of m x m single elements, and nnz is n * m: n of m survive in every row
    and in every column, with the largest sum of scores (`select_transposable`).

    Raises:
        ShapeMismatchError: the shape has more dimensions than the block grid, or does not divide it, or it is
            no tile of 2 x 2 to 4 x 4 single elements and `transposable`.
    """

    def __init__(
        self,
        block: SparseBlock,
        shape: Sequence[int],
        name: str | None = None,
        *,
        transposable: bool = False,
    ) -> None:
        self.block = block
        self.name = name or f"scope of {block.name}"
        self.shape: Shape = grids.scope_extents(block.grid_shape, tuple(map(operator.index, shape)))
        self.grid_shape = grids.divide(block.grid_shape, self.shape, "scope", "block grid")
        self.transposable = transposable
        wide = [size for size in self.shape if size > 1]
        tile = len(wide) == 2 and wide[0] == wide[1] <= grids.LARGEST_TILE and block.numel_per_block() == 1
        if transposable and not tile:
            found = f"scope shape {list(self.shape)} of blocks of {block.numel_per_block()}"
            wanted = f"single elements in square tiles of 2 to {grids.LARGEST_TILE} rows"
            raise ShapeMismatchError(f"{self.name}: {found} cannot be transposable: wanted {wanted}")

    def _selected(
        self, nnz: int, values: Values, block_scores: Tensor | None, *, p: float, rms: bool
    ) -> Tensor:
        if not self.transposable:
            return super()._selected(nnz, values, block_scores, p=p, rms=rms)
        size = math.isqrt(self.numblk_per_scope())
        if nnz % size:
            wanted = f"a multiple of {size}, as each row and column keeps as many"
            raise SparsityError(f"{self.name}: nnz {nnz} is not transposable: wanted {wanted}")
        if block_scores is None:
            scores = self.block_norms(values, p, rms=rms)
        else:
            scores = self._by_scope(block_scores, "block scores")
        try:
            return select_transposable(scores, size, nnz // size)
        except SparsityError as error:
            raise SparsityError(f"{self.name}: {error}") from error

    def threshold_masks(
        self, thresholds: Tensor | float, values: Values = None, block_scores: Tensor | None = None
    ) -> dict[BlockSpec, Tensor]:
        """As of any scope; SparsityError where it is transposable, as no threshold keeps n of m."""
        if self.transposable:
            raise SparsityError(f"{self.name}: a transposable scope has no threshold: give nnz")
        return super().threshold_masks(thresholds, values, block_scores)

    @property
    def members(self) -> tuple[tuple[ScopeSpec, Shape], ...]:
        return ((self, grids.identity_order(len(self.grid_shape))),)

    def block_to_scope(self, b: Tensor, reorder: bool = True, merge: bool = False) -> Tensor:  # noqa: FBT001, FBT002  (a fixed signature)
        """A tensor with the block grid in front, by scope; dimensions behind the grid stay behind.

        (G1, g1, G2, g2, ..., trailing), with `reorder` (G1, G2, ..., g1, g2, ..., trailing), with `merge`
        (which reorders) (G1, G2, ..., g1*g2*..., trailing).
        """
        rank = len(self.grid_shape)
        if tuple(b.shape[:rank]) != self.block.grid_shape:
            raise ShapeMismatchError(
                f"{self.name}: shape {list(b.shape)} does not begin with the block grid "
                f"{list(self.block.grid_shape)}"
            )
        return by_cell(b, self.grid_shape, self.shape, reorder=reorder, merge=merge)

    def scope_to_block(self, scope_values: Tensor) -> Tensor:
        """One number per scope (`grid_shape`) as one per block (the block grid)."""
        spread = over_cells(self._on_grid(scope_values, "scope values"), self.grid_shape, self.shape)
        return spread.reshape(self.block.grid_shape)

    def kth_largest(self, element_values: Values, nnz: int) -> Tensor:
        """The nnz-th largest norm in each scope, float64 of `grid_shape`; infinity for nnz 0."""
        return self._kth(element_values, nnz)


class ScopeCoupling(SparseScope):
    """Aligned scopes: `common[d] = grid_i[orders[i][d]]` for the grids of scopes.

    All blocks of an aligned scope compete for one budget, so that one tensor may lose more than
    another; members may have unlike scope shapes. Without orders every grid is taken as it is.

    >>> import torch
    >>> from sparseprune.engine import BlockSpec, ScopeSpec
    >>> big, small = torch.full((2, 2), 3.0), torch.ones(2, 2)
    >>> scopes = [ScopeSpec(BlockSpec(t, ()), ()) for t in (big, small)]
    >>> ScopeCoupling(scopes, [(0, 1), (0, 1)]).hard_threshold(nnz=4)
    >>> small
    tensor([[0., 0.],
            [0., 0.]])

    Raises:
        CouplingError: grids of scopes that do not align, or an element that would belong to two scopes.
    """

    def __init__(self, scopes: Sequence[ScopeSpec], orders: Orders = None, name: str | None = None) -> None:
        self.scopes = tuple(scopes)
        self.name = name or "scope coupling"
        shapes = [scope.grid_shape for scope in self.scopes]
        self.grid_shape, self.orders = grids.align(shapes, orders, [scope.name for scope in self.scopes])
        refuse_shared_elements(self.blocks())

    @property
    def members(self) -> tuple[tuple[ScopeSpec, Shape], ...]:
        return tuple(zip(self.scopes, self.orders, strict=True))

    def kth_largest(self, k: int, values: Values = None) -> Tensor:
        """The k-th largest norm in each scope, over all members: float64 of `grid_shape`; inf for k 0."""
        return self._kth(values, k)

    def block_to_scope(
        self,
        b: Mapping[SparseBlock, Tensor],
        reorder: bool = True,  # noqa: FBT001, FBT002  (a fixed signature)
        merge: bool = False,  # noqa: ARG002, FBT001, FBT002  (a fixed signature)
    ) -> Tensor:
        """Tensors with their block's grid in front, by scope: (*grid_shape, blocks per scope, trailing).

        Members have scopes of unlike shape, so that only this form exists, with or without `merge`; their
        blocks stand one after the other, in the order of the members.
        """
        if not reorder:
            raise SparsityError(f"{self.name}: the scopes of a coupling have no common interleaved form")
        missing = [spec.block.name for spec in self.scopes if spec.block not in b]
        if missing:
            raise SparsityError(f"{self.name}: no tensor given for {', '.join(missing)}")
        return self.gather([b[spec.block] for spec in self.scopes])

    def scope_to_block(self, scope_values: Tensor) -> dict[SparseBlock, Tensor]:
        """One number per scope (`grid_shape`) as one per block, on each member's block grid."""
        per_block = self._by_block(self._on_grid(scope_values, "scope values"))
        return {spec.block: one for spec, one in zip(self.scopes, per_block, strict=True)}
