"""Outlines are rearranged as torch rearranges tensors: the same shapes and strides, the same refusals."""

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st

from sparseprune import SparsityError
from sparseprune.engine.grids import Outline, rearranged

PATTERNS: tuple[tuple[str, dict[str, int]], ...] = (
    ("a b -> b a", {}),
    ("a b -> (a b)", {}),
    ("a b -> (b a)", {}),
    ("(a h) b -> a h b", {"h": 2}),
    ("(a h) b -> h a b", {"h": 2}),
    ("(a h) (b k) -> a b h k", {"h": 2, "k": 3}),
    ("(a h) (b k) -> (a b) h k", {"h": 2, "k": 3}),
    ("(a h) (b k) -> a h (b k)", {"h": 2, "k": 3}),
    ("(a h) (b k) -> a (h b) k", {"h": 2, "k": 3}),
    ("a (b k) -> a k b 1", {"k": 3}),
    ("a b -> 1 a b", {}),
    ("a (b k) -> (a b) k", {"k": 3}),
)


@pytest.mark.parametrize(("pattern", "axes"), PATTERNS, ids=[pattern for pattern, _ in PATTERNS])
@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    gaps=st.tuples(st.integers(0, 2), st.integers(0, 3)),
    turned=st.booleans(),
)
def test_as_torch_does_it(
    pattern: str, axes: dict[str, int], sizes: tuple[int, int], gaps: tuple[int, int], turned: bool
) -> None:
    """On a part of a larger tensor, also of its transposed one, so that rows may lie apart."""
    (a, b), (before, behind) = sizes, gaps
    storage = torch.arange((2 * a + before) * (3 * b + behind)).view(2 * a + before, 3 * b + behind)
    part = storage[before:, : 3 * b]
    if turned:
        storage = torch.arange((3 * b + behind) * (2 * a + before)).view(3 * b + behind, 2 * a + before)
        part = storage.T[before:, : 3 * b]
    wanted = rearrange(part, pattern, **axes)
    is_view = wanted.untyped_storage().data_ptr() == storage.untyped_storage().data_ptr()
    if not is_view:
        with pytest.raises(SparsityError, match="would need a copy"):
            rearranged(tuple(part.shape), part.stride(), pattern, axes)
        return
    seen = rearranged(tuple(part.shape), part.stride(), pattern, axes)
    assert seen.shape == tuple(wanted.shape)
    assert torch.equal(part.as_strided(seen.shape, seen.stride, int(part.storage_offset())), wanted)


def test_empty_and_single_outlines() -> None:
    assert rearranged((0, 4), (4, 1), "a (b c) -> a b c", {"c": 2}).shape == (0, 2, 2)
    assert Outline((1, 1), (1, 1)).reshape((1,)).shape == (1,)
    assert Outline((2, 3), (3, 1)).reshape((6,)) == Outline((6,), (1,))
    for wrong in ((5,), (7,), (2, 2), (6, 2)):
        with pytest.raises(SparsityError):
            Outline((2, 3), (3, 1)).reshape(wrong)
