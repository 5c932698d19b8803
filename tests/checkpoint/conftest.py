"""Tests of this room that write leave no file open."""

from collections.abc import Iterator

import pytest

from tests.checkpoint.files import open_files


@pytest.fixture(autouse=True)
def _nothing_is_left_open() -> Iterator[None]:
    before = open_files()
    yield
    assert open_files() <= before  # an earlier test's connections may end now
