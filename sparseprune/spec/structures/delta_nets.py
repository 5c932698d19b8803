"""Gated delta nets: linear attention whose key heads each write to states of several value heads.

Owns where the rows of a head lie in each tensor; a unit is a key head with its value heads. Reads names,
shapes and the config. Called by find_attentions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparseprune.spec.naming import DELTA_INPUTS, DELTA_KEYS, DELTA_NETS, DELTA_READS, DELTA_VALUES
from sparseprune.spec.structures.index import MATRIX, Structure, Units, place_of, section_of, whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sparseprune.engine.grids import Shape
    from sparseprune.spec.structures.index import Index, Numbers


def find_delta_nets(index: Index) -> Iterator[Structure]:
    """The delta nets inside numbered modules whose sizes are those of the config."""
    for name in DELTA_READS:
        ending = f".{name}{MATRIX}"
        for form in [each for each in index.forms if each.endswith(ending)]:
            base = form[: -len(ending)]
            if "*" not in base or not DELTA_NETS.search(base):
                continue
            section = section_of(index.config, base)
            for numbers in index.forms[form]:
                net = _net(index, section, (base, name), numbers)
                if net is not None:
                    yield net


def _net(
    index: Index, section: Mapping[str, Any], where: tuple[str, str], numbers: Numbers
) -> Structure | None:
    base, reads = where
    keys, values = whole(section.get(DELTA_KEYS[0])), whole(section.get(DELTA_VALUES[0]))
    key_size, value_size = whole(section.get(DELTA_KEYS[1])), whole(section.get(DELTA_VALUES[1]))
    if keys is None or values is None or key_size is None or value_size is None or values % keys:
        return None
    each = values // keys
    sizes = {"k": key_size, "v": each * value_size, "n": each}
    parts: list[Units] = []
    for name, layout in DELTA_INPUTS.items():
        one = index.forms.get(f"{base}.{name}", {}).get(numbers)
        if one is None:
            continue
        own = list(_rows(Units(one.name, name.removesuffix(MATRIX), 0, keys), layout, sizes, each))
        if not _fill(own, one.shape):
            return None
        parts += own
    output = index.forms[f"{base}.{reads}{MATRIX}"][numbers]
    if len(output.shape) != 2 or output.shape[1] != values * value_size or not parts:
        return None
    parts.append(Units(output.name, reads, 1, keys, sizes["v"], queries=each))
    return Structure("heads", place_of(base, numbers), keys, tuple(parts), values)


def _rows(units: Units, layout: str, sizes: Mapping[str, int], each: int) -> Iterator[Units]:
    """The units of a tensor: of each of its parts, which lie one behind the other."""
    begin, pieces = 0, layout.split()
    for place, piece in enumerate(pieces):
        size = sum(sizes[kind] for kind in piece)
        has_keys = "k" in piece or len(piece) > 1  # rows of several kinds are told apart by key heads alone
        yield Units(
            tensor=units.tensor,
            part=f"{units.part}[{place}]" if len(pieces) > 1 else units.part,
            dim=units.dim,
            count=units.count,
            size=size,
            begin=begin,
            follows=not units.tensor.endswith(MATRIX),
            queries=0 if piece == "k" else each,
            keys=has_keys,
        )
        begin += units.count * size


def _fill(units: list[Units], shape: Shape) -> bool:
    """Whether the units of a tensor are all that it has."""
    return shape[:1] == (sum(one.count * one.size for one in units),)
