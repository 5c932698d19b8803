"""Which tensors are told of, in which order, and under which flat names their facts are asked for.

Knows entries of documents as plain mappings and nothing of what is in them. Called by the commands that
list tensors.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sparseprune.errors import SparsepruneError, printable
from sparseprune.report.wording import many
from sparseprune.spec.patterns import PatternError, parse_pattern
from sparseprune.spec.problems import nearest, shown, suggestion

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from sparseprune.spec.patterns import TensorPattern

Entry = Any
"""A tensor or a group in a document: a mapping of names to numbers, texts, lists and mappings."""

_DIGITS = re.compile(r"([0-9]+)")
_MOST_COMPARED = 1000
_HEADS = ("zero", "eligible")  # of a nested pair the fact itself; what stands beside it explains it
_ALSO_NAMES = {"tensor", "layer", "module", "rule"}  # titles under which tables show names


def selected(names: Iterable[str], match: Sequence[str], exclude: Sequence[str]) -> tuple[str, ...]:
    """The names that some pattern of `match` matches, or all, and none of `exclude`, as they stand.

    Patterns are those of a spec. SparsepruneError for one that cannot be read, for one of `match` that
    matches no name, and where nothing is left.

    >>> selected(["model.norm", "model.layers.0.up"], ["**.layers.{layer}.*"], [])
    ('model.layers.0.up',)
    """
    there = tuple(names)
    wanted = _matched(match, there) if match else set(there)
    patterns = [_pattern("--exclude", text) for text in exclude]
    unwanted = {name for name in wanted if any(pattern.match(name) is not None for pattern in patterns)}
    left = tuple(name for name in there if name in wanted and name not in unwanted)
    if unwanted and not left:
        words = "--match and --exclude" if match else "--exclude"
        raise SparsepruneError(f"{words}: of {many(len(there), 'tensor')} none is left; exclude fewer")
    return left


def ordered(entries: Iterable[Entry], key: str | None, reverse: bool) -> list[Entry]:  # noqa: FBT001
    """Entries by one of their facts, the smallest first; as they stand for None.

    `key` is a flat name (`flat`), the end of one that no other has ("4x4"), or a title of a name's column.
    Names are in their natural order, what is not known comes last, equals stay as they stand.
    SparsepruneError for a key that no entry has, with the nearest one.

    >>> [entry["name"] for entry in ordered([{"name": "h.10"}, {"name": "h.9"}], "name", False)]
    ['h.9', 'h.10']
    """
    there = list(entries)
    if key is None or not there:
        return there[::-1] if reverse else there
    facts = [flat(entry) for entry in there]
    found = _key_of(key, dict.fromkeys(name for fact in facts for name in fact))
    values = [fact.get(found) for fact in facts]
    known = [at for at, value in enumerate(values) if value is not None]
    unknown = [at for at, value in enumerate(values) if value is None]
    known.sort(key=lambda at: _rank(values[at]), reverse=reverse)
    return [there[at] for at in (*known, *unknown)]


def flat(entry: Entry) -> dict[str, Any]:
    """The facts of an entry without nesting, as a sheet of a spreadsheet names its columns.

    >>> flat({"name": "w", "shape": [8, 4], "zero_blocks": {"4x4": {"zero": 1, "of": 2}}})
    {'name': 'w', 'shape': [8, 4], 'zero_blocks_4x4': 1, 'zero_blocks_4x4_of': 2}
    """
    return dict(_flat(entry, ""))


def natural(name: str) -> tuple[tuple[str, int, str], ...]:
    """A name as a key to sort by: numbers in it count as numbers, of any length.

    >>> sorted(["h.10.w", "h.9.w", "a"], key=natural)
    ['a', 'h.9.w', 'h.10.w']
    """
    pieces = _DIGITS.split(name)
    texts, numbers = pieces[::2], [*(digits.lstrip("0") for digits in pieces[1::2]), ""]
    return tuple((text, len(digits), digits) for text, digits in zip(texts, numbers, strict=True))


def _matched(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    """The names that some of the patterns match; each has to match one."""
    matched: set[str] = set()
    for text in patterns:
        pattern = _pattern("--match", text)
        found = [name for name in names if pattern.match(name) is not None]
        if not found:
            hint = _hint(text, pattern, names)
            raise SparsepruneError(printable(f"--match {text}: matches none of {hint}"))
        matched.update(found)
    return matched


def _pattern(option: str, text: str) -> TensorPattern:
    try:
        return parse_pattern(text)
    except PatternError as error:
        raise SparsepruneError(printable(f"{option} {text}: {error}")) from None


def _hint(text: str, pattern: TensorPattern, names: Sequence[str]) -> str:
    """How many tensors there are, and what was meant or what one of them is called."""
    count = many(len(names), "tensor")
    below = f"{text.rstrip('.')}.**"
    if names and text.strip(".*") and any(parse_pattern(below).match(name) is not None for name in names):
        return f"{count}; did you mean {below}?"
    forms: dict[str, str] = {}  # names that differ in numbers resemble the pattern equally
    for name in names:
        forms.setdefault(_DIGITS.sub("0", name), name)
    close = [forms[form] for form in nearest(pattern.sample, list(forms)[:_MOST_COMPARED])] or names[:1]
    return f"{count}, such as {shown(close[0])}" if close else count


def _flat(entry: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in entry.items():
        name = prefix if prefix and key in _HEADS else f"{prefix}_{key}" if prefix else key
        if isinstance(value, dict):
            yield from _flat(value, name)
        else:
            yield name, value


def _key_of(key: str, names: Iterable[str]) -> str:
    """The flat name that was meant."""
    plain = {_plain(name): name for name in names}
    wanted = _plain(key)
    if wanted in _ALSO_NAMES and wanted not in plain:
        wanted = "name"
    if wanted in plain:
        return plain[wanted]
    endings = [name for text, name in plain.items() if text.endswith(f"_{wanted}")]
    if len(endings) == 1:
        return endings[0]
    real = sorted(plain.values())
    hint = suggestion(key, real) or f"; there is {', '.join(real)}"
    raise SparsepruneError(printable(f"--sort {key}: there is no such column{hint}"))


def _plain(key: str) -> str:
    return re.sub(r"[ -]", "_", key.strip().lower())


def _rank(value: object) -> tuple[int, Any]:
    """What values of one fact are compared by: numbers, texts, lists."""
    if isinstance(value, str):
        return 1, natural(value)
    if isinstance(value, list | tuple):
        return 2, tuple(_rank(item) for item in value)
    return 0, value
