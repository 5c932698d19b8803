"""The value of an expression: walks its tree, with every operation bounded in what it may make.

Means what Python means by the same text, but for the bounds (no huge numbers, no repetition of text or
lists) and for `or`, to whose left a key that config lacks counts as None. Called by `names`.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

from sparseprune.spec.expressions import LARGEST, Expression, ExpressionError, column_of
from sparseprune.spec.problems import shown, suggestion

LONGEST = 10_000  # characters of a text, items of a list with those of the lists in it
_ARITHMETIC: dict[type[ast.operator], tuple[str, Callable[[Any, Any], Any]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", operator.truediv),
    ast.FloorDiv: ("//", operator.floordiv),
    ast.Mod: ("%", operator.mod),
}
_ORDERING: dict[type[ast.cmpop], tuple[str, Callable[[Any, Any], bool]]] = {
    ast.Lt: ("<", operator.lt),
    ast.LtE: ("<=", operator.le),
    ast.Gt: (">", operator.gt),
    ast.GtE: (">=", operator.ge),
}


class MissingKeyError(ExpressionError):
    """A key that config lacks; `or` may still give another value."""


class BrokenNameError(ExpressionError):
    """A var that has no value itself, which was told already."""


class Broken:
    """What stands for the value of a var that has none."""


def evaluate(expression: Expression, names: Mapping[str, object]) -> object:
    """The value of an expression; ExpressionError where it has none, with the column and the reason."""
    return _Walk(expression.text, names).value(expression.tree)


class _Walk:
    """One walk over one tree."""

    __slots__ = ("_names", "_text")

    def __init__(self, text: str, names: Mapping[str, object]) -> None:
        self._text = text
        self._names = names

    def value(self, node: ast.expr) -> object:  # noqa: C901, PLR0911  (one row for each kind of node)
        match node:
            case ast.Constant(value):
                return value
            case ast.Name(name):
                return self._named(node, name)
            case ast.List(items):
                return self._bounded(node, [self.value(item) for item in items])
            case ast.UnaryOp(op, operand):
                found = self.value(operand)
                return not found if isinstance(op, ast.Not) else self._negative(node, found)
            case ast.BinOp(left, op, right):
                return self._arithmetic(node, op, self.value(left), self.value(right))
            case ast.BoolOp(op, operands):
                return self._all(operands) if isinstance(op, ast.And) else self._first(operands)
            case ast.Compare(left, ops, others):
                return self._chain(left, ops, others)
            case ast.IfExp(test, then, otherwise):
                return self.value(then if self.value(test) else otherwise)
            case ast.Attribute(of, key):
                return self._entry(node, of, self.value(of), key)
            case ast.Subscript(of, index):
                return self._item(node, of, self.value(of), self.value(index))
        raise self._error(node, "this has no value")

    def _error(
        self, node: ast.expr, what: str, kind: type[ExpressionError] = ExpressionError
    ) -> ExpressionError:
        return kind(self._text, column_of(self._text, node), what)

    def _named(self, node: ast.expr, name: str) -> object:
        if name not in self._names:
            raise self._error(node, unknown_name(name, self._names))
        value = self._names[name]
        if isinstance(value, Broken):
            raise self._error(node, f"{name} has no value", BrokenNameError)
        return value

    def _all(self, operands: list[ast.expr]) -> object:
        value: object = True
        for operand in operands:
            value = self.value(operand)
            if not value:
                break
        return value

    def _first(self, operands: list[ast.expr]) -> object:
        for operand in operands[:-1]:
            try:
                value = self.value(operand)
            except MissingKeyError:
                continue
            if value:
                return value
        return self.value(operands[-1])

    def _chain(self, left: ast.expr, ops: list[ast.cmpop], others: list[ast.expr]) -> bool:
        before = self.value(left)
        for op, node in zip(ops, others, strict=True):
            after = self.value(node)
            if not self._holds(node, op, before, after):
                return False
            before = after
        return True

    def _holds(self, node: ast.expr, op: ast.cmpop, left: Any, right: Any) -> bool:  # noqa: ANN401
        if isinstance(op, ast.Eq | ast.NotEq):
            return bool((left == right) is isinstance(op, ast.Eq))
        if isinstance(op, ast.In | ast.NotIn):
            return self._contains(node, left, right) is isinstance(op, ast.In)
        sign, holds = _ORDERING[type(op)]
        if not (_numbers(left, right) or (isinstance(left, str) and isinstance(right, str))):
            raise self._error(node, f"{kind_of(left)} {sign} {kind_of(right)} has no meaning")
        return bool(holds(left, right))

    def _contains(self, node: ast.expr, left: object, right: object) -> bool:
        if isinstance(right, list | tuple):
            return left in right
        if isinstance(right, str | Mapping) and isinstance(left, str):
            return left in right
        raise self._error(node, f"{kind_of(left)} in {kind_of(right)} has no meaning")

    def _negative(self, node: ast.expr, value: Any) -> object:  # noqa: ANN401
        if not _numbers(value):
            raise self._error(node, f"- {kind_of(value)} has no meaning")
        return self._bounded(node, -value)

    def _arithmetic(self, node: ast.expr, op: ast.operator, left: Any, right: Any) -> object:  # noqa: ANN401
        sign, compute = _ARITHMETIC[type(op)]
        joined = sign == "+" and any(
            isinstance(left, kind) and isinstance(right, kind) for kind in (str, list)
        )
        if not (_numbers(left, right) or joined):
            raise self._error(node, f"{kind_of(left)} {sign} {kind_of(right)} has no meaning")
        try:
            return self._bounded(node, compute(left, right))
        except ZeroDivisionError:
            raise self._error(node, "this divides by zero") from None
        except OverflowError:
            raise self._error(node, "this is no finite number") from None

    def _bounded(self, node: ast.expr, value: object) -> object:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise self._error(node, f"this is an integer beyond {LARGEST}")
        if isinstance(value, float) and not isfinite(value):
            raise self._error(node, "this is no finite number")
        if isinstance(value, str | list) and size_of(value) > LONGEST:
            raise self._error(node, f"this is {kind_of(value)} of more than {LONGEST} parts")
        return value

    def _item(self, node: ast.expr, of: ast.expr, whole: object, index: object) -> object:
        if isinstance(whole, list | str):
            if not isinstance(index, int):
                raise self._error(node, f"found the index {shown(index)}, wanted an integer")
            if not -len(whole) <= index < len(whole):
                found = f"{ast.unparse(of)} has {len(whole)} items"
                raise self._error(node, f"{found}, there is no item {index}")
            return whole[index]
        if not isinstance(index, str):
            raise self._error(
                node, f"{ast.unparse(of)} is {kind_of(whole)}, which has no item {shown(index)}"
            )
        return self._entry(node, of, whole, index)

    def _entry(self, node: ast.expr, of: ast.expr, whole: object, key: str) -> object:
        if isinstance(whole, Mapping):
            if key in whole:
                return whole[key]
            what = f"{ast.unparse(of)} has no key {shown(key)}{suggestion(key, map(str, whole))}"
        elif isinstance(of, ast.Name) and of.id == "config":
            what = f"the checkpoint has no config.json, where {shown(key)} would stand"
        else:
            what = f"{ast.unparse(of)} is {shown(whole)}, which has no key {shown(key)}"
        raise self._error(node, what, MissingKeyError)


def unknown_name(name: str, known: Mapping[str, object] | frozenset[str]) -> str:
    """What to say about a name that nothing has."""
    constant = {"true": "True", "false": "False", "none": "None", "null": "None"}.get(name.lower())
    return f"unknown name {shown(name)}" + suggestion(name, [constant] if constant else known)


def kind_of(value: object) -> str:
    """What a value is, in words."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "a text"
        case list() | tuple():
            return "a list"
    return "a table"


def size_of(value: object) -> int:
    """Characters of a text; items of a list, with what is in its items."""
    if isinstance(value, str):
        return len(value)
    count, todo = 0, [value]
    while todo and count <= LONGEST:
        part = todo.pop()
        if isinstance(part, list | tuple):
            count += len(part)
            todo += part
    return count


def _numbers(*values: object) -> bool:
    return all(isinstance(value, int | float) for value in values)
