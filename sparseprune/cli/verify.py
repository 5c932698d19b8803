"""`sparseprune verify CKPT SPEC` or `--masks`: whether the zeros are where they should be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from sparseprune.checkpoint import (
    TensorReader,
    open_checkpoint,
    read_config,
    refuse_changed,
    refuse_changed_shards,
)
from sparseprune.cli.applied import tell_left_behind
from sparseprune.cli.console import Warnings, checked, print_json, print_table, print_text, tell
from sparseprune.cli.gc_pause import collector_paused
from sparseprune.cli.mask_inputs import masked_by
from sparseprune.cli.progress import progress
from sparseprune.errors import SparsepruneError
from sparseprune.spec import find_spec, parse_spec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sparseprune.results import MaskVerification, Verification


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


def _document(request: VerifyRequest, named: str) -> Verification:
    """What was found in the scopes of the spec of this name."""
    from sparseprune.execution import count_survivors, make_check
    from sparseprune.report.coverage import coverage_of
    from sparseprune.report.verification import AskedCheck, make_verification

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
    return make_verification(asked, found)


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


class MasksRequest(Protocol):
    """What was typed."""

    @property
    def checkpoint(self) -> Path: ...
    @property
    def masks(self) -> Path | None: ...
    @property
    def partial(self) -> bool: ...
    @property
    def jobs(self) -> int: ...
    @property
    def memory(self) -> int: ...
    @property
    def json(self) -> bool: ...
    @property
    def quiet(self) -> bool: ...
    @property
    def warnings(self) -> Warnings: ...


def run_masks(request: MasksRequest) -> None:
    """Look, print on stdout; CheckFailedError with a line for each tensor that lost zeros."""
    if request.masks is None:
        raise TypeError("there are no masks to verify by")
    document = _masks_document(request, request.masks)
    from sparseprune.report.document import copies_line
    from sparseprune.report.reapplication import lost_line, lost_lines, verify_masks_table
    from sparseprune.report.wording import many

    lines = list(lost_lines(document))
    if lines and not (request.json or request.quiet):
        lines = [lost_line(document)]  # the table has every tensor
    with checked(*lines):
        if request.json:
            print_json(document)
        elif not request.quiet:
            print_table(verify_masks_table(document))
            if not lines:
                dropped = many(document.totals.pruned, "element")
                tensors = many(len(document.tensors), "tensor")
                print_text(f"masks drop {dropped} of {tensors}; all of them are zero\n")
            for line in copies_line("not looked at", document.files_not_read):
                print_text(f"{line}\n")


def _masks_document(request: MasksRequest, masks: Path) -> MaskVerification:
    """Read everything that masks drop; ChangedInputError where something wrote to it meanwhile."""
    with collector_paused():
        matched = masked_by(request, masks).matched
    from sparseprune.execution.reapply import find_lost, make_reapplication
    from sparseprune.report.reapplication import Circumstances, left_out_line, make_mask_verification

    circumstances = Circumstances(
        input=str(request.checkpoint),
        masks=str(masks),
        unused=len(matched.unused),
        unmasked=len(matched.unmasked),
        warnings=request.warnings.lines,
        files=matched.checkpoint.left_out,
    )
    left_out = left_out_line(circumstances)
    if left_out is not None and not request.quiet:
        tell(left_out)
    reapplication = make_reapplication(matched, request.memory, request.jobs)
    with (
        progress("verifying", matched.nbytes, quiet=request.quiet) as advance,
        TensorReader() as reader,
    ):
        tensors = find_lost(reapplication, reader, advance)
    refuse_changed(matched.checkpoint, matched.masks.shards)
    if not any(tensor.pruned for tensor in tensors):
        request.warnings.add("the masks drop nothing: there is nothing to check")
    return make_mask_verification(circumstances, matched.checkpoint, tensors)
