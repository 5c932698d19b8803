"""`compare`: what became of the tensors of one checkpoint in another."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sparseprune.checkpoint import TensorReader, open_checkpoint, open_statistics, refuse_changed_shards
from sparseprune.cli.console import checked, print_json, print_table, print_text, tell
from sparseprune.cli.gc_pause import collector_paused
from sparseprune.cli.options import Listing
from sparseprune.cli.progress import progress
from sparseprune.errors import CheckpointError, SparsepruneError
from sparseprune.report.requirements import Absent, failures, parse_requirement

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sparseprune.checkpoint import Statistics
    from sparseprune.cli.options import Form
    from sparseprune.report.measuring.comparison import Pair, Sides
    from sparseprune.report.requirements import Requirement
    from sparseprune.results import Comparison
    from sparseprune.results.measuring import ComparedTensor


_OUTPUTS = "output_error"  # the field that needs statistics


@dataclass(frozen=True, slots=True)
class CompareRequest:
    """What was typed; `requirements` are not read yet."""

    dense: Path
    pruned: Path
    jobs: int
    listing: Listing = field(default_factory=Listing)
    requirements: tuple[str, ...] = ()
    plot: Path | None = None
    stats: Path | None = None
    form: Form = "table"
    quiet: bool = False


def run(request: CompareRequest) -> None:
    """Measure, print on stdout, draw; CheckFailedError where a requirement does not hold."""
    if request.plot is not None:
        from sparseprune.report.pictures import check_picture

        check_picture(request.plot)
    sides = _sides(request)
    requirements = _requirements(request, sides)
    statistics = None if request.stats is None else open_statistics(request.stats)
    matrices = _matrices(request, sides, statistics)
    with collector_paused():
        document = _document(request, sides, statistics, matrices)
    measured = frozenset(pair.before.name for pair in matrices)
    with checked(*_failed(requirements, [*document.tensors, *_absent(sides)], measured)):
        if request.plot is not None:
            from sparseprune.report.pictures import plot_comparison

            plot_comparison(document, request.plot)
            if not request.quiet:
                tell(f"wrote {request.plot}")
        _print(request, document)


def _sides(request: CompareRequest) -> Sides:
    """Which of the tensors that were asked for stand where."""
    from sparseprune.report.inspection import selected
    from sparseprune.report.measuring.comparison import sides_of

    dense, pruned = open_checkpoint(request.dense), open_checkpoint(request.pruned)
    names = dict.fromkeys((*dense.tensors, *pruned.tensors))
    listing = request.listing
    return sides_of(dense.tensors, pruned.tensors, selected(names, listing.match, listing.exclude))


def _requirements(request: CompareRequest, sides: Sides) -> list[Requirement]:
    """What has to hold; all that is wrong in it, or in how to sort, is told before anything is read."""
    from sparseprune.report.comparison import FIELDS, unmeasured
    from sparseprune.report.inspection import ordered

    requirements = [parse_requirement(text, FIELDS) for text in request.requirements]
    compared = [one.comparison.field for one in requirements if one.comparison is not None]
    if request.stats is None and _OUTPUTS in (*compared, request.listing.sort):
        raise SparsepruneError(f"{_OUTPUTS} is not known without --stats: give what calibrate wrote")
    if request.listing.sort is not None:
        ordered(unmeasured(sides.pairs[:1]), request.listing.sort, request.listing.reverse)
    if requirements:
        failures(requirements, [*unmeasured(sides.pairs), *_absent(sides)])
    return requirements


def _failed(
    requirements: list[Requirement],
    tensors: Sequence[ComparedTensor | Absent],
    matrices: frozenset[str],
) -> list[str]:
    """What does not hold; output errors are asked of the tensors of which there are statistics."""
    lines = []
    for requirement in requirements:
        of_outputs = requirement.comparison is not None and requirement.comparison.field == _OUTPUTS
        asked = [one for one in tensors if one.name in matrices or isinstance(one, Absent)]
        lines += failures([requirement], asked if of_outputs else tensors)
    return lines


def _absent(sides: Sides) -> list[Absent]:
    """Tensors that fail every requirement: they are gone, or have another shape."""
    from sparseprune.report.wording import shape_text

    gone = [Absent(stored.name, stored.shape, "is not in PRUNED") for stored in sides.removed]
    reshaped = [
        Absent(
            pair.before.name,
            pair.before.shape,
            f"was {shape_text(pair.before.shape)}, is {shape_text(pair.after.shape)} in PRUNED",
        )
        for pair in sides.reshaped
    ]
    return [*gone, *reshaped]


def _matrices(request: CompareRequest, sides: Sides, statistics: Statistics | None) -> tuple[Pair, ...]:
    """What there are second moments of."""
    from sparseprune.report.measuring.outputs import with_statistics

    if statistics is None:
        return ()
    everything = not (request.listing.match or request.listing.exclude)
    if everything and not any(pair.before.name in statistics.of for pair in sides.pairs):
        raise CheckpointError(
            f"{request.stats}: has statistics of none of the tensors of {request.dense}; are they of another "
            "checkpoint?"
        )
    return with_statistics(sides.pairs, statistics)


def _document(
    request: CompareRequest, sides: Sides, statistics: Statistics | None, matrices: tuple[Pair, ...]
) -> Comparison:
    """What is found in the tensors, in the order that was asked for."""
    from sparseprune.report.comparison import make_comparison
    from sparseprune.report.inspection import ordered
    from sparseprune.report.measuring.comparison import compare_checkpoints
    from sparseprune.report.measuring.outputs import output_errors

    nbytes = sum(pair.nbytes for pair in (*sides.pairs, *matrices))
    with TensorReader() as reader, progress("comparing", nbytes, quiet=request.quiet) as advance:
        found = compare_checkpoints(sides.pairs, reader, request.jobs, advance)
        errors = None if statistics is None else output_errors(matrices, statistics, reader, advance)
    read = [one.shard for pair in sides.pairs for one in (pair.before, pair.after)]
    read += [statistics.of[pair.before.name].stored.shard for pair in matrices] if statistics else []
    refuse_changed_shards(read)
    document = make_comparison(str(request.dense), str(request.pruned), found, sides, errors)
    tensors = ordered(document.tensors, request.listing.sort, request.listing.reverse)
    return replace(document, tensors=tensors)


def _print(request: CompareRequest, document: Comparison) -> None:
    """The document in the form that was asked for; whoever names tensors sees all of them in the table."""
    named = bool(request.listing.match)
    if request.form == "json":
        print_json(document)
    elif request.form == "csv":
        from sparseprune.report.comparison import sheet_of
        from sparseprune.report.exporting import csv_text

        print_text(csv_text(*sheet_of(document)))
    elif request.form == "markdown":
        from sparseprune.report.comparison import columns_and_rows
        from sparseprune.report.exporting import markdown_text

        print_text(markdown_text(*columns_and_rows(document, all_tensors=named)))
    else:
        from sparseprune.report.comparison import compare_table

        print_table(compare_table(document, all_tensors=named))
