"""`specs`: the specs that ship with the package, by name and first line, or one of them whole."""

from sparseprune import api
from sparseprune.cli.command import Call, command
from sparseprune.cli.console import print_result, print_table


def show_specs(call: "Call[dict[str, str]]") -> None:
    texts = call.function(**call.options)
    if call.options["name"] is not None:
        (text,) = texts.values()
        print_result(text.rstrip("\n"))
        return
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, text in texts.items():
        table.add_row(name, Text(_first_comment(text)))
    print_table(table)


specs = command(api.specs, show_specs)


def _first_comment(text: str) -> str:
    r"""What the first comment of a spec says, on its first line.

    >>> _first_comment("# 2:4.\n# More.\nversion = 1")
    '2:4.'
    """
    comments = (line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    return next(comments, "")
