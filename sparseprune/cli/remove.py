"""`remove`: a spec or masks make a smaller checkpoint, and a report of it.

Kept indices come from removal_source; they become shapes and a config, and the survivors are copied.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from sparseprune.checkpoint import StagedOutput, TensorReader, lay_out_removal, read_beside, read_config
from sparseprune.checkpoint.not_safetensors import PICKLE_SUFFIXES, names_training_state
from sparseprune.cli.applied import rebuilt_by, warn_of_broken, warn_of_earlier
from sparseprune.cli.console import print_json, print_result, stderr_console, tell, tell_lines
from sparseprune.cli.progress import progress
from sparseprune.cli.removal_source import Ending, RemoveRequest, chosen, refuse_contradictions
from sparseprune.cli.writing import digest, interrupts_told, output_shown, report_bytes, write_output
from sparseprune.errors import CheckpointError, SparsepruneError

if TYPE_CHECKING:
    from sparseprune.checkpoint import Checkpoint, OutputLayout
    from sparseprune.cli.removal_source import Choice
    from sparseprune.execution.earlier import Touched
    from sparseprune.removal.shrink import Removal
    from sparseprune.report.removal import RemovalRun
    from sparseprune.results import Removal as Result


def run(request: RemoveRequest) -> None:
    """Decide, cut, commit and report; or show the plan."""
    refuse_contradictions(request)
    if request.dry_run:
        from sparseprune.cli.plan import run_removal

        run_removal(request.as_apply())
        return
    began = time.perf_counter()
    ending = Ending()
    with interrupts_told(ending):
        with chosen(request, ending) as choice:
            document, layout = _cut(request, choice, ending, began)
        if not request.quiet:
            _tell(request, choice, document, time.perf_counter() - began)
        if request.json:
            print_json(document)
        else:
            print_result(output_shown(request, layout))


def _cut(request: RemoveRequest, choice: Choice, ending: Ending, began: float) -> tuple[Result, OutputLayout]:
    """Everything from kept indices to the output under its name."""
    from sparseprune.removal.shrink import make_removal
    from sparseprune.removal.slices import summed_up

    checkpoint = choice.checkpoint
    shapes = {name: stored.shape for name, stored in checkpoint.tensors.items()}
    config = read_config(checkpoint)
    try:
        removal = make_removal(shapes, choice.kept, config, beside=read_beside(checkpoint))
    except CheckpointError as error:
        raise CheckpointError(*(f"{choice.source}: {line}" for line in error.args)) from error
    _refuse_nothing(request, choice, removal)
    request.warnings.add(*removal.remarks)
    tensors = {
        name: replace(left, whole=left.whole and name not in choice.rebuilt)
        for name, left in removal.left.items()
    }
    layout = lay_out_removal(checkpoint, request.output, tensors, removal.config)
    identity = {**choice.identity, "what survives": digest(summed_up(choice.kept))}
    output = StagedOutput(layout, request.force, identity=identity)

    def is_complete() -> None:
        choice.refuse_changed()
        output.flush()  # while the choice can still be continued if this fails
        choice.cleanup()

    ending.output = output
    document = write_output(
        output,
        lambda reader: _worked(request, choice, removal, output, reader, began),
        is_complete,
        quiet=request.quiet or choice.continued,
        warnings=request.warnings,
    )
    return document, layout


def _refuse_nothing(request: RemoveRequest, choice: Choice, removal: Removal) -> None:
    """SparsepruneError where nothing would be removed; a warning for each rule that removes nothing."""
    from sparseprune.report.coverage import unpruned_lines
    from sparseprune.report.document import pruned_by_rule

    rules = () if choice.bound is None else choice.bound.rules
    idle = list(unpruned_lines(rules, pruned_by_rule(choice.outcomes)))
    if not removal.kept and len(removal.left) == len(choice.checkpoint.tensors):
        why = idle or ["every mask keeps all of its tensor"]
        raise SparsepruneError(*(f"{choice.source}: nothing to remove: {line}" for line in why))
    request.warnings.add(*idle)


def _worked(
    request: RemoveRequest,
    choice: Choice,
    removal: Removal,
    output: StagedOutput,
    reader: TensorReader,
    began: float,
) -> Result:
    """Copy the survivors, and write the report and the spec beside them."""
    from sparseprune.removal.cut import Cuts
    from sparseprune.removal.slices import kept_whole
    from sparseprune.report.removal import make_removal_result

    layout = output.layout
    if choice.left_out is not None and not request.quiet:
        tell(choice.left_out)
    limits = request.memory, request.jobs
    earlier = warn_of_earlier(choice.checkpoint, _touched(choice, removal), limits, request.warnings)
    tensors = {**choice.checkpoint.tensors, **choice.rebuilt}
    kept = {name: removal.kept.get(name) or kept_whole(tensors[name].shape) for name in layout.weights}
    cuts = Cuts(kept, tensors, choice.limits)
    total, already = cuts.work_bytes(output)
    with progress("removing", total, quiet=request.quiet, already=already) as advance:
        cuts.write(reader, output, request.jobs, advance)
    warn_of_broken(earlier, output, request.warnings)
    document = make_removal_result(
        _circumstances(request, choice, layout, began), choice.checkpoint, choice.bound, removal
    )
    output.add_file(layout.report_file, report_bytes(document))
    if layout.spec_file is not None and choice.spec is not None:
        output.add_file(layout.spec_file, choice.spec)
    return document


def _touched(choice: Choice, removal: Removal) -> dict[str, Touched]:
    """The tensors in which zeros move or are filled again."""
    from sparseprune.execution.earlier import Touched

    rules = {} if choice.plan is None else rebuilt_by(choice.plan)
    found = {}
    for name, left in removal.left.items():
        again = rules[name].rules if name in rules else ()
        cut = removal.kept[name].cut if name in removal.kept else ()
        if again or cut:
            found[name] = Touched(left.name, again, cut)
    return found


def _circumstances(request: RemoveRequest, choice: Choice, layout: OutputLayout, began: float) -> RemovalRun:
    from sparseprune.report.removal import RemovalRun

    others = {other.path for other in choice.checkpoint.others}
    return RemovalRun(
        input=str(request.checkpoint),
        output=output_shown(request, layout),
        spec_sha256=choice.spec_sha256,
        masks=None if request.masks is None else str(request.masks),
        device=choice.device,
        devices=choice.devices,
        seconds=time.perf_counter() - began,
        nbytes=(layout.input_bytes, sum(file.size for file in layout.files if file.path not in others)),
        overrides=choice.overrides,
        left_out=layout.left_out,
        tensors=choice.outcomes,
        warnings=request.warnings.lines,
        coverage=choice.coverage,
    )


def _training_state(checkpoint: Checkpoint) -> list[str]:
    """A line about a trainer's state, which still has the old shapes."""
    names = [
        str(other.path)
        for other in checkpoint.others
        if names_training_state(other.path.name) and other.path.suffix in PICKLE_SUFFIXES
    ]
    if not names:
        return []
    more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
    return [f"copied as it is, though a trainer wrote it for the larger model: {names[0]}{more}"]


def _tell(request: RemoveRequest, choice: Choice, document: Result, seconds: float) -> None:
    from sparseprune.report.removal import changed_table, removal_lines
    from sparseprune.report.tables import rules_table
    from sparseprune.report.wording import size

    console = stderr_console()
    if request.verbose:
        console.print(changed_table(document))
    if document.rules:
        console.print(rules_table(document))
    tell_lines(
        *removal_lines(document),
        *choice.remarks,
        *_training_state(choice.checkpoint),
        f"{seconds:.1f} s, {size(document.totals.bytes / seconds)}/s, on {document.device}",
    )
