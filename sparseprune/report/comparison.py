"""The result of `compare`, its table and its sheet."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING, TypeVar

from rich.console import Group
from rich.text import Text

from sparseprune.engine.grids import index_of
from sparseprune.engine.kernels.counting import exact_sum
from sparseprune.errors import printable
from sparseprune.execution.compare import MatrixErrors, TensorComparison
from sparseprune.report.tables import Column, Fact, FittedTable, below, filled
from sparseprune.report.wording import (
    LEAST_ENERGY,
    many,
    mean,
    number_text,
    percent,
    place_text,
    shape_text,
    share,
)
from sparseprune.results.fields import NamedTensor
from sparseprune.results.measuring import ComparedTensor, CompareTotals, Comparison, ReshapedTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from rich.console import RenderableType

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.engine.kernels.comparing import Energies
    from sparseprune.execution.compare import Pair, Sides

Tensor = TypeVar("Tensor", ComparedTensor, NamedTensor, ReshapedTensor)
_CHANGES = ("changed", "zeroed", "revived", "altered")
COUNTS = ("zeros_before", "zeros_after", *_CHANGES)
ERRORS = ("output_error", "loss_error")
"""The fields of a tensor that are known by statistics."""
FIELDS = ("numel", "sparsity", *COUNTS, "energy_kept", "relative_error", *ERRORS, "largest_change")
"""The fields of every tensor that are one number each."""


def make_comparison(
    dense: str,
    pruned: str,
    comparisons: Sequence[TensorComparison],
    sides: Sides,
    errors: Mapping[str, MatrixErrors] | None = None,
) -> Comparison:
    """The result of `compare`, its tensors in the order of the checkpoints.

    `errors` are those of the tensors that have statistics of inputs.
    """
    errors = errors or {}
    return Comparison(
        dense=dense,
        pruned=pruned,
        totals=_totals(comparisons, sides, errors.values()),
        tensors=tuple(_compared(one, errors.get(one.name, _UNKNOWN)) for one in comparisons),
        added=tuple(map(_stored, sides.added)),
        removed=tuple(map(_stored, sides.removed)),
        reshaped=tuple(map(_reshaped, sides.reshaped)),
    )


def unmeasured(pairs: Iterable[Pair]) -> list[ComparedTensor]:
    """Tensors of which nothing is known yet, to see whether what is asked has a meaning."""
    found = []
    for pair in pairs:
        one, other = pair.before, pair.after
        unknown = TensorComparison(one.name, one.dtype, other.dtype, one.shape, one.numel, None, None, None)
        found.append(_compared(unknown))
    return found


def sheet_of(found: Comparison) -> tuple[list[str], list[list[object]]]:
    """The titles and rows of a sheet of the tensors that both checkpoints have."""
    rows = [vars(one) | {"shape": "x".join(map(str, one.shape))} for one in found.tensors]
    return [field.name for field in fields(ComparedTensor)], [list(row.values()) for row in rows]


_UNKNOWN = MatrixErrors()


def _compared(one: TensorComparison, errors: MatrixErrors = _UNKNOWN) -> ComparedTensor:
    counts, energies = one.counts, one.energies
    energy_kept = relative_error = None
    if energies is not None:
        energy_kept, relative_error = _shares_of([(one, energies)])
        if not one.differs or energies.before == 0:
            relative_error = None if one.differs else 0.0
    return ComparedTensor(
        name=one.name,
        dtype=one.dtype,
        dtype_after=one.dtype_after,
        shape=one.shape,
        numel=one.numel,
        differs=one.differs,
        sparsity=share(counts.zeros_after, one.numel) if counts else None,
        **{key: _count(one, key) for key in COUNTS},
        first_altered=index_of(counts.first_altered, one.shape) if counts and counts.altered else None,
        energy_kept=energy_kept,
        relative_error=relative_error,
        output_error=errors.outputs,
        loss_error=errors.loss,
        largest_change=_finite(energies.largest) if energies else None,
        largest_change_at=index_of(energies.place, one.shape) if energies and energies.place >= 0 else None,
        holds=one.holds,
    )


def _count(one: TensorComparison, key: str) -> int | None:
    """How many; of elements that cannot be told apart it is known where their bytes are the same."""
    if one.counts is None:
        return 0 if one.differs is False and key in _CHANGES else None
    count: int = getattr(one.counts, key)
    return count


def _shares_of(found: Sequence[tuple[TensorComparison, Energies]]) -> tuple[float | None, float | None]:
    """The share of ||dense||^2 that survivors have, and ||pruned - dense|| / ||dense||, of all these tensors.

    Both are None where they are no finite numbers, or where float64 does not hold the squares. Of nothing
    everything is kept.
    """
    before, kept, change = (
        exact_sum(getattr(energies, key) for _, energies in found) for key in ("before", "kept", "change")
    )
    has_some = any(one.differs and one.counts and one.counts.zeros_before < one.numel for one, _ in found)
    if not math.isfinite(before) or (before < LEAST_ENERGY and has_some):
        return None, None
    if before == 0:
        return 1.0, (0.0 if change == 0 else None)
    return min(kept / before, 1.0), _finite(math.sqrt(change / before))


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _totals(
    comparisons: Sequence[TensorComparison], sides: Sides, errors: Collection[MatrixErrors]
) -> CompareTotals:
    known = [one for one in comparisons if one.counts is not None and one.holds != "beside"]
    counts = {key: sum(getattr(one.counts, key) for one in known) for key in COUNTS}
    numel = sum(one.numel for one in known)
    # Integers would outweigh all weights. Tensors that did not change and are not finite say nothing.
    energy_kept, relative_error = _shares_of(
        [
            (one, one.energies)
            for one in comparisons
            if _counts_as_weights(one)
            and one.energies is not None
            and (one.differs or math.isfinite(one.energies.before))
        ]
    )
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
        output_error=mean(one.outputs for one in errors),
        loss_error=mean(one.loss for one in errors),
        added=len(sides.added),
        removed=len(sides.removed),
        reshaped=len(sides.reshaped),
    )


def _counts_as_weights(one: TensorComparison) -> bool:
    """Whether energies are those of weights: integers may be anything, unless they are codes."""
    if one.holds == "beside":
        return False
    floats = all(dtype.startswith(("F", "BF", "C")) for dtype in (one.dtype, one.dtype_after))
    return floats or one.holds == "codes"


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


def compare_summary(found: Comparison) -> RenderableType:
    """The totals and the notes, without a line for each tensor."""
    totals = found.totals
    lines = [
        f"{many(totals.tensors, 'tensor')} in both, {totals.differing:,} of them differ",
        ", ".join(f"{key} {getattr(totals, key):,}" for key in _CHANGES),
        f"energy kept {percent(totals.energy_kept)}, relative error {percent(totals.relative_error)}",
    ]
    if totals.output_error is not None:
        lines.append(f"output error {percent(totals.output_error)} mean")
    if totals.loss_error is not None:
        lines.append(f"loss error {percent(totals.loss_error)} mean")
    return Group(*map(Text, lines if totals.tensors else ()), *notes(found, all_tensors=False))


def columns_and_rows(found: Comparison, *, all_tensors: bool) -> tuple[list[Column], list[list[str]]]:
    """Every tensor that changed, or all, with the facts that say something anywhere."""
    tensors = [one for one in found.tensors if all_tensors or one.differs is not False]
    return filled(_facts(found), tensors)


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
    bytewise = [one for one in tensors if one.differs and one.changed is None and one.holds != "packed"]
    yield from _named("differ, bytes compared", bytewise, lambda one: one.dtype)
    packed = [one for one in tensors if one.holds == "packed" and one.differs is not False]
    yield from _named("packed, not counted", packed, _dtype)
    unknown = [one for one in tensors if one.differs is None and one.holds != "packed"]
    yield from _named("not compared", unknown, lambda one: f"{one.dtype} and {one.dtype_after}")
    yield from _named(
        "reshaped", found.reshaped, lambda one: f"{shape_text(one.shape)} to {shape_text(one.shape_after)}"
    )
    for what, alone in (("added", found.added), ("removed", found.removed)):
        yield from _named(what, alone, lambda one: f"{one.dtype} {shape_text(one.shape)}")


def _survivors(found: Comparison) -> Iterator[RenderableType]:
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
        alone = bool(found.added or found.removed or found.reshaped)
        yield Text("no tensor that is in both differs" if alone else "nothing differs")


def _facts(found: Comparison) -> Iterator[Fact[ComparedTensor]]:
    totals = found.totals
    unlike = any(one.dtype != one.dtype_after for one in found.tensors)
    never = frozenset({"0"})
    yield Fact(Column("tensor", "left", f"total of {totals.tensors:,}"), lambda one: one.name)
    yield Fact(Column("dtype", "left", spare=2 if unlike else 8), _dtype)
    yield Fact(Column("shape", "left", spare=7), lambda one: shape_text(one.shape))
    yield Fact(Column("changed", footer=f"{totals.changed:,}", spare=5), lambda one: number_text(one.changed))
    zeroed = Column("zeroed", footer=f"{totals.zeroed:,}", spare=4)
    yield Fact(zeroed, lambda one: number_text(one.zeroed), never)
    altered = Column("altered", footer=f"{totals.altered:,}", style="yellow")
    yield Fact(altered, lambda one: number_text(one.altered), never)
    sparsity = Column("sparsity", footer=percent(totals.sparsity), spare=1)
    yield Fact(sparsity, lambda one: percent(one.sparsity))
    energy = Column("energy kept", footer=percent(totals.energy_kept))
    yield Fact(energy, lambda one: percent(one.energy_kept))
    error = Column("relative error", footer=percent(totals.relative_error), spare=3)
    yield Fact(error, lambda one: percent(one.relative_error))
    if totals.output_error is not None:
        outputs = Column("output error", footer=f"{percent(totals.output_error)} mean")
        yield Fact(outputs, lambda one: "" if one.output_error is None else percent(one.output_error))
    if totals.loss_error is not None:
        losses = Column("loss error", footer=f"{percent(totals.loss_error)} mean")
        yield Fact(losses, lambda one: "" if one.loss_error is None else percent(one.loss_error))
    yield Fact(Column("largest change", spare=6), _largest)


def _dtype(one: ComparedTensor) -> str:
    return one.dtype if one.dtype == one.dtype_after else f"{one.dtype} to {one.dtype_after}"


def _largest(one: ComparedTensor) -> str:
    if one.largest_change is not None:
        return f"{one.largest_change:#.4g}"
    return "?" if one.largest_change_at is None else "not finite"


def _named(what: str, tensors: Sequence[Tensor], text: Callable[[Tensor], str]) -> Iterator[RenderableType]:
    if not tensors:
        return
    between = ", in" if ":" in what else ":"
    yield Text(f"{what}{between} {many(len(tensors), 'tensor')}")
    for one in tensors[:_LISTED]:
        yield below(f"{printable(one.name)}: {text(one)}")
    if len(tensors) > _LISTED:
        yield below(f"and {many(len(tensors) - _LISTED, 'more tensor')}: --json lists all")
