"""How names, shapes, counts, shares and sizes are written for people, the same in every report.

Plain text; no rich, so that whoever prints JSON does not wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from sparseprune.errors import SIZES, printable, size, unit_of
from sparseprune.results.fields import OtherWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from sparseprune.checkpoint import OtherFile
    from sparseprune.engine.kernels.counting import Tally
    from sparseprune.results.fields import EachNumber

__all__ = ["SIZES", "size", "unit_of"]  # passed on; all that is defined here is public, too

_NAMED = 4  # files in one line
# A sum of squares below this has lost digits to the lower end of float64.
LEAST_ENERGY = 2.0**-960
_PLURALS = {"matrix": "matrices", "entry": "entries"}


def shape_text(shape: Sequence[int]) -> str:
    """A shape as it is read aloud.

    >>> shape_text([4096, 4096]), shape_text([])
    ('4096x4096', '0-d')
    """
    return "x".join(map(str, shape)) or "0-d"


def place_text(index: Sequence[int] | None) -> str:
    """An index as it is shown; nothing for None.

    >>> place_text((0, 3)), place_text(None)
    ('[0, 3]', '')
    """
    return "" if index is None else str(list(index))


def number_text(number: float | None, unknown: str = "?") -> str:
    """A number, or what stands for one that is not known.

    >>> number_text(1200), number_text(None)
    ('1,200', '?')
    """
    return unknown if number is None else f"{number:,}"


def each_text(values: EachNumber, text: Callable[[float], str] = "{:,}".format) -> str:
    """One value, or the range of the values of all instances; nothing if there are none.

    >>> each_text([2, None, 1000]), each_text(0.5)
    ('2 to 1,000', '0.5')
    """
    known = [value for value in (values if isinstance(values, Sequence) else [values]) if value is not None]
    return " to ".join(map(text, sorted({min(known), max(known)}) if known else ()))


def many(count: int, what: str) -> str:
    """A count and what is counted, in the plural unless it is one.

    >>> many(1, "tensor"), many(1200, "tensor"), many(2, "matrix")
    ('1 tensor', '1,200 tensors', '2 matrices')
    """
    return f"{count:,} {what if count == 1 else _PLURALS.get(what, what + 's')}"


def percent(part: float | None) -> str:
    """A share with two digits, "?" for one that is not known.

    What is not quite nothing or all does not look like it.

    >>> percent(0.5), percent(0.999999), percent(1e-9), percent(None)
    ('50.00%', '>99.99%', '<0.01%', '?')
    """
    if part is None:
        return "?"
    if 0 < part < 0.00005:
        return "<0.01%"
    if 0.99995 <= part < 1:
        return ">99.99%"
    return f"{part:.2%}"


def left_text(unit: Literal["params", "size", "active"], amount: float) -> str:
    """An amount of what a target is about.

    >>> left_text("params", 1200), left_text("active", 1200), left_text("size", 1200)
    ('1,200 parameters', '1,200 parameters for each token', '1.20 kB')
    """
    if unit == "size":
        return size(amount)
    return f"{math.ceil(amount):,} parameters{' for each token' if unit == 'active' else ''}"


def other_weights(files: Iterable[OtherFile]) -> tuple[OtherWeights, ...]:
    """Other copies of the weights in a checkpoint's folder."""
    return tuple(OtherWeights(path=str(file.path), bytes=file.nbytes) for file in files)


def some_of(names: Sequence[str], most: int = 1) -> str:
    """The first names, and how many there are besides.

    >>> some_of(["a", "b", "c"]), some_of(["a", "b"], 4)
    ('a and 2 more', 'a, b')
    """
    others = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + others


def copies_line(became: str, files: Sequence[OtherWeights]) -> Iterator[str]:
    """A line with what became of other copies of the weights, the first by name; none for none.

    >>> list(copies_line("left out", [OtherWeights(path="model.gguf", bytes=5_000_000)]))
    ['left out: model.gguf (5.00 MB), another copy of the weights']
    """
    if files:
        names = some_of([printable(file.path) for file in files], _NAMED)
        copies = "another copy" if len(files) == 1 else "other copies"
        total = size(sum(file.bytes for file in files))
        yield f"{became}: {names} ({total}), {copies} of the weights"


def share(part: float, whole: float) -> float:
    """The share of a part in a whole; 0 of nothing is 0."""
    return part / whole if whole else 0.0


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of those that are there; None of none.

    >>> mean([0.25, None, 0.75]), mean([None])
    (0.5, None)
    """
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def energy_kept(before: Tally, after: Tally) -> float | None:
    """||pruned||^2 / ||dense||^2; 1 of nothing, None where squares have no place in float64."""
    if not math.isfinite(before.energy) or not math.isfinite(after.energy):
        return None
    if before.energy < LEAST_ENERGY:
        return 1.0 if before.zeros == before.numel else None
    kept = after.energy / before.energy
    return kept if math.isfinite(kept) else None
