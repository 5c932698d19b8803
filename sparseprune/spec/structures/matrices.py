"""Matrices of layers: which tensors they are, and how each looks with outputs first and inputs last.

Goes by names and shapes, and by the model type where these do not tell. Called by locating, by the finders of
structures and by coverage.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from sparseprune.spec.naming import (
    EXPERTS,
    HEADS_READ,
    HEADS_WRITTEN,
    INPUTS_FIRST,
    MLPS,
    NO_MATRIX,
    STACKS_INPUTS_FIRST,
)
from sparseprune.spec.structures.index import MATRIX, Outlook, place_of, steps_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sparseprune.engine.grids import Shape
    from sparseprune.spec.bound import Captures, TensorInfo
    from sparseprune.spec.structures.index import Index, Numbers


def matrices(index: Index) -> Iterator[tuple[Captures, TensorInfo, Outlook]]:
    """The matrices of layers, outputs first and inputs last; matrices of a stack lie behind each other.

    A convolution is a matrix for each place of its kernel.
    """
    routed = routed_modules(index.forms)
    for form, members in index.forms.items():
        if not is_layer_matrix(form, routed):
            continue
        module, part = _split(form)
        first: dict[Shape, Outlook | None] = {}
        for numbers, tensor in members.items():
            if tensor.shape not in first:
                first[tensor.shape] = _matrix_outlook(index, form, numbers, tensor.shape)
            found = first[tensor.shape]
            if found is not None:
                yield (*place_of(module, numbers), ("part", part)), tensor, found


def routed_modules(forms: Iterable[str]) -> frozenset[str]:
    """Modules that have experts, so that their gate is a router."""
    return frozenset(form.partition(f".{EXPERTS}.")[0] for form in forms if f".{EXPERTS}." in form)


def is_layer_matrix(form: str, routed: frozenset[str]) -> bool:
    """Whether a name with stars for numbers is that of a matrix of layers, as far as names tell."""
    pieces = form.split(".")
    if "*" not in pieces[:-1]:
        return False
    last = max(at for at, piece in enumerate(pieces[:-1]) if piece == "*")
    if any(NO_MATRIX.search(piece) for piece in pieces[max(0, last - 1) :]):
        return False
    return not any(form.startswith(f"{module}.gate.") for module in routed)


def is_matrix_shape(shape: Shape) -> bool:
    """Whether a tensor of layers is a matrix, a stack of them, or a convolution of several channels."""
    return len(shape) >= 2 and not (len(shape) > 2 and shape[1] == 1)


def _split(form: str) -> tuple[str, str]:
    """The module of a tensor and the tensor's part in it: the last module's name, without `.weight`."""
    stem = form.removesuffix(MATRIX)
    module, _, part = stem.rpartition(".")
    return (module, part) if part != "*" else (stem, "weight")


def _matrix_outlook(index: Index, form: str, numbers: Numbers, shape: Shape) -> Outlook | None:
    if not is_matrix_shape(shape):
        return None
    if len(shape) > 3 or (len(shape) == 3 and "conv" in form):
        places = prod(shape[2:])
        if places == 1:
            return Outlook(shape[:2], (shape[1], 1))
        return Outlook((places, *shape[:2]), (1, shape[1] * places, places), leading=1)
    heads = prod(shape[1:])
    if len(shape) == 3 and HEADS_WRITTEN.search(form):
        return Outlook((heads, shape[0]), (1, heads))
    if len(shape) == 3 and HEADS_READ.search(form):
        shape = shape[0], heads
    outputs, inputs = shape[-2:]
    lead, step = (shape[:1], (outputs * inputs,)) if len(shape) == 3 else ((), ())
    if inputs_first(index, form, numbers, shape):
        return Outlook((*lead, inputs, outputs), (*step, 1, inputs), leading=len(lead))
    return Outlook(shape, steps_of(shape), leading=len(lead))


def inputs_first(index: Index, form: str, numbers: Numbers, shape: Shape) -> bool:
    """Whether a matrix, or a stack of them, has inputs before outputs: by its bias, its MLP, or the model."""
    bias = index.shape(f"{form.removesuffix(MATRIX)}.bias", numbers) or index.shape(f"{form}_bias", numbers)
    rows, columns = shape[-2:]
    if rows != columns and bias is not None and len(bias) == len(shape) - 1:
        return bias[-1] == columns
    if len(shape) == 3:
        for up, down in _stacks(index, form, numbers):
            as_linear = up[2] == down[1] and up[1] in {down[2], 2 * down[2]}
            as_inputs_first = up[1] == down[2] and up[2] in {down[1], 2 * down[1]}
            if as_linear != as_inputs_first:
                return as_inputs_first
    return index.is_one_of(STACKS_INPUTS_FIRST if len(shape) == 3 else INPUTS_FIRST)


def _stacks(index: Index, form: str, numbers: Numbers) -> Iterator[tuple[Shape, Shape]]:
    """The shapes of stacks that write and read the channels of experts, of which this form is one."""
    suffix = MATRIX if form.endswith(MATRIX) else ""
    base, _, own = form.removesuffix(suffix).rpartition(".")
    for names in MLPS:
        if own in {*names.writes, names.reads}:
            up = index.shape(f"{base}.{names.writes[0]}{suffix}", numbers)
            down = index.shape(f"{base}.{names.reads}{suffix}", numbers)
            if up is not None and down is not None and len(up) == len(down) == 3:
                yield up, down
