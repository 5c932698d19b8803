"""What typer makes of the commands: help in groups, usage errors in one line, and the words as typed.

Owns the groups and their order. Knows no command. Called by app.py and command.py.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

from sparseprune.cli.console import tell
from sparseprune.spec.problems import suggestion

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

WIDEST = 120  # columns; longer lines are hard to read
TYPED = "sparseprune.typed"
"""Where a context's `meta` has the words of the command line."""
_OTHERS = "Options"
_ABOUT_DATA = ("Input", "Pruning", "Rebuilding", "Text", "Tensors", "Masks")
_GROUPS = (*_ABOUT_DATA, "Report", "Checks", "Output", "Resources", "Messages")
_COLUMN = 28  # columns of flags; the help of longer ones begins in the next line
# Typer has click inside since 0.26, and had it beside before: this is the class of either.
_UsageError: Any = typer.BadParameter.__mro__[1]


class Command(TyperCommand):
    """A command whose help has its options in groups."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:  # noqa: ANN401, ARG002
        """The arguments, then the options."""
        arguments = [_argument(one) for one in self.params if one.param_type_name == "argument"]
        return [*arguments, "[OPTIONS]"]

    def format_options(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401
        """Arguments, then the options of each group."""
        params = self.get_params(ctx)
        arguments = [one for one in params if one.param_type_name == "argument"]
        if arguments:
            _write(formatter, "Arguments", [(_metavar(one), _text(one)) for one in arguments])
        _write_options(formatter, [one for one in params if one.param_type_name == "option"])


class Commands(TyperGroup):
    """The application: commands in groups, each with its whole first line."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:  # noqa: ANN401, ARG002
        return ["COMMAND", "[ARGUMENTS]", "[OPTIONS]"]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401
        """Keep the words, for whoever has to say how to repeat the command."""
        ctx.meta[TYPED] = list(args)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401
        groups: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            summary = (command.help or "").partition("\n")[0]
            groups.setdefault(command.rich_help_panel, []).append((name, summary))
        longest = max(len(name) for rows in groups.values() for name, _ in rows)
        for title, rows in groups.items():
            _write(formatter, title, [(name.ljust(longest), summary) for name, summary in rows])
        _write_options(formatter, self.get_params(ctx))

    def main(self, *args: Any, **extra: Any) -> Any:  # noqa: ANN401
        """As click's own, but that a usage error is one line like all other errors."""
        extra["standalone_mode"] = False
        try:
            code = super().main(*args, **extra)
        except _UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                print(error.format_message(), file=sys.stderr)
            else:
                tell(usage_text(error))
            sys.exit(error.exit_code)
        sys.exit(code)


def usage_text(error: Any) -> str:  # noqa: ANN401
    """One sentence on what was typed wrongly, the nearest word there is, and where help is."""
    context, typed = error.ctx, str(getattr(error, "option_name", ""))
    path = "sparseprune" if context is None else context.command_path
    parameter = getattr(error, "param", None)
    message = _plain(error.message)
    if type(error).__name__ == "NoSuchOption":
        options = [flag for one in context.command.get_params(context) for flag in _flags(one)]
        message = f"no such option {typed}{suggestion(typed, options)}"
    elif type(error).__name__ == "MissingParameter" and parameter is not None:
        kind = "option" if parameter.param_type_name == "option" else "argument"
        message = f"the {kind} {_name(parameter)} is missing"
    elif parameter is not None:
        message = f"{_name(parameter)}: {message}"
    elif context is not None and isinstance(context.command, TyperGroup) and context.meta.get(TYPED):
        word = next((one for one in context.meta[TYPED] if not one.startswith("-")), "")
        message = f"no such command {word}{suggestion(word, context.command.list_commands(context))}"
    return f"{message}{'' if message.endswith('?') else ';'} see `{path} --help`"


def _plain(message: str) -> str:
    """A message of typer or pydantic as a part of a sentence."""
    message = message.rstrip(".").replace("Input should be", "must be").removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _write_options(formatter: Any, options: Sequence[Any]) -> None:  # noqa: ANN401
    groups: dict[str, list[Any]] = {}
    for one in options:
        title = one.rich_help_panel if getattr(one, "rich_help_panel", None) else _OTHERS
        groups.setdefault(title, []).append(one)
    if len(groups) > 1:  # help itself has no group of its own
        groups.setdefault(_GROUPS[-1], []).extend(groups.pop(_OTHERS, []))
    lengths = [len(_usage(one)) for one in options]
    column = max([length for length in lengths if length <= _COLUMN], default=0)
    for title in sorted(groups, key=lambda one: _GROUPS.index(one) if one in _GROUPS else -1):
        rows = [(_usage(one).ljust(column), _text(one)) for one in groups[title]]
        _write(formatter, title, rows)


def _write(formatter: Any, title: str, rows: Sequence[tuple[str, str]]) -> None:  # noqa: ANN401
    with formatter.section(title):
        formatter.write_dl(rows)


def _flags(option: Any) -> Iterable[str]:  # noqa: ANN401
    return (*option.opts, *option.secondary_opts)


def _usage(option: Any) -> str:  # noqa: ANN401
    """The flags, the short one first, and what stands behind them."""
    flags = ", ".join(sorted(option.opts, key=len))
    if option.secondary_opts:
        return f"{flags} / {', '.join(option.secondary_opts)}"
    return flags if option.is_flag else f"{flags} {option.metavar or ''}".rstrip()


def _name(parameter: Any) -> str:  # noqa: ANN401
    return _metavar(parameter) if parameter.param_type_name == "argument" else max(parameter.opts, key=len)


def _metavar(argument: Any) -> str:  # noqa: ANN401
    return str(argument.metavar or argument.name.upper()).strip("[]")


def _argument(argument: Any) -> str:  # noqa: ANN401
    return _metavar(argument) if argument.required else f"[{_metavar(argument)}]"


def _text(parameter: Any) -> str:  # noqa: ANN401
    """The help, and the default where there is one worth telling."""
    shown = parameter.show_default
    default = shown if isinstance(shown, str) else parameter.default if shown is True else None
    if default is None or isinstance(default, bool):
        return parameter.help or ""
    return f"{parameter.help} [default: {default}]"
