"""What a command asks of all rules of a spec: to rebuild what survives, by a method and statistics.

Owns which rules can do so, and which keys of a spec are replaced. Knows no checkpoint. Called by commands
that prune.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Literal, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from sparseprune.spec.bound import levels_of
from sparseprune.spec.schema import BudgetTable, ReconstructTable, ScoreTable, Spec, SpecTable, Table

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

AnyTable = TypeVar("AnyTable", bound=Table)
OF_STATISTICS = ("wanda", "obd", "reap")  # kinds of scores that read what calibrate wrote
_OTHERWISE = {"method": "none"}
_METHODS = ("none", "refit", "admm")  # each does less than the next one
Way = tuple[ReconstructTable, str]
"""How a rule is rebuilt, and a line where that is not as it was asked for."""


class Rebuilding(Struct, frozen=True):
    """A method and a file of statistics for every rule; None for what the spec says.

    `usual` is the file for rules that name none, or, where it `stands_in`, one that is not there. Paths are
    absolute. A rule that says method = "none" stays as it is. A rule that says nothing gets "admm" by
    default; then matrices without statistics are masked alone.
    `tune` replaces that of all rules that are rebuilt.
    """

    method: Literal["admm", "refit", "none"] | None = None
    file: Path | None = None
    usual: Path | None = None
    stands_in: bool = False
    tune: int | None = None


def rebuilt(spec: Spec, asked: Rebuilding) -> tuple[Spec, dict[str, str]]:
    """A spec in which every rule that can be is rebuilt as a command asks, and why others are not, by rule.

    It also says of rules that are refitted though admm was asked for why they are.
    """
    if asked.stands_in and asked.file is None:
        spec = _with_usual(spec, asked.usual)
    if asked.method is None and asked.file is None:
        return spec, {}
    spec = replace(spec, score=_with_statistics(spec.score, asked))
    tables, told = dict(spec.tables), {}
    coupled = spec.coupled_scopes()
    outermost = {
        place: table
        for place, table in spec.tables.items()
        if isinstance(table, BudgetTable) and place not in coupled
    }
    ways = {place: _rebuilding(table, spec, asked) for place, table in outermost.items()}
    for place, (own, why) in _alike(ways, spec.nested()).items():
        score = _with_statistics(outermost[place].score, asked)
        tables[place] = _changed(outermost[place], reconstruct=own, score=score)
        if why:
            told[place] = why
    return replace(spec, tables=tables, reconstruct=None), told


def _alike(ways: Mapping[str, Way], nested: Mapping[str, str]) -> dict[str, Way]:
    """The ways of rules by place, with one method for those that are nested, which are rebuilt at once."""
    nests: defaultdict[str, list[str]] = defaultdict(list)
    for place in ways:
        nests[levels_of(place, nested)[0]].append(place)
    found = dict(ways)
    for places in nests.values():
        least = min(places, key=lambda place: _METHODS.index(ways[place][0].method))
        method = ways[least][0].method
        for place in places:
            own, why = ways[place]
            if own.method != method:
                what = "is not rebuilt" if method == "none" else "is refitted"
                why = f"{what}: it is nested with {least}, which {'is not' if method == 'none' else 'is'}"
                own = _changed(own, method=method)
            found[place] = own, why
    return found


def _with_usual(spec: Spec, usual: Path | None) -> Spec:
    """The spec with the usual file where it names one that is not there, or none."""
    tables: dict[str, SpecTable] = {}
    for place, table in spec.tables.items():
        own = table.reconstruct if isinstance(table, BudgetTable) else None
        tables[place] = _changed(table, reconstruct=_found(own, spec, usual)) if own else table
    return replace(spec, tables=tables, reconstruct=_found(spec.reconstruct, spec, usual))


def _found(own: ReconstructTable | None, spec: Spec, usual: Path | None) -> ReconstructTable | None:
    if own is None or usual is None or (own.file is not None and (spec.directory / own.file).exists()):
        return own
    return own if own.method == "none" and own.file is None else _changed(own, file=str(usual))


def _rebuilding(table: BudgetTable, spec: Spec, asked: Rebuilding) -> Way:
    own = table.reconstruct or spec.reconstruct
    if asked.method == "none" or (own is not None and own.method == "none"):
        file = asked.file or (own.file if own else None)  # by which instances may share a budget
        return _changed(own or ReconstructTable({}), **_OTHERWISE, file=file and str(file)), ""
    method: str = asked.method or (own.method if own else "admm")
    file = asked.file or (own.file if own else None) or asked.usual
    score = table.score or spec.score
    if table.mode == "soft" or (score is not None and score.nonfinite == "prune"):
        key = 'mode = "soft"' if table.mode == "soft" else 'a score with nonfinite = "prune"'
        return ReconstructTable(_OTHERWISE), f"is not rebuilt: it has {key}"
    why = ""
    if method == "admm" and (table.threshold is not None or _ranks_otherwise(score)):
        what = "threshold" if table.threshold is not None else "score"
        method, why = "refit", f"is refitted: its {what} says what survives, which admm would"
    given = {} if own is None else vars(own)
    if asked.tune is not None:
        given = {**given, "tune": asked.tune}
    optional = own is None or own.optional
    return ReconstructTable(
        {**given, "method": method, "file": file and str(file), "optional": optional}
    ), why


def _ranks_otherwise(score: ScoreTable | None) -> bool:
    """Whether a score is another one than the norm of blocks, by which admm ranks what it finds."""
    return score is not None and (score.kind, score.norm or 2, score.normalize) != ("magnitude", 2, None)


def _with_statistics(score: ScoreTable | None, asked: Rebuilding) -> ScoreTable | None:
    """A score that reads the statistics which a command names."""
    if score is None or asked.file is None or score.kind not in OF_STATISTICS:
        return score
    return _changed(score, file=str(asked.file))


def _changed(table: AnyTable, **values: object) -> AnyTable:
    """A table with other values of keys."""
    return type(table)({**vars(table), **values})
