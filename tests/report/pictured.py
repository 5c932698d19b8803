"""Documents to draw, and what is on a figure: for the tests of pictures."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from math import prod

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from sparseprune.execution.inspect import Questions, TensorFacts
from sparseprune.report.inspection import make_inspection
from sparseprune.results import Inspection
from sparseprune.results.measuring import ComparedTensor, CompareTotals, Comparison
from tests.commands import as_data, schema

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def facts(name: str, sparsity: float | None, shape: tuple[int, ...] = (10, 100)) -> TensorFacts:
    numel = prod(shape)
    return TensorFacts(name, "BF16", shape, numel, None if sparsity is None else round(numel * sparsity))


def inspected(tensors: Iterable[TensorFacts], path: str = "model") -> Inspection:
    """An inspection with these facts."""
    found = make_inspection(path, tensors, Questions())
    schema("inspect").validate(as_data(found))
    return found


def decoder(
    layers: int, sparsity: Callable[[int, int], float | None], kinds: Iterable[str] = KINDS
) -> Inspection:
    """The inspection of a decoder with an embedding and norms; `sparsity` of layer and matrix, by number."""
    tensors = [facts("model.embed_tokens.weight", 0.0), facts("model.norm.weight", 0.5, (8,))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors.append(facts(f"{prefix}.input_layernorm.weight", 0.0, (8,)))
        tensors += [
            facts(f"{prefix}.{kind}.weight", sparsity(layer, number)) for number, kind in enumerate(kinds)
        ]
    return inspected(tensors)


def compared(
    tensors: Mapping[str, tuple[float | None, float | None]],
    shape: tuple[int, ...] = (10, 100),
    numel: Mapping[str, int] | None = None,
) -> Comparison:
    """A comparison: of each tensor energy kept and relative error; (1, 0) did not change. Half is zeroed."""
    entries = tuple(
        ComparedTensor(
            name=name, dtype="F32", dtype_after="F32", shape=shape,
            numel=(numel or {}).get(name, prod(shape)), differs=(energy, error) != (1, 0), sparsity=0.5,
            zeros_before=0, zeros_after=500, changed=500, revived=0, altered=0,
            zeroed=(numel or {}).get(name, prod(shape)) // 2,
            first_altered=None, energy_kept=energy, relative_error=error, output_error=None, loss_error=None,
            largest_change=1.0, largest_change_at=(0,) * len(shape),
        )
        for name, (energy, error) in tensors.items()
    )  # fmt: skip
    totals = CompareTotals(
        tensors=7, numel=7, differing=7, uncompared=7, sparsity_before=0.0, sparsity=0.5, zeros_before=7,
        zeros_after=7, changed=7, zeroed=7, revived=0, altered=0, energy_kept=0.9, relative_error=0.316,
        added=0, removed=0, reshaped=0, output_error=None, loss_error=None,
    )  # fmt: skip
    found = Comparison(
        dense="dense", pruned="pruned", totals=totals, tensors=entries, added=(), removed=(), reshaped=()
    )
    schema("compare").validate(as_data(found))
    return found


def texts(figure: Figure) -> list[str]:
    """All that is written on a figure."""
    return [text.get_text() for text in _written(figure)]


def titled(figure: Figure, title: str) -> Axes:
    """The axes of this title."""
    return next(axes for axes in figure.axes if axes.get_title(loc="left") == title)


def faults(figure: Figure) -> list[tuple[str, ...]]:
    """Texts that are not wholly on the figure; pairs of labels, or of a title and anything, that touch.

    Slanted labels are not looked at, boxes around them overlap anyway.
    """
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    boxes = {text: text.get_window_extent(renderer) for text in _written(figure)}
    width, height = figure.bbox.width, figure.bbox.height
    found: list[tuple[str, ...]] = [
        (text.get_text(),)
        for text, box in boxes.items()
        if min(box.x0, box.y0) < 0 or box.x1 > width or box.y1 > height
    ]
    level = [text for text in boxes if text.get_rotation() in {0, 90}]
    for axes in figure.axes:
        title: Text = axes._left_title  # type: ignore[attr-defined]
        for labels in (axes.get_xticklabels(), axes.get_yticklabels(), [title, *level]):
            chosen = [label for label in labels if label in level]
            pairs = ((chosen[0], other) for other in chosen[1:]) if title in chosen else pairwise(chosen)
            found += [
                (one.get_text(), other.get_text())
                for one, other in pairs
                if one is not other and boxes[one].overlaps(boxes[other])
            ]
    return found


def _written(figure: Figure) -> list[Text]:
    figure.draw_without_rendering()
    unseen = {label for axes in figure.axes for label in _unseen(axes)}
    return [
        text
        for text in figure.findobj(Text)
        if isinstance(text, Text) and text.get_text().strip() and text.get_visible() and text not in unseen
    ]


def _unseen(axes: Axes) -> Iterator[Text]:
    """Labels of ticks that matplotlib has and does not draw: beyond the ends, or of axes that are off."""
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if not axes.axison or not low <= tick.get_loc() <= high:
                yield from (tick.label1, tick.label2)
