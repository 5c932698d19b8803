"""Evaluating: a text through one model or two, layer by layer, and what they say of it.

Owns what is measured of which kind of model, the order of the work, and which tokens count as predicted.
Knows no mathematics of it. Called by `eval`.
"""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from msgspec import Struct

from sparseprune.calibration.predictions import Embeddings, NextTokens
from sparseprune.calibration.runs import Parking, Stream, outputs_of
from sparseprune.errors import SparsepruneError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from sparseprune.calibration.loading import LoadedModel
    from sparseprune.calibration.text import Sequences
    from sparseprune.checkpoint import Source

    Kind = Literal["decoder", "encoder", "encoder-decoder"]
    Heard = Callable[[int, str], None]
    Measured = NextTokens | Embeddings

_BATCH_TOKENS = 4096  # in one forward pass, if their logits fit
_LOGITS_SHARE, _STATES_SHARE = 4, 2  # of the memory: logits of a batch, hidden states of all of them
_LOGIT = 2  # bytes, in the usual dtype
_SEES_ALL = frozenset({"xlnet", "paligemma"})  # model types with a head whose tokens see later ones


class Sides(Struct, frozen=True, eq=False):
    """The model to evaluate, and the dense one that it is held against."""

    own: LoadedModel
    dense: LoadedModel | None = None

    @property
    def models(self) -> tuple[LoadedModel, ...]:
        """One or two."""
        return (self.own,) if self.dense is None else (self.own, self.dense)


class Room(Struct, frozen=True):
    """Bytes of memory for hidden states and logits, and a folder for states that have no room there."""

    memory: int
    folder: Path


def kind_of(loaded: LoadedModel) -> Kind:
    """Whether a model predicts next tokens; one that does not is an encoder, also if it fills masks in."""
    from transformers.models.auto import modeling_auto  # noqa: PLC0415

    config = loaded.model.config
    if loaded.vocabulary is None:
        return "encoder"
    if config.is_encoder_decoder:
        return "encoder-decoder"
    fills_masks = config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    sees_all = fills_masks and not getattr(config, "is_decoder", False)
    return "encoder" if sees_all or config.model_type in _SEES_ALL else "decoder"


def refuse_unlike(sides: Sides) -> None:
    """SparsepruneError for two models of which nothing can be compared."""
    own, dense = sides.own, sides.dense
    kind = kind_of(own)
    if dense is None:
        if kind == "encoder":
            raise SparsepruneError(
                f"{own.checkpoint.path}: this model predicts no next tokens; give --against DENSE to measure "
                "how far its embeddings are from those of another model"
            )
        return
    paths = f"{own.checkpoint.path} and {dense.checkpoint.path}"
    other = kind_of(dense)
    if kind != other:
        kinds = [f"{'a' if one == 'decoder' else 'an'} {one}" for one in (kind, other)]
        raise SparsepruneError(f"{paths}: cannot be compared, one is {kinds[0]}, the other {kinds[1]}")
    if kind != "encoder" and own.vocabulary != dense.vocabulary:
        raise SparsepruneError(
            f"{paths}: cannot be compared, they have {own.vocabulary:,} and {dense.vocabulary:,} words"
        )
    if own.tokenizer.get_vocab() != dense.tokenizer.get_vocab():
        raise SparsepruneError(f"{paths}: cannot be compared, their tokenizers know different words")


def _refuse_unlike_widths(sides: Sides, found: Sequence[Tensor]) -> None:
    """SparsepruneError for embeddings, or logits, of two lengths."""
    widths = [str(one.shape[-1]) for one in found]
    if len(set(widths)) > 1:
        paths = " and ".join(str(one.checkpoint.path) for one in sides.models)
        raise SparsepruneError(
            f"{paths}: cannot be compared, they give {' and '.join(widths)} numbers a token"
        )


def evaluate(sides: Sides, sequences: Sequences, source: Source, room: Room, heard: Heard) -> Measured:
    """Run all sequences through one block after the other, then batch by batch through what follows them.

    Of each model one block is in memory at a time, and the logits of one batch. `heard` gets how many tokens
    more are done, and the block at work.
    """
    encodes = kind_of(sides.own) == "encoder"
    models = tuple(map(_without_head, sides.models)) if encodes else sides.models
    batches = torch.split(sequences.ids, _batch_size(sides, sequences, room.memory))
    outside = [one for each in models for one in (*each.model.parameters(), *each.model.buffers())]
    parking = Parking(room.folder, room.memory // _STATES_SHARE, outside)
    steps = _Steps(sequences, sum(len(one.blocks.names) for one in models), heard)
    made: Measured = Embeddings(len(sequences.ids)) if encodes else NextTokens(len(sequences.ids))
    given = sequences.counted if encodes else _targets(sequences)
    with ExitStack() as stack, torch.no_grad():
        halted = [stack.enter_context(_up_to_the_end(one, batches, parking, source, steps)) for one in models]
        first = 0
        for number, ids in enumerate(batches):
            found = [_given_by(one, stream, number, ids) for one, stream in zip(models, halted, strict=True)]
            _refuse_unlike_widths(sides, found)
            made.add(first, given[first : first + len(ids)], *found)
            first += len(ids)
            del found
    steps.end()
    return made


def bytes_of(tokenizer: Any, ids: Tensor) -> Tensor:
    """Bytes of text that the tokens of each window behind its first one stand for: (windows,), float64."""
    how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    counts = [
        len(tokenizer.decode(row, **how).encode()) - len(tokenizer.decode(row[:1], **how).encode())
        for row in ids.tolist()
    ]
    return torch.tensor(counts, dtype=torch.float64)


def _targets(sequences: Sequences) -> Tensor:
    """The token that each place predicts; -1 where the next one does not count, and at the end."""
    targets = sequences.ids.masked_fill(~sequences.counted, -1).roll(-1, 1)
    targets[:, -1] = -1
    return targets


def _without_head(loaded: LoadedModel) -> LoadedModel:
    """A model that gives hidden states: what fills masks in or classifies is left out."""
    return dataclasses.replace(loaded, model=loaded.model.base_model)


def _batch_size(sides: Sides, sequences: Sequences, memory: int) -> int:
    """How many sequences are run at a time: few enough that their logits fit."""
    logit_bytes = _LOGIT * len(sides.models) * (sides.own.vocabulary or 1)
    tokens = min(_BATCH_TOKENS, memory // _LOGITS_SHARE // logit_bytes)
    return max(1, tokens // sequences.ids.shape[1])


@contextmanager
def _up_to_the_end(
    loaded: LoadedModel, batches: Sequence[Tensor], parking: Parking, source: Source, steps: _Steps
) -> Iterator[Stream]:
    """A stream whose batches, but for the first, have the outputs of their last block in place of inputs."""
    read = loaded.read(source)
    with Stream([partial(loaded.forward, ids) for ids in batches], parking) as stream:
        ends = False
        while not ends and (name := stream.at) is not None:
            with loaded.blocks.opened(name, read):
                for number, ids in enumerate(batches):
                    run = stream.given(number)
                    with loaded.telling(ids.shape[1]):
                        outputs = outputs_of(loaded.blocks.modules[name], run)
                    if ends:
                        run.args, run.kwargs = (outputs,), {}
                        stream.keep(number)
                    else:
                        stream.go(number, outputs)
                        ends = run.ended  # of the first batch: the others would come to their logits, too
                    del outputs
                    steps.advance(ids.numel(), _step_of(loaded, name))
        yield stream


def _step_of(loaded: LoadedModel, name: str) -> str:
    """A block in words, such as `model.layers 3 of 22`."""
    stack = name.rpartition(".")[0]
    members = [one for one in loaded.blocks.names if one.rpartition(".")[0] == stack]
    return f"{stack} {1 + members.index(name)} of {len(members)}, {loaded.checkpoint.path.name}"


def _given_by(loaded: LoadedModel, stream: Stream, number: int, ids: Tensor) -> Tensor:
    """The logits of a batch, (windows, length, vocabulary), else its last hidden states."""
    run = stream.given(number)
    if not run.ended:
        stream.go(number, run.args[0])
    made = stream.result(number)
    field = "last_hidden_state" if getattr(made, "logits", None) is None else "logits"
    found = getattr(made, field, None)
    if not isinstance(found, torch.Tensor) or found.shape[:2] != ids.shape:
        what = "nothing" if found is None else f"{field} of another shape"
        raise SparsepruneError(
            f"{loaded.checkpoint.path}: {type(loaded.model).__name__} gives {what} for each token of a text, "
            "and cannot be evaluated"
        )
    return found


class _Steps:
    """How many tokens are through all blocks, if each block of each model is a part of the way."""

    def __init__(self, sequences: Sequences, blocks: int, heard: Heard) -> None:
        self._tokens, self._blocks, self._heard = sequences.ids.numel(), max(1, blocks), heard
        self._done = self._told = 0

    def advance(self, tokens: int, unit: str) -> None:
        """So many tokens are through one more block."""
        self._done += tokens
        now = min(self._tokens, self._done // self._blocks)
        self._heard(now - self._told, unit)
        self._told = now

    def end(self) -> None:
        """Everything is done, also where blocks were never met."""
        self._heard(self._tokens - self._told, "")
        self._told = self._tokens
