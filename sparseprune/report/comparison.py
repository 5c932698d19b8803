"""What `compare` shows: the document of two checkpoints, and its table."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from sparseprune import __version__
from sparseprune.engine.tally import exact_sum
from sparseprune.errors import printable
from sparseprune.report.document import LEAST_ENERGY, mean, share
from sparseprune.report.measuring.comparison import TensorComparison
from sparseprune.report.plan import index_of
from sparseprune.report.tables import Column, Fact, FittedTable, below, told
from sparseprune.report.wording import many, percent, shape_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from rich.console import RenderableType

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.engine.kernels.comparing import Energies
    from sparseprune.report.measuring.comparison import Pair, Sides

    Entry = Mapping[str, Any]

COMPARE_SCHEMA = "sparseprune.compare.v1"
_CHANGES = ("changed", "zeroed", "revived", "altered")
COUNTS = ("zeros_before", "zeros_after", *_CHANGES)
FIELDS = ("numel", "sparsity", *COUNTS, "energy_kept", "relative_error", "output_error", "largest_change")
"""The facts of every tensor that are one number each."""


def compare_document(
    dense: str,
    pruned: str,
    comparisons: Sequence[TensorComparison],
    sides: Sides,
    output_errors: Mapping[str, float | None] | None = None,
) -> dict[str, Any]:
    """What was found as plain data, in the shape of schemas/compare.schema.json; tensors as they stand.

    `output_errors` are known where there were statistics of inputs.
    """
    errors = output_errors or {}
    return {
        "schema": COMPARE_SCHEMA,
        "sparseprune": __version__,
        "dense": dense,
        "pruned": pruned,
        "totals": _totals(comparisons, sides) | {"output_error": mean(errors.values())},
        "tensors": [_tensor_entry(one, errors.get(one.name)) for one in comparisons],
        "added": [_stored_entry(stored) for stored in sides.added],
        "removed": [_stored_entry(stored) for stored in sides.removed],
        "reshaped": [_reshaped_entry(pair) for pair in sides.reshaped],
    }


def unmeasured(pairs: Iterable[Pair]) -> list[dict[str, Any]]:
    """Entries of tensors of which nothing is known yet, to see whether what is asked has a meaning."""
    return [
        _tensor_entry(
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


def sheet_of(document: Mapping[str, Any]) -> tuple[list[str], list[list[object]]]:
    """The titles and rows of a sheet of the tensors that both checkpoints have."""
    columns = [
        *("name", "dtype", "dtype_after", "shape", "numel", "differs", "sparsity", *COUNTS),
        *("first_altered", "energy_kept", "relative_error", "output_error", "largest_change"),
        "largest_change_at",
    ]
    shaped = [entry | {"shape": "x".join(map(str, entry["shape"]))} for entry in document["tensors"]]
    return columns, [[entry[column] for column in columns] for entry in shaped]


def _tensor_entry(one: TensorComparison, output_error: float | None = None) -> dict[str, Any]:
    counts, energies = one.counts, one.energies
    altered = counts is not None and counts.altered > 0
    placed = energies is not None and energies.place >= 0
    return {
        "name": one.name,
        "dtype": one.dtype,
        "dtype_after": one.dtype_after,
        "shape": list(one.shape),
        "numel": one.numel,
        "differs": one.differs,
        "sparsity": counts and share(counts.zeros_after, one.numel),
        **{key: _count(one, key) for key in COUNTS},
        "first_altered": list(index_of(counts.first_altered, one.shape)) if counts and altered else None,
        "energy_kept": energies and _energy_kept(one, energies),
        "relative_error": energies and _relative_error(one, energies),
        "output_error": output_error,
        "largest_change": _finite(energies.largest) if energies else None,
        "largest_change_at": list(index_of(energies.place, one.shape)) if energies and placed else None,
    }


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


def _totals(comparisons: Sequence[TensorComparison], sides: Sides) -> dict[str, Any]:
    known = [one for one in comparisons if one.counts is not None]
    counts = {key: sum(getattr(one.counts, key) for one in known) for key in COUNTS}
    numel = sum(one.numel for one in known)
    return {
        "tensors": len(comparisons),
        "numel": sum(one.numel for one in comparisons),
        "differing": sum(one.differs is True for one in comparisons),
        "uncompared": sum(one.differs is None for one in comparisons),
        "sparsity_before": share(counts["zeros_before"], numel),
        "sparsity": share(counts["zeros_after"], numel),
        **counts,
        **_total_energies([one for one in comparisons if _is_float(one)]),
        "added": len(sides.added),
        "removed": len(sides.removed),
        "reshaped": len(sides.reshaped),
    }


def _total_energies(floats: Iterable[TensorComparison]) -> dict[str, float | None]:
    """Over tensors of floats alone: positions and other integers would outweigh all weights.

    Of what did not change, that which is not finite is left out: it says nothing about what did.
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
        return {"energy_kept": None, "relative_error": None}
    if before == 0:
        return {
            "energy_kept": 1.0 if after == 0 else None,
            "relative_error": 0.0 if change == 0 else None,
        }
    return {"energy_kept": _finite(after / before), "relative_error": _finite(math.sqrt(change / before))}


def _is_float(one: TensorComparison) -> bool:
    return all(dtype.startswith(("F", "BF", "C")) for dtype in (one.dtype, one.dtype_after))


def _stored_entry(stored: StoredTensor) -> dict[str, Any]:
    return {
        "name": stored.name,
        "dtype": stored.dtype,
        "shape": list(stored.shape),
        "numel": stored.numel,
    }


def _reshaped_entry(pair: Pair) -> dict[str, Any]:
    return {
        "name": pair.before.name,
        "dtype": pair.before.dtype,
        "dtype_after": pair.after.dtype,
        "shape": list(pair.before.shape),
        "shape_after": list(pair.after.shape),
        "numel": pair.before.numel,
        "numel_after": pair.after.numel,
    }


_LISTED = 6  # tensors that are named below the table for one thing


def compare_table(document: Mapping[str, Any], *, all_tensors: bool) -> RenderableType:
    """The table and the notes below it."""
    columns, rows = columns_and_rows(document, all_tensors=all_tensors)
    table = [FittedTable(columns, rows)] if rows else []
    return Group(*table, *notes(document, all_tensors=all_tensors))


def columns_and_rows(
    document: Mapping[str, Any], *, all_tensors: bool
) -> tuple[list[Column], list[list[str]]]:
    """Every tensor that changed, or all, with the facts that say something anywhere."""
    entries = [one for one in document["tensors"] if all_tensors or one["differs"] is not False]
    return told(_facts(document), entries)


def notes(document: Mapping[str, Any], *, all_tensors: bool) -> Iterator[RenderableType]:
    """What did not change, and all that is to be known of the checkpoints as a whole."""
    totals, tensors = document["totals"], document["tensors"]
    same = [one for one in tensors if one["differs"] is False]
    if same and not all_tensors:
        numel = sum(one["numel"] for one in same)
        yield Text(f"unchanged: {many(len(same), 'tensor')}, {many(numel, 'element')}", "dim")
    if tensors:
        before, after = percent(totals["sparsity_before"]), percent(totals["sparsity"])
        yield Text(f"sparsity: {before} before, {after} after")
    else:
        yield Text("nothing to compare: no tensor has its name and shape in both")
    yield from _survivors(document)
    gone = [one for one in tensors if one["largest_change"] is None and one["largest_change_at"] is not None]
    yield from _named(
        "NaN or infinity came or went", gone, lambda one: f"first at {one['largest_change_at']}"
    )
    unlike = [one for one in tensors if one["dtype"] != one["dtype_after"] and one["differs"] is not None]
    yield from _named(
        "other dtype, values compared", unlike, lambda one: f"{one['dtype']} to {one['dtype_after']}"
    )
    bytewise = [one for one in tensors if one["differs"] and one["changed"] is None]
    yield from _named("differ, bytes compared", bytewise, lambda one: str(one["dtype"]))
    unknown = [one for one in tensors if one["differs"] is None]
    yield from _named("not compared", unknown, lambda one: f"{one['dtype']} and {one['dtype_after']}")
    yield from _named(
        "reshaped",
        document["reshaped"],
        lambda one: f"{shape_text(one['shape'])} to {shape_text(one['shape_after'])}",
    )
    for what in ("added", "removed"):
        yield from _named(what, document[what], lambda one: f"{one['dtype']} {shape_text(one['shape'])}")


def _survivors(document: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Whether what is not zero after is what it was before."""
    totals = document["totals"]
    altered = [one for one in document["tensors"] if one["altered"]]
    if altered:
        count = f"survivors altered: {totals['altered']:,}"
        if totals["revived"]:
            count += f", {totals['revived']:,} of them zero before"
        yield from _named(count, altered, lambda one: f"first at {one['first_altered']}")
    elif totals["zeroed"]:
        yield Text("survivors altered: none")
    elif totals["tensors"] and not totals["differing"] and not totals["uncompared"]:
        yield Text("no tensor differs")


def _facts(document: Mapping[str, Any]) -> list[Fact]:
    totals = document["totals"]
    unlike = any(one["dtype"] != one["dtype_after"] for one in document["tensors"])
    kept = Column("energy kept", footer=_share(totals["energy_kept"]))
    error = Column("relative error", footer=_share(totals["relative_error"]), spare=3)
    return [
        Fact(
            Column("tensor", "left", f"total of {totals['tensors']:,}"),
            lambda one: str(one["name"]),
        ),
        Fact(Column("dtype", "left", spare=2 if unlike else 8), _dtype),
        Fact(Column("shape", "left", spare=7), lambda one: shape_text(one["shape"])),
        Fact(Column("changed", footer=f"{totals['changed']:,}", spare=5), _count_cell("changed")),
        Fact(
            Column("zeroed", footer=f"{totals['zeroed']:,}", spare=4), _count_cell("zeroed"), frozenset({"0"})
        ),
        Fact(
            Column("altered", footer=f"{totals['altered']:,}", style="yellow"),
            _count_cell("altered"),
            frozenset({"0"}),
        ),
        Fact(Column("sparsity", footer=percent(totals["sparsity"]), spare=1), _known_share("sparsity")),
        Fact(kept, _known_share("energy_kept")),
        Fact(error, _known_share("relative_error")),
        *_outputs(totals),
        Fact(Column("largest change", spare=6), _largest),
    ]


def _outputs(totals: Mapping[str, Any]) -> Iterator[Fact]:
    """The column of output errors, whose foot is their mean; none without statistics."""
    if totals["output_error"] is not None:
        foot = f"{percent(totals['output_error'])} mean"
        yield Fact(
            Column("output error", footer=foot),
            lambda one: "" if one["output_error"] is None else percent(one["output_error"]),
        )


def _dtype(one: Entry) -> str:
    return (
        str(one["dtype"]) if one["dtype"] == one["dtype_after"] else f"{one['dtype']} to {one['dtype_after']}"
    )


def _count_cell(key: str) -> Callable[[Entry], str]:
    return lambda one: "?" if one[key] is None else f"{one[key]:,}"


def _known_share(key: str) -> Callable[[Entry], str]:
    return lambda one: _share(one[key])


def _share(part: float | None) -> str:
    return "?" if part is None else percent(part)


def _largest(one: Entry) -> str:
    if one["largest_change"] is not None:
        return f"{one['largest_change']:#.4g}"
    return "?" if one["largest_change_at"] is None else "not finite"


def _named(what: str, entries: Sequence[Entry], text: Callable[[Entry], str]) -> Iterator[RenderableType]:
    """A line that counts, and one for each of the first tensors."""
    if not entries:
        return
    between = ", in" if ":" in what else ":"
    yield Text(f"{what}{between} {many(len(entries), 'tensor')}")
    for one in entries[:_LISTED]:
        yield below(f"{printable(one['name'])}: {text(one)}")
    if len(entries) > _LISTED:
        yield below(f"and {many(len(entries) - _LISTED, 'more tensor')}: --json lists all")
