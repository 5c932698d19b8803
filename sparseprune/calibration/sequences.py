"""Sequences of tokens out of documents: windows of one length, as the model expects them.

Owns tokenizing (of messages: as the tokenizer's chat template writes them), cutting and sampling, and which
tokens count. Knows no models but through their tokenizer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sparseprune.errors import SparsepruneError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sparseprune.calibration.text import Chat


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """Tokens (sequences, length), and which of them count; `available` is how many sequences the text has."""

    ids: Tensor
    counted: Tensor
    available: int

    @property
    def tokens(self) -> int:
        """How many tokens count."""
        return int(self.counted.sum())


def make_sequences(
    documents: Sequence[str | Chat],
    tokenizer: Any,
    count: int,
    length: int,
    seed: int,
    *,
    special: bool = True,
) -> Sequences:
    """`count` windows of `length` tokens each, or all there are: drawn by `seed` from all whole ones.

    The documents follow each other; each window gets the special tokens that the tokenizer puts around one.
    These count if `special` says so; padding never does.

    Raises:
        SparsepruneError: there is not one whole window, or messages that the chat template refuses.
    """
    before, after = _special_around(tokenizer)
    inside = length - len(before) - len(after)
    if inside < 1:
        raise SparsepruneError(
            f"--length {length}: {len(before) + len(after)} special tokens around a sequence leave no room"
        )
    tokens = [token for document in documents for token in _tokens(tokenizer, as_text(document, tokenizer))]
    available = len(tokens) // inside
    if not available:
        raise SparsepruneError(
            f"the text has {len(tokens)} tokens, wanted {inside} for one sequence of --length {length}: "
            "give more text or a smaller --length"
        )
    drawn = sorted(random.Random(seed).sample(range(available), min(count, available)))  # noqa: S311
    rows = [[*before, *tokens[inside * place : inside * (place + 1)], *after] for place in drawn]
    ids = torch.tensor(rows, dtype=torch.int64)
    counted = ~torch.isin(
        ids, torch.tensor(sorted(_not_counted(tokenizer, special=special)), dtype=ids.dtype)
    )
    if not special:
        counted[:, : len(before)] = False
        counted[:, length - len(after) :] = False
    if not bool(counted.any()):
        raise SparsepruneError("the text consists of tokens alone that do not count: give other text")
    return Sequences(ids, counted, available)


def as_text(document: str | Chat, tokenizer: Any) -> str:
    """A document as text: messages as the chat template writes them, without one as "role: content" lines.

    Templates are run in the sandbox of transformers.
    """
    if isinstance(document, str):
        return document
    if not tokenizer.chat_template:
        return "".join(f"{one['role']}: {one['content'] or ''}\n" for one in document.messages)
    try:
        text: str = tokenizer.apply_chat_template([dict(one) for one in document.messages], tokenize=False)
        text.encode()
    except Exception as error:  # a template may raise anything
        why = " ".join(str(error).split()) or type(error).__name__
        raise SparsepruneError(
            f"{document.where}: the tokenizer's chat template refuses these messages: {why}"
        ) from error
    return text


def _not_counted(tokenizer: Any, *, special: bool) -> set[int]:
    """Padding, where no other token stands for it; all special ones but that for unknown words."""
    ids = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    others = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
    return ids & {tokenizer.pad_token_id} - others if special else ids


def _tokens(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    return ids


def _special_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    bare = _tokens(tokenizer, "a")
    whole: list[int] = tokenizer("a", verbose=False)["input_ids"]
    for place in range(len(whole) - len(bare) + 1):
        if bare and whole[place : place + len(bare)] == bare:
            return whole[:place], whole[place + len(bare) :]
    return [], []
