"""All family tests load models of transformers, which keeps quiet meanwhile."""

from collections.abc import Callable
from functools import cache

import pytest

from tests.families.checkpoints import Checkpoint, make


@pytest.fixture(scope="module", autouse=True)
def _quiet(quiet_transformers: None) -> None:
    """As the fixture of all tests says."""


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """The checkpoint of a family, made when it is first asked for."""
    return cache(lambda family: make(family, tmp_path_factory.mktemp("dense")))


@pytest.fixture(scope="module")
def dense(checkpoint_of: Callable[[str], Checkpoint]) -> Checkpoint:
    return checkpoint_of("llama")
