"""The table of a compare document: what changed, tensor by tensor, and below it what is odd.

Tensors that did not change are summed up, unless all are asked for. Gives columns and rows for Markdown,
and rich renderables; whoever calls decides on the stream and its width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from sparseprune.errors import printable
from sparseprune.report.columns import Fact, below, told
from sparseprune.report.fitting import Column, FittedTable
from sparseprune.report.wording import many, percent, shape_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from rich.console import RenderableType

    Entry = Mapping[str, Any]

_LISTED = 6  # tensors that are named below the table for one thing


def compare_table(document: Mapping[str, Any], *, all_tensors: bool) -> RenderableType:
    """The table and the notes below it."""
    columns, rows = columns_and_rows(document, all_tensors=all_tensors)
    table = [FittedTable(columns, rows)] if rows else []
    return Group(*table, *notes(document, all_tensors=all_tensors))


def columns_and_rows(
    document: Mapping[str, Any], *, all_tensors: bool
) -> tuple[list[Column], list[list[str]]]:
    """Every tensor that changed, or all, with the facts that say something anywhere."""
    entries = [one for one in document["tensors"] if all_tensors or one["differs"] is not False]
    return told(_facts(document), entries)


def notes(document: Mapping[str, Any], *, all_tensors: bool) -> Iterator[RenderableType]:
    """What did not change, and all that is to be known of the checkpoints as a whole."""
    totals, tensors = document["totals"], document["tensors"]
    same = [one for one in tensors if one["differs"] is False]
    if same and not all_tensors:
        numel = sum(one["numel"] for one in same)
        yield Text(f"unchanged: {many(len(same), 'tensor')}, {many(numel, 'element')}", "dim")
    if tensors:
        before, after = percent(totals["sparsity_before"]), percent(totals["sparsity"])
        yield Text(f"sparsity: {before} before, {after} after")
    else:
        yield Text("nothing to compare: no tensor has its name and shape in both")
    yield from _survivors(document)
    gone = [one for one in tensors if one["largest_change"] is None and one["largest_change_at"] is not None]
    yield from _named(
        "NaN or infinity came or went", gone, lambda one: f"first at {one['largest_change_at']}"
    )
    unlike = [one for one in tensors if one["dtype"] != one["dtype_after"] and one["differs"] is not None]
    yield from _named(
        "other dtype, values compared", unlike, lambda one: f"{one['dtype']} to {one['dtype_after']}"
    )
    bytewise = [one for one in tensors if one["differs"] and one["changed"] is None]
    yield from _named("differ, bytes compared", bytewise, lambda one: str(one["dtype"]))
    unknown = [one for one in tensors if one["differs"] is None]
    yield from _named("not compared", unknown, lambda one: f"{one['dtype']} and {one['dtype_after']}")
    yield from _named(
        "reshaped",
        document["reshaped"],
        lambda one: f"{shape_text(one['shape'])} to {shape_text(one['shape_after'])}",
    )
    for what in ("added", "removed"):
        yield from _named(what, document[what], lambda one: f"{one['dtype']} {shape_text(one['shape'])}")


def _survivors(document: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Whether what is not zero after is what it was before."""
    totals = document["totals"]
    altered = [one for one in document["tensors"] if one["altered"]]
    if altered:
        count = f"survivors altered: {totals['altered']:,}"
        if totals["revived"]:
            count += f", {totals['revived']:,} of them zero before"
        yield from _named(count, altered, lambda one: f"first at {one['first_altered']}")
    elif totals["zeroed"]:
        yield Text("survivors altered: none")
    elif totals["tensors"] and not totals["differing"] and not totals["uncompared"]:
        yield Text("no tensor differs")


def _facts(document: Mapping[str, Any]) -> list[Fact]:
    totals = document["totals"]
    unlike = any(one["dtype"] != one["dtype_after"] for one in document["tensors"])
    kept = Column("energy kept", footer=_share(totals["energy_kept"]))
    error = Column("relative error", footer=_share(totals["relative_error"]), spare=3)
    return [
        Fact(
            Column("tensor", "left", f"total of {totals['tensors']:,}"),
            lambda one: str(one["name"]),
        ),
        Fact(Column("dtype", "left", spare=2 if unlike else 8), _dtype),
        Fact(Column("shape", "left", spare=7), lambda one: shape_text(one["shape"])),
        Fact(Column("changed", footer=f"{totals['changed']:,}", spare=5), _count("changed")),
        Fact(Column("zeroed", footer=f"{totals['zeroed']:,}", spare=4), _count("zeroed"), frozenset({"0"})),
        Fact(
            Column("altered", footer=f"{totals['altered']:,}", style="yellow"),
            _count("altered"),
            frozenset({"0"}),
        ),
        Fact(Column("sparsity", footer=percent(totals["sparsity"]), spare=1), _known_share("sparsity")),
        Fact(kept, _known_share("energy_kept")),
        Fact(error, _known_share("relative_error")),
        *_outputs(totals),
        Fact(Column("largest change", spare=6), _largest),
    ]


def _outputs(totals: Mapping[str, Any]) -> Iterator[Fact]:
    """The column of output errors, whose foot is their mean; none without statistics."""
    if totals["output_error"] is not None:
        foot = f"{percent(totals['output_error'])} mean"
        yield Fact(
            Column("output error", footer=foot),
            lambda one: "" if one["output_error"] is None else percent(one["output_error"]),
        )


def _dtype(one: Entry) -> str:
    return (
        str(one["dtype"]) if one["dtype"] == one["dtype_after"] else f"{one['dtype']} to {one['dtype_after']}"
    )


def _count(key: str) -> Callable[[Entry], str]:
    return lambda one: "?" if one[key] is None else f"{one[key]:,}"


def _known_share(key: str) -> Callable[[Entry], str]:
    return lambda one: _share(one[key])


def _share(part: float | None) -> str:
    return "?" if part is None else percent(part)


def _largest(one: Entry) -> str:
    if one["largest_change"] is not None:
        return f"{one['largest_change']:#.4g}"
    return "?" if one["largest_change_at"] is None else "not finite"


def _named(what: str, entries: Sequence[Entry], text: Callable[[Entry], str]) -> Iterator[RenderableType]:
    """A line that counts, and one for each of the first tensors."""
    if not entries:
        return
    between = ", in" if ":" in what else ":"
    yield Text(f"{what}{between} {many(len(entries), 'tensor')}")
    for one in entries[:_LISTED]:
        yield below(f"{printable(one['name'])}: {text(one)}")
    if len(entries) > _LISTED:
        yield below(f"and {many(len(entries) - _LISTED, 'more tensor')}: --json lists all")
