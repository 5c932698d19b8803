"""What a shell completes an option or argument by: fixed words, shipped specs, variables of the spec.

Commands, flags and choices are typer's own business, and so are the scripts of the shells. Nothing here may
load torch. Called by command.py.
"""

from __future__ import annotations

import tomllib
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sparseprune.api.options import SPECS, VARIABLES
from sparseprune.cli.help import TYPED
from sparseprune.errors import SparsepruneError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def completing(among: str | None) -> Callable[..., list[str]] | None:
    """The function that typer asks; None where files, or nothing at all, are what is wanted."""
    if among is None:
        return None

    def complete(ctx: Any, incomplete: str) -> list[str]:  # noqa: ANN401
        found = among.split()
        if among in {SPECS, VARIABLES}:
            from sparseprune.spec import list_specs

            found = [*list_specs()] if among == SPECS else _variables(ctx.meta.get(TYPED, ()))
        return [name for name in found if name.startswith(incomplete)]

    return complete


def _variables(typed: Sequence[str]) -> list[str]:
    """The variables of the spec among the words that were typed, each as it is set."""
    from sparseprune.spec import find_spec, list_specs

    shipped = list_specs()
    for word in typed:
        if word in shipped or word.endswith(".toml"):
            with suppress(SparsepruneError, ValueError):
                return [f"{name}=" for name in tomllib.loads(find_spec(word).text).get("vars", {})]
    return []
