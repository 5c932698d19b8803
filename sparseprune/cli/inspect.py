"""`inspect`: how sparse a checkpoint is, where, in which patterns, and which runtimes can use it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from sparseprune.checkpoint import TensorReader, open_checkpoint, read_config, refuse_changed_shards
from sparseprune.cli.applied import tell_left_behind
from sparseprune.cli.console import checked, print_json, print_table, print_text
from sparseprune.cli.gc_pause import collector_paused
from sparseprune.cli.options import Listing
from sparseprune.cli.progress import progress
from sparseprune.errors import SparsepruneError
from sparseprune.report.inspection import ordered, selected
from sparseprune.report.requirements import check_names, failures, parse_requirement
from sparseprune.spec.problems import shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from sparseprune.checkpoint import Checkpoint
    from sparseprune.cli.options import Form
    from sparseprune.report.inspection import Grouping, Telling
    from sparseprune.report.requirements import Requirement
    from sparseprune.results import Inspection


@dataclass(frozen=True, slots=True)
class InspectRequest:
    """What was typed; `patterns`, `blocks`, `runtimes` and `requirements` are words without a meaning yet."""

    checkpoint: Path
    jobs: int
    by: Literal["tensor", "layer", "module", "rule"] = "tensor"
    tree: bool = False
    listing: Listing = field(default_factory=Listing)
    patterns: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    runtimes: str | None = None
    requirements: tuple[str, ...] = ()
    plot: Path | None = None
    tensor: str | None = None
    spec: str | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    form: Form = "table"
    quiet: bool = False


def run(request: InspectRequest) -> None:
    """Measure, print on stdout, draw; CheckFailedError where a requirement does not hold."""
    _refuse_contradictions(request)
    telling, requirements = _asked(request)
    checkpoint = open_checkpoint(request.checkpoint)
    tell_left_behind(request.checkpoint, quiet=request.quiet)
    if request.tensor is not None:
        from sparseprune.cli.plotting import check_tensor

        check_tensor(checkpoint, request.tensor)
    names = selected(checkpoint.tensors, request.listing.match, request.listing.exclude)
    check_names(requirements, names)
    with collector_paused():
        document = _document(request, checkpoint, names, telling)
    with checked(*failures(requirements, document.tensors)):
        if request.plot is not None:
            from sparseprune.cli.plotting import plot_inspect

            plot_inspect(request, checkpoint, document, request.plot)
        _print(request, document)


def _refuse_contradictions(request: InspectRequest) -> None:
    """All that is wrong in what was typed and can be told before anything is read."""
    if request.tree and request.by != "tensor":
        raise SparsepruneError(f"--tree and --by {request.by} exclude each other; give one of them")
    if request.tree and request.form != "table":
        raise SparsepruneError(f"--tree and --{request.form} exclude each other; give one of them")
    if request.plot is None and request.tensor is not None:
        raise SparsepruneError(
            f"--tensor {shown(request.tensor)}: goes with --plot FILE; to list a tensor alone give --match"
        )
    if request.plot is not None:
        from sparseprune.report.pictures import check_picture

        check_picture(request.plot)
    elif request.by != "rule" and (request.spec is not None or request.overrides):
        option = "--spec" if request.spec is not None else "--set"
        raise SparsepruneError(f"{option}: goes with --by rule or --plot FILE, which have a use for a spec")


def _asked(request: InspectRequest) -> tuple[Telling, list[Requirement]]:
    """What is to be told, and what has to hold: requirements bring their patterns and runtimes along."""
    from sparseprune.execution.facts import BLOCKS, PATTERNS, Questions, block_of, pattern_of
    from sparseprune.report.inspection import Telling, fields_of
    from sparseprune.report.runtimes import RUNTIMES, runtimes_of

    patterns = (*PATTERNS, *map(pattern_of, request.patterns))
    blocks = tuple(dict.fromkeys((*BLOCKS, *map(block_of, request.blocks))))
    runtimes = () if request.runtimes is None else runtimes_of(request.runtimes)
    fields = fields_of(Questions(patterns, blocks))
    requirements = [parse_requirement(text, fields, RUNTIMES) for text in request.requirements]
    required = [one.pattern for one in requirements if one.pattern is not None]
    runtimes = (*runtimes, *(RUNTIMES[one.runtime] for one in requirements if one.runtime is not None))
    questions = Questions(tuple(dict.fromkeys((*patterns, *required))), blocks)
    return Telling(questions, tuple({one.name: one for one in runtimes}.values())), requirements


def _document(
    request: InspectRequest, checkpoint: Checkpoint, names: Sequence[str], telling: Telling
) -> Inspection:
    """The facts of the tensors that were asked for, in the order that was asked for."""
    from sparseprune.execution.inspect import inspect_checkpoint
    from sparseprune.report.inspection import make_inspection
    from sparseprune.report.runtimes import needed_patterns

    listing = request.listing
    telling = replace(telling, grouping=_grouping(request, checkpoint, names))
    tensors = [checkpoint.tensors[name] for name in names]
    told = telling.questions
    questions = replace(
        told, patterns=tuple(dict.fromkeys((*told.patterns, *needed_patterns(telling.runtimes))))
    )
    total = sum(one.nbytes for one in tensors)
    with TensorReader() as reader, progress("reading", total, quiet=request.quiet) as advance:
        facts = inspect_checkpoint(tensors, reader, questions, request.jobs, advance)
    refuse_changed_shards(one.shard for one in tensors)
    document = make_inspection(str(request.checkpoint), facts, telling, checkpoint.left_out)
    key = "name" if request.tree and listing.sort is None else listing.sort
    if document.groups is not None:
        return replace(document, groups=ordered(document.groups, key, listing.reverse))
    return replace(document, tensors=ordered(document.tensors, key, listing.reverse))


def _grouping(request: InspectRequest, checkpoint: Checkpoint, names: Sequence[str]) -> Grouping | None:
    """What the tensors are to be grouped by."""
    if request.by == "tensor":
        return None
    from sparseprune.report.inspection import grouping_of

    return grouping_of(request.by, names, _rules(request, checkpoint) if request.by == "rule" else None)


def _rules(request: InspectRequest, checkpoint: Checkpoint) -> Mapping[str, str]:
    """For each tensor the rules that reach it: of the spec that is named or was applied, or as reported."""
    from sparseprune.cli.applied import applied_report, applied_spec
    from sparseprune.report.inspection import rules_of_report, rules_of_spec
    from sparseprune.spec import TensorInfo, bind

    spec = applied_spec(checkpoint, request.spec, request.overrides)
    if spec is not None:
        tensors = [TensorInfo(one.name, one.dtype, one.shape) for one in checkpoint.tensors.values()]
        return rules_of_spec(bind(spec, tensors, read_config(checkpoint)))
    rules = rules_of_report(applied_report(checkpoint) or {})
    if not rules:
        raise SparsepruneError(
            f"{request.checkpoint}: there is no spec and no report beside it that tells which rule reached "
            "which tensor; give --spec SPEC"
        )
    return rules


def _print(request: InspectRequest, document: Inspection) -> None:
    """The document in the form that was asked for."""
    if request.form == "json":
        print_json(document)
    elif request.form == "csv":
        from sparseprune.report.exporting import csv_text
        from sparseprune.report.inspection import sheet_of

        print_text(csv_text(*sheet_of(document)))
    elif request.form == "markdown":
        from sparseprune.report.exporting import markdown_text
        from sparseprune.report.inspect_table import columns_and_rows

        print_text(markdown_text(*columns_and_rows(document)))
    elif request.tree:
        from sparseprune.report.inspect_table import InspectTree

        print_table(InspectTree(document))
    else:
        from sparseprune.report.inspect_table import inspect_table

        print_table(inspect_table(document))
