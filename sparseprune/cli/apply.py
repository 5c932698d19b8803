"""`apply` and `mask`: from a request to an output under its name, and what is told about it."""

from __future__ import annotations

import hashlib
import json
import time
from typing import TYPE_CHECKING, Any

from sparseprune.checkpoint import StagedOutput, TensorReader
from sparseprune.cli.console import print_json, print_result, progress_bar, stderr_console
from sparseprune.cli.request import Request, collector_paused, output_shown, prepare

if TYPE_CHECKING:
    from sparseprune.checkpoint import OutputLayout
    from sparseprune.cli.request import Prepared
    from sparseprune.pipeline import Plan


def run(request: Request) -> None:
    """Plan, execute, commit, tell."""
    began = time.perf_counter()
    with collector_paused():
        prepared = prepare(request)
    plan, layout = prepared.plan, prepared.layout
    document = _execute(request, prepared, began)
    if not request.quiet:
        _tell(request, plan, layout, document, time.perf_counter() - began)
    if request.json:
        print_json(document)
    else:
        print_result(output_shown(request, layout))


def _execute(request: Request, prepared: Prepared, began: float) -> dict[str, Any]:
    """Everything between the first byte written and the output's name; gives the report."""
    source, plan, layout = prepared.source, prepared.plan, prepared.layout
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
            output=output_shown(request, layout),
            spec_sha256=hashlib.sha256(source.text.encode()).hexdigest(),
            device=machine.device,
            seconds=time.perf_counter() - began,
            overrides=request.overrides,
        )
        document = report_document(circumstances, plan.checkpoint, plan.bound, outcomes)
        output.add_file(
            layout.report_file, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
        )
        if layout.spec_file is not None:
            output.add_file(layout.spec_file, _as_applied(request, source.text).encode())
        output.commit()
    return document


def _as_applied(request: Request, text: str) -> str:
    """The spec's text, below a comment with the variables that were set on the command line."""
    if not request.overrides:
        return text
    words = (f"--set {name}={value}" for name, value in request.overrides.items())
    return f"# Applied with {' '.join(' '.join(words).split())}\n{text}"


def _tell(
    request: Request, plan: Plan, layout: OutputLayout, document: dict[str, Any], seconds: float
) -> None:
    from sparseprune.report.tables import outcome_table, percent, rules_table, size

    console = stderr_console()
    if request.verbose:
        console.print(outcome_table(document))
    console.print(rules_table(document))
    totals = document["totals"]
    reached = sum(rule["numel"] for rule in document["rules"])
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
