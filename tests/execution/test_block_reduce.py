"""Passing: sums and maxima of blocks that pass by in chunks are those of engine.scoring, bit for bit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprune.engine.dtypes import torch_dtype
from sparseprune.engine.kernels.formats import FORMATS
from sparseprune.engine.scoring import INTEGERS, block_exponents, fused_norms, pairwise_sum, power_of_two
from sparseprune.execution.block_norms import LeafMaxima, LeafSums
from sparseprune.execution.ranking import Elements
from sparseprune.execution.regions import sweep_of, whole_region
from sparseprune.execution.tensor_io import TensorIO, pattern_of
from tests.execution.test_regions import elements_of, leaves, row_major, stored_tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparseprune.checkpoint import StoredTensor, TensorReader
    from sparseprune.execution.tensor_io import Loaded
    from sparseprune.spec import BoundBlock

    Floats = NDArray[np.float64]

DTYPES = tuple(FORMATS)
NARROW = tuple(name for name in DTYPES if name != "F64")


@dataclass
class Memory:
    """A reader over patterns that are in memory."""

    bits: NDArray[Any]

    def read_into(self, stored: StoredTensor, begin: int, buffer: memoryview) -> None:
        data = self.bits.tobytes()[begin : begin + len(buffer)]
        assert len(data) == len(buffer)
        buffer[:] = data


@dataclass
class Passing:
    """A leaf over drawn numbers: to pass by in chunks, and whole as the engine sees it."""

    leaf: BoundBlock
    stored: StoredTensor
    bits: NDArray[Any]

    @property
    def io(self) -> TensorIO:
        return TensorIO(cast("TensorReader", Memory(self.bits)), tensors={self.leaf.tensor: self.stored})

    def chunks(self, elements: int) -> list[Loaded]:
        sweep = sweep_of(self.leaf, elements)
        assert sweep is not None
        return [self.io.load(region) for region in sweep.regions()]

    def blocks(self) -> torch.Tensor:
        """Float tensor (*grid, *block): the elements of each block."""
        order = elements_of(whole_region(self.leaf))
        signed = torch.from_numpy(self.bits.view(f"int{8 * self.bits.itemsize}")[order])
        elements = signed.view(torch_dtype(self.stored.dtype)).reshape(self.leaf.view_shape)
        rank = len(self.leaf.shape)
        pairs = [n for pair in zip(self.leaf.grid_shape, self.leaf.shape, strict=True) for n in pair]
        return elements.reshape(pairs).permute(*range(0, 2 * rank, 2), *range(1, 2 * rank, 2))

    def sums(self, elements: int, power: int, exponents: Any = None, *, ranked: bool = False) -> Floats:
        sweep = sweep_of(self.leaf, elements)
        assert sweep is not None
        sums = LeafSums(sweep, power, exponents)
        for loaded in self.chunks(elements):
            sums.add(loaded, Elements(loaded.view.copy(), self.stored.dtype) if ranked else None)
        return sums.result()


def patterns(dtype: str, count: int, seed: int) -> NDArray[Any]:
    """Finite numbers of either sign, of all magnitudes or of such as show in what order they were added."""
    form = FORMATS[dtype]
    chance = np.random.default_rng(seed)
    if seed % 2:
        keys = chance.integers(0, form.infinity, count, dtype=np.uint64)
        keys[chance.random(count) < 0.1] = 0
        signs = chance.integers(0, 2, count, dtype=np.uint64) * np.uint64(form.magnitude + 1)
        return (keys | signs).astype(form.pattern)
    numbers = chance.uniform(-2, 2, count) * 2.0 ** chance.integers(-9, 8, count)
    signed = torch.from_numpy(numbers).to(torch_dtype(dtype)).view(INTEGERS[form.itemsize])
    return signed.numpy().view(form.pattern)


def passing_of(stored: StoredTensor, leaf: BoundBlock, dtype: str, seed: int) -> Passing:
    bits = patterns(dtype, stored.numel, seed)
    of_dtype = stored_tensor(stored.name, stored.numel, dtype)
    assert bits.dtype == pattern_of(of_dtype)
    return Passing(leaf, of_dtype, bits)


@st.composite
def passings(draw: st.DrawFn, dtypes: tuple[str, ...]) -> tuple[Passing, int]:
    """A leaf that has a sweep in chunks of so many elements."""
    elements = draw(st.one_of(st.integers(1, 12), st.integers(1, 300)))
    cases = leaves(least=1).filter(lambda case: sweep_of(case[1], elements) is not None)
    stored, leaf = draw(cases)
    return passing_of(stored, leaf, draw(st.sampled_from(dtypes)), draw(st.integers(0, 1 << 32))), elements


def sums_of(passing: Passing, power: int, exponents: torch.Tensor | None = None) -> Floats:
    """What the engine takes the root of."""
    magnitudes = passing.blocks().to(torch.float64).abs()
    rank = len(passing.leaf.shape)
    if exponents is not None:
        magnitudes = magnitudes * power_of_two(-exponents).reshape(*exponents.shape, *(1,) * rank)
    sums: Floats = pairwise_sum(magnitudes if power == 1 else magnitudes * magnitudes, rank).numpy()
    return sums


def norms_of(passing: Passing, p: float) -> Floats:
    norms: Floats = fused_norms([passing.blocks()], passing.leaf.grid_shape, p).numpy()
    return norms


def assert_same_bits(found: Floats, expected: Floats) -> None:
    assert found.dtype == np.float64
    assert found.shape == expected.shape
    assert np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(expected).tobytes()


@settings(max_examples=150)
@given(passings(NARROW), st.sampled_from([1, 2]), st.booleans())
def test_sums_of_chunks_are_those_of_the_engine(case: tuple[Passing, int], power: int, ranked: bool) -> None:
    passing, elements = case
    assert_same_bits(passing.sums(elements, power, ranked=ranked), sums_of(passing, power))


@given(passings(DTYPES), st.sampled_from([1, 2]), st.booleans())
def test_scaled_sums_of_chunks_are_those_of_the_engine(
    case: tuple[Passing, int], power: int, ranked: bool
) -> None:
    passing, elements = case
    wide = passing.blocks().to(torch.float64).abs()
    exponents = block_exponents([wide], len(passing.leaf.grid_shape))
    found = passing.sums(elements, power, exponents.numpy(), ranked=ranked)
    assert_same_bits(found, sums_of(passing, power, exponents))


@given(passings(DTYPES))
def test_sums_are_the_norms_of_the_engine_once_scaled_back(case: tuple[Passing, int]) -> None:
    passing, elements = case
    exponents: Any = None
    if passing.stored.dtype == "F64":
        wide = passing.blocks().abs()
        exponents = block_exponents([wide], len(passing.leaf.grid_shape)).numpy()
    sums = passing.sums(elements, 1, exponents)
    with np.errstate(over="ignore"):
        norms = sums if exponents is None else sums * np.ldexp(1.0, exponents.astype(np.int32))
    assert_same_bits(norms, norms_of(passing, 1))


@pytest.mark.parametrize("dtype", NARROW)
def test_roots_of_sums_are_the_norms_of_the_engine(dtype: str) -> None:
    passing = passing_of(stored_tensor("w", 4096 * 8), row_major((4096, 8), (1, 8)), dtype, 0)
    assert_same_bits(np.sqrt(passing.sums(1 << 12, 2)), norms_of(passing, 2))


@given(passings(DTYPES), st.booleans())
def test_maxima_of_chunks_are_those_of_the_engine_in_any_order(
    case: tuple[Passing, int], ranked: bool
) -> None:
    passing, elements = case
    sweep = sweep_of(passing.leaf, elements)
    assert sweep is not None
    maxima = LeafMaxima(sweep)
    for loaded in reversed(passing.chunks(elements)):
        maxima.add(loaded, Elements(loaded.view, passing.stored.dtype) if ranked else None)
    assert_same_bits(maxima.result(), norms_of(passing, math.inf))


@pytest.mark.parametrize(
    ("view", "block", "order"),
    [
        ((96, 64), (1, 64), (0, 1)),
        ((96, 64), (96, 1), (0, 1)),
        ((96, 64), (32, 1), (0, 1)),
        ((96, 64), (32, 16), (0, 1)),
        ((96, 64), (96, 64), (0, 1)),
        ((4, 1300), (1, 1300), (0, 1)),
        ((1300, 5), (1300, 1), (0, 1)),
        ((3, 1100), (3, 1), (0, 1)),
        ((8, 12, 16), (1, 12, 16), (0, 1, 2)),
        ((8, 12, 16), (8, 1, 16), (0, 1, 2)),
        ((8, 12, 16), (8, 12, 1), (0, 1, 2)),
        ((8, 12, 16), (2, 3, 4), (0, 1, 2)),
        ((8, 12, 16), (1, 12, 16), (1, 0, 2)),
        ((8, 12, 16), (1, 1, 16), (2, 0, 1)),
        ((8, 12, 16), (8, 12, 16), (0, 1, 2)),
    ],
)
def test_the_usual_structures_have_the_sums_of_the_engine_in_chunks_of_any_size(
    view: tuple[int, ...], block: tuple[int, ...], order: tuple[int, ...]
) -> None:
    leaf = row_major(view, block, order)
    dtype = ("F32", "BF16", "F16")[(sum(view) + len(block) + block[0]) % 3]
    passing = passing_of(stored_tensor("w", math.prod(view)), leaf, dtype, seed=0)
    wanted = sums_of(passing, 2)
    for elements in (64, 700, 1536, 4096, 1 << 20):
        if sweep_of(leaf, elements) is None:
            pytest.fail("has no sweep")
        assert_same_bits(passing.sums(elements, 2), wanted)


def test_infinite_numbers_make_their_own_blocks_infinite() -> None:
    leaf = row_major((6, 8), (6, 2))
    for dtype in ("F64", "F32", "BF16", "F16", "F8_E5M2"):
        for elements in (8, 48):
            passing = passing_of(stored_tensor("w", 48), leaf, dtype, 0)
            passing.bits[13] = FORMATS[dtype].infinity
            with np.errstate(over="ignore"):
                sums = passing.sums(elements, 1)
            assert sums[0, 2] == math.inf
            assert np.isfinite(sums[0, [0, 1, 3]]).all() or dtype == "F64"


@given(passings(NARROW))
def test_no_more_numbers_are_held_than_the_sweep_says(case: tuple[Passing, int]) -> None:
    passing, elements = case
    sweep = sweep_of(passing.leaf, elements)
    assert sweep is not None
    sums = LeafSums(sweep, 2)
    for loaded in passing.chunks(elements):
        sums.add(loaded, None)
        levels = getattr(sums._tree, "_levels", None)
        waiting = sum(level.size for level in levels.values()) if isinstance(levels, dict) else 0
        waiting += levels.size if isinstance(levels, np.ndarray) else 0
        assert sums._sums.size + waiting <= sweep.numbers
