"""Every shipped spec from an object store to an object store: the same bytes."""

from pathlib import Path

import pytest

from tests.commands import silent
from tests.families.conftest import Applied
from tests.families.test_library import SERVED
from tests.families.test_passes import contents
from tests.stores import download, upload

pytestmark = pytest.mark.usefixtures("untraced")


@pytest.mark.parametrize("spec", SERVED)
def test_a_store_gets_the_same_output(spec: str, applied: Applied, bucket: str, tmp_path: Path) -> None:
    dense = upload(applied.dense, f"{bucket}/{applied.dense.name}")
    silent("apply", dense, *applied.words, "-o", f"{bucket}/here")
    for name, data in download(f"{bucket}/here").items():
        path = tmp_path / "there" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert contents(tmp_path / "there") == contents(applied.folder)
