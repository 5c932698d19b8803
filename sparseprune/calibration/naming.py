"""Naming: under which names and shapes a checkpoint stores what a model multiplies with.

Owns the way back from parameters, which transformers may have renamed, fused and turned while it loaded them,
to tensors of the headers: tags are sent along the way that transformers itself saves by.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from sparseprune.checkpoint import Checkpoint

_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3"})
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class StoredAs:
    """A tensor of the checkpoint that is (a part of) a parameter, with the dimension of its inputs.

    `matrix` is which one of a stack it is, None for all of them or where there is no stack.
    """

    name: str
    input_dim: int
    matrix: int | None


def stored_as(
    model: Any,
    parameters: Mapping[str, int],
    checkpoint: Checkpoint,
) -> dict[str, list[StoredAs]]:
    """Where each parameter, with the dimension of its inputs, is stored; an empty list where none knows."""
    shapes = {name: tuple(parameter.shape) for name, parameter in _all_parameters(model)}
    aliases = _aliases(model)
    found: dict[str, list[StoredAs]] = {}
    for name, dim in parameters.items():
        ways = [
            stored
            for alias in aliases.get(name, [name])
            for stored in _one(model, alias, shapes[alias], dim, checkpoint)
        ]
        found[name] = list({stored.name: stored for stored in ways}.values())
    return found


def without_statistics(
    model: Any, named: frozenset[str], checkpoint: Checkpoint
) -> Iterator[tuple[str, str]]:
    """The matrices of a checkpoint, and stacks of them, that got none, and why."""
    embeddings = {
        name
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding)
        for name in (f"{path}.weight",)
    }
    known = {name for name, _ in _all_parameters(model)}
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
    """Parameters that were not seen and whose name has one other number than one that was, with that one.

    An expert that a text does not reach is one.
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
    """`name`, which belongs to `like`, as it belongs to `one`, which has another number than `like`.

    >>> renumbered("mlp.experts.0.up", "mlp.experts.7.gate", "mlp.experts.0.gate")
    'mlp.experts.7.up'
    """
    mine, theirs = _NUMBER.findall(one), _NUMBER.findall(like)
    pieces = _NUMBER.split(name)
    numbers = [
        mine[place] if place < len(mine) and mine[place] != theirs[place] else number
        for place, number in enumerate(_NUMBER.findall(name))
    ]
    return "".join(piece for pair in zip_longest(pieces, numbers, fillvalue="") for piece in pair)


def _forms(name: str) -> Iterator[str]:
    """A name with one of its numbers left out, the last one first."""
    for found in reversed(list(_NUMBER.finditer(name))):
        yield f"{name[: found.start()]}*{name[found.end() :]}"


def _one(
    model: Any,
    name: str,
    shape: tuple[int, ...],
    dim: int,
    checkpoint: Checkpoint,
) -> list[StoredAs]:
    tags = _tags(shape, dim)
    try:
        from transformers.core_model_loading import revert_weight_conversion  # noqa: PLC0415

        saved: dict[str, Tensor] = revert_weight_conversion(model, {name: tags})
    except Exception:  # noqa: BLE001  (whatever it cannot turn back is looked for by its name)
        saved = {name: tags}
    features = shape[dim]
    found = [
        stored
        for key, tensor in saved.items()
        for stored in (_decoded(_stored_name(key, tuple(tensor.shape), checkpoint), tensor, features),)
        if stored is not None
    ]
    return found if len(shape) == 3 else [replace(stored, matrix=None) for stored in found]


def _tags(shape: tuple[int, ...], dim: int) -> Tensor:
    """For each element which matrix of a stack, times the features, plus which input; takes no memory."""
    features = shape[dim]
    tags = torch.arange(features).reshape([-1 if other == dim else 1 for other in range(len(shape))])
    if len(shape) == 3:
        tags = tags + features * torch.arange(shape[0]).reshape(-1, 1, 1)
    return tags.expand(shape)


def _decoded(name: str | None, tags: Tensor, features: int) -> StoredAs | None:
    """What came out under a name; None where its inputs are not all there, in their order."""
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
    """The tensor of a name and shape: that name, else the only one that has it behind or before a prefix."""
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
    """Whether of two names one is the other behind a prefix."""
    return one.endswith(f".{other}") or other.endswith(f".{one}")


def _all_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)


def _aliases(model: Any) -> dict[str, list[str]]:
    """All names of each parameter, by the one that stands for it."""
    names: dict[int, list[str]] = {}
    for name, parameter in _all_parameters(model):
        names.setdefault(id(parameter), []).append(name)
    return {alike[0]: alike for alike in names.values()}
