"""`inspect`: a table, or JSON, of what stands in a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparseprune.checkpoint import TensorReader, open_checkpoint
from sparseprune.cli.console import print_json, print_table
from sparseprune.cli.progress import progress

if TYPE_CHECKING:
    from pathlib import Path


def run(path: Path, *, jobs: int, as_json: bool, quiet: bool) -> None:
    """Measure every tensor and print the facts on stdout."""
    checkpoint = open_checkpoint(path)
    total = sum(stored.nbytes for stored in checkpoint.tensors.values())
    with TensorReader() as reader, progress("reading", total, quiet=quiet) as advance:
        from sparseprune.report.inspection import inspect_checkpoint, inspect_document

        document = inspect_document(str(path), inspect_checkpoint(checkpoint, reader, jobs, advance))
    if as_json:
        print_json(document)
        return
    from sparseprune.report.tables import inspect_table

    print_table(inspect_table(document))
