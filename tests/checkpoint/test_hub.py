"""Models of the hub as a store: commits, listings, parts, files fetched into the cache, and failures."""

import errno
import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparseprune.checkpoint.hub import HubAddress, HubStore, pinned
from sparseprune.checkpoint.threads import Worker
from sparseprune.errors import CheckpointError, MachineError
from tests.hub import Hub, reach

MODEL = "ours/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A large file and small ones, one of them in a folder."""
    home = tmp_path / "tiny"
    (home / "onnx").mkdir(parents=True)
    (home / "config.json").write_text('{"model_type": "llama"}')
    (home / "onnx" / "readme").write_text("words")
    for number in (1, 2, 3):
        data = bytes((7 * at + number) % 251 for at in range(400_000))
        (home / f"model-0000{number}-of-00003.safetensors").write_bytes(data)
    return home


def shard(number: int) -> str:
    return f"model-0000{number}-of-00003.safetensors"


def opened(commit: str) -> HubStore:
    return HubStore(f"hf://{MODEL}@{commit}")


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("hf://a/b", HubAddress("a/b")),
        ("hf://a/b@main", HubAddress("a/b", "main")),
        (f"hf://a/b@{COMMIT}/x/y", HubAddress("a/b", COMMIT, "x/y")),
        ("hf://a/b/model.safetensors", HubAddress("a/b", "", "model.safetensors")),
        ("hf://a/b@refs/pr/12/sub", HubAddress("a/b", "refs/pr/12", "sub")),
        ("hf://a/b@mine%2Fnew/sub", HubAddress("a/b", "mine/new", "sub")),
    ],
)
def test_an_address_names_a_model_a_revision_and_what_is_inside(address: str, found: HubAddress) -> None:
    assert HubAddress.of(address) == found
    assert HubAddress.of(str(found)) == found


@pytest.mark.parametrize("address", ["hf://gpt2", "hf://", "hf://a/", "hf://a//b", "hf://a b/c", "hf:///a/b"])
def test_an_address_without_a_model_is_refused(address: str) -> None:
    with pytest.raises(CheckpointError, match=f"^{address}: names no model of the hub; wanted hf://ORG"):
        HubAddress.of(address)


@pytest.mark.parametrize(("kind", "what"), [("datasets", "a data set"), ("spaces", "a space")])
def test_what_is_no_model_is_refused(kind: str, what: str) -> None:
    with pytest.raises(CheckpointError, match=f"^hf://{kind}/a/b: {what} of the hub, which holds no check"):
        HubAddress.of(f"hf://{kind}/a/b")


def test_a_branch_a_tag_and_a_pull_request_are_pinned_by_one_request_each(hub: Hub, folder: Path) -> None:
    main = hub.put(MODEL, folder)
    other = hub.put(MODEL, folder, "refs/pr/1")
    hub.models[MODEL].refs |= {"v1.0": main, "mine/new": other}
    for revision, commit in {
        "": main,
        "@main": main,
        "@v1.0": main,
        "@refs/pr/1": other,
        "@mine%2Fnew": other,
    }.items():
        hub.forget()
        assert pinned(f"hf://{MODEL}{revision}/x") == (f"hf://{MODEL}@{commit}/x", False)
        assert len(hub.asked) == 1
    assert main != other


def test_a_commit_is_pinned_without_a_request(hub: Hub) -> None:
    assert pinned(f"hf://{MODEL}@{COMMIT}") == (f"hf://{MODEL}@{COMMIT}", False)
    assert hub.asked == []


def test_one_request_lists_sizes_and_the_names_of_contents(hub: Hub, folder: Path) -> None:
    store = opened(hub.put(MODEL, folder))
    found = store.below("")
    data = (folder / shard(1)).read_bytes()
    assert set(found) == {"config.json", "onnx/readme", *map(shard, (1, 2, 3))}
    assert found[shard(1)].nbytes == len(data)
    assert found[shard(1)].etag == hashlib.sha256(data).hexdigest()
    assert set(store.below("onnx")) == {"onnx/readme"}
    assert store.below("onn") == {}
    assert store.facts("config.json") == found["config.json"]
    assert store.facts("onnx") is None
    assert len(hub.asked) == 1


def test_a_part_of_a_large_file_costs_as_many_bytes(hub: Hub, folder: Path) -> None:
    store = opened(hub.put(MODEL, folder))
    data = (folder / shard(2)).read_bytes()
    store.below("")
    hub.forget()
    assert store.read(shard(2), 1000, 5000) == data[1000:5000]
    assert hub.sent == 4000
    assert store.read(shard(2), 399_990, 400_100) == data[-10:]
    assert store.read(shard(2), 500_000, 500_010) == b""
    assert hub.sent == 4010


def test_a_small_file_is_asked_for_once(hub: Hub, folder: Path) -> None:
    store = opened(hub.put(MODEL, folder))
    assert store.read("config.json", 0, 8) == b'{"model_'
    hub.forget()
    assert store.read("config.json", 2, 100) == b'model_type": "llama"}'
    assert hub.asked == []


def test_a_server_that_gives_no_parts_is_refused_before_its_gigabytes_come(hub: Hub, folder: Path) -> None:
    store = opened(hub.put(MODEL, folder))
    hub.has_parts = False
    assert store.read("config.json", 2, 7) == b"model"
    with pytest.raises(OSError, match="the server of the hub gives no parts of files"):
        store.read(shard(1), 0, 8)


def test_a_file_is_fetched_into_the_cache_and_read_there_from_then_on(hub: Hub, folder: Path) -> None:
    commit = hub.put(MODEL, folder)
    path = opened(commit).local(shard(3))
    assert path.read_bytes() == (folder / shard(3)).read_bytes()
    assert path.parts[-3:] == ("snapshots", commit, shard(3))
    hub.forget()
    again = opened(commit)
    assert again.local(shard(3)) == path
    assert again.read(shard(3), 10, 20) == path.read_bytes()[10:20]
    assert hub.requests("resolve") == hub.requests("cdn") == []


def test_bytes_are_told_while_a_file_comes(hub: Hub, folder: Path) -> None:
    store = opened(hub.put(MODEL, folder))
    told: list[tuple[str, int, int]] = []
    store.hears = lambda *words: told.append(words)
    store.local(shard(2))
    assert told[0] == (shard(2), 0, 400_000)
    assert {(name, size) for name, _, size in told} == {(shard(2), 400_000)}


def test_the_second_shard_comes_while_the_first_is_worked_on(hub: Hub, folder: Path) -> None:
    store = opened(hub.put(MODEL, folder))
    store.local(shard(1))
    assert store.local(shard(2)).is_file()
    assert len(hub.requests("GET /cdn")) in {2, 3}, "shard 3 may be on its way"
    store.local(shard(3))
    assert len(hub.requests("GET /cdn")) == 3


def test_no_shard_comes_unasked_after_one_out_of_the_row(hub: Hub, folder: Path) -> None:
    store = opened(hub.put(MODEL, folder))
    store.local(shard(2))
    assert store._fetches == {}


def test_what_is_not_there_is_told_as_of_local_files(hub: Hub, folder: Path) -> None:
    store = opened(hub.put(MODEL, folder))
    for look in (lambda: store.local("no.json"), lambda: store.read("no.json", 0, 1)):
        with pytest.raises(FileNotFoundError):
            look()


def test_a_branch_that_moves_changes_nothing(hub: Hub, folder: Path) -> None:
    store = HubStore(f"hf://{MODEL}") if hub.put(MODEL, folder) else None
    assert store is not None
    before = store.below("")
    (folder / "config.json").write_text("{}")
    hub.put(MODEL, folder)
    assert store.below("") == before
    assert store.read("config.json", 0, 100) == b'{"model_type": "llama"}'


def test_a_cached_file_of_another_length_is_named(hub: Hub, folder: Path) -> None:
    commit = hub.put(MODEL, folder)
    path = opened(commit).local(shard(3))
    path.write_bytes(b"short")
    with pytest.raises(OSError, match=f"has 5 bytes, wanted 400000; remove .*{path.resolve().name}"):
        opened(commit).local(shard(3))


def test_offline_the_cache_tells_the_commit_its_files_and_their_names(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import hf_hub_download

    commit = hub.put(MODEL, folder)
    for name in ("config.json", shard(1), "onnx/readme"):
        hf_hub_download(MODEL, name)
    listed = opened(commit).below("")
    cache = Path(opened(commit).local("config.json")).parents[4]
    hub.forget()
    reach(monkeypatch, hub.endpoint, cache, offline=True)
    assert pinned(f"hf://{MODEL}") == (f"hf://{MODEL}@{commit}", True)
    store = opened(commit)
    assert store.below("") == {name: listed[name] for name in ("config.json", "onnx/readme", shard(1))}
    assert store.read(shard(1), 5, 9) == (folder / shard(1)).read_bytes()[5:9]
    assert hub.asked == []


@pytest.mark.parametrize("address", [f"hf://{MODEL}", f"hf://{MODEL}@v2"])
def test_offline_without_a_copy_one_line_says_so(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str
) -> None:
    reach(monkeypatch, hub.endpoint, tmp_path, offline=True)
    with pytest.raises(MachineError) as error:
        pinned(address)
    assert str(error.value) == (
        f"{address}: not in the local cache, and HF_HUB_OFFLINE forbids to fetch it; "
        "unset it, or fetch the model before"
    )


def test_a_cached_copy_does_where_the_hub_fails_for_a_moment(hub: Hub, folder: Path) -> None:
    from huggingface_hub import hf_hub_download

    commit = hub.put(MODEL, folder)
    hf_hub_download(MODEL, "config.json")
    hub.refusals = [503]
    assert pinned(f"hf://{MODEL}")[0] == f"hf://{MODEL}@{commit}"
    assert hub.refusals == []


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)


@pytest.mark.usefixtures("_impatient")
def test_a_hub_that_fails_for_a_moment_is_asked_again(hub: Hub, folder: Path) -> None:
    commit = hub.put(MODEL, folder)
    hub.refusals = [503, 500]
    assert pinned(f"hf://{MODEL}")[0] == f"hf://{MODEL}@{commit}"
    hub.refusals = [502]
    store = opened(commit)
    assert store.facts("config.json") is not None
    hub.refusals = [504]
    assert store.read(shard(1), 0, 4) == (folder / shard(1)).read_bytes()[:4]


SIGN_IN = "sign in with `hf auth login`, or set HF_TOKEN"


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize(
    ("statuses", "kind", "line"),
    [
        ([401], MachineError, f"the hub does not know the token (401); {SIGN_IN}"),
        ([403], MachineError, "the hub refuses access (403); use a token that may read this model"),
        (
            [429],
            MachineError,
            f"the hub had too many requests (429); wait some minutes, or {SIGN_IN}",
        ),
        ([503] * 3, MachineError, "the hub answers with the error 503; run it again later"),
        ([418], MachineError, "the hub answers with the error 418; run it again later"),
    ],
)
def test_each_refusal_has_its_line(
    hub: Hub, folder: Path, statuses: list[int], kind: type[Exception], line: str
) -> None:
    hub.put(MODEL, folder)
    hub.refusals = statuses.copy()
    with pytest.raises(kind) as error:
        pinned(f"hf://{MODEL}")
    assert str(error.value) == f"hf://{MODEL}: {line}"
    assert hub.refusals == []


def test_a_model_or_revision_that_is_not_there_is_a_wrong_name(hub: Hub, folder: Path) -> None:
    hub.put(MODEL, folder)
    with pytest.raises(CheckpointError, match=r"^hf://ours/nothing: no such model on the hub"):
        pinned("hf://ours/nothing")
    with pytest.raises(CheckpointError, match=f"^hf://{MODEL}@v9: no revision 'v9'; wanted a branch"):
        pinned(f"hf://{MODEL}@v9")


def test_a_gated_model_says_where_to_ask_and_is_read_with_a_token(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.put(MODEL, folder)
    hub.models[MODEL].is_gated = True
    with pytest.raises(MachineError) as error:
        pinned(f"hf://{MODEL}")
    page = f"{hub.endpoint}/{MODEL}"
    assert str(error.value) == f"hf://{MODEL}: the model is gated; ask for access at {page}, then {SIGN_IN}"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert pinned(f"hf://{MODEL}")[0] == f"hf://{MODEL}@{commit}"
    assert opened(commit).local("config.json").read_text() == '{"model_type": "llama"}'


@pytest.mark.usefixtures("_impatient")
def test_no_network_has_its_line(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reach(monkeypatch, "http://127.0.0.1:9", tmp_path)
    line = "the hub at http://127.0.0.1:9 does not answer; check the network, or run it again later"
    with pytest.raises(MachineError, match=f"^hf://{MODEL}: {line}$"):
        pinned(f"hf://{MODEL}")


@pytest.mark.usefixtures("_impatient")
def test_an_answer_that_breaks_off_is_asked_for_again_and_then_told(hub: Hub, folder: Path) -> None:
    store = opened(hub.put(MODEL, folder))
    store.below("")
    hub.cut = 1000
    with pytest.raises(OSError, match=r"the hub at .* does not answer") as error:
        store.read(shard(1), 0, 2000)
    assert error.value.errno == errno.EHOSTUNREACH
    with pytest.raises(OSError, match=r"the hub at .* does not answer|another number of bytes"):
        store.local(shard(3))
    hub.cut = 0
    assert store.local(shard(3)).stat().st_size == 400_000


def test_a_file_that_the_disk_has_no_room_for_is_not_begun(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(hub.put(MODEL, folder))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=300_000))
    with pytest.raises(OSError, match=r"has 400.00 kB, and 300.00 kB are free") as error:
        store.local(shard(1))
    assert error.value.errno == errno.ENOSPC
    assert str(error.value.strerror).startswith(f"{shard(1)} has ")
    assert hub.requests("resolve") == []


def test_a_fetch_that_is_interrupted_leaves_nothing_and_can_be_begun_again(hub: Hub, folder: Path) -> None:
    store = opened(hub.put(MODEL, folder))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    store.hears = interrupt
    with pytest.raises(KeyboardInterrupt):
        store.local(shard(3))
    store.hears = None
    assert store.local(shard(3)).stat().st_size == 400_000


def test_a_system_without_threads_fetches_all_the_same(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Worker, "begin", lambda _: False)
    store = HubStore(f"hf://{MODEL}@{hub.put(MODEL, folder)}")
    name = next(path.name for path in sorted(folder.glob("*.safetensors")))
    assert store.local(name).read_bytes() == (folder / name).read_bytes()
