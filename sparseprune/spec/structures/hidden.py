"""The hidden size: every dimension of a text model's tensors that is as wide as what its layers pass on.

A dimension is one of these if it has the size, and no other structure claims it. Where a tensor leaves open
which of its dimensions it is, or towers are joined at this width, nothing is found.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from sparseprune.spec.naming import EMBEDDINGS, HIDDEN_SIZES, JOINED, OTHER_TOWERS, VOCABULARIES
from sparseprune.spec.structures.attentions import find_attentions
from sparseprune.spec.structures.index import MATRIX, Structure, Units, section_of, whole
from sparseprune.spec.structures.mlps import find_mlps
from sparseprune.spec.structures.modules import find_experts, find_layers

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from sparseprune.spec.bound import TensorInfo
    from sparseprune.spec.structures.index import Index

_PLACE = (("stack", ""), ("layer", ""), ("module", ""), ("group", ""), ("expert", ""))


def find_hidden(index: Index) -> list[Structure]:
    """The hidden size of a text model, one structure over all of its tensors; units are hidden channels."""
    found = hidden_size(index)
    return [found] if isinstance(found, Structure) else []


def hidden_size(index: Index, others: Iterable[Structure] | None = None) -> Structure | str:
    """The hidden size, or why there is none; `others` are all MLPs, attentions and experts, if known."""
    tensors = [tensor for members in index.forms.values() for tensor in members.values()]
    width = _width(index, tensors)
    if width is None or not find_layers(index):
        return "no layers and no embeddings tell one"
    names = (tensor.name for tensor in tensors if OTHER_TOWERS.search(tensor.name))
    tower = next((name for name in names if not VOCABULARIES.search(name.rpartition(".")[0])), None)
    if tower is not None:
        return f"towers are joined by it, as {tower} tells"
    if others is None:
        others = (*find_mlps(index), *find_attentions(index), *find_experts(index))
    claimed: dict[str, set[int]] = {}
    for structure in others:
        for part in structure.parts:
            if part.count > 1:
                claimed.setdefault(part.tensor, set()).add(part.dim)
    parts: list[Units] = []
    for tensor in (tensor for tensor in tensors if prod(tensor.shape)):
        units = _units(tensor, width, claimed.get(tensor.name, ()))
        if units is None:
            return f"nothing tells which dimension of {tensor.name}, {list(tensor.shape)}, it is"
        parts += units
    return Structure("hidden", _PLACE, width, tuple(parts)) if parts else f"no tensor has {width} channels"


def _width(index: Index, tensors: Iterable[TensorInfo]) -> int | None:
    """The hidden size by the config, or by the embeddings of a checkpoint without one."""
    section: Mapping[str, object] = section_of(index.config, "model.layers")
    told = (size for key in HIDDEN_SIZES if (size := whole(section.get(key))) is not None)
    embeddings = (one.shape[-1] for one in tensors if EMBEDDINGS.search(one.name.removesuffix(MATRIX)))
    return next(told, None) or next(embeddings, None)


def _units(tensor: TensorInfo, width: int, claimed: Collection[int]) -> list[Units] | None:
    """The hidden channels of a tensor, none where it has none; None where two dimensions may be these."""
    shape, part = tensor.shape, tensor.name.removesuffix(MATRIX)
    if shape and JOINED.search(part) and shape[-1] == 2 * width:
        twice = [Units(tensor.name, f"{part}[{1 + at}]", 1, width, begin=at * width) for at in (0, 1)]
        return [*twice, Units(tensor.name, f"{part}[out]", 0, width)]
    dims = [dim for dim, size in enumerate(shape) if size == width and dim not in claimed]
    if len(dims) > 1 and (VOCABULARIES.search(part) or "embed" in part):
        dims = dims[-1:]  # a row for each token or place
    if len(dims) > 1:
        return None
    return [Units(tensor.name, part, dim, width) for dim in dims]
