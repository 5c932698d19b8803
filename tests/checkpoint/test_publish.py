"""Files get their names all or none, wherever it is cut short; the next attempt finds nothing in its way."""

from pathlib import Path

import pytest

from sparseprune.checkpoint.publish import StagingDir, name_files, settle

NAMES = ("m.masks.safetensors", "m.report.json", "m.safetensors")
OLD = {"m.report.json": "old report", "m.masks.safetensors": "old masks", "m.safetensors": "old weights"}
# This run wrote no masks: the name of the old ones becomes free.
NEW = {"m.report.json": "a new report", "m.safetensors": "the new weights"}


def _folder(parent: Path) -> Path:
    folder = StagingDir(parent / NAMES[-1]).path
    (folder / "output").mkdir(parents=True)
    for name, text in OLD.items():
        (parent / name).write_text(text)
    for name, text in NEW.items():
        (folder / "output" / name).write_text(text)
    return folder


def _texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def _cut_short(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    rename = Path.rename
    done: list[Path] = []

    def renamed(path: Path, target: Path) -> Path:
        if len(done) == after:
            raise OSError
        done.append(path)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renamed)


@pytest.mark.parametrize("back", range(4))
@pytest.mark.parametrize("there", range(4))
def test_what_was_cut_short_is_undone_or_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: int, back: int
) -> None:
    folder = _folder(tmp_path)
    finals = [tmp_path / name for name in NAMES]
    with monkeypatch.context() as patch:
        _cut_short(patch, there)
        with pytest.raises(OSError):
            name_files(folder, finals, lambda: None)
    with monkeypatch.context() as patch:
        _cut_short(patch, back)
        try:
            settle(folder, finals[-1])
        except OSError:
            patch.undo()
            settle(folder, finals[-1])
    if there < 3:  # two old names are given up before the new weights come
        assert _texts(tmp_path) == OLD
        assert _texts(folder / "output") == NEW
        StagingDir(finals[-1]).resume()
        name_files(folder, finals, lambda: None)
    assert _texts(tmp_path) == NEW
    settle(folder, finals[-1])
    assert _texts(tmp_path) == NEW
