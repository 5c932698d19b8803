"""The loss whose gradients are collected, and what a model needs so that a pass back reaches its matrices.

Owns what is drawn: labels from the model's own softmax, or random probes of the last hidden states. Knows no
sums and no names. Called by sweeps.
"""

from __future__ import annotations

import hashlib
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from msgspec import Struct

from sparseprune.errors import SparsepruneError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from sparseprune.calibration.text import Sequences

_LOGITS = 1 << 24  # that are made probabilities at once


class Loss(Struct, frozen=True):
    """The loss, and the seed of what it draws for each sequence, whatever batch that is in.

    Of a model that gives logits over its vocabulary for each token: the sum over tokens of the cross entropy
    against labels drawn from its own softmax, whose gradients have the Fisher information as their second
    moment. Of others: the sum of the last hidden states times standard normal numbers.
    """

    seed: int

    def at_ends(
        self, made: Any, states: States, sequences: Sequences, which: range, vocabulary: int | None
    ) -> tuple[Tensor, Tensor]:
        """Of what a model made of some sequences, that at which the loss is, and its gradients there."""
        ids = sequences.ids[which.start : which.stop]
        counted = sequences.counted[which.start : which.stop]
        logits = _logits(made, ids, vocabulary)
        ends = states.last(made, ids) if logits is None else logits
        gradients = torch.zeros_like(ends, requires_grad=False)
        for place, number in enumerate(which):
            generator = self._generator(number)
            if logits is None:
                drawn = torch.randn(ends.shape[1:], generator=generator)
                gradients[place] = drawn.to(ends.device, ends.dtype)
            else:
                _of_labels(logits[place], generator, gradients[place])
        gradients[~counted.to(ends.device)] = 0
        return ends, gradients

    def _generator(self, sequence: int) -> torch.Generator:
        said = hashlib.blake2b(f"{self.seed}\0{sequence}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(said, "little"))


def _of_labels(logits: Tensor, generator: torch.Generator, into: Tensor) -> None:
    """Gradients of the cross entropy at logits (tokens, words), against labels drawn from their softmax."""
    drawn = torch.rand(len(logits), generator=generator, dtype=torch.float64).to(logits.device)
    with torch.no_grad():
        for begin in range(0, len(logits), step := max(1, _LOGITS // logits.shape[1])):
            shares = logits[begin : begin + step].float().softmax(-1)
            sums = shares.cumsum(-1, dtype=torch.float64)
            # A number below the sum of all, so that no rounding leads behind the last word.
            wanted = drawn[begin : begin + step, None] * sums[:, -1:]
            labels = torch.searchsorted(sums, wanted, right=True).clamp_(max=logits.shape[1] - 1)
            into[begin : begin + step] = shares.scatter_add_(
                1, labels, -torch.ones_like(wanted, dtype=torch.float32)
            )


def _logits(made: Any, ids: Tensor, vocabulary: int | None) -> Tensor | None:
    """What a model gave for each token and each word; None if it gives no such thing."""
    if vocabulary is None:
        return None
    values = made.values() if hasattr(made, "values") else made if isinstance(made, tuple) else (made,)
    wanted = (*ids.shape, vocabulary)
    return next((one for one in values if isinstance(one, torch.Tensor) and one.shape == wanted), None)


class States(threading.local):
    """The last hidden states that a module gave in a forward pass; those of each thread are its own."""

    def __init__(self) -> None:
        self._found: list[Tensor] = []

    def hook(self, module: Any, given: Any, made: Any) -> None:  # noqa: ARG002
        """Keep the hidden states among the outputs of a module that names them."""
        found = getattr(made, "last_hidden_state", None)
        if isinstance(found, torch.Tensor):
            self._found.append(found)

    def last(self, made: Any, ids: Tensor) -> Tensor:
        """Of the outermost module that gives some for each token; else the first output of the model."""
        first = made[0] if isinstance(made, tuple) or hasattr(made, "values") else made
        ways = [*reversed(self._found), first]
        self._found.clear()
        for one in ways:
            if isinstance(one, torch.Tensor) and one.shape[:2] == ids.shape and one.grad_fn is not None:
                return one
        raise SparsepruneError(
            "the model gives no hidden states of its tokens: calibrate without --gradients"
        )


@contextmanager
def differentiable(model: torch.nn.Module) -> Iterator[States]:
    """A model whose passes can go back to the inputs of all its matrices, but to no parameter."""
    states = States()
    hooks = []
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for module in model.modules():
        hooks.append(module.register_forward_hook(states.hook))
        if isinstance(module, torch.nn.Embedding):
            hooks.append(module.register_forward_hook(lambda _, __, made: _leaf(made)))
        elif any(parameter.ndim > 1 for parameter in module.parameters(recurse=False)):
            hooks.append(module.register_forward_pre_hook(_leaves))
    for parameter in wanted:
        parameter.requires_grad = False
    try:
        yield states
    finally:
        for parameter in wanted:
            parameter.requires_grad = True
        for hook in hooks:
            hook.remove()


def _leaves(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Inputs of a matrix that no embedding leads to, such as those of relative positions."""
    if not given or not isinstance(given[0], torch.Tensor) or given[0].requires_grad:
        return None
    return (_leaf(given[0]), *given[1:])


def _leaf(one: Tensor) -> Tensor:
    """A tensor where gradients end, which may be changed in place."""
    ends = one.is_floating_point() and torch.is_grad_enabled()
    return one.detach().requires_grad_().clone() if ends else one
