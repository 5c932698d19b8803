"""Attentions: the matrices that write queries, keys and values of the same heads, and what reads them.

Owns how many heads there are and where each lies, in separate, fused and latent matrices.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from sparseprune.spec.naming import (
    ATTENTIONS,
    DELTA_NETS,
    EACH_HEAD,
    EACH_KEY_HEAD,
    FUSED_LAYOUTS,
    HEAD_COUNTS,
    HEAD_NORMS,
    HEAD_ROWS,
    HEAD_SIZES,
    KEY_VECTORS,
    NAMED_LAYOUTS,
    QUERY_VECTORS,
)
from sparseprune.spec.structures.delta_nets import find_delta_nets
from sparseprune.spec.structures.index import (
    MATRIX,
    Structure,
    Units,
    layer_count,
    place_of,
    section_of,
    whole,
)
from sparseprune.spec.structures.matrices import inputs_first
from sparseprune.spec.structures.unlike_attentions import UNLIKE, find_unlike

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sparseprune.spec.bound import TensorInfo
    from sparseprune.spec.naming import AttentionNames
    from sparseprune.spec.structures.index import Index, Numbers


def find_attentions(index: Index) -> list[Structure]:
    """Attentions inside numbered modules; units are key/value heads with their queries, or query heads.

    Attention without as many key/value heads as two has its query heads as units. Layers that read the keys
    and values of another layer are parts of that layer's attention. Delta nets are attentions, too.
    """
    found: dict[str, Structure] = {}
    for names in () if index.is_one_of(UNLIKE) else ATTENTIONS:
        ending = f".{names.output}{MATRIX}"
        for form in [each for each in index.forms if each.endswith(ending)]:
            base = form[: -len(ending)]
            if "*" not in base or DELTA_NETS.search(base):
                continue
            section = section_of(index.config, base)
            for numbers, output in index.forms[form].items():
                if output.name not in found:
                    heads = _attention(index, names, (base, section), numbers)
                    if heads is not None:
                        found[output.name] = heads
    usual = _with_sharing_layers(index, list(found.values()))
    return [*usual, *find_delta_nets(index), *find_unlike(index)]


class _Attention(Struct, frozen=True):
    """What is known of an attention: its matrices, and the dimensions of outputs and of inputs in them."""

    index: Index
    base: str
    section: Mapping[str, Any]
    numbers: Numbers
    out: int
    into: int

    def tensor(self, name: str) -> TensorInfo | None:
        return self.index.forms.get(f"{self.base}.{name}", {}).get(self.numbers)

    def matrix(self, name: str) -> TensorInfo:
        return self.index.forms[f"{self.base}.{name}{MATRIX}"][self.numbers]


class _Heads(Struct, frozen=True):
    """Units of matrices, and how many rows all query heads and all key/value heads that are units have."""

    parts: list[Units]
    query_rows: int
    key_rows: int = 0

    @property
    def units(self) -> int:
        return self.parts[0].count

    @property
    def queries(self) -> int:
        """How many query heads a unit has."""
        return max(each.queries for each in self.parts)


def _attention(
    index: Index, names: AttentionNames, where: tuple[str, Mapping[str, Any]], numbers: Numbers
) -> Structure | None:
    base, section = where
    matrices = [*names.queries, *([names.fused] if names.fused else []), names.output]
    forms = [f"{base}.{each}{MATRIX}" for each in matrices]
    shapes = [shape for form in forms if (shape := index.shape(form, numbers)) is not None]
    if len(shapes) < len(forms) or any(len(shape) != 2 for shape in shapes):
        return None
    if names.missing and index.shape(f"{base}.{names.missing}{MATRIX}", numbers) is not None:
        return None
    flipped = inputs_first(index, forms[0], numbers, shapes[0])
    at = _Attention(index, base, section, numbers, int(flipped), int(not flipped))
    heads = (_fused if names.fused else _latent if names.latent else _separate)(at, names)
    if heads is None:
        return None
    parts = [*heads.parts, *_matrices_beside(at, heads)]
    for each in list(parts):
        bias = at.tensor(f"{each.part}.bias")
        if bias is not None and each.dim == at.out:
            parts.append(replace(each, tensor=bias.name, part=f"{each.part}.bias", dim=0))
    parts += _vectors_beside(at, heads)
    place = place_of(base, numbers)
    return Structure("heads", place, heads.units, _numbered_parts(parts), heads.units * heads.queries)


def _numbered_parts(parts: Sequence[Units]) -> tuple[Units, ...]:
    """Parts with names of their own: those of one tensor are told apart by what they begin with."""
    begins: dict[str, set[int]] = defaultdict(set)
    for each in parts:
        begins[each.tensor].add(each.begin)
    named = []
    for each in parts:
        order = sorted(begins[each.tensor])
        part = each.part if len(order) == 1 else f"{each.part}[{'qkv'[order.index(each.begin)]}]"
        named.append(replace(each, part=part))
    return tuple(named)


# -- how many heads ----------------------------------------------------------------------------------


def _head_size(at: _Attention, queries: int, keys: int) -> int | None:
    """How many rows of queries a head has: by a norm of heads, or by the config."""
    for name in HEAD_NORMS:
        norm = at.tensor(f"{name}{MATRIX}")
        if norm is not None and len(norm.shape) == 1 and norm.shape[0] < keys and keys % norm.shape[0] == 0:
            return norm.shape[0]
    count = head_count(at.section, at.base, at.numbers)
    told = [size for key in HEAD_SIZES if (size := whole(at.section.get(key))) is not None]
    if count is not None and queries % count == 0:
        told.sort(key=lambda size: size * count != queries)
        told.append(queries // count)
    return next((size for size in told if queries % size == 0 == keys % size), None)


def head_count(section: Mapping[str, Any], base: str, numbers: Sequence[int] = ()) -> int | None:
    """The number of query heads that a section of a config tells of an attention.

    A list has a number for each stage, which the first of two numbers in a name counts.
    """
    side = next((side for side in ("decoder", "encoder") if side in base), "")
    sided = (f"{side}_attention_heads", f"{side}_num_attention_heads") if side else ()
    for key in (*sided, *HEAD_COUNTS):
        value = section.get(key)
        if isinstance(value, list) and len(numbers) > 1 and numbers[0] < len(value):
            value = value[numbers[0]]
        if (count := whole(value)) is not None:
            return count
    return None


# -- where they lie ----------------------------------------------------------------------------------


def _separate(at: _Attention, names: AttentionNames) -> _Heads | None:
    written, output = [at.matrix(name) for name in names.queries], at.matrix(names.output)
    rows, width = [each.shape[at.out] for each in written], output.shape[at.into]
    size = _head_size(at, rows[0], rows[1])
    if size is None:
        return None
    groups = rows[1] // size
    if not groups or rows[-1] % groups or width % (rows[-1] // groups):
        return None
    # What is read tells the heads: rows of queries may have a gate for each besides (Qwen3.5).
    heads = width // (rows[-1] // groups)
    if heads % groups or rows[0] % heads:
        return None
    if groups == 1 < heads:
        query = Units(written[0].name, names.queries[0], at.out, heads, rows[0] // heads, queries=1)
        read = Units(output.name, names.output, at.into, heads, width // heads, queries=1)
        return _Heads([query, read], rows[0])
    each = heads // groups
    parts = [
        Units(one.name, name, at.out, groups, one.shape[at.out] // groups, keys=True)
        for name, one in zip(names.queries, written, strict=True)
    ]
    parts[0] = replace(parts[0], queries=each, keys=False)
    parts.append(Units(output.name, names.output, at.into, groups, width // groups, queries=each))
    return _Heads(parts, rows[0], rows[1])


def _latent(at: _Attention, names: AttentionNames) -> _Heads | None:
    query, latent, output = [at.matrix(name) for name in (*names.queries, names.output)]
    heads = head_count(at.section, at.base)
    sizes = (query.shape[0], latent.shape[0], output.shape[1])
    if heads is None or any(size % heads for size in sizes):
        return None
    matrices = zip((*names.queries, names.output), (query, latent, output), sizes, (0, 0, 1), strict=True)
    parts = [
        Units(each.name, name, dim, heads, size // heads, queries=1, keys=name == names.queries[1])
        for name, each, size, dim in matrices
    ]
    return _Heads(parts, sizes[0], sizes[1])


def _fused(at: _Attention, names: AttentionNames) -> _Heads | None:
    fused, output = at.matrix(names.fused), at.matrix(names.output)
    rows, width = fused.shape[at.out], output.shape[at.into]
    size, layout = _head_size(at, width, width), fused_layout(at.index, names.fused)
    if size is None or layout is None:
        return None
    heads = width // size
    groups = (rows // size - heads) // 2
    if rows % size or (heads + 2 * groups) * size != rows or not groups or heads % groups:
        return None
    each = heads // groups
    whole = Units(fused.name, names.fused, at.out, groups, rows // groups, queries=each, keys=True)
    read = Units(output.name, names.output, at.into, groups, width // groups, queries=each)
    if groups == 1 < heads:
        alone = {"count": heads, "size": size, "queries": 1, "keys": False}
        return _Heads([replace(whole, **alone), replace(read, **alone)], width)
    if layout != "parts":
        return _Heads([whole, read], width, groups * size)
    query = replace(whole, size=width // groups, keys=False)
    key = replace(whole, size=size, begin=width, queries=0)
    return _Heads([query, key, replace(key, begin=width + groups * size), read], width, groups * size)


def fused_layout(index: Index, name: str) -> str | None:
    """How a fused matrix of this name holds queries, keys and values; None where nobody knows."""
    for model_type in index.types & FUSED_LAYOUTS.keys():
        return FUSED_LAYOUTS[model_type]
    return NAMED_LAYOUTS.get(name, "parts") if index.types or name not in NAMED_LAYOUTS else None


def _matrices_beside(at: _Attention, heads: _Heads) -> Iterator[Units]:
    """Other matrices that write all query heads, in a module that has attention alone."""
    for name in HEAD_ROWS if "att" in at.base.rpartition(".")[2] else ():
        one = at.tensor(f"{name}{MATRIX}")
        if one is not None and len(one.shape) == 2 and one.shape[at.out] == heads.query_rows:
            size = heads.query_rows // heads.units
            yield Units(one.name, name, at.out, heads.units, size, queries=heads.queries)


def _vectors_beside(at: _Attention, heads: _Heads) -> Iterator[Units]:
    """Norms and biases over all heads together, and what there is one of for each head; they follow."""
    for names, rows, of_queries in (
        (QUERY_VECTORS, heads.query_rows, True),
        (KEY_VECTORS, heads.key_rows, False),
    ):
        for name in names:
            one = at.tensor(name)
            if one is None or one.shape[0] % heads.units or not rows:
                continue
            if len(one.shape) == 2 or one.shape == (rows,):
                part, size = name.removesuffix(MATRIX), one.shape[0] // heads.units
                queries = heads.queries if of_queries else 0
                yield Units(
                    one.name, part, 0, heads.units, size, follows=True, queries=queries, keys=not queries
                )
    for name, dim in EACH_HEAD:
        one = at.tensor(name)
        if one is not None and len(one.shape) <= 2 and one.shape[dim:][:1] == (heads.units * heads.queries,):
            part, each = name.removesuffix(MATRIX), heads.queries
            yield Units(one.name, part, dim, heads.units, each, follows=True, queries=each)
    for name, dim in EACH_KEY_HEAD if heads.key_rows else ():
        one = at.tensor(name)
        rows = 0 if one is None or dim >= len(one.shape) else one.shape[dim]
        if one is not None and rows in {heads.units, heads.key_rows}:
            part, size = name.removesuffix(MATRIX), rows // heads.units
            yield Units(one.name, part, dim, heads.units, size, follows=True, keys=True)


# -- layers that share keys and values ---------------------------------------------------------------


def _with_sharing_layers(index: Index, found: list[Structure]) -> list[Structure]:
    """Queries of layers that read the keys and values of an earlier one are parts of its attention."""
    by_place = {structure.place: structure for structure in found}
    for stack in {dict(place)["stack"] for place in by_place}:
        for layer, source in _sharing_layers(section_of(index.config, str(stack))):
            for place, structure in list(by_place.items()):
                if place[:2] != (("stack", stack), ("layer", source)):
                    continue
                own = by_place.pop((place[0], ("layer", layer), *place[2:]), None)
                parts = own.parts if own else _queries_of(index, structure, layer)
                parts = tuple([replace(each, part=f"{layer}.{each.part}") for each in parts])
                by_place[place] = replace(structure, parts=(*structure.parts, *parts))
    return list(by_place.values())


def _sharing_layers(section: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Layers that a config lets share keys and values, each with the last one of its type that has some."""
    count, shared = layer_count(section), whole(section.get("num_kv_shared_layers"))
    types = section.get("layer_types")
    if count is None or shared is None or not isinstance(types, list) or len(types) != count:
        return
    for layer in range(max(0, count - shared), count):
        sources = [at for at in range(count - shared) if types[at] == types[layer]]
        if sources:
            yield layer, sources[-1]


def _queries_of(index: Index, source: Structure, layer: int) -> tuple[Units, ...]:
    """The units of a layer that has only queries, and what reads the heads: those of the layer it shares."""
    place = dict(source.place)
    found = []
    for each in source.parts:
        members = index.forms.get(f"{place['stack']}.*.{place['module']}.{each.part}{MATRIX}", {})
        own = {numbers[0]: tensor for numbers, tensor in members.items()}
        if not each.keys and layer in own and own[layer].shape == own[int(place["layer"])].shape:
            found.append(replace(each, tensor=own[layer].name))
    return tuple(found)
