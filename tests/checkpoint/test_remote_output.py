"""Outputs in an object store: the bytes of a local one, in order, continued, and locked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparseprune.checkpoint import (
    OutputLayout,
    TensorReader,
    growing,
    lay_out_masks,
    open_checkpoint,
    remote,
    remote_run,
)
from sparseprune.checkpoint.file_io import ChangedInputError
from sparseprune.checkpoint.objects import ObjectStore
from sparseprune.checkpoint.remote import RemotePath
from sparseprune.checkpoint.remote_output import RemoteOutput
from sparseprune.checkpoint.remote_run import Owner
from sparseprune.errors import CheckpointError, MachineError
from tests.checkpoint.files import IDENTITY, content, directory, fill, layout_of, sharded, single, stage

OUT = RemotePath("s3://memory/models/out")


class Recorded:
    """obstore's store in memory, and the names of what was written and removed, in order."""

    def __init__(self) -> None:
        from obstore.store import MemoryStore

        self.store = ObjectStore.__new__(ObjectStore)
        self.store.address = "s3://memory"
        self.store.bucket = MemoryStore()
        self.root = remote._Root(self.store)

    def objects(self, folder: str = "models/out") -> dict[str, bytes]:
        names = list(self.store.below(folder))
        return {name[len(folder) + 1 :]: bytes(self.store.bucket.get(name).bytes()) for name in sorted(names)}

    def put(self, name: str, data: bytes) -> None:
        self.store.bucket.put(f"models/out/{name}", data)


@pytest.fixture(scope="module", autouse=True)
def _obstore_is_at_work() -> None:
    """Its threads open files, once."""
    assert not Recorded().objects()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    found = Recorded()
    monkeypatch.setattr(remote, "_opened", lambda _: found.root)
    return found


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of objects in the order in which they were written."""
    names: list[str] = []
    for method in ("put", "send"):
        old = getattr(RemoteOutput, method)

        def heard(self: Any, name: str, *rest: Any, old: Any = old) -> Any:
            found = old(self, name, *rest)
            names.append(name)
            return found

        monkeypatch.setattr(RemoteOutput, method, heard)
    return names


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "PART_BYTES", 16)


def resumable(layout: OutputLayout, *, force: bool = False, **parts: str) -> RemoteOutput:
    return RemoteOutput(layout, force, IDENTITY | parts)


@pytest.mark.parametrize("form", [None, "bool", "packed"])
@pytest.mark.parametrize("masked", ["", "a", "bs", "abs"])
@pytest.mark.parametrize("make", [directory, sharded])
def test_a_remote_output_has_the_bytes_of_a_local_one(
    tmp_path: Path, store: Recorded, make: Callable[[Path], Path], masked: str, form: Any
) -> None:
    ckpt = make(tmp_path)
    stage(layout_of(ckpt, masked=masked, form=form))
    with RemoteOutput(layout_of(ckpt, OUT, masked, form)) as output:
        fill(output)
        output.commit()
    assert output.named
    assert store.objects() == content(tmp_path / "ckpt-pruned")


def test_a_single_file_comes_after_its_masks_and_its_report(
    tmp_path: Path, store: Recorded, written: list[str]
) -> None:
    path = single(tmp_path)
    stage(layout_of(path, masked="ab", form="packed"))
    with RemoteOutput(layout_of(path, OUT / "m.pruned.safetensors", "ab", "packed")) as output:
        fill(output)
        output.commit()
    local = content(tmp_path)
    del local["m.safetensors"]
    assert store.objects() == local
    assert written[-1] == "m.pruned.safetensors"


def test_config_and_index_come_last(tmp_path: Path, store: Recorded, written: list[str]) -> None:
    ckpt = sharded(tmp_path)
    (ckpt / "config.json").write_text("{}")
    (ckpt / "tokenizer.json").write_text("{}")
    with RemoteOutput(layout_of(ckpt, OUT, "ab", "bool")) as output:
        fill(output)
        output.complete()
        assert not {"config.json", "model.safetensors.index.json"} & store.objects().keys()
        output.commit()
    assert written[-2:] == ["config.json", "model.safetensors.index.json"]
    assert written.index("sparseprune/report.json") > written.index("2.safetensors")


def test_masks_alone_have_their_index_last(tmp_path: Path, store: Recorded, written: list[str]) -> None:
    ckpt = sharded(tmp_path)
    with RemoteOutput(lay_out_masks(open_checkpoint(ckpt), OUT, "ab", "packed")) as output:
        fill(output)
        output.commit()
    assert written[-1] == "masks.safetensors.index.json"
    assert "report.json" in store.objects()


def test_nothing_is_left_of_an_output_that_cannot_be_continued(tmp_path: Path, store: Recorded) -> None:
    layout = layout_of(sharded(tmp_path), OUT, "ab", "bool")
    output = RemoteOutput(layout)
    cut_short(output, fill, "0.safetensors", "1.safetensors")
    assert not output.kept
    assert not store.objects()


def cut_short(output: RemoteOutput, work: Callable[[RemoteOutput], None], *there: str) -> None:
    """A run that the machine ends when some work was done and these files are there."""

    def run() -> None:
        with output:
            work(output)
            while set(there) - output._done.keys():
                output._sending.refuse_failed()
            raise MachineError("the machine")

    with pytest.raises(MachineError, match="the machine"):
        run()


def copied(output: RemoteOutput, count: int) -> None:
    """Copies and notes the first files."""
    for part in output.layout.copies[:count]:
        output.copy(part)
        output.note(f"copy {part.file}", 1, [str(part.file)])


def test_a_rerun_writes_what_is_missing(tmp_path: Path, store: Recorded, written: list[str]) -> None:
    ckpt = sharded(tmp_path)
    stage(layout_of(ckpt, masked="", form=None))
    layout = layout_of(ckpt, OUT)
    output = resumable(layout)
    cut_short(output, lambda output: copied(output, 2), "0.safetensors", "1.safetensors")
    assert output.kept
    there = set(written)
    assert len(there) == 2
    written.clear()
    with resumable(layout) as output:
        assert output.resumed
        assert len(output.finished) == 2
        fill(output)
        output.commit()
    assert not there & set(written)
    assert store.objects() == content(tmp_path / "ckpt-pruned")


def test_an_object_that_changed_is_written_again(tmp_path: Path, store: Recorded, written: list[str]) -> None:
    layout = layout_of(sharded(tmp_path), OUT)
    cut_short(resumable(layout), lambda output: copied(output, 1), "0.safetensors")
    store.put("0.safetensors", b"of somebody else")
    with resumable(layout) as output:
        assert output.resumed
        assert not output.finished
        fill(output)
        output.commit()
    assert store.objects()["0.safetensors"] != b"of somebody else"


def test_an_input_that_changed_leaves_nothing_of_the_run_that_was_continued(
    tmp_path: Path, store: Recorded
) -> None:
    layout = layout_of(sharded(tmp_path), OUT)
    cut_short(resumable(layout), lambda output: copied(output, 1), "0.safetensors")
    store.put("1.safetensors", b"written, and not noted when the run was killed")

    def changed() -> None:
        with resumable(layout) as output:
            assert output.resumed
            raise ChangedInputError("another input")

    with pytest.raises(ChangedInputError):
        changed()
    assert not store.objects()


def test_another_spec_starts_over_and_says_what_changed(tmp_path: Path, store: Recorded) -> None:
    ckpt = sharded(tmp_path)
    layout = layout_of(ckpt, OUT)
    cut_short(resumable(layout), lambda output: copied(output, 1), "0.safetensors")
    with resumable(layout, spec="other") as output:
        assert (output.started_over, output.resumed) == (("spec",), False)
        assert not output._existing()
        fill(output)
        output.commit()
    stage(layout_of(ckpt))
    assert store.objects() == content(tmp_path / "ckpt-pruned")


def test_notes_wait_for_the_files_that_they_are_about(tmp_path: Path, store: Recorded) -> None:
    layout = layout_of(sharded(tmp_path), OUT, "ab")
    first, second = (layout.weights[name] for name in "ab")

    def work(output: RemoteOutput) -> None:
        output.note("decided", 7, ())
        output.write_weight("a", 0, bytes(first.nbytes))
        output.note("a", 1, [str(first.file)])
        output.write_weight("b", 0, bytes(second.nbytes // 2))
        output.note("half of b", 2, [str(second.file)])
        output.note("all so far", 3)

    cut_short(resumable(layout), work, str(first.file))
    with resumable(layout) as output:
        assert dict(output.finished) == {"decided": 7, "a": 1}
        output.discard()
    assert not store.objects()


def test_a_target_with_objects_is_refused_without_force(tmp_path: Path, store: Recorded) -> None:
    layout = layout_of(sharded(tmp_path), OUT)
    store.put("notes.txt", b"")
    with pytest.raises(CheckpointError) as refusal, resumable(layout):
        pass
    assert str(refusal.value) == f"{OUT}: already exists; give another name with -o, or --force to replace it"
    with pytest.raises(CheckpointError) as refusal, resumable(layout, force=True):
        pass
    assert str(refusal.value) == (
        f"{OUT}: --force replaces what sparseprune wrote, and this directory has no report of it; "
        "remove it yourself, or give another name with -o"
    )
    with pytest.raises(CheckpointError):
        resumable(layout).refuse_early()
    assert list(store.objects()) == ["notes.txt"]


def test_force_takes_the_index_first_and_the_rest_last(
    tmp_path: Path, store: Recorded, written: list[str]
) -> None:
    ckpt = sharded(tmp_path)
    old = {"model.safetensors.index.json", "config.json", "old.safetensors", "sparseprune/report.json"}
    for name in old:
        store.put(name, b"old")
    layout = layout_of(ckpt, OUT)
    with resumable(layout, force=True) as output:
        assert old <= store.objects().keys()
        fill(output)
        output.complete()
        assert "old.safetensors" in store.objects()
        assert not {"model.safetensors.index.json", "config.json"} & store.objects().keys()
        output.commit()
    stage(layout_of(ckpt))
    assert store.objects() == content(tmp_path / "ckpt-pruned")


def test_an_output_inside_of_its_input_is_refused(tmp_path: Path, store: Recorded) -> None:
    import dataclasses

    layout = layout_of(sharded(tmp_path), OUT)
    for where, text in (("", "output and input are the same"), ("/deep", "the output lies inside the input")):
        source = dataclasses.replace(layout.checkpoint, path=OUT)
        target = RemotePath(f"{OUT}{where}")
        with pytest.raises(CheckpointError, match=text):
            RemoteOutput(dataclasses.replace(layout, checkpoint=source, target=target)).refuse_early()


def test_a_second_writer_is_refused(tmp_path: Path, store: Recorded) -> None:
    layout = layout_of(sharded(tmp_path), OUT)
    own = Owner.here()
    with resumable(layout) as output:
        with pytest.raises(CheckpointError) as refusal, resumable(layout):
            pass
        assert str(refusal.value) == (
            f"s3://memory/models/out: process {own.pid} on {own.host} is writing this output; wait, or give "
            "another name with -o"
        )
        fill(output)
        output.commit()


def lock_of(store: Recorded, **changes: Any) -> None:
    own = json.loads(remote_run._json(Owner.here())) | changes
    store.put("sparseprune/.run/lock", json.dumps(own).encode())


def test_the_lock_of_a_dead_process_is_taken_over_at_once(tmp_path: Path, store: Recorded) -> None:
    lock_of(store, start="1", token="other")
    heard: list[str] = []
    output = resumable(layout_of(sharded(tmp_path), OUT))
    output.tell = heard.append
    with output:
        fill(output)
        output.commit()
    assert not heard
    assert "sparseprune/.run/lock" not in store.objects()


def test_the_lock_of_another_machine_is_taken_over_after_its_silence(
    tmp_path: Path, store: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock_of(store, host="far", place="elsewhere", pid=7, token="other")
    heard: list[str] = []
    output = resumable(layout_of(sharded(tmp_path), OUT))
    output._lock._silent = 0.2
    output.tell = heard.append
    with output:
        fill(output)
        output.commit()
    wait = "waiting 0.2 s to see whether it still is"
    assert heard == [f"{OUT}: process 7 on far was writing this output; {wait}"]


def test_another_machine_that_renews_its_lock_is_not_disturbed(tmp_path: Path, store: Recorded) -> None:
    lock_of(store, host="far", place="elsewhere", pid=7, token="other")
    output = resumable(layout_of(sharded(tmp_path), OUT))
    output._lock._silent = 5
    output.tell = lambda _: lock_of(store, host="far", place="elsewhere", pid=7, token="other", renewed=1)
    with pytest.raises(CheckpointError, match="process 7 on far is writing this output"), output:
        pass


def test_a_run_that_lost_its_lock_stops_and_removes_nothing(tmp_path: Path, store: Recorded) -> None:
    layout = layout_of(sharded(tmp_path), OUT)
    output = resumable(layout)
    output._lock._renewed = 0.01

    def work(output: RemoteOutput) -> None:
        fill(output)
        lock_of(store, host="far", place="elsewhere", token="other")
        assert output._lock.lost.wait(10)
        with pytest.raises(MachineError, match="another run has taken over this output"):
            output.complete()

    cut_short(output, work)
    assert {"0.safetensors", "sparseprune/.run/lock"} <= store.objects().keys()
    assert not output.kept


def test_portions_are_written_elsewhere_and_known_here(
    tmp_path: Path, store: Recorded, written: list[str]
) -> None:
    import pickle

    ckpt = sharded(tmp_path)
    layout = layout_of(ckpt, OUT, "ab", "packed")
    files = [str(file.path) for file in layout.files if not file.path.name.endswith("index.json")]
    with resumable(layout) as output:
        for file in files:
            portion = pickle.loads(pickle.dumps(output.portion([file])))
            assert not portion.keeps_parts
            with portion.open() as part, TensorReader() as reader:
                for copy in layout.copies:
                    part.copy(copy)
                for name in layout.weights:
                    part.write_weight(name, 0, reader.read(layout.checkpoint.tensors[name]))
                    part.write_mask(name, 0, b"\1" * layout.masks[name].numel)
                part.flush()
            assert [*part.facts] == [file]
            output.portion_done([file], part.facts)
        fill(output)
        output.commit()
    assert not set(files) & set(written)
    stage(layout_of(ckpt, masked="ab", form="packed"))
    assert store.objects() == content(tmp_path / "ckpt-pruned")
