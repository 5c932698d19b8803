"""Selection by histograms is selection by a full sort, for every width of key, with ties everywhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparseprune.engine import radix, selection
from sparseprune.engine.radix import kth_largest_key, select_by_histogram

DTYPES = [torch.int8, torch.int16, torch.int32, torch.int64]


@st.composite
def keys_and_budget(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    dtype = draw(st.sampled_from(DTYPES))
    info = torch.iinfo(dtype)
    some = st.one_of(
        st.integers(info.min, info.max),
        st.sampled_from([info.min, info.min + 1, -1, 0, 1, info.max]),
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
        patch.setattr(radix, "_CHUNK", chunk)
        assert kth_largest_key(keys, nnz) == int(keys[ranked[nnz - 1]])
        assert torch.equal(select_by_histogram(keys, nnz), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_histograms_agree_with_torch_on_many_keys(dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(info.min, info.max, (100_000,), dtype=dtype, generator=generator)
    ordered = keys.sort(descending=True).values
    for k in (1, 2, 49_999, 100_000):
        assert kth_largest_key(keys, k) == int(ordered[k - 1])
        assert int(select_by_histogram(keys, k).sum()) == k


def test_every_path_of_selection_gives_the_same_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    keys = torch.randint(-2, 3, (3, 2, 8), dtype=torch.int16, generator=generator)
    for nnz in range(9):
        masks = []
        for pairwise, histogram in ((8, 100), (0, 100), (0, 0)):
            monkeypatch.setattr(selection, "_PAIRWISE_LIMIT", pairwise)
            monkeypatch.setattr(selection, "_HISTOGRAM_LIMIT", histogram)
            masks.append(selection.select(keys, nnz))
        assert torch.equal(masks[0], masks[1])
        assert torch.equal(masks[0], masks[2])
        assert bool((masks[0].sum(-1) == nnz).all())
