"""Execution works with any source and any sink: here both keep their bytes in memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparseprune.checkpoint import (
    Checkpoint,
    CopyRange,
    OutputLayout,
    Sink,
    Source,
    StagedOutput,
    StoredTensor,
    TensorReader,
    lay_out_apply,
    open_checkpoint,
)
from sparseprune.checkpoint.file_io import as_bytes
from sparseprune.checkpoint.output import Notes
from sparseprune.execution.plan import make_plan
from sparseprune.execution.pruning import execute
from sparseprune.execution.schedule import make_schedule
from sparseprune.spec import parse_spec
from tests.execution.structures import CASES
from tests.limits import AMPLE


class MemorySource(Source):
    """A checkpoint of which all bytes are in memory, as those of an object store could be."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.objects = {shard.path: shard.path.read_bytes() for shard in checkpoint.shards}

    def read(self, stored: StoredTensor, begin: int = 0, end: int | None = None) -> bytearray:
        data = bytearray((stored.nbytes if end is None else end) - begin)
        self.read_into(stored, begin, data)
        return data

    def read_into(self, stored: StoredTensor, begin: int, buffer: Any) -> None:
        view = as_bytes(buffer)
        offset = stored.offset + begin
        view[:] = self.objects[stored.shard.path][offset : offset + len(view)]

    def close(self) -> None:
        self.objects.clear()


class MemorySink(Sink):
    """An output with bool masks that grows in memory; notes nothing."""

    def __init__(self, layout: OutputLayout) -> None:
        self.layout = layout
        self.finished = Notes()
        self.objects = {file.path: bytearray(file.size) for file in layout.files}
        for file in layout.files:
            self.objects[file.path][: len(file.begins_with)] = file.begins_with

    def copy(self, part: CopyRange) -> None:
        data = part.source.read_bytes()[part.source_offset : part.source_offset + part.length]
        self.objects[part.file][part.offset : part.offset + part.length] = data

    def write_weight(self, name: str, begin: int, data: Any) -> None:
        self._write(self.layout.weights[name], begin, data)

    def write_mask(self, name: str, first: int, keep: Any) -> None:
        self._write(self.layout.masks[name], first, keep)

    def _write(self, place: Any, begin: int, data: Any) -> None:
        view = as_bytes(data)
        at = place.offset + begin
        self.objects[place.file][at : at + len(view)] = view

    def add_file(self, name: Any, data: Any) -> None:
        self.objects[name] = bytearray(data)

    def note(self, key: str, record: object, files: Any = None) -> None: ...
    def flush(self) -> None: ...
    def portion(self, files: Any) -> Any: ...
    def portion_done(self, files: Any, facts: Any) -> None: ...
    def commit(self) -> None: ...
    def discard(self) -> None: ...


@pytest.mark.parametrize("name", ["channels", "experts", "blocks along rows"])
def test_a_sink_in_memory_gets_the_bytes_of_files(tmp_path: Path, name: str) -> None:
    spec, tensors = CASES[name]
    (tmp_path / "in").mkdir()
    save_file(tensors(torch.bfloat16), tmp_path / "in" / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "in")
    plan = make_plan(checkpoint, parse_spec(spec))
    schedule = make_schedule(plan, AMPLE, 2)
    masked = {leaf.tensor for _, instance in plan.bound.instances() for leaf in instance.scope.leaves}
    layout = lay_out_apply(checkpoint, tmp_path / "out", masked, "bool")

    def progress(_: int, __: str) -> None: ...

    sink = MemorySink(layout)
    outcomes = execute(schedule, MemorySource(checkpoint), sink, "cpu", progress)
    with StagedOutput(layout) as output, TensorReader() as reader:
        assert execute(schedule, reader, output, "cpu", progress) == outcomes
        output.commit()
    for path, data in sink.objects.items():
        assert np.array_equal(np.frombuffer((tmp_path / "out" / path).read_bytes(), np.uint8), data), path
