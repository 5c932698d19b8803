"""Disks that are really full, or really read-only: small ones, mounted for the test."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparseprune.api.resources import memory_of
from sparseprune.checkpoint import OutputLayout, StagedOutput, TensorReader
from sparseprune.errors import MachineError
from tests.checkpoint.files import IDENTITY, layout_of, names_in, write
from tests.faults import fill, mounted

SLAB = 1 << 16
NUMEL = 1 << 21


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "6m") as place:
        yield place


def layout_on(disk: Path) -> OutputLayout:
    path = disk.parent / "m.safetensors"
    if not path.exists():
        write(path, [("a", "U8", (NUMEL,))])
    return layout_of(path, disk / "out.safetensors", masked="a", form="packed")


def prune(layout: OutputLayout) -> int:
    """How many slabs were finished before."""
    with StagedOutput(layout, identity=IDENTITY) as output, TensorReader() as reader:
        for first in range(0, NUMEL, SLAB):
            if str(first) in output.finished:
                continue
            output.write_weight("a", first, reader.read(layout.checkpoint.tensors["a"], first, first + SLAB))
            output.write_mask("a", first, b"\1" * SLAB)
            output.note(str(first), None)
            if first == SLAB:
                output.flush()
                fill(layout.target.parent, 10 * SLAB)
        output.add_file(layout.report_file, b"{}")
        output.commit()
        return len(output.finished)


def test_a_disk_that_fills_up_is_told_with_its_numbers_and_the_run_goes_on_when_there_is_room(
    disk: Path,
) -> None:
    layout = layout_on(disk)
    with pytest.raises(MachineError) as told:
        prune(layout)
    numbers = re.search(
        r"/\.out\S+: cannot be written: No space left on device; "
        r"the output needs (\S+ [kM]?B) more, (\S+ [kM]?B) are free now$",
        str(told.value),
    )
    assert numbers
    assert numbers[2] == "0 B" or memory_of(numbers[2]) < SLAB
    # Two slabs were on disk before the disk was filled up, but for the room that was left.
    needed = memory_of(numbers[1]) - (1 << 20)
    assert layout.output_bytes - 16 * SLAB < needed < layout.output_bytes - 10 * SLAB
    assert names_in(disk) == [".out.safetensors.sparseprune-partial", "filler"]
    with pytest.raises(MachineError, match=r"disk: not enough free space: \S+ .B needed, .* free; free \d+"):
        prune(layout)
    os.truncate(disk / "filler", 0)
    # Less than a new run would need, enough for what is missing.
    fill(disk, layout.output_bytes - 3 * SLAB + (1 << 20))
    assert prune(layout) > 3
    assert (disk / "out.safetensors").read_bytes() == (disk.parent / "m.safetensors").read_bytes()
    assert names_in(disk) == ["filler", "out.masks.safetensors", "out.report.json", "out.safetensors"]


def test_a_disk_without_room_is_refused_before_the_first_byte(disk: Path) -> None:
    fill(disk, layout_on(disk).output_bytes)
    with pytest.raises(MachineError, match=r"disk: not enough free space: \S+ .B needed, .* free; free \d+"):
        prune(layout_on(disk))
    assert names_in(disk) == ["filler"]


def test_a_disk_that_may_only_be_read_is_named(disk: Path) -> None:
    layout = layout_on(disk)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(MachineError, match="disk: cannot be written to; give another place with -o"):
        prune(layout)
