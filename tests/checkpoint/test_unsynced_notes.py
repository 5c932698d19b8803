"""Notes that wait for their bytes keep their order and lose none, also where a flush was interrupted."""

import os
from pathlib import Path

import pytest

from sparseprune.checkpoint.output import Journal, note_text, read_journal
from sparseprune.checkpoint.portions import FileWriter


@pytest.mark.parametrize("meanwhile", [0, 1, 3])
@pytest.mark.parametrize("waiting", [1, 2])
def test_an_interrupted_flush_puts_its_notes_before_those_that_came_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting: int, meanwhile: int
) -> None:
    (tmp_path / "weights").write_bytes(b"1")
    writer = FileWriter()
    writer.journal = Journal.begin(tmp_path / "journal", {})
    writer.written(str(tmp_path / "weights"))
    for number in range(waiting):
        writer.noted(note_text(f"before {number}", None))

    def interrupted(_: int) -> None:
        for number in range(meanwhile):
            writer.noted(note_text(f"meanwhile {number}", None))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.flush()
    writer.flush()
    writer.journal.close()
    found = read_journal(tmp_path / "journal")
    assert found is not None
    before = [f"before {number}" for number in range(waiting)]
    assert list(found.finished) == before + [f"meanwhile {number}" for number in range(meanwhile)]
