"""Tokens: ids that configs name, after rows of the vocabulary are gone.

Owns which keys hold ids, and what is in the way of renumbering them. Called by config.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field

from sparseprune.spec.naming import POSITIONS_FROM_PADDING, VOCABULARY_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from sparseprune.removal.sections import Path, Section

_IDS = re.compile(r"_token_ids?$|_token_index$|^(?:begin_)?suppress_tokens$")
_FORGOTTEN = re.compile(r"^(?:begin_)?suppress_tokens$")  # what they forbid needs not be there
_UNREAD = re.compile(r"words_ids$|decoder_ids$|_to_id$|^vocabulary_map$|^sequence_bias$")
_PADDING, _USUAL = "pad_token_id", 1


class Renumbered(Struct, frozen=True):
    """Documents with the new ids of tokens, by file; what is in the way, and what may no longer be true."""

    documents: dict[str, dict[str, Any]] = {}
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def renumber(
    documents: Mapping[str, Mapping[str, Any]], section: Section, kept: NDArray[np.bool_]
) -> Renumbered:
    """The documents after tokens are dropped that are not `kept`; `section` is the vocabulary's own.

    The first document is the config. Configs inside it that have a vocabulary of their own stay as they are.
    """
    found, ids = Renumbered({}), {old: new for new, old in enumerate(kept.nonzero()[0].tolist())}
    first = next(iter(documents))
    for file, document in documents.items():
        found.documents[file] = _Reader(file, ids, kept.size, section.path, found).read(document, ())
    found.problems.extend(_other_sizes(section, first))
    found.problems.extend(_moved_padding(section, first, ids))
    moved = next((old for old, new in ids.items() if old != new), None)
    if moved is not None:
        text = f"token {moved} is {ids[moved]} now; give each the place that it has in the list"
        found.remarks.append(f"the tokenizer's files give the old ids: {text}")
    return found


def _other_sizes(section: Section, file: str) -> Iterator[str]:
    """Keys that count some tokens of the same vocabulary."""
    for key, value in section.values.items():
        if key.startswith(VOCABULARY_SIZE) and key != VOCABULARY_SIZE:
            yield f"{file}: {section.prefix}{key} {value} counts tokens of its own: rows cannot go"


def _moved_padding(section: Section, file: str, ids: Mapping[int, int]) -> Iterator[str]:
    if section.values.get("model_type") not in POSITIONS_FROM_PADDING:
        return
    padding = section.values.get(_PADDING, _USUAL)
    if type(padding) is int and ids.get(padding, padding) != padding:
        text = f"{padding} would be {ids[padding]}, and positions are counted from it on"
        yield f"{file}: {section.prefix}{_PADDING} {text}: keep all tokens below it"


class _Reader(Struct, frozen=True):
    """Reads one document: `ids` are the new ones by the old ones, of which there were `size`."""

    file: str
    ids: Mapping[int, int]
    size: int
    own: Path
    found: Renumbered

    def read(self, values: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """An object with new ids, inside too."""
        return {key: self._value(key, value, (*path, key)) for key, value in values.items()}

    def _value(self, key: str, value: Any, path: Path) -> Any:  # noqa: ANN401
        if isinstance(value, dict) and not _UNREAD.search(key):
            on_the_way = self.own[: len(path)] == path
            return value if VOCABULARY_SIZE in value and not on_the_way else self.read(value, path)
        if _IDS.search(key):
            return self._renumbered(value, path)
        if _UNREAD.search(key) and value:
            what = ".".join(map(str, path))
            self.found.remarks.append(f"{self.file}: {what} names tokens by their ids, and stays as it is")
        return value

    def _renumbered(self, value: Any, path: Path) -> Any:  # noqa: ANN401
        if isinstance(value, list):
            forget = _FORGOTTEN.search(str(path[-1])) is not None
            left = [each for each in value if not (forget and self._is_gone(each))]
            return [self._renumbered(each, path) for each in left]
        if self._is_gone(value):
            text = f"is {value}, which is not among the tokens that stay"
            self.found.problems.append(f"{self.file}: {'.'.join(map(str, path))} {text}")
        return self.ids.get(value, value) if type(value) is int else value

    def _is_gone(self, value: object) -> bool:
        return type(value) is int and 0 <= value < self.size and value not in self.ids
