"""`--target`: the number of a spec at which so many parameters or bytes are left, found by plans alone.

Owns how a target is written, which number is varied for it, and what is refused. The rules are bound once,
by their shapes each value is judged; no weight is read. Called by pruning.
"""

from __future__ import annotations

import re
from fractions import Fraction
from math import ceil
from typing import TYPE_CHECKING, Any, cast

from msgspec import Struct
from msgspec.structs import replace

from sparseprune.api.bisection import Search, Values
from sparseprune.api.run import weight_bytes
from sparseprune.checkpoint.resizing import lay_out_removal
from sparseprune.checkpoint.source import read_beside
from sparseprune.engine.grids import prod
from sparseprune.errors import CheckpointError, SparsepruneError, SpecError
from sparseprune.execution.plan import Plan
from sparseprune.removal.parameters import worth_of
from sparseprune.removal.preview import preview
from sparseprune.report.wording import left_text
from sparseprune.results.pruning import TargetReached
from sparseprune.spec.knobs import budgets_of, find_knobs, forms_of, turned, with_budgets
from sparseprune.spec.problems import listed

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from sparseprune.api.bisection import Refusal
    from sparseprune.checkpoint import Checkpoint
    from sparseprune.removal.parameters import Number, Unit, Worth
    from sparseprune.spec import BoundInstance, BoundSpec, Spec
    from sparseprune.spec.knobs import Budgets, Knob

_GOAL = re.compile(
    r"(?P<unit>params|size|active) *= *(?P<number>[0-9]{1,18}(?:\.[0-9]{0,18})?|\.[0-9]{1,18}) *"
    r"(?P<suffix>[a-z]{0,3})(?: *: *(?P<name>\S+))?",
    re.IGNORECASE,
)
_THOUSANDS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_BYTES = {"": 1, "b": 1} | {
    name: base**power
    for power, letter in enumerate("kmgt", 1)
    for name, base in ((letter, 1000), (f"{letter}b", 1000), (f"{letter}ib", 1024))
}
_SAMPLES = 32  # values that tell whether more of a number is always less


class Goal(Struct, frozen=True):
    """What shall be left at most, in a unit; `name` is the number to vary, if it was given."""

    text: str
    unit: Unit
    most: int
    name: str | None = None

    @staticmethod
    def of(text: str) -> Goal:
        """A target as it is typed.

        >>> Goal.of("params=6.7B").most, Goal.of("size=1GiB:keep").name
        (6700000000, 'keep')
        """
        found = _GOAL.fullmatch(text.strip())
        unit = found["unit"].lower() if found else ""
        factor = (_BYTES if unit == "size" else _THOUSANDS).get(found["suffix"].lower()) if found else None
        if found is None or factor is None:
            raise SparsepruneError(
                f"--target {text}: wanted params=NUMBER, active=NUMBER or size=BYTES, such as params=6B or "
                "size=12GB"
            )
        most = int(Fraction(found["number"]) * factor)
        return Goal(text.strip(), cast("Unit", unit), most, found["name"])

    def refused(self, why: str) -> SparsepruneError:
        return SparsepruneError(f"--target {self.text}: {why}")


class Bound(Struct, frozen=True):
    """A spec bound to a checkpoint; numbers in `overrides` were set. `config` is the one that counts.

    `mark` is what the headers of a smaller output tell of the command.
    """

    spec: Spec
    checkpoint: Checkpoint
    bound: BoundSpec
    overrides: Collection[str]
    config: Mapping[str, Any] | None
    mark: Mapping[str, str]


def reach(goal: Goal, given: Bound, *, removed: bool) -> TargetReached:
    """The number that leaves the most within a target; what a spec drops becomes zero or is `removed`.

    Raises:
        SparsepruneError: it is not clear what to vary, no value reaches the target, or only data would tell.
        SpecError: nothing can be removed by the spec.
    """
    if goal.unit == "size" and not removed:
        raise goal.refused("zeros do not shrink a file; remove cuts out what a spec drops as a whole")
    nested = next((rule for rule in given.bound.rules if rule.within is not None), None)
    if nested is not None and not removed:
        raise goal.refused(f"only the data tells what {nested.name} drops of what {nested.within} keeps")
    given = replace(given, bound=given.bound.outermost)
    knob = _chosen(goal, given)
    try:
        worth = worth_of(goal.unit, given.checkpoint.tensors, given.config)
    except CheckpointError as error:
        raise goal.refused(str(error)) from error
    turning = _Turning(goal, given, knob, worth)
    values = turning.values()
    measure: Callable[[float], Number | Refusal] = turning.estimate
    if removed:
        measure = _removal_of(turning, worth)
    search = Search(
        values.count,
        lambda place: turning.state(values.at(place)),
        lambda place: turning.estimate(values.at(place)),
        lambda place: measure(values.at(place)),
    )
    found = search.first(goal.most)
    if found is None:
        raise _missed(turning, search, values)
    value = values.shortest(found.begin, found.end)
    budgets = turning.budgets(value)
    if budgets is None or turning.keeps_all(budgets):
        raise goal.refused(
            f"there are {left_text(goal.unit, ceil(turning.whole))} as it is, and nothing has to go"
        )
    return TargetReached(
        unit=goal.unit,
        asked=goal.most,
        reached=ceil(found.left),
        before=ceil(turning.whole),
        name=knob.name,
        value=value,
    )


def _chosen(goal: Goal, given: Bound) -> Knob:
    """The number to vary: the one that was named, else the only variable, else the only number of a table."""
    found = find_knobs(given.spec, given.bound, given.config)
    if not found:
        raise goal.refused(f"{given.spec.source} has no nnz and no sparsity that could be varied")
    there = listed([knob.name for knob in found])
    left = [knob for knob in found if knob.name not in given.overrides]
    if goal.name is not None:
        named = next((knob for knob in found if knob.name == goal.name), None)
        if named is None:
            raise goal.refused(
                f"{given.spec.source} has no such number to vary as {goal.name}; there is {there}"
            )
        left = [knob for knob in left if knob == named]
    if not left:
        raise goal.refused(f"it varies {goal.name or there}, which --set has set: leave one of them out")
    variables = [knob for knob in left if knob.is_variable] or left
    if len(variables) > 1:
        names = [knob.name for knob in variables]
        raise goal.refused(
            f"it could vary {listed(names, 'or')}: name one, as in --target {goal.text}:{names[0]}, "
            "or set the others by --set"
        )
    return variables[0]


class _Turning:
    """The budgets of bound rules for values of a knob, and what their blocks are worth.

    `whole` is what the checkpoint has. A plan tells what is left where all blocks that compete are worth as
    much: else SparsepruneError.
    """

    def __init__(self, goal: Goal, given: Bound, knob: Knob, worth: Worth) -> None:
        self.goal, self.given, self.knob = goal, given, knob
        self._forms = forms_of(given.bound)
        self._budgets: dict[float, Budgets | None] = {}
        tensors = given.checkpoint.tensors
        self.whole: Number = worth.total({name: stored.shape for name, stored in tensors.items()})
        if goal.unit == "size":
            self.whole = sum(shard.size for shard in given.checkpoint.shards)
        self._each: dict[int, Number] = {}  # what one block of every scope of a form is worth in all
        for rule, instance in given.bound.instances():
            more = prod(instance.scope.grid_shape) * self._worth_of_block(rule.name, instance, worth)
            self._each[instance.form] = self._each.get(instance.form, 0) + more

    def _worth_of_block(self, rule: str, instance: BoundInstance, worth: Worth) -> Number:
        if instance.budget.nnz is None:
            raise self.goal.refused(f"only the data tells how much scores the threshold of {rule}")
        if instance.soft is not None:
            raise self.goal.refused(f"only the data tells how much {rule} shrinks to zero")
        found = {
            sum((leaf.numel_per_block * worth.weights[leaf.tensor] for leaf in member.leaves), start=0)
            for member in instance.scope.members
        }
        if len(found) > 1:
            why = "since blocks of unlike sizes compete"
            raise self.goal.refused(f"only the data tells how much {rule} drops, {why}")
        return found.pop()

    def budgets(self, value: float) -> Budgets | None:
        """The budgets with this value, None where it is none."""
        if value not in self._budgets:
            spec = turned(self.given.spec, self.knob, value)
            self._budgets[value] = budgets_of(spec, self._forms, self.given.config)
        return self._budgets[value]

    def state(self, value: float) -> tuple[int, ...]:
        """How many blocks survive in the scopes of each form."""
        budgets = self.budgets(value) or {}
        return tuple([budgets[form.instance.form][0].nnz or 0 for form in self._forms])

    def estimate(self, value: float) -> Number:
        """What is left without the blocks that are dropped, but with all that follows them."""
        kept = zip(self._forms, self.state(value), strict=True)
        dropped = [(form.blocks - nnz) * self._each[form.instance.form] for form, nnz in kept]
        return self.whole - sum(dropped, start=0)

    def keeps_all(self, budgets: Budgets) -> bool:
        return all(budgets[form.instance.form][0].nnz == form.blocks for form in self._forms)

    def values(self) -> Values:
        """All values of the knob, those first with which most is left."""
        fits = lambda value: self.budgets(value) is not None  # noqa: E731
        values = Values.around(self.knob.value, fits, whole=self.knob.whole)
        seen = [self.estimate(value) for value in values.spread(_SAMPLES)]
        if seen not in (sorted(seen), sorted(seen, reverse=True)):
            raise self.goal.refused(f"more of {self.knob.name} is sometimes more and sometimes less")
        return values if seen[0] >= seen[-1] else values.turned()


def _removal_of(turning: _Turning, worth: Worth) -> Callable[[float], Number | Refusal]:
    """What a removal leaves with a value, or why no class of a model has that."""
    goal, given = turning.goal, turning.given
    checkpoint, beside = given.checkpoint, read_beside(given.checkpoint)
    if not checkpoint.is_directory:
        lay_out_removal(checkpoint, None, None, None)  # says what is missing

    def left(value: float) -> Number | Refusal:
        bound = with_budgets(given.bound, turning.budgets(value) or {})
        expected = preview(Plan(checkpoint, bound, ()), given.config, beside)
        if expected.reasons:
            raise SpecError(*expected.refusals(given.spec.source))
        if expected.problems:
            return expected.problems
        removal = expected.removal
        if removal is None:
            raise goal.refused(f"only the data tells what is left of each tensor by {given.spec.source}")
        if goal.unit == "size":
            changed = removal.left, removal.config, removal.beside
            return weight_bytes(lay_out_removal(checkpoint, None, *changed, given.mark))
        return worth.total({name: one.shape for name, one in removal.left.items()})

    return left


def _missed(turning: _Turning, search: Search, values: Values) -> SparsepruneError:
    """The error where no value reaches a target: the nearest one, or why all are refused."""
    goal, source, nearest = turning.goal, turning.given.spec.source, search.nearest
    whole = nearest is not None and turning.keeps_all(turning.budgets(values.at(nearest.begin)) or {})
    if nearest is None or (whole and search.refusal):
        return SpecError(*(f"{source}: {line}" for line in search.refusal))
    least = f"{turning.knob.name}={values.shortest(nearest.begin, nearest.end)!r}"
    found = f"the least are {left_text(goal.unit, ceil(nearest.left))}, with {least}"
    more = f"; beyond that, {search.refusal[0]}" if search.refusal else ""
    return goal.refused(
        f"no {turning.knob.name} reaches it: {found}, of {left_text(goal.unit, ceil(turning.whole))}{more}"
    )
