"""Commands that read a model from the hub."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from sparseprune.checkpoint.remote import forget_stores
from tests.commands import ok, python, refused, run
from tests.hub import Hub, reach
from tests.samples import TWO_OF_FOUR, mlp_tensors, unmarked, write_shards

MODEL = "ours/tiny"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards with their index, a config, a tokenizer and a card."""
    home = tmp_path / "models" / "tiny"
    home.parent.mkdir()
    tensors = mlp_tensors()
    first = {name: each for name, each in tensors.items() if not name.startswith("1.")}
    second = {name: each for name, each in tensors.items() if name.startswith("1.")}
    write_shards(home, dict(zip(SHARDS, (first, second), strict=True)))
    (home / "config.json").write_text('{"model_type": "mine"}')
    (home / "tokenizer.json").write_text("{}")
    (home / "README.md").write_text("# Tiny\n")
    return home


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.toml"
    path.write_text(TWO_OF_FOUR.replace("{layer}.{name}.weight", "{layer}.{name:up|down}.weight"))
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_apply_gives_the_bytes_that_it_gives_for_a_folder(
    hub: Hub, folder: Path, spec: Path, here: Path
) -> None:
    commit = hub.put(MODEL, folder)
    ok("apply", folder, spec, "-o", "local")
    said = ok("apply", f"hf://{MODEL}", spec)
    assert said.out == "tiny-pruned\n"
    assert f"sparseprune: hf://{MODEL}: the commit is {commit}\n" in said.err
    assert f"fetching {SHARDS[0]}" in said.err
    local, remote = files_of(here / "local"), files_of(here / "tiny-pruned")
    assert local.keys() == remote.keys()
    differing = {name for name in local if local[name] != remote[name]}
    assert differing <= {"README.md", "config.json", "sparseprune/report.json"}
    fetched = [line for line in hub.requests("HEAD") if line.endswith(".safetensors")]
    assert len(fetched) == len(SHARDS)
    report = json.loads(remote["sparseprune/report.json"])
    assert report["input"] == f"hf://{MODEL}@{commit}"
    card = remote["README.md"].decode()
    assert f"sparseprune apply hf://{MODEL}@{commit} spec.toml" in card
    assert f"base_model: {MODEL}\n" in card or f"- {MODEL}\n" in card
    assert json.loads(remote["config.json"])["sparseprune"]["from"] == MODEL
    # Again: all is in the cache, and the commit alone is asked for.
    hub.forget()
    ok("apply", f"hf://{MODEL}", spec, "-o", "again")
    assert files_of(here / "again")[SHARDS[0]] == local[SHARDS[0]]
    assert hub.requests("resolve") == hub.requests("cdn") == []


def test_plan_and_specs_cost_kilobytes_and_no_shard(hub: Hub, tmp_path: Path, spec: Path, here: Path) -> None:
    large = {"0.up.weight": torch.zeros(1024, 1024), "0.down.weight": torch.zeros(1024, 1024)}
    hub.put(MODEL, write_shards(tmp_path / "large", {"model.safetensors": large}))
    for words in (["plan", f"hf://{MODEL}", spec], ["specs", "--for", f"hf://{MODEL}"]):
        hub.forget()
        forget_stores()
        ok(*words)
        assert hub.requests("HEAD") == []
        assert hub.sent < 300_000
        assert len(hub.asked) < 12


def test_two_words_name_a_model_of_the_hub_unless_a_folder_has_that_name(
    hub: Hub, folder: Path, spec: Path, here: Path
) -> None:
    commit = hub.put(MODEL, folder)
    said = ok("apply", MODEL, spec)
    assert said.out == "tiny-pruned\n"
    note = f"{MODEL}: no such file or folder here, so it is read from the hub; the commit is {commit}"
    assert note in said.err
    hub.forget()
    (here / MODEL).parent.mkdir()
    write_shards(here / MODEL, {"model.safetensors": mlp_tensors()})
    ok("verify", here / "tiny-pruned", spec)
    ok("plan", MODEL, spec)
    assert hub.asked == []


def test_a_name_that_is_nowhere_has_one_line(hub: Hub, spec: Path, here: Path) -> None:
    said = refused("plan", "ours/nothing", spec)
    assert said.err == (
        "sparseprune: ours/nothing: no such file or folder here, and on the hub: no such model on the hub, "
        "or a private one; check the name, or sign in with `hf auth login`, or set HF_TOKEN\n"
    )
    said = refused("plan", "hf://datasets/a/b", spec)
    assert re.match("sparseprune: hf://datasets/a/b: a data set of the hub", said.err)


def test_the_machine_fails_where_the_hub_does(hub: Hub, spec: Path, here: Path) -> None:
    hub.refusals = [429]
    said = run("plan", f"hf://{MODEL}", spec)
    assert (said.code, said.out) == (3, "")
    assert said.err.startswith(f"sparseprune: hf://{MODEL}: the hub had too many requests (429)")


def test_the_hub_is_no_place_for_an_output(hub: Hub, folder: Path, spec: Path, here: Path) -> None:
    said = refused("apply", folder, spec, "-o", "hf://ours/pruned")
    assert said.err == (
        "sparseprune: hf://ours/pruned: the hub is only read; write to a folder, then "
        "`hf upload ORGANIZATION/MODEL FOLDER`\n"
    )


def test_one_file_and_a_folder_inside_are_inputs(hub: Hub, folder: Path, spec: Path, here: Path) -> None:
    write_shards(folder / "inside", {"model.safetensors": mlp_tensors()})
    hub.put(MODEL, folder, "refs/pr/1")
    assert ok("apply", f"hf://{MODEL}@refs/pr/1/inside", spec).out == "inside-pruned\n"
    said = ok("apply", f"hf://{MODEL}@refs/pr/1/inside/model.safetensors", spec)
    assert said.out == "model.pruned.safetensors\n"
    pruned = (here / "model.pruned.safetensors").read_bytes()
    assert pruned == (here / "inside-pruned" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"adapter_config.json": "{}"}, "only an adapter; it is a LoRA adapter"),
        ({"pytorch_model.bin": "x"}, "only pytorch_model.bin; pickles can run code"),
        ({"model.Q4.gguf": "x"}, "only model.Q4.gguf; sparseprune reads safetensors"),
    ],
)
def test_repositories_of_other_formats_are_refused_as_folders_are(
    hub: Hub, tmp_path: Path, spec: Path, here: Path, files: dict[str, str], line: str
) -> None:
    home = tmp_path / "other"
    home.mkdir()
    for name, text in files.items():
        (home / name).write_text(text)
    commit = hub.put(MODEL, home)
    said = refused("plan", f"hf://{MODEL}", spec)
    assert f"sparseprune: hf://{MODEL}@{commit}: holds no safetensors file, {line}" in said.err


def test_offline_the_cache_is_read_and_without_it_a_line_says_so(
    hub: Hub, folder: Path, spec: Path, here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commit = hub.put(MODEL, folder)
    ok("apply", f"hf://{MODEL}@main", spec, "-o", "online")
    from huggingface_hub import hf_hub_download

    hf_hub_download(MODEL, "config.json")  # as transformers does, which tells the cache what main is
    hub.forget()
    reach(monkeypatch, hub.endpoint, Path(os.environ["HF_HOME"]), offline=True)
    said = ok("apply", f"hf://{MODEL}", spec, "-o", "offline")
    told = f"the commit is {commit}, the last one in the local cache, since the hub cannot be asked"
    assert told in said.err
    assert files_of(here / "offline")[SHARDS[1]] == files_of(here / "online")[SHARDS[1]]
    reach(monkeypatch, hub.endpoint, tmp_path / "empty", offline=True)
    said = run("apply", f"hf://{MODEL}", spec, "-o", "nothing")
    assert said.code == 3
    assert "not in the local cache, and HF_HUB_OFFLINE forbids to fetch it" in said.err
    assert hub.asked == []


def test_a_process_of_its_own_says_nothing_but_its_own_words(
    hub: Hub, folder: Path, spec: Path, here: Path
) -> None:
    commit = hub.put(MODEL, folder)
    done = python("-m", "sparseprune", "apply", f"hf://{MODEL}", spec, "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "tiny-pruned\n", "")
    assert (here / "tiny-pruned" / "sparseprune" / "report.json").read_text().count(commit) == 1


def test_statistics_beside_an_output_of_the_hub_are_found(
    hub: Hub, folder: Path, spec: Path, here: Path
) -> None:
    from sparseprune.checkpoint.remote import RemotePath
    from sparseprune.checkpoint.statistics import statistics_beside

    assert statistics_beside(RemotePath(f"hf://{MODEL}@main")) == here / "tiny-stats"


def test_without_the_package_a_line_says_what_to_install(
    hub: Hub, spec: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    said = refused("plan", f"hf://{MODEL}", spec)
    install = "pip install 'sparseprune[remote]'"
    assert said.err == f"sparseprune: hf://{MODEL}: the hub is read through huggingface_hub; {install}\n"
    said = refused("plan", MODEL, spec)
    assert said.err == (
        f"sparseprune: {MODEL}: no such file; if it is a model of the Hugging Face hub, {install} first\n"
    )
    assert hub.asked == []


def test_masks_of_the_hub_are_put_on_a_checkpoint(hub: Hub, folder: Path, spec: Path, here: Path) -> None:
    ok("apply", folder, spec, "-o", "pruned")
    commit = hub.put("ours/masked", here / "pruned")
    said = ok("reapply", folder, "hf://ours/masked", "-o", "again")
    assert f"hf://ours/masked: the commit is {commit}" in said.err
    again, pruned = (files_of(here / name)[SHARDS[0]] for name in ("again", "pruned"))
    assert unmarked(again) == unmarked(pruned)
