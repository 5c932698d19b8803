"""The map of elements to blocks against the engine, and windows that leave nothing unlike out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparseprune.engine import SparseScope
from sparseprune.execution.torch_tiles import build_scope
from sparseprune.report.drawings import Cell, Window, cell_of, view_index, window_of
from sparseprune.spec import BoundBlock, BoundBlockCoupling, BoundScope, BoundScopeCoupling

AnyScope = BoundScope | BoundScopeCoupling
Shapes = dict[str, tuple[int, ...]]


def block(
    shape: tuple[int, ...],
    extents: tuple[int, ...],
    view: tuple[tuple[int, ...], tuple[int, ...], int] | None = None,
    name: str = "w",
) -> BoundBlock:
    """Blocks of a whole tensor of this shape, or of a view (shape, strides, offset) of it."""
    strides = tuple(torch.empty(shape, device="meta").stride())
    return BoundBlock(name, name, *(view or (shape, strides, 0)), extents)


def channels() -> BoundBlockCoupling:
    gate, up, bias, down = (
        block((6, 10), (1, 10), name="gate"),
        block((6, 10), (1, 10), name="up"),
        block((6,), (1, 1), ((6, 1), (1, 1), 0), name="bias"),
        block((10, 6), (10, 1), name="down"),
    )
    return BoundBlockCoupling("channel", (gate, up, bias, down), ((0, 1), (0, 1), (0, 1), (1, 0)))


def heads() -> BoundBlockCoupling:
    query = block((12, 4), (1, 6, 4), ((2, 6, 4), (24, 4, 1), 0), name="q")
    key = block((4, 4), (1, 2, 4), ((2, 2, 4), (8, 4, 1), 0), name="k")
    out = block((4, 12), (4, 1, 6), ((4, 2, 6), (12, 6, 1), 0), name="o")
    return BoundBlockCoupling("head", (query, key, out), ((0, 1, 2), (0, 1, 2), (1, 0, 2)))


def experts() -> BoundScopeCoupling:
    def one(number: int) -> BoundScope:
        up = block((3, 8, 4), (1, 8, 4), ((1, 8, 4), (32, 4, 1), 32 * number), name="up")
        down = block((4, 8), (4, 8), name=f"down{number}")
        fused = BoundBlockCoupling("expert", (up, _widened(down)), ((0, 1, 2), (0, 1, 2)))
        return BoundScope(f"expert{number}", fused, (1, 1, 1))

    return BoundScopeCoupling("experts", tuple(one(number) for number in range(3)), ((0, 1, 2),) * 3)


def _widened(part: BoundBlock) -> BoundBlock:
    return BoundBlock(
        part.label, part.tensor, (*part.view_shape, 1), (*part.view_stride, 1), 0, (*part.shape, 1)
    )


def unlike_scopes() -> BoundScopeCoupling:
    rows = BoundScope("rows", block((4, 6), (1, 1), name="a"), (1, 6))
    columns = BoundScope("columns", block((6, 4), (2, 1), name="b"), (3, 1))
    return BoundScopeCoupling("both", (rows, columns), ((0, 1), (1, 0)))


STRUCTURES: dict[str, tuple[AnyScope, Shapes]] = {
    "2:4": (BoundScope("s", block((4, 12), (1, 1)), (1, 4)), {"w": (4, 12)}),
    "coupled 2:4": (
        BoundScope("s", block((3, 32), (1, 1, 1, 2), ((3, 2, 8, 2), (32, 16, 1, 8), 0)), (1, 1, 4, 1)),
        {"w": (3, 32)},
    ),
    "16-column blocks": (BoundScope("s", block((16, 32), (1, 16)), (8, 1)), {"w": (16, 32)}),
    "square blocks": (BoundScope("s", block((12, 18), (6, 6)), (2, 3)), {"w": (12, 18)}),
    "transposed": (BoundScope("s", block((8, 6), (1, 4), ((6, 8), (1, 6), 0)), (1, 2)), {"w": (8, 6)}),
    "slice of rows": (BoundScope("s", block((9, 4), (1, 2), ((4, 4), (4, 1), 8)), (2, 2)), {"w": (9, 4)}),
    "slice of columns": (BoundScope("s", block((4, 12), (1, 1), ((4, 4), (12, 1), 6)), (1, 2)),
        {"w": (4, 12)}),
    "every second column": (BoundScope("s", block((4, 8), (1, 1), ((4, 4), (8, 2), 1)), (1, 2)),
        {"w": (4, 8)}),
    "dimensions that interleave": (BoundScope("s", block((8,), (1, 1), ((2, 3), (3, 2), 0)), (2, 1)),
        {"w": (8,)}),
    "flattened": (BoundScope("s", block((4, 6), (8,), ((24,), (1,), 0)), (3,)), {"w": (4, 6)}),
    "vector": (BoundScope("s", block((12,), (2,)), (3,)), {"w": (12,)}),
    "number": (BoundScope("s", block((), ()), ()), {"w": ()}),
    "filters": (BoundScope("s", block((8, 3, 2, 2), (1, 3, 2, 2)), (4, 1, 1, 1)), {"w": (8, 3, 2, 2)}),
    "channels": (BoundScope("s", channels(), (3, 1)),
        {"gate": (6, 10), "up": (6, 10), "bias": (6,), "down": (10, 6)}),
    "heads": (BoundScope("s", heads(), (2, 1, 1)), {"q": (12, 4), "k": (4, 4), "o": (4, 12)}),
    "experts": (experts(), {"up": (3, 8, 4)} | {f"down{number}": (4, 8) for number in range(3)}),
    "unlike scopes": (unlike_scopes(), {"a": (4, 6), "b": (6, 4)}),
}  # fmt: skip
LEAVES = [(name, number) for name, (scope, _) in STRUCTURES.items() for number in range(len(scope.leaves))]


def cells_by_the_engine(scope: AnyScope, shapes: Shapes, number: int) -> list[Cell | None]:
    """For every element of the tensor under a leaf: its block is kept alone and the mask looked at."""
    bound = scope.leaves[number]
    tensors = {each: torch.zeros(each.view_shape) for each in scope.leaves}
    built: SparseScope = build_scope(scope, tensors)
    leaf = built.blocks()[number]
    shape = shapes[bound.tensor]
    cells: list[Cell | None] = [None] * torch.Size(shape).numel()
    keep = torch.zeros(*built.grid_shape, built.numblk_per_scope(), dtype=torch.bool)
    for at in range(keep.numel()):
        one = torch.zeros_like(keep)
        one.view(-1)[at] = True
        mask = torch.zeros(shape, dtype=torch.bool)
        seen = mask.as_strided(bound.view_shape, bound.view_stride, bound.view_offset)
        seen.copy_(built.get_masks(0, block_mask=one)[leaf])
        for element in mask.flatten().nonzero().flatten().tolist():
            cells[element] = Cell(*divmod(at, built.numblk_per_scope()))
    return cells


@pytest.mark.parametrize(("name", "number"), LEAVES)
def test_every_element_has_the_scope_and_block_that_the_engine_gives_it(name: str, number: int) -> None:
    scope, shapes = STRUCTURES[name]
    by_engine = cells_by_the_engine(scope, shapes, number)
    assert [cell_of(scope, number, element) for element in range(len(by_engine))] == by_engine
    assert any(cell is not None for cell in by_engine)


@pytest.mark.parametrize("limits", [(8, 16), (3, 5), (100, 100)])
@pytest.mark.parametrize(("name", "number"), LEAVES)
def test_a_window_shows_what_the_engine_does_and_leaves_out_only_what_is_alike(
    name: str, number: int, limits: tuple[int, int]
) -> None:
    scope, shapes = STRUCTURES[name]
    shape = shapes[scope.leaves[number].tensor]
    window = window_of(scope, number, shape, *limits)
    elements = torch.arange(torch.Size(shape).numel()).view(shape)
    fixed = tuple(slice(None) if dim in window.dims else index for dim, index in enumerate(window.begin))
    plane = elements[fixed].reshape((1,) * (2 - len(window.dims)) + tuple(shape[dim] for dim in window.dims))
    by_engine = cells_by_the_engine(scope, shapes, number)

    def cell(i: int, j: int) -> Cell | None:
        return by_engine[int(plane[i, j])]

    for i, row in zip(window.rows, window.cells, strict=True):
        for j, shown in zip(window.columns, row, strict=True):
            assert shown == (None if i is None or j is None else cell(i, j))
    columns = [j for j in window.columns if j is not None]
    rows = [i for i in window.rows if i is not None]
    assert len(window.rows) <= limits[0] + 1
    assert len(window.columns) <= limits[1] + 1
    for first, last in left_out(window.rows):
        assert {tuple(cell(i, j) for j in columns) for i in range(first, last + 1)} == {
            tuple(cell(first, j) for j in columns)
        }
    for first, last in left_out(window.columns):
        assert {tuple(cell(i, j) for i in rows) for j in range(first, last + 1)} == {
            tuple(cell(i, first) for i in rows)
        }


def left_out(line: tuple[int | None, ...]) -> list[tuple[int, int]]:
    """The neighbours of every gap that something follows on."""
    gaps = zip(line, line[1:], line[2:], strict=False)
    return [(one, other) for one, gap, other in gaps if gap is None and one is not None and other is not None]


@st.composite
def views(draw: st.DrawFn) -> tuple[torch.Tensor, tuple[int, ...], tuple[int, ...], int]:
    """A tensor that counts its elements, with shape, strides and offset of some view of it."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), max_size=3))
    tensor = view = torch.arange(torch.Size(shape).numel()).view(shape)
    for dim in range(view.ndim):
        begin = draw(st.integers(0, view.shape[dim] - 1))
        view = view.narrow(dim, begin, draw(st.integers(1, view.shape[dim] - begin)))
    for dim in reversed(range(view.ndim)):
        parts = [part for part in range(1, view.shape[dim] + 1) if view.shape[dim] % part == 0]
        part = draw(st.sampled_from(parts))
        view = view.reshape(*view.shape[:dim], part, view.shape[dim] // part, *view.shape[dim + 1 :])
    view = view.permute(draw(st.permutations(range(view.ndim))))
    return tensor, tuple(view.shape), tuple(view.stride()), int(view.storage_offset())


@given(views())
def test_view_index_undoes_the_strides_of_any_view(
    view: tuple[torch.Tensor, tuple[int, ...], tuple[int, ...], int],
) -> None:
    tensor, shape, strides, offset = view
    bound = BoundBlock("w", "w", shape, strides, offset, (1,) * len(shape))
    seen = tensor.as_strided(shape, strides, offset)
    there = {int(seen[index]): index for index in map(tuple, torch.ones(shape).nonzero().tolist())}
    for element in range(tensor.numel()):
        assert view_index(bound, element) == there.get(element)


@given(views(), st.data())
def test_windows_of_any_view_leave_out_only_what_is_alike(
    view: tuple[torch.Tensor, tuple[int, ...], tuple[int, ...], int], data: st.DataObject
) -> None:
    tensor, shape, strides, offset = view
    extents = tuple(
        data.draw(st.sampled_from([part for part in range(1, size + 1) if size % part == 0]))
        for size in shape
    )
    scope = BoundScope("s", BoundBlock("w", "w", shape, strides, offset, extents), (1,) * len(shape))
    window = window_of(scope, 0, tuple(tensor.shape))
    fixed = tuple(slice(None) if dim in window.dims else at for dim, at in enumerate(window.begin))
    plane = tensor[fixed].reshape(
        (1,) * (2 - len(window.dims)) + tuple(tensor.shape[dim] for dim in window.dims)
    )

    def cell(i: int, j: int) -> Cell | None:
        return cell_of(scope, 0, int(plane[i, j]))

    for first, last in left_out(window.rows):
        lines = [[cell(i, j) for j in window.columns if j is not None] for i in range(first, last + 1)]
        assert all(line == lines[0] for line in lines)
    for first, last in left_out(window.columns):
        lines = [[cell(i, j) for i in window.rows if i is not None] for j in range(first, last + 1)]
        assert all(line == lines[0] for line in lines)


def window(name: str, number: int = 0) -> Window:
    scope, shapes = STRUCTURES[name]
    return window_of(scope, number, shapes[scope.leaves[number].tensor])


def test_the_last_two_dimensions_are_shown_unless_others_tell_more() -> None:
    assert window("channels").dims == (0, 1)
    assert window("vector").dims == (0,)
    assert window("number").dims == ()
    assert window("filters").dims == (0, 1)
    assert window("experts").dims == (1, 2)


def test_a_window_begins_where_the_view_does() -> None:
    assert (window("slice of rows").rows[0], window("slice of rows").columns[0]) == (2, 0)
    assert window("slice of columns").columns[0] == 6
    assert window("experts", 2).begin == (1, 0, 0)


def test_a_tensor_without_elements_has_an_empty_window() -> None:
    scope = BoundScope("s", block((0, 8), (1, 8)), (1, 1))
    assert window_of(scope, 0, (0, 8)).cells == ()


def test_a_large_tensor_is_not_walked_through() -> None:
    scope = BoundScope("s", block((1 << 20, 1 << 20), (1 << 20, 1)), (1, 1 << 20))
    assert window_of(scope, 0, (1 << 20, 1 << 20)).rows == (0, 1, None, (1 << 20) - 1)
