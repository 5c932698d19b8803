"""Outputs: exact bytes, nothing under the name until it is complete, nothing left behind."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparseprune.checkpoint import (
    MaskFormat,
    StagedOutput,
    TensorReader,
    lay_out_apply,
    lay_out_masks,
    open_checkpoint,
    output,
)
from sparseprune.engine.dtypes import DTYPES
from sparseprune.errors import MachineError
from tests.checkpoint.files import (
    ONES,
    Tensors,
    content,
    directory,
    fill,
    layout_of,
    names_in,
    sharded,
    single,
    stage,
    write,
)
from tests.faults import failing


@pytest.mark.parametrize("masked", ["", "a", "bs", "abs"])
@pytest.mark.parametrize("make", [directory, sharded])
def test_a_directory_that_is_not_pruned_is_copied_byte_for_byte(
    tmp_path: Path, make: Callable[[Path], Path], masked: str
) -> None:
    ckpt = make(tmp_path)
    (ckpt / "sparseprune").mkdir()
    (ckpt / "sparseprune" / "report.json").write_text("of an earlier run")
    before = content(ckpt)
    stage(layout_of(ckpt, masked=masked))
    output = content(tmp_path / "ckpt-pruned")
    assert output.pop("sparseprune/report.json") == b"{}"
    assert output.pop("sparseprune/spec.toml") == b"version = 1"
    assert content(ckpt) == before
    del before["sparseprune/report.json"]
    assert output == before
    assert names_in(tmp_path) == ["ckpt", "ckpt-pruned"]
    if make is directory:
        assert os.access(tmp_path / "ckpt-pruned/deep/er/run.sh", os.X_OK)
        assert not os.access(tmp_path / "ckpt-pruned/config.json", os.X_OK)


@st.composite
def checkpoints(draw: st.DrawFn) -> Tensors:
    names = draw(st.lists(st.text("abcé.", max_size=4), max_size=6, unique=True))
    shapes = st.lists(st.integers(0, 3), max_size=2)
    return [
        (name, dtype, (*draw(shapes), 4) if DTYPES[dtype].bits < 8 else tuple(draw(shapes)))
        for name, dtype in ((name, draw(st.sampled_from(list(DTYPES)))) for name in names)
    ]


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(tensors=checkpoints(), data=st.data())
def test_a_file_that_is_not_pruned_is_copied_byte_for_byte(
    tmp_path: Path, tensors: Tensors, data: st.DataObject
) -> None:
    path = write(tmp_path / "m.safetensors", tensors)
    masked = data.draw(st.sets(st.sampled_from([name for name, _, _ in tensors]))) if tensors else set()
    stage(lay_out_apply(open_checkpoint(path), None, masked, "bool"), force=True)
    assert (tmp_path / "m.pruned.safetensors").read_bytes() == path.read_bytes()
    assert names_in(tmp_path) == [
        "m.pruned.masks.safetensors",
        "m.pruned.report.json",
        "m.pruned.safetensors",
        "m.safetensors",
    ]


def test_links_become_plain_files(tmp_path: Path) -> None:
    blob = write(tmp_path / "blobs" / "1f", ONES)
    (tmp_path / "blobs" / "2e").write_text("{}")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(blob)
    (tmp_path / "snapshot" / "config.json").symlink_to("../blobs/2e")
    stage(layout_of(tmp_path / "snapshot", masked="b"))
    for name, original in (("model.safetensors", blob), ("config.json", tmp_path / "blobs" / "2e")):
        copied = tmp_path / "snapshot-pruned" / name
        assert not copied.is_symlink()
        assert copied.read_bytes() == original.read_bytes()


def test_writes_parts_of_weights_and_masks_in_any_order_from_many_threads(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", [("a", "I16", (1000,)), ("b", "I16", (999,))])
    layout = layout_of(path, masked="ab", form="packed")
    with StagedOutput(layout, force=False) as output, ThreadPoolExecutor(8) as pool:

        def write_part(name: str, first: int) -> None:
            count = min(16, layout.masks[name].numel - first)
            output.write_weight(name, 2 * first, b"xy" * count)
            output.write_mask(name, first, (b"\1\0" * 8)[:count])

        parts = [(name, first) for name, numel in (("a", 1000), ("b", 999)) for first in range(0, numel, 16)]
        list(pool.map(lambda part: write_part(*part), reversed(parts)))
        output.commit()
    written = open_checkpoint(tmp_path / "m.pruned.safetensors")
    masks = open_checkpoint(tmp_path / "m.pruned.masks.safetensors")
    with TensorReader() as reader:
        assert reader.read(written.tensors["b"]) == b"xy" * 999
        assert reader.read(masks.tensors["a"]) == b"\x55" * 125
        assert reader.read(masks.tensors["b"]) == b"\x55" * 125


@pytest.mark.parametrize("step", [1, 3, 7, 8, 13, 100])
def test_parts_of_a_packed_mask_may_share_bytes(tmp_path: Path, step: int) -> None:
    path = write(tmp_path / "m.safetensors", [("a", "I16", (101,))])
    keep = (np.arange(101) % 3 == 0).astype(np.uint8)
    with StagedOutput(layout_of(path, masked="a", form="packed")) as output, ThreadPoolExecutor(8) as pool:
        firsts = range(0, 101, step)
        list(pool.map(lambda first: output.write_mask("a", first, keep[first : first + step]), firsts))
        output.write_mask("a", 5, keep[5:6])  # again: nothing changes
        output.commit()
    masks = open_checkpoint(tmp_path / "m.pruned.masks.safetensors")
    with TensorReader() as reader:
        assert bytes(reader.read(masks.tensors["a"])) == np.packbits(keep, bitorder="little").tobytes()


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("write_weight", ("b", -1, b"1")),
        ("write_weight", ("b", 24, b"1")),
        ("write_weight", ("b", 0, b"1" * 25)),
        ("write_mask", ("b", 16, b"1" * 16)),
        ("write_mask", ("a", 0, b"1" * 8)),
        ("write_mask", ("b", -8, b"1" * 8)),
        ("add_file", (PurePosixPath("elsewhere.json"), b"")),
    ],
)
def test_a_write_outside_of_its_place_is_a_bug(
    tmp_path: Path, method: str, arguments: tuple[object, ...]
) -> None:
    with StagedOutput(layout_of(directory(tmp_path), masked="ab", form="packed"), force=False) as output:
        with pytest.raises(ValueError, match=r"bytes|elements|no such file"):
            getattr(output, method)(*arguments)
        with pytest.raises(KeyError):
            output.write_weight("absent", 0, b"")


@pytest.mark.parametrize("form", ["bool", "packed"])
def test_takes_arrays_as_they_are(tmp_path: Path, form: MaskFormat) -> None:
    path = write(tmp_path / "m.safetensors", [("a", "F32", (2, 12)), ("none", "F32", (0, 3))])
    keep = np.arange(24).reshape(2, 12) % 3 == 0
    with StagedOutput(layout_of(path, masked=["a", "none"], form=form)) as output:
        output.write_weight("a", 0, np.full((2, 12), 1.5, np.float32))
        output.write_mask("a", 0, keep)
        output.write_weight("none", 0, np.zeros((0, 3), np.float32))
        output.write_mask("none", 0, np.zeros((0, 3), np.bool_))
        output.add_file(output.layout.report_file, b"{}")
        output.commit()
    with TensorReader() as reader:
        written = open_checkpoint(tmp_path / "m.pruned.safetensors").tensors["a"]
        assert np.all(np.frombuffer(reader.read(written), np.float32) == 1.5)
        mask = reader.read(open_checkpoint(tmp_path / "m.pruned.masks.safetensors").tensors["a"])
    wanted = keep.tobytes() if form == "bool" else np.packbits(keep, bitorder="little").tobytes()
    assert mask == wanted


def test_bool_masks_stay_in_their_place(tmp_path: Path) -> None:
    with StagedOutput(layout_of(single(tmp_path), masked="ab", form="bool"), force=False) as output:
        output.write_mask("b", 23, b"\1")
        with pytest.raises(ValueError, match="bytes 24 to 25 of 'b'"):
            output.write_mask("b", 24, b"\1")


def test_an_output_of_masks_takes_no_weights_and_one_without_masks_no_masks(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(single(tmp_path))
    stage(lay_out_masks(checkpoint, None, "ab", "bool"))
    with StagedOutput(
        lay_out_masks(checkpoint, tmp_path / "x.safetensors", "ab", "bool"), force=False
    ) as output:
        output.write_weight("a", 0, b"123")
        fill(output)
        output.commit()
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "m.masks.safetensors").read_bytes()
    with StagedOutput(lay_out_apply(checkpoint, None, "ab", None), force=False) as output:
        output.write_mask("a", 3, b"no place at all")
    stage(lay_out_masks(open_checkpoint(sharded(tmp_path)), None, "ab", "packed"))
    assert names_in(tmp_path / "ckpt-masks") == [
        "masks-00001-of-00002.safetensors", "masks-00002-of-00002.safetensors",
        "masks.safetensors.index.json", "report.json", "spec.toml",
    ]  # fmt: skip


@pytest.mark.parametrize("make", [directory, single])
@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_behind(
    tmp_path: Path, make: Callable[[Path], Path], interruption: type[BaseException]
) -> None:
    path = make(tmp_path)
    before = content(tmp_path)

    def interrupted() -> None:
        with StagedOutput(layout_of(path, masked="a", form="bool"), force=False) as output:
            fill(output)
            raise interruption

    with pytest.raises(interruption):
        interrupted()
    assert content(tmp_path) == before
    with StagedOutput(layout_of(path), force=False) as output:
        fill(output)
    assert content(tmp_path) == before
    assert len(names_in(tmp_path)) == 1


def test_nothing_stands_under_the_name_before_the_commit(tmp_path: Path) -> None:
    with StagedOutput(layout_of(directory(tmp_path)), force=False) as output:
        fill(output)
        assert names_in(tmp_path) == [".ckpt-pruned.sparseprune-partial", "ckpt"]
        output.commit()
        assert (tmp_path / "ckpt-pruned").is_dir()


def test_the_report_may_be_written_again(tmp_path: Path) -> None:
    with StagedOutput(layout_of(directory(tmp_path)), force=False) as output:
        fill(output, b"a long one")
        fill(output, b"short")
        output.commit()
    assert (tmp_path / "ckpt-pruned/sparseprune/report.json").read_bytes() == b"short"


def test_an_input_that_shrinks_while_it_is_copied_leaves_nothing(tmp_path: Path) -> None:
    ckpt = directory(tmp_path)
    layout = layout_of(ckpt)
    os.truncate(ckpt / "model.safetensors", (ckpt / "model.safetensors").stat().st_size - 1)
    with pytest.raises(MachineError, match=r"model\.safetensors: file was truncated while it was read"):
        stage(layout)
    (ckpt / "model.safetensors").unlink()
    with pytest.raises(MachineError, match=r"ckpt/model\.safetensors: cannot be read: No such file"):
        stage(layout)
    assert names_in(tmp_path) == ["ckpt"]


def test_flush_syncs_each_file_that_was_written_since_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []

    def note(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    ckpt = single(tmp_path)
    with StagedOutput(layout_of(ckpt, masked="a", form="bool")) as output:
        monkeypatch.setattr(os, "fdatasync", note)
        output.flush()
        assert synced == []
        fill(output)
        output.flush()
        assert sorted(set(synced)) == ["m.pruned.masks.safetensors", "m.pruned.safetensors"]
        assert len(synced) == 2
        output.flush()
        assert len(synced) == 2


def test_flush_tells_what_the_disk_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    with StagedOutput(layout_of(single(tmp_path), masked="a", form="bool")) as output:
        fill(output)
        monkeypatch.setattr(os, "fdatasync", failing(OSError, 5, "Input/output error"))
        with pytest.raises(MachineError, match=r"safetensors: .*Input/output error"):
            output.flush()
    assert names_in(tmp_path) == ["m.safetensors"]


@pytest.mark.parametrize("share", [0, 1e9])
def test_pages_of_a_large_output_are_let_go_once_they_are_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    told: list[int] = []
    monkeypatch.setattr(output, "_CACHED_SHARE", share)
    monkeypatch.setattr("os.posix_fadvise", lambda *arguments: told.append(arguments[3]))
    with StagedOutput(layout_of(directory(tmp_path), masked="b")) as written:
        written.write_weight("b", 0, b"\1" * 24)
        written.flush()
    assert told == ([] if share else [os.POSIX_FADV_DONTNEED])
