"""Small checkpoints of plain bytes, and outputs that prune nothing, for the tests of this room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from sparseprune.checkpoint import StagedOutput, TensorReader, lay_out, lay_out_apply, open_checkpoint
from sparseprune.errors import CheckpointError, MachineError

if TYPE_CHECKING:
    from sparseprune.checkpoint import MaskFormat, OutputLayout

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
    path: Path, target: Path | None = None, masked: str = "", form: MaskFormat | None = None
) -> OutputLayout:
    return lay_out_apply(open_checkpoint(path), target, masked, form)


def fill(output: StagedOutput, report: bytes = b"{}") -> None:
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


def error_of(layout: OutputLayout, *, force: bool = False) -> str | None:
    """What staging the output says against it, None if it is there."""
    try:
        stage(layout, force=force)
    except (CheckpointError, MachineError) as error:
        return str(error)
    return None


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())
