"""What commands that write an output share: telling of an unfinished run, giving the name last of all.

Owns the order: everything is written, the input is still what it was, then the output gets its name.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Protocol, TypeVar

from sparseprune.checkpoint import TensorReader
from sparseprune.cli.console import Warnings, tell
from sparseprune.cli.signals import text_when_stopped
from sparseprune.cli.stdio import UntoldError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from sparseprune.checkpoint import OutputLayout, StagedOutput
    from sparseprune.results.fields import Document

Result = TypeVar("Result", bound="Document")


class Places(Protocol):
    """What was typed of the input and the output."""

    @property
    def checkpoint(self) -> Path: ...
    @property
    def output(self) -> Path | None: ...


def write_output(
    output: StagedOutput,
    work: Callable[[TensorReader], Result],
    refuse_changed: Callable[[], None],
    *,
    quiet: bool,
    warnings: Warnings | None = None,
) -> Result:
    """Everything between the first byte written and the output's name; gives what `work` gives, its report.

    `refuse_changed` raises where an input is no longer what it was. An error tells whether what is finished
    is kept.
    """
    with staged(output, quiet=quiet, warnings=warnings), TensorReader() as reader:
        document = work(reader)
        refuse_changed()
        output.commit()
    return document


@contextmanager
def staged(output: StagedOutput, *, quiet: bool, warnings: Warnings | None = None) -> Iterator[None]:
    """An output while it is written; tells whether an unfinished run is continued, and of weaker promises.

    An error tells whether what is finished is kept.
    """
    try:
        with output:
            (warnings or Warnings(quiet=quiet)).add(*output.warnings)
            if output.started_over and not quiet:
                tell(f"an unfinished run is not continued, since {' and '.join(output.started_over)} changed")
            if output.resumed and not quiet:
                tell("an unfinished run is continued")
            yield
    except BaseException as error:
        if output.kept:
            error.add_note(
                f"what is finished is kept in {output.partial_path}: the same command continues, "
                "removing the folder gives it up"
            )
        raise


def report_bytes(document: Document) -> Iterator[bytes]:
    """A report as the JSON that is written beside an output: ValueError for a number that is not finite.

    In pieces, as all of it may be larger than all else in memory.
    """
    for piece in chain(document.json_pieces(), ("\n",)):
        # A path that is not UTF-8 has surrogates, which are escapes of JSON as well.
        yield piece.encode(errors="backslashreplace")


class Ending(Protocol):
    """Whether an output has its name, and whether what is unfinished can be continued."""

    @property
    def named(self) -> bool: ...
    @property
    def identity(self) -> Mapping[str, str] | None: ...


@contextmanager
def interrupts_told(output: Ending) -> Iterator[None]:
    """Whoever is not told the result hears what there is: all of it, once it has its name, or nothing yet."""

    def there_is() -> str:
        if output.named:
            return "the output is complete"
        again = "" if output.identity is None else "; run the same command again to continue"
        return f"there is no output{again}"

    try:
        with text_when_stopped(there_is):
            yield
    except UntoldError as error:
        error.add_note("the output is complete")
        raise


def output_shown(typed: Places, layout: OutputLayout) -> str:
    """The output's path as the user would write it: relative where the paths that were typed are."""
    if typed.output is not None:
        return str(typed.output)
    return str(layout.target) if typed.checkpoint.is_absolute() else os.path.relpath(layout.target)


def digest(text: str) -> str:
    """The SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
