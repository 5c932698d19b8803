"""View: an injective, write-through, strided look at one tensor or a part of it.

Owns which storage elements a view reaches and how masks and values move between the layout of the
view and the layout of the parameter. Knows nothing of blocks; blocks are cut out of views.
"""

from __future__ import annotations

from itertools import pairwise
from operator import itemgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseprune.engine.dtypes import DTYPES, torch_dtype
from sparseprune.engine.grids import rearranged
from sparseprune.engine.scoring import INTEGERS
from sparseprune.errors import ShapeMismatchError, SparsityError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparseprune.engine.grids import Shape

PRUNABLE_DTYPES = tuple(torch_dtype(row.name) for row in DTYPES.values() if row.prunable)


class View:
    """A strided look at `param`; what is written through it is written into the parameter's storage.

    `stride` and `offset` count elements, `offset` from the parameter's first element. Invariant: no
    two places of the view share an element, and each is an element of the parameter.

    Views are equal if they look at the same elements of the same storage in the same shape and order. A hash
    never changes: after `.to(device)` moved a parameter to other memory, older views differ from newer ones.

    >>> w = torch.arange(8.0).view(2, 4)
    >>> View(w, (4, 2), (1, 4)).data[1]
    tensor([1., 5.])
    >>> View(w, (4, 2), (1, 4)) == View.from_existing(w.T), View.from_existing(w) == View.from_existing(w.T)
    (True, False)

    Raises:
        ShapeMismatchError: shape and stride of unlike length, or elements outside the parameter.
        SparsityError: overlapping elements, or a dtype that cannot be pruned.
    """

    __slots__ = ("_key", "offset", "param", "shape", "stride")

    def __init__(self, param: Tensor, shape: Sequence[int], stride: Sequence[int], offset: int = 0) -> None:
        self.param = param
        self.shape: Shape = tuple(shape)
        self.stride: Shape = tuple(stride)
        self.offset = offset
        _check_layout(self)
        begin = param.storage_offset() + offset
        self._key = (storage_of(param), param.dtype, self.shape, self.stride, begin)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, View):
            return NotImplemented
        return self._key == other._key and storage_of(self.param) == storage_of(other.param)

    def __hash__(self) -> int:
        return hash(self._key)

    @classmethod
    def from_existing(cls, tensor: Tensor | View) -> View:
        """The whole of a tensor as it lies in its storage; a View is returned as it is."""
        return tensor if isinstance(tensor, View) else cls(tensor, tensor.shape, tensor.stride())

    @classmethod
    def rearrange(cls, tensor: Tensor, pattern: str, **axes: int) -> View:
        """The view that an einops `rearrange` pattern describes, found on shapes alone.

        >>> View.rearrange(torch.zeros(4, 16), "m (k p j) -> m k j p", p=2, j=4).shape
        (4, 2, 4, 2)

        Raises:
            ShapeMismatchError: the pattern does not fit the shape.
            SparsityError: the result would be a copy, so that writes would be lost.
        """
        seen = rearranged(tuple(tensor.shape), tensor.stride(), pattern, axes)
        return cls(tensor, seen.shape, seen.stride)

    @property
    def data(self) -> Tensor:
        """The view as a tensor, detached, sharing the parameter's storage."""
        origin = self.param.detach()
        return origin.as_strided(self.shape, self.stride, origin.storage_offset() + self.offset)

    @property
    def bits(self) -> Tensor:
        """`data` as signed integers of the same width, for reading and writing bit patterns."""
        return self.data.view(INTEGERS[self.param.element_size()])

    @property
    def ndim(self) -> int:
        """How many dimensions the view has."""
        return len(self.shape)

    def numel(self) -> int:
        """How many elements the view has."""
        return torch.Size(self.shape).numel()

    @property
    def is_whole(self) -> bool:
        """Whether the view is the parameter itself: same shape, same layout."""
        return (
            self.shape == tuple(self.param.shape) and self.stride == self.param.stride() and not self.offset
        )

    def layout(self, values: Tensor) -> Tensor:
        """Parameter- or view-shaped values as a view-shaped tensor on the parameter's device.

        Where parameter and view have one shape but not one layout (a transposed square matrix), values
        are taken as parameter-shaped: they come from the parameter, as its gradient does.
        """
        if values.dtype.is_complex:
            raise SparsityError(f"values of {values.dtype} have no order: wanted real numbers")
        values = values.detach().to(self.param.device)
        if self.is_whole and tuple(values.shape) == self.shape:
            return values
        if values.shape == self.param.shape:
            twin = self._like_param(values.dtype)
            return twin.copy_(values).as_strided(self.shape, self.stride, self.offset)
        if tuple(values.shape) == self.shape:
            return values
        raise ShapeMismatchError(
            f"values of shape {list(values.shape)} fit neither the parameter {list(self.param.shape)} "
            f"nor its view {list(self.shape)}"
        )

    def by_view(self, tensor: Tensor) -> Tensor:
        """View-shaped elements as they are, else parameter-shaped ones as `layout`.

        Where the shapes are one, a tensor is taken as view-shaped, as `data` and masks are.
        """
        if tuple(tensor.shape) == self.shape:
            return tensor.detach().to(self.param.device)
        return self.layout(tensor)

    def to_param(self, mask: Tensor) -> Tensor:
        """A view-shaped bool mask as a contiguous one of the parameter's shape, True outside the view."""
        if tuple(mask.shape) != self.shape:
            raise ShapeMismatchError(
                f"mask of shape {list(mask.shape)} does not fit the view {list(self.shape)}"
            )
        if self.is_whole:
            return mask.contiguous()
        laid = self._like_param(torch.bool).fill_(value=True)
        laid.as_strided(self.shape, self.stride, self.offset).copy_(mask)
        return laid.contiguous()

    def _like_param(self, dtype: torch.dtype) -> Tensor:
        """Memory for another tensor in the parameter's layout, on its device."""
        param = self.param
        return torch.empty_strided(param.shape, param.stride(), dtype=dtype, device=param.device)

    def overlaps(self, other: View) -> bool:
        """Whether an element of the storage belongs to both views."""
        return storage_of(self.param) == storage_of(other.param) and not disjoint([self, other])

    def _span(self) -> tuple[int, int]:
        begin = int(self.param.storage_offset()) + self.offset
        return begin, begin + _extent(self.shape, self.stride)

    def __repr__(self) -> str:
        return f"View({list(self.shape)} of {list(self.param.shape)} {self.param.dtype})"


def storage_of(param: Tensor) -> int:
    """The identity of a tensor's storage, unique among storages in use."""
    return int(param.untyped_storage()._cdata)  # noqa: SLF001


def disjoint(views: Sequence[View]) -> bool:
    """Whether no element of one storage, which all these views look at, belongs to two of them."""
    spans = sorted(((*view._span(), view) for view in views if view.numel()), key=itemgetter(0))  # noqa: SLF001
    if len({view.param.element_size() for _, _, view in spans}) > 1:
        return False  # one storage read as two dtypes: no element can be told from another
    if all(one[1] <= other[0] for one, other in pairwise(spans)):
        return True
    first = spans[0][0]
    marks = torch.zeros(max(end for _, end, _ in spans) - first, dtype=torch.bool)
    for begin, _, view in spans:
        marks.as_strided(view.shape, view.stride, begin - first).fill_(value=True)
    return int(marks.sum()) == sum(view.numel() for view in views)


def _extent(shape: Shape, stride: Shape) -> int:
    """The number of storage elements from the first to the last that a layout reaches."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _check_layout(view: View) -> None:
    param = view.param
    if param.dtype not in PRUNABLE_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in PRUNABLE_DTYPES)
        raise SparsityError(f"tensors of {param.dtype} cannot be pruned: wanted one of {names}")
    if len(view.shape) != len(view.stride):
        raise ShapeMismatchError(
            f"view shape {list(view.shape)} and stride {list(view.stride)} must have one length"
        )
    if any(size < 0 for size in view.shape) or any(step < 0 for step in (*view.stride, view.offset)):
        raise ShapeMismatchError(
            f"view shape {list(view.shape)}, stride {list(view.stride)} and offset {view.offset} must not be "
            "negative"
        )
    _refuse_overlap("parameter", tuple(param.shape), param.stride())
    if view.numel() and not view.is_whole:
        _refuse_outside(view)
        _refuse_overlap("view", view.shape, view.stride)


def _refuse_outside(view: View) -> None:
    param = view.param
    extent = _extent(tuple(param.shape), param.stride()) if param.numel() else 0
    reach = view.offset + _extent(view.shape, view.stride)
    if reach > extent:
        raise ShapeMismatchError(
            f"view {list(view.shape)} with stride {list(view.stride)} and offset {view.offset} reaches "
            f"element {reach - 1} of the storage, the parameter {list(param.shape)} ends at {extent - 1}"
        )
    if extent == param.numel():
        return  # the parameter has no gaps that a view could fall into
    inside = torch.zeros(extent, dtype=torch.bool)
    inside.as_strided(param.shape, param.stride(), 0).fill_(value=True)
    if not inside.as_strided(view.shape, view.stride, view.offset).all():
        raise ShapeMismatchError(
            f"view {list(view.shape)} with stride {list(view.stride)} and offset {view.offset} reaches "
            f"storage between the elements of the parameter {list(param.shape)}, which has stride "
            f"{list(param.stride())}"
        )


def _refuse_overlap(what: str, shape: Shape, stride: Shape) -> None:
    """Refuses overlapping elements: nested strides have none, others are counted element by element."""
    reached, nested = 0, True
    for step, size in sorted(zip(stride, shape, strict=True)):
        nested = nested and (size <= 1 or step > reached)
        reached += max(0, size - 1) * step
    numel = torch.Size(shape).numel()
    if nested or not numel:
        return
    marks = torch.zeros(_extent(shape, stride), dtype=torch.bool)
    marks.as_strided(shape, stride, 0).fill_(value=True)
    if int(marks.sum()) != numel:
        raise SparsityError(
            f"{what} {list(shape)} with stride {list(stride)} is not injective: some of its elements "
            "share storage, so that one could be kept and pruned at once"
        )
