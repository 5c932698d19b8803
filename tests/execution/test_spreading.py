"""What a run hands to machines and makes of their news: one writer a file, the same bytes after losses."""

from pathlib import Path

import pytest
import torch

from sparseprune.execution import cluster, spreading
from sparseprune.execution.spreading import FileBatch
from tests.commands import Said, ok, run
from tests.execution.here import Here
from tests.execution.test_runs_on_a_cluster import SPECS, contents, without_seconds, write_decoder
from tests.limits import narrow
from tests.samples import write_shards, write_spec
from tests.stores import download

ON = ("--on", "auto")


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> list[Here]:
    """The clusters that commands join from now on; their machines report as often as they can."""
    joined: list[Here] = []

    def join(address: str, jobs: int | None = None) -> Here:
        joined.append(Here(address, jobs))
        return joined[-1]

    monkeypatch.setattr(cluster, "Cluster", join)
    monkeypatch.setattr(spreading, "_REPORT_SECONDS", 0.001)
    return joined


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("losing", [False, True])
def test_machines_write_what_one_process_writes(
    name: str, losing: bool, machines: list[Here], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Here, "losing", losing)
    narrow(monkeypatch, 4096, 1024)
    dense, spec = write_decoder(tmp_path / "dense"), write_spec(tmp_path, SPECS[name])
    words = ("apply", dense, spec, "--json", "-q", "-o")
    here, there = tmp_path / "here", tmp_path / "there"
    assert without_seconds(ok(*words, here).out) == without_seconds(ok(*words, there, *ON).out)
    assert contents(here) == contents(there)
    assert (machines[0].lost > 0) == losing


def test_each_file_has_one_writer(machines: list[Here], tmp_path: Path) -> None:
    dense, spec = write_decoder(tmp_path / "dense"), write_spec(tmp_path, SPECS["channels over shards"])
    ok("apply", dense, spec, "-o", tmp_path / "out", *ON)
    batches = [one for one in machines[0].sent if isinstance(one, FileBatch)]
    shards = [name for batch in batches for name in batch.names if name.startswith("model-")]
    assert len(shards) == len(set(shards)) == 4


def with_a_nan(folder: Path) -> Path:
    weights = torch.randn(32, 32)
    weights[3, 4] = torch.nan
    return write_shards(folder, {"model.safetensors": {"0.up.weight": weights}})


@pytest.mark.parametrize("in_a_store", [False, True])
def test_an_error_of_a_machine_is_that_of_one_process(
    in_a_store: bool, machines: list[Here], bucket: str, tmp_path: Path
) -> None:
    dense, spec = with_a_nan(tmp_path / "dense"), write_spec(tmp_path, SPECS["2:4"])
    out = f"{bucket}/out" if in_a_store else tmp_path / "out"

    def said(*on: str) -> Said:
        return run("apply", dense, spec, "-q", "-o", out, *on)

    here, there = said(), said(*ON)
    assert here.code == there.code == 2
    assert "NaN at [3, 4]" in here.err
    assert here.err == there.err
    assert not (download(str(out)) if in_a_store else (tmp_path / "out").exists())


def test_a_machine_that_does_not_see_the_input_is_named(
    machines: list[Here], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, spec = write_decoder(tmp_path / "dense"), write_spec(tmp_path, SPECS["2:4"])
    look = spreading.look

    def elsewhere(sizes: list[tuple[Path, int]], portion: object) -> list[str]:
        return look([(Path("/nowhere") / path.name, size) for path, size in sizes], None)

    monkeypatch.setattr(spreading, "look", elsewhere)
    said = run("apply", dense, spec, "-q", "-o", tmp_path / "out", *ON)
    assert said.code == 3
    assert said.err.count("\n") == 1
    assert (
        "No such file or directory; --on needs an input that all machines share (on machine first)"
        in said.err
    )
