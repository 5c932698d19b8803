"""Every error that a user or a machine can cause, the exit code that it ends in, and how its text is written.

A text says where, what was found, what is wanted and what to do. Errors are raised low, get their
context once at the edge of a layer, and are printed by the command line alone. What is not listed
here is a bug and keeps its traceback.
"""

import errno
from collections.abc import Sequence
from typing import ClassVar

SIZES = ("B", "kB", "MB", "GB", "TB", "PB")
_LONGEST_LINE = 1000  # characters: names of tensors may be longer than a terminal has room for


class SparsepruneError(Exception):
    """Base of all errors that are no bugs; `exit_code` is what the process ends with.

    Each argument is a line of its text, whatever stands in the names of tensors and files.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, *lines: str) -> None:
        super().__init__(*map(_shortened, map(printable, lines)))

    def __str__(self) -> str:
        return "\n".join(self.args)

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (type(self), self.args, self.__dict__)


def printable(text: str) -> str:
    r"""A text on one line, without what a terminal would obey: names may hold anything, also line ends.

    >>> printable("a\nb")
    'a\\nb'
    """
    if text.isprintable():
        return text
    return "".join([letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text])


def one_of_many(lines: Sequence[str]) -> str:
    """The first of lines that are alike, and how many more there are.

    >>> one_of_many(["a: too large", "b: too large", "c: too large"]), one_of_many(["a: too large"])
    ('a: too large (and 2 more like this)', 'a: too large')
    """
    first, *others = lines
    return f"{first} (and {len(others):,} more like this)" if others else first


def size(nbytes: float) -> str:
    """Bytes in decimal units.

    >>> size(999), size(2_200_000_000)
    ('999 B', '2.20 GB')
    """
    unit, name = unit_of(nbytes)
    return f"{nbytes / unit:.{2 if unit > 1 else 0}f} {name}"


def enough(nbytes: int) -> str:
    """A size to type behind an option, never less than these bytes.

    >>> enough(121_634_816), enough(2_200_000_001), enough(4096)
    ('122MB', '2.21GB', '5kB')
    """
    unit, name = unit_of(nbytes)
    parts = 100 if unit >= 1000**3 else 1
    amount = -(-nbytes * parts // unit)
    return f"{amount / parts:.2f}{name}" if parts > 1 else f"{amount}{name}"


def unit_of(amount: float, names: Sequence[str] = SIZES) -> tuple[int, str]:
    """The unit in which an amount has at most three digits before the point; each is 1000 of the last.

    >>> unit_of(2_200_000_000)
    (1000000000, 'GB')
    """
    power = 0
    while amount >= 999.5 * 1000**power and power < len(names) - 1:
        power += 1
    return 1000**power, names[power]


def _restored(
    kind: type[SparsepruneError], lines: tuple[str, ...], state: dict[str, object]
) -> SparsepruneError:
    """An error that was pickled; classes are made of other arguments than their lines."""
    error = kind.__new__(kind, *lines)
    error.__dict__.update(state)
    return error


def _shortened(line: str) -> str:
    if len(line) <= _LONGEST_LINE:
        return line
    return f"{line[: _LONGEST_LINE // 2]}...{line[3 - _LONGEST_LINE // 2 :]}"


class SparsityError(SparsepruneError, ValueError):
    """The engine was asked for something that S3 does not allow: shapes, budgets, NaN scores."""


class NanScoreError(SparsityError):
    """A score that is NaN: `tensor` names whose, `place` is its index in the view."""

    def __init__(self, tensor: str, place: tuple[int, ...]) -> None:
        super().__init__(f"{tensor}: NaN at {list(place)} has no rank among the scores")
        self.tensor = tensor
        self.place = place


class ShapeMismatchError(SparsityError):
    """A tensor, block or scope does not have the shape that is wanted, or does not divide."""


class CouplingError(SparsityError):
    """Members of a coupling do not align, or one element would belong to two of them."""


class CheckpointError(SparsepruneError):
    """The input is no checkpoint that can be read, or the output may not be written there."""


class SpecError(SparsepruneError):
    """A spec that is wrong in itself or does not fit the checkpoint; `problems` has one line each."""

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems: tuple[str, ...] = self.args


class UnboundError(SpecError):
    """A spec that names tensors, or a structure, of which the checkpoint has none."""


class CheckFailedError(SparsepruneError):
    """What was to be checked does not hold; a line names every tensor that fails.

    `result` is what was found, as it is returned where everything holds.
    """

    exit_code = 1

    def __init__(self, *lines: str, result: object = None) -> None:
        super().__init__(*lines)
        self.result = result


class MachineError(SparsepruneError):
    """Disk full, I/O error, input changed while it was read: the machine, not the request."""

    exit_code = 3


_NO_MEMORY = (
    "can't allocate memory",  # torch, on the CPU
    "out of memory",  # torch, on other devices
    "bad_alloc",
    "Unable to allocate",
    "failed to map segment from shared object",  # a library that is loaded
    "annot allocate memory",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that there is no memory left, in the words of Python, torch or the system.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("CUDA out of memory. Tried to"))
    (True, True)
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    if isinstance(error, (OSError, RuntimeError, ImportError)):
        return _says_so(error) or is_out_of_memory(error.__cause__ or error.__context__)
    if isinstance(error, SystemError):  # a library in C that forgot to say what it met: it got no memory
        return "without setting an exception" in str(error) or "without exception set" in str(error)
    return isinstance(error, MemoryError)


def _says_so(error: BaseException) -> bool:
    return any(sign in str(error) for sign in _NO_MEMORY)
