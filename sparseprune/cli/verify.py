"""`verify`: whether a checkpoint is as sparse as a spec says; masks are verify_masks' business."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sparseprune.checkpoint import TensorReader, open_checkpoint, read_config, refuse_changed_shards
from sparseprune.cli.applied import tell_left_behind
from sparseprune.cli.collecting import collector_paused
from sparseprune.cli.console import Warnings, checked, print_json, print_table
from sparseprune.cli.progress import progress
from sparseprune.errors import SparsepruneError
from sparseprune.spec import find_spec, parse_spec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """What was typed; one of `spec` and `masks` is wanted, `partial` goes with masks."""

    checkpoint: Path
    spec: str | None
    masks: Path | None
    partial: bool
    overrides: Mapping[str, str]
    jobs: int
    memory: int
    json: bool
    quiet: bool
    warnings: Warnings = field(default_factory=Warnings)


def run(request: VerifyRequest) -> None:
    """Check and print on stdout; CheckFailedError names what fails, or sums it up where the table does."""
    _refuse_contradictions(request)
    tell_left_behind(request.checkpoint, quiet=request.quiet)
    if request.spec is None:
        from sparseprune.cli.verify_masks import run_masks

        run_masks(request)
        return
    from sparseprune.report.verification import broken_line, failures, verify_table

    with collector_paused():
        document = _document(request, request.spec)
    lines = failures(document)
    if lines and not (request.json or request.quiet):
        lines = [broken_line(document)]  # the table has every tensor
    with checked(*lines):
        if request.json:
            print_json(document)
        elif not request.quiet:
            print_table(verify_table(document))


def _document(request: VerifyRequest, named: str) -> dict[str, Any]:
    """What was found in the scopes of the spec of this name."""
    from sparseprune.execution import count_survivors, make_check
    from sparseprune.report.coverage import coverage_of
    from sparseprune.report.verification import AskedCheck, verify_document

    source = find_spec(named)
    spec = parse_spec(source.text, source.source, source.directory, request.overrides)
    checkpoint = open_checkpoint(request.checkpoint)
    check = make_check(checkpoint, spec, request.memory, request.jobs)
    coverage = coverage_of(checkpoint.tensors, check.bound, read_config(checkpoint))
    request.warnings.add(*coverage.warnings("the check reaches"))
    with TensorReader() as reader, progress("verifying", check.nbytes, quiet=request.quiet) as advance:
        found = count_survivors(check, reader, advance)
    refuse_changed_shards(checkpoint.shards)
    asked = AskedCheck(
        str(request.checkpoint),
        named,
        request.overrides,
        coverage,
        warnings=request.warnings.lines,
        not_read=checkpoint.left_out,
    )
    return verify_document(asked, found)


def _refuse_contradictions(request: VerifyRequest) -> None:
    if request.spec is not None and request.masks is not None:
        raise SparsepruneError(f"{request.spec} and --masks exclude each other; give one of them")
    if request.spec is None and request.masks is None:
        raise SparsepruneError(
            "there is nothing to check against; give a SPEC, such as 2of4, or --masks MASKS"
        )
    if request.masks is None and request.partial:
        raise SparsepruneError(
            "--partial: goes with --masks MASKS, of which it forgives those without a tensor"
        )
    if request.spec is None and request.overrides:
        raise SparsepruneError("--set: goes with a SPEC, whose [vars] it sets")
