"""Which members of a fused block only feed others, against the inputs that each element meets."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprune.engine.grids import prod
from sparseprune.execution.inputs import holds_rows, taking_part
from sparseprune.spec import BoundBlock


def leaf(
    shape: tuple[int, ...], stride: tuple[int, ...], block: tuple[int, ...], offset: int = 0
) -> BoundBlock:
    return BoundBlock("b", "w", shape, stride, offset, block)


def holds_rows_one_by_one(one: BoundBlock, shape: tuple[int, ...], dim: int) -> bool:
    """The first block's elements, and the place of each along the inputs."""
    inner = prod(shape[dim + 1 :])
    places = set()
    for index in product(*(range(size) for size in one.shape)):
        flat = one.view_offset + sum(a * b for a, b in zip(index, one.view_stride, strict=True))
        places.add(flat // inner % shape[dim])
    return len(places) == shape[dim]


CASES = [
    ("a row of (out, in)", leaf((8, 6), (6, 1), (1, 6)), (8, 6), 1, True),
    ("a column of (out, in)", leaf((8, 6), (6, 1), (8, 1)), (8, 6), 1, False),
    ("one element", leaf((8, 6), (6, 1), (1, 1)), (8, 6), 1, False),
    ("all of it", leaf((8, 6), (6, 1), (8, 6)), (8, 6), 1, True),
    ("half of a row", leaf((8, 6), (6, 1), (1, 3)), (8, 6), 1, False),
    ("a row of (in, out)", leaf((6, 8), (8, 1), (1, 8)), (6, 8), 0, False),
    ("a column of (in, out)", leaf((6, 8), (8, 1), (6, 1)), (6, 8), 0, True),
    ("a head of q", leaf((2, 4, 6), (24, 6, 1), (1, 4, 6)), (8, 6), 1, True),
    ("a head of o", leaf((2, 6, 4), (4, 8, 1), (1, 6, 4)), (6, 8), 1, False),
    ("a channel of an expert's down", leaf((3, 4, 6), (24, 6, 1), (1, 4, 1)), (3, 4, 6), 2, False),
    ("a channel of an expert's up", leaf((3, 6, 4), (24, 4, 1), (1, 1, 4)), (3, 6, 4), 2, True),
    ("a whole expert", leaf((3, 6, 4), (24, 4, 1), (1, 6, 4)), (3, 6, 4), 2, True),
    ("a part of a fused matrix", leaf((4, 6), (6, 1), (1, 6), 24), (8, 6), 1, True),
    ("some columns of a part", leaf((8, 3), (6, 1), (1, 3), 3), (8, 6), 1, False),
    ("one input alone", leaf((8, 1), (1, 1), (1, 1)), (8, 1), 1, True),
]


@pytest.mark.parametrize(
    ("one", "shape", "dim", "wanted"), [pytest.param(*rest, id=name) for name, *rest in CASES]
)
def test_a_block_holds_rows_where_it_has_every_input(
    one: BoundBlock, shape: tuple[int, ...], dim: int, wanted: bool
) -> None:
    assert holds_rows(one, shape, dim) == wanted == holds_rows_one_by_one(one, shape, dim)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    block=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    order=st.permutations([0, 1, 2]),
    dim=st.integers(0, 1),
)
def test_it_is_what_its_elements_say(
    sizes: tuple[int, ...], block: tuple[int, ...], order: list[int], dim: int
) -> None:
    """Views of a matrix (a, b * c) or (a * b, c), in any order of their dimensions."""
    a, b, c = sizes
    strides = (b * c, c, 1)
    fitting = tuple(part if size % part == 0 else 1 for size, part in zip(sizes, block, strict=True))
    one = leaf(
        tuple(sizes[place] for place in order),
        tuple(strides[place] for place in order),
        tuple(fitting[place] for place in order),
    )
    for shape in ((a, b * c), (a * b, c)):
        assert holds_rows(one, shape, dim) == holds_rows_one_by_one(one, shape, dim)


def test_those_with_columns_take_part_and_all_where_none_has() -> None:
    row, column = CASES[0][1], BoundBlock("c", "v", (6, 8), (8, 1), 0, (6, 1))
    shapes, dims = {"w": (8, 6), "v": (6, 8)}, {"w": 1, "v": 1}
    assert taking_part([row, column], shapes, dims) == [column]
    assert taking_part([row], shapes, dims) == [row]
    assert taking_part([column], shapes, dims) == [column]
    assert taking_part([], shapes, dims) == []
