"""Permissions of outputs: what the input's files and folders have, less what the umask forbids."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sparseprune.checkpoint import Collected, StagedOutput, lay_out_apply, lay_out_masks, open_checkpoint
from sparseprune.checkpoint.resizing import lay_out_removal
from sparseprune.checkpoint.statistics import lay_out_statistics
from tests.checkpoint.files import directory, fill, finish, layout_of, sharded, single, stage, write


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def modes(at: Path) -> dict[str, int]:
    """By path, those of a folder and all that is in it, or of a file."""
    paths = [at, *at.rglob("*")] if at.is_dir() else [at]
    return {str(path.relative_to(at)): stat.S_IMODE(path.stat().st_mode) for path in paths}


def close(path: Path) -> None:
    """Weights for the owner, the config for the group, the folders each in its own way."""
    path.chmod(0o700)
    for file, mode in {
        "model.safetensors": 0o600,
        "config.json": 0o640,
        "empty": 0o444,
        "deep": 0o750,
        "deep/er": 0o555,
        "deep/er/run.sh": 0o711,
    }.items():
        (path / file).chmod(mode)


@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
def test_files_and_folders_get_what_a_copy_would(tmp_path: Path, mask: int) -> None:
    path = directory(tmp_path)
    close(path)
    with umask(mask):
        stage(layout_of(path, masked="b", form="bool"))
    wanted = {name: mode & ~mask for name, mode in modes(path).items()}
    # Whoever owns a folder may write there: a folder of files is to be replaced, and to be removed.
    wanted["deep/er"] |= 0o700
    private = {"masks.safetensors", "report.json", "spec.toml"}
    wanted |= {"sparseprune": 0o700} | {f"sparseprune/{name}": 0o600 for name in private}
    assert modes(tmp_path / "ckpt-pruned") == wanted


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o640, 0o644, 0o666, 0o444])
def test_what_belongs_to_a_file_of_weights_is_for_no_more_eyes(tmp_path: Path, mode: int) -> None:
    path = single(tmp_path)
    path.chmod(mode)
    with umask(0o022):
        finish(layout_of(path, masked="b", form="bool"))
    for name in ("m.pruned.safetensors", "m.pruned.masks.safetensors", "m.pruned.report.json"):
        assert modes(tmp_path / name) == {".": mode & ~0o022}


def test_masks_of_several_shards_are_for_those_who_may_read_all_of_them(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    for number, mode in enumerate((0o644, 0o640, 0o604)):
        (path / f"{number}.safetensors").chmod(mode)
    with umask(0):
        stage(lay_out_masks(open_checkpoint(path), None, "ab", "packed"))
    found = modes(tmp_path / "ckpt-masks")
    assert found.pop(".") == modes(path)["."]
    assert set(found.values()) == {0o600}
    assert len(found) == 5


def test_what_is_read_beside_the_weights_narrows_their_masks_and_not_the_weights(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(single(tmp_path))
    scores = write(tmp_path / "scores.safetensors", [("b", "F32", (2, 12))])
    scores.chmod(0o600)
    layout = lay_out_apply(checkpoint, None, "b", "bool", open_checkpoint(scores).shards)
    with umask(0o022):
        stage(layout)
    assert modes(tmp_path / "m.pruned.masks.safetensors") == {".": 0o600}
    assert modes(tmp_path / "m.pruned.report.json") == {".": 0o600}
    assert modes(tmp_path / "m.pruned.safetensors") == modes(tmp_path / "m.safetensors")


def test_statistics_and_smaller_checkpoints_keep_to_the_permissions_of_the_weights(tmp_path: Path) -> None:
    path = directory(tmp_path)
    close(path)
    checkpoint = open_checkpoint(path)
    collected = [Collected(3, None, {name: 0}) for name in ("a", "b")]
    layouts = (
        lay_out_removal(checkpoint, None, None, {"a": 2}),
        lay_out_statistics(checkpoint, tmp_path / "stats", "norm", collected, 12),
    )
    with umask(0):
        for layout in layouts:
            with StagedOutput(layout) as output:
                for part in layout.copies:
                    output.copy(part)
                output.add_file(layout.report_file, b"{}")
                output.commit()
    smaller, statistics = modes(tmp_path / "ckpt-smaller"), modes(tmp_path / "stats")
    before = modes(path)
    assert {name: smaller[name] for name in before if name != "deep/er"} == {
        name: mode for name, mode in before.items() if name != "deep/er"
    }
    assert smaller["sparseprune/report.json"] == 0o600
    assert statistics.pop(".") == statistics.pop("sparseprune") == 0o700
    assert set(statistics.values()) == {0o600}
    assert len(statistics) == 4


def test_statistics_of_a_file_lie_in_a_folder_for_those_who_may_read_it(tmp_path: Path) -> None:
    path = single(tmp_path)
    path.chmod(0o640)
    layout = lay_out_statistics(open_checkpoint(path), tmp_path / "stats", "norm", [])
    with umask(0), StagedOutput(layout) as output:
        output.add_file(layout.report_file, b"{}")
        output.commit()
    assert modes(tmp_path / "stats")["."] == 0o750


def test_a_file_behind_a_link_lends_its_own_permissions(tmp_path: Path) -> None:
    blob = single(tmp_path / "blobs")
    blob.chmod(0o600)
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt/model.safetensors").symlink_to(blob)
    stage(layout_of(tmp_path / "ckpt"))
    assert modes(tmp_path / "ckpt-pruned")["model.safetensors"] == 0o600


def test_a_run_that_was_ended_just_before_its_name_is_continued_with_files_that_nobody_may_write(
    tmp_path: Path,
) -> None:
    path = single(tmp_path)
    path.chmod(0o444)
    layout = layout_of(path, masked="b")
    output = StagedOutput(layout, identity={})
    output.__enter__()
    fill(output)
    output.note("all", None)
    output.flush()
    staged = output.staged_path / layout.target.name
    assert modes(staged) == {".": 0o644}
    staged.chmod(0o444)  # as `commit` leaves it before it gives the name
    output.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    with StagedOutput(layout, identity={}) as again:
        assert again.resumed
        assert modes(staged) == {".": 0o644}
        again.commit()
    assert modes(layout.target) == {".": 0o444}
