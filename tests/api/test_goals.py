"""How a target is written: units of parameters and of bytes, exact, and the number to vary."""

import re

import pytest

from sparseprune.api.goals import Goal
from sparseprune.errors import SparsepruneError

# What was typed -> unit, amount, number to vary.
GOALS = {
    "params=6B": ("params", 6_000_000_000, None),
    "params=6.7b": ("params", 6_700_000_000, None),
    " PARAMS = 350 M ": ("params", 350_000_000, None),
    "params=0.1K": ("params", 100, None),
    "params=1.000000000001T": ("params", 1_000_000_000_001, None),
    "params=12": ("params", 12, None),
    "active=.5B:keep": ("active", 500_000_000, "keep"),
    "size=12GB": ("size", 12_000_000_000, None),
    "size=12B": ("size", 12, None),
    "size=2k": ("size", 2000, None),
    "size=1.5KiB": ("size", 1536, None),
    "size=3 TiB : scope.up.nnz": ("size", 3 << 40, "scope.up.nnz"),
}
NO_GOALS = "|6B|params|params=|params=-1|params=1e9|params=6GB|params=6KiB|size=1XB|sparsity=0.5|params=6B:"


@pytest.mark.parametrize("text", GOALS)
def test_a_target_has_a_unit_and_an_exact_amount(text: str) -> None:
    goal = Goal.of(text)
    assert (goal.unit, goal.most, goal.name) == GOALS[text]


@pytest.mark.parametrize("text", NO_GOALS.split("|"))
def test_what_is_no_target_is_refused(text: str) -> None:
    wanted = "wanted params=NUMBER, active=NUMBER or size=BYTES, such as params=6B or size=12GB"
    with pytest.raises(SparsepruneError, match=f"^--target {re.escape(text)}: {wanted}$"):
        Goal.of(text)
