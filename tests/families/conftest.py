"""Settings of all family tests: transformers draws no progress bars and keeps its hints to itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module", autouse=True)
def quiet_transformers() -> Iterator[None]:
    """Errors still show: what transformers warns of here is that a small config has its own token ids."""
    from transformers import utils

    logging: Any = utils.logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    logging.set_verbosity(level)
