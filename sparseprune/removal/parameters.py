"""Parameters as people count them, all of a model or those of one token, and bytes: what an element counts.

Codes count as the weights that they stand for, and what lies beside them as nothing; a matrix that a model
ties, once; of routed experts those that a token is sent to. Reads names, shapes and the config. Called by
whoever counts what is left.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct

from sparseprune.checkpoint.codes import names_beside
from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import Shape, prod
from sparseprune.errors import CheckpointError
from sparseprune.removal.architectures import CHOSEN
from sparseprune.removal.sections import Sections
from sparseprune.spec import TensorInfo
from sparseprune.spec.naming import VOCABULARIES
from sparseprune.spec.problems import listed
from sparseprune.spec.structures import Index, expert_modules

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.spec.structures import Structure

    Tensors = Mapping[str, StoredTensor]
    Config = Mapping[str, Any] | None

Number = int | Fraction
Unit = Literal["params", "size", "active"]
_TIED = "tie_word_embeddings"


class Experts(Struct, frozen=True):
    """The routed experts of a module, `number` of them: the tensors of each one, or stacks of all.

    Of a stack it knows the dimension that counts experts, and its size.
    """

    number: int
    members: tuple[tuple[str, ...], ...]
    stack: tuple[str, int, int] | None = None

    def left(self, shapes: Mapping[str, Shape]) -> int:
        """How many of them are left where tensors have these shapes."""
        if self.stack is None:
            return sum(any(name in shapes for name in names) for names in self.members)
        name, dim, size = self.stack
        return self.number * shapes[name][dim] // size if name in shapes else 0


class Worth(Struct, frozen=True):
    """What an element of each tensor counts, in parameters or bytes; `experts` are those that take turns."""

    weights: Mapping[str, Number]
    experts: tuple[Experts, ...] = ()

    def total(self, shapes: Mapping[str, Shape]) -> Number:
        """The sum over tensors of these shapes; a token is sent to as many experts, however many are left."""
        of = {name: prod(shape) * self.weights[name] for name, shape in shapes.items()}
        found = sum(of.values(), start=0)
        for one in self.experts:
            own = sum((of.get(name, 0) for names in one.members for name in names), start=0)
            left = one.left(shapes)
            if left not in {0, one.number}:
                found += own * Fraction(one.number - left, left)
        return found


def worth_of(unit: Unit, tensors: Tensors, config: Config) -> Worth:
    """What elements of a checkpoint's tensors count.

    Raises:
        CheckpointError: nobody tells how many codes an element holds, or to how many experts a token is sent.
    """
    if unit == "size":
        return Worth({name: Fraction(DTYPES[one.dtype].bits, 8) for name, one in tensors.items()})
    uncounted = names_beside(tensors) | _copies(tensors, config)
    weights = {name: 0 if name in uncounted else _weights_in(one) for name, one in tensors.items()}
    return Worth(weights) if unit == "params" else _active(weights, tensors, config)


def _weights_in(stored: StoredTensor) -> Number:
    """How many weights an element stands for."""
    if stored.codes is None or not stored.codes.packed:
        return 1
    if not stored.codes.bits:
        held = f"{stored.name} holds {stored.codes.what}, {stored.codes.packed}"
        raise CheckpointError(f"{held}: nobody tells how many weights these are")
    return Fraction(DTYPES[stored.dtype].bits, stored.codes.bits)


def _copies(tensors: Tensors, config: Config) -> frozenset[str]:
    """Matrices of tokens that a model ties to another one of the same shape, although the file has both."""
    first_of: dict[object, str] = {}
    sections = Sections(config or {})
    copies = []
    for name in [name for name in tensors if VOCABULARIES.search(name.removesuffix(".weight"))]:
        stored = tensors[name]
        section = sections.even_unknown(sections.path_at(name)).values
        if len(stored.shape) == 2 and (section.get(_TIED) is True or sections.config.get(_TIED) is True):
            first = first_of.setdefault((stored.shape, sections.path_at(name)), name)
            copies += [name] if first != name else []
    return frozenset(copies)


def _active(weights: Mapping[str, Number], tensors: Tensors, config: Config) -> Worth:
    """The parameters of one token: of the experts of each module as many as the config says."""
    index = Index.of((TensorInfo(name, one.dtype, one.shape) for name, one in tensors.items()), config)
    taking_turns: list[Experts] = []
    shares: dict[str, Fraction] = {}
    for module, structures in expert_modules(index).items():
        experts = _experts(structures)
        chosen = min(_chosen(module, structures, config), experts.number)
        names = [name for each in experts.members for name in each]
        shares |= dict.fromkeys(names, Fraction(chosen, experts.number))
        taking_turns.append(experts)
    shared = {name: weights[name] * share for name, share in shares.items()}
    return Worth({**weights, **shared}, tuple(taking_turns))


def _experts(structures: Mapping[int | str, Structure]) -> Experts:
    members = tuple(tuple(dict.fromkeys(part.tensor for part in one.parts)) for one in structures.values())
    if all(isinstance(number, int) for number in structures):
        return Experts(len(structures), members)
    (stacked,) = structures.values()
    part = stacked.parts[0]
    return Experts(stacked.units, members, (part.tensor, part.dim, part.count * part.size * part.flat))


def _chosen(module: str, structures: Mapping[int | str, Structure], config: Config) -> int:
    """To how many experts of a module a token is sent."""
    sections = Sections(config or {})
    section = sections.even_unknown(sections.path_at(module))
    layer = dict(next(iter(structures.values())).place)["layer"]
    for key in CHOSEN:
        value = section.value(key, layer if isinstance(layer, int) else None)
        if type(value) is int and value > 0:
            return value
    raise CheckpointError(
        f"config.json does not say to how many experts of {module} a token is sent; known keys are "
        f"{listed(CHOSEN)}"
    )
