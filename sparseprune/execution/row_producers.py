"""Feeding: which members of a fused block are matrices that others of them only feed.

A block that holds all inputs of its rows (an MLP channel in `up`, a head in `q`) makes rows vanish, which
nothing in that matrix can make up for, and which nobody reads where the block's columns of another matrix
vanish too. Such members have no say. Pure arithmetic on bound shapes; called by inputs and reconstructed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparseprune.engine.grids import prod

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sparseprune.engine.grids import Shape
    from sparseprune.spec import BoundBlock


def taking_part(
    leaves: Sequence[BoundBlock], shapes: Mapping[str, Shape], dims: Mapping[str, int]
) -> list[BoundBlock]:
    """The leaves whose blocks hold some of the inputs of a row; all of them where each holds all.

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

    places = np.full((1,) * len(steps), leaf.view_offset, dtype=np.int64)
    for axis, (size, step) in enumerate(steps):
        line = np.arange(size, dtype=np.int64) * step
        places = places + line.reshape([-1 if axis == other else 1 for other in range(len(steps))])
    return len(np.unique(places // inner % features)) == features
