"""Geometry: whether the blocks of a leaf are whole slices of its tensor, told by shapes alone.

Owns the way from a view's strides to indices of the stored dimensions. Reads nothing; imports numpy only
where indices are asked for. Called by whoever asks what a spec could remove.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparseprune.engine.grids import Shape, prod

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sparseprune.spec import BoundBlock


@dataclass(frozen=True, slots=True)
class _Axis:
    """A dimension of a view that has more than one place: in which stored dimension, in steps of what."""

    view_dim: int
    dim: int
    step: int
    size: int


@dataclass(frozen=True, slots=True)
class Sliced:
    """Blocks of a leaf as slices along the dimension `dim` of its tensor, which has `size` indices there.

    `begin` is the first index that the leaf reaches.
    """

    leaf: BoundBlock
    dim: int
    size: int
    begin: int
    axes: tuple[_Axis, ...]

    def kept(self, blocks: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Flags of the indices that survive with these blocks (flat), those out of reach among them."""
        import numpy as np  # noqa: PLC0415  (a plan of what cannot be removed does without)

        index, block = np.full(1, self.begin), np.zeros(1, dtype=np.int64)
        grid = self.leaf.grid_shape
        for axis in self.axes:
            if axis.dim == self.dim:
                places = np.arange(axis.size)
                within = places // self.leaf.shape[axis.view_dim] * prod(grid[axis.view_dim + 1 :])
                index = (index[:, None] + places * axis.step).reshape(-1)
                block = (block[:, None] + within).reshape(-1)
        flags = np.ones(self.size, dtype=np.bool_)
        if blocks.size:
            flags[index] = blocks[block]
        return flags


def sliced(leaf: BoundBlock, shape: Shape) -> Sliced | None:
    """The blocks of a leaf as slices of its tensor, which has this shape; None where they are no such thing.

    A slice has every element of the tensor at its indices. One block that is the whole tensor is a slice that
    has all indices of the first dimension.
    """
    shape = shape or (1,)
    if 0 in shape:
        return Sliced(leaf, 0, shape[0], 0, ())
    steps = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
    begin = tuple(leaf.view_offset // step % size for step, size in zip(steps, shape, strict=True))
    axes = []
    for view_dim, (size, stride) in enumerate(zip(leaf.view_shape, leaf.view_stride, strict=True)):
        if size > 1:
            axis = _axis(view_dim, size, stride, shape, steps)
            if axis is None:
                return None
            axes.append(axis)
    reach, last = [1] * len(shape), list(begin)
    for axis in axes:
        reach[axis.dim] *= axis.size
        last[axis.dim] += (axis.size - 1) * axis.step
    if any(end >= size for end, size in zip(last, shape, strict=True)):
        return None
    grid = leaf.grid_shape
    cut = {dim for dim, (size, whole) in enumerate(zip(reach, shape, strict=True)) if size < whole}
    cut |= {axis.dim for axis in axes if grid[axis.view_dim] > 1}
    if len(cut) > 1:
        return None
    dim = cut.pop() if cut else 0
    return Sliced(leaf, dim, shape[dim], begin[dim], tuple(axes))


def _axis(view_dim: int, size: int, stride: int, shape: Shape, steps: Shape) -> _Axis | None:
    """The stored dimension in which a dimension of the view lies."""
    for dim, (step, whole) in enumerate(zip(steps, shape, strict=True)):
        if whole > 1 and step <= stride:
            return _Axis(view_dim, dim, stride // step, size) if stride % step == 0 else None
    return None
