"""`apply` and `mask`: from a request to an output under its name, and what is told about it."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparseprune.checkpoint import StagedOutput, TensorReader, lay_out_apply, lay_out_masks, open_checkpoint
from sparseprune.cli.console import print_json, print_result, progress_bar, stderr_console
from sparseprune.pipeline import make_plan
from sparseprune.spec import find_spec, parse_spec

if TYPE_CHECKING:
    from pathlib import Path

    from sparseprune.checkpoint import MaskFormat, OutputLayout
    from sparseprune.pipeline import Plan
    from sparseprune.spec import SpecSource


@dataclass(frozen=True, slots=True)
class Request:
    """What was typed; `mask_format` None for no masks, `weights` False for masks alone."""

    checkpoint: Path
    spec: str
    output: Path | None
    device: str
    jobs: int
    mask_format: MaskFormat | None
    force: bool = False
    json: bool = False
    quiet: bool = False
    verbose: bool = False
    weights: bool = True


def run(request: Request) -> None:
    """Plan, execute, commit, tell."""
    began = time.perf_counter()
    source = find_spec(request.spec)
    plan = make_plan(open_checkpoint(request.checkpoint), parse_spec(source.text, source.source))
    layout = _layout(request, plan)
    document = _execute(request, source, plan, layout, began)
    if not request.quiet:
        _tell(request, plan, layout, document, time.perf_counter() - began)
    if request.json:
        print_json(document)
    else:
        print_result(_shown(request, layout))


def _shown(request: Request, layout: OutputLayout) -> str:
    """The output's path as the user would write it: relative where the paths that were typed are."""
    if request.output is not None:
        return str(request.output)
    return str(layout.target) if request.checkpoint.is_absolute() else os.path.relpath(layout.target)


def _layout(request: Request, plan: Plan) -> OutputLayout:
    if request.weights or request.mask_format is None:
        return lay_out_apply(plan.checkpoint, request.output, plan.reached, request.mask_format)
    return lay_out_masks(plan.checkpoint, request.output, plan.reached, request.mask_format)


def _execute(
    request: Request, source: SpecSource, plan: Plan, layout: OutputLayout, began: float
) -> dict[str, Any]:
    """Everything between the first byte written and the output's name; gives the report."""
    total = sum(unit.nbytes for unit in plan.units) + sum(copy.length for copy in layout.copies)
    with (
        StagedOutput(layout, request.force) as output,
        TensorReader() as reader,
        progress_bar("pruning" if request.weights else "masking", total, quiet=request.quiet) as advance,
    ):
        # Torch comes in here, after everything that can be refused without it.
        from sparseprune.pipeline import Machine, execute, resolve_device
        from sparseprune.report.document import Run, report_document

        machine = Machine(resolve_device(request.device), request.jobs)
        outcomes = execute(plan, reader, output, machine, advance)
        circumstances = Run(
            input=str(request.checkpoint),
            output=_shown(request, layout),
            spec_sha256=hashlib.sha256(source.text.encode()).hexdigest(),
            device=machine.device,
            seconds=time.perf_counter() - began,
        )
        document = report_document(circumstances, plan.checkpoint, plan.bound, outcomes)
        output.add_file(
            layout.report_file, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
        )
        if layout.spec_file is not None:
            output.add_file(layout.spec_file, source.text.encode())
        output.commit()
    return document


def _tell(
    request: Request, plan: Plan, layout: OutputLayout, document: dict[str, Any], seconds: float
) -> None:
    from sparseprune.report.tables import outcome_table, percent, rules_table, size

    console = stderr_console()
    if request.verbose:
        console.print(outcome_table(document))
    console.print(rules_table(document))
    totals = document["totals"]
    reached = sum(tensor["numel"] for tensor in document["tensors"])
    masks = sum(place.nbytes for place in layout.masks.values())
    lines = [
        f"pruned {totals['pruned']:,} of {totals['numel']:,} parameters ({percent(totals['sparsity'])})",
        (
            f"left alone {totals['tensors'] - len(document['tensors'])} of {totals['tensors']} tensors, "
            f"{totals['numel'] - reached:,} parameters"
        ),
    ]
    if request.weights:
        lines.append(
            f"weights {size(layout.input_bytes)} before and after (zeros do not shrink a file)"
            + (f", masks {size(masks)}" if masks else ", no masks")
        )
    else:
        lines.append(f"weights {size(layout.input_bytes)}, masks {size(masks)}")
    work = sum(stored.nbytes for stored in plan.checkpoint.tensors.values())
    lines.append(f"{seconds:.1f} s, {size(work / seconds)}/s, on {document['device']}")
    for line in lines:
        console.print(line)
