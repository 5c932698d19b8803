"""Interiors: the units inside an MLP or a head whose order nothing outside knows, so that they may move.

Owns where the channels of an MLP and the dimensions of values lie in every tensor that has them, and why some
may not be permuted. Goes by names, shapes and the config. Called by execution.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from sparseprune.spec.naming import ATTENTIONS, DELTA_NETS, MEMBER
from sparseprune.spec.structures.attentions import find_attentions, fused_layout
from sparseprune.spec.structures.index import MATRIX, Units, module_of, section_of
from sparseprune.spec.structures.mlps import find_mlps
from sparseprune.spec.structures.unlike_attentions import UNLIKE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sparseprune.spec.bound import TensorInfo
    from sparseprune.spec.naming import AttentionNames
    from sparseprune.spec.structures.index import Index, Structure


class Inside(Struct, frozen=True):
    """Where the units of an interior lie along a dimension of a tensor.

    Unit u of set s has `width` indices from `begin + s * step + (r * size + u) * width` on, in each of `runs`
    r, where the interior has `size` units in a set. `stacked`: the first dimension counts the sets.
    """

    tensor: str
    dim: int
    begin: int = 0
    step: int = 0
    runs: int = 1
    width: int = 1
    stacked: bool = False


class Interior(Struct, frozen=True):
    """Units of a module that may change places with each other, in every tensor in the same way.

    There are `sets` of `size` units, each of which has an order of its own: one for each key/value head or
    each expert of a stack. `problem` says why nothing may move; then `parts` may be incomplete.
    """

    kind: Literal["mlp", "heads"]
    module: str
    sets: int
    size: int
    parts: tuple[Inside, ...]
    problem: str = ""


def find_interiors(index: Index) -> list[Interior]:
    """Of every MLP its channels, of every attention the dimensions of its values."""
    modules = _Modules(index, {})
    mlps = [_channels(modules, one) for one in find_mlps(index)]
    return [*mlps, *(_values(modules, one) for one in find_attentions(index))]


class _Modules(Struct, frozen=True):
    """The tensors of modules, by the form of a module's name; `known` is filled on demand."""

    index: Index
    known: dict[str, dict[tuple[int, ...], list[TensorInfo]]]

    def tensors(self, module: str) -> Iterable[TensorInfo]:
        """All tensors of a module and of those in it."""
        form = MEMBER.sub("*", f"{module}.x")[:-1]
        numbers = tuple(map(int, MEMBER.findall(f"{module}.x")))
        if form not in self.known:
            found = self.known[form] = {}
            for own, members in self.index.forms.items():
                if own.startswith(form):
                    for each, tensor in members.items():
                        found.setdefault(each[: len(numbers)], []).append(tensor)
        return self.known[form].get(numbers, ())


# -- channels of MLPs --------------------------------------------------------------------------------


def _channels(modules: _Modules, mlp: Structure) -> Interior:
    """The channels of an MLP; what else is as long as they are in its module may depend on their order."""
    module, stacked = module_of(mlp), any(part.stacked for part in mlp.parts)
    shapes = {tensor.name: tensor.shape for tensor in modules.tensors(module)}
    sets = next((shapes[part.tensor][0] for part in mlp.parts if part.stacked), 1)
    parts = tuple(_inside(part) for part in mlp.parts)
    problem = ""
    if any(part.flat > 1 for part in mlp.parts):
        problem = "its experts lie one below another in its matrices"
    elif (name := _as_long(mlp, shapes)) is not None:
        problem = f"{name} is as long as its channels, and nothing tells whether they are these"
    elif stacked and not all(part.stacked for part in mlp.parts):
        problem = "some of its tensors have experts, and others have none"
    return Interior("mlp", module, sets, mlp.units, parts, problem)


def _inside(part: Units) -> Inside:
    return Inside(part.tensor, part.dim, part.begin, width=part.size, stacked=part.stacked)


def _as_long(mlp: Structure, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """A tensor that is no part of an MLP and has a dimension of as many indices as a part."""
    own = {part.tensor for part in mlp.parts}
    beside = {f"{part.tensor.removesuffix(MATRIX)}.bias" for part in mlp.parts}  # of what reads the channels
    sizes = {shapes[part.tensor][part.dim] for part in mlp.parts if part.tensor in shapes}
    sizes.add(mlp.units)
    for name, shape in shapes.items():
        if name not in own and name not in beside and not sizes.isdisjoint(shape):
            return name
    return None


# -- dimensions of values ----------------------------------------------------------------------------

# What an attention may have beside queries, keys, values and what reads them, and values do not pass through.
_HARMLESS = re.compile(
    r"^(?:(?:self\.|attention\.)?(?:q|k|query|key)_?(?:layer_?)?norm\.(?:weight|bias)"
    r"|(?:\w+\.)*(?:rotary_emb|rotary_embedding|rope)\.\w+|(?:masked_)?bias|sinks|logit_scale"
    r"|(?:self\.)?(?:relative_attention_bias|distance_embedding)\.weight"
    r"|(?:self\.)?(?:relative_position_bias_table|relative_position_index|logit_scale)"
    r"|(?:self\.)?continuous_position_bias_mlp\..*|(?:pos_)?bias_[uv]|linear_pos\.weight"
    r"|(?:self\.)?pos_(?:key|query)_proj\.(?:weight|bias)|output\.LayerNorm\.(?:weight|bias))$"
)


class _Parts(Struct, frozen=True):
    """Of an attention the units that values and what reads them have, and the names of all that is known."""

    values: Units
    reads: Units
    biases: tuple[Units, ...]
    names: frozenset[str]
    queries: int
    keys: int


def _values(modules: _Modules, heads: Structure) -> Interior:
    """The dimensions of the values of each key/value head, the same for all query heads that read them."""
    module, index = module_of(heads), modules.index
    tensors = {tensor.name.removeprefix(f"{module}."): tensor for tensor in modules.tensors(module)}
    if DELTA_NETS.search(module) or index.is_one_of(UNLIKE):
        return Interior("heads", module, 0, 0, (), "its heads are unlike those of other attentions")
    found = next(filter(None, (_parts_of(index, heads, tensors, names) for names in ATTENTIONS)), None)
    if found is None:
        return Interior("heads", module, 0, 0, _known(heads), "its values have no rows of their own")
    size, runs = found.values.size, found.reads.size // max(1, found.values.size)
    sets = found.values.count
    if sets == 1 and found.reads.count > 1:  # one key/value head that all query heads read
        runs = found.reads.count * found.reads.size // size
    reads = found.reads
    parts = (
        *(Inside(one.tensor, one.dim, one.begin, size) for one in (found.values, *found.biases)),
        Inside(reads.tensor, reads.dim, reads.begin, runs * size, runs),
    )
    problem = _problem(index, module, found, tensors, whole=sets * runs * size)
    if any(not part.tensor.startswith(f"{module}.") for part in heads.parts):
        problem = "another layer reads its values, too"
    return Interior("heads", module, sets, size, parts, problem)


def _problem(
    index: Index, module: str, found: _Parts, tensors: Mapping[str, TensorInfo], *, whole: int
) -> str:
    """Why the dimensions of values may not move; "" where they may."""
    if whole != found.reads.count * found.reads.size:
        return "its values are not as long as what is read of them"
    if found.queries != found.keys:
        return "its queries have a gate for each dimension of the values"
    if section_of(index.config, f"{module}.x").get("rotary_value"):
        return "its values are rotated"
    for name in tensors:
        if name not in found.names and not _HARMLESS.match(name):
            return f"nothing tells whether values pass through {module}.{name}"
    return ""


def _parts_of(
    index: Index, heads: Structure, tensors: Mapping[str, TensorInfo], names: AttentionNames
) -> _Parts | None:
    """The parts of an attention by a naming scheme; None where they are not there or not to be told apart."""
    parts = {part.part: part for part in heads.parts}
    if names.latent or names.missing or names.output not in parts:
        return None
    if names.fused:
        if fused_layout(index, names.fused) != "parts":
            return None
        query, key, value = (f"{names.fused}[{one}]" for one in "qkv")
        own: tuple[str, ...] = (names.fused,)
        bias = f"{names.fused}.bias[v]"
    elif len(names.queries) == 3:
        query, key, value = names.queries
        own = names.queries
        bias = f"{value}.bias"
    else:
        return None
    known = frozenset(f"{each}{end}" for each in (*own, names.output) for end in (MATRIX, ".bias"))
    if query not in parts:
        return None
    reads, queries = parts[names.output], parts[query]
    if value in parts and key in parts:
        biases = tuple(parts[each] for each in (bias,) if each in parts)
        each = queries.size // max(1, reads.size // max(1, parts[value].size))
        return _Parts(parts[value], reads, biases, known, each, parts[key].size)
    return _of_one(tensors, names, parts[query], reads, known)


def _of_one(
    tensors: Mapping[str, TensorInfo],
    names: AttentionNames,
    queries: Units,
    reads: Units,
    known: frozenset[str],
) -> _Parts | None:
    """Where all query heads, which are the units, share one key/value head in matrices of their own."""
    if names.fused or len(names.queries) != 3:
        return None
    key, value = (tensors.get(f"{each}{MATRIX}") for each in names.queries[1:])
    if key is None or value is None or len(value.shape) != 2 or len(key.shape) != 2:
        return None
    dim = queries.dim
    units = _units(value, names.queries[2], dim, value.shape[dim])
    bias = tensors.get(f"{names.queries[2]}.bias")
    biases = () if bias is None else (_units(bias, f"{names.queries[2]}.bias", 0, bias.shape[0]),)
    return _Parts(units, reads, biases, known, queries.size, key.shape[dim])


def _units(tensor: TensorInfo, part: str, dim: int, size: int) -> Units:
    return Units(tensor.name, part, dim, 1, size)


def _known(heads: Structure) -> tuple[Inside, ...]:
    """The parts of which it is known that they read heads, so that a rule that reaches them can be told."""
    return tuple(Inside(part.tensor, part.dim) for part in heads.parts if part.queries and not part.keys)
