"""Results of the commands as frozen classes, and their JSON and JSON Schema.

A module has the results of a few commands. Imports neither torch nor numpy, and pydantic only for a schema.
Called by report/, which makes results, by the commands, and by whoever uses `sparseprune.apply`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparseprune.results.checking import MaskVerification, Reapplication, Verification
    from sparseprune.results.measuring import Comparison, Inspection, Statistics
    from sparseprune.results.pruning import Plan, Removal, Report

_MODULES = {
    "Comparison": "measuring",
    "Inspection": "measuring",
    "MaskVerification": "checking",
    "Plan": "pruning",
    "Reapplication": "checking",
    "Removal": "pruning",
    "Report": "pruning",
    "Statistics": "measuring",
    "Verification": "checking",
}

__all__ = [
    "Comparison",
    "Inspection",
    "MaskVerification",
    "Plan",
    "Reapplication",
    "Removal",
    "Report",
    "Statistics",
    "Verification",
]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(import_module(f"sparseprune.results.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
