"""Regular expressions that name tensors: what they capture, and that none can take without end."""

import pytest

from sparseprune.spec.patterns import PatternError, parse_regex

MATCHES = [
    (r"layers\.(?P<layer>\d+)\.(?:gate|up)\.w", "layers.3.up.w", (("layer", 3),)),
    (r"layers\.(?P<layer>\d+)", "layers.3.w", None),  # the whole name or nothing
    (r".*(?P<b>\d)(?P<a>[a-z]+)", "x.7up", (("b", 7), ("a", "up"))),
    (r"(?P<at>(?:.*\.)?)conv(?P<n>\d)?\.w", "conv.w", (("at", ""), ("n", ""))),
    (r"(?P<at>(?:.*\.)?)conv(?P<n>\d)?\.w", "a.b.conv2.w", (("at", "a.b."), ("n", 2))),
    (r"(?i)A(?P<x>.+)", "ab", (("x", "b"),)),
    (r"(?P<x>\w+)\.(?P=x)", "a.a", (("x", "a"),)),
    (r"(\w+)\.b", "a.b", ()),
]

FINE = [
    r"model\.layers\.(?P<layer>\d+)\.(?P<part>[^.]+)\.(?P<name>[^.]+)_proj\.(?:weight|bias)",
    r".*\.layers\.(?P<layer>\d+)\.(?P<part>[^.]+)\.(?P<name>[^.]+)\.weight",
    r"(?:[^.]+\.)*w",
    r"(?:\.[^.]++)*x",
    r"(?>a+)b",
    r"a*+b*+c*+d*+e*+f",
    r"(?:ab|cd)x(?:e|fg)",
    r".*a.*b",
    r"(?=.*x)(?!.*y).*",
    r"(?:\d{2}){3}",
    r"a?b?c?d?",
]

SLOW = [
    r"(a+)+b", r"(a*)*b", r"(a|a)*b", r"(a|ab)+c", r"(a?)+b", r"(?>(a+)+)b", r"(a{1,30}){1,30}b",
    r".*.*.*.*b", r"\w*\w*\w*\w*b", r"(?:.*,){11}P", "a?" * 30 + "a" * 30,
    r"(?P<x>.*)(?P<y>.*)(?P<z>.*)(?P<u>.*)b", r"([ab]+c?)+d", r"(?i)(a+)A*[a]*[^b]*a*b",
]  # fmt: skip


@pytest.mark.parametrize(("text", "name", "captures"), MATCHES)
def test_named_groups_of_a_whole_match_are_captures(
    text: str, name: str, captures: tuple[tuple[str, int | str], ...] | None
) -> None:
    assert parse_regex(text).match(name) == captures


@pytest.mark.parametrize("text", FINE)
def test_what_has_few_readings_is_fine_and_ends(text: str) -> None:
    assert parse_regex(text).match("a" * 150 + "!") is None or text.startswith("(?=")


@pytest.mark.parametrize("text", SLOW)
def test_what_could_be_tried_without_end_is_refused(text: str) -> None:
    with pytest.raises(PatternError, match="this regex could take very long to match, because "):
        parse_regex(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the regex is empty: write one that matches the names of tensors"),
        ("(", "character 1: this is no regular expression: missing ), unterminated subpattern"),
        ("(?P<in>a)", '"in" is no name: write letters, digits and _, such as (?P<layer>...)'),
        ("a" * 3000, "this regex has 3000 characters, wanted 2000 at most"),
    ],
)
def test_what_is_no_regex_is_refused(text: str, says: str) -> None:
    with pytest.raises(PatternError) as caught:
        parse_regex(text)
    assert str(caught.value) == says


@pytest.mark.parametrize(
    "text", ["(" * 900 + ")" * 900, "a{99999999999999999999}", "[[a]", "(?P<x>a)(?P<x>b)"]
)
def test_monstrous_ones_are_refused_too(text: str) -> None:
    with pytest.raises(PatternError):
        parse_regex(text)
