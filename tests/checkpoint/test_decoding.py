"""Scales, zero points and weights of any elements of a tensor, against plain loops."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprune.checkpoint import Shard, StoredTensor, decoding
from sparseprune.checkpoint.codes import Beside, Codes
from sparseprune.checkpoint.header import TensorEntry

SHARD = Shard(Path("m.safetensors"), Path("m.safetensors"))  # type: ignore[arg-type]


class Memory:
    """A source of tensors in memory, which counts the bytes that are read of each."""

    def __init__(self, **tensors: np.ndarray) -> None:
        self.tensors = tensors
        self.read: dict[str, int] = dict.fromkeys(tensors, 0)

    def read_into(self, stored: StoredTensor, begin: int, buffer: Any) -> None:
        data = self.tensors[stored.name].tobytes()
        view = memoryview(buffer).cast("B") if buffer.size else memoryview(b"")
        assert begin + len(view) <= len(data)
        view[:] = data[begin : begin + len(view)]
        self.read[stored.name] += len(view)


def tensor(name: str, dtype: str, shape: tuple[int, ...], codes: Codes | None = None) -> StoredTensor:
    return StoredTensor(TensorEntry(name, dtype, shape, 0, 0), SHARD, codes)


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], list[tuple[int, int]], int]:
    """A shape, the edges of blocks over it, runs of elements, and the length from which rows go together."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    block = tuple(draw(st.integers(1, size)) for size in shape)
    numel = int(np.prod(shape))
    runs = []
    for _ in range(draw(st.integers(1, 4))):
        first = draw(st.integers(0, numel - 1))
        runs.append((first, draw(st.integers(1, numel - first))))
    return shape, block, runs, draw(st.sampled_from([1, 5, 10**6]))


def grid_of(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-size // edge) for size, edge in zip(shape, block, strict=True))


def by_loops(entries: np.ndarray, shape: tuple[int, ...], block: tuple[int, ...], runs: Any) -> list[Any]:
    found = []
    for first, count in runs:
        for flat in range(first, first + count):
            place = np.unravel_index(flat, shape)
            found.append(
                entries[tuple(int(at) // edge for at, edge in zip(place, block, strict=True))].item()
            )
    return found


@given(cases(), st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None)
def test_every_element_has_the_entries_of_its_blocks(case: Any, seed: int) -> None:
    shape, block, runs, long = case
    random = np.random.default_rng(seed)
    grid = grid_of(shape, block)
    scale = random.normal(size=grid).astype(np.float32)
    zero = random.integers(-100, 100, size=grid).astype(np.int8)
    codes = random.integers(-128, 128, size=int(np.prod(shape))).astype(np.int8)
    source: Any = Memory(scale=scale, zero=zero)
    beside = Beside(tensor("scale", "F32", grid), "F32", block)
    points = Beside(tensor("zero", "I8", grid), "I8", block)
    stored = tensor("w", "I8", shape, Codes("codes", scale=beside, zero_point=points))
    chosen = np.concatenate([codes[first : first + count] for first, count in runs])
    usual, decoding._LONG = decoding._LONG, long
    try:
        zeros = decoding.zero_patterns(source, stored, runs)
        assert zeros is not None
        flat = np.broadcast_to(zeros.view(np.int8), chosen.shape)
        assert flat.tolist() == by_loops(zero, shape, block, runs)
        above = (chosen.view(np.uint8) - zeros).astype(np.uint8)
        found = decoding.decoded(source, stored, above, runs)
    finally:
        decoding._LONG = usual
    points_of, scales_of = by_loops(zero, shape, block, runs), by_loops(scale, shape, block, runs)
    each = zip(chosen.tolist(), points_of, scales_of, strict=True)
    assert found.tolist() == [(code - point) * factor for code, point, factor in each]


def test_of_many_scales_those_are_read_that_are_asked_for() -> None:
    scale = np.arange(100_000, dtype=np.float32).reshape(1000, 100)
    source: Any = Memory(scale=scale)
    beside = Beside(tensor("scale", "F32", scale.shape), "F32", (1, 4))
    stored = tensor("w", "I8", (1000, 400), Codes("codes", scale=beside))
    runs = [(row * 400, 1) for row in range(0, 1000, 50)]
    assert decoding.scales(source, stored, runs).tolist() == [row * 100 for row in range(0, 1000, 50)]
    assert source.read["scale"] < 1000


@pytest.mark.parametrize("long", [1, 10**6])
def test_a_column_of_scales_is_read_in_one_piece(monkeypatch: pytest.MonkeyPatch, long: int) -> None:
    monkeypatch.setattr(decoding, "_LONG", long)
    scale = np.arange(8, dtype=np.float32).reshape(8, 1)
    source: Any = Memory(scale=scale)
    stored = tensor(
        "w", "I8", (8, 4), Codes("codes", scale=Beside(tensor("scale", "F32", (8, 1)), "F32", (1, 4)))
    )
    assert decoding.scales(source, stored, [(2, 13)]).tolist() == [0, 0, *[1] * 4, *[2] * 4, *[3] * 3]


def test_no_elements_have_no_entries() -> None:
    source: Any = Memory(scale=np.ones((2, 2), dtype=np.float32))
    beside = Beside(tensor("scale", "F32", (2, 2)), "F32", (1, 2))
    stored = tensor("w", "I8", (2, 4), Codes("codes", scale=beside))
    assert decoding.decoded(source, stored, np.empty(0, dtype=np.uint8), []).size == 0
