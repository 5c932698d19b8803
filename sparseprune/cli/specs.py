"""`specs`: the specs that ship with the package, by name and first line, or one of them whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparseprune.cli.console import print_result, print_table
from sparseprune.spec import find_spec, list_specs

if TYPE_CHECKING:
    from rich.table import Table


def run(name: str | None) -> None:
    """Print the list, or the text of one."""
    if name is None:
        print_table(_table())
    else:
        print_result(find_spec(name).text.rstrip("\n"))


def _table() -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name in list_specs():
        table.add_row(name, Text(_first_comment(find_spec(name).text)))
    return table


def _first_comment(text: str) -> str:
    r"""What the first comment of a spec says, on its first line.

    >>> _first_comment("# 2:4.\n# More.\nversion = 1")
    '2:4.'
    """
    comments = (line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    return next(comments, "")
