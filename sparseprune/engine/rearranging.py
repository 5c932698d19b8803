"""What an einops pattern makes of a shape and its strides: integers, no tensor and no torch.

Owns reshaping and transposing of outlines, through which einops itself applies its pattern. A pattern that
would need a copy is refused. Called by View and by whoever binds a spec.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from sparseprune.errors import ShapeMismatchError, SparsityError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sparseprune.engine.grids import Shape


@dataclass(frozen=True, slots=True)
class Outline:
    """Shape and strides of a tensor that is not there."""

    shape: Shape
    stride: Shape

    def reshape(self, shape: Sequence[int]) -> Outline:
        """The same elements in the same order; SparsityError where no strides can say that."""
        stride = _strides(self, tuple(shape))
        if stride is None:
            raise SparsityError("a copy")
        return Outline(tuple(shape), stride)

    def transpose(self, order: Sequence[int]) -> Outline:
        """Dimension `order[d]` at place d."""
        return Outline(tuple(self.shape[dim] for dim in order), tuple(self.stride[dim] for dim in order))


def rearranged(shape: Shape, stride: Shape, pattern: str, axes: Mapping[str, int]) -> Outline:
    """The outline that an einops `rearrange` pattern makes of a tensor of this shape and stride.

    >>> rearranged((4, 16), (16, 1), "m (k p j) -> m k j p", {"p": 2, "j": 4})
    Outline(shape=(4, 2, 4, 2), stride=(16, 8, 1, 4))

    Raises:
        ShapeMismatchError: the pattern does not fit the shape.
        SparsityError: the result would be a copy, so that writes would be lost.
    """
    from einops import EinopsError, rearrange  # noqa: PLC0415  (half of the users never need it)

    _backend()
    try:
        seen: Any = rearrange(Outline(shape, stride), pattern, **axes)
    except EinopsError as error:
        raise ShapeMismatchError(
            f"pattern {pattern!r} does not fit a tensor of shape {list(shape)}: "
            f"{' '.join(str(error).split())}"
        ) from error
    except SparsityError as error:
        raise SparsityError(
            f"pattern {pattern!r} is no view of a tensor of shape {list(shape)} and stride {list(stride)}: "
            "it would need a copy, and what is written to a copy is lost"
        ) from error
    outline: Outline = seen
    return outline


def _backend() -> None:
    """Tell einops how outlines are reshaped: it finds the subclasses of its backends by itself."""
    from einops._backends import AbstractBackend  # noqa: PLC0415

    if any(backend.framework_name == "sparseprune" for backend in AbstractBackend.__subclasses__()):
        return

    class OutlineBackend(AbstractBackend):
        framework_name = "sparseprune"

        def is_appropriate_type(self, tensor: object) -> bool:
            return isinstance(tensor, Outline)


def _strides(outline: Outline, shape: Shape) -> Shape | None:
    """Strides for a new shape over the same elements, None where there are none.

    From the innermost dimension on, runs of old dimensions that lie together are cut into new ones.
    """
    if prod(outline.shape) == 0 or prod(shape) == 0:
        return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
    old = [(size, step) for size, step in zip(outline.shape, outline.stride, strict=True) if size > 1]
    new = list(shape)
    strides: list[int] = []
    while old:
        size, base = old.pop()
        while old and old[-1][1] == base * size:
            size *= old.pop()[0]
        step = base
        while size > 1 and new:
            extent = new.pop()
            if size % extent:
                return None
            strides.append(step)
            step, size = step * extent, size // extent
        if size > 1:
            return None
    strides += [strides[-1] if strides else 1] * len(new)
    return tuple(reversed(strides)) if prod(new) == 1 else None
