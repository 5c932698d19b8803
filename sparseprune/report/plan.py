"""What `plan` shows: rules, shapes, memory and what removal would leave, as a result and as cards."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sparseprune.engine.grids import Shape, prod
from sparseprune.errors import printable
from sparseprune.report.coverage import coverage_text, coverage_totals
from sparseprune.report.pruning import config_text, share
from sparseprune.report.wording import each_text, many, percent, place_text, shape_text, size
from sparseprune.results.fields import one_or_all
from sparseprune.results.pruning import (
    Plan,
    PlannedBytes,
    PlannedRemoval,
    PlanTotals,
    ReconstructAsked,
    Resized,
    RulePlan,
    RuleRemoval,
    ScoreAsked,
    TensorForm,
    UnreachedTensor,
    ViewAsked,
)
from sparseprune.spec import BoundBlock, BoundBlockCoupling, BoundScope, Score

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    from sparseprune.checkpoint import OutputLayout, StoredTensor
    from sparseprune.engine.grids import Shape
    from sparseprune.removal.preview import Preview
    from sparseprune.report.coverage import Coverage
    from sparseprune.spec import BoundInstance, BoundRule, BoundScopeCoupling, BoundSpec, Reconstruct

    AnyScope = BoundScope | BoundScopeCoupling

_SHAPES = 4  # that a card has room for


def rule_removal(rule: BoundRule, tensors: Mapping[str, StoredTensor], planned: Preview) -> RuleRemoval:
    """Of one rule: whether its blocks can be cut out, or why not, and what its tensors become."""
    reason = planned.reasons.get(rule.name)
    becomes = None
    if reason is None and planned.shapes is not None:
        becomes = tuple(_becomes(rule, tensors, planned.shapes))
    return RuleRemoval(removable=reason is None, reason=reason, becomes=becomes)


def planned_removal(planned: Preview) -> PlannedRemoval:
    """Of the whole checkpoint; None if only the data decides, or nothing can be removed."""
    removal = planned.removal
    return PlannedRemoval(
        problems=tuple(planned.problems),
        config=None if removal is None else removal.changes,
        numel=planned.numel,
        bytes=planned.nbytes,
    )


def _becomes(
    rule: BoundRule, tensors: Mapping[str, StoredTensor], shapes: Mapping[str, Shape | None]
) -> Iterator[Resized]:
    """The tensors that get one new shape, with an example."""
    alike: dict[tuple[Shape, Shape | None], list[str]] = {}
    reached = dict.fromkeys(leaf.tensor for instance in rule.instances for leaf in instance.scope.leaves)
    for name in reached:
        before = tensors[name].shape
        alike.setdefault((before, shapes.get(name, before)), []).append(name)
    for (before, after), names in alike.items():
        yield Resized(tensors=len(names), example=names[0], shape=before, shape_after=after)


def removal_text(found: RuleRemoval) -> str:
    """The line of a rule's card."""
    if not found.removable:
        return f"nothing: {found.reason}"
    if found.becomes is None:
        return "whole slices, as many as the data tells"
    texts = list(dict.fromkeys(_changed(one) for one in found.becomes if one.shape_after != one.shape))
    more = [f"and {many(len(texts) - _SHAPES, 'more shape')}"] if len(texts) > _SHAPES else []
    return ", ".join([*texts[:_SHAPES], *more]) or "nothing: all blocks survive"


def _changed(one: Resized) -> str:
    if one.shape_after is None:
        return f"{many(one.tensors, 'tensor')} of {shape_text(one.shape)} whole"
    return f"{shape_text(one.shape)} becomes {shape_text(one.shape_after)}"


def totals_facts(plan: Plan) -> Iterator[tuple[str, str]]:
    """The lines of the card of totals: what prevents a removal, or what it would leave."""
    removal, numel = plan.removal, plan.totals.numel
    for problem in removal.problems:
        yield "removal", f"cannot be: {problem}"
    if removal.config is not None and removal.numel is not None and removal.bytes is not None:
        changes = ", ".join(map(config_text, removal.config))
        fewer = percent((numel - removal.numel) / max(1, numel))
        left = f"{removal.numel:,} parameters ({fewer} fewer) in {size(removal.bytes)}"
        yield "removal", left + (f": {changes}" if changes else "")


UNREACHED = 5


@dataclass(frozen=True, slots=True)
class Asked:
    """What a plan is for, as the user named it: the checkpoint, the spec, and where the result goes."""

    input: str
    spec: str
    output: str
    coverage: Coverage
    warnings: Sequence[str] = ()


def make_plan_result(
    asked: Asked, bound: BoundSpec, layout: OutputLayout, removal: Preview, peak_bytes: int | None = None
) -> Plan:
    """The result of `plan`.

    `layout` is that of the output, `removal` what `remove` would leave; `peak_bytes` is the memory that a run
    is expected to need at most, None if unknown.
    """
    tensors = layout.checkpoint.tensors
    numel, covered = asked.coverage.numel, asked.coverage.reached
    reached = set(bound.covered)
    return Plan(
        input=asked.input,
        spec=asked.spec,
        output=asked.output,
        output_exists=layout.target.exists(),
        warnings=tuple(asked.warnings),
        totals=PlanTotals(
            tensors=len(tensors),
            numel=numel,
            reached=len(reached),
            covered=covered,
            coverage=share(covered, numel),
            **coverage_totals(asked.coverage),
        ),
        rules=tuple(_rule_plan(rule, tensors, rule_removal(rule, tensors, removal)) for rule in bound.rules),
        removal=planned_removal(removal),
        unreached=_unreached(tensors, reached),
        bytes=PlannedBytes(
            input=layout.input_bytes,
            masks=sum([place.nbytes for place in layout.masks.values()]),
            output=layout.output_bytes,
            peak=peak_bytes,
        ),
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


def scoped_leaves(scope: AnyScope) -> Iterator[tuple[BoundScope, BoundBlock]]:
    """Every block grid over one tensor, with the scope that it is a member of, in the engine's order."""
    members = (scope,) if isinstance(scope, BoundScope) else scope.members
    return ((member, leaf) for member in members for leaf in member.leaves)


def _rule_plan(rule: BoundRule, tensors: Mapping[str, StoredTensor], removal: RuleRemoval) -> RulePlan:
    forms = rule.forms()
    of_form = {form: _counts(members[0]) for form, members in forms.items()}
    counts = [of_form[instance.form] for instance in rule.instances]
    first = rule.instances[0] if rule.instances else None
    nnz = [instance.budget.nnz for instance in rule.instances]
    per_scope = [count.per_scope for count in counts]
    pruned = [count.pruned for count in counts if count.pruned is not None]
    names = dict.fromkeys([leaf.tensor for instance in rule.instances for leaf in instance.scope.leaves])
    return RulePlan(
        name=rule.name,
        mode="soft" if first and first.soft else "hard",
        score=_score(first.score if first else Score()),
        reconstruct=_reconstruct(first.reconstruct if first else None),
        instances=len(rule.instances),
        tensors=len(names),
        example=next(iter(names), None),
        instance=first.label if first else None,
        fused=tuple(dict.fromkeys(_fused(first))) if first else (),
        fused_block=_fused_block(first) if first else None,
        competing=len(first.scope.members) if first and not isinstance(first.scope, BoundScope) else 1,
        scopes=sum([count.scopes for count in counts]),
        blocks_per_scope=one_or_all(per_scope),
        nnz=one_or_all(nnz),
        threshold=one_or_all([instance.budget.threshold for instance in rule.instances]),
        sparsity_asked=one_or_all([instance.sparsity for instance in rule.instances]),
        sparsity=one_or_all([_sparsity(*pair) for pair in zip(nnz, per_scope, strict=True)]),
        blocks=sum([count.scopes * count.per_scope for count in counts]),
        numel=sum([count.numel for count in counts]),
        pruned=sum(pruned) if len(pruned) == len(counts) else None,
        forms=_forms(forms.values(), tensors),
        removal=removal,
    )


@dataclass(frozen=True, slots=True)
class _Counts:
    """Of one instance; `pruned` elements are None where only the data tells: thresholds, unlike blocks."""

    scopes: int
    per_scope: int
    numel: int
    pruned: int | None


def _counts(instance: BoundInstance) -> _Counts:
    scope, nnz = instance.scope, instance.budget.nnz
    scopes, per_scope = prod(scope.grid_shape), scope.blocks_per_scope
    members = (scope,) if isinstance(scope, BoundScope) else scope.members
    numel = sum([prod(leaf.view_shape) for leaf in scope.leaves])
    sizes = {member.block.numel_per_block for member in members}
    pruned = None
    if nnz is not None and instance.soft is None and len(sizes) == 1:
        pruned = scopes * (per_scope - nnz) * sizes.pop()
    return _Counts(scopes, per_scope, numel, pruned)


def _score(score: Score) -> ScoreAsked:
    return ScoreAsked(
        kind=score.kind,
        norm=score.norm if math.isfinite(score.norm) else "inf",
        normalize=score.normalize,
        file=None if score.file is None else str(score.file),
    )


def _reconstruct(reconstruct: Reconstruct | None) -> ReconstructAsked | None:
    if reconstruct is None:
        return None
    return ReconstructAsked(method=reconstruct.method, file=str(reconstruct.file), damp=reconstruct.damp)


def _sparsity(nnz: int | None, blocks: int) -> float | None:
    """The share of a scope's blocks that goes: what `sparsity` became as a whole number of blocks."""
    return None if nnz is None else share(blocks - nnz, blocks)


def _fused(instance: BoundInstance) -> Iterator[str]:
    """The names of the blocks that are fused; nothing where blocks stand for themselves."""
    for member, leaf in scoped_leaves(instance.scope):
        if isinstance(member.block, BoundBlockCoupling):
            yield block_name(leaf)


def _fused_block(instance: BoundInstance) -> str | None:
    """The label of the first fused block, under which a file of block scores has its tensor."""
    members = (member.block for member, _ in scoped_leaves(instance.scope))
    return next((block.label for block in members if isinstance(block, BoundBlockCoupling)), None)


def _forms(
    forms: Iterable[Sequence[BoundInstance]], tensors: Mapping[str, StoredTensor]
) -> tuple[TensorForm, ...]:
    """The tensors of a rule by block and shape: one entry for all tensors that are alike, with an example."""
    alike: dict[tuple[object, ...], tuple[BoundScope, BoundBlock]] = {}
    counts: Counter[tuple[object, ...]] = Counter()
    for instances in forms:
        for member, leaf in scoped_leaves(instances[0].scope):
            shape = tensors[leaf.tensor].entry.shape
            key = (block_name(leaf), shape, leaf.view_shape, leaf.view_stride, leaf.shape, member.shape)
            alike.setdefault(key, (member, leaf))
            counts[key] += len(instances)
    return tuple(_form(*first, tensors, counts[key]) for key, first in alike.items())


def _form(
    member: BoundScope, leaf: BoundBlock, tensors: Mapping[str, StoredTensor], count: int
) -> TensorForm:
    stored = tensors[leaf.tensor]
    begin = index_of(leaf.view_offset, stored.shape)
    view = ViewAsked(shape=leaf.view_shape, stride=leaf.view_stride, begin=begin)
    return TensorForm(
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


def index_of(element: int, shape: Shape) -> Shape:
    """The index of an element that is counted in row-major order.

    >>> index_of(7, (2, 4))
    (1, 3)
    """
    index = []
    for extent in reversed(shape):
        index.append(element % extent if extent else 0)
        element = element // extent if extent else 0
    return tuple(reversed(index))


def _unreached(tensors: Mapping[str, StoredTensor], reached: set[str]) -> tuple[UnreachedTensor, ...]:
    """The largest tensors that no rule reaches."""
    left = (stored for name, stored in tensors.items() if name not in reached)
    return tuple(
        UnreachedTensor(
            name=stored.name, dtype=stored.dtype, shape=stored.shape, numel=stored.numel, bytes=stored.nbytes
        )
        for stored in heapq.nlargest(UNREACHED, left, key=lambda stored: stored.numel)
    )


_FORMS = 8  # that are listed of one rule
_INDENT = 2

Facts = list[tuple[str, str]]


def rule_card(rule: RulePlan, numel: int) -> RenderableType:
    """What one rule binds to; `numel` counts the parameters of the whole checkpoint."""
    title = Text(rule.name, "bold")
    if not rule.instances:
        return Group(title, _facts([("binds", "nothing: no tensor matches, and the rule is optional")]))
    forms = _FormLines(rule.forms[:_FORMS], len(rule.forms) - _FORMS)
    facts = [*_binding(rule), *_budget(rule), *_pruning(rule, numel), ("removes", removal_text(rule.removal))]
    return Group(title, _facts(facts), forms)


def totals_card(plan: Plan) -> RenderableType:
    """What rules reach and what not, the sizes of the output, the memory of a run."""
    totals, sizes = plan.totals, plan.bytes
    covers = (
        f"{totals.covered:,} of {totals.numel:,} parameters ({percent(totals.coverage)}) "
        f"in {totals.reached:,} of {many(totals.tensors, 'tensor')}"
    )
    output = f"{size(sizes.output)} in {plan.output}"
    if plan.output_exists:
        output += " (exists: --force replaces it)"
    text = coverage_text(totals)
    facts = [
        ("covers", covers),
        *([] if text is None else [("layers", text)]),
        ("input", size(sizes.input)),
        ("masks", size(sizes.masks) if sizes.masks else "none"),
        ("output", output),
    ]
    if sizes.peak is not None:
        facts.append(("memory", f"about {size(sizes.peak)} at the peak"))
    facts += totals_facts(plan)
    parts: list[RenderableType] = [Text("in all", "bold"), _facts(facts)]
    if plan.unreached:
        parts.append(Padding(_unreached_table(plan.unreached), (0, 0, 0, _INDENT), expand=False))
    return Group(*parts)


def _binding(rule: RulePlan) -> Facts:
    such = f" such as {rule.instance}" if rule.instances > 1 else ""
    facts = [("binds", f"{many(rule.tensors, 'tensor')} in {many(rule.instances, 'instance')}{such}")]
    if rule.fused:
        facts.append(("block", f"{' + '.join(rule.fused)}, fused: {rule.fused_block}"))
    if rule.competing > 1:
        facts.append(("scope", f"{rule.competing:,} scopes compete for one budget"))
    return facts


def _budget(rule: RulePlan) -> Facts:
    """What survives, and how the share that was asked for was rounded."""
    scopes = "the one scope" if rule.scopes == 1 else f"each of {rule.scopes:,} scopes"
    facts: Facts = []
    if rule.nnz is None:
        facts.append(("keeps", f"blocks that score {each_text(rule.threshold)} or more"))
    else:
        kept = f"{each_text(rule.nnz)} of {each_text(rule.blocks_per_scope)} blocks in {scopes}"
        facts += [("keeps", kept), ("sparsity", _rounded(rule))]
    if rule.mode == "soft":
        facts.append(("mode", "soft: what survives shrinks, too"))
    score = rule.score
    if score.kind != "magnitude" or score.norm != 2 or score.normalize:
        facts.append(("score", _score_line(score)))
    if rule.reconstruct is not None:
        how = f"by {rule.reconstruct.method}, with the second moments in {rule.reconstruct.file}"
        facts.append(("rebuilds", how))
    return facts


def _rounded(rule: RulePlan) -> str:
    asked, became = rule.sparsity_asked, rule.sparsity
    if asked is None or asked == became:
        return each_text(became, percent)
    return f"{each_text(became, percent)}, asked {each_text(asked, percent)}: whole blocks"


def _score_line(score: ScoreAsked) -> str:
    words = [score.kind]
    if score.norm != 2:
        words.append(f"norm {score.norm}")
    if score.normalize:
        words.append("root mean square of a block")
    if score.file is not None:
        words.append(f"from {score.file}")
    return ", ".join(words)


def _pruning(rule: RulePlan, numel: int) -> Facts:
    reached = f"{rule.numel:,} elements"
    if rule.pruned is None:
        return [("reaches", f"{reached}, {share_text(rule.numel, numel)} of all parameters")]
    pruned = f"{rule.pruned:,} of {reached}, {share_text(rule.pruned, numel)} of all parameters"
    return [("prunes", pruned)]


def _facts(facts: Facts) -> RenderableType:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(min_width=8, no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for fact in facts:
        table.add_row(*[Text(printable(text)) for text in fact])
    return Padding(table, (0, 0, 0, _INDENT), expand=False)


def _unreached_table(tensors: Sequence[UnreachedTensor]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("largest left alone", overflow="fold")
    table.add_column("shape", no_wrap=True)
    for title in ("parameters", "bytes"):
        table.add_column(title, justify="right", no_wrap=True)
    for tensor in tensors:
        name = Text(printable(tensor.name))
        table.add_row(name, shape_text(tensor.shape), f"{tensor.numel:,}", size(tensor.bytes))
    return table


@dataclass(frozen=True, slots=True)
class _FormLines:
    """The forms of a rule, one line each; example names stand below their lines where they do not fit."""

    forms: Sequence[TensorForm]
    more: int

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        header, *rows = self._rows()
        widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
        names = [printable(form.example) for form in self.forms]
        wide = _INDENT + sum(widths) + 2 * len(widths)
        beside = wide + max(map(len, names)) <= options.max_width
        yield _folded(_line(header, widths) + ("  example" if beside else ""), "bold")
        for row, name in zip(rows, names, strict=True):
            line = _line(row, widths)
            yield _folded(f"{line}  {name}" if beside else line)
            if not beside:
                yield _folded(name, "dim", _INDENT + widths[0] + 2)
        if self.more > 0:
            yield _folded(f"and {many(self.more, 'more shape')}: --json lists all")

    def _rows(self) -> Iterator[list[str]]:
        """Cells as text; a column that says nothing is left out."""
        members = len({form.block_name for form in self.forms}) > 1
        views = any(form.view is not None for form in self.forms)
        used = [True, members, True, views, True, True, True]

        def some(cells: Sequence[str]) -> list[str]:
            return [cell for cell, use in zip(cells, used, strict=True) if use]

        yield some(["tensors", "member", "shape", "view", "block", "grid", "scope"])
        for form in self.forms:
            shapes = map(shape_text, (form.block, form.grid, form.scope))
            view = _view_text(form.view)
            yield some([f"{form.tensors:,}", form.block_name, shape_text(form.shape), view, *shapes])


def _folded(text: str, style: str = "", indent: int = _INDENT) -> RenderableType:
    return Padding(Text(text, style, overflow="fold"), (0, 0, 0, indent), expand=False)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Cells side by side, the first one, a number, to the right."""
    first, *others = zip(cells, widths, strict=True)
    return "  ".join([first[0].rjust(first[1]), *(cell.ljust(width) for cell, width in others)])


def _view_text(view: ViewAsked | None) -> str:
    if view is None:
        return "whole"
    return shape_text(view.shape) + (f" at {place_text(view.begin)}" if any(view.begin) else "")


def share_text(part: int, whole: int) -> str:
    """The share of a part; of nothing it is none.

    >>> share_text(1, 4), share_text(0, 0)
    ('25.00%', '0.00%')
    """
    return percent(share(part, whole))
