"""What is asked: a spec as TOML, read into types and bound to the headers of a checkpoint.

`find_spec` gives the text, `parse_spec` the tables, `bind` the scopes with every shape resolved.
Refuses to know tensors' data, files of weights and torch. Called by the pipeline.
"""

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
    Score,
    Soft,
    TensorInfo,
)
from sparseprune.spec.library import SpecSource, find_spec, list_specs
from sparseprune.spec.parsing import parse_spec
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
