"""Elements of stored tensors as bit patterns in memory, and back to their place in the output.

Owns buffers and the order in which the elements of a box lie in them. Knows neither what is asked of the
elements nor, beyond boxes and runs, where they come from. The only way in which passes read and write.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from sparseprune.engine.dtypes import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from numpy.typing import NDArray

    from sparseprune.checkpoint import CopyRange, StagedOutput, StoredTensor, TensorReader
    from sparseprune.execution.boxes import Box, Run

    Bits = NDArray[Any]
    Mask = NDArray[np.uint8]
    Allocate = Callable[[int, np.dtype[Any]], Bits]


@dataclass(frozen=True, slots=True)
class Loaded:
    """The elements of a box as patterns: `flat` in the order of the storage, `view` as the leaf sees them.

    Both share memory; so do `mask` (1 where an element is kept) and `mask_view`, once `masked` made them.
    """

    box: Box
    flat: Bits
    view: Bits

    def masked(self) -> tuple[Mask, Mask]:
        """A new mask of the box, all 1: flat, and as the leaf sees it."""
        flat = np.ones(self.flat.size, dtype=np.uint8)
        return flat, _as_view(flat, self.box)


@dataclass(frozen=True, eq=False)
class TensorIO:
    """Reads from the input by `reader`, writes to `output`, if there is one; used from any thread.

    `tensors` are those of the input by name. The torch engine works on `device`. Work that takes long reports
    bytes by `passed`, with what they are of, and calls `check` between its steps, which raises GivenUpError
    where the run ends. `vectors` keeps small inputs that many chunks of one job need.
    """

    reader: TensorReader
    output: StagedOutput | None = None
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    device: str = "cpu"
    passed: Callable[[int, str], None] = lambda *_: None
    check: Callable[[], None] = lambda: None
    vectors: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def of_job(self) -> Self:
        """The same, with room for what the chunks of another job share."""
        return replace(self, vectors={})

    def copy(self, part: CopyRange) -> None:
        """Copy bytes that the input and the output share."""
        if self.output is None:
            raise TypeError("there is no output to write to")
        self.output.copy(part)

    def load(self, box: Box, allocate: Allocate | None = None) -> Loaded:
        """The elements of a box, in memory of their own, which `allocate` may give."""
        pattern = pattern_of(box.stored)
        flat = np.empty(box.numel, dtype=pattern) if allocate is None else allocate(box.numel, pattern)
        self._fill(box.stored, box.runs(), flat)
        return Loaded(box, flat, _as_view(flat, box))

    def load_run(self, stored: StoredTensor, run: Run) -> Bits:
        """Neighbouring elements of a tensor."""
        flat = np.empty(run[1], dtype=pattern_of(stored))
        self.read_run(stored, run[0], flat)
        return flat

    def read_run(self, stored: StoredTensor, first: int, flat: Bits) -> None:
        """Fill an array with neighbouring elements of a tensor, from element `first` on."""
        self.reader.read_into(stored, first * flat.itemsize, flat)

    def store(self, loaded: Loaded, mask: Mask) -> None:
        """Write the elements of a box, and its mask, both as they lie in the order of the storage."""
        done = 0
        for first, count in loaded.box.runs():
            self._write(loaded.box.stored, first, loaded.flat[done : done + count], mask[done : done + count])
            done += count

    def store_run(self, stored: StoredTensor, first: int, bits: Bits, mask: Mask) -> None:
        """Write neighbouring elements of a tensor and their mask."""
        self._write(stored, first, bits, mask)

    def _fill(self, stored: StoredTensor, runs: Iterable[Run], flat: Bits) -> None:
        size = flat.itemsize
        data = memoryview(flat.view(np.uint8).data)
        done = 0
        for first, count in runs:
            self.reader.read_into(stored, first * size, data[done * size : (done + count) * size])
            done += count

    def _write(self, stored: StoredTensor, first: int, bits: Bits, mask: Mask) -> None:
        if self.output is None:
            raise TypeError("there is no output to write to")
        self.output.write_weight(stored.name, first * bits.itemsize, bits.data)
        self.output.write_mask(stored.name, first, mask.data)


def pattern_of(stored: StoredTensor) -> np.dtype[Any]:
    """The unsigned integers that the elements of a tensor are read as."""
    return np.dtype(f"uint{DTYPES[stored.dtype].bits}")


def _as_view(flat: Bits, box: Box) -> Bits:
    """Elements in the order of the storage as the leaf sees them, sharing memory."""
    order = box.storage_order
    shaped = flat.reshape([box.extent[dim] for dim in order])
    return shaped.transpose(sorted(range(len(order)), key=order.__getitem__))
