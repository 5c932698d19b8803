"""Sweeps: what is in memory while text goes through a model, and what waits there for its way back."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparseprune.calibration import load_model, sweeps
from sparseprune.calibration.blocks import reading
from sparseprune.calibration.storing import Store
from sparseprune.checkpoint import TensorReader, open_checkpoint
from tests.calibration.models import save, text
from tests.commands import ok

pytestmark = pytest.mark.usefixtures("quiet_transformers")

LAYERS = 5


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text and a llama of some layers; nothing in it is changed by tests."""
    import transformers

    folder = tmp_path_factory.mktemp("sweeps")
    (folder / "words.txt").write_text(text())
    kind: Any = transformers.LlamaConfig
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    save(transformers.LlamaForCausalLM(kind(**small, num_hidden_layers=LAYERS)), folder / "model")
    return folder


def calibrate(home: Path, out: Path, *words: object) -> dict[str, torch.Tensor]:
    sizes = ("--length", 16, "--sequences", 20)
    ok("calibrate", home / "model", "--text", home / "words.txt", *sizes, "-o", out, "-q", *words)
    return load_file(out / "statistics.safetensors")


def held() -> int:
    """Bytes of all tensors in memory."""
    gc.collect()
    found = {}
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor) and not one.is_meta:
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.fixture
def _frozen() -> Iterator[None]:
    """What was there before is not looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_frozen")
@pytest.mark.parametrize("way", ["through", "back"])
def test_no_layer_adds_to_what_is_in_memory(
    way: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, after = getattr(sweeps.Sweep, way), []

    def run(sweep: sweeps.Sweep, *arguments: Any, **words: Any) -> None:
        usual(sweep, *arguments, **words)
        if len(sweep._batches) > 1:  # not the look at the first sequence
            after.append(held())

    monkeypatch.setattr(sweeps, "_ROOM", 0)
    monkeypatch.setattr("sparseprune.calibration.collecting._BATCH_TOKENS", 64)
    monkeypatch.setattr(sweeps.Sweep, way, run)
    calibrate(home, tmp_path / "stats", "--gradients")
    assert len(after) == LAYERS
    assert len({*after[1:-1]}) == 1


def test_what_waits_in_files_is_what_waits_in_memory(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparseprune.calibration.collecting._BATCH_TOKENS", 64)
    calibrate(home, tmp_path / "memory", "--gradients")
    for room in (0, 20_000):
        monkeypatch.setattr(sweeps, "_ROOM", room)
        calibrate(home, tmp_path / f"files{room}", "--gradients")
        assert (tmp_path / f"files{room}/statistics.safetensors").read_bytes() == (
            tmp_path / "memory/statistics.safetensors"
        ).read_bytes()


def test_a_layer_runs_once_for_each_part_of_its_sums(home: Path, tmp_path: Path) -> None:
    one = calibrate(home, tmp_path / "one")
    many = calibrate(home, tmp_path / "many", "--memory", 4 * 48 * 48)
    passes = [
        json.loads((tmp_path / out / "sparseprune/report.json").read_text())["passes"]
        for out in ("one", "many")
    ]
    assert passes == [1, 4]  # q, o and gate leave no room for down beside the head, which stays
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_layer_that_was_read_ahead_is_not_read_again(ahead: int, home: Path) -> None:
    checkpoint = open_checkpoint(home / "model")
    with TensorReader() as reader:
        blocks = load_model(checkpoint, "cpu", reader).blocks
        usual, keys = reading(checkpoint, reader, torch.device("cpu")), []

        def read(name: str) -> torch.Tensor:
            keys.append(name)
            return usual(name)

        blocks.read_ahead(blocks.names[ahead], read)
        for name in blocks.names[:2]:
            with blocks.opened(name, read) as parameters:
                for key, one in parameters.items():
                    assert torch.equal(one, usual(f"{name}.{key}"))
    stored = [key for name in blocks.names[:2] for key in blocks.stored(name)]
    # What was read for another layer than the next one is forgotten.
    assert sorted(keys) == sorted([*stored, *(blocks.stored(blocks.names[1]) if ahead else ())])


@pytest.mark.parametrize("room", [0, 100, 1 << 20])
def test_tensors_come_back_as_they_were_and_share_their_places(room: int, tmp_path: Path) -> None:
    with Store(tmp_path, room) as store:
        one = torch.arange(12.0).reshape(3, 4)
        kept = [store.keep(each, 0) for each in (one, one.T, one[1:, ::2])]
        assert len({id(each.place) for each in kept}) == 1
        other = store.keep(torch.ones(3, dtype=torch.bfloat16), 0)
        one.mul_(2)
        later = store.keep(one, 0)
        assert later.place is not kept[0].place
        before = torch.arange(12.0).reshape(3, 4)
        for each, wanted in zip(kept, (before, before.T, before[1:, ::2]), strict=True):
            assert torch.equal(store.load(each), wanted)
            assert store.load(each).stride() == wanted.stride()
        assert torch.equal(store.load(later), one)
        assert store.load(other).dtype == torch.bfloat16


def test_places_that_nobody_wants_any_more_are_used_again(tmp_path: Path) -> None:
    with Store(tmp_path, 0) as store:
        kept = [store.keep(torch.full((8,), float(number)), None) for number in range(3)]
        store.forget(kept[1])
        again = store.keep(torch.full((8,), 9.0), None)
        assert (again.place.offset, kept[1].place.offset) == (32, 32)
        shared = torch.ones(8)
        twice = [store.keep(shared, 1), store.keep(shared, 1)]
        store.forget(twice[0])
        assert store.keep(torch.zeros(8), None).place.offset != twice[1].place.offset
        assert torch.equal(store.load(twice[1]), shared)
        assert [float(store.load(each)[0]) for each in (kept[0], kept[2], again)] == [0, 2, 9]
    assert not list(tmp_path.iterdir())
