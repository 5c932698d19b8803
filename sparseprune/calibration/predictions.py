"""What models say of text, and how far two of them are apart: of each next token, or of whole windows.

Owns the mathematics of evaluations: log-likelihoods, Kullback-Leibler divergences, cosines, and standard
errors over windows. Knows no models. Called by evaluating.
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

import torch
from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_VALUES = 1 << 22  # logits that are turned into probabilities at one time
WORST = 10  # tokens that are kept, of those where two models differ most


class Estimate(Struct, frozen=True):
    """A mean, and its standard error over windows; that of one window is not known."""

    mean: float
    error: float | None


def ratio(sums: Tensor, counts: Tensor) -> Estimate:
    """What there is for each thing that counts: both float64, (windows,).

    Windows may hold unlike numbers of things: the error is that of a ratio (Cochran, Sampling Techniques,
    1977, 6.4).

    >>> ratio(torch.tensor([2.0, 4.0]).double(), torch.tensor([1.0, 1.0]).double())
    Estimate(mean=3.0, error=1.0)
    """
    windows, total = len(sums), float(counts.sum())
    if not total:
        return Estimate(math.nan, None)
    mean = float(sums.sum()) / total
    if windows < 2:
        return Estimate(mean, None)
    rest = sums - mean * counts
    return Estimate(mean, math.sqrt(float(rest.square().sum()) * windows / (windows - 1)) / total)


class Guess(Struct, frozen=True):
    """The token that a model holds for the most probable one."""

    token: int
    probability: float


class Apart(Struct, frozen=True):
    """A token of which two models say different things: its window, its place there, nats, their guesses."""

    kl: float
    window: int
    place: int
    own: Guess
    dense: Guess


class _Said(Struct, frozen=True, eq=False):
    """What a model says of tokens, each (tokens,): nats of the true ones, its guesses, nats of these."""

    loss: Tensor
    guess: Tensor
    sure: Tensor


class NextTokens:
    """Sums over the next tokens of each window, (windows,), float64; those of two models where there are two.

    `loss` and `dense_loss` are in nats, `same` counts the tokens of which both guess the same; `worst` are
    the tokens where the two differ most, these first.
    """

    def __init__(self, windows: int) -> None:
        self.tokens, self.loss, self.dense_loss, self.kl, self.same = torch.zeros(5, windows).double()
        self._worst: list[tuple[float, int, int, Apart]] = []

    @property
    def worst(self) -> list[Apart]:
        return [one for *_, one in sorted(self._worst, reverse=True)]

    def add(self, first: int, targets: Tensor, own: Tensor, dense: Tensor | None = None) -> None:
        """The logits of one model or two for windows from number `first` on.

        `targets` (windows, length) has the token that each place predicts, -1 where none counts; logits are
        (windows, length, vocabulary).
        """
        length = targets.shape[1]
        wanted = targets.flatten().to(own.device)
        places = (wanted >= 0).nonzero()[:, 0]
        for some in torch.split(places, max(1, _VALUES // own.shape[-1])):
            said, log = _said(own.flatten(0, 1)[some], wanted[some])
            window = first + some.cpu() // length
            self.tokens.index_add_(0, window, torch.ones(len(some)).double())
            self.loss.index_add_(0, window, said.loss)
            if dense is None:
                continue
            better, reference = _said(dense.flatten(0, 1)[some], wanted[some])
            kl = _divergence(reference, log)
            self.dense_loss.index_add_(0, window, better.loss)
            self.kl.index_add_(0, window, kl)
            self.same.index_add_(0, window, (said.guess == better.guess).double())
            self._keep_worst(window, 1 + some.cpu() % length, kl, (said, better))

    def _keep_worst(self, window: Tensor, place: Tensor, kl: Tensor, both: tuple[_Said, _Said]) -> None:
        """`place` is that of the predicted token in its window."""
        for at in kl.nan_to_num().topk(min(WORST, len(kl))).indices.tolist():
            guesses = [Guess(int(one.guess[at]), math.exp(float(one.sure[at]))) for one in both]
            found = Apart(float(kl[at]), int(window[at]), int(place[at]), *guesses)
            if found.kl > 0:
                heapq.heappush(self._worst, (found.kl, -found.window, -found.place, found))
        self._worst = heapq.nlargest(WORST, self._worst)
        heapq.heapify(self._worst)


def _said(logits: Tensor, targets: Tensor) -> tuple[_Said, Tensor]:
    """What is said of `targets` (tokens,), on the host, and the log probabilities, (tokens, vocabulary)."""
    log = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    sure, guess = log.max(-1)
    loss = -log.gather(-1, targets[:, None])[:, 0]
    return _Said(loss.double().cpu(), guess.cpu(), sure.double().cpu()), log


def _divergence(reference: Tensor, log: Tensor) -> Tensor:
    """KL of `reference` to `log`, both log probabilities (tokens, vocabulary): (tokens,), float64."""
    share = reference.exp()
    apart = (reference - log).mul_(share).masked_fill_(share == 0, 0)
    return apart.sum(-1, dtype=torch.float64).clamp_(min=0).cpu()


class Embeddings:
    """Cosines of the embeddings of windows by two models, (windows,): of means over tokens, of first ones."""

    def __init__(self, windows: int) -> None:
        self.mean, self.first = torch.zeros(2, windows).double()

    def add(self, first: int, counted: Tensor, own: Tensor, dense: Tensor) -> None:
        """Last hidden states (windows, length, width) of both for windows from number `first` on."""
        weights = counted.to(own.device).double()[..., None]
        pooled = [_pooled(states, weights) for states in (own, dense)]
        heads = [states[:, 0].double() for states in (own, dense)]
        for cosines, (one, other) in ((self.mean, pooled), (self.first, heads)):
            cosines[first : first + len(own)] = torch.cosine_similarity(one, other).clamp(-1, 1).cpu()


def _pooled(states: Tensor, weights: Tensor) -> Tensor:
    """The mean over the tokens that count, window by window: (windows, width), float64."""
    means: Sequence[Tensor] = [
        (one.double() * weight).sum(0) / weight.sum() for one, weight in zip(states, weights, strict=True)
    ]
    return torch.stack([*means])
