"""`verify` and `reapply`: whether the zeros of a spec or of masks are there, and masks put back.

Called by the public functions.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sparseprune import results
from sparseprune.api.applied import applied_source, note_left_behind, read_spec, with_parts
from sparseprune.api.explaining import Explained, name_of
from sparseprune.api.masked import masked_by
from sparseprune.api.options import located
from sparseprune.api.run import collector_paused, output_shown, sizes_of, weight_bytes
from sparseprune.checkpoint import (
    lay_out_apply,
    make_output,
    open_checkpoint,
    read_config,
    refuse_changed_shards,
)
from sparseprune.checkpoint.discovery import SUFFIX
from sparseprune.checkpoint.file_io import refuse_changed
from sparseprune.checkpoint.folding import refuse_split
from sparseprune.checkpoint.publish import refuse_replacing
from sparseprune.checkpoint.resizing import lay_out_folded
from sparseprune.errors import SparsepruneError, printable
from sparseprune.report.checks import left_out_text
from sparseprune.report.wording import other_weights
from sparseprune.results.checking import MaskVerifyTotals
from sparseprune.results.fields import Made, WrittenBytes
from sparseprune.spec import list_specs
from sparseprune.spec.parsing import ALIASES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sparseprune.api.masked import Masked, MaskSource
    from sparseprune.api.options import Source, Target
    from sparseprune.api.resources import Machine
    from sparseprune.api.run import Run
    from sparseprune.checkpoint import OutputLayout
    from sparseprune.checkpoint import Source as SourceOfBytes


def refuse_checkpoint(spec: str) -> None:
    """SparsepruneError for a checkpoint in place of a spec: its zeros may be meant, or its masks."""
    place = located(spec)
    if place.suffix == SUFFIX or (place.is_dir() and spec not in {*list_specs(), *ALIASES}):
        raise SparsepruneError(
            f"{printable(spec)}: a checkpoint, not a spec; --masks {printable(spec)} checks against its "
            f"masks, --zeros-of {printable(spec)} against its zeros"
        )


def carried_spec(run: Run, checkpoint: Path, overrides: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """The spec that a checkpoint was pruned by, and the values of its variables with those of `overrides`.

    SparsepruneError where it carries none.
    """
    carried = applied_source(open_checkpoint(checkpoint))
    if carried is None:
        raise SparsepruneError(
            f"there is nothing to check against: {printable(str(checkpoint))} carries no spec that it was "
            "pruned by; give a SPEC, such as 2of4, or --masks MASKS"
        )
    path, were_set = carried
    variables = were_set | dict(overrides)
    values = "".join(f", with {name}={value}" for name, value in variables.items())
    run.note(f"checking against {path}, by which it was pruned{values}")
    return str(path), variables


def verify_spec(run: Run, asked: Source, machine: Machine) -> results.Verification:
    """Count the non-zero blocks of every scope; CheckFailedError with the result if there are too many."""
    from sparseprune.execution.verify import count_survivors, make_check
    from sparseprune.report.checks import failures, verify_totals
    from sparseprune.report.coverage import coverage_of

    note_left_behind(run, asked.checkpoint)
    with collector_paused():
        _, spec = read_spec(asked.spec, asked.overrides)
        checkpoint = open_checkpoint(asked.checkpoint)
        refuse_split(checkpoint)
        check = make_check(checkpoint, with_parts(spec, checkpoint), machine.memory, machine.jobs)
        coverage = coverage_of(checkpoint.tensors, check.bound, read_config(checkpoint))
        run.warn(*coverage.warnings("the check reaches"))
        with run.reading() as reader, run.progress("verifying", check.nbytes) as advance:
            found = count_survivors(check, reader, advance)
        refuse_changed_shards(checkpoint.shards)
        result = results.Verification(
            input=str(asked.checkpoint),
            spec=asked.spec,
            set=dict(asked.overrides),
            warnings=tuple(run.warnings),
            files_not_read=other_weights(checkpoint.left_out),
            totals=verify_totals(found, coverage),
            rules=found.rules,
            tensors=found.tensors,
        )
    return run.checked(result, failures(result))


def verify_masks(
    run: Run, checkpoint: Path, source: MaskSource, machine: Machine
) -> results.MaskVerification:
    """Read everything that masks drop; CheckFailedError with the result where some of it is not zero."""
    from sparseprune.execution.reapply import find_lost, make_reapplication
    from sparseprune.report.checks import lost_lines, mask_checked_tensor, masked_totals

    note_left_behind(run, checkpoint)
    masked = masked_by(run, checkpoint, source, machine)
    matched = masked.matched
    run.note(left_out_text(masked.left_out))
    reapplication = make_reapplication(matched, machine.memory, machine.jobs)
    with run.progress("verifying", matched.nbytes) as advance, run.reading() as reader:
        tensors = find_lost(reapplication, reader, advance)
    refuse_changed(matched.checkpoint, matched.masks.shards)
    if not any(tensor.pruned for tensor in tensors):
        run.warn("the masks drop nothing: there is nothing to check")
    failed = sum(tensor.lost > 0 for tensor in tensors)
    result = results.MaskVerification(
        input=str(checkpoint),
        masks=str(source.path),
        holds=not failed,
        warnings=tuple(run.warnings),
        files_not_read=other_weights(matched.checkpoint.left_out),
        left_out=masked.left_out,
        totals=MaskVerifyTotals(**vars(masked_totals(matched.checkpoint, tensors)), failed=failed),
        tensors=Made(tensors, mask_checked_tensor),
    )
    return run.checked(result, list(lost_lines(result)))


def reapply(
    run: Run, checkpoint: Path, source: MaskSource, target: Target, machine: Machine
) -> results.Reapplication:
    """Put zeros back, write the report, and give the output its name."""
    if source.zeros:
        # Before a whole checkpoint is read.
        early = lay_out_apply(open_checkpoint(checkpoint), target.output, (), target.mask_format)
        make_output(early, target.force).refuse_early()
    masked = masked_by(run, checkpoint, source, machine, folds=True)
    matched = masked.matched
    shards = matched.masks.shards
    with collector_paused():
        told = explained(masked)
        layout = told.layout(_lay_out(masked, target))
        refuse_replacing(layout, [shard.path for shard in shards], "masks")
        # Numpy comes in here, after everything that can be refused without it.
        from sparseprune.execution.reapply import make_reapplication

        reapplication = make_reapplication(matched, machine.memory, machine.jobs)
    options = (target.mask_format, source.identity, reapplication.limits.slab)
    identity = {**masked.identity, "the options": json.dumps(["reapply", *options])}
    output = make_output(layout, target.force, identity)

    def work(reader: SourceOfBytes) -> results.Reapplication:
        from sparseprune.execution.reapply import reapply, reapply_bytes
        from sparseprune.report.checks import masked_totals, reapplied_tensor

        run.note(left_out_text(masked.left_out))
        total, already = reapply_bytes(reapplication, output)
        with run.progress("reapplying", total, already) as advance:
            tensors = reapply(reapplication, reader, output, advance)
        if not any(tensor.pruned for tensor in tensors):
            run.warn("the masks drop nothing: the output is a copy of the input")
        _, mask_bytes = sizes_of(layout)
        return results.Reapplication(
            input=str(checkpoint),
            masks=str(source.path),
            output=output_shown(target.output, checkpoint, layout),
            set=dict(masked.overrides),
            seconds=round(run.seconds, 3),
            warnings=tuple(run.warnings),
            files_left_out=other_weights(layout.left_out),
            left_out=masked.left_out,
            folded=len(masked.folded),
            bytes=WrittenBytes(weights=weight_bytes(layout), masks=mask_bytes),
            totals=masked_totals(matched.checkpoint, tensors),
            tensors=Made(tensors, reapplied_tensor),
        )

    def refuse() -> None:
        refuse_changed(matched.checkpoint, shards)

    return run.write(output, work, refuse, spec=masked.spec, card=told.card)


def explained(masked: Masked) -> Explained:
    """What the output tells of the command."""
    source = masked.source
    path = name_of(source.path or masked.checkpoint)
    words = ["--zeros-of", path] if source.zeros else [path]
    spec = None if masked.spec is None else masked.spec.decode(errors="replace")
    return Explained(open_checkpoint(masked.checkpoint), "reapply", [*words, *source.words], spec)


def _lay_out(masked: Masked, target: Target) -> OutputLayout:
    """The output with masks of all tensors that have some, and with weights in one that were kept in two."""
    matched = masked.matched
    names = [pair.stored.name for pair in matched.pairs]
    shards = matched.masks.shards
    layout = lay_out_apply(matched.checkpoint, target.output, names, target.mask_format, shards)
    if not masked.folded:
        return layout
    return lay_out_folded(open_checkpoint(masked.checkpoint), matched.checkpoint, masked.folded, layout)
