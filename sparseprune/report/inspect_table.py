"""The table of an inspect document: which facts have a column, how they read, what is said below.

Gives columns and rows for Markdown, and rich renderables; whoever calls decides on the stream and its width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from sparseprune.errors import printable
from sparseprune.report.columns import Fact, below, told
from sparseprune.report.document import copies_line
from sparseprune.report.fitting import Column, FittedTable
from sparseprune.report.wording import many, percent, shape_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from rich.console import RenderableType

    Entry = Mapping[str, Any]

_REASONS = 6  # that are listed for one runtime


def inspect_table(document: Mapping[str, Any]) -> RenderableType:
    """Every group or tensor of an inspect document with its facts, the totals, and what runtimes can use."""
    columns, rows = columns_and_rows(document)
    return Group(FittedTable(columns, rows), *notes(document))


def columns_and_rows(document: Mapping[str, Any]) -> tuple[list[Column], list[list[str]]]:
    """The table: names, and the facts that say something anywhere."""
    return told(_facts(document), document["groups"] if "groups" in document else document["tensors"])


def notes(document: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What stands below the table."""
    totals = document["totals"]
    satisfied = ", ".join(
        f"{pattern} by {many(count, 'tensor')}" for pattern, count in totals["patterns"].items() if count
    )
    yield Text(f"satisfied: {satisfied or 'no pattern by any tensor'}")
    if totals["uncounted"]:
        dtypes = sorted({entry["dtype"] for entry in document["tensors"] if entry["zeros"] is None})
        uncounted = many(totals["uncounted"], "tensor")
        yield Text(f"not looked at: {uncounted} of {', '.join(dtypes)}, whose elements are no whole bytes")
    yield from map(Text, copies_line("not looked at", document["files_not_read"]))
    for name in totals.get("runtimes", ()):
        yield from _runtime_notes(name, document)


def shared_facts(totals: Entry) -> Iterator[Fact]:
    """The columns that groups, nodes of a tree and tensors have alike, from the sparsity on."""
    never = frozenset({"", "0"})
    runtimes = totals.get("runtimes", ())
    zeros = Column("zeros", footer=f"{totals['pruned']:,}", spare=7)
    yield Fact(zeros, lambda one: _count(one["zeros"]))
    # Where runtimes were asked for, they are what is wanted most.
    sparsity = Column("sparsity", footer=percent(totals["sparsity"]), spare=3 if runtimes else 0)
    yield Fact(sparsity, lambda one: _share(one["sparsity"]))
    patterns = Column("patterns", "left", spare=4)
    yield Fact(patterns, lambda one: " ".join(one["patterns"]), frozenset({""}))
    for key in ("zero_rows", "zero_columns"):
        yield Fact(Column(key.replace("_", " "), footer=f"{totals[key]:,}", spare=5), _known(key), never)
    for shape, count in totals["zero_blocks"].items():
        yield Fact(Column(f"zero {shape}", footer=f"{count['zero']:,}", spare=9), _blocks(shape), never)
    nonfinite = Column("not finite", footer=f"{totals['nonfinite']:,}", style="red")
    yield Fact(nonfinite, _known("nonfinite"), never)
    for name in runtimes:
        yield Fact(Column(name, spare=1), _runtime(name))


def _facts(document: Mapping[str, Any]) -> list[Fact]:
    totals = document["totals"]
    if "groups" in document:
        own = [
            Fact(
                Column(document["by"], "left", f"total of {len(document['groups']):,}"),
                lambda one: str(one["name"]),
            ),
            Fact(
                Column("tensors", footer=f"{totals['tensors']:,}", spare=8),
                lambda one: _count(one["tensors"]),
            ),
            Fact(
                Column("elements", footer=f"{totals['numel']:,}", spare=6), lambda one: _count(one["numel"])
            ),
        ]
    else:
        own = [
            Fact(Column("tensor", "left", f"total of {totals['tensors']:,}"), lambda one: str(one["name"])),
            Fact(Column("dtype", "left", spare=8), lambda one: str(one["dtype"])),
            Fact(Column("shape", "left", spare=6), lambda one: shape_text(one["shape"])),
        ]
    return [*own, *shared_facts(totals)]


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _share(part: float | None) -> str:
    return "?" if part is None else percent(part)


def _known(key: str) -> Callable[[Entry], str]:
    """A number where there is one: vectors have no rows."""
    return lambda one: "" if one[key] is None else f"{one[key]:,}"


def _blocks(shape: str) -> Callable[[Entry], str]:
    return lambda one: f"{one['zero_blocks'][shape]['zero']:,}" if shape in one["zero_blocks"] else ""


def _runtime(name: str) -> Callable[[Entry], str]:
    """Yes or no for a matrix; how many of them for a group."""

    def text(one: Entry) -> str:
        found = one["runtimes"][name]
        if "of" in found:
            return f"{found['eligible']:,} of {found['of']:,}" if found["of"] else "-"
        return "-" if len(one["shape"]) < 2 else "yes" if found["eligible"] else "no"

    return text


def _runtime_notes(name: str, document: Mapping[str, Any]) -> Iterator[RenderableType]:
    """How many matrices a runtime can use, and why not the others, the most frequent reason first."""
    count = document["totals"]["runtimes"][name]
    yield Text(f"{name}: {count['eligible']:,} of {many(count['of'], 'matrix')} (needs {count['device']})")
    reasons: dict[str, list[str]] = {}
    for entry in document["tensors"]:
        found = entry["runtimes"][name]
        if not found["eligible"] and len(entry["shape"]) > 1:
            reasons.setdefault(found["reason"] or "", []).append(entry["name"])
    ranked = sorted(reasons.items(), key=lambda item: -len(item[1]))
    for reason, names in ranked[:_REASONS]:
        more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        yield below(f"{printable(names[0])}{more}: {reason}")
    if len(ranked) > _REASONS:
        rest = sum(len(names) for _, names in ranked[_REASONS:])
        yield below(f"{many(rest, 'matrix')} more: for other reasons, which --json has")
