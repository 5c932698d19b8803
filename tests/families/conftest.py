"""All family tests load models of transformers, which keeps quiet meanwhile."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.commands import ok
from tests.families.checkpoints import Checkpoint, make, write_statistics
from tests.families.test_library import OPTIONS, SERVED
from tests.limits import narrow


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


class Applied(NamedTuple):
    """A spec applied to a model of its family: `apply DENSE WORDS -o FOLDER`, where FOLDER is called here."""

    dense: Path
    words: tuple[object, ...]
    folder: Path


@pytest.fixture
def applied(
    spec: str,
    checkpoint_of: Callable[[str], Checkpoint],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Applied:
    """A shipped spec that was applied in this process; its passes have several chunks from now on."""
    dense = checkpoint_of(SERVED[spec][0])
    monkeypatch.chdir(tmp_path)
    write_statistics(dense, tmp_path)
    narrow(monkeypatch, 4096, 1024)
    words = (spec, "-q", "--mask-format", "packed", *OPTIONS.get(spec, ()))
    ok("apply", dense.folder, *words, "-o", tmp_path / "here")
    return Applied(dense.folder, words, tmp_path / "here")
