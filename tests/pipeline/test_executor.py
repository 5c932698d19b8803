"""The executor: work in order, errors in order, and a disk that is heard."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import save_file

from sparseprune.pipeline import executor
from sparseprune.pipeline.unit import prune_slab
from tests.samples import TWO_OF_FOUR, mlp_tensors, run, write_spec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def command(tmp_path: Path) -> tuple[object, ...]:
    save_file(mlp_tensors(), tmp_path / "m.safetensors")
    return ("apply", tmp_path / "m.safetensors", write_spec(tmp_path, TWO_OF_FOUR))


def test_a_disk_that_fails_while_the_work_goes_on_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[object, ...]
) -> None:
    failed = threading.Event()

    def fail(_: int) -> None:
        failed.set()
        raise OSError(5, "Input/output error")

    def wait_for_it(*arguments: object) -> object:
        assert failed.wait(10)
        return original(*arguments)

    original: Callable[..., object] = executor._copy_work
    monkeypatch.setattr(os, "fdatasync", fail)
    monkeypatch.setattr(executor, "_FLUSH_SECONDS", 0.001)
    monkeypatch.setattr(executor, "_copy_work", wait_for_it)
    said = run(*command)
    assert (said.code, said.out) == (3, "")
    assert "Input/output error" in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors", "spec.toml"]


def test_the_first_error_in_the_order_of_the_plan_is_the_one_that_is_told(
    monkeypatch: pytest.MonkeyPatch, command: tuple[object, ...]
) -> None:
    def fail(slab: object, tensors: dict[str, object], inputs: object) -> object:
        (name,) = tensors
        if name == "0.up.weight":
            time.sleep(0.05)  # fails last, and is told first: 0.down.weight before it is fine
            raise MemoryError("first")
        if name.startswith("1."):
            raise MemoryError("later")
        return prune_slab(slab, tensors, inputs)  # type: ignore[arg-type]

    monkeypatch.setattr("sparseprune.pipeline.executor.prune_slab", fail)
    with pytest.raises(MemoryError, match="first"):
        run(*command, "--jobs", 4)


def test_torch_keeps_its_threads(command: tuple[object, ...]) -> None:
    import torch

    usual = torch.get_num_threads()
    try:
        torch.set_num_threads(5)  # what no sharing of cores among three jobs comes to here
        assert run(*command, "--jobs", 3).code == 0
        assert torch.get_num_threads() == 5
    finally:
        torch.set_num_threads(usual)
