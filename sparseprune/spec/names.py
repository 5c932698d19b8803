"""What an expression may name while a spec is bound: vars, captures, config, and facts of one tensor.

Turns the entries of keys (a number, or an expression that gives one) into numbers of the kind that is
wanted. Knows neither tables nor where a problem is reported. Called by `locating` and `binding`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sparseprune.spec.evaluating import BrokenNameError, evaluate
from sparseprune.spec.expressions import LARGEST, Expression, ExpressionError
from sparseprune.spec.problems import Misfit, shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sparseprune.engine.grids import Shape
    from sparseprune.spec.bound import Captures, TensorInfo

FACTS = ("shape", "ndim", "numel", "dtype")
RESERVED = ("config", *FACTS)


@dataclass(frozen=True, slots=True)
class Environment:
    """What is the same for all instances: the values of `[vars]`, and config.json or None."""

    variables: Mapping[str, object] = field(default_factory=dict)
    config: Mapping[str, object] | None = None

    def settles(self, expressions: Iterable[Expression]) -> bool:
        """Whether no capture has a say in them: they come to the same wherever the facts are the same."""
        known = {*self.variables, *RESERVED}
        return all(expression.names <= known for expression in expressions)


@dataclass(frozen=True, slots=True)
class Names:
    """All that may be named for one instance."""

    environment: Environment
    captures: Captures = ()
    tensor: TensorInfo | None = None

    def value(self, entry: object) -> object:
        """The entry itself, or what it comes to where it is an expression; ExpressionError."""
        if not isinstance(entry, Expression):
            return entry
        known = {"config": self.environment.config, **self.environment.variables, **dict(self.captures)}
        if self.tensor is not None:
            known |= _facts(self.tensor)
        return evaluate(entry, known)

    def integer(self, entry: int | Expression, least: int, wanted: str) -> int:
        """An integer of `least` or more; ExpressionError."""
        found = self.value(entry)
        if isinstance(found, bool) or not isinstance(found, int) or not least <= found <= LARGEST:
            hint = " (// divides integers)" if isinstance(found, float) and found.is_integer() else ""
            raise came_to(entry, found, wanted + hint)
        return found

    def number(self, entry: float | Expression, most: float, wanted: str) -> float:
        """A number from 0 to `most`; ExpressionError."""
        found = self.value(entry)
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found <= most:
            raise came_to(entry, found, wanted)
        return float(found)

    def extents(self, shape: Sequence[int | Expression]) -> Shape:
        """A shape whose entries are 1 or more, or -1; ExpressionError."""
        for entry in shape:
            if not isinstance(entry, int):
                return tuple([each if isinstance(each, int) else self._extent(each) for each in shape])
        return tuple(shape)  # type: ignore[arg-type]

    def _extent(self, entry: Expression) -> int:
        wanted = "an integer of 1 or more, or -1"
        extent = self.integer(entry, -1, wanted)
        if extent == 0:
            raise came_to(entry, extent, wanted)
        return extent


def came_to(entry: object, found: object, wanted: str) -> ExpressionError:
    """The error for an expression that has a value, but not one of the kind that is wanted."""
    text = entry.text if isinstance(entry, Expression) else str(entry)
    return ExpressionError(text, None, f"this comes to {shown(found)}, wanted {wanted}")


def _facts(tensor: TensorInfo) -> dict[str, object]:
    numel = 1
    for size in tensor.shape:
        numel *= size
    values = (list(tensor.shape), len(tensor.shape), numel, tensor.dtype)
    return dict(zip(FACTS, values, strict=True))


def misfit(place: str, key: str, error: ExpressionError, label: str) -> Misfit:
    """What to report for an expression without a fitting value; nothing, where that was told already."""
    return Misfit(place, key, "" if isinstance(error, BrokenNameError) else f"{label}: {error}")
