"""Elements of stored tensors as bit patterns in memory, and back to their place in the output.

Owns buffers and the order in which the elements of a region lie in them. Knows neither what is decided over
the elements nor, beyond regions and runs, where they come from. The only way in which passes read and write.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from sparseprune.checkpoint import read_kept
from sparseprune.checkpoint.decoding import decoded, zero_patterns
from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.kernels.counting import Tally, any_in, tally
from sparseprune.engine.kernels.formats import values_of
from sparseprune.engine.kernels.selecting import drop
from sparseprune.execution.devices import Lanes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from sparseprune.checkpoint import CopyRange, Sink, Source, StoredMask, StoredTensor
    from sparseprune.execution.regions import Region, Run
    from sparseprune.spec import BoundBlock

    Bits = NDArray[Any]
    Mask = NDArray[np.uint8]
    Allocate = Callable[[int, np.dtype[Any]], Bits]


_ALIGNED = 8  # bytes: numbers begin at multiples of their size


class Loaded(Struct, frozen=True):
    """The elements of a region as patterns: `flat` in the order of the storage, `view` as the leaf sees them.

    Both share memory; so do `mask` (1 where an element is kept) and `mask_view`, once `masked` made them.
    `stored` is the tensor that was read. Of codes the patterns are those above `zeros`, in the order of the
    storage, so that 0 is zero in every tensor; None where it is so in the file. Where an earlier mask bounds
    what may survive, `kept` has it, in the order of the storage, and what it drops is zero in `flat`.
    """

    region: Region
    stored: StoredTensor
    flat: Bits
    view: Bits
    zeros: Bits | None = None
    kept: Mask | None = None

    @property
    def kept_view(self) -> Mask | None:
        """`kept` as the leaf sees it."""
        return None if self.kept is None else _as_view(self.kept, self.region)

    @property
    def dtype(self) -> str:
        return self.stored.dtype

    def inside(self, kept: Mask) -> Loaded:
        """The same elements, in the same memory, of which those may survive that a mask keeps.

        `kept` has the order of the storage; what it drops becomes zero.
        """
        drop(self.flat, kept)
        return replace(self, kept=kept)

    def masked(self) -> tuple[Mask, Mask]:
        """A new mask of the region, all 1: flat, and as the leaf sees it."""
        flat = np.ones(self.flat.size, dtype=np.uint8)
        return flat, _as_view(flat, self.region)


@dataclass(frozen=True, eq=False)
class TensorIO:
    """Reads from the input by `reader`, writes to `output`, if there is one; used from any thread.

    `tensors` are those of the input by name. The torch engine works on `device`; `lanes` bound how much of it
    does so at one time. Work that takes long reports bytes by `passed`, with what they are of, and calls
    `check` between its steps, which raises GivenUpError where the run ends. `vectors` keeps small inputs that
    many chunks of one job need.
    """

    reader: Source
    output: Sink | None = None
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    device: str = "cpu"
    passed: Callable[[int, str], None] = lambda *_: None
    check: Callable[[], None] = lambda: None
    vectors: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    buffers: threading.local = field(default_factory=threading.local)
    lanes: Lanes = field(default_factory=Lanes)

    def of_job(self) -> Self:
        """The same, with room for what the chunks of another job share."""
        return dataclasses.replace(self, vectors={})

    def lane(self, nbytes: int) -> AbstractContextManager[None]:
        """What is done meanwhile takes up to so many bytes of the device, on a stream of its own."""
        return self.lanes.lane(self.device, nbytes)

    def itemsize(self, leaf: BoundBlock) -> int:
        """Bytes of an element of the tensor that a leaf looks at."""
        return pattern_of(self.tensors[leaf.tensor]).itemsize

    def nbytes(self, region: Region) -> int:
        return region.numel * self.itemsize(region.leaf)

    def files(self, leaves: Iterable[BoundBlock]) -> tuple[str, ...]:
        """The files of the output in which the tensors of some leaves lie."""
        return tuple(dict.fromkeys([str(self.tensors[leaf.tensor].shard.relative) for leaf in leaves]))

    def load(
        self, region: Region, stored: StoredTensor | None = None, allocate: Allocate | None = None
    ) -> Loaded:
        """The elements of a region, in memory of their own, which `allocate` may give.

        They are those of the leaf's tensor, or of `stored`, read by the leaf's strides.
        """
        stored = self.tensors[region.leaf.tensor] if stored is None else stored
        pattern = pattern_of(stored)
        flat = np.empty(region.numel, dtype=pattern) if allocate is None else allocate(region.numel, pattern)
        data, size, done = memoryview(flat.view(np.uint8).data), flat.itemsize, 0
        for first, count in region.runs():
            self.reader.read_into(stored, first * size, data[done * size : (done + count) * size])
            done += count
        zeros = zero_patterns(self.reader, stored, list(region.runs())) if stored.codes else None
        if zeros is not None:
            flat -= zeros
        return Loaded(region, stored, flat, _as_view(flat, region), zeros)

    def values(self, loaded: Loaded) -> NDArray[np.float64]:
        """The weights that the elements of a region stand for, as the leaf sees them."""
        return _as_view(self._decoded(loaded), loaded.region)

    def tally(self, loaded: Loaded) -> Tally:
        """Zeros and energy of a region: of the weights that codes stand for, where that is known."""
        codes, stored = loaded.stored.codes, loaded.stored
        if codes is None:
            return tally(loaded.flat, stored.dtype)
        if codes.packed:
            return Tally(loaded.flat.size)
        zero_bits = loaded.flat.dtype.type(DTYPES[stored.dtype].zero_bits or 0)
        zeros = loaded.flat.size - int(np.count_nonzero(loaded.flat & zero_bits))
        if codes.no_values:
            return Tally(loaded.flat.size, zeros, math.nan)
        return Tally(loaded.flat.size, zeros, tally(self._decoded(loaded).view(np.uint64), "F64").energy)

    def _decoded(self, loaded: Loaded) -> NDArray[np.float64]:
        return decoded(self.reader, loaded.stored, loaded.flat, list(loaded.region.runs()))

    def load_values(self, stored: StoredTensor, run: Run) -> NDArray[np.float64]:
        """The weights that neighbouring elements of a tensor are, or stand for."""
        flat = np.empty(run[1], dtype=pattern_of(stored))
        self.read_run(stored, run[0], flat)
        if stored.codes is None:
            return values_of(flat, stored.dtype).astype(np.float64, copy=False)
        return decoded(self.reader, stored, flat, [run])

    def inside(self, loaded: Loaded, masks: Sequence[StoredMask]) -> Loaded:
        """The same elements, in the same memory, where a mask of their tensor bounds what may survive.

        What it drops becomes zero; without a mask of their tensor they are as they were.
        """
        for mask in masks:
            if mask.name == loaded.region.leaf.tensor:
                return loaded.inside(self.kept(mask, loaded.region))
        return loaded

    def kept(self, mask: StoredMask, region: Region) -> Mask:
        """What a mask of the leaf's tensor keeps of a region, in the order of the storage."""
        flat, done = np.empty(region.numel, dtype=np.uint8), 0
        for first, count in region.runs():
            flat[done : done + count] = read_kept(self.reader, mask, first, count)
            done += count
        return flat

    def kept_blocks(self, mask: StoredMask, region: Region) -> Mask:
        """1 for each block of a region of which a mask keeps an element, on that part of the grid."""
        return any_in(_as_view(self.kept(mask, region), region), region.leaf.shape)

    def load_alike(self, region: Region, leaves: Sequence[BoundBlock]) -> Bits:
        """The region of one leaf, and the same region of others that look alike: (leaves, *extent)."""
        bits = np.empty((len(leaves), region.numel), dtype=pattern_of(self.tensors[leaves[0].tensor]))
        runs, size = list(region.runs()), bits.itemsize
        for leaf, row in zip(leaves, bits.view(np.uint8), strict=True):
            data, done, shift = memoryview(row.data), 0, leaf.view_offset - region.leaf.view_offset
            for first, count in runs:
                part = data[done * size : (done + count) * size]
                self.reader.read_into(self.tensors[leaf.tensor], (first + shift) * size, part)
                done += count
            self._above_zero(
                self.tensors[leaf.tensor],
                row.view(bits.dtype),
                [(first + shift, count) for first, count in runs],
            )
        order = region.storage_order
        shaped = bits.reshape(len(leaves), *(region.extent[dim] for dim in order))
        return shaped.transpose(0, *(1 + place for place in sorted(range(len(order)), key=order.__getitem__)))

    def load_run(self, stored: StoredTensor, run: Run) -> Bits:
        """Neighbouring elements of a tensor, as they are in the file."""
        flat = np.empty(run[1], dtype=pattern_of(stored))
        self.reader.read_into(stored, run[0] * flat.itemsize, flat)
        return flat

    def scratch(self, name: str, count: int, dtype: str) -> Bits:
        """Memory of this thread for so many numbers, until it asks for the same name again."""
        buffer: NDArray[np.uint8] | None = getattr(self.buffers, name, None)
        nbytes = count * np.dtype(dtype).itemsize
        if buffer is None or buffer.size < nbytes:
            buffer = np.empty(nbytes, dtype=np.uint8)
            setattr(self.buffers, name, buffer)
        return buffer[:nbytes].view(dtype)

    def read_whole(self, tensors: Sequence[StoredTensor]) -> Iterator[NDArray[np.uint8]]:
        """The bytes of several small tensors, of which 0 is zero; neighbours in a file are read together."""
        for together in _neighbours(tensors):
            first, last = together[0].entry, together[-1].entry
            nbytes = last.end - first.begin
            span = replace(together[0], entry=replace(first, dtype="U8", shape=(nbytes,), end=last.end))
            data = np.empty(nbytes, dtype=np.uint8)
            self.reader.read_into(span, 0, data)
            for stored in together:
                begin = stored.entry.begin - first.begin
                own = data[begin : begin + stored.nbytes]
                own = own if begin % _ALIGNED == 0 else own.copy()
                if stored.codes is not None and stored.codes.zero_point is not None:
                    self._above_zero(stored, own.view(pattern_of(stored)), [(0, stored.numel)])
                yield own

    def read_run(self, stored: StoredTensor, first: int, flat: Bits) -> None:
        """Fill an array with neighbouring elements of a tensor, from `first` on; 0 is zero in it."""
        self.reader.read_into(stored, first * flat.itemsize, flat)
        self._above_zero(stored, flat, [(first, flat.size)])

    def _above_zero(self, stored: StoredTensor, flat: Bits, runs: Sequence[Run]) -> None:
        """Make patterns of the elements of some runs those of which 0 is zero."""
        zeros = zero_patterns(self.reader, stored, runs) if stored.codes else None
        if zeros is not None:
            flat -= zeros

    def store(self, loaded: Loaded, mask: Mask | None) -> None:
        """Write the elements of a region, and its mask, both as they lie in the order of the storage."""
        done, flat = 0, loaded.flat if loaded.zeros is None else loaded.flat + loaded.zeros
        output, name = self._writable(), loaded.stored.name
        for first, count in loaded.region.runs():
            part = slice(done, done + count)
            output.write_weight(name, first * flat.itemsize, flat[part].data)
            if mask is not None:
                output.write_mask(name, first, mask[part].data)
            done += count

    def copy(self, part: CopyRange) -> None:
        """Copy bytes that the input and the output share."""
        self._writable().copy(part)

    def _writable(self) -> Sink:
        if self.output is None:
            raise TypeError("there is no output to write to")
        return self.output


def pattern_of(stored: StoredTensor) -> np.dtype[Any]:
    """The unsigned integers that the elements of a tensor are read as."""
    return np.dtype(f"uint{DTYPES[stored.dtype].bits}")


def _neighbours(tensors: Sequence[StoredTensor]) -> Iterator[Sequence[StoredTensor]]:
    """The tensors in their order, those together that follow each other in a file."""
    begin = 0
    for end in range(1, len(tensors) + 1):
        last = tensors[end - 1]
        following = tensors[end] if end < len(tensors) else None
        if following is None or following.shard != last.shard or following.entry.begin != last.entry.end:
            yield tensors[begin:end]
            begin = end


def _as_view(flat: Bits, region: Region) -> Bits:
    """Elements in the order of the storage as the leaf sees them, sharing memory."""
    order = region.storage_order
    shaped = flat.reshape([region.extent[dim] for dim in order])
    return shaped.transpose(sorted(range(len(order)), key=order.__getitem__))
