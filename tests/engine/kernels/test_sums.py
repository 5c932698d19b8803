"""Sums over the tree of pairs: in whatever pieces the terms come, those of engine.scoring, bit for bit."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparseprune.engine.dtypes import torch_dtype
from sparseprune.engine.kernels.formats import FORMATS, Format
from sparseprune.engine.kernels.sums import _COLUMNS, ColumnSums, TreeSum, run_sums, tree_sum
from sparseprune.engine.scoring import INTEGERS, pairwise_sum
from tests.engine.kernels.test_formats import read_by_torch

Floats = NDArray[np.float64]

BORDERS = (1, 2, 3, 7, 8, 9, _COLUMNS - 1, _COLUMNS, _COLUMNS + 1, 2 * _COLUMNS, 3 * _COLUMNS + 1)
seeds = st.integers(0, 1 << 32)
sizes = st.one_of(st.integers(1, 40), st.integers(1, 5 * _COLUMNS), st.sampled_from(BORDERS))


def by_loops(terms: list[float]) -> float:
    """The tree in plain loops: neighbours are joined, level by level, an odd last one is carried along."""
    while len(terms) > 1:
        pairs = [terms[place] + terms[place + 1] for place in range(0, len(terms) - 1, 2)]
        terms = pairs + terms[len(pairs) * 2 :]
    return terms[0]


def by_engine(terms: Floats) -> Floats:
    """The sums over the first axis as engine.scoring makes them."""
    last = torch.from_numpy(np.ascontiguousarray(np.moveaxis(terms, 0, -1)))
    sums: Floats = pairwise_sum(last, 1).numpy()
    return sums


def drawn(form: Format, size: int, seed: int) -> NDArray[Any]:
    """Finite numbers of either sign, of all magnitudes or of such as show in what order they were added."""
    chance = np.random.default_rng(seed)
    if seed % 2 and form.itemsize < 8:
        keys = chance.integers(0, form.infinity, size, dtype=np.uint64)
        signs = chance.integers(0, 2, size, dtype=np.uint64) * np.uint64(form.magnitude + 1)
        return (keys | signs).astype(form.pattern)
    numbers = torch.from_numpy(chance.uniform(-2, 2, size) * 2.0 ** chance.integers(-9, 8, size))
    signed = numbers.to(torch_dtype(form.name)).view(INTEGERS[form.itemsize])
    return signed.numpy().view(form.pattern)


def powers(bits: NDArray[Any], form: Format, power: int) -> Floats:
    magnitudes: Floats = np.abs(read_by_torch(bits, form))
    return magnitudes if power == 1 else magnitudes * magnitudes


def assert_same_bits(found: Floats, expected: Floats) -> None:
    assert found.dtype == expected.dtype == np.float64
    assert found.shape == expected.shape
    assert found.tobytes() == np.ascontiguousarray(expected).tobytes()


@given(sizes, seeds)
def test_the_tree_of_the_engine_is_that_of_plain_loops(size: int, seed: int) -> None:
    terms = np.random.default_rng(seed).uniform(-1, 1, size)
    assert float(by_engine(terms)) == by_loops(terms.tolist())
    assert float(tree_sum(terms, 0)) == by_loops(terms.tolist())


@given(st.sampled_from(list(FORMATS.values())), sizes, st.integers(0, 4), st.sampled_from([1, 2]), seeds)
def test_runs_have_the_sum_of_the_engine(form: Format, run: int, runs: int, power: int, seed: int) -> None:
    bits = drawn(form, run * runs, seed)
    found = run_sums(bits, form, run, power)
    assert_same_bits(found, by_engine(powers(bits, form, power).reshape(runs, run).T))


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_runs_of_every_length_around_a_block_have_the_sum_of_plain_loops(form: Format) -> None:
    for run in (*BORDERS, 16 * _COLUMNS, 17 * _COLUMNS + 300):
        bits = drawn(form, 2 * run, run)
        terms = powers(bits, form, 2).reshape(2, run).tolist()
        assert run_sums(bits, form, run, 2).tolist() == [by_loops(each) for each in terms]


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_an_infinite_number_makes_its_run_infinite_alone(form: Format) -> None:
    if form.infinity > form.largest:
        assert form.name == "F8_E4M3"
        return
    for place in (0, 3, 599):
        bits = drawn(form, 1800, 0)
        bits[600 + place] = form.infinity
        assert np.isinf(run_sums(bits, form, 600, 1)).tolist() == [False, True, False]


@st.composite
def pieces(draw: st.DrawFn) -> tuple[int, list[slice]]:
    """How many terms there are, and where they are cut, also into pieces of none."""
    count = draw(st.one_of(st.integers(1, 40), st.integers(1, 300)))
    cuts = sorted(draw(st.lists(st.integers(0, count), max_size=8)))
    bounds = [0, *cuts, count]
    return count, [slice(begin, end) for begin, end in pairwise(bounds)]


@given(pieces(), st.lists(st.integers(0, 4), max_size=3), seeds)
def test_pieces_of_terms_add_up_to_the_sum_of_the_engine(
    cut: tuple[int, list[slice]], shape: list[int], seed: int
) -> None:
    count, slices = cut
    terms = np.random.default_rng(seed).uniform(-1, 1, (count, *shape))
    tree = TreeSum()
    for piece in slices:
        passing = terms[piece].copy()
        tree.push(passing)
        passing.fill(np.nan)  # memory that is used again
        if piece.stop:
            assert tree.count == piece.stop
            assert_same_bits(tree.total(), by_engine(terms[: piece.stop]))


def test_a_sum_of_no_terms_is_refused() -> None:
    tree = TreeSum()
    tree.push(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="no terms"):
        tree.total()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.data(), seeds)
def test_any_axis_is_summed_as_the_engine_sums_it(shape: list[int], data: st.DataObject, seed: int) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    terms = np.random.default_rng(seed).uniform(-1, 1, shape)
    assert_same_bits(tree_sum(terms, axis), by_engine(np.moveaxis(terms, axis, 0)))


@given(
    pieces(),
    st.one_of(st.integers(1, 9), st.sampled_from([_COLUMNS - 1, _COLUMNS, _COLUMNS + 1, 2 * _COLUMNS + 3])),
    st.sampled_from(list(FORMATS.values())),
    st.sampled_from([1, 2]),
    seeds,
)
def test_columns_have_the_sum_of_the_engine_however_the_rows_come(
    cut: tuple[int, list[slice]], columns: int, form: Format, power: int, seed: int
) -> None:
    rows, slices = cut
    bits = drawn(form, rows * columns, seed).reshape(rows, columns)
    terms = powers(bits, form, power)
    sums = ColumnSums(form, columns, rows, power)
    assert_same_bits(sums.total(), np.zeros(columns))
    for piece in slices:
        sums.push(bits[piece])
        total = sums.total()
        assert_same_bits(total, by_engine(terms[: piece.stop]))
        total.fill(np.nan)  # what was given is no part of the sums
    assert sums.count == rows
    assert_same_bits(sums.total(), by_engine(terms))
