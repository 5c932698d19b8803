"""What `plan` shows: rules, shapes, memory and what removal would leave, as a result and as cards."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from typing import TYPE_CHECKING

from msgspec import Struct
from rich.console import Group
from rich.table import Table
from rich.text import Text

from sparseprune.engine.grids import Shape, index_of, prod
from sparseprune.errors import printable
from sparseprune.execution.inputs import told
from sparseprune.report.allocation import allocate_asked, allocated_instances, allocation_table
from sparseprune.report.coverage import coverage_text, coverage_totals
from sparseprune.report.permuted import planned_text, unmoved_texts
from sparseprune.report.pruning import config_text, target_text
from sparseprune.report.tables import INDENT, Column, Fact, below, filled, indented, plain_table
from sparseprune.report.wording import each_text, many, percent, place_text, shape_text, share, size
from sparseprune.results import pruning as results
from sparseprune.results.fields import one_or_all
from sparseprune.spec import BoundBlock, BoundBlockCoupling, Score

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    from sparseprune.checkpoint import Checkpoint, StoredTensor
    from sparseprune.execution.plan import Rebuilds
    from sparseprune.removal.preview import Preview
    from sparseprune.report.coverage import Coverage
    from sparseprune.spec import (
        BoundInstance,
        BoundRule,
        BoundScope,
        BoundScopeCoupling,
        BoundSpec,
        Reconstruct,
    )

    AnyScope = BoundScope | BoundScopeCoupling
    Tensors = Mapping[str, StoredTensor]

_SHAPES, _FORMS = 4, 8  # that a card has room for
_UNREACHED = 5  # tensors that are named

Facts = list[tuple[str, str]]


def planned_removal(planned: Preview) -> results.PlannedRemoval:
    """Of the whole checkpoint; None if only the data decides, or nothing can be removed."""
    removal = planned.removal
    return results.PlannedRemoval(
        problems=tuple(planned.problems),
        config=None if removal is None else removal.changes,
        numel=planned.numel,
        bytes=planned.nbytes,
        remarks=() if removal is None else removal.remarks,
    )


def _rule_removal(
    names: Iterable[str], rule: BoundRule, tensors: Tensors, planned: Preview
) -> results.RuleRemoval:
    reason, shapes = planned.reasons.get(rule.name), planned.shapes
    if rule.within is not None:
        reason = f"what it drops of what {rule.within} keeps stays as zeros"
    if reason is not None or shapes is None:
        return results.RuleRemoval(removable=reason is None, reason=reason, becomes=None)
    alike: dict[tuple[Shape, Shape | None], list[str]] = {}
    for name in names:
        before = tensors[name].shape
        alike.setdefault((before, shapes.get(name, before)), []).append(name)
    becomes = [
        results.Resized(tensors=len(found), example=found[0], shape=before, shape_after=after)
        for (before, after), found in alike.items()
    ]
    return results.RuleRemoval(removable=True, reason=None, becomes=tuple(becomes))


def _removal_text(found: results.RuleRemoval) -> str:
    if not found.removable:
        return f"nothing: {found.reason}"
    if found.becomes is None:
        return "whole slices, as many as the data tells"
    texts = list(
        dict.fromkeys(
            f"{many(one.tensors, 'tensor')} of {shape_text(one.shape)} whole"
            if one.shape_after is None
            else f"{shape_text(one.shape)} becomes {shape_text(one.shape_after)}"
            for one in found.becomes
            if one.shape_after != one.shape
        )
    )
    more = [f"and {many(len(texts) - _SHAPES, 'more shape')}"] if len(texts) > _SHAPES else []
    return ", ".join([*texts[:_SHAPES], *more]) or "nothing: all blocks survive"


def plan_totals(checkpoint: Checkpoint, bound: BoundSpec, coverage: Coverage) -> results.PlanTotals:
    """Sums over the whole checkpoint."""
    return results.PlanTotals(
        tensors=len(checkpoint.tensors),
        numel=coverage.numel,
        reached=len(set(bound.covered)),
        covered=coverage.reached,
        coverage=share(coverage.reached, coverage.numel),
        **coverage_totals(coverage),
    )


def block_name(leaf: BoundBlock) -> str:
    """The table that a block comes from: its label without the captures.

    >>> block_name(BoundBlock("gate[layer=3]", "w", (8, 6), (6, 1), 0, (1, 6)))
    'gate'
    """
    return leaf.label.partition("[")[0]


def is_whole(leaf: BoundBlock, shape: Shape) -> bool:
    """Whether a view is just the tensor, unit dimensions behind the last one apart.

    >>> is_whole(BoundBlock("b", "b", (8, 1), (1, 1), 0, (1, 1)), (8,))
    True
    """
    rank = len(shape)
    strides = tuple([prod(shape[dim + 1 :]) for dim in range(rank)])
    return (
        leaf.view_offset == 0
        and leaf.view_shape[:rank] == shape
        and leaf.view_stride[:rank] == strides
        and prod(leaf.view_shape[rank:]) == 1
    )


def _scoped_leaves(scope: AnyScope) -> Iterator[tuple[BoundScope, BoundBlock]]:
    """Every block grid over one tensor, with the scope that it is a member of, in the engine's order."""
    return ((member, leaf) for member in scope.members for leaf in member.leaves)


def rule_plan(
    rule: BoundRule, tensors: Tensors, planned: Preview, rebuilds: Rebuilds | None
) -> results.RulePlan:
    """A rule, what it binds to, what it would prune and `remove` cut out, and how survivors are rebuilt."""
    forms = rule.forms()
    of_form = {form: _counts(members[0]) for form, members in forms.items()}
    counts = [of_form[instance.form] for instance in rule.instances]
    budgets = [instance.budget for instance in rule.instances]
    pruned = [count.pruned for count in counts if count.pruned is not None]
    leaves = (leaf for instance in rule.instances for leaf in instance.scope.leaves)
    names = list(dict.fromkeys([leaf.tensor for leaf in leaves]))
    first = rule.instances[0] if rule.instances else None
    scoped = list(_scoped_leaves(first.scope)) if first else []
    fused = [(member.block, leaf) for member, leaf in scoped if isinstance(member.block, BoundBlockCoupling)]
    return results.RulePlan(
        name=rule.name,
        mode="soft" if first and first.soft else "hard",
        score=_score(first.score if first else Score()),
        reconstruct=_reconstruct(first.reconstruct if first else None, rebuilds),
        allocate=allocate_asked(rule),
        instances=len(rule.instances),
        tensors=len(names),
        example=names[0] if names else None,
        instance=first.label if first else None,
        transposable=any(member.transposable for member in first.scope.members) if first else False,
        fused=tuple(dict.fromkeys(block_name(leaf) for _, leaf in fused)),
        fused_block=fused[0][0].label if fused else None,
        competing=len(first.scope.members) if first else 1,
        scopes=sum([count.scopes for count in counts]),
        blocks_per_scope=one_or_all([count.per_scope for count in counts]),
        nnz=one_or_all([budget.nnz for budget in budgets]),
        threshold=one_or_all([budget.threshold for budget in budgets]),
        sparsity_asked=one_or_all([instance.sparsity for instance in rule.instances]),
        sparsity=one_or_all([count.sparsity for count in counts]),
        blocks=sum([count.scopes * count.per_scope for count in counts]),
        numel=sum([count.numel for count in counts]),
        pruned=sum(pruned) if len(pruned) == len(counts) else None,
        forms=_forms(forms.values(), tensors),
        removal=_rule_removal(names, rule, tensors, planned),
        allocation=allocated_instances(rule),
        within=rule.within,
    )


class _Counts(Struct, frozen=True):
    """Of one instance; `pruned` elements are None where only the data tells: thresholds, unlike blocks.

    `sparsity` is the share of a scope's blocks that goes, as it became a whole number of blocks.
    """

    scopes: int
    per_scope: int
    numel: int
    pruned: int | None
    sparsity: float | None


def _counts(instance: BoundInstance) -> _Counts:
    scope, nnz = instance.scope, instance.budget.nnz
    scopes, per_scope = prod(scope.grid_shape), scope.blocks_per_scope
    numel = sum([prod(leaf.view_shape) for leaf in scope.leaves])
    sizes = {member.block.numel_per_block for member in scope.members}
    if nnz is None:
        return _Counts(scopes, per_scope, numel, None, None)
    known = instance.soft is None and len(sizes) == 1
    pruned = scopes * (per_scope - nnz) * sizes.pop() if known else None
    return _Counts(scopes, per_scope, numel, pruned, share(per_scope - nnz, per_scope))


def _score(score: Score) -> results.ScoreAsked:
    return results.ScoreAsked(
        kind=score.kind,
        norm=score.norm if math.isfinite(score.norm) else "inf",
        normalize=score.normalize,
        file=None if score.file is None else str(score.file),
    )


def _reconstruct(
    reconstruct: Reconstruct | None, rebuilds: Rebuilds | None
) -> results.ReconstructAsked | None:
    if reconstruct is None or (rebuilds is None and reconstruct.optional):
        return None
    return results.ReconstructAsked(
        method=reconstruct.method,
        file=told(reconstruct.file),
        damp=reconstruct.damp,
        metric=None if rebuilds is None else rebuilds.metric,
        effort=reconstruct.effort,
        tune=reconstruct.tune,
    )


def _forms(forms: Iterable[Sequence[BoundInstance]], tensors: Tensors) -> tuple[results.TensorForm, ...]:
    """The tensors of a rule by block and shape: one entry for all tensors that are alike, with an example."""
    alike: dict[tuple[object, ...], tuple[BoundScope, BoundBlock]] = {}
    counts: Counter[tuple[object, ...]] = Counter()
    for instances in forms:
        for member, leaf in _scoped_leaves(instances[0].scope):
            shape = tensors[leaf.tensor].entry.shape
            key = (block_name(leaf), shape, leaf.view_shape, leaf.view_stride, leaf.shape, member.shape)
            alike.setdefault(key, (member, leaf))
            counts[key] += len(instances)
    return tuple(_form(*first, tensors[first[1].tensor], counts[key]) for key, first in alike.items())


def _form(member: BoundScope, leaf: BoundBlock, stored: StoredTensor, count: int) -> results.TensorForm:
    begin = index_of(leaf.view_offset, stored.shape)
    view = results.ViewAsked(shape=leaf.view_shape, stride=leaf.view_stride, begin=begin)
    return results.TensorForm(
        block_name=block_name(leaf),
        tensors=count,
        example=leaf.tensor,
        dtype=stored.dtype,
        shape=stored.shape,
        view=None if is_whole(leaf, stored.shape) else view,
        block=leaf.shape,
        grid=leaf.grid_shape,
        scope=member.shape,
    )


def unreached(tensors: Tensors, reached: Collection[str]) -> tuple[results.UnreachedTensor, ...]:
    """The largest tensors that no rule reaches."""
    left = (stored for name, stored in tensors.items() if name not in reached)
    return tuple(
        results.UnreachedTensor(
            name=one.name, dtype=one.dtype, shape=one.shape, numel=one.numel, bytes=one.nbytes
        )
        for one in heapq.nlargest(_UNREACHED, left, key=lambda stored: stored.numel)
    )


def rule_card(rule: results.RulePlan, numel: int) -> RenderableType:
    """What one rule binds to; `numel` counts the parameters of the whole checkpoint."""
    title = Text(rule.name, "bold")
    if not rule.instances:
        return Group(title, _facts([("binds", "nothing: no tensor matches, and the rule is optional")]))
    forms = _FormLines(rule.forms[:_FORMS], len(rule.forms) - _FORMS)
    facts = [*_binding(rule), *_budget(rule), _pruning(rule, numel), ("removes", _removal_text(rule.removal))]
    parts = [] if rule.allocation is None else [Text(), indented(allocation_table(rule.allocation))]
    return Group(title, _facts(facts), forms, *parts)


def totals_card(plan: results.Plan) -> RenderableType:
    """What rules reach and what not, the sizes of the output, the memory of a run."""
    totals, sizes, layers = plan.totals, plan.bytes, coverage_text(plan.totals)
    share = f"{totals.covered:,} of {totals.numel:,} parameters ({percent(totals.coverage)})"
    exists = " (exists: --force replaces it)" if plan.output_exists else ""
    facts = [
        ("covers", f"{share} in {totals.reached:,} of {many(totals.tensors, 'tensor')}"),
        *([] if layers is None else [("layers", layers)]),
        *([] if plan.target is None else [("target", target_text(plan.target))]),
        ("input", size(sizes.input)),
        ("masks", size(sizes.masks) if sizes.masks else "none"),
        ("output", f"{size(sizes.output)} in {plan.output}{exists}"),
        *([] if sizes.peak is None else [("memory", f"about {size(sizes.peak)} at the peak")]),
        *([("permutes", planned_text(plan.permuted))] if plan.permuted else []),
        *[("leaves", text) for text in unmoved_texts(plan.not_permuted)],
        *_removal_facts(plan),
    ]
    parts: list[RenderableType] = [Text("in all", "bold"), _facts(facts)]
    if plan.unreached:
        rows = [
            (printable(one.name), shape_text(one.shape), f"{one.numel:,}", size(one.bytes))
            for one in plan.unreached
        ]
        table = plain_table(("largest left alone",), ("shape", "parameters", "bytes"), rows)
        table.columns[1].justify = "left"
        parts.append(indented(table))
    return Group(*parts)


def _removal_facts(plan: results.Plan) -> Iterator[tuple[str, str]]:
    removal, numel = plan.removal, plan.totals.numel
    for problem in removal.problems:
        yield "removal", f"cannot be: {problem}"
    if removal.config is not None and removal.numel is not None and removal.bytes is not None:
        changes = ", ".join(map(config_text, removal.config))
        fewer = percent((numel - removal.numel) / max(1, numel))
        left = f"{removal.numel:,} parameters ({fewer} fewer) in {size(removal.bytes)}"
        yield "removal", left + (f": {changes}" if changes else "")
    for remark in removal.remarks:
        yield "removal", remark


UNREACHED = 5


def _binding(rule: results.RulePlan) -> Facts:
    such = f" such as {rule.instance}" if rule.instances > 1 else ""
    facts = [("binds", f"{many(rule.tensors, 'tensor')} in {many(rule.instances, 'instance')}{such}")]
    if rule.fused:
        facts.append(("block", f"{' + '.join(rule.fused)}, fused: {rule.fused_block}"))
    if rule.competing > 1:
        facts.append(("scope", f"{rule.competing:,} scopes compete for one budget"))
    if rule.within is not None:
        facts.append(("within", f"{rule.within}: only what that one keeps competes"))
    return facts


def _budget(rule: results.RulePlan) -> Facts:
    """What survives, and how the share that was asked for was rounded."""
    asked, became, score = rule.sparsity_asked, rule.sparsity, rule.score
    facts: Facts = []
    if rule.nnz is None:
        facts.append(("keeps", f"blocks that score {each_text(rule.threshold)} or more"))
    else:
        scopes = "the one scope" if rule.scopes == 1 else f"each of {rule.scopes:,} scopes"
        kept = f"{each_text(rule.nnz)} of {each_text(rule.blocks_per_scope)} blocks in {scopes}"
        kept += ", as many in each row and column: transposable" if rule.transposable else ""
        why = "whole blocks" if rule.allocation is None else "one budget is shared"
        rounded = "" if asked in (None, became) else f", asked {each_text(asked, percent)}: {why}"
        if rule.within is not None:
            kept = f"at most {kept}"
            rounded = "" if asked is None else f" at least, {each_text(asked, percent)} of what is left"
        facts += [("keeps", kept), ("sparsity", each_text(became, percent) + rounded)]
    if rule.mode == "soft":
        facts.append(("mode", "soft: what survives shrinks, too"))
    if score.kind != "magnitude" or score.norm != 2 or score.normalize:
        norm = "" if score.norm == 2 else f", norm {score.norm}"
        mean = ", root mean square of a block" if score.normalize else ""
        facts.append(("score", score.kind + norm + mean + (f", from {score.file}" if score.file else "")))
    if rule.reconstruct is not None:
        facts.append(("rebuilds", _rebuilding_text(rule.reconstruct)))
    if rule.allocate is not None:
        room = f"up to {percent(rule.allocate.clamp)} more or less of each"
        told = "" if rule.allocation else "; --allocation reads the weights and tells how much"
        facts.append(("shares", f"one budget over all instances, {room}, by the loss{told}"))
    return facts


_MINIMIZES = {
    "loss": ", in units of the loss",
    "outputs": ", by the change of outputs",
    "loss and outputs": ", in units of the loss where there are gradients, else by the change of outputs",
}


def _rebuilding_text(asked: results.ReconstructAsked) -> str:
    fast = ", fast" if asked.effort == "fast" else ""
    tuned = f"; then each layer is tuned, {many(asked.tune, 'step')}" if asked.tune else ""
    metric = _MINIMIZES.get(asked.metric or "", "")
    return f"by {asked.method}{fast}, with the second moments in {asked.file}{metric}{tuned}"


def _pruning(rule: results.RulePlan, numel: int) -> tuple[str, str]:
    reached = f"{rule.numel:,} elements"
    if rule.pruned is None:
        return "reaches", f"{reached}, {percent(share(rule.numel, numel))} of all parameters"
    least = "" if rule.within is None else "at least "
    part = percent(share(rule.pruned, numel))
    return "prunes", f"{least}{rule.pruned:,} of {reached}, {part} of all parameters"


def _facts(facts: Facts) -> RenderableType:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(min_width=8, no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for fact in facts:
        table.add_row(*[Text(printable(text)) for text in fact])
    return indented(table)


class _FormLines(Struct, frozen=True):
    """The forms of a rule, one line each; example names stand below their lines where they do not fit."""

    forms: Sequence[results.TensorForm]
    more: int

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        columns, rows = filled(_form_facts(self.forms), self.forms)
        cells = [[column.title for column in columns], *rows]
        widths = [max(map(len, texts)) for texts in zip(*cells, strict=True)]
        names = ["example", *(printable(form.example) for form in self.forms)]
        beside = INDENT + sum(widths) + 2 * len(widths) + max(map(len, names[1:])) <= options.max_width
        for at, (row, name) in enumerate(zip(cells, names, strict=True)):
            # The first cell, a number, stands to the right.
            texts = [row[0].rjust(widths[0]), *map(str.ljust, row[1:], widths[1:])]
            yield below("  ".join([*texts, name] if beside else texts), "" if at else "bold")
            if at and not beside:
                yield below(name, "dim", INDENT + widths[0] + 2)
        if self.more > 0:
            yield below(f"and {many(self.more, 'more shape')}: --json lists all")


def _form_facts(forms: Sequence[results.TensorForm]) -> Iterator[Fact[results.TensorForm]]:
    yield Fact(Column("tensors"), lambda form: f"{form.tensors:,}")
    if len({form.block_name for form in forms}) > 1:
        yield Fact(Column("member"), lambda form: form.block_name)
    yield Fact(Column("shape"), lambda form: shape_text(form.shape))
    yield Fact(Column("view"), lambda form: _view_text(form.view), frozenset({"whole"}))
    yield Fact(Column("block"), lambda form: shape_text(form.block))
    yield Fact(Column("grid"), lambda form: shape_text(form.grid))
    yield Fact(Column("scope"), lambda form: shape_text(form.scope))


def _view_text(view: results.ViewAsked | None) -> str:
    if view is None:
        return "whole"
    return shape_text(view.shape) + (f" at {place_text(view.begin)}" if any(view.begin) else "")
