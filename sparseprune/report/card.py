"""The model card of an output: what was done to which model, above the card that the input has.

Owns the text in Markdown and where older cards go in it. Reads and writes no file, tells no time and no place
on the machine: the same run has the same card. Called by api, which hands the text to the output.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from sparseprune import __version__
from sparseprune.errors import printable
from sparseprune.report.coverage import coverage_text
from sparseprune.report.front_matter import CardMetadata, split_card, with_metadata
from sparseprune.report.pruning import errors_text, target_text
from sparseprune.report.tables import budget_text
from sparseprune.report.wording import many, percent, size, some_of
from sparseprune.results.pruning import Removal, Report

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sparseprune.results.checking import Reapplication
    from sparseprune.results.pruning import RuleResult

_BEGIN = "<!-- sparseprune: what was done -->"
_END = "<!-- sparseprune: end -->"
_BACKTICKS = re.compile(r"`+")
_MOST_RULES = 50
_DONE = {"apply": "pruned", "remove": "made smaller", "reapply": "with its zeros put back"}


class Deed(Struct, frozen=True):
    """What was done to which model, in words that are the same on every machine.

    `model` is the hub's id of the input or the name of its folder; `base_model` an id that its files have,
    which `is_parent` if it is the input itself. `command` is as it could be typed beside the input. `spec` is
    the text that the output keeps, None where there is none.
    """

    verb: Literal["apply", "remove", "reapply"]
    model: str
    command: str
    spec: str | None = None
    base_model: str | None = None
    is_parent: bool = False
    library_name: str | None = None
    statistics: str | None = None


def card_text(deed: Deed, result: Report | Removal | Reapplication, old: str | None) -> str:
    """The card of an output, above the `old` one of the input, if there is one.

    What an earlier run wrote stays below as it is, the card of the base model last, under a heading.
    """
    front, body = split_card(old or "")
    tags = ("pruning",) if deed.verb == "remove" else ("pruning", "sparse")
    metadata = CardMetadata(deed.base_model, deed.is_parent, deed.library_name, tags)
    above = f"---\n{with_metadata(front, metadata)}---\n"
    section = "\n\n".join([_BEGIN, *_paragraphs(deed, result), _END])
    parts = [f"{above}\n{section}\n"]
    body = body.lstrip("\r\n")
    if body.strip() and not body.startswith(_BEGIN):
        parts.append(f"# The model card of {_code(deed.model)}\n")
    return "\n".join([*parts, *([body] if body.strip() else [])])


def _paragraphs(deed: Deed, result: Report | Removal | Reapplication) -> Iterator[str]:
    yield f"# {_code(deed.model)}, {_DONE[deed.verb]}"
    if isinstance(result, Removal):
        yield from _removed(deed, result)
    elif isinstance(result, Report):
        yield from _pruned(deed, result)
    else:
        yield from _reapplied(deed, result)
    yield "## How it was made"
    yield f"With sparseprune {__version__}:"
    yield _fenced(deed.command, "shell")
    if deed.spec is not None:
        yield f"<details><summary>The spec</summary>\n\n{_fenced(deed.spec.strip(), 'toml')}\n\n</details>"
    if deed.verb != "remove":
        yield "## How to check it"
        yield f"In the folder of this model:\n\n{_fenced('sparseprune verify .', 'shell')}"


def _pruned(deed: Deed, report: Report) -> Iterator[str]:
    totals = report.totals
    share = f"{totals.pruned:,} of {totals.numel:,} parameters ({percent(totals.sparsity)})"
    yield (
        f"{_code(deed.model)} with {share} set to zero. Names, shapes and types of all tensors, and the size "
        "of the files, are as before."
    )
    yield _rules_table(report.rules)
    yield from _list(_facts(deed, report))
    yield (
        "Programs that do not look for zeros load and run this model like the dense one, and as fast; "
        "`sparseprune inspect . --for all` tells which runtimes can use these zeros."
    )


def _removed(deed: Deed, removal: Removal) -> Iterator[str]:
    totals = removal.totals
    fewer = percent(1 - totals.numel_after / totals.numel) if totals.numel else "0%"
    yield (
        f"{_code(deed.model)} with {totals.numel_after:,} of its {totals.numel:,} parameters: {fewer} were "
        f"cut out. It is a dense model of {size(totals.bytes_after)} (before: {size(totals.bytes)}), smaller "
        "and faster in every program that loads the shapes in `config.json`."
    )
    if removal.rules:
        yield _rules_table(removal.rules)
    changed = (f"`config.json`: {_code(one.key)} {one.before} -> {one.after}" for one in removal.config)
    yield from _list([*changed, *_facts(deed, removal)])


def _reapplied(deed: Deed, result: Reapplication) -> Iterator[str]:
    totals = result.totals
    yield (
        f"{_code(deed.model)} with the zeros of masks put back: they drop {totals.pruned:,} of "
        f"{totals.numel:,} parameters ({percent(totals.sparsity)}), of which {totals.lost:,} were not zero "
        "any more."
    )


def _facts(deed: Deed, result: Report | Removal) -> Iterator[str]:
    """What else is known of how weights were chosen and what became of the others."""
    totals = result.totals
    covered = coverage_text(totals)
    if covered is not None:
        yield f"reached: {covered}"
    if result.target is not None:
        yield f"target: {target_text(result.target)}"
    if totals.output_error is not None or totals.loss_error is not None:
        yield f"survivors were rebuilt: {errors_text(totals)}"
    if deed.statistics is not None:
        yield f"statistics: {deed.statistics}"
    yield from result.notes
    if result.files_left_out:
        names = some_of([_code(one.path) for one in result.files_left_out], 3)
        yield f"left out, as they hold the dense weights: {names}"


def _rules_table(rules: Sequence[RuleResult]) -> str:
    """What each rule reached and pruned, as a table in Markdown."""
    rows = [
        (
            *(_cell(rule.name), f"{rule.tensors:,}", f"{rule.scopes:,}", _cell(budget_text(rule, "norm"))),
            *(f"{rule.numel:,}", f"{rule.pruned:,}"),
        )
        for rule in rules[:_MOST_RULES]
    ]
    heads = ("rule", "tensors", "scopes", "kept in each", "elements", "pruned")
    lines = [heads, ("---", *["---:"] * 5), *rows]
    more = len(rules) - _MOST_RULES
    table = "\n".join(f"| {' | '.join(row)} |" for row in lines)
    return f"{table}\n\nand {many(more, 'rule')} more" if more > 0 else table


def _list(lines: Iterable[str]) -> Iterator[str]:
    """One list of lines, if there are any."""
    listed = [f"- {printable(line)}" for line in lines]
    if listed:
        yield "\n".join(listed)


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")


def _code(text: str) -> str:
    """A name as code, whatever is in it.

    >>> _code("decoder"), _code("a`b")
    ('`decoder`', '`` a`b ``')
    """
    text = printable(text)
    longest = max(map(len, _BACKTICKS.findall(text)), default=0)
    marks = "`" * (longest + 1)
    return f"{marks} {text} {marks}" if longest else f"{marks}{text}{marks}"


def _fenced(text: str, language: str) -> str:
    """Lines as a block of code, whatever is in them."""
    longest = max(map(len, _BACKTICKS.findall(text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
