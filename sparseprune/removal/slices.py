"""Kept indices: which slices of a tensor survive along each dimension, from flags of blocks or of elements.

Owns the test whether survivors are whole slices. Reads no data and knows neither specs nor config.json.
Called by the rest of removal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.grids import Shape, prod

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from sparseprune.removal.preview import Look, Sliced
    from sparseprune.spec import BoundBlock

    Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class KeptIndices:
    """What survives of a tensor: for each dimension a flag for every index, and the number of elements.

    An index is kept where any element of its slice is. `shape` is the shape after the other slices are cut
    out; `cut` lists the dimensions in which something is dropped.
    """

    along: tuple[Flags, ...]
    elements: int
    shape: Shape = field(init=False)
    cut: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        shape = tuple(int(np.count_nonzero(flags)) for flags in self.along)
        cut = tuple(dim for dim, flags in enumerate(self.along) if shape[dim] < flags.size)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "cut", cut)

    @property
    def is_sliced(self) -> bool:
        """Whether whole slices are dropped and nothing else, so that cutting them out loses no survivor."""
        return self.is_empty or self.elements == prod(self.shape)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is dropped."""
        return self.elements == prod([flags.size for flags in self.along])

    @property
    def is_empty(self) -> bool:
        """Whether nothing survives."""
        return self.elements == 0


def kept_whole(shape: Shape) -> KeptIndices:
    """What survives where nothing is dropped."""
    return kept_slices([np.ones(size, dtype=np.bool_) for size in shape])


def kept_slices(along: Sequence[Flags]) -> KeptIndices:
    """What survives where every element is kept whose index is kept along each dimension."""
    return KeptIndices(tuple(along), prod([int(np.count_nonzero(flags)) for flags in along]))


def summed_up(kept: Mapping[str, KeptIndices]) -> str:
    """A text that differs whenever the kept indices differ."""
    parts = (
        f"{name}:{each.elements}:{','.join(np.packbits(flags).tobytes().hex() for flags in each.along)}"
        for name, each in kept.items()
    )
    return "\n".join(parts)


def kept_of(
    leaves: Iterable[tuple[BoundBlock, Flags]], look: Look, shapes: Mapping[str, Shape]
) -> dict[str, KeptIndices]:
    """What tensors keep where these blocks of their leaves survive, flat; leaves without slices are left out.

    Several leaves may share a tensor: an index is kept where all of them keep it.
    """
    kept: dict[str, KeptIndices] = {}
    known: dict[tuple[Shape, Sliced, bytes], KeptIndices] = {}  # thousands of tensors lose the same
    for leaf, blocks in leaves:
        found, name = look(leaf), leaf.tensor
        if found is None:
            continue
        key = (shapes[name], found, blocks.tobytes())
        if key not in known:
            known[key] = _of_leaf(shapes[name], found, blocks)
        kept[name] = known[key] if name not in kept else _both(kept[name], known[key])
    return {name: _nothing(each) if each.is_empty and each.cut else each for name, each in kept.items()}


def _of_leaf(shape: Shape, found: Sliced, blocks: Flags) -> KeptIndices:
    """What a tensor keeps of which these blocks survive; one without dimensions is kept or not."""
    if not shape:
        return KeptIndices((), int(blocks.all()))
    along = [np.ones(size, dtype=np.bool_) for size in shape]
    if along[found.dim].size:
        along[found.dim] = found.kept(blocks)
    return kept_slices(along)


def _both(one: KeptIndices, other: KeptIndices) -> KeptIndices:
    """What two rules leave of a tensor, each of which drops something."""
    return kept_slices([first & second for first, second in zip(one.along, other.along, strict=True)])


def _nothing(kept: KeptIndices) -> KeptIndices:
    """No index survives along any dimension, as a mask without survivors says it."""
    return KeptIndices(tuple(np.zeros(flags.size, dtype=np.bool_) for flags in kept.along), 0)
