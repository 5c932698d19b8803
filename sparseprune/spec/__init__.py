"""Specs: TOML, parsed into types and bound to the headers of a checkpoint.

`find_spec` gives the text, `parse_spec` the tables, `bind` the scopes with every shape resolved. Knows no
tensor data, no files of weights and no torch. Called by execution and by commands. What reads specs is loaded
on first use, because most commands only need bound ones.
"""

from typing import TYPE_CHECKING

from sparseprune import on_first_use
from sparseprune.spec.bound import Allocate as Allocate
from sparseprune.spec.bound import BoundBlock as BoundBlock
from sparseprune.spec.bound import BoundBlockCoupling as BoundBlockCoupling
from sparseprune.spec.bound import BoundInstance as BoundInstance
from sparseprune.spec.bound import BoundRule as BoundRule
from sparseprune.spec.bound import BoundScope as BoundScope
from sparseprune.spec.bound import BoundScopeCoupling as BoundScopeCoupling
from sparseprune.spec.bound import BoundSpec as BoundSpec
from sparseprune.spec.bound import Budget as Budget
from sparseprune.spec.bound import Captures as Captures
from sparseprune.spec.bound import Metric as Metric
from sparseprune.spec.bound import Reconstruct as Reconstruct
from sparseprune.spec.bound import Score as Score
from sparseprune.spec.bound import Soft as Soft
from sparseprune.spec.bound import TensorInfo as TensorInfo

if TYPE_CHECKING:
    from sparseprune.spec.binding import bind as bind
    from sparseprune.spec.parsing import SpecSource as SpecSource
    from sparseprune.spec.parsing import find_spec as find_spec
    from sparseprune.spec.parsing import list_specs as list_specs
    from sparseprune.spec.parsing import parse_spec as parse_spec
    from sparseprune.spec.schema import Spec as Spec

__getattr__, __dir__ = on_first_use(
    __name__,
    {"binding": "bind", "parsing": "SpecSource find_spec list_specs parse_spec", "schema": "Spec"},
)
