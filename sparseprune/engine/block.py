"""Blocks: the atomic units of pruning, in one view or fused over several.

Owns `SparseBlock`, `BlockSpec` and `BlockCoupling`: norms, masks, thresholds. Knows no scopes.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from itertools import combinations
from math import prod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from sparseprune.engine import grids
from sparseprune.engine.proximal import (
    distinct,
    refuse_unusable,
    soft_threshold_conditioned,
    soft_threshold_euclidean,
)
from sparseprune.engine.scoring import (
    INTEGERS,
    first_nan,
    fused_norms,
    has_exact_keys,
    magnitude_keys,
    round_to,
)
from sparseprune.engine.view import View, disjoint, storage_of
from sparseprune.errors import CouplingError, NanScoreError, ShapeMismatchError, SparsityError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sparseprune.engine.grids import Orders, Shape


Values = Tensor | Mapping["BlockSpec", Tensor] | None
"""None (the weights), one parameter- or view-shaped tensor, or one for each BlockSpec."""


class Grid(ABC):
    """What blocks and scopes share: places on a grid, and numbers that fit it."""

    name: str
    grid_shape: Shape
    trusted: bool = False  # its numbers, and thresholds in tensors, were looked at: none is NaN
    _misfit: ClassVar[str]

    @abstractmethod
    def blocks(self) -> tuple[BlockSpec, ...]:
        """The BlockSpecs that hold the elements, in the order of the members."""

    def nnz(self, eps: float = 1e-8) -> int:
        """How many elements are larger than `eps` in magnitude; NaN counts as one."""
        return sum(int((~(spec.data.to(torch.float64).abs() <= eps)).sum()) for spec in self.blocks())

    def _thresholds(self, thresholds: Tensor | float) -> Tensor:
        """A number, or one for each place, as float64 of `grid_shape`."""
        limits = torch.as_tensor(thresholds, dtype=torch.float64, device=self._device())
        if limits.ndim:
            self._on_grid(limits, "thresholds")
        looked_at = isinstance(thresholds, Tensor) and self.trusted
        # A number is looked at on the host, which need not wait for a device then.
        if not looked_at and (bool(limits.isnan().any()) if limits.ndim else math.isnan(thresholds)):
            raise SparsityError(f"{self.name}: a threshold is NaN")
        return limits.expand(self.grid_shape)

    def _on_grid(self, tensor: Tensor, what: str) -> Tensor:
        if tuple(tensor.shape) != self.grid_shape:
            raise ShapeMismatchError(
                f"{self.name}: {what} of shape {list(tensor.shape)} {self._misfit} {list(self.grid_shape)}"
            )
        return tensor

    def _device(self) -> torch.device:
        return self.blocks()[0].view.param.device


class SparseBlock(Grid):
    """Blocks on a grid: `grid_shape` counts them, each is kept or pruned whole.

    Invariant: every block has `numel_per_block()` elements, and no element belongs to two blocks.

    Blocks of one class are equal if they look at the same elements (see `View`), cut and fused in the same
    way, whatever their names: as keys of masks or values they are the same.
    """

    _misfit = "does not fit the block grid"

    @property
    @abstractmethod
    def members(self) -> tuple[tuple[BlockSpec, Shape], ...]:
        """The BlockSpecs with the order that permutes each one's grid onto `grid_shape`."""

    @property
    @abstractmethod
    def _identity(self) -> Hashable:
        """A value that is equal for equal blocks."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparseBlock):
            return NotImplemented
        return type(self) is type(other) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def ndim(self) -> int:
        """How many dimensions the block grid has; a BlockSpec's view has as many."""
        return len(self.grid_shape)

    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors that hold the elements, each once, in the order of the members."""
        return tuple({id(spec.view.param): spec.view.param for spec, _ in self.members}.values())

    def blocks(self) -> tuple[BlockSpec, ...]:
        return tuple(spec for spec, _ in self.members)

    def numblk(self) -> int:
        """How many blocks there are."""
        return prod(self.grid_shape)

    def numel_per_block(self) -> int:
        """How many elements one block has, over all members."""
        return sum(prod(spec.shape) for spec, _ in self.members)

    def numel(self) -> int:
        """How many elements all blocks have."""
        return sum(spec.view.numel() for spec, _ in self.members)

    def norms(self, values: Values = None, p: float = 2) -> Tensor:
        """The p-norm of each block over all its elements: float64 of `grid_shape`.

        Raises:
            SparsityError: p is not positive, or values are given in no form that fits.
            ShapeMismatchError: values of a wrong shape.
        """
        return fused_norms(self._fused(self.resolve(values)), self.grid_shape, p)

    def min(self, values: Values = None) -> Tensor:
        """The smallest element of each block, float64 of `grid_shape`."""
        return self.reduce(values, lambda merged: merged.to(torch.float64).amin(-1))

    def max(self, values: Values = None) -> Tensor:
        """The largest element of each block, float64 of `grid_shape`."""
        return self.reduce(values, lambda merged: merged.to(torch.float64).amax(-1))

    def reduce(self, values: Values, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """`fn` of the elements of all blocks, (*grid_shape, elements per block) -> (*grid_shape)."""
        result = fn(self.block_view(values, reorder=True, merge=True))
        if tuple(result.shape) != self.grid_shape:
            raise ShapeMismatchError(
                f"{self.name}: reduce gave shape {list(result.shape)}, wanted {list(self.grid_shape)}"
            )
        return result

    @abstractmethod
    def block_view(self, values: Values = None, reorder: bool = True, merge: bool = False) -> Tensor:  # noqa: FBT001, FBT002  (a fixed signature)
        """Elements by block: (*grid_shape, elements per block) where merged."""

    def get_masks(self, block_mask: Tensor) -> dict[BlockSpec, Tensor]:
        """A decision about blocks (bool of `grid_shape`) as view-shaped element masks, True where kept."""
        return self._spread(self._on_grid(block_mask.to(torch.bool), "block mask"))

    def apply_mask(self, mask: Values) -> None:
        """Write +0.0, in place, where an element mask is False; True keeps, and survivors keep their bits.

        `mask` is the result of `get_masks`, or one tensor where there is one member; tensors are view-shaped,
        or else parameter-shaped, and read as bools. sparsekit's `apply_mask` drops what is True instead.

        Raises:
            SparsityError: a member without a mask; nothing has been written then.
            ShapeMismatchError: a mask of a wrong shape.
        """
        if mask is None:
            raise SparsityError(f"{self.name}: apply_mask needs a mask, found None")
        given = self._given(mask, "mask")
        zero_pruned({spec: spec.view.by_view(one).to(torch.bool) for spec, one in given.items()})

    def hard_threshold(self, thresholds: Tensor | float, values: Values = None) -> None:
        """Zero, in place, the blocks whose norm is below their threshold (scalar or of `grid_shape`).

        Raises:
            SparsityError: NaN in the scores or the thresholds; nothing has been written then.
        """
        zero_pruned(self.get_masks(self.reaches(thresholds, values)))

    def reaches(self, thresholds: Tensor | float, values: Values = None) -> Tensor:
        """Bool of `grid_shape`: the blocks whose norm is at least their threshold."""
        elements = self.resolve(values)
        self.refuse_nan(elements)
        return fused_norms(self._fused(elements), self.grid_shape, 2) >= self._thresholds(thresholds)

    def soft_threshold(
        self,
        block_thresholds: Tensor | float,
        conditioners: Values = None,
        max_iter: int = 20,
        atol: float = 1e-8,
        eps: float | None = None,
    ) -> None:
        """Shrink each block in place by the proximal operator of `threshold * ||block||`.

        `conditioners` are the diagonal of a Hessian, in the forms that values have; with them the
        operator is solved to `atol` in at most `max_iter` Newton steps. Blocks whose norm (with
        conditioners: of h * v) is `eps` or less count as zero; None is 0. Other implementations add `eps` to
        a denominator; here it is not needed, and would keep the result from being the proximal point.

        Raises:
            SparsityError: NaN, a negative threshold or conditioner, or integer weights.
        """
        self.shrinking(block_thresholds, conditioners, max_iter, atol, eps)()

    def shrinking(
        self,
        block_thresholds: Tensor | float,
        conditioners: Values = None,
        max_iter: int = 20,
        atol: float = 1e-8,
        eps: float | None = None,
    ) -> Callable[[], None]:
        """What does `soft_threshold` in place, once its arguments were looked at."""
        weights = self.resolve(None)
        self.refuse_nan(weights)
        for spec in weights:
            if not spec.view.param.dtype.is_floating_point:
                raise SparsityError(
                    f"{spec.name}: soft thresholding needs floats, found {spec.view.param.dtype}"
                )
        limits = self._thresholds(block_thresholds)
        if not bool((distinct(limits) >= 0).all()):
            raise SparsityError(f"{self.name}: soft thresholds must not be negative")
        views = [spec.fuse(weights[spec], order) for spec, order in self.members]
        least = 0.0 if eps is None else eps
        if conditioners is None:
            return partial(soft_threshold_euclidean, views, limits, least)
        diagonal = self._fused(self.resolve(conditioners))
        refuse_unusable(views, diagonal)
        return partial(soft_threshold_conditioned, views, diagonal, limits, max_iter, (atol, least))

    def set_data(self, t: Tensor | Mapping[BlockSpec, Tensor]) -> None:
        """Write new elements, view-shaped or else parameter-shaped, rounded once to the weights' dtype.

        A BlockSpec takes one tensor, a BlockCoupling a mapping with one for each member.

        Raises:
            SparsityError: a member without elements; nothing has been written then.
            ShapeMismatchError: a tensor of another shape.
        """
        laid = {spec: spec.view.by_view(one) for spec, one in self._given(t, "elements").items()}
        for spec, one in laid.items():
            same = one.dtype == spec.data.dtype
            spec.data.copy_(one if same else round_to(one.to(torch.float64), spec.data.dtype))

    def apply_multiplier(self, grid: Tensor) -> None:
        """Multiply each block in place by its number (`grid_shape`), rounded once to the weights' dtype.

        Where the number is 1 every bit stays, where it is 0 elements become +0.0, infinite ones too.
        """
        factors = self._on_grid(grid, "multiplier").to(torch.float64)
        for spec, spread in self._spread(factors).items():
            data, bits = spec.view.data, spec.view.bits
            product = round_to(data.to(torch.float64) * spread, data.dtype).view(bits.dtype)
            bits.copy_(torch.where(spread == 1, bits, product.masked_fill_(spread == 0, 0)))

    def keys(self, values: Values = None) -> Tensor:
        """Signed integers of `grid_shape`, ordered as the magnitudes, for blocks with a `key_dtype`.

        Raises:
            SparsityError: NaN, naming the tensor and the first place.
        """
        elements = self.resolve(values)
        self.refuse_nan(elements)
        (view,) = self._fused(elements)
        return magnitude_keys(view).reshape(self.grid_shape)

    def key_dtype(self, values: Values = None) -> torch.dtype | None:
        """The dtype of single elements that compare by their bit patterns; None where norms have to."""
        if self.numel_per_block() != 1:
            return None
        (element,) = self.resolve(values).values()
        return element.dtype if has_exact_keys(element.dtype) else None

    def resolve(self, values: Values) -> dict[BlockSpec, Tensor]:
        """Values in any of their forms as one view-shaped tensor for each BlockSpec."""
        if values is None:
            return {spec: spec.data for spec in self.blocks()}
        return {spec: spec.view.layout(one) for spec, one in self._given(values, "values").items()}

    def _given(self, values: Tensor | Mapping[BlockSpec, Tensor], what: str) -> dict[BlockSpec, Tensor]:
        """One tensor for each BlockSpec, in any shape."""
        specs = self.blocks()
        if isinstance(values, Tensor):
            if len(specs) != 1:
                raise SparsityError(
                    f"{self.name} has {len(specs)} members: give {what} as a mapping from block to tensor"
                )
            values = {specs[0]: values}
        missing = [spec.name for spec in specs if spec not in values]
        if missing:
            raise SparsityError(f"{self.name}: no {what} given for {', '.join(missing)}")
        return {spec: values[spec] for spec in specs}

    def marks(self, among: Values) -> dict[BlockSpec, Tensor]:
        """Marks of elements, in the forms that `apply_mask` takes, as one bool tensor for each BlockSpec."""
        if among is None:
            return {spec: torch.ones_like(spec.data, dtype=torch.bool) for spec in self.blocks()}
        return {spec: spec.view.by_view(one) != 0 for spec, one in self._given(among, "marks").items()}

    def marked(self, among: Values) -> Tensor:
        """Bool of `grid_shape`: the blocks of which some element is marked."""
        parts = self._fused(self.marks(among))
        return torch.stack([part.flatten(len(self.grid_shape)).any(-1) for part in parts]).any(0)

    def refuse_nan(self, elements: Mapping[BlockSpec, Tensor]) -> None:
        """SparsityError for a NaN, naming the tensor and the first place of it in the view."""
        if self.trusted:
            return
        for spec, tensor in elements.items():
            place = first_nan(tensor)
            if place is not None:
                raise NanScoreError(spec.name, place)

    def _fused(self, elements: Mapping[BlockSpec, Tensor]) -> list[Tensor]:
        device = self._device()
        return [spec.fuse(elements[spec], order).to(device) for spec, order in self.members]

    def _spread(self, grid: Tensor) -> dict[BlockSpec, Tensor]:
        """One number per block as one per element of each member's view, on its device."""
        return {
            spec: spec.spread(grid.permute(grids.inverse_order(order)).to(spec.view.param.device))
            for spec, order in self.members
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, grid={list(self.grid_shape)})"


class BlockSpec(SparseBlock):
    """Blocks of one view, all of one shape; -1 spans a dimension, an empty shape is one element.

    >>> rows = BlockSpec(torch.zeros(8, 6), (1, -1))
    >>> rows.grid_shape, rows.numel_per_block(), tuple(rows.block_view().shape)
    ((8, 1), 6, (8, 1, 1, 6))

    Raises:
        ShapeMismatchError: the shape has another rank than the view, or does not divide it.
    """

    def __init__(self, view: View | Tensor, shape: Sequence[int], name: str | None = None) -> None:
        self.view = View.from_existing(view)
        self.shape: Shape = grids.block_extents(self.view.shape, tuple(map(operator.index, shape)))
        self.grid_shape = grids.divide(self.view.shape, self.shape)
        self.name = name or "block"

    @property
    def members(self) -> tuple[tuple[BlockSpec, Shape], ...]:
        return ((self, grids.identity_order(len(self.grid_shape))),)

    @property
    def _identity(self) -> Hashable:
        return self.view, self.shape

    @property
    def data(self) -> Tensor:
        """The elements of the view, detached, in the parameter's storage: writes change the parameter."""
        return self.view.data

    def block_view(self, values: Values = None, reorder: bool = True, merge: bool = False) -> Tensor:  # noqa: FBT001, FBT002  (a fixed signature)
        """Elements by block.

        (G1, b1, G2, b2, ...), with `reorder` (G1, G2, ..., b1, b2, ...), with `merge` (which reorders)
        (G1, G2, ..., b1*b2*...). Without `merge` it is a view of the values.
        """
        (elements,) = self.resolve(values).values()
        return by_cell(elements, self.grid_shape, self.shape, reorder=reorder, merge=merge)

    def fuse(self, elements: Tensor, order: Shape) -> Tensor:
        """View-shaped elements as (*grid permuted by `order`, *block shape), sharing their storage."""
        rank = len(self.shape)
        return by_cell(elements, self.grid_shape, self.shape).permute((*order, *range(rank, 2 * rank)))

    def spread(self, grid: Tensor) -> Tensor:
        """One number per block as one per element of the view."""
        return over_cells(grid, self.grid_shape, self.shape).reshape(self.view.shape)

    def broadcast_block_to_element(self, grid: Tensor) -> Tensor:
        """One number per block (`grid_shape`) as one per element of the view (`view.shape`)."""
        return self.spread(self._on_grid(grid, "grid"))


def by_cell(tensor: Tensor, grid: Shape, cell: Shape, *, reorder: bool = True, merge: bool = False) -> Tensor:
    """A tensor whose first dimensions are a grid of cells: (G1, c1, G2, c2, ..., trailing).

    With `reorder` (G1, G2, ..., c1, c2, ..., trailing), with `merge` (G1, G2, ..., c1*c2*..., trailing).
    """
    rank, trailing = len(grid), tensor.shape[len(grid) :]
    split = tensor.reshape((*grids.interleaved(grid, cell), *trailing))
    if not (reorder or merge):
        return split
    ordered = split.permute((*range(0, 2 * rank, 2), *range(1, 2 * rank, 2), *range(2 * rank, split.ndim)))
    return ordered.reshape(*grid, prod(cell), *trailing) if merge else ordered


def over_cells(numbers: Tensor, grid: Shape, cell: Shape) -> Tensor:
    """One number per cell (`grid`) for each place of the cell: (G1, c1, G2, c2, ...)."""
    return numbers.reshape(grids.interleaved(grid, (1,) * len(cell))).expand(grids.interleaved(grid, cell))


def where_marked(elements: Tensor, mask: Tensor) -> Tensor:
    """The elements where a mask is True, bit for bit; +0.0 elsewhere."""
    bits = elements.view(INTEGERS[elements.element_size()])
    return (bits * mask.to(bits.dtype)).view(elements.dtype)


def zero_pruned(masks: Mapping[BlockSpec, Tensor]) -> None:
    """Write +0.0 where a mask is False; every other bit of the storage stays."""
    for spec, keep in masks.items():
        bits = spec.view.bits  # a product with 1 or 0 is many times faster than a masked fill
        bits.mul_(keep.to(bits.dtype))


class BlockCoupling(SparseBlock):
    """Fused blocks: `common[d] = grid_i[orders[i][d]]`; a fused block's norm is over all its elements.

    Without orders every grid is taken as it is.

    >>> up = BlockSpec(torch.zeros(8, 6), (1, -1), name="up")
    >>> down = BlockSpec(torch.zeros(6, 8), (-1, 1), name="down")
    >>> channel = BlockCoupling([up, down], [(0, 1), (1, 0)])
    >>> channel.grid_shape, channel.numel_per_block()
    ((8, 1), 12)

    Raises:
        CouplingError: grids that do not align, or an element that would belong to two members.
    """

    def __init__(self, specs: Sequence[BlockSpec], orders: Orders = None, name: str | None = None) -> None:
        self.specs = tuple(specs)
        self.name = name or "block coupling"
        shapes = [spec.grid_shape for spec in self.specs]
        self.grid_shape, self.orders = grids.align(shapes, orders, [spec.name for spec in self.specs])
        refuse_shared_elements(self.specs)

    @property
    def members(self) -> tuple[tuple[BlockSpec, Shape], ...]:
        return tuple(zip(self.specs, self.orders, strict=True))

    @property
    def _identity(self) -> Hashable:
        return self.specs, self.orders

    @property
    def data(self) -> dict[BlockSpec, Tensor]:
        """The elements of each member's view, sharing its parameter's storage."""
        return {spec: spec.data for spec in self.specs}

    def block_view(self, values: Values = None, reorder: bool = True, merge: bool = False) -> Tensor:  # noqa: ARG002, FBT001, FBT002  (a fixed signature)
        """Elements by fused block, members one after the other: (*grid_shape, elements per block).

        Members have blocks of unlike shape, so that only this form exists, with or without `merge`; unlike
        dtypes become float64.
        """
        if not reorder:
            raise SparsityError(f"{self.name}: the blocks of a coupling have no common interleaved form")
        parts = [part.reshape(*self.grid_shape, -1) for part in self._fused(self.resolve(values))]
        same = len({part.dtype for part in parts}) == 1
        return torch.cat(parts if same else [part.to(torch.float64) for part in parts], dim=-1)

    def broadcast_block_to_element(self, grid: Tensor) -> dict[BlockSpec, Tensor]:
        """One number per fused block (`grid_shape`) as one per element of each member's view."""
        return self._spread(self._on_grid(grid, "grid"))


def refuse_shared_elements(specs: Sequence[BlockSpec]) -> None:
    """CouplingError where one element of a storage would belong to two members."""
    by_storage: defaultdict[int, list[BlockSpec]] = defaultdict(list)
    for spec in specs:
        by_storage[storage_of(spec.view.param)].append(spec)
    for neighbours in by_storage.values():
        if disjoint([spec.view for spec in neighbours]):
            continue  # one pass for all members of a tensor
        for one, other in combinations(neighbours, 2):
            if one.view.overlaps(other.view):
                raise CouplingError(
                    f"{one.name} and {other.name} share elements: an element belongs to one member only"
                )
