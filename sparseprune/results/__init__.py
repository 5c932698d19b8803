"""Results of the commands as frozen classes, and their JSON and JSON Schema.

A module has the results of a few commands. Imports neither torch nor numpy, and pydantic only for a schema.
Called by report/, which makes results, by the commands, and by whoever uses `sparseprune.apply`.
"""

from typing import TYPE_CHECKING

from sparseprune import on_first_use

if TYPE_CHECKING:
    from sparseprune.results.checking import MaskVerification, Reapplication, Verification
    from sparseprune.results.evaluating import Evaluation
    from sparseprune.results.listing import ShippedSpec
    from sparseprune.results.measuring import Comparison, Inspection, Statistics
    from sparseprune.results.pruning import Plan, Removal, Report

__all__ = ["Comparison", "Evaluation", "Inspection", "MaskVerification", "Plan", "Reapplication", "Removal"]
__all__ += ["Report", "ShippedSpec", "Statistics", "Verification"]

__getattr__, __dir__ = on_first_use(
    __name__,
    {
        "checking": "MaskVerification Reapplication Verification",
        "evaluating": "Evaluation",
        "listing": "ShippedSpec",
        "measuring": "Comparison Inspection Statistics",
        "pruning": "Plan Removal Report",
    },
)
