"""What several tests of commands share: the server of commands, and a small checkpoint with a spec."""

from collections.abc import Iterator

import pytest

from tests.cli.interrupted import Commands


@pytest.fixture(scope="session")
def commands() -> Iterator[Commands]:
    with Commands() as server:
        yield server
