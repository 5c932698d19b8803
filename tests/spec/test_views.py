# ruff: noqa: E501  (whole lines, as they are printed)
"""Views and slices: the elements that torch indexing and einops reach, found from shapes alone."""

import pytest
import torch
from einops import rearrange
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparseprune.errors import SpecError
from sparseprune.spec import BoundBlock, TensorInfo, bind, parse_spec
from sparseprune.spec.overlaps import is_injective
from tests.commands import imported


def leaf(keys: str, *shape: int, config: dict[str, object] | None = None, rank: int = 0) -> BoundBlock:
    """The block of the one tensor of a spec that looks at it in this way."""
    text = f'version = 1\n[vars]\nn = 2\n[scope.s]\ntensors = "w"\n{keys}\nblock = []\nshape = []\nsparsity = 0.5'
    bound = bind(parse_spec(text, "s"), [TensorInfo("w", "BF16", shape)], config)
    (found,) = bound.rules[0].instances[0].scope.leaves
    return found


def problem(keys: str, *shape: int) -> str:
    with pytest.raises(SpecError) as caught:
        leaf(keys, *shape)
    (line,) = caught.value.problems
    return line


def elements(block: BoundBlock, shape: tuple[int, ...]) -> torch.Tensor:
    """What the view of a tensor that counts its own elements shows."""
    numbers = torch.arange(torch.Size(shape).numel())
    return numbers.as_strided(block.view_shape, block.view_stride, block.view_offset)


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape)


@st.composite
def slices(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[str, ...], tuple[slice, ...]]:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    texts, indices = [], []
    for size in shape:
        low, high = sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size))))
        assume(low < high)
        start = draw(
            st.sampled_from([str(low), str(low - size), ""] if low == 0 else [str(low), str(low - size)])
        )
        end = draw(
            st.sampled_from([str(high), "", f"{high} + 0"] if high == size else [str(high), str(high - size)])
        )
        texts.append(f"{start}:{end}")
        indices.append(slice(low, high))
    return shape, tuple(texts), tuple(indices)


@settings(max_examples=150, deadline=None)
@given(slices())
def test_a_slice_is_what_torch_takes(
    case: tuple[tuple[int, ...], tuple[str, ...], tuple[slice, ...]],
) -> None:
    shape, texts, indices = case
    block = leaf(f"slice = {list(texts)}", *shape)
    assert torch.equal(elements(block, shape), numbered(*shape)[indices])


@pytest.mark.parametrize(
    ("entries", "wanted"),
    [
        ('["1", ":"]', numbered(4, 6)[1:2]),
        ('["-1", ":"]', numbered(4, 6)[3:4]),
        ('[":", 5]', numbered(4, 6)[:, 5:6]),
        ('["n:", ":n"]', numbered(4, 6)[2:, :2]),
        ('["shape[0] // 2:", "config.k:"]', numbered(4, 6)[2:, 3:]),
        ('["0:shape[0] // 2", ":"]', numbered(4, 6)[:2]),
    ],
)
def test_a_single_index_keeps_its_dimension_and_bounds_are_expressions(
    entries: str, wanted: torch.Tensor
) -> None:
    assert torch.equal(elements(leaf(f"slice = {entries}", 4, 6, config={"k": 3}), (4, 6)), wanted)


@pytest.mark.parametrize(
    ("shape", "pattern", "axes"),
    [
        ((8, 6), "(kv q) k -> kv q k", {"q": 2}),
        ((8, 6), "m k -> k m", {}),
        ((8, 12), "m (k p j) -> m k j p", {"p": 2, "j": 3}),
        ((2, 3, 4), "a b c -> c a b", {}),
        ((8, 6), "m n -> m 1 n", {}),
        ((8, 6), "... n -> n ...", {}),
    ],
)
@pytest.mark.parametrize("part", ["", ":n"])
def test_a_view_is_what_einops_makes_of_the_slice(
    shape: tuple[int, ...], pattern: str, axes: dict[str, int], part: str
) -> None:
    keys = f'view = "{pattern}"\n' + (
        f"axes = {{ {', '.join(f'{k} = {v}' for k, v in axes.items())} }}" if axes else ""
    )
    tensor = numbered(*shape)
    if part:
        keys += f"\nslice = {[part, *[':'] * (len(shape) - 1)]}"
        tensor = tensor[:2]
    block = leaf(keys, *shape)
    assert torch.equal(elements(block, shape), rearrange(tensor, pattern, **axes))


def test_a_view_of_a_slice_of_columns_is_a_view_of_the_tensor() -> None:
    block = leaf('slice = [":", "n:"]\nview = "m (k p) -> k m p"\naxes = { p = "n" }', 4, 8)
    assert torch.equal(elements(block, (4, 8)), rearrange(numbered(4, 8)[:, 2:], "m (k p) -> k m p", p=2))


def test_an_explicit_view_is_as_strided() -> None:
    block = leaf('view = { shape = [2, "n", 3], stride = [12, 3, "1"], offset = 1 }', 4, 6)
    assert (block.view_shape, block.view_stride, block.view_offset) == ((2, 2, 3), (12, 3, 1), 1)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ('slice = ["0:5", ":"]', 's: [scope.s] slice: w: "5": this comes to 5, wanted an integer from -4 to 4, as the dimension has 4'),
        ('slice = ["0:-5", ":"]', 's: [scope.s] slice: w: "-5": this comes to -5, wanted an integer from -4 to 4, as the dimension has 4'),
        ('slice = [4, ":"]', 's: [scope.s] slice: w: "4": this comes to 4, wanted an integer from -4 to 3, as the dimension has 4'),
        ('slice = ["2:2", ":"]', 's: [scope.s] slice: w: "2:2" is 2:2, which is empty in a dimension of 4'),
        ('slice = ["3:-2", ":"]', 's: [scope.s] slice: w: "3:-2" is 3:2, which is empty in a dimension of 4'),
        ('slice = ["0:2.0", ":"]', 's: [scope.s] slice: w: "2.0": this comes to 2.0, wanted an integer from -4 to 4, as the dimension has 4'),
        ('slice = ["0:2"]', 's: [scope.s] slice: w: found 1 entries for the shape [4, 6]: give one for each dimension (":" takes all of it)'),
        ('slice = ["0:n / 0", ":"]', 's: [scope.s] slice: w: "n / 0" column 1: this divides by zero'),
        ('view = "a b -> (b a)"', "s: [scope.s] view: w: pattern 'a b -> (b a)' is no view of a tensor of shape [4, 6] and stride [6, 1]: it would need a copy, and what is written to a copy is lost"),
        ('view = "(a q) b -> a q b"\naxes = { q = "n / 2" }', 's: [scope.s] axes: w: "n / 2": this comes to 1.0, wanted 1 or more (// divides integers)'),
        ('view = "(a q) b -> a q b"\naxes = { q = "n - 2" }', 's: [scope.s] axes: w: "n - 2": this comes to 0, wanted 1 or more'),
        ("view = { shape = [4, 6], stride = [6, 1], offset = 1 }", "s: [scope.s] view: w: the view reaches element 24, the tensor [4, 6] has 24: strides and offset count elements of the row-major tensor"),
        ("view = { shape = [4, 6], stride = [1, 1] }", "s: [scope.s] view: w: shape [4, 6] with stride [1, 1] reaches some elements twice: a view may reach each element once"),
        ("view = { shape = [4, 6], stride = [0, 1] }", "s: [scope.s] view: w: shape [4, 6] with stride [0, 1] reaches some elements twice: a view may reach each element once"),
        ("view = { shape = [4], stride = [6, 1] }", "s: [scope.s] view: w: shape [4] and stride [6, 1] must have one entry for each dimension"),
    ],
)  # fmt: skip
def test_what_is_no_view_of_the_tensor_is_refused_with_the_reason(keys: str, line: str) -> None:
    assert problem(keys, 4, 6) == line


@pytest.mark.parametrize(
    "pattern",
    [
        "(a q) b -> a q b", "a -> a", "a b -> a", "a b -> a b b", "a & b -> b a", "(a b -> a b", "->",
        "a b -> a b c", "a b -> b 3",
    ],
)  # fmt: skip
def test_an_einops_pattern_that_does_not_fit_is_a_problem(pattern: str) -> None:
    start = f"s: [scope.s] view: w: pattern {pattern!r} does not fit a tensor of shape [4, 6]: "
    assert problem(f'view = "{pattern}"', 4, 6).startswith(start)


@pytest.mark.parametrize("pattern", ["", "a b", "a -> b -> c"])
def test_what_is_no_einops_pattern_is_refused_without_a_checkpoint(pattern: str) -> None:
    line = (
        f's: [scope.s] view: "{pattern}" is no einops pattern: wanted two sides, as in "(kv q) k -> kv q k"'
    )
    assert problem(f'view = "{pattern}"', 4, 6) == line


@settings(max_examples=200, deadline=None)
@given(st.text("ab ()1.->_*%", max_size=10), st.text("ab ()1.->_", max_size=10))
def test_any_pattern_is_a_view_or_a_problem(left: str, right: str) -> None:
    try:
        leaf(f'view = "{left}->{right}"', 4, 6)
    except SpecError as error:
        assert len(error.problems) == 1  # noqa: PT017  (either way is fine)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9)), max_size=3))
def test_a_view_is_injective_where_no_element_is_seen_twice(dimensions: list[tuple[int, int]]) -> None:
    shape, stride = tuple(size for size, _ in dimensions), tuple(step for _, step in dimensions)
    seen = torch.arange(200).as_strided(shape, stride).flatten().tolist()
    assert is_injective(shape, stride) == (len(set(seen)) == len(seen))


def test_specs_without_an_einops_pattern_are_bound_without_torch() -> None:
    code = """
from sparseprune.spec import TensorInfo, bind, parse_spec
text = '''version = 1
[scope.s]
tensors = "w"
slice = [":", "1:"]
block = []
shape = []
nnz = 1
[scope.t]
tensors = "v"
view = { shape = [2], stride = [2] }
block = []
shape = []
nnz = 1'''
bind(parse_spec(text), [TensorInfo("w", "F32", (4, 4)), TensorInfo("v", "F32", (4,))])
"""
    assert "torch" not in imported(code)
