"""Selection by histograms, bits and pairs is that of a full sort, for every width, with ties everywhere."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparseprune.engine import selection
from sparseprune.engine.selection import (
    kth_by_bits,
    kth_largest_key,
    select_by_comparing,
    select_by_histogram,
)

DTYPES = [torch.int8, torch.int16, torch.int32, torch.int64]


def stable_sort(keys: torch.Tensor, nnz: int) -> torch.Tensor:
    """The first `nnz` of a stable sort of every row."""
    ranked = keys.sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros(keys.shape, dtype=torch.bool)
    return kept.scatter_(-1, ranked[..., :nnz], value=True)


@st.composite
def keys_and_budget(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    dtype = draw(st.sampled_from(DTYPES))
    info = torch.iinfo(dtype)
    some = st.one_of(
        st.integers(info.min, info.max), st.sampled_from([info.min, info.min + 1, -1, 0, 1, info.max])
    )
    values = draw(st.lists(some, min_size=1, max_size=40))
    return torch.tensor(values, dtype=dtype), draw(st.integers(1, len(values)))


@given(keys_and_budget(), st.sampled_from([1, 3, 1 << 22]))
def test_histograms_select_what_a_stable_sort_selects(case: tuple[torch.Tensor, int], chunk: int) -> None:
    keys, nnz = case
    ranked = sorted(range(keys.numel()), key=lambda place: (-int(keys[place]), place))
    expected = torch.zeros(keys.numel(), dtype=torch.bool)
    expected[ranked[:nnz]] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_CHUNK", chunk)
        assert kth_largest_key(keys, nnz) == int(keys[ranked[nnz - 1]])
        assert torch.equal(select_by_histogram(keys, nnz), expected)
        assert int(kth_by_bits(keys, nnz)) == int(keys[ranked[nnz - 1]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_histograms_agree_with_torch_on_many_keys(dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(info.min, info.max, (100_000,), dtype=dtype, generator=generator)
    ordered = keys.sort(descending=True).values
    for k in (1, 2, 49_999, 100_000):
        assert kth_largest_key(keys, k) == int(ordered[k - 1])
        assert int(kth_by_bits(keys, k)) == int(ordered[k - 1])
        assert int(select_by_histogram(keys, k).sum()) == k


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", [1, 2, 8, 33])
def test_every_path_of_selection_gives_the_masks_of_a_stable_sort(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, blocks: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    ties = torch.randint(-2, 3, (3, 5, blocks), dtype=dtype, generator=generator)
    info = torch.iinfo(dtype)
    wild = torch.randint(info.min, info.max, (3, 5, blocks), dtype=dtype, generator=generator)
    for keys in (ties, wild, ties.transpose(0, 1), torch.zeros_like(ties)):
        for nnz in sorted({0, 1, min(2, blocks), blocks // 2, blocks - 1, blocks}):
            expected = stable_sort(keys, nnz)
            assert bool((expected.sum(-1) == nnz).all())
            for pairwise, histogram, chunk in ((64, 100, 4), (0, 100, 4), (0, 0, 4), (64, 100, 100)):
                monkeypatch.setattr(selection, "_PAIRWISE_LIMIT", pairwise)
                monkeypatch.setattr(selection, "_HISTOGRAM_LIMIT", histogram)
                monkeypatch.setattr(selection, "_CHUNK", chunk)
                assert torch.equal(selection.select(keys, nnz), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", [2, 4, 16, 17, 40])
def test_what_devices_do_selects_what_a_stable_sort_selects(dtype: torch.dtype, blocks: int) -> None:
    generator = torch.Generator().manual_seed(2)
    info = torch.iinfo(dtype)
    ties = torch.randint(-2, 3, (30, blocks), dtype=dtype, generator=generator)
    wild = torch.randint(info.min, info.max, (30, blocks), dtype=dtype, generator=generator)
    ends = torch.where(ties > 0, info.max, info.min).to(dtype)
    for keys in (ties, wild, ends, torch.zeros_like(ties), wild[:0]):
        for nnz in {1, blocks // 2, blocks - 1}:
            assert torch.equal(select_by_comparing(keys, nnz), stable_sort(keys, nnz))
