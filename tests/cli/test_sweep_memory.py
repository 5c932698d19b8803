"""The memory that `sparseprune plan --text` tells of a sweep."""

from pathlib import Path

import pytest

from tests.calibration.models import made
from tests.commands import ok, valid

pytestmark = pytest.mark.usefixtures("quiet_transformers")

SIZES = ("--length", 16, "--sequences", 4, "--jobs", 1, "--json")
MODEL = 200 << 20  # what transformers and a model without weights take


def test_plan_counts_the_model_that_a_sweep_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made(tmp_path, "llama"))
    ok("calibrate", "llama", "--text", "words.txt", *SIZES[:4], "-o", "stats")
    words = ("plan", "llama", "2of4", "--reconstruct", "admm")
    swept = valid(ok(*words, "--text", "words.txt", *SIZES).out, "plan")["bytes"]["peak"]
    applied = valid(ok(*words, "--stats", "stats", *SIZES[4:]).out, "plan")["bytes"]["peak"]
    assert MODEL < swept - applied < 2 * MODEL
