"""Commands that write to an object store: the bytes of a local output, from wherever the input is."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparseprune.checkpoint import objects
from tests.calibration.models import made
from tests.checkpoint.files import content
from tests.cli.removal import CASES, write
from tests.commands import ok, run
from tests.engine.reconstruction.oracle import moments
from tests.samples import (
    CHANNELS,
    TWO_OF_FOUR,
    mlp_tensors,
    unmarked,
    without_marks,
    write_shards,
    write_spec,
)
from tests.stores import Asked, Front, download, front, keys, put, upload

TOLD = ("report.json", "sparseprune/report.json")


def told_apart(files: dict[str, bytes]) -> dict[str, bytes]:
    """Files without what tells of the command and of its paths."""
    return {name: data for name, data in without_marks(files).items() if name not in TOLD}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    shards: dict[str, dict[str, object]] = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in mlp_tensors().items():
        shards["a.safetensors" if "up" in name else "b.safetensors"][name] = tensor
    return write_shards(tmp_path / "dense", shards)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [TWO_OF_FOUR, CHANNELS], ids=["2of4", "channels"])
@pytest.mark.parametrize("command", ["apply", "mask"])
def test_writes_to_a_store_what_it_writes_to_a_folder(
    command: str, text: str, dense: Path, bucket: str, tmp_path: Path
) -> None:
    spec = write_spec(tmp_path, text)
    ok(command, dense, spec, "-o", tmp_path / "local", "--jobs", 2)
    local = content(tmp_path / "local")
    for source, out in ((dense, "from-folder"), (upload(dense, f"{bucket}/dense"), "from-store")):
        said = ok(command, source, spec, "-o", f"{bucket}/{out}", "--jobs", 2)
        assert f"{bucket}/{out}" in said.out + said.err
        written = download(f"{bucket}/{out}")
        assert written.keys() == local.keys()
        assert told_apart(written) == told_apart(local)
        report = json.loads(next(written[name] for name in TOLD if name in written))
        assert report["output"] == f"{bucket}/{out}"


def test_a_single_file_is_written_beside_its_report(dense: Path, bucket: str, tmp_path: Path) -> None:
    spec, address = (
        write_spec(tmp_path, TWO_OF_FOUR),
        upload(dense / "a.safetensors", f"{bucket}/a.safetensors"),
    )
    ok("apply", dense / "a.safetensors", spec, "--mask-format", "bool")
    ok("apply", address, spec, "--mask-format", "bool")
    local = {name: data for name, data in content(dense).items() if name.startswith("a.pruned")}
    written = {name: data for name, data in download(bucket).items() if name != "a.safetensors"}
    assert written.keys() == local.keys()
    assert written["a.pruned.safetensors"] == local["a.pruned.safetensors"]
    assert written["a.pruned.masks.safetensors"] == local["a.pruned.masks.safetensors"]


def test_masks_are_put_back_from_one_store_into_another_folder_of_it(
    dense: Path, bucket: str, tmp_path: Path
) -> None:
    spec = write_spec(tmp_path, TWO_OF_FOUR)
    ok("mask", dense, spec, "-o", tmp_path / "masks")
    ok("reapply", dense, tmp_path / "masks", "-o", tmp_path / "local")
    address = upload(dense, f"{bucket}/dense")
    ok("reapply", address, upload(tmp_path / "masks", f"{bucket}/masks"), "-o", f"{bucket}/out")
    assert told_apart(download(f"{bucket}/out")) == told_apart(content(tmp_path / "local"))


@pytest.mark.parametrize("name", ["channels", "experts"])
def test_what_is_removed_is_gone_from_a_store_as_well(name: str, bucket: str, tmp_path: Path) -> None:
    case = CASES[name]
    dense = write(tmp_path / "dense", case.tensors(), case.config, shards=3)
    ok("remove", dense, case.spec, *case.options, "-o", tmp_path / "local")
    ok("remove", dense, case.spec, *case.options, "-o", f"{bucket}/out")
    assert told_apart(download(f"{bucket}/out")) == told_apart(content(tmp_path / "local"))
    ok("mask", dense, case.spec, *case.options, "-o", f"{bucket}/masks")
    ok("remove", dense, "--masks", f"{bucket}/masks", "-o", f"{bucket}/by-masks")
    by_masks, by_spec = (
        {
            file: unmarked(data)
            for file, data in download(f"{bucket}/{out}").items()
            if file.endswith(".safetensors")
        }
        for out in ("by-masks", "out")
    )
    assert by_masks == by_spec


def test_a_plan_shows_the_address_and_whether_something_is_there(
    dense: Path, bucket: str, tmp_path: Path
) -> None:
    spec = write_spec(tmp_path, TWO_OF_FOUR)
    words = ("plan", dense, spec, "-o", f"{bucket}/out", "--json")
    assert json.loads(ok(*words).out)["output"] == f"{bucket}/out"
    assert json.loads(ok(*words).out)["output_exists"] is False
    put(f"{bucket}/out/model.safetensors", b"")
    assert json.loads(ok(*words).out)["output_exists"] is True


def test_what_is_there_is_replaced_with_force_alone(dense: Path, bucket: str, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, TWO_OF_FOUR)
    ok("apply", dense, spec, "-o", f"{bucket}/out")
    said = run("apply", dense, spec, "-o", f"{bucket}/out")
    assert (said.code, said.err) == (
        2,
        f"sparseprune: {bucket}/out: already exists; give another name with -o, or --force to replace it\n",
    )
    ok("apply", dense, spec, "-o", f"{bucket}/out", "--force", "--no-masks")
    assert "sparseprune/masks-00001-of-00002.safetensors" not in keys(f"{bucket}/out")
    ok("verify", f"{bucket}/out", spec)


def test_an_output_that_lies_in_its_input_is_refused(dense: Path, bucket: str, tmp_path: Path) -> None:
    spec, address = write_spec(tmp_path, TWO_OF_FOUR), upload(dense, f"{bucket}/dense")
    for out, why in (
        (address, "output and input are the same; give another name with -o"),
        (f"{address}/out", f"the output lies inside the input {address}; give another place with -o"),
    ):
        said = run("apply", address, spec, "-o", out)
        assert (said.code, said.err) == (2, f"sparseprune: {out}: {why}\n")


def test_says_which_bucket_is_not_there(dense: Path, bucket: str, tmp_path: Path) -> None:
    said = run("apply", dense, write_spec(tmp_path, TWO_OF_FOUR), "-o", "s3://no-such-bucket/out")
    why = "there is no bucket s3://no-such-bucket; give an existing one"
    assert said.code == 3
    assert said.err.startswith("sparseprune: s3://no-such-bucket/out")
    assert said.err.endswith(f"{why}\n")
    assert said.err.count("\n") == 1


def test_files_of_several_parts_are_whole(bucket: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    (tmp_path / "dense").mkdir()
    names = ("0.up.weight", "0.up.bias", "1.up.weight")
    tensors = {name: torch.randn(1024, 3000, generator=generator) for name in names}
    save_file(tensors, tmp_path / "dense" / "model.safetensors")
    spec = write_spec(tmp_path, TWO_OF_FOUR)
    ok("apply", tmp_path / "dense", spec, "-o", tmp_path / "local", "--mask-format", "bool")
    ok("apply", tmp_path / "dense", spec, "-o", f"{bucket}/out", "--mask-format", "bool", "--jobs", 2)
    assert told_apart(download(f"{bucket}/out")) == told_apart(content(tmp_path / "local"))


def test_an_upload_that_cannot_be_completed_is_taken_back(
    bucket: str, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dense").mkdir()
    save_file({"0.up.weight": torch.ones(2048, 2048)}, tmp_path / "dense" / "model.safetensors")
    spec = write_spec(tmp_path, TWO_OF_FOUR)
    refused: list[str] = []

    def instead(asked: Asked, _: int) -> tuple[int, bytes] | None:
        if "partNumber=2" not in asked.path:
            return None
        refused.append(asked.path)
        return 403, b"<Error><Code>AccessDenied</Code></Error>"

    with front(s3_server, monkeypatch) as seen:
        seen.instead = instead
        assert run("apply", tmp_path / "dense", spec, "-o", f"{bucket}/out").code == 3
    assert refused
    name = bucket.removeprefix("s3://")
    with urllib.request.urlopen(f"{s3_server}/{name}?uploads") as answer:
        assert b"<Upload>" not in answer.read()
    assert "model.safetensors" not in keys(f"{bucket}/out")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and a llama; nothing in it is changed."""
    return made(tmp_path_factory.mktemp("remote"), "llama")


@pytest.mark.usefixtures("quiet_transformers")
def test_statistics_are_collected_into_a_store(home: Path, bucket: str, tmp_path: Path) -> None:
    words = ("calibrate", home / "llama", "--text", home / "words.txt", "--length", 16, "--sequences", 5)
    for out in (tmp_path / "local", f"{bucket}/out"):
        assert ok(*words, "-o", out).out == f"{out}\n"
    assert told_apart(download(f"{bucket}/out")) == told_apart(content(tmp_path / "local"))


@pytest.mark.usefixtures("quiet_transformers")
def test_a_sweep_reads_back_what_it_wrote(home: Path, bucket: str, tmp_path: Path) -> None:
    spec = write_spec(
        tmp_path,
        'version = 1\n[reconstruct]\nmethod = "refit"\n[scope.matrix]\nstructure = "matrices"\n'
        "block = [1, 1]\nshape = [1, 4]\nnnz = 2\n",
    )
    sizes = ("--text", home / "words.txt", "--length", 12, "--sequences", 8)
    for verb in ("apply", "remove"):
        which = spec if verb == "apply" else "mlp-channels"
        more = () if verb == "apply" else ("--reconstruct", "refit")
        for out in (tmp_path / verb, f"{bucket}/{verb}"):
            ok(verb, home / "llama", which, *sizes, *more, "-o", out)
        assert told_apart(download(f"{bucket}/{verb}")) == told_apart(content(tmp_path / verb))


def test_a_pattern_that_is_broken_again_is_found_before_the_index_is_there(
    bucket: str, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    names = ("w0", "w1")
    shards = {f"{name}.safetensors": {name: torch.randn(32, 32, generator=generator)} for name in names}
    first = write_shards(tmp_path / "dense", shards)
    save_file({name: moments(32, 300, generator) for name in names}, tmp_path / "stats.safetensors")
    rules = '[scope.proj]\ntensors = "w{n}"\nblock = [16, 1]\nshape = [1, 8]\nnnz = 4\n'
    head = 'version = 1\n[reconstruct]\nfile = "stats.safetensors"\n'
    (tmp_path / "once.toml").write_text(head + rules)
    again = rules.replace("[16, 1]", "[1, 1]").replace("[1, 8]", "[1, 4]").replace("= 4", "= 2")
    (tmp_path / "again.toml").write_text(head + again)
    ok("apply", first, tmp_path / "once.toml", "-o", tmp_path / "pruned")
    heard = []
    for out in (tmp_path / "local", f"{bucket}/out"):
        said = ok("apply", tmp_path / "pruned", tmp_path / "again.toml", "-o", out)
        heard.append([line for line in said.err.splitlines() if "breaks a pattern" in line])
    assert heard[0] == heard[1] != []
    assert told_apart(download(f"{bucket}/out")) == told_apart(content(tmp_path / "local"))


class Killer:
    """Ends a command by a signal at its first request for an object, once another one is written."""

    def __init__(self, kind: signal.Signals, at: str, after: str) -> None:
        self.kind, self.at, self.after = kind, at, after
        self.process: subprocess.Popen[str] | None = None
        self.seen = threading.Event()

    def __call__(self, asked: Asked, _: int) -> tuple[int, bytes] | None:
        if asked.method == "PUT" and asked.path.endswith(self.after):
            self.seen.set()
        if asked.method == "PUT" and self.at in asked.path and self.process is not None:
            self.seen.wait(30)
            time.sleep(0.3)  # until the other one is there
            self.process.send_signal(self.kind)
            if self.kind == signal.SIGKILL:
                self.process.wait()
                return 503, b""
        return None


def puts(seen: Front) -> list[str]:
    return [one.path.partition("/out/")[2] for one in seen.asked if one.method == "PUT"]


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_a_command_that_was_ended_half_way_is_continued(
    kind: signal.Signals,
    dense: Path,
    bucket: str,
    s3_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec, out = write_spec(tmp_path, TWO_OF_FOUR), f"{bucket}/out"
    ok("apply", dense, spec, "-o", tmp_path / "local")
    words = ("apply", dense, spec, "-o", out, "--jobs", 1)
    with front(s3_server, monkeypatch) as seen:
        killer = Killer(kind, "/a.safetensors", "/.run/00000000")
        seen.instead = killer
        command = [sys.executable, "-m", "sparseprune", *map(str, words)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
            killer.process = process
            _, err = process.communicate(timeout=120)
        there = set(keys(out))
        assert not {"config.json", "model.safetensors.index.json"} & there
        assert "b.safetensors" in there
        assert process.returncode != 0
        if kind == signal.SIGINT:
            assert f"what is finished is kept in {out}: the same command continues" in err
            assert "sparseprune/.run/lock" not in there
        killer.process = None
        seen.asked.clear()
        said = ok(*words)
        again = puts(seen)
    assert "an unfinished run is continued" in said.err
    if kind == signal.SIGKILL:  # else what was on its way has arrived
        assert "a.safetensors" in again
    assert not {"b.safetensors", "sparseprune/masks-00002-of-00002.safetensors"} & set(again) & there
    assert told_apart(download(out)) == told_apart(content(tmp_path / "local"))


def refusing(answer: tuple[int, bytes], asked: Asked, _: int) -> tuple[int, bytes] | None:
    """An answer to whoever writes one of the shards."""
    return answer if asked.method == "PUT" and asked.path.endswith("b.safetensors") else None


def test_a_store_that_refuses_is_told_in_one_line(
    dense: Path, bucket: str, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_GIVEN_UP", timedelta(seconds=0))
    spec, out = write_spec(tmp_path, TWO_OF_FOUR), f"{bucket}/out"
    told = {
        (403, b"<Error><Code>ExpiredToken</Code></Error>"): "the credentials have expired; sign in again, or",
        (403, b"<Error><Code>AccessDenied</Code></Error>"): "permission denied",
        (503, b"<Error><Message>slow down</Message></Error>"): "the store answered 503: slow down",
    }
    for answer, why in told.items():
        with front(s3_server, monkeypatch) as seen:
            seen.instead = partial(refusing, answer)
            said = run("apply", dense, spec, "-o", out)
        assert said.code == 3
        line = f"sparseprune: {out}/b.safetensors: cannot be written: {why}"
        assert [one.startswith(line) for one in said.err.splitlines()].count(True) == 1, said.err
        assert not {"config.json", "model.safetensors.index.json"} & set(keys(out))
