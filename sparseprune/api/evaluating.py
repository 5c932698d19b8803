"""`eval`: from text and one checkpoint or two to what their models say of it.

Called by the public functions. Loads torch and transformers once all that can be refused without them is.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from sparseprune.api.windows import folder_for_states
from sparseprune.checkpoint import TensorReader, open_checkpoint
from sparseprune.checkpoint.file_io import refuse_changed
from sparseprune.checkpoint.folding import refuse_split
from sparseprune.results.evaluating import DifferingToken, Evaluation, GuessedToken, StandardErrors

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from sparseprune.api.run import Run
    from sparseprune.api.windows import Windows
    from sparseprune.calibration import Apart, Embeddings, Estimate, Guess, NextTokens, Sequences, Sides

_BEFORE = 12  # tokens of text before one where models differ
_MOST_NATS = 700.0  # of which exp is a float64


class Evaluating(Struct, frozen=True):
    """Which model to evaluate on what, and against which one.

    `memory` is bytes for hidden states and logits; `scratch` is a folder for states, None for a temporary
    one.
    """

    checkpoint: Path
    against: Path | None
    windows: Windows
    device: str
    memory: int
    requirements: Sequence[str] = ()
    scratch: Path | None = None

    @property
    def paths(self) -> list[Path]:
        """Of one checkpoint or two."""
        return [self.checkpoint] if self.against is None else [self.checkpoint, self.against]


def evaluate(run: Run, asked: Evaluating) -> Evaluation:
    """Read, run the text through the models; CheckFailedError with the result where a mean fails."""
    requirements = []
    if asked.requirements:
        from sparseprune.report.evaluation import parse_requirements

        requirements = parse_requirements(asked.requirements, compares=asked.against is not None)
    checkpoints = [open_checkpoint(path) for path in asked.paths]
    for checkpoint in checkpoints:
        refuse_split(checkpoint)
    documents = asked.windows.documents()
    run.note(f"loading the model of {' and that of '.join(map(str, asked.paths))}")
    # Not before something is said: this takes seconds.
    from sparseprune.calibration import Room, Sides, kind_of, load_model, refuse_unlike
    from sparseprune.calibration import evaluate as run_models
    from sparseprune.execution.schedule import resolve_device

    device = resolve_device(asked.device, uses_torch=True)
    with TensorReader() as reader:
        sides = Sides(*(load_model(one, device, reader) for one in checkpoints))
        refuse_unlike(sides)
        if requirements:
            from sparseprune.report.evaluation import refuse_unknown

            refuse_unknown(requirements, kind_of(sides.own), str(asked.checkpoint))
        for path, model in zip(asked.paths, sides.models, strict=True):
            if model.missing:
                run.warn(
                    f"{path}: lacks {len(model.missing)} weights of the model, such as {model.missing[0]}"
                )
        sequences = asked.windows.cut(run, documents, sides.models)
        progress = run.progress("evaluating", sequences.ids.numel(), 0, "tokens")
        with folder_for_states(asked.scratch) as folder, progress as advance:
            found = run_models(sides, sequences, reader, Room(asked.memory, folder), advance)
    for checkpoint in checkpoints:
        refuse_changed(checkpoint, ())
    result = _made(run, asked, sides, sequences, found)
    if not requirements:
        return result
    from sparseprune.report.evaluation import failures

    return run.checked(result, failures(requirements, result))


def _made(
    run: Run, asked: Evaluating, sides: Sides, sequences: Sequences, found: NextTokens | Embeddings
) -> Evaluation:
    from sparseprune.calibration import Estimate, NextTokens, bytes_of, kind_of, ratio

    tokens, nbytes = sequences.tokens, None
    if isinstance(found, NextTokens):
        stands_for = bytes_of(sides.own.tokenizer, sequences.ids)
        tokens, nbytes = int(found.tokens.sum()), int(stands_for.sum())
        means = _of_tokens(found, stands_for, compares=sides.dense is not None)
    else:
        alike = {"cosine": found.mean, "cosine_first": found.first}
        means = {name: ratio(one, one.new_ones(len(one))) for name, one in alike.items()}
    unknown = Estimate(math.nan, None)
    names = [field.name for field in fields(StandardErrors)]
    values: dict[str, Any] = {name: _finite(means.get(name, unknown).mean) for name in names}
    return Evaluation(
        input=str(asked.checkpoint),
        against=None if asked.against is None else str(asked.against),
        kind=kind_of(sides.own),
        device=str(sides.own.device),
        seconds=round(run.seconds, 3),
        text=tuple(map(str, asked.windows.text)),
        sequences=len(sequences.ids),
        length=sequences.ids.shape[1],
        seed=asked.windows.seed,
        special=asked.windows.special,
        tokens=tokens,
        bytes=nbytes,
        **values,
        errors=StandardErrors(**{name: _finite(means.get(name, unknown).error) for name in names}),
        worst=tuple(_told(one, sides, sequences.ids) for one in _worst_of(found)),
        missing=tuple(name for one in sides.models for name in one.missing),
    )


def _of_tokens(found: NextTokens, stands_for: Tensor, *, compares: bool) -> dict[str, Estimate]:
    """The means over predicted tokens, and over the bytes that those of each window stand for."""
    from sparseprune.calibration import ratio

    sides = {"": found.loss, "dense_": found.dense_loss} if compares else {"": found.loss}
    means = {}
    for side, loss in sides.items():
        means[f"{side}perplexity"] = _exp(ratio(loss, found.tokens))
        means[f"{side}perplexity_per_byte"] = _exp(ratio(loss, stands_for))
    if compares:
        means |= {"kl": ratio(found.kl, found.tokens), "top1": ratio(found.same, found.tokens)}
    return means


def _exp(loss: Estimate) -> Estimate:
    """The perplexity of a mean loss, and its error to first order."""
    from sparseprune.calibration import Estimate

    mean = math.exp(loss.mean) if loss.mean < _MOST_NATS else math.inf
    return Estimate(mean, None if loss.error is None else mean * loss.error)


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _worst_of(found: NextTokens | Embeddings) -> list[Apart]:
    from sparseprune.calibration import NextTokens

    return found.worst if isinstance(found, NextTokens) else []


def _told(one: Apart, sides: Sides, ids: Tensor) -> DifferingToken:
    """A token with its text, and that of what stands before it."""
    tokenizer, row = sides.own.tokenizer, ids[one.window].tolist()

    def guess(of: Guess) -> GuessedToken:
        return GuessedToken(text=tokenizer.decode([of.token]), probability=_finite(of.probability))

    return DifferingToken(
        kl=_finite(one.kl),
        window=one.window,
        position=one.place,
        before=tokenizer.decode(row[max(0, one.place - _BEFORE) : one.place]),
        token=tokenizer.decode(row[one.place : one.place + 1]),
        guess=guess(one.own),
        dense_guess=guess(one.dense),
    )
