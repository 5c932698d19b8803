"""`sparseprune eval`: its table and JSON, what it may be asked to hold, what it refuses, what it leaves."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sparseprune
from sparseprune.calibration.blocks import Blocks
from sparseprune.calibration.runs import outputs_of
from tests.calibration.models import made, save, t5
from tests.calibration.test_evaluating import halved
from tests.commands import Said, ok, refused, run, valid
from tests.families.models import LAYERS

pytestmark = pytest.mark.usefixtures("quiet_transformers")

SIZES = ("--length", 16, "--sequences", 6)
MEANS = (
    "perplexity perplexity_per_byte dense_perplexity dense_perplexity_per_byte kl top1 cosine cosine_first"
).split()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a few models and some with half of their weights; no test changes it."""
    folder = made(tmp_path_factory.mktemp("eval"), "llama", "bert_for_masked_lm", "gpt2")
    save(t5(), folder / "t5")
    for name in ("llama", "bert_for_masked_lm", "t5"):
        halved(folder / name)
    return folder


@pytest.fixture(autouse=True)
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(home)
    before = sorted(path.name for path in home.iterdir())
    yield
    assert sorted(path.name for path in home.iterdir()) == before


def evaluate(*words: object) -> Said:
    return run("eval", *words, "--text", "words.txt", *SIZES)


def found(*words: object) -> Any:
    said = evaluate(*words, "--json", "-q")
    assert (said.code, said.err) == (0, "")
    return valid(said.out, "eval")


def test_stdout_has_the_table_and_stderr_the_progress() -> None:
    said = evaluate("llama-half", "--against", "llama")
    assert said.code == 0
    told = [line for line in said.err.splitlines() if not line.startswith("sparseprune: evaluating ")]
    assert told[:2] == [
        "sparseprune: loading the model of llama-half and that of llama",
        "sparseprune: cutting the text into sequences",
    ]
    assert re.fullmatch(r"[\d.]+ s, [\d,]+ tokens/s, on cpu", told[2])
    lines = said.out.splitlines()
    mean = r"[\d.,]+ \+- [\d.]+"
    for line, wanted in zip(
        lines,
        (
            r" +llama-half +llama",
            rf"perplexity of a token +{mean} +{mean}",
            rf"perplexity of a byte +{mean} +{mean}",
            rf"KL to the dense model, nats a token +{mean}",
            r"same most probable token +[\d.]+% \+- [\d.]+%",
            r"over 90 predicted tokens \(\d+ bytes\) in 6 windows of 16",
            r"",
            r"where they differ most:",
            r"text before +next +llama-half +llama +KL +window +position",
        ),
        strict=False,
    ):
        assert re.fullmatch(wanted, line), line
    assert len(lines) == 9 + 5
    assert len(evaluate("llama-half", "--against", "llama", "-v").out.splitlines()) == 9 + 10
    assert evaluate("llama-half", "--against", "llama", "-q").err == ""


def test_the_json_has_its_schema_and_all_means() -> None:
    document = found("llama-half", "--against", "llama")
    assert (document["input"], document["against"], document["kind"]) == ("llama-half", "llama", "decoder")
    assert (document["tokens"], document["sequences"], document["length"]) == (90, 6, 16)
    assert [name for name in MEANS if document[name] is None] == ["cosine", "cosine_first"]
    assert [name for name in MEANS if document["errors"][name] is None] == ["cosine", "cosine_first"]
    assert document["perplexity"] > document["perplexity_per_byte"] > 1
    assert document["kl"] > 0.1
    worst = document["worst"]
    assert len(worst) == 10
    assert worst[0]["kl"] == max(one["kl"] for one in worst) > document["kl"]
    assert worst[0]["before"].split()[-1].startswith(("w", "[CLS]"))
    assert 0 < worst[0]["guess"]["probability"] <= 1


def test_without_a_dense_model_there_is_a_perplexity_alone() -> None:
    alone, beside = found("llama"), found("llama-half", "--against", "llama")
    assert [name for name in MEANS if alone[name] is not None] == ["perplexity", "perplexity_per_byte"]
    assert alone["perplexity"] == pytest.approx(beside["dense_perplexity"], rel=1e-6)
    assert alone["errors"]["perplexity"] == pytest.approx(beside["errors"]["dense_perplexity"], rel=1e-6)
    assert alone["worst"] == []
    said = evaluate("llama")
    assert [line.split("  ")[0] for line in said.out.splitlines()[1:3]] == [
        "perplexity of a token",
        "perplexity of a byte",
    ]


@pytest.mark.parametrize("name", ["llama", "t5", "bert_for_masked_lm"])
def test_a_model_is_its_own_equal(name: str) -> None:
    document = found(name, "--against", name)
    if document["kind"] == "encoder":
        assert document["cosine"] == pytest.approx(1, abs=1e-12)
        assert document["cosine_first"] == pytest.approx(1, abs=1e-12)
    else:
        assert document["kl"] < 1e-6
        assert document["top1"] == 1
        assert document["perplexity"] == document["dense_perplexity"]


def test_encoders_have_cosines_also_if_they_fill_masks_in() -> None:
    document = found("bert_for_masked_lm-half", "--against", "bert_for_masked_lm")
    assert document["kind"] == "encoder"
    assert [name for name in MEANS if document[name] is not None] == ["cosine", "cosine_first"]
    assert document["tokens"] == 6 * 16
    assert 0 < document["cosine"] < 0.999
    assert document["errors"]["cosine"] > 0
    without = found("bert_for_masked_lm-half", "--against", "bert_for_masked_lm", "--no-special")
    assert without["tokens"] == 6 * 14
    assert without["cosine"] != document["cosine"]
    lines = evaluate("bert_for_masked_lm-half", "--against", "bert_for_masked_lm").out.splitlines()
    assert [line.partition("  ")[0] for line in lines[1:3]] == [
        "cosine of mean-pooled embeddings",
        "cosine of first tokens",
    ]
    assert lines[3:] == ["over 96 tokens in 6 windows of 16, against bert_for_masked_lm"]


def test_encoder_decoders_are_fed_their_text() -> None:
    document = found("t5-half", "--against", "t5")
    assert document["kind"] == "encoder-decoder"
    assert document["kl"] > 0
    assert document["tokens"] == 90


def test_special_tokens_are_no_predictions_unless_they_count() -> None:
    assert found("llama", "--no-special")["tokens"] == 6 * 14


def test_layers_may_be_gone(tmp_path: Path) -> None:
    ok("remove", "llama", "layers", "--set", "sparsity=0.5", "-o", tmp_path / "short", "-q")
    layers = json.loads((tmp_path / "short" / "config.json").read_text())["num_hidden_layers"]
    assert layers < LAYERS
    document = found(tmp_path / "short", "--against", "llama")
    assert document["dense_perplexity"] == pytest.approx(found("llama")["perplexity"], rel=1e-6)
    assert document["perplexity"] == pytest.approx(found(tmp_path / "short")["perplexity"], rel=1e-6)
    assert document["kl"] > 0


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_memory_does_not_show(name: str) -> None:
    roomy = found(f"{name}-half", "--against", name)
    tight = found(f"{name}-half", "--against", name, "--memory", "1B")
    for mean in ("perplexity", "kl", "top1"):
        assert tight[mean] == pytest.approx(roomy[mean], rel=1e-6)


def test_one_block_is_in_memory_at_a_time_and_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    load, loads = Blocks.load, []

    def watched(blocks: Blocks, name: str, read: Any) -> Any:
        parameters = load(blocks, name, read)
        present = [
            one for one in blocks.names if not any(each.is_meta for each in blocks.parameters(one).values())
        ]
        assert present == [name]
        loads.append(name)
        return parameters

    monkeypatch.setattr(Blocks, "load", watched)
    found("llama-half", "--against", "llama", "--memory", "1B")
    assert loads == [f"model.layers.{number}" for number in range(LAYERS)] * 2


def test_a_condition_that_fails_ends_in_1_and_one_line() -> None:
    said = evaluate("llama-half", "--against", "llama", "-q", "--require", "kl<=0.01", "--require", "top1>=0")
    assert said.code == 1
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert re.fullmatch(r"sparseprune: llama-half: wanted kl<=0\.01, found [\d.]+ \+- [\d.]+", line)
    said = evaluate("llama-half", "--against", "llama", "-q", "--json", "--require", "top1>=99%")
    assert said.code == 1
    assert valid(said.out, "eval")["top1"] < 0.99
    assert re.search(r"wanted top1>=99%, found [\d.]+% ", said.err)


def test_a_condition_that_holds_ends_in_0_in_silence() -> None:
    said = evaluate("llama", "--against", "llama", "-q", "--require", "kl<=0.05", "--require", "top1==100%")
    assert (said.code, said.err) == (0, "")


def test_python_gets_the_result_with_the_failure() -> None:
    how: Any = {"text": ["words.txt"], "length": 16, "sequences": 6}
    result = sparseprune.evaluate("llama", **how)
    assert result.perplexity == found("llama")["perplexity"]
    with pytest.raises(sparseprune.CheckFailedError, match="wanted perplexity<=1") as failed:
        sparseprune.evaluate("llama", **how, require=["perplexity<=1"])
    assert isinstance(failed.value.result, sparseprune.results.Evaluation)


# What was typed -> the line.
REFUSED: dict[tuple[str, ...], str] = {
    ("bert_for_masked_lm",): "bert_for_masked_lm: this model predicts no next tokens; give --against ",
    ("llama", "--against", "bert_for_masked_lm"): "one is a decoder, the other an encoder",
    ("llama", "--require", "kl<=0.05"): "kl is not known without --against DENSE",
    ("llama", "--require", "2:4"): '--require "2:4": asks for tensors, wanted a mean such as kl<=0.05',
    ("llama", "--require", "kl<=1 in **.mlp.**"): "asks for tensors, wanted a mean such as kl<=0.05",
    ("llama", "--require", "loss<=1"): 'there is no field "loss"',
    ("llama", "--against", "gpt2", "--require", "cosine>=0.9"): "llama is of the kind decoder, which has",
    ("llama", "--length", "1000"): "--length 1000: the model takes 64 tokens at most",
    ("llama", "--memory", "much"): "--memory much: wanted a size such as 8GiB or 500MB",
    ("absent",): "absent: no such file",
    ("llama", "--against", "absent"): "absent: no such file",
    ("llama", "--text", "absent.txt"): "absent.txt: no such file",
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_bad_input_gets_one_line(words: tuple[str, ...]) -> None:
    said = refused("eval", *words, "--text", "words.txt", "-q", *(() if "--length" in words else SIZES))
    (line,) = said.err.splitlines()
    assert REFUSED[words] in line


def test_models_of_other_words_are_told(tmp_path: Path) -> None:
    shutil.copytree("llama", tmp_path / "other")
    for file in (tmp_path / "other").glob("tokenizer.json"):
        file.write_text(file.read_text().replace('"w49"', '"unheard"'))
    said = refused("eval", "llama", "--against", tmp_path / "other", "--text", "words.txt", *SIZES, "-q")
    assert said.err.endswith("cannot be compared, their tokenizers know different words\n")


def test_weights_that_a_checkpoint_lacks_are_told(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree("llama", tmp_path / "headless")
    file = tmp_path / "headless" / "model.safetensors"
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file, {"format": "pt"})
    said = evaluate(tmp_path / "headless", "--json")
    assert f"{tmp_path / 'headless'}: lacks 1 weights of the model, such as lm_head.weight" in said.err
    assert json.loads(said.out)["missing"] == ["lm_head.weight"]


@pytest.mark.parametrize("halts", [1, 3, LAYERS * 2])
def test_an_interrupt_ends_it_and_leaves_nothing(
    halts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    real, calls = outputs_of, []

    def interrupted(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == halts:
            assert [*tmp_path.iterdir()]
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr("sparseprune.calibration.evaluating.outputs_of", interrupted)
    said = evaluate("llama-half", "--against", "llama", "-q", "--memory", "1B")
    assert (said.code, said.out) == (130, "")
    assert said.err.startswith("sparseprune: interrupted")
    assert not [*tmp_path.iterdir()]
