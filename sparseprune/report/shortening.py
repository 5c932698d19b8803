"""Names made shorter so that they can still be told apart: what is alike in them goes first.

Names are pieces between dots. Called by tables that have not room for whole names.
"""

from __future__ import annotations

from itertools import pairwise, takewhile
from typing import TYPE_CHECKING

from rich.cells import cell_len

if TYPE_CHECKING:
    from collections.abc import Sequence

_RAGGED = 12  # characters of a cut piece that are rather left out than shown


def shortened(names: Sequence[str], width: int, ellipsis: str = "…") -> list[str]:
    """The names in their order, each in at most `width` columns; unlike ones stay so where that is possible.

    A long name keeps its end. Where several have the same end, they keep what tells them apart as well.

    >>> shortened(["model.layers.10.self_attn.q_proj.weight", "lm_head.weight"], 24)
    ['…self_attn.q_proj.weight', 'lm_head.weight']
    >>> shortened([f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (9, 10)], 28)
    ['…9.self_attn.q_proj.weight', '…10.self_attn.q_proj.weight']
    """
    unlike = dict.fromkeys(names)
    short = {name: name for name in unlike if cell_len(name) <= width}
    long = [name for name in unlike if name not in short]
    ends = {name: ellipsis + _end(name, width - cell_len(ellipsis)) for name in long}
    became = short | ends
    for group in _alike(became, long):
        spans = _unlike(group)
        became |= {name: _told_apart(name, spans[name], width, ellipsis) for name in group if name in ends}
    for group in _alike(became, long):
        # What was gained for one may be lost for another: then at least as much as fits is shown of each.
        became |= {name: ellipsis + _tail(name, width - cell_len(ellipsis)) for name in group if name in ends}
    return [became[name] for name in names]


def _alike(became: dict[str, str], long: Sequence[str]) -> list[list[str]]:
    """Names that have become the same, if one of them was shortened."""
    groups: dict[str, list[str]] = {}
    for name, text in became.items():
        groups.setdefault(text, []).append(name)
    cut = set(long)
    return [group for group in groups.values() if len(group) > 1 and not cut.isdisjoint(group)]


def _unlike(names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """For each name the first and the last character that it takes to tell it from the others."""
    ranked = sorted(names)
    first = _alike_up_to(ranked[0], ranked[-1])
    alike = [0, *(_alike_up_to(*pair) for pair in pairwise(ranked)), 0]
    return {name: (first, max(pair)) for name, pair in zip(ranked, pairwise(alike), strict=True)}


def _told_apart(name: str, span: tuple[int, int], width: int, ellipsis: str) -> str:
    """Its end, and before it the pieces in which it is unlike others."""
    differs, last = span
    begin = name.rfind(".", 0, differs) + 1
    dot = name.find(".", last)
    whole = dot if dot >= 0 else len(name)
    for start, stop, share in (
        (0, whole, 2),
        (begin, whole, 3),
        (begin, last + 1, 3),
        (differs, last + 1, 4),
    ):
        head = (ellipsis if start else "") + name[start:stop] + ellipsis
        room = width - cell_len(head)
        if room >= width // share:
            return head + _tail(name[stop:], room)
    return ellipsis + _end(name, width - cell_len(ellipsis))


def _alike_up_to(one: str, other: str) -> int:
    """How many characters both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _end(name: str, width: int) -> str:
    """As much of its end as fits, without the rest of a piece that was cut, if that is short or a number."""
    tail = _tail(name, width)
    ragged, dot, rest = tail.partition(".")
    before = name[: len(name) - len(tail)]
    if dot and rest and not before.endswith(".") and (len(ragged) <= _RAGGED or ragged.isdigit()):
        return rest
    return tail


def _tail(text: str, width: int) -> str:
    """The longest end of a text that fits into `width` columns."""
    if text.isascii():
        return text[len(text) - width :] if 0 <= width < len(text) else text if width > 0 else ""
    at = len(text)
    while at > 0 and (wide := cell_len(text[at - 1])) <= width:
        width -= wide
        at -= 1
    return text[at:]
