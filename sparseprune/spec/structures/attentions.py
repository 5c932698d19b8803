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
    FUSED_LAYOUTS,
    HEAD_COUNTS,
    HEAD_NORMS,
    HEAD_SIZES,
    HEAD_VECTORS,
    NAMED_LAYOUTS,
)
from sparseprune.spec.structures.index import MATRIX, Structure, Units, place_of, section_of, whole
from sparseprune.spec.structures.matrices import inputs_first

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sparseprune.spec.bound import TensorInfo
    from sparseprune.spec.naming import AttentionNames
    from sparseprune.spec.structures.index import Index, Numbers


def find_attentions(index: Index) -> list[Structure]:
    """Attentions inside numbered modules; units are key/value heads with their queries, or query heads.

    Attention without as many key/value heads as two has its query heads as units.
    """
    found: dict[str, Structure] = {}
    for names in ATTENTIONS:
        ending = f".{names.output}{MATRIX}"
        for form in [each for each in index.forms if each.endswith(ending)]:
            base = form[: -len(ending)]
            if "*" not in base:
                continue
            section = section_of(index.config, base)
            for numbers, output in index.forms[form].items():
                if output.name not in found:
                    heads = _attention(index, names, (base, section), numbers)
                    if heads is not None:
                        found[output.name] = heads
    return list(found.values())


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


def _attention(
    index: Index, names: AttentionNames, where: tuple[str, Mapping[str, Any]], numbers: Numbers
) -> Structure | None:
    base, section = where
    matrices = [*names.queries, *([names.fused] if names.fused else []), names.output]
    forms = [f"{base}.{each}{MATRIX}" for each in matrices]
    tensors = [index.forms.get(form, {}).get(numbers) for form in forms]
    if any(each is None or len(each.shape) != 2 for each in tensors):
        return None
    output = tensors[-1]
    flipped = output is not None and inputs_first(index, forms[0], numbers, tensors[0].shape)  # type: ignore[union-attr]
    at = _Attention(index, base, section, numbers, int(flipped), int(not flipped))
    if names.fused:
        parts = _fused(at, names)
    elif names.latent:
        parts = _latent(at, names)
    else:
        parts = _separate(at, names)
    if not parts:
        return None
    biases = []
    for each in parts:
        bias = at.tensor(f"{each.part}.bias")
        if bias is not None and each.dim == at.out:
            biases.append(replace(each, tensor=bias.name, part=f"{each.part}.bias", dim=0))
    heads = parts[0].count * max(each.queries for each in parts)
    named = _numbered_parts([*parts, *biases])
    return Structure("heads", place_of(base, numbers), parts[0].count, named, heads)


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


def _head_size(at: _Attention, queries: int, keys: int) -> int | None:
    """How many rows of queries a head has: by a norm of heads, or by the config."""
    for name in HEAD_NORMS:
        norm = at.tensor(f"{name}{MATRIX}")
        if norm is not None and len(norm.shape) == 1 and norm.shape[0] < keys and keys % norm.shape[0] == 0:
            return norm.shape[0]
    for key in HEAD_SIZES:
        size = whole(at.section.get(key))
        if size is not None and queries % size == 0 == keys % size:
            return size
    count = head_count(at.section, at.base)
    if count is None or queries % count:
        return None
    size = queries // count
    return size if keys % size == 0 else None


def head_count(section: Mapping[str, Any], base: str) -> int | None:
    """The number of query heads that a section of a config tells of an attention."""
    side = next((side for side in ("decoder", "encoder") if side in base), "")
    sided = (f"{side}_attention_heads", f"{side}_num_attention_heads") if side else ()
    return next((count for key in (*sided, *HEAD_COUNTS) if (count := whole(section.get(key)))), None)


def _separate(at: _Attention, names: AttentionNames) -> list[Units]:
    query, key, value = [at.tensor(f"{each}{MATRIX}") for each in names.queries]
    output = at.tensor(f"{names.output}{MATRIX}")
    if query is None or key is None or value is None or output is None:
        return []
    sizes = [each.shape[at.out] for each in (query, key, value)]
    size = _head_size(at, sizes[0], sizes[1])
    if size is None:
        return []
    groups, width = sizes[1] // size, output.shape[at.into]
    if not groups or sizes[2] % groups or width % (sizes[2] // groups):
        return []
    # What is read tells the heads: rows of queries may have a gate for each besides (Qwen3.5).
    heads = width // (sizes[2] // groups)
    if heads % groups or sizes[0] % heads:
        return []
    if groups == 1 < heads:
        if output.shape[at.into] % heads:
            return []
        parts = [Units(query.name, names.queries[0], at.out, heads, sizes[0] // heads, queries=1)]
        read = output.shape[at.into] // heads
        parts.append(Units(output.name, names.output, at.into, heads, read, queries=1))
    else:
        each = heads // groups
        counts = ((query, each), (key, 0), (value, 0), (output, each))
        parts = [
            Units(one.name, name, dim, groups, one.shape[dim] // groups, queries=queries, keys=not queries)
            for name, (one, queries), dim in zip(
                (*names.queries, names.output), counts, (at.out, at.out, at.out, at.into), strict=True
            )
        ]
    return parts + _head_vectors(at, heads, parts[0].count, sizes)


def _head_vectors(at: _Attention, heads: int, units: int, sizes: Sequence[int]) -> list[Units]:
    """Norms over all heads together, and what there is one of for each head; they follow."""
    found, each = [], heads // units
    for name, size, queries in zip(HEAD_VECTORS, sizes, (each, 0), strict=False):
        norm = at.tensor(f"{name}{MATRIX}")
        rows = 0 if norm is None else norm.shape[0]
        if (
            norm is not None
            and rows % units == 0
            and (len(norm.shape) == 2 or (rows,) == norm.shape == (size,))
        ):
            found.append(
                Units(
                    norm.name, name, 0, units, rows // units, follows=True, queries=queries, keys=not queries
                )
            )
    for name, dim in (("sinks", 0), (f"relative_attention_bias{MATRIX}", 1)):
        one = at.tensor(name)
        if one is not None and one.shape[dim:] == (heads,):
            part = name.removesuffix(MATRIX)
            found.append(Units(one.name, part, dim, units, each, follows=True, queries=each))
    return found


def _latent(at: _Attention, names: AttentionNames) -> list[Units]:
    query, latent = [at.tensor(f"{each}{MATRIX}") for each in names.queries]
    output, heads = at.tensor(f"{names.output}{MATRIX}"), head_count(at.section, at.base)
    if query is None or latent is None or output is None or heads is None:
        return []
    sizes = (query.shape[0], latent.shape[0], output.shape[1])
    if any(size % heads for size in sizes):
        return []
    matrices = zip((*names.queries, names.output), (query, latent, output), sizes, (0, 0, 1), strict=True)
    return [
        Units(each.name, name, dim, heads, size // heads, queries=1, keys=name == names.queries[1])
        for name, each, size, dim in matrices
    ]


def _fused(at: _Attention, names: AttentionNames) -> list[Units]:
    fused, output = at.tensor(f"{names.fused}{MATRIX}"), at.tensor(f"{names.output}{MATRIX}")
    if fused is None or output is None:
        return []
    rows, width = fused.shape[at.out], output.shape[at.into]
    size = _head_size(at, width, width)
    if size is None:
        return []
    heads = width // size
    groups = (rows // size - heads) // 2
    if rows % size or (heads + 2 * groups) * size != rows or not groups or heads % groups:
        return []
    layout = fused_layout(at.index, names.fused)
    each = heads // groups
    read = Units(output.name, names.output, at.into, groups, width // groups, queries=each)
    if layout is None:
        return []
    if groups == 1 < heads:
        whole = Units(fused.name, names.fused, at.out, heads, size, queries=1)
        return [whole, replace(read, count=heads, size=size, queries=1)]
    if layout == "parts":
        queries = Units(fused.name, names.fused, at.out, groups, width // groups, queries=each)
        keys = replace(queries, size=size, begin=width, queries=0, keys=True)
        parts = [queries, keys, replace(keys, begin=width + groups * size), read]
    else:
        parts = [
            Units(fused.name, names.fused, at.out, groups, rows // groups, queries=each, keys=True),
            read,
        ]
    return parts + _head_vectors(at, heads, groups, (width, groups * size))


def fused_layout(index: Index, name: str) -> str | None:
    """How a fused matrix of this name holds queries, keys and values; None where nobody knows."""
    for model_type in index.types & FUSED_LAYOUTS.keys():
        return FUSED_LAYOUTS[model_type]
    return NAMED_LAYOUTS.get(name, "parts") if index.types or name not in NAMED_LAYOUTS else None
