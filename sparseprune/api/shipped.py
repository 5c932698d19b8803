"""`specs`: the specs that ship with the package, and those of them that fit a checkpoint.

Binds each to the headers, and looks at what it reaches and what removal would leave; reads no tensor data.
"""

from __future__ import annotations

import tomllib
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

from sparseprune.api.run import collector_paused
from sparseprune.checkpoint import open_checkpoint, read_config
from sparseprune.errors import SpecError
from sparseprune.results.listing import ShippedSpec, SpecCoverage, SpecRemoval
from sparseprune.spec import find_spec, list_specs, parse_spec
from sparseprune.spec.parsing import ALIASES
from sparseprune.spec.schema import KINDS

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from sparseprune.checkpoint import Checkpoint
    from sparseprune.execution.plan import Plan
    from sparseprune.report.coverage import Coverage
    from sparseprune.spec import SpecSource


def shipped(name: str | None, checkpoint: Path | None) -> dict[str, ShippedSpec]:
    """Specs by their names: all of them or one; of those for a checkpoint only the ones that fit it.

    SpecError where the one that is named does not fit, or is not there.
    """
    names = list_specs() if name is None else (ALIASES.get(name, name),)
    sources = {one: find_spec(one) for one in names}
    if checkpoint is None:
        return {one: _described(one, source) for one, source in sources.items()}
    found = {}
    with collector_paused():
        opened = open_checkpoint(checkpoint)
        for one, source in sources.items():
            with suppress(SpecError) if name is None else nullcontext():
                found[one] = _described(one, source, **_looked_at(opened, source))
    return found


def _described(name: str, source: SpecSource, **looked_at: Any) -> ShippedSpec:  # noqa: ANN401
    document = tomllib.loads(source.text)
    tables = [table for kind in KINDS for table in document.get(kind, {}).values()]
    return ShippedSpec(
        name=name,
        summary=summary(source.text),
        aliases=tuple(alias for alias, meant in ALIASES.items() if meant == name),
        structures=tuple(dict.fromkeys(one["structure"] for one in tables if "structure" in one)),
        variables=document.get("vars", {}),
        text=source.text,
        **looked_at,
    )


def summary(text: str) -> str:
    r"""What the first comment of a spec says, on its first line.

    >>> summary("# 2:4.\n# More.\nversion = 1")
    '2:4.'
    """
    comments = (line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    return next(comments, "")


def _looked_at(
    checkpoint: Checkpoint, source: SpecSource
) -> dict[str, float | SpecCoverage | SpecRemoval | None]:
    """What a spec would do to a checkpoint; SpecError where it does not fit. Statistics need not be there."""
    from sparseprune.execution.plan import make_plan
    from sparseprune.report.coverage import coverage_of, coverage_totals

    spec = parse_spec(source.text, source.source, source.directory)
    plan = make_plan(checkpoint, spec, lambda _: False)
    coverage = coverage_of(checkpoint.tensors, plan.bound, read_config(checkpoint))
    return {
        "coverage": coverage.share,
        "reached": SpecCoverage(**coverage_totals(coverage)),
        "removal": _removal(plan, coverage),
    }


def _removal(plan: Plan, coverage: Coverage) -> SpecRemoval:
    from sparseprune.checkpoint.source import read_beside
    from sparseprune.removal.preview import preview

    planned = preview(plan, read_config(plan.checkpoint), read_beside(plan.checkpoint))
    idle = [line for line in coverage.flaws if "prunes nothing" in line]
    reasons = [*planned.reasons.values(), *planned.problems, *idle]
    removal = planned.removal
    return SpecRemoval(
        config=None if removal is None or reasons else removal.changes,
        numel=None if reasons else planned.numel,
        reason=reasons[0] if reasons else None,
    )
