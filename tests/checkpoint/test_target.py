"""Where an output may be written: what exists, what is the input, what has no room."""

import os
from pathlib import Path

import pytest

from sparseprune.checkpoint import MaskFormat, StagedOutput
from sparseprune.errors import CheckpointError, MachineError
from tests.checkpoint.files import ONES, content, directory, fill, layout_of, names_in, single, stage, write


def test_refuses_an_output_that_exists_and_replaces_it_with_force(tmp_path: Path) -> None:
    ckpt = directory(tmp_path)
    stage(layout_of(ckpt, masked="a", form="bool"), report=b"first")
    (tmp_path / "ckpt-pruned" / "of the first").write_text("")
    with pytest.raises(CheckpointError, match=r"ckpt-pruned: already exists; .*--force"):
        stage(layout_of(ckpt), report=b"second")
    assert (tmp_path / "ckpt-pruned/sparseprune/report.json").read_bytes() == b"first"
    stage(layout_of(ckpt), report=b"third", force=True)
    assert (tmp_path / "ckpt-pruned/sparseprune/report.json").read_bytes() == b"third"
    assert names_in(tmp_path / "ckpt-pruned/sparseprune") == ["report.json", "spec.toml"]
    assert not (tmp_path / "ckpt-pruned" / "of the first").exists()
    assert names_in(tmp_path) == ["ckpt", "ckpt-pruned"]


def test_nothing_is_made_for_an_output_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise AssertionError(args)

    ckpt = directory(tmp_path)
    (tmp_path / "ckpt-pruned").mkdir()
    monkeypatch.setattr(os, "mkdir", fail)
    with pytest.raises(CheckpointError, match="already exists"):
        stage(layout_of(ckpt))


@pytest.mark.parametrize(
    "name", ["m.pruned.safetensors", "m.pruned.masks.safetensors", "m.pruned.report.json"]
)
@pytest.mark.parametrize("form", ["bool", None])
def test_refuses_each_file_of_an_output_that_exists(
    tmp_path: Path, name: str, form: MaskFormat | None
) -> None:
    layout = layout_of(single(tmp_path), masked="a", form=form)
    (tmp_path / name).write_bytes(b"of the user")
    with pytest.raises(CheckpointError, match=f"{name}: already exists; .*--force"):
        stage(layout)
    assert (tmp_path / name).read_bytes() == b"of the user"
    stage(layout, force=True)
    assert (tmp_path / "m.pruned.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()
    # Masks of an earlier run would contradict the new weights.
    assert (tmp_path / "m.pruned.masks.safetensors").exists() == (form == "bool")


def test_force_does_not_replace_a_directory_that_sparseprune_did_not_write(tmp_path: Path) -> None:
    ckpt = directory(tmp_path)
    (tmp_path / "ckpt-pruned").mkdir()
    (tmp_path / "ckpt-pruned" / "thesis").write_text("of the user")
    with pytest.raises(CheckpointError, match=r"ckpt-pruned: --force replaces what sparseprune wrote"):
        stage(layout_of(ckpt), force=True)
    assert (tmp_path / "ckpt-pruned" / "thesis").read_text() == "of the user"
    (tmp_path / "ckpt-pruned" / "thesis").unlink()
    stage(layout_of(ckpt), force=True)
    assert (tmp_path / "ckpt-pruned" / "config.json").exists()


@pytest.mark.parametrize("beside", ["thesis", "masks.safetensors", "masks.safetensors.index.json"])
def test_a_report_at_the_top_is_ours_beside_masks_alone(tmp_path: Path, beside: str) -> None:
    layout = layout_of(directory(tmp_path))
    for name in ("report.json", beside):
        (tmp_path / "ckpt-pruned").mkdir(exist_ok=True)
        (tmp_path / "ckpt-pruned" / name).write_text("{}")
    if beside == "thesis":
        with pytest.raises(CheckpointError, match="--force replaces what sparseprune wrote"):
            stage(layout, force=True)
        assert names_in(tmp_path / "ckpt-pruned") == ["report.json", "thesis"]
    else:
        stage(layout, force=True)
        assert (tmp_path / "ckpt-pruned" / "config.json").exists()


def test_a_download_cache_is_no_place_for_an_output(tmp_path: Path) -> None:
    home = tmp_path / "models--a--b"
    write(home / "blobs" / "1f", ONES)
    snapshot = home / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/1f")
    (tmp_path / "mine").symlink_to(snapshot)
    before = content(tmp_path)
    for source, target in (
        (snapshot, None),
        (snapshot / "model.safetensors", None),
        (directory(tmp_path / "other"), snapshot / "deep"),
    ):
        with pytest.raises(CheckpointError, match=r"lies in a download cache, .* another place with -o"):
            stage(layout_of(source, target), force=True)
    assert {name: one for name, one in content(tmp_path).items() if not name.startswith("other")} == before
    stage(layout_of(tmp_path / "mine"))
    assert (tmp_path / "mine-pruned" / "model.safetensors").is_file()
    assert not (tmp_path / "mine-pruned" / "model.safetensors").is_symlink()
    # A folder of that name alone is no cache.
    stage(layout_of(directory(tmp_path / "snapshots")))


def test_a_directory_that_may_not_be_written_is_not_even_tried_to_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = directory(tmp_path)
    stage(layout_of(ckpt))
    before = content(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "ckpt-pruned")
    with pytest.raises(MachineError, match="ckpt-pruned: cannot be written to, so --force cannot replace it"):
        stage(layout_of(ckpt), force=True)
    assert content(tmp_path) == before
    # Of a link only the link goes.
    (tmp_path / "ckpt-pruned").rename(tmp_path / "elsewhere")
    (tmp_path / "ckpt-pruned").symlink_to("elsewhere")
    stage(layout_of(ckpt), force=True)
    assert not (tmp_path / "ckpt-pruned").is_symlink()


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with StagedOutput(layout_of(directory(tmp_path)), force=False) as output:
        fill(output)
        (tmp_path / "ckpt-pruned").mkdir()
        with pytest.raises(CheckpointError, match="already exists"):
            output.commit()
    assert names_in(tmp_path / "ckpt-pruned") == []


def test_refuses_a_directory_for_a_file_and_the_reverse_even_with_force(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="folder: is a directory, the output is a file"):
        stage(layout_of(single(tmp_path), tmp_path / "folder"), force=True)
    with pytest.raises(CheckpointError, match="file: is a file, the output is a directory"):
        stage(layout_of(directory(tmp_path), tmp_path / "file"), force=True)


@pytest.mark.parametrize("to", ["nowhere", "link"])
def test_a_link_that_leads_nowhere_is_told_as_one(tmp_path: Path, to: str) -> None:
    link = tmp_path / "link"
    link.symlink_to(to)
    for source in (directory(tmp_path), single(tmp_path)):
        for force in (False, True) if source.is_dir() else (False,):
            line = (
                f"link: is a link to {to}, which is not there; remove the link, or give another name with -o"
            )
            with pytest.raises(CheckpointError, match=line):
                stage(layout_of(source, link), force=force)
    assert link.is_symlink()
    stage(layout_of(single(tmp_path), link), force=True)
    assert not link.is_symlink()


def test_refuses_an_output_that_touches_the_input(tmp_path: Path) -> None:
    ckpt = directory(tmp_path / "home")
    (tmp_path / "link").symlink_to("home/ckpt")
    blob = write(tmp_path / "blobs" / "1f", ONES)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(blob)
    for source, target, fact in (
        (ckpt, ckpt, "output and input are the same"),
        (ckpt, tmp_path / "blobs" / ".." / "home" / "ckpt", "output and input are the same"),
        (ckpt, tmp_path / "link", "output and input are the same"),
        (tmp_path / "link", ckpt, "output and input are the same"),
        (ckpt, ckpt / "out", "the output lies inside the input"),
        (ckpt, tmp_path / "link" / "out", "the output lies inside the input"),
        (tmp_path / "link", ckpt / "deep" / "out", "the output lies inside the input"),
        (ckpt, tmp_path / "home", "the output would replace the input"),
        (tmp_path / "snapshot", tmp_path / "blobs", "the output would replace the input"),
        (blob, blob, "output and input are the same"),
        (tmp_path / "snapshot" / "model.safetensors", blob, "output and input are the same"),
    ):
        before = content(tmp_path)
        with pytest.raises(CheckpointError, match=fact):
            stage(layout_of(source, target), force=True)
        assert content(tmp_path) == before


def test_refuses_to_replace_the_input_by_masks(tmp_path: Path) -> None:
    path = write(tmp_path / "x.masks.safetensors", ONES)
    with pytest.raises(CheckpointError, match=r"x\.masks\.safetensors: output and input are the same"):
        stage(layout_of(path, tmp_path / "x.safetensors", "a", "bool"), force=True)


def test_refuses_a_place_that_is_not_there_or_may_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = single(tmp_path)
    with pytest.raises(CheckpointError, match=r"the folder .*absent does not exist; make it first"):
        stage(layout_of(path, tmp_path / "absent" / "x.safetensors"))
    with pytest.raises(CheckpointError, match="is no name for an output"):
        stage(layout_of(path, Path("/")))
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(MachineError, match="cannot be written to"):
        stage(layout_of(path))


def test_refuses_a_disk_that_is_too_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.statvfs_result((4096, 4096, 100, 90, 80, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    with pytest.raises(MachineError, match=r"not enough free space: \S+ .B needed, 327.68 kB free; free \d+"):
        stage(layout_of(single(tmp_path)))
    assert names_in(tmp_path) == ["m.safetensors"]


def test_a_link_at_the_target_is_replaced_and_not_followed(tmp_path: Path) -> None:
    directory(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "keep").write_text("")
    (tmp_path / "out").symlink_to("elsewhere")
    with pytest.raises(CheckpointError, match="out: already exists"):
        stage(layout_of(tmp_path / "ckpt", tmp_path / "out"))
    stage(layout_of(tmp_path / "ckpt", tmp_path / "out"), force=True)
    assert not (tmp_path / "out").is_symlink()
    assert names_in(tmp_path / "elsewhere") == ["keep"]
    single(tmp_path)
    (tmp_path / "x.safetensors").symlink_to("elsewhere/keep")
    stage(layout_of(tmp_path / "m.safetensors", tmp_path / "x.safetensors"), force=True)
    assert not (tmp_path / "x.safetensors").is_symlink()
    assert (tmp_path / "elsewhere" / "keep").read_text() == ""


def test_a_folder_that_may_not_be_written_is_the_machines_error(tmp_path: Path) -> None:
    path = single(tmp_path)
    tmp_path.chmod(0o555)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write everywhere")
    try:
        with pytest.raises(MachineError, match="cannot be written to"):
            stage(layout_of(path))
    finally:
        tmp_path.chmod(0o755)


def test_an_old_output_that_may_not_be_written_is_the_machines_error(tmp_path: Path) -> None:
    ckpt = directory(tmp_path)
    stage(layout_of(ckpt))
    (tmp_path / "ckpt-pruned").chmod(0o555)
    if os.access(tmp_path / "ckpt-pruned", os.W_OK):
        pytest.skip("this user may write everywhere")
    try:
        with pytest.raises(MachineError, match="cannot be written to, so --force cannot replace it"):
            stage(layout_of(ckpt), force=True)
    finally:
        (tmp_path / "ckpt-pruned").chmod(0o755)
