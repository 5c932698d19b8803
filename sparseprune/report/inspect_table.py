"""What `inspect` shows in a terminal: a table, or a tree of modules."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace
from rich.console import Group
from rich.text import Text

from sparseprune.errors import printable
from sparseprune.report.inspection import summed
from sparseprune.report.tables import Column, Fact, FittedTable, below, filled
from sparseprune.report.wording import copies_line, many, number_text, percent, shape_text, some_of
from sparseprune.results.measuring import InspectedGroup, MadeBy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    from sparseprune.results.measuring import InspectedTensor, Inspection, InspectTotals, RuntimeTotals

    Row = InspectedTensor | InspectedGroup

_UNCOUNTED = {
    "weights": "not looked at: {}, whose elements are no whole bytes",
    "codes": "not looked at: {}, of whose codes it is not known which stand for zero",
    "packed": "packed, not counted: {}, whose elements hold several codes",
}
_DONE = {"apply": "pruned", "remove": "made smaller", "reapply": "zeros put back"}
_REASONS = 6  # that are listed for one runtime


def inspect_table(found: Inspection) -> RenderableType:
    """Every group or tensor with its facts, the totals, and what runtimes can use."""
    columns, rows = columns_and_rows(found)
    return Group(FittedTable(columns, rows), *notes(found))


def inspect_summary(found: Inspection) -> RenderableType:
    """The totals, and what runtimes can use, without a line for each group or tensor."""
    totals = found.totals
    counts = f"{many(totals.tensors, 'tensor')}, {many(totals.numel, 'element')}"
    if found.groups is not None:
        counts += f", in {many(len(found.groups), str(found.by))}"
    zeros = f"zeros: {totals.pruned:,}, sparsity {percent(totals.sparsity)}"
    return Group(Text(counts), Text(zeros), *notes(found))


def columns_and_rows(found: Inspection) -> tuple[list[Column], list[list[str]]]:
    """The table: names, and the facts that say something anywhere."""
    totals = found.totals
    if found.groups is not None:
        name = Column(str(found.by), "left", f"total of {len(found.groups):,}")
        return filled([Fact(name, _name), *_sizes(totals), *shared_facts(totals)], found.groups)
    own: list[Fact[InspectedTensor]] = [
        Fact(Column("tensor", "left", f"total of {totals.tensors:,}"), _name),
        Fact(Column("dtype", "left", spare=8), lambda one: one.dtype),
        Fact(Column("shape", "left", spare=6), lambda one: shape_text(one.shape)),
    ]
    return filled([*own, *shared_facts(totals)], found.tensors)


def notes(found: Inspection) -> Iterator[RenderableType]:
    """The lines below the table."""
    totals = found.totals
    if found.made_by is not None:
        yield Text(made_text(found.made_by))
    satisfied = ", ".join(
        f"{pattern.replace('@both', ' transposable')} by {many(number, 'tensor')}"
        for pattern, number in totals.patterns.items()
        if number
    )
    yield Text(f"satisfied: {satisfied or 'no pattern by any tensor'}")
    unknown = [one for one in found.tensors if one.zeros is None]
    for holds, why in _UNCOUNTED.items():
        some = [one for one in unknown if one.holds == holds]
        if some:
            dtypes = ", ".join(sorted({one.dtype for one in some}))
            yield Text(why.format(f"{many(len(some), 'tensor')} of {dtypes}"))
    yield from map(Text, copies_line("not looked at", found.files_not_read))
    for name, found_of in (totals.runtimes or {}).items():
        yield from _runtime_notes(name, found_of, found.tensors)


def made_text(made: MadeBy) -> str:
    """Which run of sparseprune made a checkpoint, as a line.

    >>> made_text(MadeBy(version="1.0", command="apply", model="llama", spec="2of4"))
    'pruned by sparseprune 1.0 with 2of4 from llama'
    """
    by = "" if made.spec is None else f" with {printable(made.spec)}"
    of = "" if made.model is None else f" from {printable(made.model)}"
    return f"{_DONE[made.command]} by sparseprune {printable(made.version)}{by}{of}"


def shared_facts(totals: InspectTotals) -> Iterator[Fact[Row]]:
    """The columns that groups, nodes of a tree and tensors have alike, from the zeros on."""
    never = frozenset({"", "0"})
    runtimes = totals.runtimes or {}
    yield Fact(Column("zeros", footer=f"{totals.pruned:,}", spare=7), lambda one: number_text(one.zeros))
    # If runtimes were asked for, they matter most.
    sparsity = Column("sparsity", footer=percent(totals.sparsity), spare=3 if runtimes else 0)
    yield Fact(sparsity, lambda one: "?" if one.sparsity is None else percent(one.sparsity))
    patterns = Column("patterns", "left", spare=4)
    yield Fact(patterns, lambda one: " ".join(one.patterns), never)
    rows = Column("zero rows", footer=f"{totals.zero_rows:,}", spare=5)
    yield Fact(rows, lambda one: number_text(one.zero_rows, ""), never)
    columns = Column("zero columns", footer=f"{totals.zero_columns:,}", spare=5)
    yield Fact(columns, lambda one: number_text(one.zero_columns, ""), never)
    for shape, blocks in totals.zero_blocks.items():
        yield Fact(Column(f"zero {shape}", footer=f"{blocks.zero:,}", spare=9), _blocks(shape), never)
    nonfinite = Column("not finite", footer=f"{totals.nonfinite:,}", style="red")
    yield Fact(nonfinite, lambda one: number_text(one.nonfinite, ""), never)
    for name in runtimes:
        yield Fact(Column(name, spare=1), _runtime(name))


def _name(one: Row) -> str:
    return one.name


def _sizes(totals: InspectTotals) -> tuple[Fact[InspectedGroup], Fact[InspectedGroup]]:
    tensors = Column("tensors", footer=f"{totals.tensors:,}", spare=8)
    elements = Column("elements", footer=f"{totals.numel:,}", spare=6)
    return Fact(tensors, lambda one: f"{one.tensors:,}"), Fact(elements, lambda one: f"{one.numel:,}")


def _blocks(shape: str) -> Callable[[Row], str]:
    return lambda one: f"{one.zero_blocks[shape].zero:,}" if shape in one.zero_blocks else ""


def _runtime(name: str) -> Callable[[Row], str]:
    """Yes or no for a matrix; how many of them for a group."""

    def text(one: Row) -> str:
        if isinstance(one, InspectedGroup):
            of_group = (one.runtimes or {})[name]
            return f"{of_group.eligible:,} of {of_group.of:,}" if of_group.of else "-"
        return "-" if len(one.shape) < 2 else "yes" if (one.runtimes or {})[name].eligible else "no"

    return text


def _runtime_notes(
    name: str, found: RuntimeTotals, tensors: Iterable[InspectedTensor]
) -> Iterator[RenderableType]:
    """How many matrices a runtime can use, and why not the others, the most frequent reason first."""
    yield Text(f"{name}: {found.eligible:,} of {many(found.of, 'matrix')} (needs {found.device})")
    reasons: dict[str, list[str]] = {}
    for one in tensors:
        verdict = (one.runtimes or {})[name]
        if not verdict.eligible and len(one.shape) > 1 and one.holds != "beside":
            reasons.setdefault(verdict.reason or "", []).append(one.name)
    ranked = sorted(reasons.items(), key=lambda item: -len(item[1]))
    for reason, names in ranked[:_REASONS]:
        yield below(f"{printable(some_of(names))}: {reason}")
    if len(ranked) > _REASONS:
        rest = sum(len(names) for _, names in ranked[_REASONS:])
        yield below(f"{many(rest, 'matrix')} more: for other reasons, which --json has")


_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_DEEPEST = 32  # pieces of a name that become branches, the rest stays together
_UNLIKE = {"name", "zero_slices", "zero_blocks"}
_ITSELF = "(itself)"  # a tensor whose name is the beginning of others
_GUIDES = ("├─ ", "└─ ", "│  ", "   ")
_PLAIN_GUIDES = ("|- ", "`- ", "|  ", "   ")


class InspectTree(Struct, frozen=True):
    """The tree of the tensors: branches in the order of their first tensors, with sums.

    Numbered branches that are alike in shapes, zeros and patterns are one (`0..31`), with their sums.
    """

    found: Inspection

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        guides = _PLAIN_GUIDES if options.ascii_only else _GUIDES
        totals = self.found.totals
        lines = list(_lines(_tree(self.found.tensors), guides))
        nodes = [_node(branch, list(totals.patterns)) for _, branch in lines]
        tensors, elements = _sizes(totals)
        facts: list[Fact[_Node]] = [
            Fact(Column("tensor", "left", "total"), _name),
            tensors,
            Fact(Column("shape", "left", spare=6), lambda one: one.shapes),
            elements,
            *shared_facts(totals),
        ]
        columns, rows = filled(facts, nodes)
        stems = [stem for stem, _ in lines]
        yield Group(FittedTable(columns, rows, " or --json", stems), *notes(self.found))


class _Node(InspectedGroup):
    """The tensors of a branch, and their shapes if it is a leaf."""

    shapes: str


class _Branch(Struct, frozen=True):
    """The tensors whose names begin alike: those of its twigs, or the very tensors of this name."""

    label: str
    twigs: tuple[_Branch, ...]
    tensors: tuple[InspectedTensor, ...]
    likeness: int  # equal for branches that are alike in all but their labels


@dataclass(slots=True)
class _Sprout:
    twigs: dict[str, _Sprout] = field(default_factory=dict)
    tensor: InspectedTensor | None = None


def _tree(tensors: Iterable[InspectedTensor]) -> tuple[_Branch, ...]:
    root = _Sprout()
    for tensor in tensors:
        sprout = root
        for piece in tensor.name.split(".", _DEEPEST):
            sprout = sprout.twigs.setdefault(piece, _Sprout())
        sprout.tensor = tensor
    return _grown("", root, defaultdict(count().__next__)).twigs


def _grown(label: str, sprout: _Sprout, likeness: Mapping[object, int]) -> _Branch:
    """Like twigs become one, and a single twig joins what it grows on; `likeness` numbers what is equal."""
    twigs = [_grown(*twig, likeness) for twig in sprout.twigs.items()]
    if sprout.tensor is not None:
        # All but names, and the exact places of zeros.
        facts = [value for key, value in vars(sprout.tensor).items() if key not in _UNLIKE]
        leaf = _Branch(_ITSELF if twigs else label, (), (sprout.tensor,), likeness[repr(facts)])
        if not twigs:
            return leaf
        twigs.insert(0, leaf)
    if len(twigs) == 1 and label:
        (only,) = twigs
        number = likeness[only.label, only.likeness]
        return _Branch(f"{label}.{only.label}", only.twigs, only.tensors, number)
    number = likeness[tuple((twig.label, twig.likeness) for twig in twigs)]
    found = tuple(_alike_as_one(twigs))
    if len(found) == 1 and label:
        return replace(found[0], label=f"{label}.{found[0].label}", likeness=number)
    return _Branch(label, found, tuple(one for twig in found for one in twig.tensors), number)


def _alike_as_one(twigs: Sequence[_Branch]) -> Iterator[_Branch]:
    alike: dict[object, list[_Branch]] = {}
    for twig in twigs:
        number, dot, rest = twig.label.partition(".")
        key: object = (dot + rest, twig.likeness) if _NUMBER.fullmatch(number) else twig.label
        alike.setdefault(key, []).append(twig)
    for found in alike.values():
        yield found[0] if len(found) == 1 else _merged(found, _ranges([one.label for one in found]))


def _merged(branches: Sequence[_Branch], label: str) -> _Branch:
    twigs = zip(*(branch.twigs for branch in branches), strict=True)
    tensors = tuple(one for branch in branches for one in branch.tensors)
    return _Branch(
        label, tuple(_merged(same, same[0].label) for same in twigs), tensors, branches[0].likeness
    )


def _ranges(labels: Sequence[str]) -> str:
    """Numbers, and what stands after all of them, as runs: `0..2, 5.weight`.

    >>> _ranges(["0", "1", "2", "7"]), _ranges(["4.weight", "5.weight"])
    ('0..2,7', '4..5.weight')
    """
    rest = labels[0][len(labels[0].partition(".")[0]) :]
    runs: list[list[int]] = []
    for number in sorted(int(label.partition(".")[0]) for label in labels):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}..{last}" for first, last in runs) + rest


def _lines(branches: Sequence[_Branch], guides: Sequence[str]) -> Iterator[tuple[str, _Branch]]:
    """Every branch with the lines that lead to it; those of the first rank have none."""
    for branch in branches:
        yield "", branch
        yield from _twig_lines(branch, guides, "")


def _twig_lines(branch: _Branch, guides: Sequence[str], stem: str) -> Iterator[tuple[str, _Branch]]:
    fork, last, along, beside = guides
    for at, twig in enumerate(branch.twigs, 1):
        is_last = at == len(branch.twigs)
        yield stem + (last if is_last else fork), twig
        yield from _twig_lines(twig, guides, stem + (beside if is_last else along))


def _node(branch: _Branch, patterns: Sequence[str]) -> _Node:
    shapes = {shape_text(one.shape) for one in branch.tensors} if not branch.twigs else set()
    whole = summed(branch.label, branch.tensors, patterns)
    return _Node(**vars(whole), shapes=" ".join(sorted(shapes)))
