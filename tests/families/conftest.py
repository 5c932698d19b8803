"""All family tests load models of transformers, which keeps quiet meanwhile."""

from collections.abc import Callable

import pytest

from tests.families.checkpoints import Checkpoint, make


@pytest.fixture(scope="module", autouse=True)
def _quiet(quiet_transformers: None) -> None:
    """As the fixture of all tests says."""


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """The checkpoint of a family, made when it is first asked for."""
    made: dict[str, Checkpoint] = {}

    def of(family: str) -> Checkpoint:
        if family not in made:
            made[family] = make(family, tmp_path_factory.mktemp("dense"))
        return made[family]

    return of
