"""Every shipped spec from an object store to an object store: the same bytes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import ok, silent
from tests.families.checkpoints import Checkpoint, write_statistics
from tests.families.test_library import OPTIONS, SERVED
from tests.families.test_passes import contents
from tests.limits import narrow
from tests.stores import download, upload

pytestmark = pytest.mark.usefixtures("untraced")


@pytest.mark.parametrize("spec", SERVED)
def test_a_store_gets_the_same_output(
    spec: str,
    checkpoint_of: Callable[[str], Checkpoint],
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense = checkpoint_of(SERVED[spec][0])
    monkeypatch.chdir(tmp_path)
    write_statistics(dense, tmp_path)
    narrow(monkeypatch, 4096, 1024)  # several chunks a pass
    words = (spec, "-q", "--mask-format", "packed", *OPTIONS.get(spec, ()))
    ok("apply", dense.folder, *words, "-o", tmp_path / "here")
    silent("apply", upload(dense.folder, f"{bucket}/{dense.folder.name}"), *words, "-o", f"{bucket}/here")
    for name, data in download(f"{bucket}/here").items():
        path = tmp_path / "there" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
