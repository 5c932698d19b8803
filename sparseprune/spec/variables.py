"""`[vars]`: named values of a spec, what `--set` puts in their place, and what they come to.

A var is a number, true or false, an expression, or a list of these; it may name other vars and config.
`read_variables` needs the text alone, `resolve_variables` the config. Called by `parsing` and `binding`.
"""

from __future__ import annotations

import tomllib
from graphlib import CycleError, TopologicalSorter
from math import isfinite
from typing import TYPE_CHECKING

from sparseprune.spec.evaluating import LONGEST, Broken, BrokenNameError, size_of, unknown_name
from sparseprune.spec.expressions import LARGEST, Expression, ExpressionError, parse_expression
from sparseprune.spec.names import RESERVED, Environment, Names
from sparseprune.spec.problems import Problems, shown, suggestion

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Variable = bool | int | float | Expression | tuple["Variable", ...]
_DEEPEST = 8
_MOST_CIRCLES = 50  # that are told: each is found by a walk over all vars
_WANTED = 'a number, true or false, an expression in quotes such as "2 * n", or a list of these'


class _NoVariableError(ValueError):
    """A value that no var can have."""


def read_variables(value: object, overrides: Mapping[str, str], problems: Problems) -> dict[str, Variable]:
    """The vars that can be read, with the overrides in place; the others are problems."""
    declared = value if isinstance(value, dict) else {}
    if value is not None and not isinstance(value, dict):
        problems.add("", "vars", f"found {shown(value)}, wanted a table: write [vars] above its keys")
    for name in overrides:
        if name not in declared:
            known = suggestion(name, declared) if declared else "; the spec has no [vars]"
            problems.add("", f"--set {name}", f"[vars] has no {shown(name)}{known}")
    variables: dict[str, Variable] = {}
    for name, given in declared.items():
        found = _overriding(overrides[name]) if name in overrides else given
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
    """The value of every var; `Broken` stands for those that have none, which are problems."""
    values: dict[str, object] = {}
    for name in TopologicalSorter(_references(variables)).static_order():
        try:
            values[name] = _value(variables[name], Names(Environment(values, config)))
        except BrokenNameError:
            values[name] = Broken()
        except ExpressionError as error:
            problems.add("vars", name, str(error))
            values[name] = Broken()
    return values


def _wrong_name(name: str) -> str:
    if not (name.isascii() and name.isidentifier()):
        return "the name of a var is made of letters, digits and _"
    return f"{name} means something else in expressions: take another name" if name in RESERVED else ""


def _overriding(text: str) -> object:
    """What stands for a value on the command line: TOML if it can be read as that, else an expression."""
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
        case list() if depth < _DEEPEST:
            return tuple([_variable(item, depth + 1) for item in value])
    raise _NoVariableError


def _check_names(variables: Mapping[str, Variable], known: Mapping[str, object], problems: Problems) -> None:
    """Every name that a var uses exists, and no var needs itself."""
    for name, variable in variables.items():
        for expression in _expressions(variable):
            for used in sorted(expression.names.difference(known)):
                problems.add("vars", name, f"{shown(expression.text)}: {unknown_name(used, known)}")
    references = _references(variables)
    for _ in range(_MOST_CIRCLES):
        try:
            TopologicalSorter(references).prepare()
        except CycleError as error:
            chain = error.args[1][::-1]
            problems.add("vars", chain[0], f"this needs itself: {' -> '.join(chain)}")
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
        name: {used for each in _expressions(variable) for used in each.names if used in variables}
        for name, variable in variables.items()
    }


def _expressions(variable: Variable) -> Iterator[Expression]:
    if isinstance(variable, Expression):
        yield variable
    elif isinstance(variable, tuple):
        for item in variable:
            yield from _expressions(item)
