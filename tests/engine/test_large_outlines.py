"""Outlines as large as the tensors of models are rearranged as torch rearranges the tensors themselves."""

import pytest
import torch
from einops import rearrange

from sparseprune import SparsityError
from sparseprune.engine.grids import rearranged

VIEWS: tuple[tuple[tuple[int, ...], str, dict[str, int]], ...] = (
    ((4096, 11008), "a b -> (a b)", {}),
    ((4096, 11008), "(a h) (b k) -> a b h k", {"h": 128, "k": 64}),
    ((32, 128, 4096), "h d m -> (h d) m", {}),
    ((50, 300, 3, 700), "a b c d -> (a b c) d", {}),
    ((50, 300, 3, 700), "a b c d -> a (b c d)", {}),
    ((1 << 20, 1 << 20), "a b -> (a b)", {}),
    ((1 << 20, 1 << 20), "(a h) b -> h a b", {"h": 1 << 10}),
)


@pytest.mark.parametrize(("shape", "pattern", "axes"), VIEWS, ids=str)
def test_as_torch_does_it(shape: tuple[int, ...], pattern: str, axes: dict[str, int]) -> None:
    tensor = torch.empty(shape, device="meta", dtype=torch.int8)
    wanted = rearrange(tensor, pattern, **axes)
    seen = rearranged(shape, tensor.stride(), pattern, axes)
    assert (seen.shape, seen.stride) == (tuple(wanted.shape), wanted.stride())


def test_rows_that_lie_apart_are_not_one_run() -> None:
    with pytest.raises(SparsityError, match="would need a copy"):
        rearranged((4096, 11008), (11009, 1), "a b -> (a b)", {})
