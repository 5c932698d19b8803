"""What `plan` says of removal: which rules can be removed, to what shapes, what config.json would say.

Gives the parts of the plan's document, and the lines that its cards have of them. Called by plan.py and
plan_table.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from sparseprune.report.removal import config_entries, config_text
from sparseprune.report.wording import many, percent, shape_text, size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.engine.grids import Shape
    from sparseprune.report.removal import RemovedParts
    from sparseprune.spec import BoundRule

_SHAPES = 4  # that a card has room for


class RemovalPlan(Protocol):
    """What removing by a spec would come to, as far as shapes and budgets tell."""

    @property
    def reasons(self) -> Mapping[str, str]: ...
    @property
    def shapes(self) -> Mapping[str, Shape | None] | None: ...
    @property
    def removal(self) -> RemovedParts | None: ...
    @property
    def problems(self) -> Sequence[str]: ...
    @property
    def numel(self) -> int | None: ...
    @property
    def nbytes(self) -> int | None: ...


def removal_entry(
    rule: BoundRule, tensors: Mapping[str, StoredTensor], planned: RemovalPlan
) -> dict[str, Any]:
    """Of one rule: whether its blocks can be cut out, or why not, and what its tensors become."""
    reason = planned.reasons.get(rule.name)
    becomes = None
    if reason is None and planned.shapes is not None:
        becomes = list(_becomes(rule, tensors, planned.shapes))
    return {"removable": reason is None, "reason": reason, "becomes": becomes}


def removal_totals(planned: RemovalPlan) -> dict[str, Any]:
    """Of the whole checkpoint; null is what only the data tells, or what cannot be."""
    removal = planned.removal
    return {
        "problems": list(planned.problems),
        "config": None if removal is None else config_entries(removal.changes),
        "numel": planned.numel,
        "bytes": planned.nbytes,
    }


def _becomes(
    rule: BoundRule, tensors: Mapping[str, StoredTensor], shapes: Mapping[str, Shape | None]
) -> Iterator[dict[str, Any]]:
    """The tensors that become alike, with an example."""
    alike: dict[tuple[Shape, Shape | None], list[str]] = {}
    reached = dict.fromkeys(leaf.tensor for instance in rule.instances for leaf in instance.scope.leaves)
    for name in reached:
        before = tensors[name].shape
        alike.setdefault((before, shapes.get(name, before)), []).append(name)
    for (before, after), names in alike.items():
        yield {
            "tensors": len(names),
            "example": names[0],
            "shape": list(before),
            "shape_after": None if after is None else list(after),
        }


def removal_text(rule: Mapping[str, Any]) -> str:
    """The line of a rule's card."""
    entry = rule["removal"]
    if not entry["removable"]:
        return f"nothing: {entry['reason']}"
    if entry["becomes"] is None:
        return "whole slices, as many as the data tells"
    texts = list(
        dict.fromkeys(_changed(one) for one in entry["becomes"] if one["shape_after"] != one["shape"])
    )
    more = [f"and {many(len(texts) - _SHAPES, 'more shape')}"] if len(texts) > _SHAPES else []
    return ", ".join([*texts[:_SHAPES], *more]) or "nothing: all blocks survive"


def _changed(one: Mapping[str, Any]) -> str:
    if one["shape_after"] is None:
        return f"{many(one['tensors'], 'tensor')} of {shape_text(one['shape'])} whole"
    return f"{shape_text(one['shape'])} becomes {shape_text(one['shape_after'])}"


def totals_facts(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The lines of the card of totals: what is in the way, or what would be left."""
    removal, numel = document["removal"], document["totals"]["numel"]
    for problem in removal["problems"]:
        yield "removal", f"cannot be: {problem}"
    if removal["config"] is not None:
        said = ", ".join(config_text(entry) for entry in removal["config"])
        left = (
            f"{removal['numel']:,} parameters ({percent((numel - removal['numel']) / max(1, numel))} fewer)"
        )
        yield "removal", f"{left} in {size(removal['bytes'])}" + (f": {said}" if said else "")
