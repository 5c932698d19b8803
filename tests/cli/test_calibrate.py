"""`sparseprune calibrate`: what it writes and says, that passes show in neither, what it refuses."""

import json
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseprune.checkpoint import open_statistics, statistics
from sparseprune.cli import signals
from sparseprune.errors import SparsepruneError
from tests.calibration.models import albert, made, save, save_family, t5
from tests.commands import Said, ok, refused, run, valid
from tests.families.models import HIDDEN
from tests.faults import failing

pytestmark = pytest.mark.usefixtures("quiet_transformers")

SIZES = ("--length", 16, "--sequences", 5)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a llama and a mixtral; nothing in it is changed by tests."""
    return made(tmp_path_factory.mktemp("calibrate"), "llama", "mixtral")


def calibrate(home: Path, model: str | Path, out: Path, *words: object) -> Said:
    return run("calibrate", home / model, "--text", home / "words.txt", *SIZES, "-o", out, *words)


def told(said: Said) -> list[str]:
    """The lines on stderr, without those that tell how far a run is."""
    stages = ("loading the model of ", "cutting the text into ", "finding out which matrices ")
    lines = [line.removeprefix("sparseprune: ") for line in said.err.splitlines()]
    return [line for line in lines if not line.startswith(stages)]


def written(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: one for file in sorted(folder.glob("*.safetensors")) for name, one in load_file(file).items()
    }


def test_stdout_has_the_path_and_stderr_the_facts(home: Path, tmp_path: Path) -> None:
    said = calibrate(home, "llama", tmp_path / "stats")
    assert (said.code, said.out) == (0, f"{tmp_path / 'stats'}\n")
    lines = told(said)
    assert said.err.startswith(f"sparseprune: loading the model of {home / 'llama'}\n")
    assert lines[0] == ("hessian statistics of 15 matrices in 9 tensors, over 80 tokens in 5 sequences of 16")
    assert "no statistics of 1 matrix" in lines
    assert "  model.embed_tokens.weight: an embedding, which is looked up and not multiplied with" in lines
    assert " tokens/s, on cpu" in lines[-1]
    assert sorted(path.name for path in (tmp_path / "stats").iterdir()) == [
        "sparseprune",
        "statistics.safetensors",
    ]
    assert calibrate(home, "llama", tmp_path / "quiet", "-q").err == ""


def test_something_is_told_before_libraries_are_loaded(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(
        "sparseprune.execution.schedule.resolve_device", failing(SparsepruneError, "here torch is loaded")
    )
    said = calibrate(home, "llama", tmp_path / "stats")
    assert said.err.splitlines() == [
        f"sparseprune: loading the model of {home / 'llama'}",
        "sparseprune: here torch is loaded",
    ]


def test_the_report_has_its_schema_and_is_what_json_prints(home: Path, tmp_path: Path) -> None:
    said = calibrate(home, "mixtral", tmp_path / "stats", "--json", "-q")
    report = valid(said.out, "statistics")
    assert json.loads((tmp_path / "stats/sparseprune/report.json").read_text()) == report
    (shared,) = (one for one in report["matrices"] if one["name"].endswith("0.self_attn.q_proj.weight"))
    assert shared["weights"] == {f"model.layers.0.self_attn.{name}_proj.weight": 1 for name in "qkv"}
    experts = [one for one in report["matrices"] if ".experts." in one["name"] and "layers.0" in one["name"]]
    assert next(list(one["weights"]) for one in experts if one["features"] == HIDDEN) == [
        f"model.layers.0.block_sparse_moe.experts.0.{name}.weight" for name in ("w1", "w3")
    ]
    assert sum(one["tokens"] for one in experts if one["features"] == HIDDEN) == 2 * report["tokens"]
    assert {one["divided_by"] for one in report["matrices"]} == {
        report["tokens"]
    }  # experts keep their shares


@pytest.mark.parametrize("model", ["llama", "mixtral"])
def test_passes_memory_and_shards_do_not_show_in_what_is_written(
    model: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert calibrate(home, model, tmp_path / "one", "-q").code == 0
    largest = max(one.numel() * 4 for one in written(tmp_path / "one").values())
    monkeypatch.setattr(statistics.lay_out_statistics, "__defaults__", (2 * largest,))
    said = calibrate(home, model, tmp_path / "many", "--memory", str(largest), "--json", "-q")
    assert json.loads(said.out)["passes"] > 3
    assert len(list((tmp_path / "many").glob("*-of-*.safetensors"))) >= 3
    one, many = written(tmp_path / "one"), written(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    for out in ("one", "many"):
        found = open_statistics(tmp_path / out)
        assert found.of["model.layers.0.self_attn.k_proj.weight"].stored.name.endswith("q_proj.weight")


def test_a_stack_is_cut_between_its_experts(home: Path, tmp_path: Path) -> None:
    save_family("gpt_oss", tmp_path / "model")
    arguments = (tmp_path / "model", "--text", home / "words.txt", *SIZES)
    ok("calibrate", *arguments, "-o", tmp_path / "one", "-q")
    one = written(tmp_path / "one")
    (stack,) = (name for name in one if name.endswith("layers.0.mlp.experts.down_proj"))
    assert one[stack].ndim == 3
    each = max(moment.shape[-1] ** 2 * 4 for name, moment in one.items() if not name.endswith(".routing"))
    assert each < one[stack].numel() * 4 // 2
    said = run("calibrate", *arguments, "-o", tmp_path / "many", "--memory", str(each), "--json", "-q")
    assert json.loads(said.out)["passes"] > 4
    assert all(torch.equal(one[name], many) for name, many in written(tmp_path / "many").items())


def test_norms_are_the_roots_of_the_diagonal(home: Path, tmp_path: Path) -> None:
    calibrate(home, "mixtral", tmp_path / "hessian", "-q")
    calibrate(home, "mixtral", tmp_path / "norm", "-q", "--kind", "norm")
    hessian, norm = written(tmp_path / "hessian"), written(tmp_path / "norm")
    assert hessian.keys() == norm.keys()
    for name, moment in hessian.items():
        if name.endswith(".routing"):
            assert torch.equal(norm[name], moment)
            continue
        torch.testing.assert_close(norm[name], moment.diagonal(dim1=-2, dim2=-1).sqrt(), rtol=1e-4, atol=1e-6)


def test_a_seed_gives_the_same_bytes_and_another_one_other_sequences(home: Path, tmp_path: Path) -> None:
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        calibrate(home, "llama", tmp_path / out, "-q", "--seed", seed)
    bytes_of = {out: (tmp_path / out / "statistics.safetensors").read_bytes() for out in "abc"}
    assert bytes_of["a"] == bytes_of["b"] != bytes_of["c"]


def test_special_tokens_count_unless_they_shall_not_and_padding_never(home: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text((home / "words.txt").read_text().replace("w7 ", "[PAD] w7 "))
    counts = []
    for words in ((), ("--special",), ("--no-special",)):
        arguments = (home / "llama", "--text", tmp_path / "words.txt", *SIZES, "-o", tmp_path / "stats")
        said = run("calibrate", *arguments, "--force", "--json", "-q", *words)
        report = json.loads(said.out)
        assert {one["tokens"] for one in report["matrices"]} == {report["tokens"]}
        counts.append(report["tokens"])
    assert 70 < counts[0] < 80  # 5 sequences of 16, less some padding
    assert counts == [counts[0], counts[0], counts[0] - 2 * 5]


def test_lines_of_json_are_documents(home: Path, tmp_path: Path) -> None:
    words = (home / "words.txt").read_text().split()
    lines = [json.dumps({"body": " ".join(words[begin : begin + 50])}) for begin in range(0, len(words), 50)]
    (tmp_path / "words.jsonl").write_text("\n\n".join(lines) + "\n")
    calibrate(home, "llama", tmp_path / "plain", "-q")
    arguments = (home / "llama", "--text", tmp_path / "words.jsonl", "--field", "body", *SIZES)
    ok("calibrate", *arguments, "-o", tmp_path / "lines", "-q")
    plain, lined = written(tmp_path / "plain"), written(tmp_path / "lines")
    assert all(torch.equal(plain[name], lined[name]) for name in plain)


def test_weights_in_bf16_are_run_as_they_are(home: Path, tmp_path: Path) -> None:
    save_family("llama", tmp_path / "model", torch.bfloat16)
    said = calibrate(home, tmp_path / "model", tmp_path / "stats")
    assert said.code == 0, said.err
    assert {one.dtype for one in written(tmp_path / "stats").values()} == {torch.float32}


def other_models() -> dict[str, Any]:
    import transformers

    small: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    layers: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"hidden_size": 32, "intermediate_size": 48, **layers, "image_size": 32, "patch_size": 16}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    return {
        "clip": lambda: transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config={**small, **layers, "max_position_embeddings": 32, **ends}, vision_config=vision
            )
        ),
        "t5": t5,
        "albert": albert,
    }


@pytest.mark.parametrize(
    ("name", "with_statistics", "without"),
    [
        ("clip", "text_model.encoder.layers.1.mlp.fc2.weight",
         "vision_model.encoder.layers.1.mlp.fc2.weight"),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.k.weight",
         "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        ("albert", "encoder.albert_layer_groups.0.albert_layers.0.ffn.weight",
         "embeddings.word_embeddings.weight"),
    ],
)  # fmt: skip
def test_text_reaches_encoders_decoders_and_the_text_side_of_models_with_pictures(
    name: str, with_statistics: str, without: str, home: Path, tmp_path: Path
) -> None:
    save(other_models()[name](), tmp_path / "model")
    arguments = (tmp_path / "model", "--text", home / "words.txt", *SIZES, "-o", tmp_path / "stats")
    said = ok("calibrate", *arguments, "--json")
    found = open_statistics(tmp_path / "stats").of
    assert with_statistics in found
    assert without in [one["name"] for one in json.loads(said.out)["without"]]


def test_a_matrix_that_is_used_again_and_again_counts_every_time(home: Path, tmp_path: Path) -> None:
    save(albert(), tmp_path / "model")
    arguments = (tmp_path / "model", "--text", home / "words.txt", *SIZES, "-o", tmp_path / "stats", "--json")
    report = json.loads(run("calibrate", *arguments, "--memory", str(4 * 48 * 48)).out)
    (ffn,) = (one for one in report["matrices"] if one["name"].endswith("ffn_output.weight"))
    assert ffn["tokens"] == ffn["divided_by"] == 3 * report["tokens"]
    assert report["passes"] > 1


def test_a_signal_while_the_model_runs_leaves_no_output_and_no_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparseprune.calibration import collecting

    usual, seen = collecting._Collector.product, []

    def heard(collector: Any, product: Any) -> None:
        seen.append(product.parameter)
        if len(seen) == 9:  # inside of the model, which torch called
            os.kill(os.getpid(), signal.SIGTERM)
        usual(collector, product)

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(signals, "_GRACE", 60.0)
    with monkeypatch.context() as patch:
        patch.setattr(collecting._Collector, "product", heard)
        said = calibrate(home, "llama", tmp_path / "stats", "-q")
    assert (said.code, said.out) == (143, "")
    assert said.err.startswith("sparseprune: terminated: there is no output")
    assert not (tmp_path / "stats").exists()
    assert [*(tmp_path / "temporary").iterdir()] == []
    assert calibrate(home, "llama", tmp_path / "stats", "-q").code == 0


def test_a_model_that_takes_more_than_text_is_told(home: Path, tmp_path: Path) -> None:
    import transformers

    config: Any = transformers.BrosConfig  # takes boxes around words
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    kind: Any = transformers.BrosModel
    save(kind(config(**small, vocab_size=64)), tmp_path / "model")
    said = calibrate(home, tmp_path / "model", tmp_path / "stats")
    assert (said.code, said.out) == (2, "")
    assert "the model cannot be run over 16 tokens of text alone: " in said.err
    assert len(told(said)) == 1


def test_an_output_that_exists_is_refused_before_the_model_is_loaded(home: Path, tmp_path: Path) -> None:
    (tmp_path / "stats").mkdir()
    (tmp_path / "stats/mine.txt").write_text("mine")
    said = calibrate(home, "llama", tmp_path / "stats", "--device", "cpu")
    assert said.code == 2
    assert f"{tmp_path / 'stats'}: already exists" in said.err
    assert "holds" not in calibrate(home, "llama", tmp_path / "stats", "--force").out
    assert (tmp_path / "stats/mine.txt").read_text() == "mine"
    calibrate(home, "llama", tmp_path / "again", "-q")
    assert calibrate(home, "llama", tmp_path / "again", "-q").code == 2
    assert calibrate(home, "llama", tmp_path / "again", "-q", "--force").code == 0


def test_what_is_not_finite_leaves_nothing(home: Path, tmp_path: Path) -> None:
    save_family("llama", tmp_path / "model", torch.float32)
    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = float("inf")
    save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    said = calibrate(home, tmp_path / "model", tmp_path / "stats")
    assert (said.code, said.out) == (2, "")
    assert "model.layers.0.mlp.down_proj.weight: some of its inputs are not finite" in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


REFUSED: list[tuple[str, tuple[object, ...], str]] = [
    ("short text", (), "the text has 3 tokens, wanted 14 for one sequence of --length 16: give more text"),
    ("empty text", (), "there is no text in it"),
    ("no text", (), "no such file"),
    ("a folder as text", (), "this is a directory, wanted a file of text"),
    ("not UTF-8", (), "not UTF-8 text"),
    ("broken line", (), "line 2 is not JSON"),
    ("no field", (), 'line 1 has no text under "text", but body; name the field with --field'),
    ("no tokenizer", (), "there is no tokenizer that transformers can read"),
    ("no config", (), "there is no config.json, which says what the model is"),
    ("a file", (), "give the directory that has them"),
    ("unknown model", (), "does not know this model"),
    ("long", ("--length", 1000), "--length 1000: the model takes 64 tokens at most"),
    ("no room", ("--length", 2), "--length 2: 2 special tokens around a sequence leave no room"),
    ("a layer is missing", (), "lacks 1 weights of the model that config.json describes, such as model"),
    ("other shapes", (), "tensors have other shapes than config.json says, such as"),
    ("another tokenizer", (), "the model has 50 of them: these two do not belong together"),
    ("little memory", ("--memory", "100"), "--memory 100 B: the second moment of"),
    ("no cuda", ("--device", "cuda"), "there is no CUDA device"),
]


@pytest.mark.parametrize(("case", "words", "line"), REFUSED, ids=[case for case, *_ in REFUSED])
def test_bad_input_gets_one_line(  # noqa: C901, PLR0912  (a table of cases)
    case: str, words: tuple[object, ...], line: str, home: Path, tmp_path: Path
) -> None:
    if case == "no cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    model, words_file = tmp_path / "model", tmp_path / "words.txt"
    shutil.copytree(home / "llama", model)
    shutil.copy(home / "words.txt", words_file)
    checkpoint = model
    match case:
        case "short text":
            words_file.write_text("w1 w2 w3")
        case "empty text":
            words_file.write_text(" \n")
        case "no text":
            words_file.unlink()
        case "a folder as text":
            words_file = tmp_path
        case "not UTF-8":
            words_file.write_bytes(b"w1 \xff\xfe w2")
        case "broken line" | "no field":
            words_file = tmp_path / "words.jsonl"
            first = {"text": "w1"} if case == "broken line" else {"body": "w1"}
            words_file.write_text(json.dumps(first) + "\n{broken\n")
        case "no tokenizer":
            for file in model.glob("token*"):
                file.unlink()
        case "no config":
            (model / "config.json").unlink()
        case "a file":
            checkpoint = model / "model.safetensors"
        case "a layer is missing":
            tensors = load_file(model / "model.safetensors")
            del tensors["model.layers.1.mlp.up_proj.weight"]
            save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        case "other shapes" | "another tokenizer":
            key, value = ("intermediate_size", 40) if case == "other shapes" else ("vocab_size", 50)
            config = json.loads((model / "config.json").read_text())
            (model / "config.json").write_text(json.dumps(config | {key: value}))
            if case == "another tokenizer":
                tensors = load_file(model / "model.safetensors")
                cut = {name: one[:50] if len(one) == 64 else one for name, one in tensors.items()}
                whole = {name: one.contiguous() for name, one in cut.items()}
                save_file(whole, model / "model.safetensors", metadata={"format": "pt"})
        case "unknown model":
            (model / "config.json").write_text('{"model_type": "unheard_of", "architectures": ["None"]}')
    said = refused("calibrate", checkpoint, "--text", words_file, *SIZES, "-o", tmp_path / "stats", *words)
    assert said.out == ""
    assert line in said.err
    assert len(told(said)) == 1
    assert not (tmp_path / "stats").exists()


def test_without_transformers_it_says_what_to_install(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    said = calibrate(home, "llama", tmp_path / "stats")
    assert said.code == 2
    assert said.err.splitlines()[-1] == (
        "sparseprune: running a model needs transformers, which is not installed: "
        "pip install 'sparseprune[calibrate]' (in a clone: '.[calibrate]')"
    )
