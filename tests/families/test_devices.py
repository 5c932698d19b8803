"""Every shipped spec ends in the same bytes on a device and on the CPU, whatever the device has room for."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.commands import ok, valid
from tests.execution.pretended import NAME, pretend
from tests.families.checkpoints import Checkpoint, write_statistics
from tests.families.test_library import OPTIONS, SERVED
from tests.families.test_passes import contents
from tests.limits import narrow

pytestmark = pytest.mark.usefixtures("untraced")
REBUILT = frozenset(spec for spec in SERVED if spec.endswith("-admm"))


@pytest.mark.parametrize("spec", SERVED)
def test_a_device_that_the_cpu_plays_gives_the_bytes_of_the_cpu(
    spec: str, checkpoint_of: Callable[[str], Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = checkpoint_of(SERVED[spec][0])
    monkeypatch.chdir(tmp_path)
    write_statistics(dense, tmp_path)
    words = ("apply", dense.folder, spec, "-q", *OPTIONS.get(spec, ()))
    ok(*words, "--device", "cpu", "-o", tmp_path / "here")
    narrow(monkeypatch, 4096, 1024, memory=1 << 24, device=1 << 24)
    device = pretend(monkeypatch)
    report = valid(ok(*words, "--device", "cuda", "-o", tmp_path / "there", "--json").out, "report")
    assert {rule["device"] for rule in report["rules"]} == {NAME}
    assert device.waits > 0
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("spec", [spec for spec in SERVED if spec not in REBUILT])
def test_cuda_gives_the_bytes_of_the_cpu(
    spec: str, checkpoint_of: Callable[[str], Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = checkpoint_of(SERVED[spec][0])
    monkeypatch.chdir(tmp_path)
    words = ("apply", dense.folder, spec, "-q", *OPTIONS.get(spec, ()))
    for device in ("cpu", "cuda"):
        ok(*words, "--device", device, "-o", tmp_path / device)
    assert contents(tmp_path / "cpu") == contents(tmp_path / "cuda")
