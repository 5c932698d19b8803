"""What `inspect` found as plain data: totals, tensors, groups of them, and the sheet that CSV is made of.

Owns the shape of schemas/inspect.schema.json. Measures nothing. Called by the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparseprune import __version__
from sparseprune.report.document import file_entries, share
from sparseprune.report.grouping import grouped, summed
from sparseprune.report.listing import flat
from sparseprune.report.runtimes import verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sparseprune.checkpoint import OtherFile
    from sparseprune.report.facts import Questions, TensorFacts
    from sparseprune.report.grouping import Grouping
    from sparseprune.report.runtimes import Runtime

INSPECT_SCHEMA = "sparseprune.inspect.v2"
NUMBERS = (
    "numel",
    "zeros",
    "sparsity",
    "nonfinite",
    "rows",
    "zero_rows",
    "columns",
    "zero_columns",
)
"""The facts of every tensor that are one number each."""


@dataclass(frozen=True, slots=True)
class Telling:
    """What is told besides the facts.

    `questions` are those whose answers are told: more have to be asked for the sake of the `runtimes`, which
    are asked whether they can use each tensor.
    """

    questions: Questions
    runtimes: tuple[Runtime, ...] = ()
    grouping: Grouping | None = None


def inspect_document(
    path: str, facts: Iterable[TensorFacts], telling: Telling, not_read: Iterable[OtherFile] = ()
) -> dict[str, Any]:
    """The facts as plain data, in the shape of schemas/inspect.schema.json; tensors as they stand.

    `not_read` are files beside the checkpoint that hold its dense weights once more.
    """
    patterns = [str(pattern) for pattern in telling.questions.patterns]
    blocks = [str(block) for block in telling.questions.blocks]
    tensors = [_tensor_entry(one, patterns, blocks, telling.runtimes) for one in facts]
    document: dict[str, Any] = {
        "schema": INSPECT_SCHEMA,
        "sparseprune": __version__,
        "input": path,
        "files_not_read": file_entries(not_read),
        "totals": _totals(tensors, patterns, blocks, telling.runtimes),
    }
    if telling.grouping is not None:
        document["by"] = telling.grouping.by
        document["groups"] = grouped(tensors, telling.grouping, patterns)
    return document | {"tensors": tensors}


def fields_of(questions: Questions) -> tuple[str, ...]:
    """The flat names of the numbers that every tensor of a document has."""
    return (*NUMBERS, *(f"zero_blocks_{block}" for block in questions.blocks))


def sheet_of(document: Mapping[str, Any]) -> tuple[list[str], list[list[object]]]:
    """The titles and rows of a sheet of the groups, or of the tensors where there are none."""
    totals = document["totals"]
    is_grouped = "groups" in document
    explained = "of" if is_grouped else "reason"
    columns = [
        "name",
        *(("tensors", "matrices") if is_grouped else ("dtype", "shape")),
        *NUMBERS[:4],
        "patterns",
        *NUMBERS[4:],
        *(() if is_grouped else ("zero_slices",)),
        *(title for shape in totals["zero_blocks"] for title in _pair(f"zero_blocks_{shape}", "of")),
        *(title for name in totals.get("runtimes", ()) for title in _pair(f"runtimes_{name}", explained)),
    ]
    rows = []
    for entry in document["groups" if is_grouped else "tensors"]:
        cells = flat(entry)
        if not is_grouped:
            cells["shape"] = "x".join(map(str, entry["shape"]))
        rows.append([cells.get(column) for column in columns])
    return columns, rows


def _pair(name: str, explained: str) -> tuple[str, str]:
    return name, f"{name}_{explained}"


def _tensor_entry(
    one: TensorFacts,
    patterns: Sequence[str],
    blocks: Sequence[str],
    runtimes: Sequence[Runtime],
) -> dict[str, Any]:
    counts = one.blocks or {}
    entry: dict[str, Any] = {
        "name": one.name,
        "dtype": one.dtype,
        "shape": list(one.shape),
        "numel": one.numel,
        "zeros": one.zeros,
        "sparsity": None if one.zeros is None else share(one.zeros, one.numel),
        "nonfinite": one.nonfinite,
        "patterns": [pattern for pattern in patterns if pattern in one.patterns],
        "rows": one.rows and one.rows.of,
        "zero_rows": one.rows and one.rows.zero,
        "columns": one.columns and one.columns.of,
        "zero_columns": one.columns and one.columns.zero,
        "zero_slices": None if one.slices is None else [index.zero for index in one.slices],
        "zero_blocks": {
            shape: {"zero": counts[shape].zero, "of": counts[shape].of} for shape in blocks if shape in counts
        },
    }
    if runtimes:
        given = {runtime.name: verdict(runtime, one) for runtime in runtimes}
        entry["runtimes"] = {
            name: {"eligible": found.eligible, "reason": found.reason} for name, found in given.items()
        }
    return entry


def _totals(
    tensors: Sequence[Mapping[str, Any]],
    patterns: Sequence[str],
    blocks: Sequence[str],
    runtimes: Sequence[Runtime],
) -> dict[str, Any]:
    """Sums over all tensors; what cannot be looked at counts as not zero."""
    facts = summed(tensors, patterns)
    zeros = facts["zeros"] or 0
    none = {"zero": 0, "of": 0}
    totals = {
        "tensors": len(tensors),
        "matrices": facts["matrices"],
        "uncounted": sum(one["zeros"] is None for one in tensors),
        "numel": facts["numel"],
        "pruned": zeros,
        "sparsity": share(zeros, facts["numel"]),
        "nonfinite": facts["nonfinite"] or 0,
        "patterns": {
            pattern: sum(pattern in tensor["patterns"] for tensor in tensors) for pattern in patterns
        },
        **{key: facts[key] or 0 for key in ("rows", "zero_rows", "columns", "zero_columns")},
        "zero_blocks": {shape: facts["zero_blocks"].get(shape, none) for shape in blocks},
    }
    if runtimes:
        found = facts.get("runtimes", {})
        dtypes = [one["dtype"] for one in tensors if len(one["shape"]) > 1]
        totals["runtimes"] = {
            one.name: {**found.get(one.name, {"eligible": 0, "of": 0}), "device": one.device_for(dtypes)}
            for one in runtimes
        }
    return totals
