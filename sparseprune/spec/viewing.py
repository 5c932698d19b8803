"""Views: a slice of a tensor and how it is looked at, as shape, stride and offset, from its shape alone.

Slices and explicit views are integer arithmetic, and so is what einops makes of a pattern. Called by
`binding`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from sparseprune.engine.grids import prod
from sparseprune.engine.rearranging import rearranged
from sparseprune.errors import ShapeMismatchError, SparsityError
from sparseprune.spec.expressions import ExpressionError
from sparseprune.spec.names import came_to, misfit
from sparseprune.spec.overlap import is_injective
from sparseprune.spec.problems import Misfit, shown
from sparseprune.spec.schema import ExplicitView
from sparseprune.spec.shaping import Layout, whole

if TYPE_CHECKING:
    from sparseprune.spec.bound import TensorInfo
    from sparseprune.spec.expressions import Expression, SliceEntry
    from sparseprune.spec.names import Names
    from sparseprune.spec.schema import TensorsTable

Axes = tuple[tuple[str, int], ...]


def layout_of(place: str, table: TensorsTable, tensor: TensorInfo, names: Names) -> Layout:
    """How a table looks at one of its tensors; Misfit where it cannot."""
    layout = whole(tensor.shape)
    if table.slice is None and table.view is None:
        return layout
    key = "slice"
    try:
        if table.slice is not None:
            layout = _sliced(layout, table.slice, names)
        if isinstance(table.view, ExplicitView):
            key = "view"
            layout = _explicit(tensor, table.view, names)
        elif table.view is not None:
            key = "axes"
            axes = tuple((name, names.integer(size, 1, "1 or more")) for name, size in table.axes)
            key = "view"
            layout = _rearranged(layout, table.view, axes)
    except ExpressionError as error:
        raise misfit(place, key, error, tensor.name) from error
    except SparsityError as error:
        raise Misfit(place, key, f"{tensor.name}: {error}") from error
    return layout


def _sliced(layout: Layout, entries: tuple[SliceEntry, ...], names: Names) -> Layout:
    if len(entries) != len(layout.shape):
        raise ShapeMismatchError(
            f"found {len(entries)} entries for the shape {list(layout.shape)}: "
            'give one for each dimension (":" takes all of it)'
        )
    bounds = [_bounds(entry, size, names) for entry, size in zip(entries, layout.shape, strict=True)]
    offset = sum(low * stride for (low, _), stride in zip(bounds, layout.stride, strict=True))
    return Layout(tuple([high - low for low, high in bounds]), layout.stride, offset)


def _bounds(entry: SliceEntry, size: int, names: Names) -> tuple[int, int]:
    if entry.is_whole:
        return 0, size
    low = 0 if entry.low is None else _bound(entry.low, size, size - entry.single, names)
    high = size if entry.high is None else _bound(entry.high, size, size, names)
    if entry.single:
        return low, low + 1
    if low >= high:
        raise ShapeMismatchError(f"{shown(entry.text)} is {low}:{high}, which takes nothing of {size}")
    return low, high


def _bound(bound: Expression, size: int, most: int, names: Names) -> int:
    """A bound counted from the front; ExpressionError where it lies outside."""
    found = names.value(bound)
    if isinstance(found, bool) or not isinstance(found, int) or not -size <= found <= most:
        raise came_to(bound, found, f"an integer from {-size} to {most}, as the dimension has {size}")
    return found + size if found < 0 else found


def _explicit(tensor: TensorInfo, view: ExplicitView, names: Names) -> Layout:
    shape = tuple([names.integer(size, 1, "1 or more") for size in view.shape])
    stride = tuple([names.integer(step, 0, "0 or more") for step in view.stride])
    layout = Layout(shape, stride, names.integer(view.offset, 0, "0 or more"))
    if len(shape) != len(stride):
        raise ShapeMismatchError(
            f"shape {list(shape)} and stride {list(stride)} must have one entry for each dimension"
        )
    last = layout.offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if last >= prod(tensor.shape):
        raise ShapeMismatchError(
            f"the view reaches element {last}, the tensor {list(tensor.shape)} has {prod(tensor.shape)}: "
            "strides and offset count elements of the row-major tensor"
        )
    if not is_injective(shape, stride):
        raise ShapeMismatchError(
            f"shape {list(shape)} with stride {list(stride)} has elements in common: "
            "each element may be seen at one place only"
        )
    return layout


@lru_cache(maxsize=256)
def _rearranged(layout: Layout, pattern: str, axes: Axes) -> Layout:
    seen = rearranged(layout.shape, layout.stride, pattern, dict(axes))
    return Layout(seen.shape, seen.stride, layout.offset)
