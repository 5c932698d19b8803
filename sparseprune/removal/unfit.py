"""Modules that are named as an MLP or an attention and are none: what contradicts the config, or a neighbour.

Owns the lines that say so. Called by dim_constraints for tensors that lose something which no key counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from sparseprune.errors import CheckpointError
from sparseprune.removal.architectures import KV_COUNTS
from sparseprune.removal.counting import said, width_keys
from sparseprune.removal.sections import path_shown
from sparseprune.spec import TensorInfo
from sparseprune.spec.naming import ATTENTIONS, EXPERTS, HEAD_COUNTS, HEAD_SIZES, MLP_KEY_VALUE, MLPS
from sparseprune.spec.structures import Index, inputs_first, place_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sparseprune.engine.grids import Shape
    from sparseprune.removal.sections import Section, Sections

_MATRIX = ".weight"


class _Module(Struct, frozen=True):
    """A module with the matrices of a naming scheme, the one that reads units last."""

    form: str
    numbers: tuple[int, ...]
    matrices: tuple[TensorInfo, ...]
    flipped: bool

    @property
    def name(self) -> str:
        numbers = iter(self.numbers)
        return ".".join(str(next(numbers)) if piece == "*" else piece for piece in self.form.split("."))

    @property
    def layer(self) -> int | None:
        layer = dict(place_of(self.form, self.numbers))["layer"]
        return layer if isinstance(layer, int) else None


def unfit_modules(shapes: Mapping[str, Shape], sections: Sections, names: frozenset[str]) -> dict[str, str]:
    """What is wrong with the modules of tensors of these `names`, by the names of all their matrices."""
    if not names:
        return {}
    index = Index.of((TensorInfo(name, "", shape) for name, shape in shapes.items()), sections.config)
    found: dict[str, str] = {}
    for schemes, text in (
        ([(*each.writes, each.reads) for each in MLPS if not each.flat], _unfit_mlp),
        ([(*(each.queries or (each.fused,)), each.output) for each in ATTENTIONS], _unfit_attention),
    ):
        for scheme in schemes:
            for module in _modules(index, scheme):
                own = [each.name for each in module.matrices]
                if names.isdisjoint(own):
                    continue
                try:
                    section = sections.at(module.name)
                except CheckpointError:
                    continue
                for name in own:
                    found.setdefault(name, text(module, section))
    return found


def _modules(index: Index, scheme: Sequence[str]) -> Iterator[_Module]:
    """The modules that have all matrices of a naming scheme."""
    for suffix in (_MATRIX, ""):
        ending = f".{scheme[-1]}{suffix}"
        for form in [each for each in index.forms if each.endswith(ending)]:
            base = form[: -len(ending)]
            if "*" not in base or (scheme[-1] == "value" and not MLP_KEY_VALUE.search(base)):
                continue
            for numbers in index.forms[form]:
                tensors = [index.forms.get(f"{base}.{each}{suffix}", {}).get(numbers) for each in scheme]
                matrices = tuple(each for each in tensors if each is not None)
                if len(matrices) == len(scheme):
                    first = f"{base}.{scheme[0]}{suffix}"
                    shape = matrices[0].shape
                    flipped = len(shape) > 1 and inputs_first(index, first, numbers, shape)
                    yield _Module(base, numbers, matrices, flipped)


def _unfit_mlp(module: _Module, section: Section) -> str:
    """The matrix with other channels than the config says, or than another has."""
    keys = width_keys(section, module.name, expert=f".{EXPERTS}" in module.form)
    told = {key: value for key in keys if type(value := section.value(key, module.layer)) is int}
    *writes, reads = module.matrices
    odd = next((each for each in writes if len(each.shape) != len(reads.shape)), None)
    if odd is not None or len(reads.shape) not in (2, 3):
        odd = odd or writes[0]
        shapes = f"the shape {list(reads.shape)}, and {odd.name} {list(odd.shape)}"
        return f"{reads.name} has {shapes}: these make no MLP"
    out, into = (-1, -2) if module.flipped else (-2, -1)
    sizes = {each.name: (each.shape[out], len(each.shape) + out) for each in writes}
    sizes[reads.name] = (reads.shape[into], len(reads.shape) + into)
    key, width = next(iter(told.items()), ("", None))
    for name, (size, dim) in sizes.items():
        if width is not None and size != width and (size != 2 * width or name == reads.name):
            path = path_shown(section.path_of(key, module.layer))
            return f"{name} has {size} along dimension {dim}, config.json says {width} for {path}"
    texts = [f"{name} has {size} along dimension {dim}" for name, (size, dim) in sizes.items()]
    return f"{' and '.join(texts)}: these are not the same channels"


def _unfit_attention(module: _Module, section: Section) -> str:
    """All shapes, and what the config says of heads."""
    texts = (f"{each.name.removeprefix(f'{module.name}.')} {list(each.shape)}" for each in module.matrices)
    keys = (*HEAD_COUNTS, *KV_COUNTS, *HEAD_SIZES)
    return f"{module.name} has no whole heads: {', '.join(texts)}, and {said(section, keys, module.layer, 3)}"
