"""Commands on checkpoints in an object store: what they write and say is what they do of local ones."""

from pathlib import Path

import pytest

from tests.checkpoint.files import content
from tests.commands import ok, run, valid
from tests.samples import CHANNELS, TWO_OF_FOUR, mlp_tensors, without_marks, write_shards, write_spec
from tests.stores import upload


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    tensors = mlp_tensors()
    shards: dict[str, dict[str, object]] = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in tensors.items():
        shards["a.safetensors" if "up" in name else "b.safetensors"][name] = tensor
    return write_shards(tmp_path / "dense", shards)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [TWO_OF_FOUR, CHANNELS])
def test_applies_to_the_same_bytes_as_to_a_local_folder(
    text: str, dense: Path, bucket: str, tmp_path: Path
) -> None:
    spec = write_spec(tmp_path, text)
    ok("apply", dense, spec, "-o", tmp_path / "local", "--jobs", 2)
    ok("apply", upload(dense, f"{bucket}/models/dense"), spec, "-o", tmp_path / "out", "--jobs", 2)
    of_store, local = content(tmp_path / "out"), content(tmp_path / "local")
    assert of_store.keys() == local.keys()
    told = "sparseprune/report.json"
    assert {name: data for name, data in without_marks(of_store).items() if name != told} == {
        name: data for name, data in without_marks(local).items() if name != told
    }


def test_inspects_and_plans_as_a_local_folder(dense: Path, bucket: str, tmp_path: Path) -> None:
    spec, address = write_spec(tmp_path, TWO_OF_FOUR), upload(dense, f"{bucket}/dense")
    for words in (("inspect", dense), ("plan", dense, spec)):
        local = valid(ok(*words, "--json").out, words[0])
        of_store = valid(ok(words[0], address, *words[2:], "--json").out, words[0])
        assert _without_places(of_store) == _without_places(local)


def _without_places(document: dict[str, object]) -> dict[str, object]:
    places = {"checkpoint", "input", "output", "seconds"}
    return {key: value for key, value in document.items() if key not in places}


def test_says_what_is_not_there(bucket: str) -> None:
    refusals = {
        f"{bucket}/none": "no such file",
        "s3://no-such-bucket/model": "there is no bucket s3://no-such-bucket; give an existing one",
        "s3://no_such!/model": "this is no name of a bucket; wanted such as s3://bucket/folder",
    }
    for address, why in refusals.items():
        said = run("inspect", address)
        assert (said.code, said.out, said.err) == (2, "", f"sparseprune: {address}: {why}\n")
