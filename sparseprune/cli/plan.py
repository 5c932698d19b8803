"""`plan`, and `--dry-run` of the others: what a spec binds to, and drawings of its rules."""

from inspect import signature
from typing import TYPE_CHECKING, Annotated

from sparseprune import api, results
from sparseprune.api.options import Option
from sparseprune.cli.command import Call, Json, command
from sparseprune.cli.console import on_terminal, print_json, print_table, tell
from sparseprune.errors import SparsepruneError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from sparseprune import execution
    from sparseprune.cli.request import Request

ALL, NONE = "all", "none"
Draw = Annotated[
    str | None,
    Option(
        "--draw",
        metavar="RULE|all|none",
        help="Draw the blocks and scopes of a rule; on a terminal the first one is drawn anyway.",
    ),
]


def show_planned(call: "Call[results.Plan]", draw: Draw = None, json: Json = False) -> None:
    drawings: dict[str, RenderableType] = {}

    def look(plan: "execution.Plan") -> None:
        drawings.update(_drawings(plan, draw))

    _print(call(look=look), drawings, json=json)


def _print(result: "results.Plan", drawings: "dict[str, RenderableType]", *, json: bool) -> None:
    if json:
        print_json(result)
        return
    from sparseprune.report.plan_table import rule_card, totals_card

    parts = []
    for rule in result.rules:
        parts.append(rule_card(rule, result.totals.numel))
        if rule.name in drawings:
            parts.append(drawings[rule.name])
    print_table(*parts, totals_card(result))


plan = command(api.plan, show_planned)


def show_plan(call: "Call[results.Report]", *, json: bool) -> None:
    """The plan of what a command would do."""
    taken = signature(api.plan).parameters
    options = {name: value for name, value in call.options.items() if name in taken}
    options["command"] = call.function.__name__
    show_planned(Call(api.plan, options, quiet=call.quiet), json=json)


def _drawings(plan: "execution.Plan", draw: str | None) -> "dict[str, RenderableType]":
    """Drawings of rules by their names; SparsepruneError for a name that no rule has."""
    from sparseprune.report.drawings import RuleDrawing
    from sparseprune.spec.problems import suggestion

    rules = plan.bound.rules
    there = [rule for rule in rules if rule.instances]
    if draw is None:
        drawn = there[:1] if on_terminal() else []
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


def run_removal(request: "Request") -> None:
    """The plan of a removal, whose output is the smaller checkpoint; what cannot be removed is refused."""
    from sparseprune.api.options import Machine, Source, Target
    from sparseprune.api.pruning import planned, prepare
    from sparseprune.api.run import Listener, Run
    from sparseprune.checkpoint import lay_out_removal
    from sparseprune.cli.removal_source import removable

    warnings = request.warnings
    run = Run(
        Listener(warning=lambda text: None if warnings.quiet else tell(f"warning: {text}")),
        strict=warnings.strict,
    )
    prepared = prepare(
        Source(request.checkpoint, request.spec, request.overrides),
        Target(request.output, resized=True),
        Machine(request.device, request.jobs, request.memory),
    )
    expected = removable(prepared, warnings)  # type: ignore[arg-type]
    run.warnings += warnings.lines
    removal = expected.removal
    tensors, config = (None, None) if removal is None else (removal.left, removal.config)
    layout = lay_out_removal(prepared.plan.checkpoint, request.output, tensors, config)
    _print(planned(run, prepared, expected, layout), {}, json=request.json)
