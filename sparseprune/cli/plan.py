"""`plan`, and `--dry-run` of the others: what a spec binds to, and drawings of its rules."""

from inspect import signature
from typing import TYPE_CHECKING, Annotated

from sparseprune import api, results
from sparseprune.api.options import Option
from sparseprune.cli.command import Call, Json, Quiet, command
from sparseprune.cli.console import on_terminal, print_json, print_table
from sparseprune.errors import SparsepruneError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from sparseprune.execution.plan import Plan

ALL, NONE = "all", "none"
Draw = Annotated[
    str | None,
    Option(
        "--draw RULE|all|none",
        help="Draw the blocks and scopes of a rule.",
        group="Report",
        shown="the first rule on a terminal",
        among="all none",
    ),
]


def show_planned(
    call: "Call[results.Plan]", draw: Draw = None, json: Json = False, quiet: Quiet = False
) -> None:
    drawings: dict[str, RenderableType] = {}

    def look(plan: "Plan") -> None:
        drawings.update(_drawings(plan, draw))

    result = call(look=look)
    if json:
        print_json(result)
    if json or quiet:
        return
    from sparseprune.report.plan import rule_card, totals_card

    parts = []
    for rule in result.rules:
        parts.append(rule_card(rule, result.totals.numel))
        if rule.name in drawings:
            parts.append(drawings[rule.name])
    print_table(*parts, totals_card(result))


plan = command(api.plan, show_planned)


def show_plan(call: "Call[results.Report] | Call[results.Removal]", *, json: bool) -> None:
    """The plan of what a command would do."""
    taken = signature(api.plan).parameters
    options = {name: value for name, value in call.options.items() if name in taken}
    options["command"] = call.function.__name__
    show_planned(Call(api.plan, options, quiet=call.quiet, log=call.log), json=json, quiet=call.quiet)


def _drawings(plan: "Plan", draw: str | None) -> "dict[str, RenderableType]":
    """Drawings of rules by their names; SparsepruneError for a name that no rule has."""
    from sparseprune.report.drawings import RuleDrawing
    from sparseprune.spec.problems import suggestion

    rules = plan.bound.rules
    there = [rule for rule in rules if rule.instances]
    if draw is None:
        nests = [plan.bound.levels(rule.name)[0] for rule in there]
        first = [rule for rule, nest in zip(there, nests, strict=True) if nest == nests[0]]
        drawn = first if on_terminal() else []
    elif draw in {ALL, NONE}:
        drawn = there if draw == ALL else []
    else:
        drawn = [rule for rule in rules if draw in {rule.name, rule.name.partition(".")[2]}]
        if not drawn:
            hint = suggestion(draw, [rule.name for rule in rules])
            raise SparsepruneError(f"--draw {draw}: there is no such rule{hint}")
    tensors = plan.checkpoint.tensors
    return {
        rule.name: RuleDrawing(
            rule, {leaf.tensor: tensors[leaf.tensor].shape for leaf in rule.instances[0].scope.leaves}
        )
        for rule in drawn
        if rule.instances
    }
