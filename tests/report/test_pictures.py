"""Pictures of what inspect and compare found: what is drawn where, and that nothing is cut off."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from msgspec.structs import replace

from sparseprune.execution.inspect import Questions, Zeros
from sparseprune.report.inspection import grouping_of, make_inspection
from sparseprune.report.pictures.canvas import axes_at, blank, fitted, settings
from sparseprune.report.pictures.charts import (
    ABOVE,
    COLOURS,
    MARKERS,
    NOTHING,
    WITHIN,
    Survivors,
    binned,
    grid_of,
    histograms,
    mean_of,
    place_of,
)
from sparseprune.report.pictures.results import comparison_page, inspection_page
from sparseprune.results import Inspection
from sparseprune.results.measuring import InspectedTensor
from tests.report.pictured import KINDS, compared, decoder, facts, faults, inspected, texts, titled

Histogram = Sequence[tuple[int, int]]
Budgets = Sequence[int | None]

pytestmark = pytest.mark.usefixtures("under_settings")

SPARSITY = "Sparsity in percent"
OTHERS = "Outside of numbered layers"
BEYOND = "Energy kept beyond a random choice"
ERROR = "Relative error of the weights"


def figures(found: Inspection, survivors: list[Survivors] | None = None) -> list[Figure]:
    return [picture.figure for picture in inspection_page(found, survivors or ()).pictures]


def tensor(name: str, shape: tuple[int, ...] = (1,), sparsity: float | None = 0.0) -> InspectedTensor:
    return inspected([facts(name, sparsity, shape)]).tensors[0]


def cells(axes: Axes) -> np.ma.MaskedArray[Any, Any]:
    (mesh,) = [one for one in axes.collections if isinstance(one, QuadMesh)]
    values = mesh.get_array()
    assert values is not None
    return np.ma.asarray(values)


def test_faults_are_found_where_there_are_some() -> None:
    figure = blank()
    axes = axes_at(figure, 1, 1, 2, 2)
    axes.set_yticks([0.5, 0.51], labels=["touching", "touched"])
    axes.set_title("title")
    axes.text(0, 1.01, "below the title")
    axes.text(0, -20, "far below")
    assert set(faults(figure)) == {("far below",), ("touching", "touched"), ("title", "below the title")}


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up_proj.weight", ("model.layers", "3", "mlp.up_proj.weight")),
        ("h.11.attn.c_attn.weight", ("h", "11", "attn.c_attn.weight")),
        ("0.up.weight", ("", "0", "up.weight")),
        ("layer1.0.conv1.weight", ("layer1", "0", "conv1.weight")),
        ("layers.2.experts.7.w1", ("layers", "2", "experts.*.w1")),
        ("lm_head.weight", None),
        ("layers.3", None),
        ("layers.3x.w", None),
        ("layers.٣.w", None),
        ("", None),
    ],
)
def test_takes_a_name_apart_at_its_first_number(name: str, place: tuple[str, str, str] | None) -> None:
    assert place_of(name) == place


def test_rows_are_in_the_order_of_their_numbers_and_columns_as_they_are_met() -> None:
    names = ["h.10.b.weight", "h.10.a.weight", "h.2.a.weight", "x"]
    grid = grid_of([tensor(name) for name in names])
    assert grid.row_labels() == ["2", "10"]
    assert grid.column_labels() == ["b", "a"]
    assert [entry.name for entry in grid.others] == ["x"]


def test_keeps_the_ending_where_labels_would_be_alike() -> None:
    grid = grid_of([tensor(f"h.0.{name}") for name in ("a", "a.weight")])
    assert grid.column_labels() == ["a", "a.weight"]


def test_stacks_are_named_by_what_tells_them_apart() -> None:
    grid = grid_of([tensor(f"model.{stack}.0.w") for stack in ("encoder.layers", "decoder.layers")])
    assert grid.row_labels() == ["encoder.layers.0", "decoder.layers.0"]


def test_the_mean_counts_elements_and_leaves_out_what_is_not_known() -> None:
    whole, none, unknown = tensor("a", (1,), 1.0), tensor("b", (3,), 0.0), tensor("c", (50,), None)
    assert mean_of("sparsity", [whole, none, unknown]) == 0.25
    assert mean_of("sparsity", [unknown]) is None
    assert mean_of("sparsity", [tensor("d", (0,), 0.0)]) == 0


def test_draws_the_sparsity_of_every_layer_and_matrix() -> None:
    (figure,) = figures(decoder(3, lambda layer, number: layer / 10 + number / 100))
    axes = titled(figure, SPARSITY)
    wanted = [[layer / 10 + number / 100 for number in range(len(KINDS))] for layer in range(3)]
    assert np.allclose(cells(axes), wanted)
    assert [label.get_text() for label in axes.get_xticklabels()] == list(KINDS)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "2"]
    assert axes.get_ylim() == (3, 0)  # the first layer is at the top
    assert axes.get_ylabel() == "model.layers"
    assert [text.get_text() for text in axes.texts[:5]] == ["0", "1", "2", "3", "10"]


@pytest.mark.parametrize(
    ("values", "ends"),
    [([0.5, 0.5], (0.45, 0.55)), ([0.2, 0.8], (0.2, 0.8)), ([0.0, 0.01], (0, 0.06)), ([1.0, 1.0], (0.95, 1))],
)
def test_colours_go_over_ten_points_at_least_and_the_bar_says_which(
    values: Sequence[float], ends: tuple[float, float]
) -> None:
    (figure,) = figures(decoder(2, lambda layer, _: values[layer]))
    mesh = titled(figure, SPARSITY).collections[0]
    assert mesh.get_clim() == pytest.approx(ends)
    assert mesh.get_cmap().name == "cividis"
    said = f"share of zeros\n{100 * ends[0]:g}% to {100 * ends[1]:g}%"
    assert said in texts(figure)


def test_errors_are_drawn_from_zero_on_and_energies_are_not_zoomed_into_without_limit() -> None:
    figure = compared_figure({f"h.{layer}.w": (0.928 + layer / 1000, 0.27) for layer in range(2)})
    low, high = titled(figure, BEYOND).get_ylim()
    assert 0.1 <= high - low < 0.2
    assert titled(figure, ERROR).get_ylim()[0] == 0


def test_of_one_sparsity_everywhere_the_kind_of_zeros_is_drawn() -> None:
    kinds = {"a": ("2:4",), "b": ("2:4", "4:8"), "c": ()}
    tensors = [
        replace(facts(f"h.{layer}.{name}", 0.5), patterns=patterns)
        for layer in range(2)
        for name, patterns in kinds.items()
    ]
    (figure,) = figures(inspected(tensors))
    axes = titled(figure, "Where zeros lie: 50% of every matrix")
    assert [text.get_text() for text in axes.texts] == ["2:4", "2:4", "any"] * 2
    assert SPARSITY not in [one.get_title(loc="left") for one in figure.axes]


def test_of_unlike_sparsity_both_are_drawn() -> None:
    rows = replace(facts("h.0.a", 0.5), rows=Zeros(5, 10))
    (figure,) = figures(inspected([rows, facts("h.0.b", 0.0), facts("h.1.a", 0.25)]))
    kinds = [text.get_text() for text in titled(figure, "Where zeros lie").texts]
    assert kinds == ["rows", "none", "any", ""]
    assert np.allclose(cells(titled(figure, SPARSITY)).compressed(), [0.5, 0, 0.25])


def test_groups_are_bars_from_zero_to_what_they_reach() -> None:
    found = decoder(3, lambda layer, _: layer / 10)
    groups = make_groups(found)
    (figure,) = figures(groups)
    axes = titled(figure, "Sparsity by layer")
    widths = [bar.get_width() for bar in axes.patches]  # type: ignore[attr-defined]
    assert widths == pytest.approx([group.sparsity for group in groups.groups or ()])
    assert axes.get_xlim()[0] == 0
    assert faults(figure) == []


def make_groups(found: Inspection) -> Inspection:
    names = [entry.name for entry in found.tensors]
    listed = [facts(entry.name, entry.sparsity, tuple(entry.shape)) for entry in found.tensors]
    return make_inspection("model", listed, Questions(), (), grouping_of("layer", names, None))


def test_a_rule_whose_scopes_are_all_alike_is_told_in_a_sentence() -> None:
    (figure,) = figures(decoder(1, lambda *_: 0.5), survivors([(2, 90)], (2,)))
    assert texts(figure)[-1].endswith("scope.w: each of its 90 scopes keeps 2 blocks, nnz 2.")


def test_draws_what_belongs_to_no_layer_apart_and_notes_what_is_left_out() -> None:
    (figure,) = figures(decoder(2, lambda *_: 0.5))
    assert texts(figure)[-1] == (
        "model.embed_tokens: share of zeros 0%.\n"
        "Not shown: 3 tensors of less than two dimensions, with 4 zeros."
    )


def test_experts_count_together_by_their_elements() -> None:
    tensors = [facts(f"layers.0.experts.{n}.up.weight", s, (2, n + 1)) for n, s in enumerate((1.0, 0.0))]
    (figure,) = figures(inspected(tensors))
    axes = titled(figure, SPARSITY)
    assert np.allclose(cells(axes), [[2 / 6]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["experts.*.up"]


def test_a_matrix_that_is_not_there_is_grey_and_has_no_number() -> None:
    tensors = [facts("h.0.a", 0.5), facts("h.0.b", 0.25), facts("h.1.a", 0.75), facts("h.2.b", None)]
    (figure,) = figures(inspected(tensors))
    axes = titled(figure, SPARSITY)
    assert cells(axes).mask.tolist() == [[False, False], [False, True], [True, True]]
    assert [text.get_text() for text in axes.texts] == ["50", "25", "75"]
    assert to_hex(axes.get_facecolor()) == NOTHING
    assert any("Grey" in text for text in texts(figure))


def test_draws_bars_where_no_name_has_a_number() -> None:
    tensors = [facts("up", 0.25), facts("down", 0.75), facts("norm", 0.0, (4,)), facts("f4", None)]
    (figure,) = figures(inspected(tensors))
    axes = titled(figure, SPARSITY)
    assert [bar.get_width() for bar in axes.patches] == [0.25, 0.75, 0]  # type: ignore[attr-defined]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["up", "down", "f4"]
    assert [text.get_text() for text in axes.texts] == ["25%", "75%", "-"]
    assert axes.get_xlim() == (0, 0.75)


def test_a_checkpoint_of_vectors_alone_is_drawn() -> None:
    (figure,) = figures(inspected([facts("a.0.norm", 0.5, (4,))]))
    assert np.allclose(cells(titled(figure, SPARSITY)), [[0.5]])


def test_an_empty_checkpoint_says_so() -> None:
    (figure,) = figures(inspected([]))
    assert texts(figure) == ["There are no tensors."]


def test_of_many_tensors_without_a_layer_the_largest_are_drawn() -> None:
    tensors = [facts(f"w{chr(97 + n)}", n / 20, (n + 1, 100)) for n in range(20)]
    layered = [facts("h.0.w", 0.5)]
    (figure,) = figures(inspected(tensors + layered))
    labels = [label.get_text() for label in titled(figure, OTHERS).get_yticklabels()]
    assert labels == [f"w{chr(97 + n)}" for n in range(8, 20)]
    hidden = "Not shown: 8 smaller tensors that belong to no numbered layer."
    assert any(hidden in text for text in texts(figure))


@pytest.mark.parametrize(("layers", "kinds"), [(1, 1), (1, 40), (2, 3), (32, 7), (400, 2), (3, 300)])
def test_nothing_is_cut_off_and_labels_do_not_touch(layers: int, kinds: int) -> None:
    names = [f"some_block.{number:03d}_projection_with_a_long_name_{number % 7}" for number in range(kinds)]
    (figure,) = figures(decoder(layers, lambda *_: random.Random(0).random(), names))
    assert faults(figure) == []
    assert max(figure.get_size_inches()) < 40
    assert len(titled(figure, SPARSITY).texts) in {0, layers * kinds}


def test_numbers_stand_in_cells_of_128_layers() -> None:
    (figure,) = figures(decoder(128, lambda *_: 0.5))
    assert len(titled(figure, SPARSITY).texts) == 128 * len(KINDS)


@pytest.mark.parametrize(
    "name", ["$x$ and $y^2$", "[red]w[/]", "a\nb", "漢字", "_hidden", "<script>", "x" * 300, "%s {0} \\frac"]
)
def test_names_are_drawn_as_they_are(name: str) -> None:
    wanted = name.replace("\n", "\\n")
    for document in (
        inspected([facts(name, 0.5), facts("other", 0.25)]),
        inspected([facts(f"h.0.{name}", 0.5), facts("h.1.b", 1)]),
    ):
        (figure,) = figures(document)
        assert faults(figure) == []
        assert any(text == wanted or text[-20:] == wanted[-20:] for text in texts(figure))


def survivors(histogram: Histogram, nnz: Budgets = (), rule: str = "scope.w") -> list[Survivors]:
    return [Survivors(rule, nnz, histogram)]


def panel(histogram: Histogram, nnz: Budgets = ()) -> Axes:
    figure = blank()
    (axes,) = histograms(figure, 0, survivors(histogram, nnz))
    assert faults(fitted(figure)) == []
    return axes


def bars_of(axes: Axes) -> list[tuple[float, float]]:
    """Where the middle of every bar is that is not empty, and its height."""
    bars: list[Any] = list(axes.patches)
    return [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in bars if bar.get_height()]


def lines_of(axes: Axes) -> list[float]:
    return [float(np.asarray(line.get_xdata())[0]) for line in axes.lines]


def test_a_bar_for_each_number_of_survivors_and_a_line_for_the_budget() -> None:
    axes = panel([(0, 3), (2, 40)], (2,))
    assert [(round(at, 9), height) for at, height in bars_of(axes)] == [(0, 3), (2, 40)]
    assert lines_of(axes) == [2]
    assert axes.get_title(loc="left") == "Survivors per scope of scope.w"
    assert axes.get_yscale() == "linear"
    assert any(text.get_text() == "nnz 2" for text in axes.texts)


def test_scopes_above_the_budget_are_told_apart_by_colour_and_hatch() -> None:
    bars: list[Any] = list(panel([(1, 9), (2, 9), (3, 9)], (2,)).patches)
    assert [to_hex(bar.get_facecolor()) for bar in bars] == [WITHIN, WITHIN, ABOVE]
    assert [bar.get_hatch() or "" for bar in bars] == ["", "", "////"]


def test_a_budget_that_no_scope_reaches_is_seen() -> None:
    axes = panel([(3, 9)], (50,))
    low, high = axes.get_xlim()
    assert low < 3
    assert high > 50


def test_unlike_budgets_are_lines_of_their_own_and_few() -> None:
    assert lines_of(panel([(1, 9)], [1, 2, 2, 3])) == [1, 2, 3]
    assert lines_of(panel([(1, 9)], list(range(1, 30)))) == [1, 29]


@pytest.mark.parametrize("nnz", [[None, None], []])
def test_a_rule_without_a_budget_has_no_line(nnz: list[int | None]) -> None:
    axes = panel([(0, 4), (1, 9)], nnz)
    assert lines_of(axes) == []
    assert all(to_hex(bar.get_facecolor()) == WITHIN for bar in axes.patches)


def test_heights_are_logarithmic_where_few_scopes_stand_beside_very_many() -> None:
    axes = panel([(1, 2), (2, 10**9)], (2,))
    assert axes.get_yscale() == "log"
    assert axes.get_ylim()[0] < 1
    assert [round(height) for _, height in bars_of(axes)] == [2, 10**9]


def test_thousands_of_counts_are_binned_and_no_scope_is_lost() -> None:
    rng = random.Random(3)
    histogram = [(count, rng.randint(1, 9)) for count in rng.sample(range(10**6), 5000)]
    axes = panel(sorted(histogram), (10**6,))
    assert len(axes.patches) <= 60
    assert sum(height for _, height in bars_of(axes)) == sum(scopes for _, scopes in histogram)


@pytest.mark.parametrize(
    ("first", "last", "bins"), [(0, 0, 4), (5, 5, 4), (0, 59, 60), (0, 60, 60), (7, 1000, 3)]
)
def test_bins_are_alike_and_hold_every_count(first: int, last: int, bins: int) -> None:
    edges, counts = binned([[count, 1] for count in range(first, last + 1)], bins)
    assert len(counts) <= bins
    assert len(set(np.diff(edges).tolist())) == 1
    assert edges[0] <= first
    assert edges[-1] > last
    assert sum(counts) == last + 1 - first


@pytest.mark.parametrize(
    "survivors",
    [[0], [7], [1, 2], [484_442_112], [5 * 10**9, 5 * 10**9 + 3], [0, 5 * 10**9], [999_999, 10**6], [10**12]],
)
def test_numbers_below_the_bars_are_unlike_and_do_not_touch(survivors: list[int]) -> None:
    axes = panel([(count, 3) for count in survivors], (survivors[-1],))
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    labels = [tick.label1.get_text() for tick in ticks if tick.label1.get_text()]
    assert labels
    assert len(labels) == len(set(labels))


def test_a_rule_without_scopes_is_drawn() -> None:
    assert bars_of(panel([], (2,))) == []


def test_every_rule_has_a_panel() -> None:
    rules = [survivors([(n, 5), (n + 1, 1)], (n,), f"scope.{'long_' * n}{n}")[0] for n in range(1, 10)]
    _, figure = figures(decoder(1, lambda *_: 0.5), rules)
    assert len(figure.axes) == 9
    assert faults(figure) == []


def changed(layers: int, kinds: int) -> dict[str, tuple[float | None, float | None]]:
    return {
        f"model.layers.{layer}.block.kind_{kind}.weight": (
            0.9 - layer % 80 / 100 - kind / 1000,
            0.3 + kind / 100,
        )
        for layer in range(layers)
        for kind in range(kinds)
    }


def compared_figure(tensors: Mapping[str, tuple[float | None, float | None]], **more: Any) -> Figure:
    (picture,) = comparison_page(compared(tensors, **more)).pictures
    assert faults(picture.figure) == []
    return picture.figure


def test_draws_a_line_of_energy_and_one_of_error_for_each_kind_of_matrix() -> None:
    figure = compared_figure(changed(3, 2))
    energy, error = (titled(figure, title) for title in (BEYOND, ERROR))
    assert np.allclose(
        [np.asarray(line.get_ydata()) for line in energy.lines], [[0.4, 0.39, 0.38], [0.399, 0.389, 0.379]]
    )
    assert np.allclose([np.asarray(line.get_ydata()) for line in error.lines], [[0.3] * 3, [0.31] * 3])
    assert np.allclose(energy.lines[0].get_xdata(), [0, 1, 2])
    legend = energy.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["block.kind_0", "block.kind_1"]


def test_lines_differ_in_colour_and_in_marker() -> None:
    lines = titled(compared_figure(changed(2, 8)), BEYOND).lines
    assert [line.get_color() for line in lines] == list(COLOURS)
    assert [line.get_marker() for line in lines] == list(MARKERS)
    assert len(set(COLOURS)) == len(set(MARKERS)) == 8


def test_the_legend_lies_outside_of_the_lines() -> None:
    figure = compared_figure(changed(4, 5))
    axes = titled(figure, BEYOND)
    legend = axes.get_legend()
    assert legend is not None
    assert legend.get_window_extent().x0 > axes.get_window_extent().x1


def test_more_kinds_than_colours_are_a_heatmap() -> None:
    figure = compared_figure(changed(2, 9))
    energy = titled(figure, BEYOND)
    assert cells(energy).shape == (2, 9)
    assert np.allclose(cells(energy)[1, 8], 0.4 - 0.01 - 0.008)
    assert np.allclose(cells(titled(figure, ERROR))[0], [0.3 + kind / 100 for kind in range(9)])


def test_what_is_not_known_is_a_gap() -> None:
    tensors = changed(3, 1) | {"model.layers.1.block.kind_0.weight": (None, None)}
    line = titled(compared_figure(tensors), BEYOND).lines[0]
    assert np.isnan(line.get_ydata()).tolist() == [False, True, False]


def test_nothing_at_all_is_known_and_it_is_drawn() -> None:
    figure = compared_figure(dict.fromkeys(changed(2, 2), (None, None)))
    assert len(titled(figure, ERROR).lines) == 2


@pytest.mark.parametrize("width", [0.5, 0.06, 0.0017, 0.00002])
def test_a_tick_of_a_share_says_where_it_stands(width: float) -> None:
    figure = compared_figure({f"h.{layer}.w": (0.8666 + width * layer / 4, 0.5) for layer in range(2)})
    axes = titled(figure, BEYOND)
    figure.canvas.draw()
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(set(labels)) == len(labels) > 1
    told = [float(label.removesuffix("%")) / 100 for label in labels]
    assert np.allclose(told, axes.get_yticks(), rtol=0, atol=width / 1000)
    low, high = axes.get_ylim()
    assert 0.1 <= high - low <= max(0.15, 2 * width)


def test_no_line_leads_from_one_stack_of_layers_to_the_next() -> None:
    tensors = {f"{stack}.{layer}.w": (0.5, 0.5) for stack in ("encoder", "decoder") for layer in range(2)}
    line = titled(compared_figure(tensors), BEYOND).lines[0]
    assert np.isnan(line.get_ydata()).tolist() == [False, False, True, False, False]
    assert np.allclose(np.asarray(line.get_xdata())[[0, 1, 3, 4]], [0, 1, 3, 4])


def test_matrices_that_did_not_change_are_named_and_not_drawn() -> None:
    tensors = changed(2, 1) | {f"model.layers.{layer}.same.weight": (1, 0) for layer in range(2)}
    figure = compared_figure(tensors | {"lm_head.weight": (1, 0)})
    assert len(titled(figure, BEYOND).lines) == 1
    assert "Unchanged and not shown: same, lm_head." in texts(figure)


def test_all_is_drawn_where_nothing_changed() -> None:
    figure = compared_figure(dict.fromkeys(changed(2, 2), (1, 0)))
    assert len(titled(figure, BEYOND).lines) == 2
    assert "None of these changed." in texts(figure)


def test_a_changed_tensor_without_a_layer_is_told_in_words() -> None:
    figure = compared_figure(changed(2, 1) | {"lm_head.weight": (0.875, 0.3536)})
    assert "lm_head.weight: energy kept beyond chance 37.5%, relative error 0.354" in texts(figure)


def test_draws_bars_of_tensors_without_layers() -> None:
    figure = compared_figure({"up": (0.75, 0.5), "down": (0.5, 0.25)})
    energy, error = (titled(figure, title) for title in (BEYOND, ERROR))
    assert [bar.get_width() for bar in energy.patches] == [0.25, 0.0]  # type: ignore[attr-defined]
    assert [bar.get_width() for bar in error.patches] == [0.5, 0.25]  # type: ignore[attr-defined]


def test_of_experts_energy_is_a_mean_and_error_one_of_squares() -> None:
    names = [f"h.0.experts.{number}.w" for number in range(2)]
    tensors = dict(zip(names, ((1.0, 0.0), (0.6, 0.8)), strict=True))
    figure = compared_figure(tensors, numel={names[0]: 100, names[1]: 300})
    assert np.allclose(titled(figure, BEYOND).lines[0].get_ydata(), [0.2])
    assert np.allclose(titled(figure, ERROR).lines[0].get_ydata(), [(0.75 * 0.64) ** 0.5])


@pytest.mark.parametrize("large", [1.5, 1e30, 1e300])
def test_errors_of_any_size_are_drawn(large: float) -> None:
    for kinds in (2, 9):
        tensors = changed(2, kinds)
        tensors["model.layers.1.block.kind_0.weight"] = (1.0, large)
        compared_figure(tensors)


def test_no_tensor_in_common_is_told() -> None:
    assert "There are no tensors that both checkpoints have." in texts(compared_figure({}))


@pytest.mark.parametrize("layers", [1, 2, 40, 128])
def test_layers_of_any_number_have_labels_that_do_not_touch(layers: int) -> None:
    compared_figure(changed(layers, 3))
    stacks = {
        name.replace("model", f"a_long_name_of_stack_{n}"): v
        for n in range(2)
        for name, v in changed(layers, 2).items()
    }
    compared_figure(stacks)


def test_settings_of_a_user_have_no_part_and_are_left_as_they_are() -> None:
    document = decoder(2, lambda *_: 0.5)
    plain = figures(document)[0].get_size_inches().tolist()
    with mpl.rc_context({"font.size": 30.0, "axes.titlesize": 40.0, "figure.dpi": 20.0}):
        before = dict(mpl.rcParams)
        with settings():
            sized = figures(document)[0].get_size_inches().tolist()
        assert dict(mpl.rcParams) == before
    assert sized == plain
