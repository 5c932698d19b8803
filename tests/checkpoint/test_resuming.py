"""Continuing an unfinished output: what was noted is on disk, and what was not is done again."""

import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sparseprune.checkpoint import StagedOutput
from sparseprune.checkpoint.output import read_journal
from sparseprune.errors import CheckpointError, MachineError
from tests.checkpoint.files import (
    IDENTITY,
    all_keys,
    content,
    directory,
    finish,
    layout_of,
    names_in,
    open_files,
    resumable,
    sharded,
    single,
    work,
)
from tests.faults import failing

Make = Callable[[Path], Path]


def interrupt(
    output: StagedOutput, after: int = 3, error: BaseException | type[BaseException] = KeyboardInterrupt
) -> StagedOutput:
    """Runs until so many pieces are noted, then ends as the error says."""
    flush = output.flush
    left = iter(range(after - 1))

    def stop() -> None:
        flush()
        if next(left, None) is None:
            raise error

    def run() -> None:
        with output:
            if after:
                output.flush = stop  # type: ignore[method-assign]
                work(output)
            raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        run()
    return output


def end(output: StagedOutput, *steps: Callable[[], object]) -> None:
    """Takes these steps and is interrupted."""

    def run() -> None:
        with output:
            for step in steps:
                step()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()


def journal_of(output: StagedOutput) -> list[str]:
    found = read_journal(output.partial_path / "journal")
    return [] if found is None else list(found.finished)


@pytest.mark.parametrize("form", ["bool", "packed"])
@pytest.mark.parametrize("make", [directory, sharded, single])
def test_a_run_that_is_continued_ends_in_the_same_bytes(tmp_path: Path, make: Make, form: str) -> None:
    (tmp_path / "at once").mkdir()
    (tmp_path / "in parts").mkdir()
    path = make(tmp_path / "at once")
    finish(layout_of(path, masked="bs", form=form))  # type: ignore[arg-type]
    layout = layout_of(make(tmp_path / "in parts"), masked="bs", form=form)  # type: ignore[arg-type]
    before = content(tmp_path / "in parts")
    keys = all_keys(layout)
    for done in range(1, len(keys) + 1):
        output = interrupt(resumable(layout), 1)
        assert output.kept
        assert output.resumed == (done > 1)
        assert journal_of(output) == keys[:done]
        visible = {name: data for name, data in content(tmp_path / "in parts").items() if name[0] != "."}
        assert visible == before
    assert finish(layout) == (keys, [])
    assert content(tmp_path / "in parts") == content(tmp_path / "at once")


def test_records_come_back_by_key(tmp_path: Path) -> None:
    layout = layout_of(single(tmp_path), masked="a")
    output = interrupt(resumable(layout))
    assert not output.resumed
    assert output.finished == {}
    assert output.partial_path == tmp_path / ".m.pruned.safetensors.sparseprune-partial"
    with resumable(layout) as again:
        assert again.resumed
        assert again.started_over == ()
        assert again.finished == {key: {"of": key} for key in all_keys(layout)[:3]}


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (MachineError("disk"), True),
        (MemoryError, True),
        (KeyboardInterrupt, True),
        (SystemExit, True),
        (GeneratorExit, True),
        (RuntimeError, False),
        (OSError, False),
        (CheckpointError("input"), False),
    ],
)
def test_what_the_machine_or_the_user_ended_is_kept_and_what_a_mistake_ended_is_not(
    tmp_path: Path, error: BaseException | type[BaseException], kept: bool
) -> None:
    layout = layout_of(directory(tmp_path), masked="b")
    output = interrupt(resumable(layout), error=error)
    assert output.kept == kept
    assert output.partial_path.exists() == kept
    assert names_in(tmp_path) == [*([output.partial_path.name] if kept else []), "ckpt"]
    assert finish(layout)[0] == (all_keys(layout)[:3] if kept else [])


def test_nothing_is_kept_of_a_run_that_noted_nothing_or_has_no_identity_or_just_ends(tmp_path: Path) -> None:
    layout = layout_of(directory(tmp_path), masked="b")
    assert not interrupt(resumable(layout), 0).kept
    assert names_in(tmp_path) == ["ckpt"]
    assert not interrupt(StagedOutput(layout)).kept
    assert names_in(tmp_path) == ["ckpt"]
    with resumable(layout) as output:
        work(output)
    assert not output.kept
    assert names_in(tmp_path) == ["ckpt"]


def test_nothing_is_kept_once_the_output_has_its_name(tmp_path: Path) -> None:
    for path in (directory(tmp_path), single(tmp_path)):
        output = resumable(layout_of(path, masked="a"))
        end(output, partial(work, output), output.commit)
        assert not output.kept
    assert [name for name in names_in(tmp_path) if name.startswith(".")] == []


def test_a_note_that_waits_is_flushed_at_the_end(tmp_path: Path) -> None:
    output = resumable(layout_of(single(tmp_path), masked="a", form="bool"))
    end(output, partial(output.write_weight, "a", 0, b"123"), partial(output.note, "a", None))
    assert output.kept
    assert journal_of(output) == ["a"]


@pytest.mark.parametrize("part", [*IDENTITY, "more"])
def test_starts_over_where_a_part_of_the_identity_differs_and_names_it(tmp_path: Path, part: str) -> None:
    layout = layout_of(directory(tmp_path), masked="b")
    interrupt(resumable(layout))
    with StagedOutput(layout, identity=IDENTITY | {part: "other"}) as output:
        assert output.started_over == (part,)
        assert not output.resumed
        assert output.finished == {}
        assert (output.partial_path / "output/model.safetensors").read_bytes()[-29:] == bytes(29)
        work(output)
        output.commit()
    assert names_in(tmp_path) == ["ckpt", "ckpt-pruned"]


def test_names_all_parts_that_differ_also_where_the_files_do(tmp_path: Path) -> None:
    ckpt = directory(tmp_path)
    interrupt(resumable(layout_of(ckpt, masked="b"), gone="1"))
    layout = layout_of(ckpt, masked="b", form="bool")
    with resumable(layout, options="bool", spec="new") as output:
        assert output.started_over == ("spec", "options", "gone")


def truncate(output: Path) -> None:
    os.truncate(output / "model.safetensors", 10)


def grow(output: Path) -> None:
    os.truncate(output / "model.safetensors", 10_000)


def remove(output: Path) -> None:
    (output / "empty").unlink()


def add(output: Path) -> None:
    (output / "stray").write_text("")


def link(output: Path) -> None:
    (output / "config.json").rename(output.parent / "elsewhere")
    (output / "config.json").symlink_to("../elsewhere")


def link_folder(output: Path) -> None:
    (output / "deep").rename(output.parent / "elsewhere")
    (output / "deep").symlink_to("../elsewhere")


def link_report(output: Path) -> None:
    (output / "sparseprune").mkdir(exist_ok=True)
    (output / "sparseprune/report.json").symlink_to("../../../ckpt/config.json")


def lose_journal(output: Path) -> None:
    (output.parent / "journal").unlink()


def spoil_journal(output: Path) -> None:
    with (output.parent / "journal").open("r+") as journal:
        journal.write("[]\n")


@pytest.mark.parametrize(
    "change", [truncate, grow, remove, add, link, link_folder, link_report, lose_journal, spoil_journal]
)
def test_starts_over_where_the_files_are_not_as_they_were_left(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    layout = layout_of(directory(tmp_path), masked="b")
    output = interrupt(resumable(layout))
    change(output.partial_path / "output")
    with resumable(layout) as again:
        assert not again.resumed
        assert again.started_over == ()
        work(again)
        again.commit()
    assert names_in(tmp_path) == ["ckpt", "ckpt-pruned"]
    assert (tmp_path / "ckpt/config.json").read_text() == '{"a": 1}'


class Events:
    """What happens to the names in a staging folder, in order; a sync of a name is "sync NAME"."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        for function in ("unlink", "mkdir", "rename"):
            monkeypatch.setattr(os, function, partial(self._call, getattr(os, function), function))
        monkeypatch.setattr(os, "fsync", self._sync)

    def _call(self, real: Callable[..., None], function: str, path: Any, *more: Any, **keywords: Any) -> None:
        self.seen.append(f"{function} {Path(path).name}")
        real(path, *more, **keywords)

    def _sync(self, descriptor: int) -> None:
        self.seen.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")


def test_the_old_journal_is_gone_for_good_before_anything_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of(directory(tmp_path), masked="b")
    folder = interrupt(resumable(layout)).partial_path.name
    with monkeypatch.context() as patch:
        events = Events(patch)
        with StagedOutput(layout, identity={}):
            pass
    gone = events.seen.index("unlink journal")
    assert events.seen[gone + 1] == f"sync {folder}"
    assert not any(event.startswith("mkdir") for event in events.seen[1:gone])
    assert events.seen[0] == f"mkdir {folder}"
    assert events.seen.index("unlink model.safetensors") > 2
    assert events.seen.index("mkdir output") > 2


def test_the_names_to_be_given_are_on_disk_before_the_first_is_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of(single(tmp_path), masked="a")
    finish(layout)
    with monkeypatch.context() as patch:
        events = Events(patch)
        finish(layout, force=True)
    moves = [event for event in events.seen if event.startswith("rename")]
    assert moves == [
        "rename m.pruned.report.json",
        "rename m.pruned.safetensors",
        "rename m.pruned.report.json",
    ]
    first = events.seen.index(moves[0])
    assert events.seen[first - 3 : first] == [
        "sync names",
        "mkdir former",
        "sync .m.pruned.safetensors.sparseprune-partial",
    ]


def test_what_an_earlier_death_left_does_not_stand_in_the_way_of_the_names(tmp_path: Path) -> None:
    layout = layout_of(directory(tmp_path), masked="b")
    finish(layout)
    folder = interrupt(resumable(layout, force=True)).partial_path
    (folder / "replaced").mkdir()
    (folder / "replaced" / "of a run long ago").write_text("")
    (folder / "former").write_text("")
    assert finish(layout, force=True)[0] == all_keys(layout)[:3]
    assert names_in(tmp_path) == ["ckpt", "ckpt-pruned"]


def test_a_run_without_identity_starts_over(tmp_path: Path) -> None:
    layout = layout_of(directory(tmp_path), masked="b")
    interrupt(resumable(layout))
    with StagedOutput(layout) as output:
        assert not output.resumed
        assert names_in(output.partial_path) == ["lock", "output"]


def test_the_report_of_the_unfinished_run_is_replaced(tmp_path: Path) -> None:
    layout = layout_of(directory(tmp_path), masked="b")
    output = resumable(layout)
    end(
        output,
        partial(work, output),
        partial(output.add_file, layout.report_file, b"a longer one, unfinished"),
    )
    assert finish(layout) == (all_keys(layout), [])
    assert (tmp_path / "ckpt-pruned/sparseprune/report.json").read_bytes() == b"{}"


def test_a_header_that_did_not_reach_the_disk_is_written_again(tmp_path: Path) -> None:
    path = single(tmp_path)
    layout = layout_of(path, masked="b")
    output = interrupt(resumable(layout))
    with (output.partial_path / "output/m.pruned.safetensors").open("r+b") as file:
        file.write(bytes(100))
    assert finish(layout)[0] == all_keys(layout)[:3]
    assert (tmp_path / "m.pruned.safetensors").read_bytes()[:100] == path.read_bytes()[:100]


def test_a_refused_run_leaves_the_unfinished_one_to_be_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of(directory(tmp_path), masked="b")
    interrupt(resumable(layout))
    (tmp_path / "ckpt-pruned").mkdir()
    with pytest.raises(CheckpointError, match="already exists"):
        finish(layout)
    (tmp_path / "ckpt-pruned").rmdir()
    full = os.statvfs_result((4096, 4096, 100, 90, 80, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    with pytest.raises(MachineError, match="not enough free space"):
        finish(layout, spec="other")
    monkeypatch.undo()
    assert finish(layout)[0] == all_keys(layout)[:3]


def test_what_an_unfinished_run_holds_counts_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(directory(tmp_path), masked="b", form="bool")
    interrupt(resumable(layout), len(all_keys(layout)))
    full = os.statvfs_result((1, 1, 1 << 21, 1 << 21, (1 << 20) + 10, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    assert finish(layout) == (all_keys(layout), [])
    with pytest.raises(MachineError, match="not enough free space"):
        finish(layout_of(tmp_path / "ckpt", tmp_path / "other", masked="b", form="bool"))


def test_a_note_is_not_in_the_journal_before_its_bytes_are_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, Sequence[str]]] = []

    def note(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, journal_of(output)))

    with resumable(layout_of(single(tmp_path), masked="a", form="bool")) as output:
        monkeypatch.setattr(os, "fdatasync", note)
        output.write_weight("a", 0, b"123")
        output.write_mask("a", 0, b"\1\1\1")
        output.note("a", 1)
        output.note("b", 2)
        output.flush()
        monkeypatch.undo()
    weights, masks = "m.pruned.safetensors", "m.pruned.masks.safetensors"
    assert synced == [(masks, []), (weights, []), ("journal", ["a", "b"])]


def test_a_note_whose_bytes_did_not_reach_the_disk_is_never_in_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    layout = layout_of(single(tmp_path), masked="a")
    output = resumable(layout)

    def run() -> None:
        with output:
            output.write_weight("a", 0, b"1")
            output.note("good", 1)
            output.flush()
            output.write_weight("a", 1, b"2")
            output.note("lost", 2)
            monkeypatch.setattr(os, "fdatasync", failing(OSError, 5, "Input/output error"))
            with pytest.raises(MachineError, match=fact):
                output.flush()
            monkeypatch.undo()
            output.note("later", 3)
            # The system has told it: the next sync of the file would succeed.
            with pytest.raises(MachineError, match=fact):
                output.flush()
            output.commit()

    fact = r"m\.pruned\.safetensors: cannot be written: Input/output"
    with pytest.raises(MachineError, match=fact):
        run()
    assert output.kept
    assert journal_of(output) == ["good"]
    assert names_in(tmp_path) == [output.partial_path.name, "m.safetensors"]


def test_what_is_noted_during_a_flush_belongs_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fdatasync = os.fdatasync

    def meanwhile(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        if len(synced) == 1:
            output.write_mask("a", 0, b"\1")
            output.note("second", 2)
        fdatasync(descriptor)

    with resumable(layout_of(single(tmp_path), masked="a", form="bool")) as output:
        monkeypatch.setattr(os, "fdatasync", meanwhile)
        output.write_weight("a", 0, b"1")
        output.note("first", 1)
        output.flush()
        assert journal_of(output) == ["first"]
        output.flush()
        assert journal_of(output) == ["first", "second"]
        assert synced == ["m.pruned.safetensors", "journal", "m.pruned.masks.safetensors", "journal"]


def test_a_flush_waits_for_the_one_that_has_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go_on = threading.Event(), threading.Event()
    fdatasync = os.fdatasync

    def slow(descriptor: int) -> None:
        reached.set()
        assert go_on.wait(10)
        fdatasync(descriptor)

    with resumable(layout_of(single(tmp_path), masked="a")) as output:
        monkeypatch.setattr(os, "fdatasync", slow)
        output.write_weight("a", 0, b"1")
        first = threading.Thread(target=output.flush)
        first.start()
        assert reached.wait(10)
        output.note("of the same bytes", 1)
        second = threading.Thread(target=output.flush)
        second.start()
        second.join(0.05)
        assert journal_of(output) == []
        go_on.set()
        first.join()
        second.join()
        assert journal_of(output) == ["of the same bytes"]


def test_an_interrupted_flush_is_done_again_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []

    def interrupted(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        if len(synced) == 1:
            raise KeyboardInterrupt

    output = resumable(layout_of(single(tmp_path), masked="a"))
    end(
        output,
        partial(output.write_weight, "a", 0, b"1"),
        partial(output.note, "first", 1),
        partial(monkeypatch.setattr, os, "fdatasync", interrupted),
        output.flush,
    )
    assert synced == ["m.pruned.safetensors", "m.pruned.safetensors", "journal"]
    assert journal_of(output) == ["first"]


def test_the_names_are_on_disk_before_the_first_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").readlink()))
    with resumable(layout_of(directory(tmp_path), masked="a")) as output:
        made = output.partial_path / "output"
        assert {made / "deep/er", made / "deep", made, made.parent, tmp_path} <= set(synced)


@pytest.mark.parametrize("make", [directory, single])
def test_no_file_of_the_output_is_open_any_more_when_it_gets_its_name(tmp_path: Path, make: Make) -> None:
    before = open_files()
    with resumable(layout_of(make(tmp_path), masked="a", form="bool")) as output:
        work(output)
        assert open_files() > before + 2
        output.commit()
        assert open_files() == before + 2  # the lock and the journal


def test_the_journal_is_not_in_the_output(tmp_path: Path) -> None:
    finish(layout_of(directory(tmp_path), masked="a"))
    assert not list(tmp_path.rglob("journal"))
    assert names_in(tmp_path) == ["ckpt", "ckpt-pruned"]
