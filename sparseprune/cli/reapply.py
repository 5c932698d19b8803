"""`reapply`: from a checkpoint and masks to an output with its zeros back, and what is told about it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sparseprune.checkpoint import (
    StagedOutput,
    lay_out_apply,
    refuse_changed,
    refuse_replacing,
)
from sparseprune.cli.console import Warnings, print_json, print_result, stderr_console, tell, tell_lines
from sparseprune.cli.gc_pause import collector_paused
from sparseprune.cli.mask_inputs import identity_of_masked, masked_by
from sparseprune.cli.progress import progress
from sparseprune.cli.writing import interrupts_told, output_shown, report_bytes, write_output

if TYPE_CHECKING:
    from pathlib import Path

    from sparseprune.checkpoint import MaskFormat, OutputLayout, TensorReader
    from sparseprune.cli.mask_inputs import Masked
    from sparseprune.execution.reapply import Reapplication
    from sparseprune.report.reapplication import Circumstances
    from sparseprune.results import Reapplication as Result

_WORST = 10  # tensors that are shown without -v


@dataclass(frozen=True, slots=True)
class ReapplyRequest:
    """What was typed; `mask_format` None for no masks."""

    checkpoint: Path
    masks: Path
    output: Path | None
    jobs: int
    memory: int
    mask_format: MaskFormat | None
    partial: bool = False
    force: bool = False
    json: bool = False
    quiet: bool = False
    verbose: bool = False
    warnings: Warnings = field(default_factory=Warnings)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Everything that is known before the first byte of a tensor is read."""

    masked: Masked
    layout: OutputLayout
    reapplication: Reapplication


def run(request: ReapplyRequest) -> None:
    """Match, put zeros back, commit, tell."""
    began = time.perf_counter()
    with collector_paused():
        prepared = _prepare(request)
    matched, layout = prepared.masked.matched, prepared.layout
    output = StagedOutput(layout, request.force, identity=_identity(request, prepared))
    with interrupts_told(output):
        document = write_output(
            output,
            lambda reader: _worked(request, prepared, output, reader, began),
            lambda: refuse_changed(matched.checkpoint, matched.masks.shards),
            quiet=request.quiet,
            warnings=request.warnings,
        )
        if not request.quiet:
            _tell(request, prepared, document, time.perf_counter() - began)
        if request.json:
            print_json(document)
        else:
            print_result(output_shown(request, layout))


def _prepare(request: ReapplyRequest) -> _Prepared:
    # Numpy comes in with the first of the two, after everything that can be refused without it.
    masked = masked_by(request, request.masks)
    matched = masked.matched
    names = [pair.stored.name for pair in matched.pairs]
    masks = matched.masks.shards
    layout = lay_out_apply(matched.checkpoint, request.output, names, request.mask_format, masks)
    refuse_replacing(layout, [shard.path for shard in masks], "masks")
    from sparseprune.execution.reapply import make_reapplication

    return _Prepared(masked, layout, make_reapplication(matched, request.memory, request.jobs))


def _worked(
    request: ReapplyRequest, prepared: _Prepared, output: StagedOutput, reader: TensorReader, began: float
) -> Result:
    """Do the work, and write the report, and the spec of the run that made the masks, beside it."""
    from sparseprune.execution.reapply import reapply, reapply_bytes
    from sparseprune.report.reapplication import left_out_line, make_reapply_result

    left_out = left_out_line(_circumstances(request, prepared, began))
    if left_out is not None and not request.quiet:
        tell(left_out)
    total, already = reapply_bytes(prepared.reapplication, output)
    with progress("reapplying", total, quiet=request.quiet, already=already) as advance:
        tensors = reapply(prepared.reapplication, reader, output, advance)
    if not any(tensor.pruned for tensor in tensors):
        request.warnings.add("the masks drop nothing: the output is a copy of the input")
    layout, origin = prepared.layout, prepared.masked.origin
    circumstances = _circumstances(request, prepared, began)
    document = make_reapply_result(circumstances, prepared.masked.matched.checkpoint, tensors)
    output.add_file(layout.report_file, report_bytes(document))
    if layout.spec_file is not None and origin is not None and origin.spec is not None:
        output.add_file(layout.spec_file, origin.spec)
    return document


def _circumstances(request: ReapplyRequest, prepared: _Prepared, began: float) -> Circumstances:
    from sparseprune.report.reapplication import Circumstances

    matched, origin = prepared.masked.matched, prepared.masked.origin
    return Circumstances(
        input=str(request.checkpoint),
        masks=str(request.masks),
        unused=len(matched.unused),
        unmasked=len(matched.unmasked),
        files=prepared.layout.left_out,
        output=output_shown(request, prepared.layout),
        seconds=time.perf_counter() - began,
        overrides={} if origin is None else origin.overrides,
        warnings=request.warnings.lines,
    )


def _identity(request: ReapplyRequest, prepared: _Prepared) -> dict[str, str]:
    """What an unfinished output must agree with to be continued; the number of jobs is no part of it."""
    options = (request.mask_format, request.partial, prepared.reapplication.limits.slab)
    return {**identity_of_masked(prepared.masked), "the options": json.dumps(["reapply", *options])}


def _tell(request: ReapplyRequest, prepared: _Prepared, document: Result, seconds: float) -> None:
    from sparseprune.report.document import copies_line
    from sparseprune.report.reapplication import reapply_table
    from sparseprune.report.wording import percent, size

    console, layout = stderr_console(), prepared.layout
    totals, tensors = document.totals, document.tensors
    lost = sum(tensor.lost > 0 for tensor in tensors)
    if request.verbose:
        console.print(reapply_table(document))
    elif lost:
        console.print(reapply_table(document, _WORST))
        if lost > _WORST:
            console.print(f"and {lost - _WORST:,} more tensors that had lost zeros; -v shows all")
    masks = sum(place.nbytes for place in layout.masks.values())
    lines = [
        (
            f"put back {totals.lost:,} of {totals.pruned:,} zeros "
            f"({percent(totals.lost / max(1, totals.pruned))}), "
            f"lost in {lost:,} of {len(tensors):,} tensors with masks"
        ),
        (f"masks drop {totals.pruned:,} of {totals.numel:,} parameters ({percent(totals.sparsity)})"),
        (
            f"left alone {totals.tensors - len(tensors):,} of {totals.tensors:,} tensors, "
            f"{totals.numel - totals.masked:,} parameters"
        ),
        (
            f"weights {size(layout.input_bytes)} before and after (zeros do not shrink a file)"
            + (f", masks {size(masks)}" if masks else ", no masks")
        ),
        *copies_line("left out", document.files_left_out),
        f"{seconds:.1f} s, {size(layout.input_bytes / seconds)}/s",
    ]
    tell_lines(*lines)
