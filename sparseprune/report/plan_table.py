"""The plan for the terminal: a card for each rule, then coverage and the sizes of the output.

Gives rich renderables that fit any width from 60 columns on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sparseprune.errors import printable
from sparseprune.report.coverage import coverage_text
from sparseprune.report.document import share
from sparseprune.report.plan import removal_text, totals_facts
from sparseprune.report.wording import each_text, many, percent, place_text, shape_text, size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    from sparseprune.results.plan import Plan, RulePlan, ScoreAsked, TensorForm, UnreachedTensor, ViewAsked

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
        facts.append(("score", _score(score)))
    if rule.reconstruct is not None:
        how = f"by {rule.reconstruct.method}, with the second moments in {rule.reconstruct.file}"
        facts.append(("rebuilds", how))
    return facts


def _rounded(rule: RulePlan) -> str:
    asked, became = rule.sparsity_asked, rule.sparsity
    if asked is None or asked == became:
        return each_text(became, percent)
    return f"{each_text(became, percent)}, asked {each_text(asked, percent)}: whole blocks"


def _score(score: ScoreAsked) -> str:
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
