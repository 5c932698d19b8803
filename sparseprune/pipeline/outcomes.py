"""Outcomes: what became of every tensor, gathered from the pieces in which it was worked.

Owns how pieces add up: counts as they come, energies in one exact sum, so that the order in which pieces
were finished is not seen.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sparseprune.engine.tally import Tally, exact_sum, share_of_output, totals_in_units

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.pipeline.plan import Plan
    from sparseprune.pipeline.programs import Outcome


@dataclass(frozen=True, slots=True)
class Reach:
    """Elements of a tensor that a rule reached, and how many of them its masks drop, zero before or not."""

    numel: int = 0
    pruned: int = 0


@dataclass(frozen=True, slots=True)
class TensorOutcome:
    """What became of one tensor; `reach` has for each rule what it reached and dropped of it.

    Where it was reconstructed, the root of the mean squared change of its outputs relative to the dense ones:
    by its mask alone, and as it is.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    instance: str
    reach: Mapping[str, Reach]
    before: Tally
    after: Tally
    output_error_masked: float | None = None
    output_error: float | None = None


@dataclass(slots=True)
class _Sums:
    reach: dict[str, Reach] = field(default_factory=dict)
    zeros: list[int] = field(default_factory=lambda: [0, 0])
    energies: list[list[float]] = field(default_factory=lambda: [[], []])
    outputs: list[list[float]] = field(default_factory=list)


class Outcomes:
    """Takes in the outcomes of pieces, in any order; not to be called from two threads at one time."""

    def __init__(self) -> None:
        self._of: defaultdict[str, _Sums] = defaultdict(_Sums)

    def add(self, outcome: Outcome) -> None:
        """One piece, as `programs.outcome` gives it; a rule without a name reaches nothing."""
        name, rule, numel, pruned, zeros_before, energy_before, zeros_after, energy_after, *output = outcome
        sums = self._of[name]
        if rule:
            known = sums.reach.get(rule, Reach())
            sums.reach[rule] = Reach(known.numel + numel, known.pruned + pruned)
        sums.zeros[0] += zeros_before
        sums.zeros[1] += zeros_after
        sums.energies[0].append(energy_before)
        sums.energies[1].append(energy_after)
        sums.outputs += output

    def of_plan(self, plan: Plan) -> tuple[TensorOutcome, ...]:
        """Every tensor that the plan reaches, in the order of the checkpoint."""
        labels: defaultdict[str, dict[str, str]] = defaultdict(dict)
        for unit in plan.units:
            for task in unit.tasks:
                for leaf in task.instance.scope.leaves:
                    labels[leaf.tensor][task.instance.label] = task.rule
        return tuple(
            self.of_tensor(plan.checkpoint.tensors[name], labels[name].values(), ", ".join(labels[name]))
            for name in plan.reached
        )

    def of_tensor(self, stored: StoredTensor, rules: Iterable[str], label: str = "") -> TensorOutcome:
        """One tensor that these rules reach, also where nothing was gathered of it."""
        sums = self._of[stored.name]
        before, after = (
            Tally(stored.numel, zeros, exact_sum(energies))
            for zeros, energies in zip(sums.zeros, sums.energies, strict=True)
        )
        reach = {rule: sums.reach.get(rule, Reach()) for rule in dict.fromkeys(rules)}
        errors = _output_errors(sums.outputs)
        return TensorOutcome(stored.name, stored.dtype, stored.shape, label, reach, before, after, *errors)


def _output_errors(outputs: list[list[float]]) -> tuple[float | None, float | None]:
    """sqrt(tr(D H D^T) / tr(W0 H W0^T)) over all pieces, by the mask alone and as it is; None of none."""
    if not outputs:
        return None, None
    masked, now, dense = totals_in_units((energies, int(power)) for *energies, power in outputs)
    return share_of_output(masked, dense), share_of_output(now, dense)
