"""What instances got of the budget that they share, as results, a table and a line.

Called by the reports of what is planned and of what was pruned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparseprune.engine.grids import prod
from sparseprune.errors import printable
from sparseprune.report.wording import each_text, many, percent, share
from sparseprune.results.pruning import AllocateAsked, AllocatedInstance

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sparseprune.report.tables import FittedTable
    from sparseprune.results.pruning import RulePlan, RuleResult
    from sparseprune.spec import BoundInstance, BoundRule


def allocate_asked(rule: BoundRule) -> AllocateAsked | None:
    """How the instances of a rule share a budget; None where they do not."""
    for shared in (instance.allocate for instance in rule.instances):
        return None if shared is None else AllocateAsked(file=str(shared.file), clamp=shared.clamp)
    return None


def allocated_instances(rule: BoundRule) -> tuple[AllocatedInstance, ...] | None:
    """The parts of a common budget, once they are known."""
    found = [part for part in map(_part, rule.instances) if part is not None]
    return tuple(found) if found and len(found) == len(rule.instances) else None


def _part(instance: BoundInstance) -> AllocatedInstance | None:
    shared, nnz, blocks = instance.allocate, instance.budget.nnz, instance.scope.blocks_per_scope
    if shared is None or nnz is None or not shared.decided:
        return None
    return AllocatedInstance(
        instance=instance.label,
        blocks=blocks,
        nnz=nnz,
        numel=sum(prod(leaf.view_shape) for leaf in instance.scope.leaves),
        sparsity_asked=share(blocks - shared.nnz, blocks),
        sparsity=share(blocks - nnz, blocks),
    )


def allocation_table(parts: Sequence[AllocatedInstance]) -> FittedTable:
    """A row for each instance."""
    from sparseprune.report.tables import Column, Fact, FittedTable, filled  # noqa: PLC0415  (with rich)

    facts: list[Fact[AllocatedInstance]] = [
        Fact(Column("instance", "left"), lambda one: printable(one.instance)),
        Fact(Column("elements", spare=2), lambda one: f"{one.numel:,}"),
        Fact(Column("kept in each", spare=1), lambda one: f"{one.nnz:,} of {one.blocks:,}"),
        Fact(Column("asked"), lambda one: percent(one.sparsity_asked)),
        Fact(Column("sparsity"), lambda one: percent(one.sparsity)),
    ]
    return FittedTable(*filled(facts, parts), elsewhere=" or --json")


def allocation_lines(rules: Iterable[RuleResult | RulePlan]) -> Iterator[str]:
    """A line for each rule whose instances share a budget: how far they are apart."""
    for rule in rules:
        if rule.allocation:
            asked = each_text([one.sparsity_asked for one in rule.allocation], percent)
            found = each_text([one.sparsity for one in rule.allocation], percent)
            whom = many(len(rule.allocation), "instance")
            yield f"{rule.name} shares one budget over {whom}: {asked} asked, {found} of each pruned"
