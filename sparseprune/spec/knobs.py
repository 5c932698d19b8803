"""Knobs: the numbers of a spec by which its budgets alone can be turned, and the budgets for another value.

Owns which variables and keys these are. Reads no checkpoint: it gets bound scopes, whose shapes no knob
changes. Called by whoever looks for the value that reaches a target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from sparseprune.spec.binding import budget_of
from sparseprune.spec.bound import BoundInstance, BoundRule, BoundSpec, Budget
from sparseprune.spec.expressions import Broken, Expression, Names, expressions_of, resolve_variables
from sparseprune.spec.nesting import bounded
from sparseprune.spec.problems import Misfit, Problems
from sparseprune.spec.schema import BudgetTable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sparseprune.spec.schema import Spec

    Budgets = Mapping[int, tuple[Budget, float | None]]  # with the sparsity that was asked for, by form

_KEYS = ("nnz", "sparsity")  # of a table, by which shapes alone tell how much survives


class Knob(Struct, frozen=True):
    """A number that budgets come from: a variable, or the key of a table; `name` is as `--set` takes it.

    `whole`: it takes integers alone. `value` is what the spec says.
    """

    name: str
    whole: bool
    value: float

    @property
    def is_variable(self) -> bool:
        return "." not in self.name


def find_knobs(spec: Spec, bound: BoundSpec, config: Mapping[str, Any] | None) -> list[Knob]:
    """The knobs of the rules that are bound: variables first, then numbers that tables have themselves.

    A variable that anything else than a budget depends on is none, nor is one that is made of other knobs.
    """
    tables = {rule.name: spec.tables[rule.name] for rule in bound.rules if rule.instances}
    budgets = [(place, key, getattr(table, key, None)) for place, table in tables.items() for key in _KEYS]
    used = _depended_on(spec, [value for _, _, value in budgets])
    others = [
        value
        for place, table in spec.tables.items()
        for key, value in table
        if place not in tables or key not in _KEYS
    ]
    free = used - _depended_on(spec, others)
    values = resolve_variables(spec.variables, config, Problems(spec.source))
    numbers = {name: values[name] for name in free if _is_number(values[name])}
    roots = [
        name
        for name in spec.variables
        if name in numbers and not numbers.keys() & (_depended_on(spec, [spec.variables[name]]))
    ]
    typed = [name for name in roots if not isinstance(spec.variables[name], Expression)]
    shares = {value.text for _, key, value in budgets if key == "sparsity" and isinstance(value, Expression)}
    return [
        *(_knob(name, numbers[name], is_share=name in shares) for name in typed or roots),
        *(
            _knob(f"{place}.{key}", value, is_share=key == "sparsity")
            for place, key, value in budgets
            if _is_number(value)
        ),
    ]


def _knob(name: str, value: Any, *, is_share: bool) -> Knob:  # noqa: ANN401
    return Knob(name, isinstance(value, int) and not is_share, value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _depended_on(spec: Spec, values: Iterable[object]) -> set[str]:
    """The variables that values depend on, also by way of others."""
    found: set[str] = set()
    todo = [*values]
    while todo:
        names = {name for each in expressions_of(todo.pop()) for name in each.names} & spec.variables.keys()
        todo += [spec.variables[name] for name in names - found]
        found |= names
    return found


def turned(spec: Spec, knob: Knob, value: float) -> Spec:
    """The spec with another value of a knob."""
    if knob.is_variable:
        return replace(spec, variables={**spec.variables, knob.name: value})
    place, _, key = knob.name.rpartition(".")
    table = spec.tables[place]
    return replace(spec, tables={**spec.tables, place: type(table)({**vars(table), key: value})})


class Form(Struct, frozen=True):
    """What decides over the budget of all instances of a form: rule, one of them, blocks of a scope."""

    rule: str
    instance: BoundInstance
    blocks: int


def forms_of(bound: BoundSpec) -> list[Form]:
    """The forms of bound rules."""
    found: dict[int, tuple[str, BoundInstance]] = {}
    for rule, instance in bound.instances():
        found.setdefault(instance.form, (rule.name, instance))
    return [Form(rule, first, first.scope.blocks_per_scope) for rule, first in found.values()]


def budgets_of(spec: Spec, forms: Iterable[Form], config: Mapping[str, Any] | None) -> Budgets | None:
    """The budgets of forms under a spec of which a knob was turned since; None where it gives none."""
    shared = resolve_variables(spec.variables, config, Problems(spec.source))
    if any(isinstance(value, Broken) for value in shared.values()):
        return None
    try:
        return {form.instance.form: _budget(spec, form, shared) for form in forms}
    except Misfit:
        return None


def _budget(spec: Spec, form: Form, shared: Mapping[str, object]) -> tuple[Budget, float | None]:
    table, one = spec.tables[form.rule], form.instance
    if not isinstance(table, BudgetTable):
        raise TypeError(f"{form.rule} has no budget")
    return budget_of(form.rule, table, one.scope.label, form.blocks, Names(shared, one.captures))


def with_budgets(bound: BoundSpec, budgets: Budgets) -> BoundSpec:
    """The same bound scopes with other budgets, by form; those of nested ones as far as outer ones allow."""
    rules = []
    for rule in bound.rules:
        found = [(one, *budgets[one.form]) for one in rule.instances]
        instances = [replace(one, budget=budget, sparsity=sparsity) for one, budget, sparsity in found]
        rules.append(BoundRule(rule.name, tuple(instances)))
    return replace(bound, rules=bounded(rules))
