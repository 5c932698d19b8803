"""Tests of this room that write leave no file open."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.checkpoint.files import open_files

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _nothing_is_left_open() -> Iterator[None]:
    before = open_files()
    yield
    assert open_files() == before
