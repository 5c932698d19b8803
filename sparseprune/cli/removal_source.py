"""Where `remove` gets kept indices: by a spec, from decisions or masks in a scratch folder; or from masks.

Owns what is refused before a byte is written. Nothing is cut out here.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sparseprune.checkpoint import (
    OutputLayout,
    StagedOutput,
    TensorReader,
    lay_out_choice,
    lay_out_decisions,
    lay_out_removal,
    open_choice,
    read_beside,
    read_config,
    refuse_changed,
    refuse_replacing,
)
from sparseprune.cli.console import Warnings
from sparseprune.cli.gc_pause import collector_paused
from sparseprune.cli.mask_inputs import identity_of_masked, masked_by
from sparseprune.cli.progress import progress
from sparseprune.cli.request import Request, as_applied, few_tokens, identity_of, prepare, score_shards, warn
from sparseprune.cli.writing import digest, staged
from sparseprune.errors import SparsepruneError, SpecError
from sparseprune.report.coverage import idle_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from sparseprune.checkpoint import Checkpoint, StoredMask, StoredTensor
    from sparseprune.cli.request import Prepared
    from sparseprune.execution import Plan, Schedule, TensorOutcome
    from sparseprune.execution.limits import Limits
    from sparseprune.removal.decide import BlockDecisions
    from sparseprune.removal.preview import Preview
    from sparseprune.removal.slices import KeptIndices
    from sparseprune.report.coverage import Coverage
    from sparseprune.spec import BoundSpec


@dataclass(frozen=True, slots=True)
class RemoveRequest:
    """The options as typed; either `spec` or `masks` is given, and `partial` goes with masks."""

    checkpoint: Path
    spec: str | None
    masks: Path | None
    output: Path | None
    device: str
    jobs: int
    memory: int
    partial: bool = False
    overrides: Mapping[str, str] = field(default_factory=dict)
    dry_run: bool = False
    force: bool = False
    json: bool = False
    quiet: bool = False
    verbose: bool = False
    warnings: Warnings = field(default_factory=Warnings)

    def as_apply(self) -> Request:
        """The request of `apply` for the same spec, without masks."""
        return Request(
            checkpoint=self.checkpoint,
            spec=self.spec or "",
            output=self.output,
            device=self.device,
            jobs=self.jobs,
            memory=self.memory,
            mask_format=None,
            overrides=self.overrides,
            json=self.json,
            warnings=self.warnings,
            resized=True,
        )


@dataclass(slots=True)
class Ending:
    """The output that is being written: first the scratch folder, then the smaller checkpoint."""

    output: StagedOutput | None = None

    @property
    def named(self) -> bool:
        return self.output is not None and self.output.named

    @property
    def identity(self) -> Mapping[str, str] | None:
        return None if self.output is None else self.output.identity


@dataclass(frozen=True, slots=True)
class Choice:
    """What survives, from whichever source: kept indices, rebuilt tensors, and what to report of them.

    `refuse_changed` raises where something that was read has changed since; `cleanup` deletes the scratch
    folder: call it once nothing reads from it, before the output gets its name. `continued`: the user knows
    already whether an unfinished run goes on. `spec` is the text that the output keeps, errors begin with
    `source`, `left_out` names what has no counterpart.
    """

    source: str
    checkpoint: Checkpoint
    kept: Mapping[str, KeptIndices]
    limits: Limits
    identity: Mapping[str, str]
    refuse_changed: Callable[[], None]
    cleanup: Callable[[], None] = field(default=lambda: None)
    device: str = "cpu"
    devices: Mapping[str, str] = field(default_factory=dict)
    rebuilt: Mapping[str, StoredTensor] = field(default_factory=dict)
    bound: BoundSpec | None = None
    plan: Plan | None = None
    outcomes: Sequence[TensorOutcome] = ()
    overrides: Mapping[str, str] = field(default_factory=dict)
    spec_sha256: str | None = None
    spec: bytes | None = None
    left_out: str | None = None
    remarks: Sequence[str] = ()
    coverage: Coverage | None = None
    continued: bool = False


def refuse_contradictions(request: RemoveRequest) -> None:
    """SparsepruneError where the options do not say what to remove."""
    if request.spec is not None and request.masks is not None:
        raise SparsepruneError(f"{request.spec} and --masks exclude each other; give one of them")
    if request.spec is None and request.masks is None:
        raise SparsepruneError(
            "nothing says what to remove; give a SPEC, such as decoder-mlp-channels, or --masks MASKS"
        )
    if request.masks is None and request.partial:
        raise SparsepruneError(
            "--partial: goes with --masks MASKS, of which it forgives those without a tensor"
        )
    if request.spec is None and request.overrides:
        raise SparsepruneError("--set: goes with a SPEC, whose [vars] it sets")
    if request.spec is None and request.dry_run:
        raise SparsepruneError("--dry-run: goes with a SPEC, whose plan it shows")


@contextmanager
def chosen(request: RemoveRequest, ending: Ending) -> Iterator[Choice]:
    """What survives; the scratch folder exists as long as the context lasts."""
    if request.masks is not None:
        with TensorReader() as reader:
            choice = _by_masks(request, request.masks, reader)
        yield choice
        return
    from sparseprune.removal.decide import block_decisions

    with collector_paused():
        prepared = prepare(request.as_apply())
        final = _target(request, prepared.plan.checkpoint)
        removable(prepared, request.warnings)
        decisions = block_decisions(prepared.schedule)
    warn(request.as_apply(), prepared)
    layout = _lay_out_masks(prepared, final) if decisions is None else lay_out_decisions(final)
    output = StagedOutput(layout, identity=_identity(request, prepared))
    ending.output = output
    with staged(output, quiet=request.quiet, warnings=request.warnings):
        yield _by_spec(request, prepared, output, decisions)


def _by_masks(request: RemoveRequest, masks: Path, reader: TensorReader) -> Choice:
    masked = masked_by(request, masks)
    matched, origin = masked.matched, masked.origin
    layout = _target(request, matched.checkpoint)
    refuse_replacing(layout, [shard.path for shard in matched.masks.shards], "masks")
    from sparseprune.execution.limits import limits_of
    from sparseprune.execution.reapply import resident_of
    from sparseprune.report.reapplication import left_out_text

    limits = limits_of(request.memory, uses_torch=False, resident=resident_of(matched, resized=True))
    return Choice(
        source=str(masks),
        checkpoint=matched.checkpoint,
        kept=_kept_by(request, [pair.mask for pair in matched.pairs], reader, limits),
        limits=limits,
        identity={
            **identity_of_masked(masked),
            "the options": json.dumps(["remove", request.partial, limits.slab]),
        },
        refuse_changed=lambda: refuse_changed(matched.checkpoint, matched.masks.shards),
        left_out=left_out_text(len(matched.unused), len(matched.unmasked)),
        overrides={} if origin is None else origin.overrides,
        spec=None if origin is None else origin.spec,
    )


def _lay_out_masks(prepared: Prepared, final: OutputLayout) -> OutputLayout:
    """The scratch output for masks, and for weights that are shrunk or rebuilt."""
    plan = prepared.plan
    instances = [instance for _, instance in plan.bound.instances()]
    rebuilt = any(one.soft is not None or one.reconstruct is not None for one in instances)
    return lay_out_choice(plan.checkpoint, final, plan.reached, rebuilt=rebuilt)


def removable(prepared: Prepared, warnings: Warnings) -> Preview:
    """What a removal would leave; `warnings` get lines about statements that may no longer be true.

    Raises:
        SpecError: a rule cannot be removed, no class has such a model, or every block survives.
    """
    from sparseprune.removal.preview import preview

    checkpoint = prepared.plan.checkpoint
    expected = preview(prepared.plan, read_config(checkpoint), read_beside(checkpoint))
    if expected.reasons:
        raise SpecError(
            *(
                f"{prepared.source.source}: {rule} cannot be removed: {why}; apply writes zeros"
                for rule, why in expected.reasons.items()
            )
        )
    if expected.problems:
        raise SpecError(*(f"{prepared.source.source}: {problem}" for problem in expected.problems))
    idle, rules = list(idle_lines(prepared.plan.bound.rules)), prepared.plan.bound.rules
    if idle and len(idle) == sum(bool(rule.instances) for rule in rules):
        raise SpecError(*(f"{prepared.source.source}: nothing to remove: {line}" for line in idle))
    if expected.removal is not None:
        warnings.add(*expected.removal.remarks)
    return expected


def _target(request: RemoveRequest, checkpoint: Checkpoint) -> OutputLayout:
    """The output if nothing were cut, once it may be written there."""
    layout = lay_out_removal(checkpoint, request.output, None, None)
    StagedOutput(layout, request.force).refuse_early()
    return layout


def _identity(request: RemoveRequest, prepared: Prepared) -> dict[str, str]:
    found = identity_of(request.as_apply(), prepared)
    return {**found, "the options": json.dumps(["remove", found["the options"]])}


def _by_spec(
    request: RemoveRequest, prepared: Prepared, output: StagedOutput, decisions: BlockDecisions | None
) -> Choice:
    """Kept indices from decisions in memory, or else from masks that are written to the scratch folder."""
    from sparseprune.execution import device_text, devices_of_rules, resolve_device

    plan, schedule = prepared.plan, prepared.schedule
    device = resolve_device(request.device, uses_torch=schedule.uses_torch)
    rebuilt: Mapping[str, StoredTensor] = {}
    with TensorReader() as reader:
        if decisions is not None:
            kept, outcomes = _decided(request, decisions, reader, output)
        else:
            outcomes = _written(request, schedule, reader, output, device)
            masks, rebuilt = open_choice(output)
            kept = _kept_by(request, masks, reader, schedule.limits)
    typed = request.as_apply()
    return Choice(
        source=prepared.source.source,
        checkpoint=plan.checkpoint,
        kept=kept,
        limits=schedule.limits,
        identity=output.identity or {},
        refuse_changed=lambda: refuse_changed(plan.checkpoint, score_shards(plan)),
        cleanup=output.discard,
        device=device_text(schedule.jobs, device),
        devices=devices_of_rules(schedule, device),
        rebuilt=rebuilt,
        bound=plan.bound,
        plan=plan,
        outcomes=outcomes,
        overrides=request.overrides,
        spec_sha256=digest(prepared.source.text),
        spec=as_applied(typed, prepared.source.text).encode(),
        remarks=few_tokens(plan),
        coverage=prepared.coverage,
        continued=output.resumed or bool(output.started_over),
    )


def _decided(
    request: RemoveRequest, decisions: BlockDecisions, reader: TensorReader, output: StagedOutput
) -> tuple[dict[str, KeptIndices], Sequence[TensorOutcome]]:
    total, already = decisions.work_bytes(output)
    with progress("choosing", total, quiet=request.quiet, already=already) as advance:
        found = decisions.decide(reader, output, advance)
    output.flush()
    return found


def _written(
    request: RemoveRequest, schedule: Schedule, reader: TensorReader, output: StagedOutput, device: str
) -> Sequence[TensorOutcome]:
    """What became of tensors whose masks and rebuilt weights are in the scratch folder now."""
    from sparseprune.execution import execute, work_bytes

    total, already = work_bytes(schedule, output)
    with progress("choosing", total, quiet=request.quiet, already=already) as advance:
        outcomes = execute(schedule, reader, output, device, advance)
    output.flush()
    return outcomes


def _kept_by(
    request: RemoveRequest, masks: Sequence[StoredMask], reader: TensorReader, limits: Limits
) -> dict[str, KeptIndices]:
    from sparseprune.removal.decide import read_slices

    total = sum(mask.stored.nbytes for mask in masks)
    with progress("finding slices", total, quiet=request.quiet) as advance:
        return read_slices(masks, reader, limits, request.jobs, advance)
