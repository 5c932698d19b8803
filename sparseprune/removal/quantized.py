"""Codes in a smaller checkpoint: what lies beside them goes with them, and a config names modules by number.

Owns which parts of codes can be cut out without understanding one, and the lists of modules that a
quantization_config holds. Reads no data. Called by shrink and config.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct
from msgspec import field as struct_field

from sparseprune.engine.grids import prod
from sparseprune.removal.preview import numbered
from sparseprune.removal.slices import KeptIndices, kept_slices
from sparseprune.spec.problems import shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sparseprune.checkpoint.codes import Codes
    from sparseprune.engine.grids import Shape
    from sparseprune.removal.preview import RemovedMembers

    Shapes = Mapping[str, Shape]

_NUMBERED_MODULE = re.compile(r"(?:^|\.)[0-9]+(?:\.|$)")
_PLAIN = re.compile(r"[\w.*-]+")  # a name, perhaps with stars; no regex
_ADVICE = "dequantize the checkpoint first"


class Carried(Struct, frozen=True):
    """What tensors keep, those beside codes as the codes do, and why that cannot be; `whole` ones stay."""

    kept: dict[str, KeptIndices]
    whole: frozenset[str]
    problems: list[str]


def carry(shapes: Shapes, kept: Mapping[str, KeptIndices], codes: Mapping[str, Codes]) -> Carried:
    """Let what lies beside codes lose what the codes lose: all of it, or members of a stack."""
    found, whole, problems = dict(kept), list[str](), list[str]()
    for name, coded in codes.items():
        one = kept.get(name)
        if one is None or one.is_whole:
            continue
        if one.is_empty:
            found |= {other: _nothing(shapes[other]) for other in coded.beside if prod(shapes[other])}
            continue
        members = shapes[name][0]
        if (
            one.cut != (0,)
            or one.by_member
            or any(prod(shapes[other]) > 1 and shapes[other][0] != members for other in coded.beside)
        ):
            lies = f" ({coded.beside[0]} lies beside it)" if coded.beside else ""
            what = f"{name} holds {coded.what}{lies}, of which only whole experts and layers can be cut out"
            problems.append(f"{what}: {_ADVICE}")
            continue
        for other in coded.beside:
            if shapes[other][:1] == (members,):
                ones = [np.ones(size, dtype=np.bool_) for size in shapes[other][1:]]
                found[other] = kept_slices([one.along[0], *ones])
            else:
                whole.append(other)
    return Carried(found, frozenset(whole), problems)


def _nothing(shape: Shape) -> KeptIndices:
    return KeptIndices(tuple(np.zeros(size, dtype=np.bool_) for size in shape), 0)


class _Modules(Struct):
    """Names of modules in a quantization_config, as lists lose members; `problems` tell what is no name."""

    removed: RemovedMembers
    problems: list[str] = struct_field(default_factory=list)

    def settled(self, value: Any) -> Any:  # noqa: ANN401  (JSON can be anything)
        """The value with modules of members that stay under their new names, without those that go."""
        if isinstance(value, list):
            return [self.settled(one) for one in value if not (isinstance(one, str) and self._is_gone(one))]
        if isinstance(value, dict):
            for key in value:
                self._refuse_number(key)
            return {key: self.settled(one) for key, one in value.items()}
        if not isinstance(value, str) or not self._counts(value):
            return value
        if _PLAIN.fullmatch(value) and any(before in self.removed.numbers for before, *_ in _lists(value)):
            return self.removed.renamed(f"{value}.x").removesuffix(".x")
        self._refuse_number(value)
        return value

    def _is_gone(self, text: str) -> bool:
        return bool(_PLAIN.fullmatch(text)) and self.removed.has(f"{text}.x")

    def _counts(self, text: str) -> bool:
        """Whether a text has a module's number that may change: of a list called as one that loses some."""
        plain = text.replace("\\", "")
        ends = {before.rpartition(".")[2] for before in self.removed.numbers}
        return _NUMBERED_MODULE.search(plain) is not None and any(f"{end}." in plain for end in ends)

    def _refuse_number(self, text: str) -> None:
        if self._counts(text):
            number = f"by a number, which may change: {_ADVICE}"
            self.problems.append(f"config.json: quantization_config names {shown(text)} {number}")


def _lists(text: str) -> Iterator[tuple[str, int, int]]:
    return numbered(f"{text}.x")


def settle_modules(stated: object, removed: RemovedMembers) -> tuple[object, list[str]]:
    """A quantization_config for the members of lists that stay, and what it names that cannot be settled."""
    modules = _Modules(removed)
    settled = modules.settled(stated) if removed.numbers else stated
    return settled, list(dict.fromkeys(modules.problems))[:1]
