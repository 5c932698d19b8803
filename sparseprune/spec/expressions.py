"""Expressions over numbers, lists, captures and config: parsed to an allow-listed tree, never `eval`.

Owns syntax, bounds, evaluation, the names that expressions may use, and `[vars]`. Called by all of spec, and
by removal for values of config.json.
"""

from __future__ import annotations

import ast
import operator
import tomllib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from math import isfinite, prod
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from sparseprune.spec.problems import Misfit, Problems, shown, suggestion

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sparseprune.engine.grids import Shape
    from sparseprune.spec.bound import Captures, TensorInfo


LARGEST = 2**63 - 1  # the largest number of blocks or elements
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
    ast.Call: "a call", ast.Pow: "**", ast.Slice: "a slice inside [ ]", ast.Tuple: "a tuple",
    ast.Dict: "a dictionary", ast.Set: "a set", ast.Lambda: "a lambda", ast.JoinedStr: "an f-string",
    ast.NamedExpr: ":=", ast.Starred: "*", ast.ListComp: "a comprehension", ast.SetComp: "a comprehension",
    ast.DictComp: "a comprehension", ast.GeneratorExp: "a comprehension", ast.Is: "is", ast.IsNot: "is not",
    ast.UAdd: "a + in front", ast.Invert: "~", ast.MatMult: "@", ast.LShift: "<<", ast.RShift: ">>",
    ast.BitOr: "|", ast.BitAnd: "&", ast.BitXor: "^",
}  # fmt: skip


class ExpressionError(ValueError):
    """An expression that cannot be read or has no value; the text names the expression and the column."""

    def __init__(self, expression: str, column: int | None, what: str) -> None:
        place = "" if column is None else f" column {column}"
        super().__init__(f"{shown(expression)}{place}: {what}")


@dataclass(frozen=True, slots=True)
class Expression:
    """A parsed expression; `names` are all names in it."""

    text: str
    tree: ast.expr = field(compare=False, repr=False)
    names: frozenset[str] = field(compare=False, repr=False)


class SliceEntry(Struct, frozen=True):
    """One dimension of a slice: from `low` to before `high`, or only the index `low` if it is `single`."""

    text: str
    low: Expression | None
    high: Expression | None
    single: bool = False


def parse_expression(text: str) -> Expression:
    """Parse an expression; ExpressionError for wrong syntax and for what is not allowed."""
    text = text.strip()
    return _expression(text, _parsed(text, text, 0))


def parse_slice(text: str) -> SliceEntry:
    """Parse `low:high`, `low:`, `:high`, `:` or a single index.

    >>> entry = parse_slice("0:2 * n")
    >>> entry.low.text, entry.high.text, entry.single
    ('0', '2 * n', False)
    """
    tree = _parsed(text, f"_[{text}]", 2)  # Python parses slices inside subscripts only
    if not (isinstance(tree, ast.Subscript) and isinstance(tree.value, ast.Name)):
        raise ExpressionError(text, None, 'wanted "low:high", ":" or a single index')
    entry = tree.slice
    if not isinstance(entry, ast.Slice):
        return SliceEntry(text, _part(text, entry), None, single=True)
    if entry.step is not None:
        raise ExpressionError(text, None, 'a slice has no step: wanted "low:high", ":" or a single index')
    low, high = (None if bound is None else _part(text, bound) for bound in (entry.lower, entry.upper))
    return SliceEntry(text, low, high)


def expressions_of(value: object) -> Iterator[Expression]:
    """All expressions in a value: in the bounds of slices, the items of tuples, the keys of tables."""
    match value:
        case Expression():
            yield value
        case SliceEntry(low=low, high=high):
            yield from expressions_of((low, high))
        case Iterable() if not isinstance(value, str):
            for part in value:
                yield from expressions_of(part)


def column_of(text: str, node: ast.expr) -> int | None:
    """The column, from 1, where a node begins; None if the text has several lines."""
    if "\n" in text:
        return None
    return len(text.encode()[: node.col_offset].decode("utf-8", "replace")) + 1


def _part(text: str, tree: ast.expr) -> Expression:
    """A bound as an expression of its own, whose columns count from its own beginning."""
    own = ast.get_source_segment(f"_[{text}]", tree) or ""
    return _expression(own, _parsed(own, own, 0))


def _parsed(text: str, source: str, shift: int) -> ast.expr:
    if len(text) > _LONGEST:
        raise ExpressionError(text, None, f"found {len(text)} characters, wanted {_LONGEST} at most")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a doubtful escape or literal is a syntax error here
            return ast.parse(source, mode="eval").body
    except SyntaxError as error:
        at = (error.offset or 0) - shift
        end = len(text) + 1  # what Python means when it names no column
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
    """Every node with the innermost expression around it, or itself."""
    todo: list[tuple[ast.AST, ast.expr, int]] = [(tree, tree, 0)]
    while todo:
        node, above, depth = todo.pop()
        if depth > _DEEPEST:
            raise ExpressionError(text, None, f"this is nested deeper than {_DEEPEST} levels")
        here = node if isinstance(node, ast.expr) else above
        yield node, here
        todo += [(child, here, depth + 1) for child in reversed(list(ast.iter_child_nodes(node)))]


def _refused(node: ast.AST) -> str:
    """The name of a node that is not allowed; empty if it is allowed."""
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


LONGEST = 10_000  # characters of a text; items of a list and of all lists in it
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
    """A key that config lacks; `or` may give another value."""


class BrokenNameError(ExpressionError):
    """A var without a value, which is already reported."""


class Broken:
    """The value of a var that has a problem."""


def evaluate(expression: Expression, names: Mapping[str, object]) -> object:
    """The value of an expression; ExpressionError, with the column and the reason, if it has none."""
    return _Walk(expression.text, names).value(expression.tree)


class _Walk:
    """The evaluation of one expression."""

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
            what = f"the checkpoint has no config.json, from which {shown(key)} is read"
        else:
            what = f"{ast.unparse(of)} is {shown(whole)}, which has no key {shown(key)}"
        raise self._error(node, what, MissingKeyError)


def unknown_name(name: str, known: Mapping[str, object] | frozenset[str]) -> str:
    """The text of a problem: a name that is not known."""
    constant = {"true": "True", "false": "False", "none": "None", "null": "None"}.get(name.lower())
    return f"unknown name {shown(name)}" + suggestion(name, [constant] if constant else known)


_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (type(None), "nothing"),
    (bool, "true or false"),
    ((int, float), "a number"),
    (str, "a text"),
    ((list, tuple), "a list"),
)


def kind_of(value: object) -> str:
    """The kind of a value in words."""
    return next((words for kind, words in _KINDS if isinstance(value, kind)), "a table")


def size_of(value: object) -> int:
    """Characters of a text; items of a list and of all lists in it."""
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


FACTS = ("shape", "ndim", "numel", "dtype")
RESERVED = ("config", *FACTS)


class Names(Struct, frozen=True):
    """The names that expressions may use for one instance: its captures and the facts of its tensor.

    All instances share config, which is None without a config.json, and the values of `[vars]`.
    """

    shared: Mapping[str, object]
    captures: Captures = ()
    tensor: TensorInfo | None = None

    def value(self, entry: object) -> object:
        """The entry itself, or the value of an expression; ExpressionError."""
        if not isinstance(entry, Expression):
            return entry
        known = {**self.shared, **dict(self.captures)}
        if self.tensor is not None:
            shape = self.tensor.shape
            facts = (list(shape), len(shape), prod(shape), self.tensor.dtype)
            known |= zip(FACTS, facts, strict=True)
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
            if most == 1 and isinstance(found, int | float) and 2 <= found <= 100:
                wanted += f"; did you mean {found / 100:g}?"
            raise came_to(entry, found, wanted)
        return float(found)

    def extents(self, shape: Sequence[int | Expression]) -> Shape:
        """A shape whose entries are 1 or more, or -1; ExpressionError."""
        wanted = "an integer of 1 or more, or -1"
        extents = [each if isinstance(each, int) else self.integer(each, -1, wanted) for each in shape]
        if 0 in extents:
            raise came_to(shape[extents.index(0)], 0, wanted)
        return tuple(extents)


def came_to(entry: object, found: object, wanted: str) -> ExpressionError:
    """The error for an expression whose value is not of the kind that is wanted."""
    text = entry.text if isinstance(entry, Expression) else str(entry)
    return ExpressionError(text, None, f"this comes to {shown(found)}, wanted {wanted}")


def misfit(place: str, key: str, error: ExpressionError, label: str = "") -> Misfit:
    """The problem of an expression without a fitting value; without a text if it is already reported."""
    text = f"{label}: {error}" if label else str(error)
    return Misfit(place, key, "" if isinstance(error, BrokenNameError) else text)


Variable = bool | int | float | Expression | tuple["Variable", ...]
_DEEPEST_LIST = 8
_MOST_CIRCLES = 50  # that are reported: each costs a walk over all vars
_WANTED = 'a number, true or false, an expression in quotes such as "2 * n", or a list of these'


class _NoVariableError(ValueError):
    """A value of a type that vars cannot have."""


def read_variables(
    value: object,
    overrides: Mapping[str, str],
    problems: Problems,
    elsewhere: Callable[[str], str] = lambda _: "",
) -> dict[str, Variable]:
    """The vars that can be read, with overrides applied; the others are problems.

    `elsewhere` ends a text about a name that is set and not there: where it is.
    """
    declared = value if isinstance(value, dict) else {}
    if value is not None and not isinstance(value, dict):
        problems.add("", "vars", f"found {shown(value)}, wanted a table: write [vars] above its keys")
    for name in overrides:
        if name not in declared:
            known = suggestion(name, declared) if declared else "; the spec has no [vars]"
            problems.add("", f"--set {name}", f"[vars] has no {shown(name)}{known}{elsewhere(name)}")
    variables: dict[str, Variable] = {}
    for name, given in declared.items():
        found = typed_value(overrides[name]) if name in overrides else given
        wrong = _wrong_name(name)
        try:
            if not wrong:
                variables[name] = _variable(found, 0)
        except ExpressionError as error:
            wrong = str(error)
        except _NoVariableError:
            wrong = f"found {shown(found)}, wanted {_WANTED}"
        if wrong:
            problems.add("vars", name, wrong)
    _check_names(variables, {**declared, "config": None}, problems)
    return variables


def resolve_variables(
    variables: Mapping[str, Variable], config: Mapping[str, object] | None, problems: Problems
) -> dict[str, object]:
    """The names that all instances share: config, and every var, `Broken` where it has a problem."""
    shared: dict[str, object] = {"config": config}
    for name in TopologicalSorter(_references(variables)).static_order():
        try:
            shared[name] = _value(variables[name], Names(shared))
        except ExpressionError as error:
            shared[name] = Broken()
            problems.note(misfit("vars", name, error))
    return shared


def _wrong_name(name: str) -> str:
    if not (name.isascii() and name.isidentifier()):
        return "the name of a var is made of letters, digits and _"
    return f"{name} is a reserved name in expressions: take another one" if name in RESERVED else ""


def typed_value(text: str) -> object:
    """The value of a `--set`: read as TOML if that works, else as an expression, such as a text in quotes."""
    if text.startswith(("'", '"')):
        return text
    try:
        document = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return document["value"] if document.keys() == {"value"} else text


def _variable(value: object, depth: int) -> Variable:
    match value:
        case str():
            return parse_expression(value)
        case bool():
            return value
        case int() if abs(value) <= LARGEST:
            return value
        case float() if isfinite(value):
            return value
        case list() if depth < _DEEPEST_LIST:
            return tuple([_variable(item, depth + 1) for item in value])
    raise _NoVariableError


def _check_names(variables: Mapping[str, Variable], known: Mapping[str, object], problems: Problems) -> None:
    """Problems of names that vars use and that do not exist, and of vars that depend on themselves."""
    for name, variable in variables.items():
        for expression in expressions_of(variable):
            for used in sorted(expression.names.difference(known)):
                problems.add("vars", name, f"{shown(expression.text)}: {unknown_name(used, known)}")
    references = _references(variables)
    for _ in range(_MOST_CIRCLES):
        try:
            TopologicalSorter(references).prepare()
        except CycleError as error:
            chain = error.args[1][::-1]
            problems.add("vars", chain[0], f"this depends on itself: {' -> '.join(chain)}")
            references = {name: used - {*chain} for name, used in references.items() if name not in chain}
        else:
            return


def _value(variable: Variable, names: Names) -> object:
    if not isinstance(variable, tuple):
        return names.value(variable)
    value = [_value(item, names) for item in variable]
    if size_of(value) > LONGEST:
        raise ExpressionError("[...]", None, f"this is a list of more than {LONGEST} parts")
    return value


def _references(variables: Mapping[str, Variable]) -> dict[str, set[str]]:
    return {
        name: {used for each in expressions_of(variable) for used in each.names if used in variables}
        for name, variable in variables.items()
    }
