"""Journals: what was noted is read again, what was torn is cut off, what is foreign counts as none."""

import os
from pathlib import Path

import pytest

from sparseprune.checkpoint.journal import Journal, note_line, read_journal
from tests.checkpoint.files import IDENTITY

NOTES = {"a 0": {"pruned": 3}, "é\n\r\u2028": ["x", None, 1.5], "b": "\udcff"}


def written(path: Path) -> Path:
    journal = Journal.begin(path, IDENTITY)
    for key, record in NOTES.items():
        journal.append([note_line(key, record)])
    journal.close()
    return path


def test_what_was_noted_is_read_again(tmp_path: Path) -> None:
    path = written(tmp_path / "journal")
    content = read_journal(path)
    assert content is not None
    assert content.identity == IDENTITY
    assert content.finished == NOTES
    assert content.end == path.stat().st_size


def test_a_note_of_the_same_key_replaces_the_earlier(tmp_path: Path) -> None:
    journal = Journal.begin(tmp_path / "journal", {})
    journal.append([note_line("a", 1), note_line("b", 1), note_line("a", 2)])
    journal.close()
    content = read_journal(tmp_path / "journal")
    assert content is not None
    assert content.finished == {"a": 2, "b": 1}


def test_a_journal_that_was_torn_anywhere_is_continued_after_its_last_whole_line(tmp_path: Path) -> None:
    data = written(tmp_path / "journal").read_bytes()
    ends = [place + 1 for place in range(len(data)) if data[place : place + 1] == b"\n"]
    assert len(ends) == len(NOTES) + 1
    for cut in range(len(data)):
        path = tmp_path / f"{cut}"
        path.write_bytes(data[:cut] + b"\0" * (cut % 3 if cut not in ends else 0))
        content = read_journal(path)
        whole = [end for end in ends if end <= cut]
        if not whole:
            assert content is None
            continue
        assert content is not None
        assert content.end == whole[-1]
        assert list(content.finished) == list(NOTES)[: len(whole) - 1]
        journal = Journal.resume(path, content)
        assert path.read_bytes() == data[: whole[-1]]
        assert journal.notes == len(whole) - 1
        journal.append([note_line("more", 1)])
        assert journal.notes == len(whole)
        journal.close()
        again = read_journal(path)
        assert again is not None
        assert again.finished == {**content.finished, "more": 1}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"[]\n",
        b'{"format":1}\n',
        b'{"format":2,"identity":{}}\n',
        b'{"format":1,"identity":[]}\n',
        b'{"format":1,"identity":{"a":1}}\n',
        b'{"format":1,"identity":{}}\n[1,2]\n',
        b'{"format":1,"identity":{}}\n["a"]\n',
        b'{"format":1,"identity":{}}\n["a",1,2]\n',
        b'{"format":1,"identity":{}}\n{"a":1}\n',
        b'{"format":1,"identity":{}}\n["a",\n["b",1]\n',
        b'{"format":1,"identity":{}}\n\n["b",1]\n',
        b'{"format":1,"identity":{}}\n["\xff",1]\n',
        b'{"format":1,"identity":{}}\n' + b"[" * 100_000 + b"\n",
    ],
)
def test_anything_else_is_no_journal(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal").write_bytes(content)
    assert read_journal(tmp_path / "journal") is None


def test_what_is_no_file_is_no_journal(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "absent") is None
    assert read_journal(tmp_path) is None
    written(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    assert read_journal(tmp_path / "link") is None
    os.mkfifo(tmp_path / "pipe")
    assert read_journal(tmp_path / "pipe") is None


def test_a_record_that_json_cannot_hold_is_a_bug() -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        note_line("a", {1, 2})
