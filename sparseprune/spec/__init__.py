"""Specs: TOML, parsed into types and bound to the headers of a checkpoint.

`find_spec` gives the text, `parse_spec` the tables, `bind` the scopes with every shape resolved. Knows no
tensor data, no files of weights and no torch. Called by execution and by commands. Names are loaded on first
use, because pydantic takes time to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparseprune.spec.binding import bind
    from sparseprune.spec.bound import (
        BoundBlock,
        BoundBlockCoupling,
        BoundInstance,
        BoundRule,
        BoundScope,
        BoundScopeCoupling,
        BoundSpec,
        Budget,
        Captures,
        Reconstruct,
        Score,
        Soft,
        TensorInfo,
    )
    from sparseprune.spec.parsing import SpecSource, find_spec, list_specs, parse_spec
    from sparseprune.spec.schema import Spec

__all__ = [
    "BoundBlock",
    "BoundBlockCoupling",
    "BoundInstance",
    "BoundRule",
    "BoundScope",
    "BoundScopeCoupling",
    "BoundSpec",
    "Budget",
    "Captures",
    "Reconstruct",
    "Score",
    "Soft",
    "Spec",
    "SpecSource",
    "TensorInfo",
    "bind",
    "find_spec",
    "list_specs",
    "parse_spec",
]

_HOME = {
    "Spec": "schema",
    "SpecSource": "parsing",
    "bind": "binding",
    "find_spec": "parsing",
    "list_specs": "parsing",
    "parse_spec": "parsing",
}


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(import_module(f"sparseprune.spec.{_HOME.get(name, 'bound')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
