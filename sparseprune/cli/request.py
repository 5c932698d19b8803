"""What `apply`, `mask` and `plan` share: what was typed, and the way to a plan and the output's layout.

Reads headers and the spec, no tensor data; imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sparseprune.checkpoint import lay_out_apply, lay_out_masks, open_checkpoint
from sparseprune.pipeline import make_plan, make_schedule
from sparseprune.spec import find_spec, parse_spec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sparseprune.checkpoint import MaskFormat, OutputLayout
    from sparseprune.pipeline import Plan, Schedule
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


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that is known before the first byte of a tensor is read."""

    source: SpecSource
    plan: Plan
    schedule: Schedule
    layout: OutputLayout


def prepare(request: Request) -> Prepared:
    """Find and read the spec, read the headers, bind one to the other, lay out the output."""
    source = find_spec(request.spec)
    spec = parse_spec(source.text, source.source, source.directory, request.overrides)
    plan = make_plan(open_checkpoint(request.checkpoint), spec)
    compiled = not request.device.startswith("cuda")
    schedule = make_schedule(plan, request.memory, request.jobs, compiled=compiled)
    return Prepared(source, plan, schedule, _layout(request, plan))


def _layout(request: Request, plan: Plan) -> OutputLayout:
    if request.weights or request.mask_format is None:
        return lay_out_apply(plan.checkpoint, request.output, plan.reached, request.mask_format)
    return lay_out_masks(plan.checkpoint, request.output, plan.reached, request.mask_format)
