"""`verify` and `reapply`: whether the zeros of a spec or of masks are there, and masks put back.

Owns the way from two paths to tensors with their masks, which removing.py goes as well. Called by the public
functions.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from msgspec import Struct

from sparseprune import __version__, results
from sparseprune.api.applied import note_left_behind, read_spec
from sparseprune.api.run import collector_paused, digest, output_shown, sizes_of
from sparseprune.checkpoint import (
    StagedOutput,
    TensorReader,
    lay_out_apply,
    open_checkpoint,
    open_masks,
    read_config,
    refuse_changed_shards,
)
from sparseprune.checkpoint.file_io import checkpoint_identity, refuse_changed, shards_identity
from sparseprune.checkpoint.masks import provenance_of
from sparseprune.checkpoint.publish import refuse_replacing
from sparseprune.errors import SparsepruneError
from sparseprune.execution.reapply import match_masks
from sparseprune.report.checks import left_out_text
from sparseprune.report.wording import other_weights
from sparseprune.results.checking import LeftOut, MaskVerifyTotals
from sparseprune.results.fields import Made, WrittenBytes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sparseprune.api.options import Machine, Source, Target
    from sparseprune.api.run import Run
    from sparseprune.checkpoint import Provenance
    from sparseprune.execution.reapply import Matched


def refuse_contradictions(
    spec: str | None,
    masks: Path | None,
    variables: Mapping[str, object] | None,
    *,
    partial: bool,
    nothing: str,
) -> None:
    """SparsepruneError unless one of a spec and masks is given, with what goes with it."""
    if spec is not None and masks is not None:
        raise SparsepruneError(f"{spec} and --masks exclude each other; give one of them")
    if spec is None and masks is None:
        raise SparsepruneError(nothing)
    if masks is None and partial:
        raise SparsepruneError(
            "--partial: goes with --masks MASKS, of which it forgives those without a tensor"
        )
    if spec is None and variables:
        raise SparsepruneError("--set: goes with a SPEC, whose [vars] it sets")


def verify_spec(run: Run, asked: Source, machine: Machine) -> results.Verification:
    """Count the non-zero blocks of every scope; CheckFailedError with the result if there are too many."""
    from sparseprune.execution.verify import count_survivors, make_check
    from sparseprune.report.checks import failures, verify_totals
    from sparseprune.report.coverage import coverage_of

    note_left_behind(run, asked.checkpoint)
    with collector_paused():
        _, spec = read_spec(asked.spec, asked.overrides)
        checkpoint = open_checkpoint(asked.checkpoint)
        check = make_check(checkpoint, spec, machine.memory, machine.jobs)
        coverage = coverage_of(checkpoint.tensors, check.bound, read_config(checkpoint))
        run.warn(*coverage.warnings("the check reaches"))
        with TensorReader() as reader, run.progress("verifying", check.nbytes) as advance:
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


class Masked(Struct, frozen=True):
    """Tensors with their masks, what was asked for, and what is known of the run that made the masks."""

    checkpoint: Path
    masks: Path
    partial: bool
    matched: Matched
    origin: Provenance | None

    @property
    def overrides(self) -> Mapping[str, str]:
        """The variables that were set when the masks were made."""
        return {} if self.origin is None else self.origin.overrides

    @property
    def left_out(self) -> LeftOut:
        """How many masks and tensors have no counterpart and are ignored."""
        return LeftOut(masks=len(self.matched.unused), tensors=len(self.matched.unmasked))


def masked_by(checkpoint: Path, masks: Path, *, partial: bool) -> Masked:
    """Open both, and give each tensor its mask; CheckpointError with all that does not fit."""
    opened, opened_masks = open_checkpoint(checkpoint), open_masks(masks)
    origin = provenance_of(opened_masks)
    matched = match_masks(opened, opened_masks, origin, partial=partial)
    return Masked(checkpoint, masks, partial, matched, origin)


def identity_of_masked(masked: Masked) -> dict[str, str]:
    """What an unfinished output must agree with to be continued: the version, the input, the masks."""
    matched, origin = masked.matched, masked.origin
    carried = () if origin is None else (sorted(origin.overrides.items()), repr(origin.spec))
    return {
        "the version": __version__,
        "the input": checkpoint_identity(matched.checkpoint),
        "the masks": digest(json.dumps([shards_identity(matched.masks.shards), carried])),
    }


def verify_masks(
    run: Run, checkpoint: Path, masks: Path, machine: Machine, *, partial: bool
) -> results.MaskVerification:
    """Read everything that masks drop; CheckFailedError with the result where some of it is not zero."""
    from sparseprune.execution.reapply import find_lost, make_reapplication
    from sparseprune.report.checks import lost_lines, mask_checked_tensor, masked_totals

    note_left_behind(run, checkpoint)
    with collector_paused():
        masked = masked_by(checkpoint, masks, partial=partial)
    matched = masked.matched
    run.note(left_out_text(masked.left_out))
    reapplication = make_reapplication(matched, machine.memory, machine.jobs)
    with run.progress("verifying", matched.nbytes) as advance, TensorReader() as reader:
        tensors = find_lost(reapplication, reader, advance)
    refuse_changed(matched.checkpoint, matched.masks.shards)
    if not any(tensor.pruned for tensor in tensors):
        run.warn("the masks drop nothing: there is nothing to check")
    failed = sum(tensor.lost > 0 for tensor in tensors)
    result = results.MaskVerification(
        input=str(checkpoint),
        masks=str(masks),
        holds=not failed,
        warnings=tuple(run.warnings),
        files_not_read=other_weights(matched.checkpoint.left_out),
        left_out=masked.left_out,
        totals=MaskVerifyTotals(**vars(masked_totals(matched.checkpoint, tensors)), failed=failed),
        tensors=Made(tensors, mask_checked_tensor),
    )
    return run.checked(result, list(lost_lines(result)))


def reapply(
    run: Run, checkpoint: Path, masks: Path, target: Target, machine: Machine, *, partial: bool
) -> results.Reapplication:
    """Put zeros back, write the report, and give the output its name."""
    with collector_paused():
        masked = masked_by(checkpoint, masks, partial=partial)
        matched = masked.matched
        names = [pair.stored.name for pair in matched.pairs]
        shards = matched.masks.shards
        layout = lay_out_apply(matched.checkpoint, target.output, names, target.mask_format, shards)
        refuse_replacing(layout, [shard.path for shard in shards], "masks")
        # Numpy comes in here, after everything that can be refused without it.
        from sparseprune.execution.reapply import make_reapplication

        reapplication = make_reapplication(matched, machine.memory, machine.jobs)
    options = (target.mask_format, masked.partial, reapplication.limits.slab)
    identity = {**identity_of_masked(masked), "the options": json.dumps(["reapply", *options])}
    output = StagedOutput(layout, target.force, identity=identity)

    def work(reader: TensorReader) -> results.Reapplication:
        from sparseprune.execution.reapply import reapply, reapply_bytes
        from sparseprune.report.checks import masked_totals, reapplied_tensor

        run.note(left_out_text(masked.left_out))
        total, already = reapply_bytes(reapplication, output)
        with run.progress("reapplying", total, already) as advance:
            tensors = reapply(reapplication, reader, output, advance)
        if not any(tensor.pruned for tensor in tensors):
            run.warn("the masks drop nothing: the output is a copy of the input")
        nbytes, mask_bytes = sizes_of(layout)
        return results.Reapplication(
            input=str(checkpoint),
            masks=str(masks),
            output=output_shown(target.output, checkpoint, layout),
            set=dict(masked.overrides),
            seconds=round(run.seconds, 3),
            warnings=tuple(run.warnings),
            files_left_out=other_weights(layout.left_out),
            left_out=masked.left_out,
            bytes=WrittenBytes(weights=nbytes, masks=mask_bytes),
            totals=masked_totals(matched.checkpoint, tensors),
            tensors=Made(tensors, reapplied_tensor),
        )

    spec = None if masked.origin is None else masked.origin.spec
    return run.write(output, work, lambda: refuse_changed(matched.checkpoint, shards), spec=spec)
