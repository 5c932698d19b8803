"""Structures: the MLPs, attentions, experts, layers and matrices of a checkpoint, found by names and shapes.

Owns which dimension of which tensor counts the units of a structure, and how a tensor looks with its units in
front. Reads headers and config.json alone. Called by locating, and by coverage and removal.
"""

from collections.abc import Callable, Mapping

from sparseprune.spec.structures.attentions import find_attentions as find_attentions
from sparseprune.spec.structures.attentions import fused_layout as fused_layout
from sparseprune.spec.structures.attentions import head_count as head_count
from sparseprune.spec.structures.hidden import find_hidden as find_hidden
from sparseprune.spec.structures.hidden import hidden_size as hidden_size
from sparseprune.spec.structures.index import CAPTURES as CAPTURES
from sparseprune.spec.structures.index import KINDS as KINDS
from sparseprune.spec.structures.index import NAMES as NAMES
from sparseprune.spec.structures.index import Index as Index
from sparseprune.spec.structures.index import Kind as Kind
from sparseprune.spec.structures.index import Outlook as Outlook
from sparseprune.spec.structures.index import Structure as Structure
from sparseprune.spec.structures.index import Units as Units
from sparseprune.spec.structures.index import captures_of as captures_of
from sparseprune.spec.structures.index import layer_count as layer_count
from sparseprune.spec.structures.index import module_of as module_of
from sparseprune.spec.structures.index import nested_key as nested_key
from sparseprune.spec.structures.index import outlook as outlook
from sparseprune.spec.structures.index import place_of as place_of
from sparseprune.spec.structures.index import section_of as section_of
from sparseprune.spec.structures.index import with_defaults as with_defaults
from sparseprune.spec.structures.index import with_expert as with_expert
from sparseprune.spec.structures.interiors import Inside as Inside
from sparseprune.spec.structures.interiors import Interior as Interior
from sparseprune.spec.structures.interiors import find_interiors as find_interiors
from sparseprune.spec.structures.matrices import inputs_first as inputs_first
from sparseprune.spec.structures.matrices import is_layer_matrix as is_layer_matrix
from sparseprune.spec.structures.matrices import is_matrix_shape as is_matrix_shape
from sparseprune.spec.structures.matrices import matrices as matrices
from sparseprune.spec.structures.matrices import routed_modules as routed_modules
from sparseprune.spec.structures.mlps import find_mlps as find_mlps
from sparseprune.spec.structures.modules import expert_modules as expert_modules
from sparseprune.spec.structures.modules import find_experts as find_experts
from sparseprune.spec.structures.modules import find_layers as find_layers
from sparseprune.spec.structures.modules import find_routers as find_routers

_FINDERS: Mapping[Kind, Callable[[Index], list[Structure]]] = {
    "mlp": find_mlps,
    "heads": find_attentions,
    "experts": find_experts,
    "layers": find_layers,
    "hidden": find_hidden,
}


def find(kind: Kind, index: Index) -> list[Structure]:
    """All structures of a kind; "matrices" are no structure, see `matrices`."""
    return _FINDERS[kind](index)
