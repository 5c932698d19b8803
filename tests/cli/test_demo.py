"""`demo`: a folder with a trained model and texts, in which everything that is shown can be typed again."""

import pydoc_data.topics
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparseprune
from sparseprune.cli.demo import texts_of_help, write_decoder
from tests.commands import Said, ok, python, refused

PARAMETERS = 558_208


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a demo, and what the demo said."""
    home = tmp_path_factory.mktemp("home")
    done = python("-m", "sparseprune", "demo", cwd=home)
    assert done.returncode == 0, done.stderr
    return home / "demo", done.stdout


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for a demo in an environment that cannot run models."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    return tmp_path / "a demo"


def commands(said: str) -> list[list[str]]:
    """What the demo ran, behind a prompt, and what it says to type next."""
    return [shlex.split(line) for line in re.findall(r"^(?:\$|  ?) ?sparseprune (.+)$", said, re.MULTILINE)]


def divergence(said: str) -> float:
    """The KL of the first table."""
    row = re.search(r"^KL to the dense model, nats a token +([\d.]+) ", said, re.MULTILINE)
    assert row is not None
    return float(row[1])


def test_everything_that_is_shown_is_there_or_is_made_by_what_stands_before(made: tuple[Path, str]) -> None:
    folder, said = made
    there = {path.name for path in folder.iterdir()}
    assert there == {"decoder", "corpus.txt", "held-out.txt", "magnitude"}
    assert f"Go on in that folder: cd {folder.name}\n" in said
    shown = commands(said)
    names = "apply inspect eval apply eval calibrate remove eval specs"
    assert [words[0] for words in shown] == names.split()
    for words in shown:
        flags = [flag for flag in ("--text", "--against", "--stats") if flag in words]
        inputs = [words[words.index(flag) + 1] for flag in flags]
        assert {*inputs} <= there
        assert words[1] in there or words[1:] == ["--for", "decoder"]
        there |= {words[words.index("-o") + 1]} if "-o" in words else set()


def test_the_demo_tells_how_much_worse_a_pruned_model_predicts(made: tuple[Path, str]) -> None:
    _, said = made
    row = re.search(r"^perplexity of a token +([\d.]+) \+- [\d.]+ +([\d.]+) ", said, re.MULTILINE)
    assert row is not None
    pruned, dense = row.groups()
    assert 1.3 * float(dense) < float(pruned)
    assert float(dense) < 30


def test_what_is_to_be_typed_next_runs_and_rebuilds_the_model(
    made: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer sequences than a user takes."""
    folder, said = made
    monkeypatch.chdir(folder)
    answers: list[Said] = []
    for words in commands(said)[3:-1]:
        fewer = ["--sequences", 16] if words[0] in {"apply", "eval", "calibrate"} else []
        answers.append(ok(*words, *fewer))
    assert divergence(answers[1].out) < divergence(said) / 2
    assert "config.json: intermediate_size 192 -> 144" in answers[3].err


def test_the_decoder_is_a_model_of_transformers_that_knows_its_text(tmp_path: Path) -> None:
    write_decoder(tmp_path / "decoder")
    names = {path.name for path in (tmp_path / "decoder").iterdir()}
    assert {"config.json", "model.safetensors.index.json", "README.md", "tokenizer.json"} < names
    assert sum(name.endswith(".safetensors") for name in names) == 2
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "decoder")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder")
    assert model.num_parameters() == PARAMETERS
    text = "If the object is not a class instance, a “TypeError” exception is raised.\n"
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(tokens[0]) == text
    with torch.no_grad():
        assert model(input_ids=tokens, labels=tokens).loss < 3


def test_texts_are_of_different_topics_and_share_no_paragraph() -> None:
    texts = texts_of_help()
    assert texts is not None
    corpus, held_out = (text.strip().split("\n\n") for text in texts)
    assert not {*corpus} & {*held_out}
    assert len({*corpus, *held_out}) == len(corpus) + len(held_out)
    both = {part for text in pydoc_data.topics.topics.values() for part in text.strip().split("\n\n")}
    assert both == {*corpus, *held_out}
    assert 2 * len(texts[1]) < len(texts[0])


def test_without_transformers_the_model_is_pruned_and_not_evaluated(quick: Path) -> None:
    said = ok("demo", quick)
    assert "This takes transformers: pip install" in said.out
    assert "perplexity" not in said.out
    assert "satisfied: 2:4 by 28 tensors" in said.out
    assert f"Go on in that folder: cd '{quick}'" in said.out
    assert len(sparseprune.load_masks(quick / "magnitude")) == 28


def test_a_python_without_help_texts_is_told_in_a_line(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    said = ok("demo", quick)
    assert "no texts: this Python has no module pydoc_data; give --text a file of yours below\n" in said.out
    assert {path.name for path in quick.iterdir()} == {"decoder", "magnitude"}


def test_demo_refuses_a_folder_that_is_there(tmp_path: Path) -> None:
    said = refused("demo", tmp_path)
    assert said.err == f"sparseprune: {tmp_path}: exists already; name a folder that is not there yet\n"
