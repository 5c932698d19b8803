"""The work: from a spec and headers to a plan and a schedule, from these to passes over files.

Owns plan, schedule, runner and the passes. Decides nothing about sparsity itself (engine) and lays out no
bytes (checkpoint). Called by the commands. Names are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparseprune.execution.passes import TensorOutcome
    from sparseprune.execution.plan import Plan, WorkUnit, make_plan
    from sparseprune.execution.pruning import execute, work_bytes
    from sparseprune.execution.schedule import (
        Schedule,
        cpu_lines,
        device_text,
        devices_of_rules,
        make_schedule,
        resolve_device,
    )
    from sparseprune.execution.verify import Check, Verification, count_survivors, make_check

__all__ = [
    "Check",
    "Plan",
    "Schedule",
    "TensorOutcome",
    "Verification",
    "WorkUnit",
    "count_survivors",
    "cpu_lines",
    "device_text",
    "devices_of_rules",
    "execute",
    "make_check",
    "make_plan",
    "make_schedule",
    "resolve_device",
    "work_bytes",
]

_HOME = {
    "Check": "verify",
    "Plan": "plan",
    "Schedule": "schedule",
    "TensorOutcome": "passes",
    "Verification": "verify",
    "WorkUnit": "plan",
    "count_survivors": "verify",
    "cpu_lines": "schedule",
    "device_text": "schedule",
    "devices_of_rules": "schedule",
    "execute": "pruning",
    "make_check": "verify",
    "make_plan": "plan",
    "make_schedule": "schedule",
    "resolve_device": "schedule",
    "work_bytes": "pruning",
}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"sparseprune.execution.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
