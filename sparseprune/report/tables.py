"""Tables for the terminal: the outcome of a run, and what stands in a checkpoint.

Gives rich renderables; whoever calls decides on which stream and how wide they are printed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import RenderableType

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def inspect_table(document: Mapping[str, Any]) -> RenderableType:
    """Every tensor of an inspect document with zeros, sparsity and N:M patterns, and the totals."""
    totals = document["totals"]
    table = Table(box=None, pad_edge=False, header_style="bold", show_footer=True)
    table.add_column("tensor", f"total of {totals['tensors']}", overflow="fold", footer_style="bold")
    table.add_column("dtype", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    table.add_column("zeros", f"{totals['pruned']:,}", justify="right", no_wrap=True)
    table.add_column("sparsity", percent(totals["sparsity"]), justify="right", no_wrap=True)
    table.add_column("patterns", no_wrap=True)
    for tensor in document["tensors"]:
        known = tensor["zeros"] is not None
        table.add_row(
            tensor["name"],
            tensor["dtype"],
            "x".join(map(str, tensor["shape"])) or "0-d",
            f"{tensor['zeros']:,}" if known else "?",
            percent(tensor["sparsity"]) if known else "?",
            " ".join(tensor["patterns"]),
        )
    satisfied = ", ".join(
        f"{pattern} by {count} tensor{'s' * (count > 1)}"
        for pattern, count in totals["patterns"].items()
        if count
    )
    return Group(table, f"satisfied: {satisfied or 'no pattern by any tensor'}")


def rules_table(document: Mapping[str, Any]) -> Table:
    """What each rule of a report document reached and pruned."""
    numel = document["totals"]["numel"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("rule", overflow="fold")
    for name in ("tensors", "scopes", "kept in each", "elements", "pruned", "of all"):
        table.add_column(name, justify="right", no_wrap=True)
    for rule in document["rules"]:
        table.add_row(
            rule["name"],
            f"{rule['tensors']:,}",
            f"{rule['scopes']:,}",
            _kept(rule),
            f"{rule['numel']:,}",
            f"{rule['pruned']:,}",
            percent(rule["pruned"] / numel if numel else 0.0),
        )
    return table


def outcome_table(document: Mapping[str, Any]) -> Table:
    """What became of each tensor of a report document."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensor", overflow="fold")
    table.add_column("rule", overflow="fold")
    for name in ("pruned", "sparsity", "energy kept"):
        table.add_column(name, justify="right", no_wrap=True)
    for tensor in document["tensors"]:
        kept = tensor["energy_kept"]
        table.add_row(
            tensor["name"],
            tensor["rule"],
            f"{tensor['pruned']:,}",
            percent(tensor["zeros_after"] / tensor["numel"] if tensor["numel"] else 0.0),
            "?" if kept is None else f"{kept:.4f}",
        )
    return table


def percent(part: float) -> str:
    """A share with two digits; what is not quite nothing or all does not look like it.

    >>> percent(0.5), percent(0.999999), percent(1e-9), percent(1.0)
    ('50.00%', '>99.99%', '<0.01%', '100.00%')
    """
    if 0 < part < 0.00005:
        return "<0.01%"
    if 0.99995 <= part < 1:
        return ">99.99%"
    return f"{part:.2%}"


def size(nbytes: float) -> str:
    """Bytes in decimal units.

    >>> size(999), size(2_200_000_000)
    ('999 B', '2.20 GB')
    """
    step = 0
    while nbytes >= 999.5 and step < len(_UNITS) - 1:
        nbytes, step = nbytes / 1000, step + 1
    return f"{nbytes:.0f} B" if step == 0 else f"{nbytes:.2f} {_UNITS[step]}"


def _kept(rule: Mapping[str, Any]) -> str:
    if rule["nnz"] is None:
        return f"norm >= {_each(rule['threshold'])}"
    return f"{_each(rule['nnz'])} of {_each(rule['blocks_per_scope'])}"


def _each(values: float | list[float | None] | None) -> str:
    if isinstance(values, list):
        known = [value for value in values if value is not None]
        return f"{min(known):,} to {max(known):,}" if known else ""
    return "" if values is None else f"{values:,}"
