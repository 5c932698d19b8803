"""From a public function to a command: its options, those of the command line beside them, and the call.

Options come from the annotations of the function and of the words, which print what it gives; help comes from
the docstring. Knows no command. Called by app.py.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from types import GenericAlias
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar, cast, get_args

import typer

from sparseprune.api.options import Option, located
from sparseprune.api.run import Listener
from sparseprune.cli.completion import completing
from sparseprune.cli.console import UnwrittenError, reported, tell, tell_parts
from sparseprune.cli.help import TYPED
from sparseprune.cli.log import Log
from sparseprune.cli.progress import shown
from sparseprune.cli.signals import heard_at_the_end, text_when_stopped
from sparseprune.errors import CheckFailedError, SparsepruneError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rich.console import RenderableType

    from sparseprune.api.run import Ending, Progress

Result = TypeVar("Result")
Form = Literal["table", "json", "csv", "markdown"]

Json = Annotated[bool, Option("--json", help="Print the result as JSON on stdout.", group="Output")]
Csv = Annotated[
    bool,
    Option(
        "--csv",
        help="Print the lines as CSV on stdout. Cells that look like formulas begin with an apostrophe.",
        group="Output",
    ),
]
Markdown = Annotated[
    bool, Option("--markdown", help="Print the table as Markdown on stdout.", group="Output")
]
Summary = Annotated[
    bool,
    Option(
        "--summary",
        help="Show totals only, without a line for each tensor; in JSON these lists are empty.",
        group="Report",
    ),
]
DryRun = Annotated[
    bool, Option("--dry-run", help="Show what the command would do, and write nothing.", group="Output")
]
Verbose = Annotated[bool, Option("--verbose -v", help="Show every tensor.", group="Messages")]
_QUIET = Option(
    "--quiet -q",
    help="Print no table, summary, progress, note or warning: only errors, the path of an output, and "
    "what --json, --csv or --markdown ask for.",
    group="Messages",
)
Quiet = Annotated[bool, _QUIET]
_LOG = Option(
    "--log FILE", "Append all messages to this file, with the time of each, also with --quiet.", "Messages"
)
_SHARED: dict[str, tuple[object, object, Option]] = {
    "quiet": (bool, False, _QUIET),
    "log": (Path, None, _LOG),
}
"""Type, default and option of what every command that works has."""
_DEBUG = Option("--debug", help="Show the Python traceback of an error.", group="Messages")


class Call(Generic[Result]):
    """A call of a public function with the options that were typed; `seconds` that it took, so far."""

    def __init__(
        self,
        function: Callable[..., Result],
        options: dict[str, Any],
        *,
        quiet: bool = False,
        log: Log | None = None,
    ) -> None:
        self.function, self.options, self.quiet = function, options, quiet
        self.log = log or Log(None)
        self.began = time.perf_counter()
        self._output: Ending | None = None

    def __call__(self, **more: object) -> Result:
        """What the function gives; notes and progress go to stderr, unless `quiet`, and to the log."""
        with shown(quiet=self.quiet) as progress:
            hear = self._heard_by(progress) if self.log.is_open else progress
            listener = Listener(hear, self._warn, self.note, self._begin, self._tell)
            return self.function(**self.options, **more, progress=listener)

    def checked(self, **more: object) -> tuple[Result, tuple[str, ...]]:
        """What the function gives or fails with, and what it fails by."""
        try:
            return self(**more), ()
        except CheckFailedError as error:
            if error.result is None:
                raise
            return cast("Result", error.result), error.args

    @property
    def seconds(self) -> float:
        """Wall time since the options were read."""
        return time.perf_counter() - self.began

    def note(self, text: str) -> None:
        """A line on stderr, unless that is to be quiet, and in the log."""
        self.log.lines(text)
        if not self.quiet:
            tell(text)

    def summarize(self, parts: Iterable[RenderableType]) -> None:
        """Lines and tables of a summary, likewise; `parts` are not made where nobody reads them."""
        if self.quiet and not self.log.is_open:
            return
        found = list(parts)
        self.log.parts(found)
        if not self.quiet:
            tell_parts(found)

    def _warn(self, text: str) -> None:
        self.note(f"warning: {text}")

    def _tell(self, text: str) -> None:
        self.log.lines(text)
        tell(text)

    def _heard_by(self, progress: Callable[[Progress], None] | None) -> Callable[[Progress], None]:
        def hear(step: Progress) -> None:
            self.log.stage(step)
            if progress is not None:
                progress(step)

        return hear

    def _begin(self, output: Ending) -> None:
        self._output = output

    @contextmanager
    def interrupts_explained(self) -> Iterator[None]:
        """An interrupt without a result says what there is: the complete output, or nothing yet."""
        try:
            with text_when_stopped(self._there_is):
                yield
        except UnwrittenError as error:
            if self._output is not None:
                error.add_note(self._there_is())
            raise

    def _there_is(self) -> str:
        if self._output is None:
            return ""
        if self._output.named:
            return "the output is complete"
        again = "" if self._output.identity is None else "; run the same command again to continue"
        return f"there is no output{again}"


def command(
    function: Callable[..., object], words: Callable[..., None], name: str = "", *, works: bool = True
) -> Callable[..., None]:
    """What typer makes a command of: calls `words` with the call, and with the options that are its own.

    The words may ask for `quiet` and `verbose`. Every command has --debug, every one that `works` --quiet and
    --log.
    """
    asked, own = _annotated(function), _annotated(words)
    shared = {name: _shared(name, how) for name, how in _SHARED.items() if works and name not in own}

    def run(context: typer.Context, **typed: Any) -> None:  # noqa: ANN401
        with reported(typed["debug"]), Log(typed.get("log")) as log:
            log.begin(context.meta[TYPED])
            options = {one: _read(*how, typed) for one, how in asked.items()}
            call = Call(function, options, quiet=typed.get("quiet", False), log=log)
            with heard_at_the_end(log.lines), call.interrupts_explained():
                words(call, **{one: typed[one] for one in own})

    parameters = [
        inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
    ]
    for parameter, option in (asked | own | shared).values():
        parameters.append(_parameter(parameter, option))
        if option.unless is not None:
            flag, text = option.unless
            parameters.append(_flag(_name(flag), Option(flag, text, option.group)))
    setattr(run, "__signature__", inspect.Signature([*parameters, _flag("debug", _DEBUG)]))  # noqa: B010
    run.__name__ = name or function.__name__
    run.__doc__ = _help(function)
    return run


def form_of(*, json: bool, csv: bool, markdown: bool) -> Form:
    """In which form the result goes to stdout; SparsepruneError where several were asked for."""
    asked: dict[Form, bool] = {"json": json, "csv": csv, "markdown": markdown}
    chosen = [form for form, wanted in asked.items() if wanted]
    if len(chosen) > 1:
        words = " and ".join(f"--{form}" for form in chosen)
        raise SparsepruneError(f"{words} exclude each other; give one of them")
    return chosen[0] if chosen else "table"


def refuse_lines(form: Form) -> None:
    """SparsepruneError where a summary is asked for in a form that has lines alone."""
    if form in {"csv", "markdown"}:
        raise SparsepruneError(f"--summary and --{form} exclude each other; give one of them, or --json")


def pairs_of(option: Option, words: Sequence[str]) -> dict[str, str]:
    """Words with an equals sign as what stands before and behind it; the last one of a name counts.

    >>> pairs_of(Option("--set NAME=VALUE", "", example="n=2"), ["n=2", "keep = [1, 2]"])
    {'n': '2', 'keep': '[1, 2]'}
    """
    pairs = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not (name.strip() or (option.may_be_empty and value.strip())):
            flag, example = option.flags[0], option.example
            raise SparsepruneError(f"{flag} {word}: wanted {option.metavar}, such as {flag} {example}")
        pairs[name.strip()] = value.strip()
    return pairs


def _shared(name: str, how: tuple[object, object, Option]) -> tuple[inspect.Parameter, Option]:
    kind, default, option = how
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, annotation=kind, default=default), option


def _annotated(function: Callable[..., object]) -> dict[str, tuple[inspect.Parameter, Option]]:
    """The parameters that are options, each with its type on the command line."""
    found = {}
    for parameter in inspect.signature(function).parameters.values():
        for option in getattr(parameter.annotation, "__metadata__", ()):
            if isinstance(option, Option):
                kind = option.typed or get_args(parameter.annotation)[0]
                found[parameter.name] = (parameter.replace(annotation=kind), option)
    return found


def _read(parameter: inspect.Parameter, option: Option, typed: dict[str, Any]) -> Any:  # noqa: ANN401
    """What was typed, as the function takes it."""
    if option.unless is not None and typed[_name(option.unless[0])]:
        return None
    value = typed[parameter.name]
    if option.example is not None:
        return pairs_of(option, value or ())
    return parameter.default if value is None else value


def _parameter(parameter: inspect.Parameter, option: Option) -> inspect.Parameter:
    kind, default = parameter.annotation, parameter.default
    several = getattr(kind, "__origin__", None) in {list, Sequence}
    if several:
        kind, default = GenericAlias(list, get_args(kind)), default or None
    if default is None:
        kind |= None
    shown = option.shown or (default is not None and default is not inspect.Parameter.empty)
    # An unreadable file is reported by its reader, with the path and exit code 3.
    how: dict[str, Any] = {"metavar": option.metavar, "help": option.help, "readable": False}
    how |= {"rich_help_panel": option.group, "autocompletion": completing(option.among)}
    make: Any = typer.Option if option.flags else typer.Argument
    if Path in {parameter.annotation, *get_args(kind)}:
        how["parser"] = located
    made = make(*option.flags, show_default=shown, min=option.minimum, **how)
    return inspect.Parameter(
        parameter.name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, made], default=default
    )


def _flag(name: str, option: Option) -> inspect.Parameter:
    flag = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=bool, default=False)
    return _parameter(flag, option)


def _name(flag: str) -> str:
    return flag.strip("-").replace("-", "_")


def _help(function: Callable[..., object]) -> str:
    """The docstring up to its example: what follows is for who calls the function."""
    text, example, rest = (inspect.getdoc(function) or "").partition("Example: ")
    return f"{text}{example}{rest.partition(chr(10))[0]}"
