"""The YAML front matter of a model card: where it is, and how keys are added to it.

Owns edits of its text: what is there keeps its bytes, so comments, unknown keys and unusual values stay.
Knows the hub's keys `base_model`, `library_name` and `tags`, nothing else of a card. Called by card.py.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import yaml
from msgspec import Struct
from yaml.nodes import CollectionNode, MappingNode, ScalarNode, SequenceNode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from yaml.nodes import Node

    Entries = dict[str, tuple[Node, Node]]

_FENCE = "---"
_PLAIN = re.compile(r"[A-Za-z][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_RESERVED = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})


class CardMetadata(Struct, frozen=True):
    """What a card's front matter has to say; None leaves a key as it is.

    The `base_model` that is there stays, unless `is_parent`: then the input itself is known to be that model.
    """

    base_model: str | None = None
    is_parent: bool = False
    library_name: str | None = None
    tags: Sequence[str] = ()


def split_card(text: str) -> tuple[str, str]:
    r"""The front matter of a card without its fences, and the rest.

    The front matter is empty and the rest is the whole text where none is there, or it is no YAML mapping.

    >>> split_card("---\nlicense: mit\n---\n# Model\n")
    ('license: mit\n', '# Model\n')
    >>> split_card("---\nlicense: [mit\n---\n# Model\n")
    ('', '---\nlicense: [mit\n---\n# Model\n')
    """
    lines = text.removeprefix("\ufeff").splitlines(keepends=True)
    if not lines or lines[0].rstrip() != _FENCE:
        return "", text
    end = next((at for at, line in enumerate(lines[1:], 1) if line.rstrip() == _FENCE), None)
    if end is None or _entries(front := "".join(lines[1:end])) is None:
        return "", text
    return front, "".join(lines[end + 1 :])


def with_metadata(front: str, metadata: CardMetadata) -> str:
    r"""The front matter with these keys; as it is where that cannot be done by small edits.

    >>> with_metadata("tags:\n- text\nlicense: mit\n", CardMetadata(tags=("pruning",)))
    'tags:\n- text\n- pruning\nlicense: mit\n'
    """
    entries = _entries(front)
    if entries is None:
        return front
    lines, new = front.splitlines(keepends=True), "\n"
    if lines and lines[0].endswith("\r\n"):
        new = "\r\n"
    if lines and not lines[-1].endswith(("\n", "\r")):
        lines[-1] += new
    edits = [(len(lines), len(lines), list(_absent(entries, metadata)))]
    base = entries.get("base_model")
    if base is not None and metadata.base_model and metadata.is_parent:
        edits.append((*_span(base), [f"base_model: {_scalar(metadata.base_model)}"]))
    tags = entries.get("tags")
    if tags is not None:
        edits += _tagged(tags, metadata.tags, lines)
    for first, last, texts in sorted(edits, key=lambda edit: edit[0], reverse=True):
        lines[first:last] = [f"{text.rstrip()}{new}" for text in texts]
    edited = "".join(lines)
    after = _entries(edited)
    return edited if after is not None and entries.keys() <= after.keys() else front


def _absent(entries: Entries, metadata: CardMetadata) -> Iterator[str]:
    """Lines of keys that are not there yet."""
    if metadata.base_model and "base_model" not in entries:
        yield f"base_model: {_scalar(metadata.base_model)}"
    if metadata.library_name and "library_name" not in entries:
        yield f"library_name: {_scalar(metadata.library_name)}"
    if metadata.tags and "tags" not in entries:
        yield "tags:"
        yield from (f"- {_scalar(tag)}" for tag in metadata.tags)


def _tagged(
    entry: tuple[Node, Node], tags: Sequence[str], lines: Sequence[str]
) -> Iterator[tuple[int, int, list[str]]]:
    """The edit that adds tags to those that are there: a list of either style, one tag, or none."""
    value = entry[1]
    if isinstance(value, SequenceNode):
        there = {one.value for one in value.value if isinstance(one, ScalarNode)}
        more = [_scalar(tag) for tag in tags if tag not in there]
        first, column = value.start_mark.line, value.start_mark.column
        if more and value.flow_style:
            line = lines[first]
            after = ", " if value.value else ""
            yield first, first + 1, [f"{line[: column + 1]}{', '.join(more)}{after}{line[column + 1 :]}"]
        elif more:
            end = _last_line(value) + 1
            yield end, end, [f"{' ' * column}- {tag}" for tag in more]
    elif isinstance(value, ScalarNode):
        is_none = value.tag.endswith(":null")
        there = {value.value} - ({value.value} if is_none else set())
        every = [*there, *(tag for tag in tags if tag not in there)]
        yield *_span(entry), ["tags:", *(f"- {_scalar(tag)}" for tag in every)]


def _span(entry: tuple[Node, Node]) -> tuple[int, int]:
    """The lines of a key and its value: the first one, and the one after the last."""
    key, value = entry
    return key.start_mark.line, max(key.start_mark.line, _last_line(value)) + 1


def _last_line(node: Node) -> int:
    """The last line of a value; marks of what is no flow may end on a line of what follows."""
    begin, end = node.start_mark, node.end_mark
    if isinstance(node, CollectionNode) and not node.flow_style:
        last = node.value[-1] if node.value else None
        inner = last[1] if isinstance(node, MappingNode) and last is not None else last
        return begin.line if inner is None else _last_line(inner)
    return int(end.line - 1 if end.column == 0 and end.line > begin.line else end.line)


def _scalar(text: str) -> str:
    """A text as a value of YAML, in quotes where it might be read as something else.

    >>> _scalar("org/model-7b"), _scalar("no"), _scalar("2:4")
    ('org/model-7b', '"no"', '"2:4"')
    """
    is_plain = _PLAIN.fullmatch(text) is not None and text.isascii() and text.lower() not in _RESERVED
    return text if is_plain else json.dumps(text)


def _entries(front: str) -> Entries | None:
    """The keys of a front matter with the nodes of key and value; None where it is no mapping in lines."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        node = yaml.compose(front, Loader=loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    if node is None:
        return {}
    if not isinstance(node, MappingNode) or node.flow_style:
        return None
    entries = {str(key.value): (key, value) for key, value in node.value}
    return entries if len(entries) == len(node.value) else None
