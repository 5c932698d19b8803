"""Ranking: the numbers by which the blocks of a task are compared, from its weights and its score's file.

Owns reading them region by region and refusing NaN; the kinds of scores are rows of scores. Gives numbers for
the elements of a region, or scores for a part of a block grid; the engine chooses. Numpy alone: no torch.
"""

from __future__ import annotations

import operator
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from sparseprune.checkpoint.statistics import ROUTING
from sparseprune.engine.grids import prod
from sparseprune.engine.kernels.counting import first_nonfinite
from sparseprune.engine.kernels.formats import FORMATS, values_of
from sparseprune.errors import SparsityError
from sparseprune.execution.regions import Region, grid_region

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparseprune.checkpoint import StatisticsKind, StoredTensor
    from sparseprune.engine.grids import Shape
    from sparseprune.engine.kernels.formats import Format
    from sparseprune.execution.inputs import Role, TaskInput
    from sparseprune.execution.plan import Task
    from sparseprune.execution.regions import AnyBlock, Part
    from sparseprune.execution.tensor_io import Bits, Loaded, TensorIO

    Floats = NDArray[np.float64]

_FILE_OF = {"values": "score", "vector": "score", "blocks": "score", "conditioners": "conditioner"}


class Elements(Struct, frozen=True):
    """Numbers as the leaf sees them: patterns of a dtype that can be pruned.

    `may_be_infinite`: infinity is a number like others here, a score that is that high. `weights`: they are
    those of the tensor and of nothing else.
    """

    bits: Bits
    dtype: str
    may_be_infinite: bool = False
    weights: bool = False

    def magnitudes(self) -> Floats:
        """Their magnitudes in float64; NaN stays NaN."""
        form = FORMATS.get(self.dtype)
        if form is None:
            return np.abs(self.bits.view(f"int{8 * self.bits.itemsize}").astype(np.float64))
        return form.values(np.bitwise_and(self.bits, self.bits.dtype.type(form.magnitude), order="C"))

    def without_rank(self) -> NDArray[np.bool_]:
        """Which of them are not finite, and so have no rank."""
        form = FORMATS.get(self.dtype)
        if form is None:
            return np.zeros(self.bits.shape, dtype=np.bool_)
        first = form.largest + 1 if self.may_be_infinite else form.infinity
        without: NDArray[np.bool_] = (self.bits & self.bits.dtype.type(form.magnitude)) >= first
        return without


class Ranking:
    """The scores of one task; reads what it needs of its files, a region at a time, from any thread."""

    def __init__(self, task: Task, io: TensorIO) -> None:
        self._score = task.instance.score
        self._kind = task.score_kind
        self._task = task
        self._io = io
        self._inputs: dict[tuple[Role, str], TaskInput] = {(one.role, one.key): one for one in task.inputs}

    @property
    def prunes_nonfinite(self) -> bool:
        """Whether a block in which something is not finite ranks below all others; else that is an error."""
        return self._score.nonfinite == "prune"

    @property
    def norm(self) -> float:
        """The order of the norm over a block's elements."""
        return self._kind.norm_of(self._score)

    @property
    def rms(self) -> bool:
        """Whether norms are divided by the root of a block's elements."""
        return self._score.normalize

    def elements(self, loaded: Loaded) -> Elements | None:
        """What the elements of a region count in place of their patterns; None where these count.

        What an earlier mask drops counts nothing.

        Raises:
            SparsityError: NaN in a score file that may have none, a negative norm or Hessian diagonal.
        """
        elements, kept = self._elements(loaded), loaded.kept_view
        if elements is None or kept is None:
            return elements
        zero = elements.bits.dtype.type(0)
        return replace(elements, bits=np.where(kept.view(np.bool_), elements.bits, zero))

    def _elements(self, loaded: Loaded) -> Elements | None:
        kind = self._kind
        if kind.ranks_blocks or self._task.ranks_patterns:
            return None
        if kind.elements is None and kind.reads is not None:
            return self._file_elements("values", loaded.region)
        scores = self._magnitudes(loaded)
        if kind.elements is None:
            return Elements(scores.view(np.uint64), "F64", weights=True)
        with np.errstate(over="ignore", invalid="ignore"):  # who ranks the result checks it
            if kind.reads is None:
                scores = kind.elements(scores)
            elif (kind.reads, loaded.region.leaf.tensor) not in self._inputs:
                scores.fill(0.0)  # members without statistics count 0
            elif kind.reads == "vector":
                scores = kind.elements(scores, self._along(loaded))
            else:
                scores = kind.elements(scores, self._file_elements("values", loaded.region).magnitudes())
        return Elements(scores.view(np.uint64), "F64")

    def _magnitudes(self, loaded: Loaded) -> Floats:
        """Of the weights of a region, or of those that its codes stand for."""
        if loaded.stored.codes is None or self._task.codes != "values":
            return Elements(loaded.view, loaded.dtype).magnitudes()
        values = self._io.values(loaded)
        return np.abs(values, out=values)

    def conditioners(self, region: Region) -> Elements | None:
        """The diagonal that soft thresholding is conditioned by, None where no file was given."""
        if ("conditioners", region.leaf.tensor) not in self._inputs:
            return None
        return self._file_elements("conditioners", region)

    def block_scores(self, block: AnyBlock, part: Part) -> Floats | None:
        """Ready scores for a part of a block grid, float64 of its shape; None where elements are ranked."""
        if self._kind.blocks is not None:
            numbers = numbers_in(block.grid_shape, part).astype(np.uint64)
            return self._kind.blocks(self._score, block.label, numbers)
        if self._kind.reads not in {"blocks", "router", "routing"}:
            return None
        one = self._inputs["blocks", block.label]
        stored = one.stored
        if one.experts is not None:
            read = {"router": self._row_norms, "routing": self._of_routing, "blocks": self._of_experts}
            scores: Floats = read[self._kind.reads](one)
            return scores[numbers_in(block.grid_shape, part)]
        loaded = self._io.load(grid_region(block, part), stored)
        self._refuse_nan(loaded.view, stored, block.label, "blocks")
        return values_of(loaded.view, stored.dtype).astype(np.float64)

    def _of_experts(self, one: TaskInput) -> Floats:
        """The scores of some experts, from a vector with one for each of a layer."""
        bits = self._io.load_run(one.stored, one.experts or (0, one.stored.numel))
        self._refuse_nan(bits, one.stored, one.key, "blocks")
        return values_of(bits, one.stored.dtype).astype(np.float64)

    def _of_routing(self, one: TaskInput) -> Floats:
        """REAP: the mean of gate times output norm over an expert's tokens; without any it ranks last."""
        first, number = one.experts or (0, 1)
        run = (first * len(ROUTING), number * len(ROUTING))
        self._refuse_nan(self._io.load_run(one.stored, run), one.stored, one.key, "blocks")
        numbers = self._io.load_values(one.stored, run).reshape(number, len(ROUTING))
        tokens, sums = (numbers[:, ROUTING.index(name)] for name in ("tokens", "gated_norm"))
        means = np.full(number, -np.inf)
        np.divide(sums, tokens, out=means, where=tokens > 0)
        return means

    def _row_norms(self, one: TaskInput) -> Floats:
        """The norms of the rows that a router has for some experts, which lie along dimension `dim`."""
        first, number = one.experts or (0, one.stored.shape[one.dim])
        norms = np.empty(number, dtype=np.float64)
        for place, expert in enumerate(range(first, first + number)):
            row = self._row(one, expert)
            if not np.isfinite(row).all():
                text = f"NaN or infinity in the row of expert {expert}, which has no rank: repair the tensor"
                raise SparsityError(f"{one.stored.name}: {text}")
            norms[place] = np.linalg.norm(row, self.norm)
        return norms

    def _row(self, one: TaskInput, expert: int) -> Floats:
        """The weights that a router has for an expert."""
        experts, width = one.stored.shape[one.dim], one.stored.shape[1 - one.dim]
        if one.dim == 0:
            return self._io.load_values(one.stored, (expert * width, width))
        return np.ascontiguousarray(self._io.load_values(one.stored, (0, one.stored.numel))[expert::experts])

    def _file_elements(self, role: Role, region: Region) -> Elements:
        stored = self._inputs[role, region.leaf.tensor].stored
        bits = self._io.load(region, stored).view
        self._refuse_nan(bits, stored, region.leaf.tensor, role)
        return Elements(bits, stored.dtype, may_be_infinite=True)

    def _refuse_nan(self, bits: Bits, stored: StoredTensor, key: str, role: Role) -> None:
        elements = Elements(bits, stored.dtype, may_be_infinite=True)
        if not self.prunes_nonfinite and elements.without_rank().any():
            raise SparsityError(
                f"{key}: there is NaN in its {_FILE_OF[role]} file: it has no rank among the scores "
                f"({stored.shard.path})"
            )

    def _along(self, loaded: Loaded) -> Floats:
        """The number of each element of a region, by its place along one dimension of the weight."""
        region, shape = loaded.region, loaded.stored.shape
        one = self._inputs["vector", region.leaf.tensor]
        numbers = self._io.vectors.get(one.key)
        if numbers is None:  # as often as there are threads at the most
            numbers = self._io.vectors[one.key] = self.vector(one)
        dim = one.dim % len(shape)
        if numbers.ndim == len(shape) == 2:  # of matrices that lie one below another
            shape, dim = (len(numbers), shape[0] // len(numbers), shape[1]), dim + 1
        return along(region, numbers, shape, dim)

    def vector(self, one: TaskInput) -> Floats:
        """What weights are multiplied with: (features,), or (matrices, features) of a stack with several."""
        shape = one.stored.shape
        wanted: StatisticsKind = self._kind.statistic
        if one.form == "hessian":
            bits = diagonals(one.stored, self._io)
            shape = shape[:-1]
        else:
            bits = self._io.load_run(one.stored, (0, one.stored.numel))
        self._refuse_nan(bits, one.stored, one.key, "vector")
        elements = Elements(bits, one.stored.dtype)
        if _is_negative(elements):
            is_norm = wanted == "norm" and one.form != "hessian"
            what = "a norm of its inputs" if is_norm else "the diagonal of the Hessian"
            raise SparsityError(
                f"{one.key}: {what} in the score file is negative somewhere: calibrate again "
                f"({one.stored.shard.path})"
            )
        numbers = elements.magnitudes().reshape(shape)
        if one.form is None or one.form == wanted:
            return numbers
        return np.sqrt(numbers) if wanted == "norm" else np.square(numbers)


def along(region: Region, numbers: Floats, shape: Shape, dim: int) -> Floats:
    """The number of each element of a region, by its place along `dim` of a tensor of this shape.

    Broadcasts to the region. `numbers` are (size,), or (matrices, size) where a stack has some for each.
    """
    inner = prod(shape[dim + 1 :])
    if numbers.ndim == 1 and region.leaf.view_shape == shape:
        own = numbers[region.begin[dim] : region.begin[dim] + region.extent[dim]]
        return own.reshape([-1 if other == dim else 1 for other in range(len(shape))])
    if numbers.ndim == 1 and len(region.extent) == 1 and region.leaf.view_stride == (1,):
        return _repeated(numbers, inner, region.first, region.numel)
    flat = region.first + places_in(region.extent, region.leaf.view_stride)
    places = flat // inner % shape[dim]
    return numbers[places] if numbers.ndim == 1 else numbers[flat // prod(shape[1:]), places]


def diagonals(stored: StoredTensor, io: TensorIO, some: range | None = None) -> Bits:
    """The diagonals of (..., size, size) as they are in the file, one after the other: of all, or of some."""
    size = stored.shape[-1]
    numbers = range(prod(stored.shape[:-2])) if some is None else some
    firsts = numbers.start * size**2 + places_in((len(numbers), size), (size**2, size + 1))
    return np.concatenate([io.load_run(stored, (first, 1)) for first in firsts.reshape(-1).tolist()])


def _repeated(numbers: Floats, inner: int, first: int, count: int) -> Floats:
    """What belongs to `count` neighbouring elements, `first` the first, when each number is for `inner`."""
    begin, end = first // inner, -(-(first + count) // inner)
    each = np.resize(np.roll(numbers, -(begin % numbers.size)), end - begin)
    skipped = first - begin * inner
    return each if inner == 1 else np.repeat(each, inner)[skipped : skipped + count]


def places_in(sizes: Shape, steps: Shape) -> NDArray[np.int64]:
    """The sum of place times step over all dimensions, of the shape `sizes`."""
    lines = [np.arange(size, dtype=np.int64) * step for size, step in zip(sizes, steps, strict=True)]
    total: NDArray[np.int64] = reduce(np.add.outer, lines, np.zeros((), dtype=np.int64))
    return total


def numbers_in(grid: Shape, part: Part) -> NDArray[np.int64]:
    """The numbers of the blocks of a part of a grid, row-major in the whole grid."""
    steps = tuple(prod(grid[dim + 1 :]) for dim in range(len(grid)))
    first = sum(begin * step for begin, step in zip(part.begin, steps, strict=True))
    return first + places_in(part.extent, steps)


def _is_negative(elements: Elements) -> bool:
    """Whether a number is below 0; -0.0 is not."""
    bits, form = elements.bits, FORMATS.get(elements.dtype)
    if form is None:
        return bool((bits.view(f"int{8 * bits.itemsize}") < 0).any())
    magnitude = bits.dtype.type(form.magnitude)
    return bool(((bits > magnitude) & ((bits & magnitude) > 0)).any())


def refuse_nonfinite(loaded: Loaded, elements: Elements | None = None) -> None:
    """SparsityError for NaN or infinity among what ranks the elements of a region, by default the weights."""
    form = FORMATS.get(loaded.dtype)
    if elements is None and (form is None or first_nonfinite(loaded.flat, form) < 0):
        return
    ranked = Elements(loaded.view, loaded.dtype) if elements is None else elements
    if not ranked.may_be_infinite:
        wrong = ranked.without_rank()
        if wrong.any():
            place = tuple(int(index) for index in np.unravel_index(int(np.argmax(wrong)), wrong.shape))
            element = Elements(np.atleast_1d(ranked.bits[place]), ranked.dtype)
            scored = elements is not None and not elements.weights
            raise _nonfinite_error(loaded, place, element, scored=scored)


def refuse_nonfinite_bits(loaded: Loaded, form: Format) -> None:
    """As `refuse_nonfinite` by compiled loops, of weights that are one run."""
    place = first_nonfinite(loaded.flat, form)
    if place >= 0:
        raise _nonfinite_error(loaded, (place,), Elements(loaded.flat[place : place + 1], form.name))


def _nonfinite_error(
    loaded: Loaded, place: Shape, element: Elements, *, scored: bool = False
) -> SparsityError:
    """The error for an element that is not finite, at a place of a region; `scored` by a score file."""
    region, shape = loaded.region, loaded.stored.shape
    flat = region.first + sum(map(operator.mul, place, region.leaf.view_stride))
    where = list(map(int, np.unravel_index(flat, shape))) if shape else []
    what = "NaN" if np.isnan(element.magnitudes()).any() else "infinity"
    source, files = (" as its score", " or the score file") if scored else ("", "")
    return SparsityError(
        f"{loaded.region.leaf.tensor}: {what}{source} at {where}: it has no rank among the "
        f"scores; repair the tensor{files}, leave it out of the spec, or, where the mode is hard, say "
        'nonfinite = "prune" in its score'
    )
