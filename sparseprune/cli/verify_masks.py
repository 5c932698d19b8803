"""`verify --masks`: whether everything that masks drop is zero in a checkpoint, and where it is not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from sparseprune.checkpoint import TensorReader, refuse_changed
from sparseprune.cli.collecting import collector_paused
from sparseprune.cli.console import checked, print_json, print_table, print_text, tell
from sparseprune.cli.masked import masked_by
from sparseprune.cli.progress import progress

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from sparseprune.cli.console import Warnings


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
    document = _document(request, request.masks)
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
                dropped = many(document["totals"]["pruned"], "element")
                tensors = many(len(document["tensors"]), "tensor")
                print_text(f"masks drop {dropped} of {tensors}; all of them are zero\n")
            for line in copies_line("not looked at", document["files_not_read"]):
                print_text(f"{line}\n")


def _document(request: MasksRequest, masks: Path) -> dict[str, Any]:
    """Read everything that masks drop; ChangedInputError where something wrote to it meanwhile."""
    with collector_paused():
        matched = masked_by(request, masks).matched
    from sparseprune.execution.reapplying import find_lost, make_reapplication
    from sparseprune.report.reapplication import Circumstances, left_out_line, verify_masks_document

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
    return verify_masks_document(circumstances, matched.checkpoint, tensors)
