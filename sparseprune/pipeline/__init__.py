"""What will be done and doing it: from a spec and headers to work units, from units to files.

Owns plan, slabs and executor. Decides nothing about sparsity itself (engine) and lays out no bytes
(checkpoint). Called by the command line. Names that need torch are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from sparseprune.pipeline.memory import expected_peak
from sparseprune.pipeline.plan import Plan, WorkUnit, make_plan

if TYPE_CHECKING:
    from sparseprune.pipeline.device import resolve_device
    from sparseprune.pipeline.executor import Machine, TensorOutcome, execute

__all__ = [
    "Machine",
    "Plan",
    "TensorOutcome",
    "WorkUnit",
    "execute",
    "expected_peak",
    "make_plan",
    "resolve_device",
]

_HOME = {
    "Machine": "executor",
    "TensorOutcome": "executor",
    "execute": "executor",
    "resolve_device": "device",
}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"sparseprune.pipeline.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
