"""The lock of a staging folder is taken although other runs come and go there, if they let go at last."""

import os
from pathlib import Path
from typing import Any

import pytest

from sparseprune.checkpoint.publish import StagingDir


@pytest.mark.parametrize("times", [1, 2, 5])
def test_a_folder_that_vanished_before_it_was_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    folder = StagingDir(tmp_path / "m.safetensors")
    opened = os.open
    vanished: list[Any] = []

    def vanishing(path: Any, *arguments: Any) -> int:
        if len(vanished) < times:
            folder.path.rmdir()
            vanished.append(path)
        return opened(path, *arguments)

    monkeypatch.setattr(os, "open", vanishing)
    folder.acquire()
    assert len(vanished) == times
    assert folder.path.is_dir()
    folder.discard()
    assert list(tmp_path.iterdir()) == []
