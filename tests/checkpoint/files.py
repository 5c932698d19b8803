"""Small checkpoints of plain bytes, and outputs that prune nothing, for the tests of this room."""

import json
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

from sparseprune.checkpoint import (
    MaskFormat,
    Output,
    OutputLayout,
    StagedOutput,
    TensorReader,
    lay_out,
    lay_out_apply,
    open_checkpoint,
)
from sparseprune.errors import CheckpointError, MachineError

Tensors = list[tuple[str, str, tuple[int, ...]]]
ONES: Tensors = [("a", "U8", (3,)), ("b", "I8", (2, 12)), ("s", "BF16", ())]


def write(path: Path, tensors: Tensors, seed: int = 1) -> Path:
    header = lay_out(tensors, {"format": "pt"})
    size = header.file_size - header.data_begin
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.raw + bytes((seed + 7 * place) % 251 for place in range(size)))
    return path


def directory(at: Path) -> Path:
    write(at / "ckpt" / "model.safetensors", ONES)
    (at / "ckpt" / "config.json").write_text('{"a": 1}')
    (at / "ckpt" / "empty").write_text("")
    (at / "ckpt" / "deep" / "er").mkdir(parents=True)
    (at / "ckpt" / "deep" / "er" / "run.sh").write_text("true")
    (at / "ckpt" / "deep" / "er" / "run.sh").chmod(0o755)
    return at / "ckpt"


def sharded(at: Path) -> Path:
    for number, tensor in enumerate(ONES):
        write(at / "ckpt" / f"{number}.safetensors", [tensor], number)
    weight_map = {name: f"{number}.safetensors" for number, (name, _, _) in enumerate(ONES)}
    (at / "ckpt" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return at / "ckpt"


def single(at: Path) -> Path:
    return write(at / "m.safetensors", ONES)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def layout_of(
    path: Path, target: Path | None = None, masked: Collection[str] = "", form: MaskFormat | None = None
) -> OutputLayout:
    return lay_out_apply(open_checkpoint(path), target, masked, form)


def fill(output: Output, report: bytes = b"{}") -> None:
    """What a pipeline does that prunes nothing: copies, the tensors as they are, full masks, the report."""
    layout = output.layout
    for part in layout.copies:
        output.copy(part)
    with TensorReader() as reader:
        for name in layout.weights:
            output.write_weight(name, 0, reader.read(layout.checkpoint.tensors[name]))
    for name, place in layout.masks.items():
        output.write_mask(name, 0, b"\1" * place.numel)
    output.add_file(layout.report_file, report)
    if layout.spec_file is not None:
        output.add_file(layout.spec_file, b"version = 1")


def stage(layout: OutputLayout, *, force: bool = False, report: bytes = b"{}") -> None:
    with StagedOutput(layout, force) as output:
        fill(output, report)
        output.commit()


IDENTITY = {"version": "1", "input": "a", "spec": "b", "options": "c"}


def steps(layout: OutputLayout, reader: TensorReader) -> Iterator[tuple[str, Callable[[StagedOutput], None]]]:
    """Pieces of work by key, one copy or 8 elements of a weight each; every second byte is dropped."""
    for number, part in enumerate(layout.copies):
        yield f"copy {number}", partial(StagedOutput.copy, part=part)
    for name in layout.weights:
        for first in range(0, layout.checkpoint.tensors[name].numel, 8):
            yield f"{name} {first}", partial(_prune, name=name, first=first, reader=reader)


def _prune(output: StagedOutput, name: str, first: int, reader: TensorReader) -> None:
    stored = output.layout.checkpoint.tensors[name]
    width = stored.nbytes // stored.numel
    last = min(first + 8, stored.numel)
    data = reader.read(stored, first * width, last * width)
    data[::2] = bytes(len(data[::2]))
    output.write_weight(name, first * width, data)
    output.write_mask(name, first, (b"\0\1" * 4)[: last - first])


def work(output: StagedOutput) -> list[str]:
    """What a pipeline does that can be continued; gives the keys of what was not finished yet."""
    done = []
    with TensorReader() as reader:
        for key, step in steps(output.layout, reader):
            if key not in output.finished:
                step(output)
                output.note(key, {"of": key})
                output.flush()
                done.append(key)
    output.add_file(output.layout.report_file, b"{}")
    if output.layout.spec_file is not None:
        output.add_file(output.layout.spec_file, b"version = 1")
    return done


def resumable(layout: OutputLayout, *, force: bool = False, **parts: str) -> StagedOutput:
    return StagedOutput(layout, force, IDENTITY | parts)


def all_keys(layout: OutputLayout) -> list[str]:
    with TensorReader() as reader:
        return [key for key, _ in steps(layout, reader)]


def finish(layout: OutputLayout, *, force: bool = False, **parts: str) -> tuple[list[str], list[str]]:
    """Runs to the end; the keys that were finished before, and those that were done now."""
    with resumable(layout, force=force, **parts) as output:
        found = list(output.finished)
        done = work(output)
        output.commit()
    return found, done


def error_of(layout: OutputLayout, *, force: bool = False, report: bytes = b"{}") -> str | None:
    """What staging the output says against it, None if it is there."""
    try:
        stage(layout, force=force, report=report)
    except (CheckpointError, MachineError) as error:
        return str(error)
    return None


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())
