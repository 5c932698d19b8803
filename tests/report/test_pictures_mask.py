"""Close-ups of masks: which elements are seen, what they belong to, and the lines between them."""

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors.torch import save_file

from sparseprune.checkpoint import TensorReader, lay_out, open_checkpoint, read_config
from sparseprune.engine.dtypes import DTYPES
from sparseprune.errors import SparsepruneError
from sparseprune.report.pictures.mask import (
    SIDE,
    TINTS,
    UNREACHED,
    Cells,
    CloseUp,
    Window,
    close_up,
    edges,
    lies_apart,
    mask_page,
    plot_mask,
)
from sparseprune.spec import TensorInfo, bind, parse_spec
from tests.report.pictured import faults, texts

Labels = NDArray[np.int64]

pytestmark = pytest.mark.usefixtures("under_settings")

TWO_OF_FOUR = """
version = 1
scope.w = { tensors = "{name}", block = [1, 1], shape = [1, 4], nnz = 2 }
"""
HALVES = """
version = 1
block.left = { tensors = "w", slice = [":", "0:8"], shape = [-1, 1] }
block.right = { tensors = "w", slice = [":", "8:16"], shape = [-1, 1] }
block_coupling.both = { blocks = ["left", "right"], orders = [[0, 1], [0, 1]] }
scope.halves = { block = "both", shape = [-1, 2], nnz = 1 }
"""
EXPERTS = """
version = 1
scope.experts = { tensors = "w", block = [1, -1, -1], shape = [-1, -1, -1], nnz = 1 }
"""


def look(
    folder: Path, tensor: torch.Tensor, spec: str | None = None, name: str = "w", **asked: Any
) -> CloseUp:
    path = folder / "model.safetensors"
    save_file({name: tensor}, path)
    return look_at(path, name, spec, **asked)


def look_at(path: Path, name: str, spec: str | None = None, window: Window | None = None) -> CloseUp:
    checkpoint = open_checkpoint(path)
    bound = None
    if spec is not None:
        tensors = [TensorInfo(one.name, one.dtype, one.shape) for one in checkpoint.tensors.values()]
        bound = bind(parse_spec(spec), tensors, read_config(checkpoint))
    with TensorReader() as reader:
        return close_up(checkpoint.tensors[name], reader, bound, window)


def window(tensor: torch.Tensor, seen: CloseUp) -> list[list[bool]]:
    """Which elements of the window are not zero, one by one."""
    array = tensor.double()
    index = [0] * array.dim()
    rows = []
    for row in range(seen.kept.shape[0]):
        line = []
        for column in range(seen.kept.shape[1]):
            places = (row, column)[2 - len(seen.dims) :]
            for dim, begin, place in zip(seen.dims, seen.begin[2 - len(seen.dims) :], places, strict=True):
                index[dim] = begin + place
            line.append(bool(array[tuple(index)] != 0))
        rows.append(line)
    return rows


@pytest.mark.parametrize(
    "shape",
    [(), (1,), (5,), (300,), (1, 1), (3, 200), (200, 3), (70, 70), (2, 6, 9), (5, 4, 3, 3), (2, 3, 4, 2, 2)],
)
def test_shows_which_elements_are_zero(tmp_path: Path, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    tensor = torch.randint(0, 2, shape, generator=generator).float()
    seen = look(tmp_path, tensor)
    assert seen.kept.tolist() == window(tensor, seen)
    assert seen.cells is None
    assert max(seen.kept.shape) <= SIDE
    assert seen.shape == shape


@pytest.mark.parametrize("dtype", [row.name for row in DTYPES.values() if row.zero_bits is not None])
def test_zeros_of_either_sign_are_zero_in_every_dtype(tmp_path: Path, dtype: str) -> None:
    row = DTYPES[dtype]
    size = row.bits // 8
    negative = bytes([0] * (size - 1) + [0x80])
    ones = bytes([0xFF] * size)
    path = tmp_path / "model.safetensors"
    path.write_bytes(lay_out([("w", dtype, (1, 3))], {}).raw + bytes(size) + negative + ones)
    negative_is_zero = row.zero_bits is not None and not row.zero_bits >> (row.bits - 1)
    kept = look_at(path, "w").kept.tolist()[0]
    assert kept == [row.zero_bits == 0, row.zero_bits == 0 or not negative_is_zero, True]


def test_nan_and_infinity_are_kept(tmp_path: Path) -> None:
    seen = look(tmp_path, torch.tensor([[float("nan"), float("inf"), -0.0, 0.0]]))
    assert seen.kept.tolist() == [[True, True, False, False]]


def test_says_what_cannot_be_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(lay_out([("w", "F4", (2, 4))], {}).raw + bytes(4))
    with pytest.raises(SparsepruneError, match="--tensor w: F4 elements are less than a byte"):
        look_at(path, "w")
    with pytest.raises(SparsepruneError, match="--tensor w: it has no elements to draw"):
        look(tmp_path, torch.zeros(4, 0))


@pytest.mark.parametrize(("row", "column"), [(0, 500), (500, 0), (3, 64), (64, 3), (4999, 10), (10, 4999)])
@pytest.mark.parametrize("kind", [True, False])
def test_shows_a_part_in_which_both_kinds_are_seen(tmp_path: Path, row: int, column: int, kind: bool) -> None:
    tensor = torch.full((5000, 5000), kind, dtype=torch.bool)
    tensor[row, column] = not kind
    seen = look(tmp_path, tensor)
    assert seen.kept[row - seen.begin[0], column - seen.begin[1]] != kind
    assert seen.kept.shape == (SIDE, SIDE)


def test_shows_the_beginning_where_only_one_kind_is(tmp_path: Path) -> None:
    assert look(tmp_path, torch.ones(500, 300)).begin == (0, 0)
    assert not look(tmp_path, torch.zeros(500, 300)).kept.any()


def test_gives_up_the_search_in_a_tensor_that_is_very_wide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.ones(100, 100_000, dtype=torch.int8)
    tensor[0, 90_000] = 0
    assert look(tmp_path, tensor).begin[1] > 0
    monkeypatch.setattr("sparseprune.report.pictures.mask._PATIENCE", 1 << 16)
    assert look(tmp_path, tensor).begin == (0, 0)


def test_elements_far_apart_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randint(0, 2, (3, 5, 7, 9)).float()
    wanted = look(tmp_path, tensor).kept
    monkeypatch.setattr("sparseprune.report.pictures.mask._SPAN", 1)
    assert np.array_equal(look(tmp_path, tensor).kept, wanted)


def test_without_a_spec_a_stack_shows_its_first_matrix_and_a_convolution_its_channels(tmp_path: Path) -> None:
    assert look(tmp_path, torch.ones(2, 3, 4)).dims == (1, 2)
    assert look(tmp_path, torch.ones(5, 4, 3, 3)).dims == (0, 1)


@pytest.mark.parametrize(
    ("text", "begin", "shape"),
    [("90,5", (90, 5), (10, 64)), ("0:3,7:20", (0, 7), (3, 13)), ("98:120, 0:192", (98, 0), (2, 80))],
)
def test_shows_the_window_that_is_asked_for(
    tmp_path: Path, text: str, begin: tuple[int, int], shape: tuple[int, int]
) -> None:
    tensor = torch.randint(0, 2, (100, 80)).float()
    seen = look(tmp_path, tensor, window=Window.parsed(text))
    assert seen.begin == begin
    assert seen.kept.shape == shape
    assert seen.kept.tolist() == window(tensor, seen)


def test_a_window_with_sides_is_not_made_smaller_where_lines_are_many(tmp_path: Path) -> None:
    seen = look(tmp_path, torch.rand(64, 64), TWO_OF_FOUR, window=Window.parsed("0:60,0:64"))
    assert seen.kept.shape == (60, 64)
    assert seen.cells is not None
    assert seen.cells.scope.shape == (60, 64)


@pytest.mark.parametrize(
    "text", ["", "1", "1,2,3", "a,b", "1:2,3", "-1,0", "5:5,0:4", "9:3,0:4", "0:200,0:200"]
)
def test_a_window_without_a_meaning_is_refused(text: str) -> None:
    with pytest.raises(SparsepruneError, match="--window "):
        Window.parsed(text)


def test_a_window_beyond_the_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SparsepruneError, match="begins beyond the tensor, which has 4 rows and 8 columns"):
        look(tmp_path, torch.ones(4, 8), window=Window.parsed("4,0"))


def test_experts_are_seen_beside_each_other_where_they_compete(tmp_path: Path) -> None:
    tensor = torch.ones(4, 6, 8)
    tensor[1:] = 0
    seen = look(tmp_path, tensor, EXPERTS)
    assert seen.dims[0] == 0
    assert seen.kept.any(axis=1).tolist() == [True, False, False, False]
    assert seen.rules == ("scope.experts: 1 of 4 blocks",)


def test_elements_of_one_scope_have_one_number_and_so_have_those_of_a_block(tmp_path: Path) -> None:
    seen = look(tmp_path, torch.rand(3, 8), TWO_OF_FOUR)
    assert seen.cells is not None
    assert seen.cells.scope.tolist() == [[0] * 4 + [1] * 4, [2] * 4 + [3] * 4, [4] * 4 + [5] * 4]
    assert len(np.unique(seen.cells.block)) == 24
    assert seen.rules == ("scope.w: 2 of 4 blocks",)


def test_fused_blocks_have_one_number_in_both_their_places(tmp_path: Path) -> None:
    seen = look(tmp_path, torch.rand(2, 20), HALVES)
    assert seen.cells is not None
    half = [0, 0, 1, 1, 2, 2, 3, 3]
    assert seen.cells.scope[0].tolist() == half + half + [-1] * 4
    blocks = seen.cells.block[1].tolist()
    assert blocks[:8] == blocks[8:16] == list(range(8))
    assert blocks[16:] == [-1] * 4


def test_a_tensor_that_no_rule_reaches_has_no_rule_and_no_cells_of_any(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.rand(4, 16), "x": torch.rand(4, 4)}, path)
    seen = look_at(path, "x", HALVES)
    assert seen.rules == ()
    assert seen.cells is not None
    assert (seen.cells.scope == -1).all()


def test_a_threshold_is_told_as_one(tmp_path: Path) -> None:
    spec = TWO_OF_FOUR.replace("nnz = 2", "threshold = 0.25")
    assert look(tmp_path, torch.rand(4, 4), spec).rules == ("scope.w: blocks from 0.25 on",)


def test_fewer_elements_are_shown_where_lines_would_cover_them(tmp_path: Path) -> None:
    assert look(tmp_path, torch.rand(64, 64), TWO_OF_FOUR).kept.shape == (32, 32)
    assert look(tmp_path, torch.rand(64, 64)).kept.shape == (64, 64)
    seen = look(tmp_path, torch.rand(64, 64), TWO_OF_FOUR)
    assert seen.cells is not None
    assert seen.cells.scope.shape == seen.cells.block.shape == (32, 32)


def lines_one_by_one(labels: Labels) -> set[tuple[tuple[int, int], tuple[int, int]]]:
    """Every side of an element that unlike neighbours share."""
    rows, columns = labels.shape
    sides = set()
    for row in range(rows):
        for column in range(columns):
            if column and labels[row, column] != labels[row, column - 1]:
                sides.add(((column, row), (column, row + 1)))
            if row and labels[row, column] != labels[row - 1, column]:
                sides.add(((column, row), (column + 1, row)))
    return sides


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_lines_are_where_neighbours_differ_and_nowhere_else(rows: int, columns: int, data: Any) -> None:
    numbers = data.draw(st.lists(st.integers(-1, 2), min_size=rows * columns, max_size=rows * columns))
    labels = np.array(numbers, dtype=np.int64).reshape(rows, columns)
    found = []
    for (x0, y0), (x1, y1) in edges(labels):
        if x0 == x1:
            found += [((x0, y), (x0, y + 1)) for y in range(y0, y1)]
        else:
            assert y0 == y1
            found += [((x, y0), (x + 1, y0)) for x in range(x0, x1)]
    assert len(found) == len(set(found))
    assert set(found) == lines_one_by_one(labels)


@pytest.mark.parametrize(
    ("labels", "apart"),
    [
        ([[0, 0, 1]], False),
        ([[0, 1, 0]], True),
        ([[0, 1], [1, 0]], True),
        ([[0, 0], [1, 0]], False),
        ([[-1, 0, -1]], False),
        ([[0, 0, 0], [0, 1, 0], [0, 0, 0]], False),
    ],
)
def test_a_scope_lies_apart_where_it_is_not_all_neighbours(labels: list[list[int]], apart: bool) -> None:
    assert lies_apart(np.array(labels)) is apart


def drawn(seen: CloseUp) -> tuple[Figure, Axes]:
    (picture,) = mask_page(seen).pictures
    assert faults(picture.figure) == []
    return picture.figure, picture.figure.axes[0]


def colours(axes: Axes) -> list[list[str]]:
    """The colour of every element as it is drawn."""
    (mesh,) = [one for one in axes.collections if isinstance(one, QuadMesh)]
    values = mesh.get_array()
    assert values is not None
    table = np.asarray(values)
    return [[to_hex(mesh.to_rgba(np.array([value]))[0]) for value in row] for row in table]


def segments(axes: Axes) -> list[set[tuple[tuple[float, ...], ...]]]:
    found = [one for one in axes.collections if isinstance(one, LineCollection)]
    return [
        {tuple(tuple(map(float, point)) for point in line) for line in one.get_segments()} for one in found
    ]


def test_draws_kept_dark_and_zero_light_with_lines_between(tmp_path: Path) -> None:
    seen = look(tmp_path, torch.tensor([[1.0, 0, 0, 2, 0, 3, 4, 0]]), TWO_OF_FOUR)
    _, axes = drawn(seen)
    dark, light = TINTS[0]
    assert colours(axes) == [[dark, light, light, dark, light, dark, dark, light]]
    thin, thick = segments(axes)
    assert thin == {((float(x), 0.0), (float(x), 1.0)) for x in range(1, 8)}
    assert thick == {((4.0, 0.0), (4.0, 1.0))}
    assert axes.get_title(loc="left") == "1x8 F32, scope.w: 2 of 4 blocks"
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["kept", "zero", "block", "scope"]


def test_thick_lines_are_thicker(tmp_path: Path) -> None:
    _, axes = drawn(look(tmp_path, torch.rand(4, 8), TWO_OF_FOUR))
    thin, thick = (one for one in axes.collections if isinstance(one, LineCollection))
    assert float(np.max(thin.get_linewidth())) * 2 < float(np.min(thick.get_linewidth()))


def test_parts_of_a_scope_that_lie_apart_have_one_tint_and_what_no_rule_reaches_is_grey(
    tmp_path: Path,
) -> None:
    figure, axes = drawn(look(tmp_path, torch.ones(2, 20), HALVES))
    dark = [pair[0] for pair in TINTS]
    half = [dark[0]] * 2 + [dark[1]] * 2 + [dark[2]] * 2 + [dark[0]] * 2
    assert colours(axes)[0] == half + half + [UNREACHED[0]] * 4
    assert any("tint" in text for text in texts(figure))


def test_dark_is_dark_and_light_is_light_in_grey() -> None:
    def grey(colour: str) -> float:
        red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
        return 0.3 * red + 0.59 * green + 0.11 * blue

    pairs = (*TINTS, UNREACHED)
    assert max(grey(dark) for dark, _ in pairs) + 0.25 < min(grey(light) for _, light in pairs)


def test_without_a_spec_there_are_no_lines(tmp_path: Path) -> None:
    _, axes = drawn(look(tmp_path, torch.rand(8, 8)))
    assert segments(axes) == []
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["kept", "zero"]


def test_axes_count_the_elements_of_the_tensor(tmp_path: Path) -> None:
    tensor = torch.ones(400, 300)
    tensor[200] = 0
    seen = look(tmp_path, tensor)
    figure, axes = drawn(seen)
    labels = [int(label.get_text()) for label in axes.get_yticklabels()]
    places = [round(float(place) - 0.5) + seen.begin[0] for place in axes.get_yticks()]
    assert labels == places
    assert seen.begin == (176, 0)
    assert labels[0] == 176
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("column", "row")
    assert "A part: 64x64 of 400x300." in texts(figure)


def test_tells_which_dimensions_are_seen_and_where_the_others_stand(tmp_path: Path) -> None:
    figure, axes = drawn(look(tmp_path, torch.ones(2, 3, 4)))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("dimension 2", "dimension 1")
    assert "Dimension 0: index 0." in texts(figure)
    figure, _ = drawn(look(tmp_path, torch.ones(5, 4, 3, 3)))
    assert "Dimensions 2, 3: index 0." in texts(figure)


@pytest.mark.parametrize(
    "shape", [(), (1,), (7,), (10_000,), (1, 1), (1, 5000), (5000, 1), (64, 2), (3, 100_000), (2, 3, 4)]
)
@pytest.mark.parametrize("name", ["w", "[red]$a$\nb", "a.very.long.name" * 12])
def test_any_shape_and_name_is_drawn_and_nothing_is_cut_off(
    tmp_path: Path, shape: tuple[int, ...], name: str
) -> None:
    figure, axes = drawn(look(tmp_path, (torch.arange(prod(shape)) % 2).reshape(shape).byte(), name=name))
    assert figure.get_size_inches().max() < 14
    assert axes.get_title(loc="left").endswith(" U8")


def test_many_rules_are_counted_in_the_title() -> None:
    labels = np.zeros((2, 2), dtype=np.int64)
    rules = tuple(f"scope.{number}: 1 of 2 blocks" for number in range(5))
    seen = CloseUp("w", "F32", (2, 2), (0, 1), (0, 0), np.ones((2, 2), bool), rules, Cells(labels, labels))
    figure, axes = drawn(seen)
    assert axes.get_title(loc="left").endswith("scope.1: 1 of 2 blocks, 3 more rules")
    assert "All that is seen belongs to one scope." in texts(figure)


def test_a_page_holds_the_marks(tmp_path: Path) -> None:
    seen = look(tmp_path, torch.tensor([[1.0, 0], [0, 0]]))
    plot_mask(seen, tmp_path / "out.html")
    text = (tmp_path / "out.html").read_text()
    assert "<td>0</td><td>1</td><td>10</td>" in text
    assert "<td>1</td><td>0</td><td>00</td>" in text


def test_codes_that_stand_for_zero_are_seen_as_zero(tmp_path: Path) -> None:
    zero = torch.tensor([[3], [-5]], dtype=torch.int8)
    codes = torch.tensor([[3, 0, 3, 1], [0, -5, 2, -5]], dtype=torch.int8)
    found = {"w": codes, "w_scale": torch.ones(2, 1), "w_zero_point": zero}
    save_file(found, tmp_path / "m.safetensors")
    with TensorReader() as reader:
        seen = close_up(open_checkpoint(tmp_path / "m.safetensors").tensors["w"], reader)
    assert torch.equal(torch.from_numpy(seen.kept), codes != zero)


def test_packed_codes_are_not_drawn(tmp_path: Path) -> None:
    found = {"a.qweight": torch.ones(2, 4, dtype=torch.int32), "a.scales": torch.ones(1, 4)}
    save_file(found, tmp_path / "m.safetensors")
    stored = open_checkpoint(tmp_path / "m.safetensors").tensors["a.qweight"]
    with (
        TensorReader() as reader,
        pytest.raises(SparsepruneError, match=r"a\.qweight holds integer codes, several"),
    ):
        close_up(stored, reader)
