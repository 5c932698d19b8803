"""Attentions that lie in matrices unlike those of others: of XLNet, CodeGen, DiffLlama and JetMoE.

Owns where the rows and columns of their heads are. Called by find_attentions, which knows all others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from sparseprune.spec.naming import HEAD_COUNTS, HEAD_SIZES
from sparseprune.spec.structures.index import MATRIX, Structure, Units, place_of, section_of, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any

    from sparseprune.spec.bound import Captures, TensorInfo
    from sparseprune.spec.structures.index import Index, Numbers

    Find = Callable[["_Parts"], Iterator[Structure]]


class _Parts(Struct, frozen=True):
    """The tensors of a module, with its section of the config."""

    index: Index
    base: str
    numbers: Numbers
    section: Mapping[str, Any]

    @property
    def place(self) -> Captures:
        return place_of(self.base, self.numbers)

    def get(self, name: str, dims: int) -> TensorInfo | None:
        """The tensor of this name with so many dimensions; None where there is none."""
        found = self.index.forms.get(f"{self.base}.{name}", {}).get(self.numbers)
        return found if found is not None and len(found.shape) == dims else None

    def number(self, *keys: str) -> int | None:
        """The first positive integer that the section has under one of these keys."""
        found = (whole(self.section.get(key)) for key in keys)
        return next((each for each in found if each is not None), None)


def find_unlike(index: Index) -> Iterator[Structure]:
    """The attentions of these models inside numbered modules."""
    for ending, find in (of for model, of in UNLIKE.items() if index.is_one_of((model,))):
        for form in [each for each in index.forms if each.endswith(f".{ending}")]:
            base = form[: -len(ending) - 1]
            section = section_of(index.config, base)
            for numbers in index.forms[form] if "*" in base else ():
                yield from find(_Parts(index, base, numbers, section))


def _in_a_dimension(of: _Parts) -> Iterator[Structure]:
    """XLNet has a dimension of heads in every tensor."""
    found = {name: of.get(name, 3) for name in "qkvor"}
    heads = {0 if each is None else each.shape[1] for each in found.values()}
    if len(heads) > 1 or not min(heads):
        return
    (count,) = heads
    parts = [
        Units(each.name, name, 1, count, queries=int(name not in "kv"), keys=name in "kv")
        for name, each in found.items()
        if each is not None
    ]
    for name, dims in (("r_r_bias", 2), ("r_s_bias", 2), ("r_w_bias", 2), ("seg_embed", 3)):
        one = of.get(name, dims)
        if one is not None and one.shape[-2] == count:
            parts.append(Units(one.name, name, dims - 2, count, follows=True, queries=1))
    yield Structure("heads", of.place, count, tuple(parts), count)


_BLOCKS = 4  # in which CodeGen's matrices lie one behind the other, whatever the number of heads


def _in_blocks(of: _Parts) -> Iterator[Structure]:
    """CodeGen has what writes a quarter of the heads behind another quarter; the heads of one compete."""
    fused, output = of.get(f"qkv_proj{MATRIX}", 2), of.get(f"out_proj{MATRIX}", 2)
    heads = of.number(*HEAD_COUNTS)
    if fused is None or output is None or heads is None or heads % _BLOCKS:
        return
    width = output.shape[1]
    if fused.shape[0] != 3 * width or width % heads:
        return
    count, size, local = heads // _BLOCKS, width // heads, width // _BLOCKS
    for block in range(_BLOCKS):
        query = Units(fused.name, "qkv_proj[q]", 0, count, size, begin=3 * block * local, queries=1)
        value = replace(query, part="qkv_proj[v]", begin=query.begin + local, queries=0, keys=True)
        key = replace(value, part="qkv_proj[k]", begin=value.begin + local)
        read = Units(output.name, "out_proj", 1, count, size, begin=block * local, queries=1)
        place = (*of.place[:3], ("group", block), *of.place[4:])
        yield Structure("heads", place, count, (query, key, value, read), count)


def _in_pairs(of: _Parts) -> Iterator[Structure]:
    """DiffLlama subtracts each head of the second half from one of the first; both go, with their keys."""
    query, key, value, output = (of.get(f"{name}_proj{MATRIX}", 2) for name in "qkvo")
    heads = of.number(*HEAD_COUNTS)
    if query is None or key is None or value is None or output is None or heads is None:
        return
    rows = query.shape[0]
    size = rows // heads
    groups = key.shape[0] // max(1, size)
    if rows % heads or key.shape != value.shape or output.shape[1] != rows or groups * size != key.shape[0]:
        return
    if not groups or groups % 2 or heads % groups:
        return
    units, each = groups // 2, heads // groups
    parts = [
        Units(query.name, "q_proj", 0, units, each * size, runs=2, queries=each),
        Units(key.name, "k_proj", 0, units, size, runs=2, keys=True),
        Units(value.name, "v_proj", 0, units, size, runs=2, keys=True),
    ]
    for one in list(parts):
        bias = of.get(f"{one.part}.bias", 1)
        if bias is not None:
            parts.append(replace(one, tensor=bias.name, part=f"{one.part}.bias"))
    parts.append(Units(output.name, "o_proj", 1, units, 2 * each * size, queries=2 * each))
    yield Structure("heads", of.place, units, tuple(parts), heads)


def _in_experts(of: _Parts) -> Iterator[Structure]:
    """JetMoE has the queries of a key/value head in each expert, of which a token takes some."""
    both = of.get(f"kv_proj{MATRIX}", 2)
    writes, reads = of.get(f"experts.input_linear{MATRIX}", 3), of.get(f"experts.output_linear{MATRIX}", 3)
    groups, size = of.number("num_key_value_heads"), of.number(*HEAD_SIZES)
    taken = of.number("num_experts_per_tok")
    if both is None or writes is None or reads is None or groups is None or size is None or taken is None:
        return
    rows = groups * size
    if (both.shape[0], writes.shape[1], reads.shape[2]) != (2 * rows, rows, rows) or size % taken:
        return
    key = Units(both.name, "kv_proj[k]", 0, groups, size, keys=True)
    parts = (
        key,
        replace(key, part="kv_proj[v]", begin=rows),
        Units(writes.name, "experts.input_linear", 1, groups, size, keys=True),
        # The heads of all experts that a token takes are those that a config counts.
        Units(reads.name, "experts.output_linear", 2, groups, size, queries=taken),
    )
    yield Structure("heads", of.place, groups, parts, groups * taken)


UNLIKE: Mapping[str, tuple[str, Find]] = {
    "xlnet": ("o", _in_a_dimension),
    "codegen": (f"out_proj{MATRIX}", _in_blocks),
    "diffllama": (f"o_proj{MATRIX}", _in_pairs),
    "jetmoe": (f"kv_proj{MATRIX}", _in_experts),
}
"""By model type the end of a tensor's name behind its module, and what finds its heads."""
