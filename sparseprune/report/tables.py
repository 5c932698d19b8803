"""Tables for the terminal: the outcome of a run; and how shares and sizes are written.

Gives rich renderables; whoever calls decides on which stream and how wide they are printed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from sparseprune.errors import printable
from sparseprune.report.wording import percent

if TYPE_CHECKING:
    from collections.abc import Mapping


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
            _name(tensor["name"]),
            tensor["rule"],
            f"{tensor['pruned']:,}",
            percent(tensor["zeros_after"] / tensor["numel"] if tensor["numel"] else 0.0),
            "?" if kept is None else f"{kept:.4f}",
        )
    return table


def _name(text: str) -> Text:
    """A name as it is: no markup, and nothing that a terminal would obey."""
    return Text(printable(text), overflow="fold")


def _kept(rule: Mapping[str, Any]) -> str:
    if rule["nnz"] is None:
        return f"norm >= {_each(rule['threshold'])}"
    return f"{_each(rule['nnz'])} of {_each(rule['blocks_per_scope'])}"


def _each(values: float | list[float | None] | None) -> str:
    if isinstance(values, list):
        known = [value for value in values if value is not None]
        return f"{min(known):,} to {max(known):,}" if known else ""
    return "" if values is None else f"{values:,}"
