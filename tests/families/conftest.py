"""All family tests load models of transformers, which keeps quiet meanwhile."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _quiet(quiet_transformers: None) -> None:
    """As the fixture of all tests says."""
