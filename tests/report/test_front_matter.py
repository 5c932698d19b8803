"""The front matter of a model card is edited in place: what is there stays, and all of it stays valid."""

from typing import Any

import pytest
import yaml

from sparseprune.report.front_matter import CardMetadata, split_card, with_metadata

ADDED = CardMetadata(base_model="org/parent", library_name="transformers", tags=("pruning", "sparse"))
PARENT = CardMetadata(base_model="org/parent", is_parent=True, tags=("pruning",))


def read(front: str) -> Any:
    return yaml.safe_load(front) or {}


FRONTS = {
    "nothing": "",
    "a comment alone": "# to do\n",
    "a license": "license: mit\n",
    "a list of tags": "tags:\n- text-generation\n- llama\nlicense: mit\n",
    "an indented list, with comments": "tags:  # mine\n    - a  # one\n\n    - b\n\n# more\nlicense: mit\n",
    "a list in brackets": "tags: [a, b]\nlicense: mit\n",
    "a list in brackets over lines": "tags: [a,\n  b,\n  ]\nlicense: mit\n",
    "an empty list": "tags: []\n",
    "an empty list with a comment": "tags: []  # none\n",
    "no tags": "tags:\nlicense: mit\n",
    "one tag": "license: mit\ntags: llama\n",
    "tags that are there": "tags: [sparse, pruning]\nlibrary_name: mine\nbase_model: org/other\n",
    "values of all kinds": "language: no\nn: 1_000\nx: |\n  a\n\n  b\ny: >-\n  c\nd: 2020-01-01\n",
    "nested": "model-index:\n- name: m\n  results:\n  - task: {type: t}\n    metrics:\n    - value: 1.5\n",
    "a list last": "base_model:\n- org/a\n- org/b\n",
    "an anchor": "a: &one [x]\nb: *one\n",
    "line ends of Windows": "license: mit\r\ntags:\r\n- a\r\n",
    "letters of all kinds": "é: ü\ntags: [日本]\n",
    "no line end": "license: mit",
    "quoted keys": "'tags': ['a']\n\"license\": mit\n",
}


@pytest.mark.parametrize("name", FRONTS)
def test_keys_are_added_and_everything_else_stays(name: str) -> None:
    front = FRONTS[name]
    before, after = read(front), read(with_metadata(front, ADDED))
    tags = before.get("tags") or []
    tags = tags if isinstance(tags, list) else [tags]
    wanted = {"base_model": "org/parent", "library_name": "transformers"} | before
    wanted["tags"] = [*tags, *(tag for tag in ADDED.tags if tag not in tags)]
    wanted_order = sorted(wanted["tags"]) if "[" in front else wanted["tags"]
    found = dict(after)
    found["tags"] = sorted(found["tags"]) if "[" in front else found["tags"]
    assert found == {**wanted, "tags": wanted_order}
    for line in front.splitlines():
        if "#" in line:
            assert line in with_metadata(front, ADDED).replace("pruning, sparse", "")


@pytest.mark.parametrize("name", FRONTS)
def test_the_parent_takes_the_place_of_another_base_model(name: str) -> None:
    before, after = read(FRONTS[name]), read(with_metadata(FRONTS[name], PARENT))
    assert after["base_model"] == "org/parent"
    assert {key: value for key, value in after.items() if key not in {"base_model", "tags"}} == {
        key: value for key, value in before.items() if key not in {"base_model", "tags"}
    }


@pytest.mark.parametrize("name", FRONTS)
def test_what_was_added_is_not_added_again(name: str) -> None:
    once = with_metadata(FRONTS[name], ADDED)
    assert with_metadata(once, ADDED) == once


def test_line_ends_stay_what_they_are() -> None:
    edited = with_metadata(FRONTS["line ends of Windows"], ADDED)
    assert edited.count("\n") == edited.count("\r\n") == len(edited.splitlines())


BROKEN = {
    "not closed": "---\nlicense: mit\n# Model\n",
    "not YAML": "---\nlicense: [mit\n---\n# Model\n",
    "a tab": "---\na:\n\t- b\n---\n",
    "a list": "---\n- a\n---\n",
    "a text": "---\nhello\n---\n",
    "in braces": "---\n{license: mit}\n---\n",
    "a key twice": "---\na: 1\na: 2\n---\n",
    "several documents": "---\na: 1\n...\nb: 2\n---\n",
    "an alias of nothing": "---\na: *b\n---\n",
    "bytes that are no UTF-8": "---\na: \udcff\n---\n",
    "a control character": "---\na: \x07\n---\n",
    "too deep": "---\na: " + "[" * 5000 + "\n---\n",
    "no front matter": "# Model\n---\na: 1\n---\n",
    "empty": "",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_front_matter_is_text(name: str) -> None:
    assert split_card(BROKEN[name]) == ("", BROKEN[name])


def test_front_matter_ends_at_the_first_fence() -> None:
    assert split_card("---\na: 1\n---\ntext\n---\nmore\n") == ("a: 1\n", "text\n---\nmore\n")
    assert split_card("\ufeff---  \r\na: 1\r\n---\r\ntext") == ("a: 1\r\n", "text")
    assert split_card("---\n---\ntext") == ("", "text")
