"""Names on disk: the tensors of a checkpoint that store the parameters of a model, and their neighbours.

Owns how transformers saves parameters, which of their outputs a stored tensor holds, and the reasons why a
matrix has no statistics. Runs no model. Called by planning and training.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from msgspec import Struct
from msgspec.structs import replace

from sparseprune.spec.naming import MEMBER

if TYPE_CHECKING:
    import re
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from sparseprune.checkpoint import Checkpoint


_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3"})


class StoredAs(Struct, frozen=True):
    """A tensor of the checkpoint that is a parameter or a part of one, with the dimension of its inputs.

    `matrix` is its number in a stack, None for the whole stack or without one. `outputs` are those of the
    parameter that it has, in its order; empty where they have no constant distance. A tensor of whole
    matrices has them as the part `number` of `of` equal ones.
    """

    name: str
    input_dim: int
    matrix: int | None
    outputs: range = range(0)
    output_dim: int = 0
    number: int = 0
    of: int = 1


def stored_as(
    model: Any, parameters: Mapping[str, int], groups: Mapping[str, str], checkpoint: Checkpoint
) -> dict[str, list[StoredAs]]:
    """The tensors that store each parameter, given its input dimension; an empty list if none is found.

    Of parameters that are stored together those in one of the `groups` count, which have the same inputs.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    same: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shapes[name] = tuple(parameter.shape)
        same[id(parameter)].append(name)
    aliases = {names[0]: names for names in same.values()}
    found: dict[str, list[StoredAs]] = {}
    for name, dim in parameters.items():
        ways = [
            stored
            for alias in aliases.get(name, [name])
            for stored in _one(model, alias, shapes[alias], dim, checkpoint)
        ]
        found[name] = list({stored.name: stored for stored in ways}.values())
    lost: defaultdict[str, list[str]] = defaultdict(list)
    for name, stored_in in found.items():
        if not stored_in and len(shapes.get(name, ())) == 2:
            lost[name.rpartition(".")[0].rpartition(".")[0]].append(name)  # transformers fuses such ones
    for names in lost.values():
        for one in _together(model, {name: (shapes[name], parameters[name]) for name in names}):
            stored = _stored_name(one.name, one.shape, checkpoint)
            if stored is None or len({groups.get(name, name) for name in one.owners}) != 1:
                continue
            for number, name in enumerate(one.owners):
                outputs = range(one.shape[1 - one.input_dim] // len(one.owners) if one.in_order else 0)
                found[name].append(
                    StoredAs(stored, one.input_dim, None, outputs, 1 - one.input_dim, number, len(one.owners))
                )
    return found


class _Fused(Struct, frozen=True):
    """A tensor that transformers would save, made of whole matrices with this dimension for their inputs.

    `in_order`: it is one of these `owners` after the other, all of one height, their outputs in order.
    """

    name: str
    shape: tuple[int, ...]
    input_dim: int
    owners: tuple[str, ...]
    in_order: bool


def _together(model: Any, matrices: Mapping[str, tuple[tuple[int, ...], int]]) -> Iterator[_Fused]:
    """The tensors in which matrices of these shapes and input dimensions are saved."""
    if len(matrices) < 2:
        return
    most = 1 + max(max(shape) for shape, _ in matrices.values())
    names = list(matrices)

    def saved(*, outputs: bool) -> dict[str, Tensor]:
        tags = {
            name: _tags(shape, 1 - dim if outputs else dim) + most * number
            for number, (name, (shape, dim)) in enumerate(matrices.items())
        }
        return as_saved(model, tags)

    by_outputs = saved(outputs=True)
    for key, tensor in saved(outputs=False).items():
        if tensor.ndim != 2 or key in matrices:
            continue
        owners, inputs = tensor // most, tensor % most
        for dim in (1, 0):
            line = torch.arange(tensor.shape[dim]).reshape([-1 if one == dim else 1 for one in range(2)])
            if bool((inputs == line).all()) and bool((owners == owners.select(dim, 0).unsqueeze(dim)).all()):
                of_line = owners.select(dim, 0)
                within = [int(one) for one in torch.unique_consecutive(of_line)]
                height = len(of_line) // len(within)
                lines = torch.tensor(within).repeat_interleave(height) * most
                lines = lines + torch.arange(height).repeat(len(within))
                own = by_outputs[key].select(dim, 0)
                in_order = lines.shape == own.shape and bool((own == lines).all())
                owned = tuple(dict.fromkeys(names[number] for number in within))
                in_order = in_order and all(
                    matrices[name][0][1 - matrices[name][1]] == height for name in owned
                )
                yield _Fused(key, tuple(tensor.shape), dim, owned, in_order)
                break


def without_statistics(
    model: Any, named: frozenset[str], checkpoint: Checkpoint
) -> Iterator[tuple[str, str]]:
    """The matrices and stacks of a checkpoint without statistics, each with the reason."""
    modules = model.named_modules()
    embeddings = {f"{path}.weight" for path, module in modules if isinstance(module, torch.nn.Embedding)}
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    # Both by the names that they are saved under as well.
    embeddings |= {each for name in embeddings for each in as_saved(model, {name: torch.empty(1, 1)})}
    known |= {each for name in known for each in as_saved(model, {name: torch.empty(1, 1)})}
    for name, stored in checkpoint.tensors.items():
        if name in named or len(stored.shape) not in {2, 3} or stored.dtype not in _FLOATS:
            continue
        ends = {name for name in known if name == stored.name or _is_end(name, stored.name)}
        if ends & embeddings:
            yield name, "an embedding, which is looked up and not multiplied with"
        elif ends:
            yield name, "no matrix product with it was seen"
        else:
            yield name, "the model has nothing of this name"


def siblings(seen: Mapping[str, Any], model: Any) -> dict[str, str]:
    """Parameters that were not seen, each with a seen one whose name differs in one number alone.

    For example an expert that the text does not reach.
    """
    forms: dict[str, str] = {}
    for name in seen:
        for form in _forms(name):
            forms.setdefault(form, name)
    found = {}
    for name, parameter in model.named_parameters():
        if name not in seen and parameter.ndim == 2:
            like = next((forms[form] for form in _forms(name) if form in forms), None)
            if like is not None:
                found[name] = like
    return found


def renumbered(name: str, one: str, like: str) -> str:
    """`name`, a neighbour of `like`, renumbered to be the same neighbour of `one`.

    >>> renumbered("mlp.experts.0.up", "mlp.experts.7.gate", "mlp.experts.0.gate")
    'mlp.experts.7.up'
    """
    pairs = zip(MEMBER.findall(one), MEMBER.findall(like), strict=False)
    other = {place: mine for place, (mine, theirs) in enumerate(pairs) if mine != theirs}
    places = count()

    def number(found: re.Match[str]) -> str:
        kind = found[0].removesuffix(found[1])  # such as `expert_`
        return f"{kind}{other.get(next(places), found[1])}"

    return MEMBER.sub(number, name)


def _forms(name: str) -> Iterator[str]:
    """The name with one of its numbers replaced by *, beginning with the last.

    Numbers of layers and experts: those of w1 and w2 or fc1 and fc2 tell matrices of different inputs apart.
    """
    for found in reversed(list(MEMBER.finditer(name))):
        yield f"{name[: found.start(1)]}*{name[found.end(1) :]}"


def _one(model: Any, name: str, shape: tuple[int, ...], dim: int, checkpoint: Checkpoint) -> list[StoredAs]:
    across = 2 * len(shape) - 3 - dim  # the other one of the last two dimensions
    saved = as_saved(model, {name: _tags(shape, dim)})
    outputs = as_saved(model, {name: _tags(shape, across)})
    features = shape[dim]
    ways = (
        _decoded(_stored_name(key, tuple(tensor.shape), checkpoint), tensor, features)
        for key, tensor in saved.items()
    )
    found = [
        _with_outputs(stored, one, shape[across])
        for stored, one in zip(ways, outputs.values(), strict=True)
        if stored is not None
    ]
    return found if len(shape) == 3 else [replace(stored, matrix=None) for stored in found]


def _with_outputs(stored: StoredAs, tags: Tensor, outputs: int) -> StoredAs:
    """The tensor with the outputs that it has, by their tags; none if their distance is not constant."""
    dim = 2 * tags.ndim - 3 - stored.input_dim
    line = tags[tuple(slice(None) if other == dim else 0 for other in range(tags.ndim))]
    first = int(line[0]) % outputs
    step = max(1, int(line[1] - line[0])) if len(line) > 1 else 1
    places = range(first, first + step * len(line), step)
    constant = _counts(tags, dim, step) and places[-1] < outputs
    return replace(stored, outputs=places if constant else range(0), output_dim=dim)


def as_saved(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of a model as transformers would save them; unchanged if it does not convert them back."""
    try:
        from transformers.core_model_loading import revert_weight_conversion  # noqa: PLC0415

        saved: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    except Exception:  # noqa: BLE001  (what it cannot convert keeps its name)
        return tensors
    return saved


def as_stored(model: Any, parameters: dict[str, Tensor], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors of a checkpoint that parameters of its model make up; those that it lacks are left out."""
    found = {}
    for name, tensor in as_saved(model, parameters).items():
        stored = _stored_name(name, tuple(tensor.shape), checkpoint)
        if stored is not None:
            found[stored] = tensor
    return found


def _tags(shape: tuple[int, ...], dim: int) -> Tensor:
    """For each element: its matrix in a stack times the features, plus its input; takes no memory."""
    features = shape[dim]
    tags = torch.arange(features).reshape([-1 if other == dim else 1 for other in range(len(shape))])
    if len(shape) == 3:
        tags = tags + features * torch.arange(shape[0]).reshape(-1, 1, 1)
    return tags.expand(shape)


def _decoded(name: str | None, tags: Tensor, features: int) -> StoredAs | None:
    """The tensor of a name, read from its tags; None if its inputs are incomplete or in another order."""
    if name is None or tags.ndim not in {2, 3}:
        return None
    first = int(tags.reshape(-1)[0])
    if first % features:
        return None
    dims = [dim for dim in range(tags.ndim) if _counts(tags, dim, 1) and tags.shape[dim] == features]
    if not dims:
        return None
    if tags.ndim == 3 and (dims[-1] == 0 or not _counts(tags, 0, features)):
        return None
    return StoredAs(name, dims[-1], None if tags.ndim == 3 else first // features)


def _counts(tags: Tensor, dim: int, step: int) -> bool:
    """Whether tags grow by a step along a dimension."""
    line = tags[tuple(slice(None) if other == dim else 0 for other in range(tags.ndim))]
    return bool((line == line[0] + step * torch.arange(len(line))).all())


def _stored_name(name: str, shape: tuple[int, ...], checkpoint: Checkpoint) -> str | None:
    """The tensor with a name and a shape: of that name, else the only one whose name differs by a prefix."""
    stored = checkpoint.tensors.get(name)
    if stored is not None:
        return name if stored.shape == shape else None
    alike = [
        other.name
        for other in checkpoint.tensors.values()
        if other.shape == shape and _is_end(other.name, name)
    ]
    return alike[0] if len(alike) == 1 else None


def _is_end(one: str, other: str) -> bool:
    """Whether one of two names is the other with a prefix."""
    return one.endswith(f".{other}") or other.endswith(f".{one}")
