"""What `compare` found as plain data: totals, tensors, what stands on one side alone; and the sheet of CSV.

Owns the shape of schemas/compare.schema.json, and when a share of energy or an error is no number.
Measures nothing. Called by the command line.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sparseprune import __version__
from sparseprune.engine.tally import exact_sum
from sparseprune.report.document import LEAST_ENERGY, mean, share
from sparseprune.report.measuring.comparison import TensorComparison
from sparseprune.report.plan import index_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.engine.kernels.comparing import Energies
    from sparseprune.report.measuring.comparison import Pair, Sides

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
