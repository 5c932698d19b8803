"""Figures of these tests are drawn under the settings of all pictures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def under_settings() -> Iterator[None]:
    from sparseprune.report.pictures.canvas import settings

    with settings():
        yield
