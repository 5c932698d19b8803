"""How many scopes have how many survivors: a histogram for each rule, the budget as a line in it.

Owns binning and scales. Takes the numbers of `verify`: for each rule pairs of non-zero blocks and scopes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import MaxNLocator, NullLocator

from sparseprune.errors import printable
from sparseprune.report.pictures.canvas import axes_at

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WITHIN, ABOVE, BUDGET = "#35618f", "#d55e00", "#111111"
_BINS = 60
_UNLIKE = 100  # times as many scopes in the highest bar as in the lowest: then heights are logarithmic
_WIDTH, _HEIGHT, _ACROSS, _DOWN = 3.6, 1.9, 0.9, 0.95  # inches of a panel, and between two
_STEPS = (1, 2, 5, 10)
_BUDGETS = 4  # lines; of more unlike budgets the first and the last


@dataclass(frozen=True, slots=True)
class Bins:
    """Bars from `edges[i]` up to and without `edges[i + 1]`: `counts[i]` scopes with so many survivors."""

    edges: tuple[int, ...]
    counts: tuple[int, ...]


def binned(histogram: Sequence[Sequence[int]], bins: int = _BINS) -> Bins:
    """Pairs of survivors and scopes as bars of one width, a whole number of survivors.

    >>> binned([[0, 3], [2, 5]])
    Bins(edges=(0, 1, 2, 3), counts=(3, 0, 5))
    >>> binned([[10, 1], [1009, 2]], bins=2)
    Bins(edges=(10, 510, 1010), counts=(1, 2))
    """
    known = [(survivors, scopes) for survivors, scopes in histogram if scopes]
    if not known:
        return Bins((0, 1), (0,))
    first, last = min(known)[0], max(known)[0]
    step = -(-(last + 1 - first) // bins)
    number = -(-(last + 1 - first) // step)
    counts = [0] * number
    for survivors, scopes in known:
        counts[(survivors - first) // step] += scopes
    return Bins(tuple(first + step * at for at in range(number + 1)), tuple(counts))


def budgets_of(nnz: object) -> tuple[int, ...]:
    """The budgets of a rule, each once, sorted: those of its instances may be unlike, or there is none."""
    listed: Sequence[Any] = nnz if isinstance(nnz, list | tuple) else [nnz]
    return tuple(sorted({one for one in listed if one is not None}))


def histograms(figure: Figure, top: float, survivors: Sequence[Mapping[str, Any]]) -> list[Axes]:
    """Draw a panel for each rule, two beside each other; gives their axes."""
    return [
        _panel(
            axes_at(
                figure,
                number % 2 * (_WIDTH + _ACROSS),
                top + number // 2 * (_HEIGHT + _DOWN),
                _WIDTH,
                _HEIGHT,
            ),
            rule,
        )
        for number, rule in enumerate(survivors)
    ]


def _panel(axes: Axes, rule: Mapping[str, Any]) -> Axes:
    bins = binned(rule["histogram"])
    budgets = budgets_of(rule["nnz"])
    starts, widths = np.array(bins.edges[:-1]), np.diff(bins.edges)
    allowed = budgets[-1] if budgets else math.inf
    colours = [ABOVE if start > allowed else WITHIN for start in bins.edges[:-1]]
    single = widths[0] == 1
    axes.bar(
        starts if single else starts + widths / 2 - 0.5,
        bins.counts,
        width=widths * (0.82 if single and len(starts) < 40 else 1.0),
        color=colours,
        hatch=["////" if colour == ABOVE else "" for colour in colours],
        edgecolor=["white" if colour == ABOVE else colour for colour in colours],
        linewidth=0 if ABOVE in colours or single else 0.4,  # bars that touch have no seams then
    )
    there = [count for count in bins.counts if count]
    if there and max(there) > _UNLIKE * min(there):
        axes.set_yscale("log")
        axes.set_ylim(0.6, max(there) * 4)
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, max(there, default=1) * 1.2)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(lambda value, _: _short(value))
    _frame(axes, bins, budgets)
    _budgets(axes, budgets)
    axes.set_title(f"Survivors per scope of {_cut(printable(rule['rule']), 26)}")
    axes.set_xlabel("blocks that are not zero")
    axes.set_ylabel("scopes")
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _frame(axes: Axes, bins: Bins, budgets: Sequence[int]) -> None:
    """From zero where that is near, else from what there is to see; whole numbers below."""
    first = min([bins.edges[0], *budgets])
    last = max([bins.edges[-1] - 1, *budgets])
    if first <= 2 * (last - first) or last <= _BINS:
        first = 0
    room = 2.5 if first == last else max(0.75, (last - first) * 0.05)
    axes.set_xlim(first - room, last + room)
    wide = last - first >= last / 100  # so that a few digits tell the numbers apart
    shown = _short if wide else _exact
    ticks = 5 if wide or last < 10**6 else 2
    axes.xaxis.set_major_locator(MaxNLocator(ticks, steps=_STEPS, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(lambda value, _: shown(value) if value >= 0 else "")


def _budgets(axes: Axes, budgets: Sequence[int]) -> None:
    if not budgets:
        return
    shown = budgets if len(budgets) <= _BUDGETS else (budgets[0], budgets[-1])
    for budget in shown:
        axes.axvline(budget, color=BUDGET, linewidth=1.1, linestyle=(0, (4, 2)))
    text = f"nnz {budgets[0]:,}" + (f" to {budgets[-1]:,}" if len(budgets) > 1 else "")
    low, high = axes.get_xlim()
    at = (budgets[-1] - low) / (high - low)
    axes.annotate(
        text,
        (at, 1.0),
        xycoords="axes fraction",
        xytext=(-3 if at > 0.5 else 3, -2),
        textcoords="offset points",
        ha="right" if at > 0.5 else "left",
        va="top",
        fontsize=7.5,
        color=BUDGET,
        bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.0},
    )


def _short(value: float) -> str:
    """A count on an axis.

    >>> _short(1200), _short(12_500_000), _short(98304)
    ('1,200', '12.5M', '98,304')
    """
    for unit, letter in ((10**9, "G"), (10**6, "M")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{letter}"
    return f"{value:,.0f}"


def _exact(value: float) -> str:
    return f"{value:,.0f}"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most // 2 - 1) :]}"
