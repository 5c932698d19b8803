"""Tensor patterns: what they match and capture, against a slow reading of the rules; what is no pattern."""

import re
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprune.spec.patterns import (
    Again,
    Literal,
    PatternError,
    Stem,
    Token,
    Wildcard,
    Words,
    match_tokens,
    parse_pattern,
    regex_of,
)

MATCHES = [
    ("a.b", "a.b", ()),
    ("a.b", "a.bc", None),
    ("a.b", "axb", None),
    ("a.*", "a.", ()),
    ("a.*", "a.b", ()),
    ("a.*", "a.b.c", None),
    ("a.**", "a.b.c", ()),
    ("**.w", ".w", ()),
    ("**.w", "w", ()),
    ("**.w", "a.b.w", ()),
    ("**.w", "aw", None),
    ("**a.w", "w", None),
    ("*.w", "w", None),
    ("a.**.w", "a.w", None),
    ("{x:**}.w", "w", (("x", ""),)),
    ("{x:**}.w", "aw", None),
    ("{x:**}.{x}.w", "a.b.a.b.w", (("x", "a.b"),)),
    ("{x:**}.{x}.w", ".w", (("x", ""),)),
    ("**.layers.{layer}.w", "layers.3.w", (("layer", 3),)),
    ("{stem:**}.layers.{layer}.w", "layers.3.w", (("stem", ""), ("layer", 3))),
    ("{stem:**}.layers.{layer}.w", "model.vision.layers.3.w", (("stem", "model.vision"), ("layer", 3))),
    ("{x}.w", ".w", None),
    ("{x}.w", "a.w", (("x", "a"),)),
    ("{x}.w", "a.b.w", None),
    ("{x:**}.w", "a.b.w", (("x", "a.b"),)),
    ("{x:**}.w", ".w", None),
    ("layers.{layer}.w", "layers.10.w", (("layer", 10),)),
    ("layers.{layer}.w", "layers.007.w", (("layer", 7),)),
    ("layers.{layer}.w", "layers.1e1.w", (("layer", "1e1"),)),
    ("layers.{layer}.w", "layers.٣.w", (("layer", "٣"),)),
    ("{part:gate|up}_proj", "up_proj", (("part", "up"),)),
    ("{part:gate|up}_proj", "down_proj", None),
    ("{part:a|ab}{rest}", "abc", (("part", "a"), ("rest", "bc"))),
    ("{part:a|ab}.w", "ab.w", (("part", "ab"),)),
    ("{part:attn.q|mlp.up}.w", "mlp.up.w", (("part", "mlp.up"),)),
    ("{x}.{x}", "a.a", (("x", "a"),)),
    ("{x}.{x}", "a.b", None),
    ("{x:a|b}.{y}.{x}", "b.c.b", (("x", "b"), ("y", "c"))),
    ("{x:a|b}.{y}.{x}", "b.c.a", None),
    ("{a}_{b}", "p_q_r", (("a", "p_q"), ("b", "r"))),
    ("w\n*", "w\nx\ny", ()),
    ("**", "any.thing\nat all", ()),
    ("a+b", "aab", None),
    ("a+b", "a+b", ()),
]

NO_PATTERNS = [
    ("", "the pattern is empty: write the name of a tensor, with captures or *"),
    ("a.{layer",
     "character 3: { opens a capture that no } closes: write {name}, {name:this|that} or {name:**}"),
    ("a.{b{c}",
     "character 3: { opens a capture that no } closes: write {name}, {name:this|that} or {name:**}"),
    ("a}.b", "character 2: } closes a capture that no { opens"),
    ("a.{}", "character 3: the capture has no name: write letters, digits and _, such as {layer}"),
    ("{1st}", 'character 1: "1st" is no name: write letters, digits and _, such as {layer}'),
    ("{a b}", 'character 1: "a b" is no name: write letters, digits and _, such as {layer}'),
    ("{é}", 'character 1: "é" is no name: write letters, digits and _, such as {layer}'),
    ("{in}", 'character 1: "in" is no name: write letters, digits and _, such as {layer}'),
    ("{x:}", 'character 1: {x:} has the word "": write whole words such as {x:gate|up}'),
    ("{x:a||b}", 'character 1: {x:a||b} has the word "": write whole words such as {x:gate|up}'),
    ("{x:a | b}", 'character 1: {x:a | b} has the word "a ": write whole words such as {x:gate|up}'),
    ("{x:a*}", 'character 1: {x:a*} has the word "a*": write whole words such as {x:gate|up}'),
    ("a.***", "character 3: *** has no meaning: * matches inside a piece, ** across pieces"),
    ("{x}.{x:a|b}", "character 5: {x} was captured before: give its form at the first place only"),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "name", "captures"), MATCHES)
def test_a_pattern_matches_the_whole_name_or_not(
    pattern: str, name: str, captures: tuple[tuple[str, int | str], ...] | None
) -> None:
    assert parse_pattern(pattern).match(name) == captures


@pytest.mark.parametrize(("text", "message"), NO_PATTERNS)
def test_what_is_no_pattern_is_refused_with_the_place(text: str, message: str) -> None:
    with pytest.raises(PatternError, match=f"^{re.escape(message)}$"):
        parse_pattern(text)


def test_the_form_of_a_capture_may_be_repeated_as_it_was() -> None:
    assert parse_pattern("{x:a|b}.{x:a|b}").match("b.b") == (("x", "b"),)


def test_names_are_in_order_of_first_appearance() -> None:
    assert parse_pattern("{b}.{a:x|y}.{b}.{c:**}").names == ("b", "a", "c")


def test_digits_that_int_would_refuse_stay_text() -> None:
    digits = "1" * 5000
    assert parse_pattern("{x}").match(digits) == (("x", digits),)


@pytest.mark.parametrize(
    "pattern",
    [
        "*a*a*a*a*b",
        "**a**a**a**a**a**b",
        "**.a*a*a*a*a*b",
        "{a}a{b}a{c}a{d}a{e}b",
        "{p:a|aa}{q:a|aa}{r:a|aa}{s:a|aa}{t:a|aa}{u:a|aa}*b",
        "*" + "a*" * 300 + "b",
    ],
)
def test_no_pattern_takes_exponential_time(pattern: str) -> None:
    assert parse_pattern(pattern).match("a" * 1000) is None  # else this would never end


def fits(token: Token, head: str, held: dict[str, str]) -> bool:
    match token:
        case Literal(text):
            return head == text
        case Again(name):
            return head == held[name]
        case Stem(None):
            return head == "" or head.endswith(".")
        case Stem():
            return head == "" or (head.endswith(".") and head != ".")
        case Words(_, words):
            return head in words
        case Wildcard(across, name):
            return (across or "." not in head) and (name is None or head != "")


def oracle(tokens: tuple[Token, ...], text: str, held: dict[str, str]) -> Iterator[dict[str, str]]:
    """Every way to read a text, in the order of preference, by trying everything."""
    if not tokens:
        yield from [held] if not text else []
        return
    token = tokens[0]
    ends = map(len, token.words) if isinstance(token, Words) else range(len(text), -1, -1)
    for end in ends:
        head = text[:end]
        if fits(token, head, held):
            name = getattr(token, "name", None)
            value = head.removesuffix(".") if isinstance(token, Stem) else head
            yield from oracle(tokens[1:], text[end:], held | ({name: value} if name else {}))


PIECES = st.sampled_from(
    ["a", "b", ".", ".", "ab", "*", "**", "{x}", "{y}", "{x:**}", "{y:a|ab|b}", "{z:**}", "{w:a.b|a}"]
)


@settings(max_examples=600, deadline=None)
@given(st.lists(PIECES, min_size=1, max_size=7), st.text("ab.", max_size=9))
def test_both_matchers_read_a_name_as_the_oracle_does(pieces: list[str], name: str) -> None:
    text = re.sub(r"\*{3,}", "**", "".join(pieces))
    try:
        pattern = parse_pattern(text)
    except PatternError:
        return  # the same capture in two forms
    wanted = next(oracle(pattern.tokens, name, {}), None)
    expected = None if wanted is None else tuple(wanted[capture] for capture in pattern.names)
    found = re.fullmatch(regex_of(pattern.tokens), name, re.DOTALL)
    assert match_tokens(pattern.tokens, name) == expected
    assert (None if found is None else found.groups()) == expected
    assert pattern.match(name) == (
        None if expected is None else tuple(zip(pattern.names, expected, strict=True))
    )
