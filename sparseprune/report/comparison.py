"""The result of `compare`, its table and its sheet."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING, TypeVar

from rich.console import Group
from rich.text import Text

from sparseprune.engine.kernels.counting import exact_sum
from sparseprune.errors import printable
from sparseprune.execution.compare import TensorComparison
from sparseprune.report.plan import index_of
from sparseprune.report.pruning import LEAST_ENERGY, mean, share
from sparseprune.report.tables import Column, Fact, FittedTable, below, told
from sparseprune.report.wording import many, percent, place_text, shape_text
from sparseprune.results.fields import NamedTensor
from sparseprune.results.measuring import ComparedTensor, CompareTotals, Comparison, ReshapedTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from rich.console import RenderableType

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.engine.kernels.comparing import Energies
    from sparseprune.execution.compare import Pair, Sides

Tensor = TypeVar("Tensor", ComparedTensor, NamedTensor, ReshapedTensor)
_CHANGES = ("changed", "zeroed", "revived", "altered")
COUNTS = ("zeros_before", "zeros_after", *_CHANGES)
FIELDS = ("numel", "sparsity", *COUNTS, "energy_kept", "relative_error", "output_error", "largest_change")
"""The fields of every tensor that are one number each."""


def make_comparison(
    dense: str,
    pruned: str,
    comparisons: Sequence[TensorComparison],
    sides: Sides,
    output_errors: Mapping[str, float | None] | None = None,
) -> Comparison:
    """The result of `compare`, its tensors in the order of the checkpoints.

    `output_errors` are those of the tensors that have statistics of inputs.
    """
    errors = output_errors or {}
    return Comparison(
        dense=dense,
        pruned=pruned,
        totals=_totals(comparisons, sides, mean(errors.values())),
        tensors=tuple(_compared(one, errors.get(one.name)) for one in comparisons),
        added=tuple(map(_stored, sides.added)),
        removed=tuple(map(_stored, sides.removed)),
        reshaped=tuple(map(_reshaped, sides.reshaped)),
    )


def unmeasured(pairs: Iterable[Pair]) -> list[ComparedTensor]:
    """Tensors of which nothing is known yet, to see whether what is asked has a meaning."""
    return [
        _compared(
            TensorComparison(
                pair.before.name,
                pair.before.dtype,
                pair.after.dtype,
                pair.before.shape,
                pair.before.numel,
                differs=None,
                counts=None,
                energies=None,
            )
        )
        for pair in pairs
    ]


def sheet_of(found: Comparison) -> tuple[list[str], list[list[object]]]:
    """The titles and rows of a sheet of the tensors that both checkpoints have."""
    columns = [field.name for field in fields(ComparedTensor)]
    rows = [vars(one) | {"shape": "x".join(map(str, one.shape))} for one in found.tensors]
    return columns, [list(row.values()) for row in rows]


def _compared(one: TensorComparison, output_error: float | None = None) -> ComparedTensor:
    counts, energies = one.counts, one.energies
    altered = counts is not None and counts.altered > 0
    placed = energies is not None and energies.place >= 0
    return ComparedTensor(
        name=one.name,
        dtype=one.dtype,
        dtype_after=one.dtype_after,
        shape=one.shape,
        numel=one.numel,
        differs=one.differs,
        sparsity=share(counts.zeros_after, one.numel) if counts else None,
        **{key: _count(one, key) for key in COUNTS},
        first_altered=index_of(counts.first_altered, one.shape) if counts and altered else None,
        energy_kept=_energy_kept(one, energies) if energies else None,
        relative_error=_relative_error(one, energies) if energies else None,
        output_error=output_error,
        largest_change=_finite(energies.largest) if energies else None,
        largest_change_at=index_of(energies.place, one.shape) if energies and placed else None,
    )


def _count(one: TensorComparison, key: str) -> int | None:
    """How many; of elements that cannot be told apart it is known where their bytes are the same."""
    if one.counts is None:
        return 0 if one.differs is False and key in _CHANGES else None
    count: int = getattr(one.counts, key)
    return count


def _energy_kept(one: TensorComparison, energies: Energies) -> float | None:
    """||pruned||^2 / ||dense||^2; 1 where both are nothing, None where it is no finite number."""
    if _vanishes(one, energies) or not math.isfinite(energies.before):
        return None
    if energies.before == 0:
        return 1.0 if energies.after == 0 else None
    return _finite(energies.after / energies.before)


def _relative_error(one: TensorComparison, energies: Energies) -> float | None:
    """||pruned - dense|| / ||dense||; 0 where nothing changed, None where it is no finite number."""
    if not one.differs:
        return 0.0
    if _vanishes(one, energies) or energies.before == 0 or not math.isfinite(energies.before):
        return None
    return _finite(math.sqrt(energies.change / energies.before))


def _vanishes(one: TensorComparison, energies: Energies) -> bool:
    """Whether numbers are so small that float64 does not hold their squares."""
    return bool(one.differs) and _has_some(one) and energies.before < LEAST_ENERGY


def _has_some(one: TensorComparison) -> bool:
    """Whether a number was not zero."""
    return one.counts is not None and one.counts.zeros_before < one.numel


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _totals(
    comparisons: Sequence[TensorComparison], sides: Sides, output_error: float | None
) -> CompareTotals:
    known = [one for one in comparisons if one.counts is not None]
    counts = {key: sum(getattr(one.counts, key) for one in known) for key in COUNTS}
    numel = sum(one.numel for one in known)
    energy_kept, relative_error = _total_energies([one for one in comparisons if _is_float(one)])
    return CompareTotals(
        tensors=len(comparisons),
        numel=sum(one.numel for one in comparisons),
        differing=sum(one.differs is True for one in comparisons),
        uncompared=sum(one.differs is None for one in comparisons),
        sparsity_before=share(counts["zeros_before"], numel),
        sparsity=share(counts["zeros_after"], numel),
        **counts,
        energy_kept=energy_kept,
        relative_error=relative_error,
        output_error=output_error,
        added=len(sides.added),
        removed=len(sides.removed),
        reshaped=len(sides.reshaped),
    )


def _total_energies(floats: Iterable[TensorComparison]) -> tuple[float | None, float | None]:
    """The energy kept and the relative error over tensors of floats: integers would outweigh all weights.

    Tensors that did not change and are not finite do not count: they say nothing about those that did.
    """
    counted = [
        (one, one.energies)
        for one in floats
        if one.energies is not None and (one.differs or math.isfinite(one.energies.before))
    ]
    before, after, change = (
        exact_sum(getattr(energies, key) for _, energies in counted) for key in ("before", "after", "change")
    )
    vanishes = before < LEAST_ENERGY and any(one.differs and _has_some(one) for one, _ in counted)
    if not math.isfinite(before) or vanishes:
        return None, None
    if before == 0:
        return (1.0 if after == 0 else None), (0.0 if change == 0 else None)
    return _finite(after / before), _finite(math.sqrt(change / before))


def _is_float(one: TensorComparison) -> bool:
    return all(dtype.startswith(("F", "BF", "C")) for dtype in (one.dtype, one.dtype_after))


def _stored(stored: StoredTensor) -> NamedTensor:
    return NamedTensor(name=stored.name, dtype=stored.dtype, shape=stored.shape, numel=stored.numel)


def _reshaped(pair: Pair) -> ReshapedTensor:
    return ReshapedTensor(
        name=pair.before.name,
        dtype=pair.before.dtype,
        dtype_after=pair.after.dtype,
        shape=pair.before.shape,
        shape_after=pair.after.shape,
        numel=pair.before.numel,
        numel_after=pair.after.numel,
    )


_LISTED = 6  # tensors that are named below the table for one thing


def compare_table(found: Comparison, *, all_tensors: bool) -> RenderableType:
    """The table and the notes below it."""
    columns, rows = columns_and_rows(found, all_tensors=all_tensors)
    table = [FittedTable(columns, rows)] if rows else []
    return Group(*table, *notes(found, all_tensors=all_tensors))


def columns_and_rows(found: Comparison, *, all_tensors: bool) -> tuple[list[Column], list[list[str]]]:
    """Every tensor that changed, or all, with the facts that say something anywhere."""
    tensors = [one for one in found.tensors if all_tensors or one.differs is not False]
    return told(_facts(found), tensors)


def notes(found: Comparison, *, all_tensors: bool) -> Iterator[RenderableType]:
    """What did not change, and facts of the checkpoints as a whole."""
    totals, tensors = found.totals, found.tensors
    same = [one for one in tensors if one.differs is False]
    if same and not all_tensors:
        numel = sum(one.numel for one in same)
        yield Text(f"unchanged: {many(len(same), 'tensor')}, {many(numel, 'element')}", "dim")
    if tensors:
        yield Text(f"sparsity: {percent(totals.sparsity_before)} before, {percent(totals.sparsity)} after")
    else:
        yield Text("nothing to compare: no tensor has its name and shape in both")
    yield from _survivors(found)
    gone = [one for one in tensors if one.largest_change is None and one.largest_change_at is not None]
    yield from _named(
        "NaN or infinity came or went", gone, lambda one: f"first at {place_text(one.largest_change_at)}"
    )
    unlike = [one for one in tensors if one.dtype != one.dtype_after and one.differs is not None]
    yield from _named("other dtype, values compared", unlike, _dtype)
    bytewise = [one for one in tensors if one.differs and one.changed is None]
    yield from _named("differ, bytes compared", bytewise, lambda one: one.dtype)
    unknown = [one for one in tensors if one.differs is None]
    yield from _named("not compared", unknown, lambda one: f"{one.dtype} and {one.dtype_after}")
    yield from _named(
        "reshaped", found.reshaped, lambda one: f"{shape_text(one.shape)} to {shape_text(one.shape_after)}"
    )
    for what, alone in (("added", found.added), ("removed", found.removed)):
        yield from _named(what, alone, lambda one: f"{one.dtype} {shape_text(one.shape)}")


def _survivors(found: Comparison) -> Iterator[RenderableType]:
    """Whether elements that are not zero after kept their values."""
    totals = found.totals
    altered = [one for one in found.tensors if one.altered]
    if altered:
        count = f"survivors altered: {totals.altered:,}"
        if totals.revived:
            count += f", {totals.revived:,} of them zero before"
        yield from _named(count, altered, lambda one: f"first at {place_text(one.first_altered)}")
    elif totals.zeroed:
        yield Text("survivors altered: none")
    elif totals.tensors and not totals.differing and not totals.uncompared:
        yield Text("no tensor differs")


def _facts(found: Comparison) -> list[Fact[ComparedTensor]]:
    totals = found.totals
    unlike = any(one.dtype != one.dtype_after for one in found.tensors)
    kept = Column("energy kept", footer=_share(totals.energy_kept))
    error = Column("relative error", footer=_share(totals.relative_error), spare=3)
    never = frozenset({"0"})
    return [
        Fact(Column("tensor", "left", f"total of {totals.tensors:,}"), lambda one: one.name),
        Fact(Column("dtype", "left", spare=2 if unlike else 8), _dtype),
        Fact(Column("shape", "left", spare=7), lambda one: shape_text(one.shape)),
        Fact(Column("changed", footer=f"{totals.changed:,}", spare=5), lambda one: _number(one.changed)),
        Fact(Column("zeroed", footer=f"{totals.zeroed:,}", spare=4), lambda one: _number(one.zeroed), never),
        Fact(
            Column("altered", footer=f"{totals.altered:,}", style="yellow"),
            lambda one: _number(one.altered),
            never,
        ),
        Fact(Column("sparsity", footer=percent(totals.sparsity), spare=1), lambda one: _share(one.sparsity)),
        Fact(kept, lambda one: _share(one.energy_kept)),
        Fact(error, lambda one: _share(one.relative_error)),
        *_outputs(totals),
        Fact(Column("largest change", spare=6), _largest),
    ]


def _outputs(totals: CompareTotals) -> Iterator[Fact[ComparedTensor]]:
    """The column of output errors, with their mean in its footer; none without statistics."""
    if totals.output_error is not None:
        yield Fact(
            Column("output error", footer=f"{percent(totals.output_error)} mean"),
            lambda one: "" if one.output_error is None else percent(one.output_error),
        )


def _dtype(one: ComparedTensor) -> str:
    return one.dtype if one.dtype == one.dtype_after else f"{one.dtype} to {one.dtype_after}"


def _number(count: int | None) -> str:
    return "?" if count is None else f"{count:,}"


def _share(part: float | None) -> str:
    return "?" if part is None else percent(part)


def _largest(one: ComparedTensor) -> str:
    if one.largest_change is not None:
        return f"{one.largest_change:#.4g}"
    return "?" if one.largest_change_at is None else "not finite"


def _named(what: str, tensors: Sequence[Tensor], text: Callable[[Tensor], str]) -> Iterator[RenderableType]:
    """A line that counts, and one for each of the first tensors."""
    if not tensors:
        return
    between = ", in" if ":" in what else ":"
    yield Text(f"{what}{between} {many(len(tensors), 'tensor')}")
    for one in tensors[:_LISTED]:
        yield below(f"{printable(one.name)}: {text(one)}")
    if len(tensors) > _LISTED:
        yield below(f"and {many(len(tensors) - _LISTED, 'more tensor')}: --json lists all")
