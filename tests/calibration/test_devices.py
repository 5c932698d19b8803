"""`calibrate` on CUDA: where a model is put, what its sums may take, and that the host does not wait."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from sparseprune.calibration import LoadedModel, sweeps, watching
from sparseprune.errors import size
from tests.calibration.models import made
from tests.commands import Said, ok, refused

pytestmark = pytest.mark.usefixtures("quiet_transformers")

SIZES = ("--length", 12, "--sequences", 5)
GB = 10**9


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a llama and a mixtral; nothing in it is changed by tests."""
    return made(tmp_path_factory.mktemp("devices"), "llama", "mixtral")


def calibrate(home: Path, model: str, out: Path, *words: object) -> Said:
    return ok("calibrate", home / model, "--text", home / "words.txt", *SIZES, "-o", out, *words)


def statistics(folder: Path) -> bytes:
    return (folder / "statistics.safetensors").read_bytes()


def free(patch: pytest.MonkeyPatch, *nbytes: int) -> None:
    """There are devices with so many free bytes, of which the first one is the current one."""
    patch.setattr(torch.cuda, "mem_get_info", lambda device: (nbytes[device.index], 80 * GB))
    patch.setattr(torch.cuda, "current_device", lambda: 0)


def on(device: torch.device) -> LoadedModel:
    nothing: Any = None
    return LoadedModel(nothing, None, nothing, None, None, device, ())


def test_sums_may_take_half_of_what_is_free_rounded_down_to_a_power_of_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = on(torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 3 * GB)  # the rest is kept for what comes
    for rest, room in ((40, 16), (30.5, 8), (33, 16)):
        free(monkeypatch, GB, int(rest * GB))
        assert model.room == room << 30
    assert on(torch.device("cpu")).room is None


def test_a_device_with_less_room_than_memory_makes_more_passes_to_the_same_bytes_and_says_so(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = calibrate(home, "mixtral", tmp_path / "memory", "--gradients", "--memory", 1 << 30)
    assert "are free for sums" not in said.err
    room = 1 << 14
    monkeypatch.setattr(LoadedModel, "room", room)
    said = calibrate(home, "mixtral", tmp_path / "room", "--gradients", "--memory", 1 << 30, "--json")
    passes = json.loads(said.out)["passes"]
    assert passes > 3
    line = f"the text passes {passes} times, where --memory would make it 1"
    told = f"sparseprune: about {size(room)} of cpu are free for sums beside the model: {line}"
    assert said.err.splitlines().count(told) == 1
    assert statistics(tmp_path / "room") == statistics(tmp_path / "memory")
    said = calibrate(home, "mixtral", tmp_path / "both", "--gradients", "--memory", room)
    assert "are free for sums" not in said.err  # --memory alone makes as many


def test_a_matrix_without_room_on_the_device_is_told(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoadedModel, "room", 1 << 12)
    text = ("--text", home / "words.txt", *SIZES)
    said = refused("calibrate", home / "llama", *text, "-o", tmp_path / "stats", "-q")
    told = "--device cpu: about 4.10 kB are free for sums beside the model, the second moment of "
    assert told in said.err
    assert "; free some of it, or say --device cpu" in said.err


def as_it_is(_: object, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    return func(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Counts the operations for which the host would wait for a device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        masks = func.overloadpacket is aten.index and any(
            one is not None and one.dtype == torch.bool for one in args[1]
        )
        self.count += masks or func.overloadpacket in {aten._local_scalar_dense, aten.nonzero}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model", ["llama", "mixtral"])
def test_a_device_is_not_waited_for_in_a_batch_and_sums_up_the_same(
    model: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what the model itself does, which looks for the tokens of each expert."""
    words = ("--gradients", "--no-special", "--json", "-q")
    on_host = calibrate(home, model, tmp_path / "host", *words)
    waits: list[list[int]] = []

    def twice(usual: Any) -> Any:
        """Each block runs once without being watched and without handing anything on, then as it does."""

        def run(*arguments: Any, hand: bool, **words: Any) -> None:
            pair = []
            for bare in (True, False):
                with Waits() as each, monkeypatch.context() as patch:
                    if bare:
                        patch.setattr(watching.Watch, "__torch_dispatch__", as_it_is)
                    usual(*arguments, hand=hand and not bare, **words)
                pair.append(each.count)
            waits.append(pair)

        return run

    for name in ("through", "back"):
        monkeypatch.setattr(sweeps.Sweep, name, twice(getattr(sweeps.Sweep, name)))
    monkeypatch.setattr(watching, "_is_on_host", lambda _: False)
    on_device = calibrate(home, model, tmp_path / "device", *words)
    assert len(waits) == 8  # two blocks there and back, for the first sequence and for all
    assert all(alone == watched for alone, watched in waits)
    host, device = (json.loads(said.out) for said in (on_host, on_device))
    for key in ("matrices", "gradients"):
        assert device[key] == host[key]
    found = load_file(tmp_path / "device/statistics.safetensors")
    for name, one in load_file(tmp_path / "host/statistics.safetensors").items():
        torch.testing.assert_close(found[name], one)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("model", ["llama", "mixtral"])
def test_cuda_collects_what_the_cpu_does(model: str, home: Path, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        calibrate(home, model, tmp_path / device, "--gradients", "--device", device, "-q")
    found = load_file(tmp_path / "cuda/statistics.safetensors")
    for name, one in load_file(tmp_path / "cpu/statistics.safetensors").items():
        torch.testing.assert_close(found[name], one, rtol=1e-3, atol=1e-5)
