"""Expressions of a spec: text -> a syntax tree in which every node is one of a short list.

Whatever is not on the list (calls, powers, comprehensions, attributes of anything but `config`) is
refused here, with the column. Nothing is run: `evaluating` walks the tree. The schema of the tables
calls it.
"""

from __future__ import annotations

import ast
import warnings
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING

from sparseprune.spec.problems import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

LARGEST = 2**63 - 1  # of what counts blocks or elements
_LONGEST = 2000
_DEEPEST = 100
_ALLOWED = (
    "allowed are numbers, strings, lists, names, + - * / // %, comparisons, in, and, or, not, "
    '"a if b else c", x[i] and keys of config'
)
_NODES = (
    ast.Constant, ast.Name, ast.List, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp,
    ast.Subscript, ast.Attribute, ast.Load, ast.And, ast.Or, ast.Not, ast.USub, ast.Add, ast.Sub,
    ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
    ast.In, ast.NotIn,
)  # fmt: skip
_WORDS: dict[type[ast.AST], str] = {
    ast.Call: "a call",
    ast.Pow: "**",
    ast.Slice: "a slice inside [ ]",
    ast.Tuple: "a tuple",
    ast.Dict: "a dictionary",
    ast.Set: "a set",
    ast.Lambda: "a lambda",
    ast.JoinedStr: "an f-string",
    ast.NamedExpr: ":=",
    ast.Starred: "*",
    ast.ListComp: "a comprehension",
    ast.SetComp: "a comprehension",
    ast.DictComp: "a comprehension",
    ast.GeneratorExp: "a comprehension",
    ast.Is: "is",
    ast.IsNot: "is not",
    ast.UAdd: "a + in front",
    ast.Invert: "~",
    ast.MatMult: "@",
    ast.LShift: "<<",
    ast.RShift: ">>",
    ast.BitOr: "|",
    ast.BitAnd: "&",
    ast.BitXor: "^",
}


class ExpressionError(ValueError):
    """An expression that cannot be read, or has no value; the text has the expression and the column."""

    def __init__(self, expression: str, column: int | None, what: str) -> None:
        place = "" if column is None else f" column {column}"
        super().__init__(f"{shown(expression)}{place}: {what}")


@dataclass(frozen=True, slots=True)
class Expression:
    """An expression that was read; `names` are the names that stand in it."""

    text: str
    tree: ast.expr = field(compare=False, repr=False)
    names: frozenset[str] = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class SliceEntry:
    """One dimension's part of a slice: from `low` to before `high`, or at `low` alone where it is single."""

    text: str
    low: Expression | None
    high: Expression | None
    single: bool = False

    @property
    def is_whole(self) -> bool:
        return self.low is None and self.high is None


def parse_expression(text: str) -> Expression:
    """Read an expression; ExpressionError where it is none, or none that is allowed."""
    text = text.strip()
    return _expression(text, _parsed(text, text, 0))


def parse_slice(text: str) -> SliceEntry:
    """Read `low:high`, `low:`, `:high`, `:` or a single index.

    >>> entry = parse_slice("0:2 * n")
    >>> entry.low.text, entry.high.text, entry.single
    ('0', '2 * n', False)
    """
    tree = _parsed(text, f"_[{text}]", 2)  # a subscript is where Python reads such a thing
    if not (isinstance(tree, ast.Subscript) and isinstance(tree.value, ast.Name)):
        raise ExpressionError(text, None, 'wanted "low:high", ":" or a single index')
    entry = tree.slice
    if not isinstance(entry, ast.Slice):
        return SliceEntry(text, _part(text, entry), None, single=True)
    if entry.step is not None:
        raise ExpressionError(text, None, 'a slice has no step: wanted "low:high", ":" or a single index')
    low, high = (None if bound is None else _part(text, bound) for bound in (entry.lower, entry.upper))
    return SliceEntry(text, low, high)


def column_of(text: str, node: ast.expr) -> int | None:
    """Where a node begins, as people count; None where the text has several lines."""
    if "\n" in text:
        return None
    return len(text.encode()[: node.col_offset].decode("utf-8", "replace")) + 1


def _part(text: str, tree: ast.expr) -> Expression:
    """A bound as an expression of its own; places in it count from its own beginning."""
    own = ast.get_source_segment(f"_[{text}]", tree) or ""
    return _expression(own, _parsed(own, own, 0))


def _parsed(text: str, source: str, shift: int) -> ast.expr:
    if len(text) > _LONGEST:
        raise ExpressionError(text, None, f"found {len(text)} characters, wanted {_LONGEST} at most")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a doubtful escape or literal is an error of syntax here
            return ast.parse(source, mode="eval").body
    except SyntaxError as error:
        at = (error.offset or 0) - shift
        end = len(text) + 1  # where Python means when it names no place
        column = None if "\n" in text else min(at, end) if at > 0 else end
        raise ExpressionError(text, column, f"this is no expression: {error.msg}") from error
    except (ValueError, RecursionError, MemoryError) as error:  # null characters, brackets nested too deep
        raise ExpressionError(text, None, "this is no expression that can be read") from error


def _expression(text: str, tree: ast.expr) -> Expression:
    for node, parent in _nodes(text, tree):
        what = _refused(node)
        if what:
            raise ExpressionError(text, column_of(text, parent), f"{what} is not allowed; {_ALLOWED}")
    names = frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
    return Expression(text, tree, names)


def _nodes(text: str, tree: ast.expr) -> Iterator[tuple[ast.AST, ast.expr]]:
    """Every node with the nearest expression that it is part of, or is."""
    todo: list[tuple[ast.AST, ast.expr, int]] = [(tree, tree, 0)]
    while todo:
        node, above, depth = todo.pop()
        if depth > _DEEPEST:
            raise ExpressionError(text, None, f"this is nested deeper than {_DEEPEST} levels")
        here = node if isinstance(node, ast.expr) else above
        yield node, here
        todo += [(child, here, depth + 1) for child in reversed(list(ast.iter_child_nodes(node)))]


def _refused(node: ast.AST) -> str:
    """What to call a node that is not allowed; empty for one that is."""
    if isinstance(node, ast.Constant):
        return _refused_constant(node.value)
    if isinstance(node, ast.Attribute):
        return "" if _starts_at_config(node) else f"the attribute .{node.attr} of anything but config"
    if isinstance(node, _NODES):
        return ""
    return _WORDS.get(type(node), "this")


def _refused_constant(value: object) -> str:
    if isinstance(value, int) and value > LARGEST:
        return f"an integer beyond {LARGEST}"
    if isinstance(value, float) and not isfinite(value):
        return "an infinite number"
    if value is not None and not isinstance(value, bool | int | float | str):
        return "..." if value is ... else f"a {type(value).__name__} constant"
    return ""


def _starts_at_config(node: ast.expr) -> bool:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return isinstance(node, ast.Name) and node.id == "config"
