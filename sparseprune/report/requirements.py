"""`--require`: a condition on the tensors of a report, and a line for each tensor that fails it.

Owns the grammar, `WHAT [in PATTERN[, PATTERN...]]`, and how a failure reads. Looks at the tensors of a result
alone: it measures nothing, and whoever calls says which fields and runtimes there are. Called by `inspect`,
`compare` and `eval`.
"""

from __future__ import annotations

import math
import operator as op
import re
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from msgspec import Struct

from sparseprune.errors import SparsepruneError, printable
from sparseprune.execution.inspect import Pattern, pattern_of
from sparseprune.report.inspection import flat, matching, nearest_names
from sparseprune.report.runtimes import axes_of
from sparseprune.results.measuring import InspectedTensor
from sparseprune.spec.patterns import PatternError, TensorPattern, parse_pattern
from sparseprune.spec.problems import listed, nearest, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from sparseprune.results.measuring import ComparedTensor

    Tensor: TypeAlias = "InspectedTensor | ComparedTensor | Absent"

_WHERE = re.compile(r"(?P<what>.*?)(?:\s+in(?:\s+(?P<where>.*))?)?", re.DOTALL)
_COMPARISON = re.compile(r"(?P<field>[^<>=!\s]+)\s*(?P<sign>[<>=!]+)\s*(?P<number>\S*)")
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})(?:[eE][+-]?[0-9]{1,2})?")
_SIGNS: Mapping[str, Callable[[Any, Any], bool]] = MappingProxyType(
    dict(zip((">=", "<=", "==", "!=", ">", "<"), (op.ge, op.le, op.eq, op.ne, op.gt, op.lt), strict=True))
)
_FORMS = (
    "wanted N:M, such as 2:4, or a comparison, such as sparsity>=0.5, and perhaps the names, in **.weight"
)
_DIGITS = 17  # of a float64: as many tell it from every other one, some more its hundredfold


class Comparison(Struct, frozen=True):
    """A field against a number; `percent` where that was typed as one: 50% is the number 1/2."""

    field: str
    sign: str
    number: Fraction
    percent: bool = False


class Requirement(Struct, frozen=True):
    """One `--require`: `what` is asked, as it was typed, of the tensors that `names` match, or of all.

    Just one of `pattern`, `runtime` and `comparison` is there.
    """

    text: str
    what: str
    pattern: Pattern | None = None
    runtime: str | None = None
    comparison: Comparison | None = None
    names: tuple[TensorPattern, ...] = ()


def parse_requirement(text: str, fields: Collection[str], runtimes: Collection[str] = ()) -> Requirement:
    """Read a condition; SparsepruneError where it has no meaning, with the nearest field or runtime.

    >>> str(parse_requirement("2:4@0 in **_proj.weight", ["sparsity"]).pattern)
    '2:4@0'
    >>> parse_requirement("sparsity >= 50%", ["sparsity"]).comparison
    Comparison(field='sparsity', sign='>=', number=Fraction(1, 2), percent=True)
    """
    try:
        return _parsed(text, fields, runtimes)
    except SparsepruneError as error:
        raise SparsepruneError(f"--require {shown(text)}: {error}") from None


class Absent(Struct, frozen=True):
    """A tensor that could not be looked at, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


def failures(requirements: Sequence[Requirement], tensors: Sequence[Tensor]) -> list[str]:
    """A line for each requirement and each tensor that fails it, in that order; empty if none does.

    Numbers are asked for by their flat names; one that is None or not there is unknown, and fails. So does a
    tensor that is absent. If a requirement names no tensors, N:M and runtimes are asked of those of two
    dimensions or more that have elements. SparsepruneError if a requirement, or one of its patterns, matches
    no tensor: a check of nothing would always pass.
    """
    check_names(requirements, [tensor.name for tensor in tensors])
    return [line for requirement in requirements for line in _failures(requirement, tensors)]


def check_names(requirements: Iterable[Requirement], names: Sequence[str]) -> None:
    """SparsepruneError where a pattern of a requirement matches none of these names, before they are read."""
    for requirement in requirements:
        for pattern in requirement.names:
            if not matching(pattern, names):
                near = _nearest_names(pattern, names)
                raise _error(requirement, f"no tensor matches {shown(pattern.text)}{near}")


def _parsed(text: str, fields: Collection[str], runtimes: Collection[str]) -> Requirement:
    found = _WHERE.fullmatch(text.strip())
    what, where = (found["what"], found["where"]) if found else ("", None)
    names: tuple[TensorPattern, ...] = ()
    if what != text.strip():
        names = tuple(_name_pattern(piece.strip()) for piece in (where or "").split(","))
    if ":" in what:
        return Requirement(text, what, pattern=_pattern(what), names=names)
    if what in runtimes:
        return Requirement(text, what, runtime=what, names=names)
    comparison = _comparison(what, fields, runtimes)
    return Requirement(text, "".join(what.split()), comparison=comparison, names=names)


def _name_pattern(text: str) -> TensorPattern:
    try:
        return parse_pattern(text)
    except PatternError as error:
        where = f"pattern {shown(text)}: " if text else ""
        raise SparsepruneError(f"{where}{error}") from None


def _pattern(what: str) -> Pattern:
    try:
        return pattern_of(what)
    except SparsepruneError:
        raise SparsepruneError(
            "wanted N:M with N less than M, such as 2:4, or N:M@AXIS, such as 2:4@0, or N:M@both"
        ) from None


def _comparison(what: str, fields: Collection[str], runtimes: Collection[str]) -> Comparison:
    found = _COMPARISON.fullmatch(what)
    if found is None:
        raise SparsepruneError(_not_understood(what, fields, runtimes))
    field, sign, number = found["field"], found["sign"], found["number"]
    if field not in fields:
        raise SparsepruneError(f"there is no field {shown(field)}{_hint(field, fields)}")
    if sign not in _SIGNS:
        wanted = {"=": "==", "=>": ">=", "=<": "<=", "<>": "!="}.get(sign)
        hint = f"did you mean {wanted}?" if wanted else f"wanted {listed(_SIGNS, 'or')}"
        raise SparsepruneError(f"there is no comparison {sign}; {hint}")
    digits = number.removesuffix("%")
    if not _NUMBER.fullmatch(digits):
        raise SparsepruneError(f"{shown(number)} is no number; wanted one such as 0.5 or 50%")
    percent = digits != number
    return Comparison(field, sign, Fraction(digits) / (100 if percent else 1), percent)


def _not_understood(what: str, fields: Collection[str], runtimes: Collection[str]) -> str:
    if not what:
        return f"nothing is asked; {_FORMS}"
    if what in fields:
        return f"{shown(what)} is compared with nothing; wanted such as {what}>=0.5"
    close = nearest(what.lower(), [*fields, *runtimes])
    if close:
        return f'{shown(what)} has no meaning; did you mean "{close[0]}"?'
    return f"{shown(what)} has no meaning; {_FORMS}"


def _hint(name: str, known: Collection[str]) -> str:
    close = nearest(name.lower(), known)
    return f'; did you mean "{close[0]}"?' if close else f"; there is {listed(known)}" if known else ""


def _failures(requirement: Requirement, tensors: Sequence[Tensor]) -> Iterator[str]:
    for tensor in _asked(requirement, tensors):
        if isinstance(tensor, Absent):
            reason: str | None = f"wanted {requirement.what}, {tensor.reason}"
        elif requirement.pattern is not None:
            reason = _lacks_pattern(requirement, requirement.pattern, tensor)
        elif requirement.comparison is not None:
            reason = _lacks_value(requirement, requirement.comparison, tensor)
        else:
            reason = _lacks_runtime(requirement.runtime or "", tensor)
        if reason is not None:
            yield f"{printable(tensor.name)}: {reason}"


def _asked(requirement: Requirement, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    if requirement.names:
        named = {
            name for pattern in requirement.names for name in matching(pattern, [one.name for one in tensors])
        }
        return [one for one in tensors if one.name in named]
    asked = [tensor for tensor in tensors if _is_asked_of_all(requirement, tensor)]
    if not asked:
        name_some = f" it can be asked of; name some: {requirement.what} in PATTERN" if tensors else ""
        raise _error(requirement, f"there is no tensor{name_some}")
    return asked


def _is_asked_of_all(requirement: Requirement, tensor: Tensor) -> bool:
    """Whether a requirement that names no tensors is asked of this one.

    Facts that only matrices have are not asked of vectors. If even the zeros are unknown, so is the rest.
    """
    is_matrix, comparison = len(tensor.shape) >= 2, requirement.comparison
    if comparison is None:
        return is_matrix and 0 not in tensor.shape
    if is_matrix or isinstance(tensor, Absent):
        return True
    return flat(tensor).get(comparison.field) is not None or _is_unseen(tensor)


def _nearest_names(pattern: TensorPattern, names: Sequence[str]) -> str:
    short = pattern.text.strip(".")
    for wider in (f"{short}.**", f"**.{short}", f"**.{short}.**"):
        if short.strip("*") and matching(parse_pattern(wider), names):
            return f"; did you mean {shown(wider)}?"
    close = nearest_names(pattern, names, 3)
    if close:
        return f"; the nearest names are {listed(map(printable, close))}"
    return f"; the first names are {listed(map(printable, names[:3]))}" if names else "; there is no tensor"


def _is_unseen(tensor: InspectedTensor | ComparedTensor) -> bool:
    """Whether nothing is known of the elements."""
    return isinstance(tensor, InspectedTensor) and tensor.zeros is None


def _unseen_text(tensor: InspectedTensor | ComparedTensor) -> str:
    """Why nothing is known of the elements."""
    codes = {"packed": "packed codes", "codes": "codes without a known zero"}
    if tensor.holds in codes:
        return f"its elements are {codes[tensor.holds]} and were not looked at"
    return f"elements of {tensor.dtype} are no whole bytes and were not looked at"


def _lacks_pattern(
    requirement: Requirement, pattern: Pattern, tensor: InspectedTensor | ComparedTensor
) -> str | None:
    if not isinstance(tensor, InspectedTensor):
        raise _error(requirement, "N:M patterns are not looked for here; ask sparseprune inspect")
    rank = len(tensor.shape)
    cut = [axis for axis in pattern.axes if -rank <= axis < rank and tensor.shape[axis] % pattern.group]
    if _is_unseen(tensor):
        found = _unseen_text(tensor)
    elif rank < 2:
        found = f"is {rank}-D"
    elif not -rank <= pattern.axis < rank:
        found = f"is {rank}-D and has no dimension {pattern.axis}"
    elif {axis % rank for axis in pattern.axes} <= axes_of(pattern, tensor.patterns, rank):
        return None
    elif 0 in tensor.shape:
        found = "is empty"
    elif cut:
        length = f"{tensor.shape[cut[0]]} along dimension {cut[0] % rank}"
        found = f"has {length}, no multiple of {pattern.group}"
    else:
        found = f"satisfies {' '.join(tensor.patterns) or 'none'}"
    return f"wanted {requirement.what}, {found}"


def _lacks_runtime(runtime: str, tensor: InspectedTensor | ComparedTensor) -> str | None:
    if not isinstance(tensor, InspectedTensor) or tensor.runtimes is None:
        raise TypeError(f"{runtime} was not asked about {tensor.name}")
    verdict = tensor.runtimes[runtime]
    return None if verdict.eligible else f"not eligible for {runtime}: {verdict.reason}"


def _lacks_value(
    requirement: Requirement, comparison: Comparison, tensor: InspectedTensor | ComparedTensor
) -> str | None:
    value = flat(tensor).get(comparison.field)
    if value is None and _is_unseen(tensor):
        return f"wanted {requirement.what}, {_unseen_text(tensor)}"
    if not isinstance(value, int | float | None):
        raise _error(requirement, f"{comparison.field} is no number")
    if comparison.percent and isinstance(value, int):
        raise _error(requirement, f"{comparison.field} is a count; wanted a number without %")
    return shortfall(comparison, requirement.what, value)


def shortfall(comparison: Comparison, what: str, value: float | None) -> str | None:
    """Why a number is not what was wanted, None where it is; one that is not known is not."""
    if value is None:
        return f"wanted {what}, {comparison.field} is not known"
    # A share is the float that is nearest to it, and so has to be what it is compared with.
    number = float(comparison.number) if isinstance(value, float) else comparison.number
    if not math.isnan(value) and _SIGNS[comparison.sign](value, number):
        return None
    text = _number_text(value, float(number), percent=comparison.percent)
    return f"wanted {what}, found {text}"


def _number_text(value: float, wanted: float, *, percent: bool) -> str:
    """A number in as few digits as leave it on its side of what was wanted, four at least if it has them."""
    if isinstance(value, int):
        return str(int(value))
    if not math.isfinite(value):
        return str(value)
    scale, sign = (100, "%") if percent else (1, "")
    scaled = float(Fraction(value) * scale)
    for digits in range(max(4, len(str(int(abs(scaled))))), _DIGITS + 1):
        text = f"{scaled:.{digits}g}"
        rounded = float(Fraction(text) / scale)
        if (rounded > wanted) - (rounded < wanted) == (value > wanted) - (value < wanted):
            return text + sign
    return f"{Decimal(value) * scale:.20g}{sign}"


def _error(requirement: Requirement, text: str) -> SparsepruneError:
    return SparsepruneError(f"--require {shown(requirement.text)}: {text}")
