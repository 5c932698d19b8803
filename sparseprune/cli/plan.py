"""`plan`, and `--dry-run` of the others: what a spec binds to, told from headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparseprune.checkpoint import lay_out_removal, read_config
from sparseprune.cli.console import on_terminal, print_json, print_table
from sparseprune.cli.gc_pause import collector_paused
from sparseprune.cli.removal_source import removable
from sparseprune.cli.request import prepare, warn
from sparseprune.cli.writing import output_shown
from sparseprune.errors import SparsepruneError
from sparseprune.report.plan import Asked, make_plan_result
from sparseprune.spec.problems import suggestion

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from sparseprune.checkpoint import OutputLayout
    from sparseprune.cli.request import Prepared, Request
    from sparseprune.removal.preview import Preview
    from sparseprune.results import Plan
    from sparseprune.spec import BoundRule, BoundSpec

ALL, NONE = "all", "none"


def run(request: Request, draw: str | None = None) -> None:
    """Plan and print; `draw` names a rule, or is `all` or `none`: by default the first on a terminal."""
    with collector_paused():
        prepared = prepare(request)
        rules = _drawn(prepared.plan.bound, draw)
        _show(request, prepared, prepared.layout, _preview(prepared), rules)


def run_removal(request: Request) -> None:
    """The plan of a removal, whose output is the smaller checkpoint; what cannot be removed is refused."""
    with collector_paused():
        prepared = prepare(request)
        expected = removable(prepared, request.warnings)
        removal = expected.removal
        tensors, config = (None, None) if removal is None else (removal.left, removal.config)
        layout = lay_out_removal(prepared.plan.checkpoint, request.output, tensors, config)
        _show(request, prepared, layout, expected, _drawn(prepared.plan.bound, None))


def _preview(prepared: Prepared) -> Preview:
    from sparseprune.removal.preview import preview

    return preview(prepared.plan, read_config(prepared.plan.checkpoint))


def _show(
    request: Request,
    prepared: Prepared,
    layout: OutputLayout,
    expected: Preview,
    rules: tuple[BoundRule, ...],
) -> None:
    warn(request, prepared)
    document = make_plan_result(
        Asked(
            str(request.checkpoint),
            request.spec,
            output_shown(request, layout),
            prepared.coverage,
            request.warnings.lines,
        ),
        prepared.plan.bound,
        layout,
        expected,
        prepared.schedule.peak_bytes,
    )
    if request.json:
        print_json(document)
    else:
        print_table(*_parts(prepared, document, rules))


def _parts(prepared: Prepared, document: Plan, drawn: tuple[BoundRule, ...]) -> Iterator[RenderableType]:
    """A card for each rule, with its drawing where one is wanted, and the totals."""
    from sparseprune.report.drawings import RuleDrawing
    from sparseprune.report.plan_table import rule_card, totals_card

    tensors = prepared.plan.checkpoint.tensors
    for rule, entry in zip(prepared.plan.bound.rules, document.rules, strict=True):
        yield rule_card(entry, document.totals.numel)
        if rule in drawn and rule.instances:
            leaves = rule.instances[0].scope.leaves
            yield RuleDrawing(rule, {leaf.tensor: tensors[leaf.tensor].shape for leaf in leaves})
    yield totals_card(document)


def _drawn(bound: BoundSpec, draw: str | None) -> tuple[BoundRule, ...]:
    """The rules to draw; SparsepruneError for a name that none has."""
    there = [rule for rule in bound.rules if rule.instances]
    if draw is None:
        return tuple(there[:1]) if on_terminal() else ()
    if draw in {ALL, NONE}:
        return tuple(there) if draw == ALL else ()
    named = tuple(rule for rule in bound.rules if draw in {rule.name, rule.name.partition(".")[2]})
    if named:
        return named
    names = [rule.name for rule in bound.rules]
    raise SparsepruneError(f"--draw {draw}: there is no such rule{suggestion(draw, names)}")
