"""What `--force` may replace is asked for every right that replacing needs."""

import os
from pathlib import Path

import pytest

from sparseprune.errors import MachineError
from tests.checkpoint.files import content, directory, layout_of, names_in, stage


@pytest.mark.parametrize("lacking", [os.W_OK, os.X_OK])
def test_a_directory_that_lacks_one_right_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: int
) -> None:
    """Asked of the system, whoever runs the tests: to root every right is given."""
    layout = layout_of(directory(tmp_path))
    stage(layout, report=b"first")
    target = tmp_path / "ckpt-pruned"
    before = content(target)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: Path(path) != target or not mode & lacking)
        with pytest.raises(MachineError, match="ckpt-pruned: cannot be written to, so --force"):
            stage(layout, report=b"second", force=True)
    assert content(target) == before
    assert names_in(tmp_path) == ["ckpt", "ckpt-pruned"]
