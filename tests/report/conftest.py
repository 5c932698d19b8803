"""Figures of these tests are drawn under the settings of all pictures."""

from collections.abc import Iterator

import pytest


@pytest.fixture
def under_settings() -> Iterator[None]:
    from sparseprune.report.pictures.canvas import settings

    with settings():
        yield
