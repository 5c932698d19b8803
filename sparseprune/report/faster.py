"""Where the result of `apply` or `remove` runs faster, and where it does not: lines of summaries.

Judges by the rules of runtimes what a spec made of each matrix, without reading it again, and sizes by what
kernels and loaders want of them. Called by api and pruning.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from sparseprune.engine.grids import identity_order, prod
from sparseprune.execution.inspect import TensorFacts
from sparseprune.report.runtimes import RUNTIMES, needed_patterns, verdict
from sparseprune.report.wording import many, some_of
from sparseprune.results.measuring import RuntimeCount
from sparseprune.spec import BoundBlock

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sparseprune.execution.inspect import Pattern
    from sparseprune.execution.passes import TensorOutcome
    from sparseprune.results.fields import ConfigChange
    from sparseprune.results.pruning import Report
    from sparseprune.spec import BoundInstance, BoundSpec

_NAMED = 4  # runtimes in a line
_HEADS = ("num_attention_heads", "num_key_value_heads")
_WIDTHS = ("intermediate_size", "moe_intermediate_size")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_SPLIT, _WIDE = 4, 32  # devices that heads are spread over, values that quantizers scale together


def uses_of(bound: BoundSpec, outcomes: Iterable[TensorOutcome]) -> dict[str, RuntimeCount]:
    """For each runtime that uses zeros, how many of the matrices that rules reached it can run sparse."""
    pairs: dict[str, set[tuple[int, int]]] = {}
    for _, instance in bound.instances():
        for leaf, pair in _patterns(instance):
            pairs.setdefault(leaf.tensor, set()).add(pair)
    forms = Counter(
        (one.dtype, one.shape, frozenset(pairs.get(one.name, ())), one.after.zeros)
        for one in outcomes
        if len(one.shape) > 1
    )
    users = [row for row in RUNTIMES.values() if row.demands]
    wanted = needed_patterns(users)
    eligible: Counter[str] = Counter()
    for (dtype, shape, known, zeros), count in forms.items():
        found = tuple(str(one) for one in wanted if any(_implies(pair, one) for pair in known))
        facts = TensorFacts("", dtype, shape, prod(shape), zeros=zeros, patterns=found)
        eligible.update({row.name: count for row in users if verdict(row, facts).eligible})
    return {row.name: RuntimeCount(eligible=eligible[row.name], of=forms.total()) for row in users}


def faster_line(report: Report) -> str | None:
    """Where zeros make it faster, in a line; None where there are none."""
    uses = report.runtimes or {}
    if not report.totals.pruned or not uses:
        return None
    users = sorted(
        (name for name in uses if uses[name].eligible and RUNTIMES[name].state == "alive"),
        key=lambda name: -uses[name].eligible,
    )
    dense = [name for name, row in RUNTIMES.items() if not row.demands and row.state == "alive"]
    if not users:
        research = [name for name in uses if uses[name].eligible and RUNTIMES[name].state == "research"]
        also = f" (research: {', '.join(research)})" if research else ""
        return f"faster: in no runtime as these zeros lie{also}; zeros run dense in {some_of(dense, _NAMED)}"
    most = uses[users[0]]
    count = "" if most.eligible == most.of else f" ({most.eligible:,} of {many(most.of, 'matrix')})"
    return f"faster: in {some_of(users, _NAMED)}{count}; zeros run dense in {some_of(dense, _NAMED)}"


def smaller_line(changes: Sequence[ConfigChange]) -> str | None:
    """Where smaller shapes make it faster, and which sizes kernels do not like; None where none changed."""
    if not changes:
        return None
    sizes = {one.key.rpartition(".")[2]: one for one in changes if one.after is not None}
    dislikes = [
        f"{key} {one.after}: {why}"
        for key, one in sizes.items()
        if isinstance(one.after, int) and (why := _disliked(key, one.after)) is not None
    ]
    lists = [key for key, one in sizes.items() if isinstance(one.after, list) and _unlike(one.after)]
    if lists:
        dislikes.append(f"{lists[0]} unlike in layers: only classes that read such a list load it")
    also = f"; {'; '.join(dislikes)}" if dislikes else ""
    return f"faster: everywhere that reads sizes from the config{also}"


def _disliked(key: str, size: int) -> str | None:
    if key in _HEADS and size % _SPLIT:
        return f"not divisible by {_SPLIT}, for tensor parallelism"
    if key in _WIDTHS and size % _WIDE:
        return f"not divisible by {_WIDE}, for quantizers"
    if key in _EXPERTS and size % 2:
        return "odd, slower in fused kernels"
    return None


def _unlike(values: Sequence[object]) -> bool:
    return any(isinstance(one, int) and one != values[0] for one in values)


def _patterns(instance: BoundInstance) -> Iterator[tuple[BoundBlock, tuple[int, int]]]:
    """Leaves of single elements in rows of whole tensors, and the N:M that a rule makes of them."""
    nnz = instance.budget.nnz
    if nnz is None or len(instance.scope.members) != 1:
        return
    (member,) = instance.scope.members
    *others, group = member.shape or (1,)  # a tensor may have no dimension
    if member.transposable:  # of each row of its tiles as many survive
        others, nnz = [*others[:-1], 1], nnz // group
    if not others or any(extent != 1 for extent in others):
        return
    block = member.block
    orders = () if isinstance(block, BoundBlock) else block.orders
    if any(order != identity_order(len(order)) for order in orders):
        return
    for leaf in block.leaves:
        if leaf.numel_per_block == 1 and leaf.view_stride[-1] == 1 and leaf.view_shape[-1] % group == 0:
            yield leaf, (nnz, group)


def _implies(pair: tuple[int, int], pattern: Pattern) -> bool:
    """Whether N:M along rows has another N:M as well."""
    kept, group = pair
    return pattern.axis == -1 and (
        (group % pattern.group == 0 and kept <= pattern.kept)
        or (pattern.group % group == 0 and kept * (pattern.group // group) <= pattern.kept)
    )
