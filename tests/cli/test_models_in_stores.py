"""Commands that run models, with checkpoints and texts in a bucket: the numbers and bytes of local files."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sparseprune.calibration.model_files import model_folder
from sparseprune.checkpoint import open_checkpoint, remote
from sparseprune.checkpoint.remote import RemotePath
from tests.calibration.models import made
from tests.commands import ok, refused, silent
from tests.hub import Hub
from tests.stores import front, put, upload

pytestmark = pytest.mark.usefixtures("quiet_transformers")
pytest.importorskip("obstore")

SIZES = ("--length", 16, "--sequences", 5)
PAIRS = """
version = 1
[reconstruct]
method = "refit"
[scope.matrix]
structure = "matrices"
block = [1, 1]
shape = [1, 4]
nnz = 2
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text and a llama, and one whose weights are smaller; nothing in it is changed by tests."""
    folder = made(tmp_path_factory.mktemp("stores"), "llama")
    weights = load_file(folder / "llama" / "model.safetensors")
    other = folder / "other"
    other.mkdir()
    for path in (folder / "llama").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    smaller = {name: 0.9 * one for name, one in weights.items()}
    save_file(smaller, other / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary ones, in which nothing may be left."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def told(text: str) -> Any:
    found = json.loads(text)
    for name in ("seconds", "input", "against", "output", "text"):
        found.pop(name, None)
    return found


def test_calibrate_finds_the_same_and_leaves_no_file(
    home: Path, bucket: str, tmp_path: Path, temporary: Path
) -> None:
    model, text = upload(home / "llama", f"{bucket}/llama"), upload(home / "words.txt", f"{bucket}/a.txt")
    words = (*SIZES, "--json", "-q", "-o")
    local = silent("calibrate", home / "llama", "--text", home / "words.txt", *words, tmp_path / "local")
    found = silent("calibrate", model, "--text", text, *words, tmp_path / "stats")
    assert told(found.out) == told(local.out)
    assert json.loads(found.out)["text"] == [text]
    same = [tmp_path / name / "statistics.safetensors" for name in ("local", "stats")]
    assert same[0].read_bytes() == same[1].read_bytes()
    assert not any(temporary.iterdir())


def test_eval_finds_the_same_against_a_model_in_a_bucket(home: Path, bucket: str, temporary: Path) -> None:
    records = "".join(json.dumps({"text": line}) + "\n" for line in [(home / "words.txt").read_text()] * 2)
    (text := home.parent / "words.jsonl").write_text(records)
    words = (*SIZES, "--json", "-q", "--text")
    local = silent("eval", home / "other", "--against", home / "llama", *words, text)
    there = [upload(home / name, f"{bucket}/{name}") for name in ("other", "llama")]
    address = upload(text, f"{bucket}/words.jsonl")
    found = silent("eval", there[0], "--against", there[1], *words, address)
    assert told(found.out) == told(local.out)
    assert json.loads(found.out)["against"] == there[1]
    assert not any(temporary.iterdir())


def test_a_sweep_over_a_model_in_a_bucket_writes_the_same_bytes(
    home: Path, bucket: str, tmp_path: Path, temporary: Path
) -> None:
    model, text = upload(home / "llama", f"{bucket}/llama"), upload(home / "words.txt", f"{bucket}/a.txt")
    (spec := tmp_path / "pairs.toml").write_text(PAIRS)
    ok("apply", home / "llama", spec, "--text", home / "words.txt", *SIZES, "-o", tmp_path / "local")
    ok("apply", model, spec, "--text", text, *SIZES, "-o", tmp_path / "swept")
    same = [tmp_path / name / "model.safetensors" for name in ("local", "swept")]
    assert same[0].read_bytes() == same[1].read_bytes()
    assert not any(temporary.iterdir())


def test_what_transformers_reads_has_no_weights(home: Path, bucket: str, temporary: Path) -> None:
    upload(home / "llama", f"{bucket}/llama")
    put(f"{bucket}/llama/additional_chat_templates/tool.jinja", b"{{ messages }}")
    put(f"{bucket}/llama/onnx/tokenizer.json", b"{}")
    put(f"{bucket}/llama/README.md", b"# a card")
    checkpoint = open_checkpoint(RemotePath(f"{bucket}/llama"))
    with model_folder(checkpoint) as folder:
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert found == {
            *(path.name for path in (home / "llama").iterdir()),
            "additional_chat_templates/tool.jinja",
        }
        for name in found & {"config.json", "tokenizer.json"}:
            assert (folder / name).read_bytes() == (home / "llama" / name).read_bytes()
        weights = load_file(folder / "model.safetensors")
        real = load_file(home / "llama" / "model.safetensors")
        assert {name: one.shape for name, one in weights.items()} == {
            name: one.shape for name, one in real.items()
        }
        assert not any(bool(one.any()) for one in weights.values())
    assert not any(temporary.iterdir())
    with model_folder(open_checkpoint(home / "llama")) as folder:
        assert folder == home / "llama"


def test_errors_name_the_address(home: Path, bucket: str, temporary: Path) -> None:
    model = upload(home / "llama", f"{bucket}/llama")
    put(f"{model}/tokenizer.json", b"{")
    words = ("--text", home / "words.txt", *SIZES)
    said = refused("eval", model, *words)
    assert f"{model}: there is no tokenizer that transformers can read" in said.err
    assert str(temporary) not in said.err
    said = refused("eval", home / "llama", "--text", f"{bucket}/none.txt", *SIZES)
    assert f"{bucket}/none.txt: no such file" in said.err


def test_zeros_are_never_taken_for_weights(home: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = upload(home / "llama", f"{bucket}/llama")
    monkeypatch.setattr("sparseprune.calibration.blocks._LOADS", "of_another_version")
    said = refused("eval", model, "--text", home / "words.txt", *SIZES)
    assert f"{model}: transformers " in said.err
    assert "reads the weights of this model from files alone; copy it to this machine" in said.err


def test_a_long_text_is_read_as_far_as_it_is_needed(
    home: Path, bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (home / "words.txt").read_text()
    put(f"{bucket}/long.txt", (words * 400).encode())
    monkeypatch.setattr(remote, "_PART", 1 << 16)
    with front(s3_server, monkeypatch) as seen:
        said = ok("eval", home / "llama", "--text", f"{bucket}/long.txt", *SIZES, "--json", "-q")
    assert json.loads(said.out)["sequences"] == 5
    assert 0 < seen.nbytes <= 1 << 17 < len(words) * 400


def test_calibrate_runs_a_model_of_the_hub(home: Path, hub: Hub, tmp_path: Path, temporary: Path) -> None:
    hub.put("org/llama", home / "llama")
    words = ("--text", home / "words.txt", *SIZES, "--json", "-q", "-o")
    local = silent("calibrate", home / "llama", *words, tmp_path / "local")
    found = silent("calibrate", "hf://org/llama", *words, tmp_path / "stats")
    assert told(found.out) == told(local.out)
    same = [tmp_path / name / "statistics.safetensors" for name in ("local", "stats")]
    assert same[0].read_bytes() == same[1].read_bytes()
    assert not any(temporary.iterdir())
