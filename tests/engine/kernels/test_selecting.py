"""Selection among keys: exactly nnz in every scope, whatever loop does it, as a stable sort would choose."""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparseprune.engine.kernels import selecting
from sparseprune.engine.kernels.selecting import PAIRWISE_LIMIT, ranks_among, select_each, select_keys
from tests import oracle

WIDTHS = (8, 16, 32, 64)
KINDS = ("same", "few", "any", "edges")
WITHOUT_SIGN = {width: (1 << width - 1) - 1 for width in WIDTHS}
ALL_ONES = (1 << 64) - 1


def drawn(width: int, size: int, kind: str, seed: int) -> NDArray[Any]:
    """Patterns of either sign: all alike but for it, few, any, or those at the ends of the range."""
    chance = np.random.default_rng(seed)
    sign, top = 1 << width - 1, (1 << width) - 1
    if kind == "any":
        raw = chance.integers(0, top, size, dtype=np.uint64, endpoint=True)
    else:
        palette = {
            "same": (9, 9 | sign),
            "few": (0, sign, 1, 2, 3, sign | 2),
            "edges": (0, 1, sign - 1, sign - 2, sign, sign + 1, top, top - 1),
        }[kind]
        raw = np.array(palette, dtype=np.uint64)[chance.integers(0, len(palette), size)]
    return raw.astype(f"uint{width}")


def selected(bits: NDArray[Any], magnitude: int, blocks: int, nnz: int) -> list[int]:
    """What is kept, into memory that held something else before."""
    keep = np.full(bits.size, 7, dtype=np.uint8)
    before = bits.copy()
    select_keys(bits, magnitude, blocks, nnz, keep)
    assert np.array_equal(bits, before)
    kept: list[int] = keep.tolist()
    return kept


def by_loops(bits: NDArray[Any], magnitude: int, blocks: int, nnz: int) -> list[int]:
    keys = [int(pattern) & magnitude for pattern in bits]
    scopes = (keys[begin : begin + blocks] for begin in range(0, len(keys), blocks))
    return [int(kept) for scope in scopes for kept in oracle.keep_largest(scope, nnz)]


def by_sorting(bits: NDArray[Any], magnitude: int, blocks: int, nnz: int) -> list[int]:
    keys = (bits & bits.dtype.type(magnitude)).reshape(-1, blocks)
    ranked = np.argsort(~keys, axis=1, kind="stable")
    keep = np.zeros(keys.shape, dtype=np.uint8)
    np.put_along_axis(keep, ranked[:, :nnz], 1, axis=1)
    kept: list[int] = keep.reshape(-1).tolist()
    return kept


@st.composite
def problems(draw: st.DrawFn) -> tuple[NDArray[Any], int, int, int]:
    width = draw(st.sampled_from(WIDTHS))
    blocks = draw(st.one_of(st.integers(1, 9), st.integers(1, 300), st.sampled_from([127, 128, 129])))
    scopes = draw(st.integers(0, 1 + 600 // blocks))
    bits = drawn(width, scopes * blocks, draw(st.sampled_from(KINDS)), draw(st.integers(0, 1 << 32)))
    magnitude = draw(st.sampled_from([WITHOUT_SIGN[width], ALL_ONES])) if width == 64 else WITHOUT_SIGN[width]
    nnz = draw(st.one_of(st.integers(0, blocks), st.sampled_from([0, 1, blocks - 1, blocks])))
    return bits, magnitude, blocks, nnz


@given(problems())
@example((np.array([0, ALL_ONES, 1 << 63, ALL_ONES - 1], dtype=np.uint64), ALL_ONES, 4, 2))
def test_keeps_what_plain_loops_keep(problem: tuple[NDArray[Any], int, int, int]) -> None:
    assert selected(*problem) == by_loops(*problem)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_keeps_what_a_stable_sort_keeps_at_every_border_of_the_loops(width: int, kind: str) -> None:
    lanes = 64 // width
    sizes = {1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 32, 33, lanes, PAIRWISE_LIMIT - 1, PAIRWISE_LIMIT}
    sizes |= {PAIRWISE_LIMIT + 1, 255, 256, 257, 300}
    for blocks in sorted(sizes):
        for scopes in (1, 3, 64, 65) if blocks < PAIRWISE_LIMIT - 1 else (1, 3):
            bits = drawn(width, blocks * scopes, kind, blocks)
            for nnz in {0, 1, 2, blocks // 2, blocks - 1, blocks} & set(range(blocks + 1)):
                problem = bits, WITHOUT_SIGN[width], blocks, nnz
                assert selected(*problem) == by_sorting(*problem), (blocks, scopes, nnz)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_scopes_inside_words_are_selected_in_any_number_of_words(width: int, kind: str) -> None:
    lanes = 64 // width
    for words in (1, 255, 256, 257, 513):
        for blocks in (size for size in (1, 2, 4, 8) if size <= lanes):
            for missing in range(0, lanes, blocks):  # the last word is whole, or has some scopes only
                bits = drawn(width, words * lanes - missing, kind, words)
                for nnz in range(blocks + 1):
                    problem = bits, WITHOUT_SIGN[width], blocks, nnz
                    assert selected(*problem) == by_sorting(*problem), (words, blocks, missing, nnz)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_long_scopes_are_selected_by_long_digits_and_by_short_ones(width: int, kind: str) -> None:
    for blocks in (selecting._LONG - 1, selecting._LONG, selecting._LONG + 1):
        bits = drawn(width, 2 * blocks, kind, blocks)
        magnitudes = {WITHOUT_SIGN[width], (1 << width) - 1} if width == 64 else {WITHOUT_SIGN[width]}
        for magnitude in magnitudes:
            for nnz in (1, 2, blocks // 2, blocks - 1):
                problem = bits, magnitude, blocks, nnz
                assert selected(*problem) == by_sorting(*problem), (blocks, nnz)


@given(problems(), st.integers(1, 64))
def test_the_loops_agree_where_either_could_do(
    problem: tuple[NDArray[Any], int, int, int], limit: int
) -> None:
    bits, magnitude, blocks, nnz = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selecting, "PAIRWISE_LIMIT", 255 if limit > 32 else 0)  # a rank is a byte
        patch.setattr(selecting, "_LONG", limit)
        assert selected(bits, magnitude, blocks, nnz) == by_loops(*problem)


@pytest.mark.parametrize("blocks", [2, 4, 8, 3, PAIRWISE_LIMIT, PAIRWISE_LIMIT + 1])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_first_ones_survive_when_all_tie(width: int, blocks: int) -> None:
    for pattern in (0, 1, WITHOUT_SIGN[width]):
        bits = np.full(3 * blocks, pattern, dtype=f"uint{width}")
        for nnz in range(blocks + 1):
            expected = ([1] * nnz + [0] * (blocks - nnz)) * 3
            assert selected(bits, WITHOUT_SIGN[width], blocks, nnz) == expected


@given(problems(), st.integers(0, 1 << 32))
def test_each_scope_keeps_a_number_of_its_own(problem: tuple[NDArray[Any], int, int, int], seed: int) -> None:
    bits, magnitude, blocks, _ = problem
    chance = np.random.default_rng(seed)
    each = chance.integers(0, blocks, bits.size // blocks, endpoint=True)
    keep = np.full(bits.size, 7, dtype=np.uint8)
    select_each(bits, magnitude, blocks, each, keep)
    scopes = np.split(bits, len(each)) if len(each) else []
    wanted = [by_loops(scope, magnitude, blocks, nnz) for scope, nnz in zip(scopes, each, strict=True)]
    assert keep.tolist() == [one for scope in wanted for one in scope]


@given(problems(), st.integers(0, 1 << 32))
def test_what_is_not_left_ranks_below_all_others(
    problem: tuple[NDArray[Any], int, int, int], seed: int
) -> None:
    bits, magnitude, _, _ = problem
    bits = bits & bits.dtype.type(magnitude >> 1)  # a rank is one above its key
    left = np.random.default_rng(seed).integers(0, 1, bits.size, dtype=np.uint8, endpoint=True)
    wanted = [(int(one) + 1) * int(kept) for one, kept in zip(bits, left, strict=True)]
    assert ranks_among(bits, magnitude, left).tolist() == wanted
