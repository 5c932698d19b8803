"""What `apply`, `mask`, `plan` and `remove` share: what was typed, and the way to a plan and a layout.

Reads headers and the spec, no tensor data; imports no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sparseprune import __version__
from sparseprune.checkpoint import (
    checkpoint_identity,
    lay_out_apply,
    lay_out_masks,
    open_checkpoint,
    read_config,
    shards_identity,
)
from sparseprune.cli.console import Warnings
from sparseprune.cli.writing import digest
from sparseprune.execution import cpu_lines, make_plan, make_schedule
from sparseprune.report.coverage import coverage_of
from sparseprune.spec import find_spec, parse_spec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from sparseprune.checkpoint import MaskFormat, OutputLayout, Shard
    from sparseprune.execution import Plan, Schedule
    from sparseprune.report.coverage import Coverage
    from sparseprune.spec import SpecSource


@dataclass(frozen=True, slots=True)
class Request:
    """What was typed; `mask_format` None for no masks, `weights` False for masks alone."""

    checkpoint: Path
    spec: str
    output: Path | None
    device: str
    jobs: int
    memory: int
    mask_format: MaskFormat | None
    overrides: Mapping[str, str] = field(default_factory=dict)
    force: bool = False
    json: bool = False
    quiet: bool = False
    verbose: bool = False
    weights: bool = True
    resized: bool = False
    warnings: Warnings = field(default_factory=Warnings)


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that is known before the first byte of a tensor is read."""

    source: SpecSource
    plan: Plan
    schedule: Schedule
    layout: OutputLayout
    coverage: Coverage


def prepare(request: Request) -> Prepared:
    """Find and read the spec, read the headers, bind one to the other, lay out the output."""
    source = find_spec(request.spec)
    spec = parse_spec(source.text, source.source, source.directory, request.overrides)
    plan = make_plan(open_checkpoint(request.checkpoint), spec)
    compiled = not request.device.startswith("cuda")
    masks = request.mask_format is not None
    schedule = make_schedule(
        plan, request.memory, request.jobs, compiled=compiled, masks=masks, resized=request.resized
    )
    coverage = coverage_of(plan.checkpoint.tensors, plan.bound, read_config(plan.checkpoint))
    return Prepared(source, plan, schedule, _layout(request, plan), coverage)


def warn(request: Request, prepared: Prepared) -> None:
    """Tell what a user should know before any work; an error under --strict."""
    request.warnings.add(*prepared.coverage.warnings(), *cpu_lines(prepared.schedule, request.device))


def _layout(request: Request, plan: Plan) -> OutputLayout:
    scores = score_shards(plan)
    if request.weights or request.mask_format is None:
        return lay_out_apply(plan.checkpoint, request.output, plan.reached, request.mask_format, scores)
    return lay_out_masks(plan.checkpoint, request.output, plan.reached, request.mask_format, scores)


def identity_of(request: Request, prepared: Prepared) -> dict[str, str]:
    """What an unfinished output must agree with to be continued; the number of jobs is no part of it."""
    checkpoint = prepared.plan.checkpoint
    scores = shards_identity(score_shards(prepared.plan))
    # Variables of the spec may come from it; that beside a single file is no part of the checkpoint.
    config = dict(read_config(checkpoint) or {})
    options = (request.device, request.mask_format, request.weights, request.memory)
    spec = json.dumps([prepared.source.text, sorted(request.overrides.items())])
    return {
        "the version": __version__,
        "the input": digest(json.dumps([checkpoint_identity(checkpoint), config, scores])),
        "the spec": digest(spec),
        "the options": json.dumps(options),
    }


def score_shards(plan: Plan) -> Iterable[Shard]:
    """The shards of score files and statistics, each once."""
    tasks = (task for unit in plan.units for task in unit.tasks)
    return dict.fromkeys(one.stored.shard for task in tasks for one in task.inputs)


def as_applied(request: Request, text: str) -> str:
    """The spec's text, below a comment with the variables that were set on the command line."""
    if not request.overrides:
        return text
    words = (f"--set {name}={value}" for name, value in request.overrides.items())
    return f"# Applied with {' '.join(' '.join(words).split())}\n{text}"


def few_tokens(plan: Plan) -> list[str]:
    """A line where statistics rest on fewer tokens than a matrix has inputs."""
    tasks = [task for unit in plan.units for task in unit.tasks]
    inputs = {one.key: one for task in tasks for one in task.inputs if one.role == "moment"}
    few = [name for name, one in inputs.items() if any(count < one.stored.shape[-1] for count in one.tokens)]
    if not few:
        return []
    text = f"{len(few)} of {len(inputs)} matrices rest on fewer tokens than they have inputs"
    return [f"statistics of {text}, such as those of {few[0]}: calibrate on more text"]
