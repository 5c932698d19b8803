"""Journals: what was noted is read again, what was torn is cut off, what is foreign counts as none."""

import json
import os
import socket
import tracemalloc
import zlib
from pathlib import Path
from random import Random

import pytest

from sparseprune.checkpoint.output import Journal, note_text, read_journal
from tests.checkpoint.files import IDENTITY

NOTES = {"a 0": {"pruned": 3}, "é\n\r\u2028": ["x", None, 1.5], "b": "\udcff"}


def written(path: Path) -> Path:
    journal = Journal.begin(path, IDENTITY)
    for key, record in NOTES.items():
        journal.append([note_text(key, record)])
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
    journal.append([note_text("a", 1), note_text("b", 1), note_text("a", 2)])
    journal.close()
    content = read_journal(tmp_path / "journal")
    assert content is not None
    assert content.finished == {"a": 2, "b": 1}


def test_records_are_kept_as_the_lines_they_came_in_until_they_are_forgotten(tmp_path: Path) -> None:
    content = read_journal(written(tmp_path / "journal"))
    assert content is not None
    notes = content.finished
    notes["a 0"]["pruned"] = 4  # whoever gets a record has it to himself
    assert notes["a 0"] == {"pruned": 3}
    notes.forget("a 0")
    notes.forget("never noted")
    assert "a 0" not in notes
    assert dict(notes) == {key: record for key, record in NOTES.items() if key != "a 0"}
    with pytest.raises(KeyError):
        notes["a 0"]


def test_notes_take_little_more_memory_than_their_text(tmp_path: Path) -> None:
    outcomes = [
        ["layers.0.q_proj.weight", "scope.proj", 16, 8, 1000 + n, 0.5 + n, 9, 0.25 + n] for n in range(500)
    ]
    texts = [note_text(f"{n}.0.0", [64, [outcome]]) for n, outcome in enumerate(outcomes)]
    path = written(tmp_path / "journal")
    content = read_journal(path)
    assert content is not None
    journal = Journal.resume(path, content)
    journal.append(texts)
    journal.close()
    tracemalloc.start()
    try:
        content = read_journal(path)
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert content is not None
    assert content.finished["7.0.0"] == [64, [outcomes[7]]]
    assert taken < 2 * sum(map(len, texts)) + 150 * len(texts)


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
        journal.append([note_text("more", 1)])
        assert journal.notes == len(whole)
        journal.close()
        again = read_journal(path)
        assert again is not None
        assert again.finished == {**content.finished, "more": 1}


def line(value: object, before: int = 0) -> bytes:
    """A line as the journal has it, behind lines of this check sum."""
    text = json.dumps(value, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text, before), text)


HEAD = {"format": 2, "identity": {}}
SUM = zlib.crc32(b'{"format":2,"identity":{}}')


def test_its_lines_are_json_behind_a_check_sum_of_all_lines(tmp_path: Path) -> None:
    Journal.begin(tmp_path / "journal", {}).close()
    assert (tmp_path / "journal").read_bytes() == line(HEAD)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        line([]),
        line({"format": 1, "identity": {}}),
        line({"format": 2}),
        line({"format": 2, "identity": []}),
        line({"format": 2, "identity": {"a": 1}}),
        line(HEAD)[:-1],
        line(HEAD, 1),
        b'{"format":2,"identity":{}}\n',
        b'{"format":1,"identity":{}}\n["a",1]\n',
    ],
)
def test_without_a_good_head_there_is_no_journal(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal").write_bytes(content)
    assert read_journal(tmp_path / "journal") is None


NESTED = b"[" * 100_000


@pytest.mark.parametrize(
    "bad",
    [
        line([1, 2], SUM),
        line(["a"], SUM),
        line(["a", 1, 2], SUM),
        line({"a": 1}, SUM),
        line(None, SUM),
        line("ab", SUM),
        line(["a", 1]),
        line(["a", 1], SUM)[:-2] + b"\n",
        line(["a", 1], SUM).replace(b"1]", b"2]"),
        line(["a", 1], SUM).upper(),
        b" " + line(["a", 1], SUM),
        b"\n",
        b"\0" * 4096,
        b"\xff\xfe",
        b"%08x %s\n" % (zlib.crc32(NESTED, SUM), NESTED),
        b"%08x %s\n" % (zlib.crc32(b'["\xff",1]', SUM), b'["\xff",1]'),
        b"%08x [%s]\n" % (zlib.crc32(b"[" + b"1" * 5000 + b"]", SUM), b"1" * 5000),
        b"x" * 1_000_000,
    ],
)
@pytest.mark.parametrize("after", [b"", line(["b", 1], SUM)])
def test_what_follows_a_bad_line_does_not_count(tmp_path: Path, bad: bytes, after: bytes) -> None:
    path = tmp_path / "journal"
    path.write_bytes(line(HEAD) + bad + after)
    content = read_journal(path)
    assert content is not None
    assert (dict(content.finished), content.end) == ({}, len(line(HEAD)))
    journal = Journal.resume(path, content)
    journal.append([note_text("c", 1)])
    journal.close()
    assert path.read_bytes() == line(HEAD) + line(["c", 1], SUM)


def test_a_line_without_an_end_is_not_read_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"
    path.write_bytes(line(HEAD))
    os.truncate(path, 1 << 40)
    monkeypatch.setattr("sparseprune.checkpoint.output._LONGEST", 1 << 20)
    content = read_journal(path)
    assert content is not None
    assert content.end == len(line(HEAD))


def test_a_line_of_another_journal_does_not_count(tmp_path: Path) -> None:
    for name in ("one", "other"):
        journal = Journal.begin(tmp_path / name, {"input": name})
        journal.append([note_text("a", name)])
        journal.close()
    one, other = ((tmp_path / name).read_bytes().splitlines(keepends=True) for name in ("one", "other"))
    (tmp_path / "mixed").write_bytes(one[0] + other[1])
    content = read_journal(tmp_path / "mixed")
    assert content is not None
    assert content.finished == {}


def test_whatever_becomes_of_its_bytes_a_journal_says_what_it_said_or_less(tmp_path: Path) -> None:
    data = written(tmp_path / "journal").read_bytes()
    random = Random(5)
    for number in range(600):
        spoiled = bytearray(data)
        begin = random.randrange(len(data))
        length = random.choice((1, 1, 2, 8, len(data)))
        match number % 4:
            case 0:
                spoiled[begin : begin + length] = random.randbytes(length)
            case 1:
                spoiled[begin : begin + length] = b""
            case 2:
                spoiled[begin:begin] = data[random.randrange(len(data)) :][:length]
            case _:
                spoiled[begin] ^= 1 << random.randrange(8)
        (tmp_path / "spoiled").write_bytes(spoiled)
        content = read_journal(tmp_path / "spoiled")
        if content is not None:
            assert content.identity == IDENTITY
            assert list(content.finished.items()) == list(NOTES.items())[: len(content.finished)]
            assert spoiled[: content.end] == data[: content.end]


@pytest.mark.parametrize("size", [0, 1, 100, 10_000])
def test_random_bytes_are_no_journal(tmp_path: Path, size: int) -> None:
    random = Random(size)
    for _ in range(25):
        (tmp_path / "journal").write_bytes(random.randbytes(size))
        assert read_journal(tmp_path / "journal") is None


def test_what_is_no_file_is_no_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_journal(tmp_path / "absent") is None
    assert read_journal(tmp_path) is None
    written(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    assert read_journal(tmp_path / "link") is None
    os.mkfifo(tmp_path / "pipe")
    assert read_journal(tmp_path / "pipe") is None
    with socket.socket(socket.AF_UNIX) as bound:
        monkeypatch.chdir(tmp_path)  # a longer path is no address
        bound.bind("socket")
        assert read_journal(tmp_path / "socket") is None


def test_a_record_that_json_cannot_hold_is_a_bug() -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        note_text("a", {1, 2})
