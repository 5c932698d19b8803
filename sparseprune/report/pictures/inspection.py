"""The picture of what `inspect` found: sparsity layer by matrix, and the survivors of every scope.

Takes the inspect document. Owns what is shown of a checkpoint and what is left out with a note.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from sparseprune.report.pictures.canvas import blank, fitted, settings
from sparseprune.report.pictures.heatmap import Scale
from sparseprune.report.pictures.histograms import budgets_of, histograms
from sparseprune.report.pictures.layers import grid_of, matrices, mean_of
from sparseprune.report.pictures.overview import Fact, numbers_of, overview
from sparseprune.report.pictures.page import Numbers, Page, Picture, write

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

SPARSITY = Scale("share of zeros")


def plot_inspection(
    document: Mapping[str, Any], path: Path, survivors: Sequence[Mapping[str, Any]] | None = None
) -> None:
    """Write the picture of an inspect document to a .png, .svg or .html file.

    `survivors` has for each rule its name `rule`, its budget `nnz` (an integer, several, or None) and its
    `histogram`: pairs of the non-zero blocks of a scope and how many scopes have so many.
    """
    with settings():
        write(inspection_page(document, survivors or ()), path)


def inspection_page(document: Mapping[str, Any], survivors: Sequence[Mapping[str, Any]]) -> Page:
    """The page, with its figures drawn; to be called under `settings`."""
    totals = document["totals"]
    facts = (
        ("tensors", f"{totals['tensors']:,}"),
        ("elements", f"{totals['numel']:,}"),
        ("zeros", f"{totals['pruned']:,}"),
        ("sparsity", f"{totals['sparsity']:.2%}"),
        *((f"satisfy {name}", f"{count:,}") for name, count in totals["patterns"].items() if count),
    )
    pictures = [_sparsity(document)]
    if survivors:
        pictures.append(_survivors(survivors))
    return Page(f"Sparsity of {document['input']}", tuple(pictures), facts)


def _sparsity(document: Mapping[str, Any]) -> Picture:
    entries = document["tensors"]
    shown = matrices(entries) or list(entries)
    grid = grid_of(shown)
    fact = Fact("Sparsity in percent", SPARSITY, partial(mean_of, "sparsity"))
    figure = blank()
    overview(figure, grid, (fact,), _left_out(entries, shown))
    caption = (
        "The share of zeros in every matrix. Matrices that a layer has several of, such as those of experts, "
        "count together."
    )
    return Picture(fitted(figure), caption, numbers_of(grid, (fact,)))


def _left_out(entries: Sequence[Mapping[str, Any]], shown: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What the picture does not show, in a sentence."""
    if not entries:
        return ("There are no tensors.",)
    count = len(entries) - len(shown)
    if not count:
        return ()
    zeros = sum(entry["zeros"] or 0 for entry in entries) - sum(entry["zeros"] or 0 for entry in shown)
    plural = "tensor" if count == 1 else "tensors"
    having = f"with {zeros:,} zeros" if zeros else "without a zero"
    return (f"Not shown: {count:,} {plural} of less than two dimensions, {having}.",)


def _survivors(survivors: Sequence[Mapping[str, Any]]) -> Picture:
    figure = blank()
    histograms(figure, 0, survivors)
    rows = tuple(
        (rule["rule"], _budget_text(rule["nnz"]), f"{blocks:,}", f"{scopes:,}")
        for rule in survivors
        for blocks, scopes in rule["histogram"]
    )
    caption = (
        "For every rule how many of its scopes have so many blocks that are not zero. The dashed line is the "
        "budget nnz; hatched scopes are above it."
    )
    numbers = Numbers(("rule", "nnz", "blocks that are not zero", "scopes"), rows)
    return Picture(fitted(figure), caption, (numbers,))


def _budget_text(nnz: object) -> str:
    return " ".join(f"{budget:,}" for budget in budgets_of(nnz)) or "-"
