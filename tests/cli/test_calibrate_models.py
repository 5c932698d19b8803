"""`calibrate` of configs, tokenizers and texts as they come: one line each, none of their code is run."""

import json
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.calibration.models import WORDS, made, save, text, tokenizer, whisper
from tests.commands import Said, ok, run
from tests.families.models import build

TEMPLATE = "{% for one in messages %}{{ one.role }} {{ one.content }} w9 {% endfor %}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a llama and a bert; nothing in it is changed by tests."""
    return made(tmp_path_factory.mktemp("models"), "llama", "bert")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> NoReturn:
        raise AssertionError("something wants to be fetched")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)


def copied(home: Path, model: str, to: Path, **changes: Any) -> Path:
    """A model with other statements in its config, and a text beside it; its weights are links."""
    to.mkdir()
    (to.parent / "words.txt").write_text(text())
    for file in (home / model).iterdir():
        (to / file.name).symlink_to(file)
    config = json.loads((home / model / "config.json").read_text())
    (to / "config.json").unlink()
    (to / "config.json").write_text(json.dumps(config | changes))
    return to


def calibrate(model: Path, *words: object) -> Said:
    out = model.with_name(f"{model.name}-out")
    if "--text" not in words:
        words = ("--text", model.parent / "words.txt", *words)
    if "--length" not in words:
        words = ("--length", 16, *words)
    return run("calibrate", model, "-o", out, "-q", "--sequences", 5, *words)


def statistics(model: Path) -> bytes:
    return (model.with_name(f"{model.name}-out") / "statistics.safetensors").read_bytes()


MUTATIONS: list[tuple[str, str, Any]] = [
    ("llama", "hidden_size", 2.5), ("llama", "hidden_size", None), ("llama", "num_attention_heads", 0),
    ("llama", "num_hidden_layers", "two"), ("llama", "num_hidden_layers", 10**9),
    ("llama", "vocab_size", 10**12), ("llama", "num_labels", 10**9), ("llama", "architectures", 5),
    ("llama", "hidden_act", []), ("llama", "rope_parameters", "x"), ("llama", "model_type", [1]),
    ("bert", "max_position_embeddings", 10**12), ("bert", "intermediate_size", -1),
    ("bert", "pad_token_id", "x"), ("bert", "num_hidden_layers", 1e300), ("bert", "layer_norm_eps", None),
]  # fmt: skip


@pytest.mark.parametrize(("model", "key", "value"), MUTATIONS)
def test_a_config_with_something_else_in_place_of_a_number_gets_one_line(
    model: str, key: str, value: Any, home: Path, tmp_path: Path
) -> None:
    said = calibrate(copied(home, model, tmp_path / model, **{key: value}))
    assert (said.code, said.out) in {(2, ""), (0, f"{tmp_path / model}-out\n")}
    assert len(said.err.splitlines()) == (said.code == 2)
    assert said.code == 2 or key == "architectures"


@pytest.mark.parametrize(
    "statement", ["attn_implementation", "_attn_implementation", "experts_implementation"]
)
@pytest.mark.usefixtures("no_network")
def test_kernels_that_a_config_names_are_neither_fetched_nor_used(
    statement: str, home: Path, tmp_path: Path
) -> None:
    plain = copied(home, "llama", tmp_path / "plain")
    named = copied(home, "llama", tmp_path / "named", **{statement: "org/kernel:attention"}, use_kernels=True)
    assert calibrate(plain).code == 0
    said = calibrate(named)
    assert (said.code, said.err) == (0, "")
    assert statistics(named) == statistics(plain)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.usefixtures("no_network")
def test_code_beside_a_checkpoint_is_not_run(known: bool, home: Path, tmp_path: Path) -> None:
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel", "AutoTokenizer": "own.Own"}
    kind = {} if known else {"model_type": "own"}
    model = copied(home, "llama", tmp_path / "model", auto_map=code, **kind)
    (model / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nOwnConfig = OwnModel = Own = None\n"
    )
    said = calibrate(model)
    assert said.code == (0 if known else 2)
    assert len(said.err.splitlines()) == (not known)
    stated = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").unlink()
    (model / "tokenizer_config.json").write_text(
        json.dumps(stated | {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}})
    )
    assert len(calibrate(model, "--force").err.splitlines()) <= 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq, says quantization_config of"),
        (
            {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
            "fp8, says text_config.quantization",
        ),
        ({"quantization_config": {"quant_algo": "NVFP4"}}, "NVFP4, says quantization_config of config.json"),
        ("hf_quant_config.json", "hf_quant_config.json lies beside it"),
        ("model.layers.0.mlp.up_proj.weight", "it has model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_of_a_quantized_checkpoint_quantization_is_told(
    stated: Any, said: str, home: Path, tmp_path: Path
) -> None:
    model = copied(home, "llama", tmp_path / "model", **(stated if isinstance(stated, dict) else {}))
    if isinstance(stated, str) and stated.endswith(".json"):
        (model / stated).write_text("{}")
    elif isinstance(stated, str):
        tensors = load_file(model / "model.safetensors") | {f"{stated}_scale": torch.ones(48, 1)}
        tensors[stated] = tensors[stated].to(torch.float8_e4m3fn)
        (model / "model.safetensors").unlink()
        save_file(tensors, model / "model.safetensors")
    refused = calibrate(model)
    assert refused.code == 2
    assert refused.err.startswith(f"sparseprune: {model}: the checkpoint is quantized ({said}")
    assert refused.err.endswith("; give the unquantized one that it was made from\n")


def test_zeros_that_a_config_describes_are_no_quantization(home: Path, tmp_path: Path) -> None:
    zeros = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}}
    said = calibrate(copied(home, "llama", tmp_path / "model", quantization_config=zeros))
    assert (said.code, said.err) == (0, "")


def test_classifiers_without_a_token_for_padding_are_run_as_others_are(tmp_path: Path) -> None:
    import transformers

    config: Any = transformers.LlamaConfig
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_labels": 3}
    kind: Any = transformers.LlamaForSequenceClassification
    (tmp_path / "words.txt").write_text(text())
    said = calibrate(save(kind(config(**sizes, **heads)), tmp_path / "model"), "--json")
    assert said.code == 0, said.err
    counted = {one["name"]: one["tokens"] for one in json.loads(said.out)["matrices"]}
    assert counted["score.weight"] == 5 * 16


@pytest.mark.parametrize(
    ("made_by", "kind", "takes"),
    [
        (lambda: build("vit_for_classification"), "ViTForImageClassification", "images (pixel_values)"),
        (lambda: build("resnet"), "ResNetModel", "images (pixel_values)"),
        (whisper, "WhisperForConditionalGeneration", "sound (input_features)"),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_a_model_of_images_or_sound_is_refused_before_it_is_loaded(
    made_by: Any, kind: str, takes: str, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save(made_by(), tmp_path / "model")
    (tmp_path / "words.txt").write_text(text())
    for file in model.glob("*token*"):
        file.unlink()  # there is no tokenizer in most of them
    config = json.loads((model / "config.json").read_text())
    if not named:
        del config["architectures"]
        kind = kind.replace("ForImageClassification", "Model").replace("ForConditionalGeneration", "Model")
    (model / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    said = calibrate(model)
    wanted = (
        f"sparseprune: {model}: {kind} takes {takes}, and is fed text alone; to prune it use a spec that "
        "reads no statistics, or one that reads yours\n"
    )
    assert (said.code, said.out, said.err) == (2, "", wanted)


def test_of_a_model_of_text_and_images_it_is_told_that_text_alone_is_fed(tmp_path: Path) -> None:
    made(tmp_path, "gemma3_with_pictures", "llama")
    words = ("--text", tmp_path / "words.txt", "--length", 16, "--sequences", 5)
    for family, told in (("gemma3_with_pictures", True), ("llama", False)):
        said = ok("calibrate", tmp_path / family, *words, "-o", tmp_path / f"{family}-out")
        line = "sparseprune: text alone is fed: what takes images gets no statistics, such as "
        assert any(one.startswith(line) and "vision_tower" in one for one in said.err.splitlines()) == told


def models_with_positions() -> dict[str, Any]:
    import transformers

    names: Any = transformers
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    ends = {"vocab_size": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    bart = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    opt = {"ffn_dim": 48, "word_embed_proj_dim": 32}
    most = {"max_position_embeddings": 34}
    return {
        "roberta": lambda: names.RobertaModel(names.RobertaConfig(**sizes, **ends, **most)),
        "mpnet": lambda: names.MPNetModel(names.MPNetConfig(**sizes, **ends, **most)),
        "bart": lambda: names.BartModel(
            names.BartConfig(d_model=32, **bart, **heads, **ends, max_position_embeddings=32)
        ),
        "opt": lambda: names.OPTModel(names.OPTConfig(**sizes, **opt, **ends, max_position_embeddings=32)),
    }


@pytest.mark.parametrize("name", ["roberta", "mpnet", "bart", "opt"])
def test_the_default_length_is_one_that_positions_suffice_for(name: str, tmp_path: Path) -> None:
    """Also where the tokenizer does not say it."""
    model = save(models_with_positions()[name](), tmp_path / "model")
    unlimited = tokenizer()
    unlimited.model_max_length = int(1e30)
    unlimited.save_pretrained(model)
    (tmp_path / "words.txt").write_text(text())
    said = ok("calibrate", model, "--text", tmp_path / "words.txt", "-o", tmp_path / "out", "-q", "--json")
    assert json.loads(said.out)["length"] == 32
    said = calibrate(model, "--length", 33)
    assert (said.code, said.err) == (2, "sparseprune: --length 33: the model takes 32 tokens at most\n")


@pytest.fixture(scope="module")
def plain(home: Path) -> bytes:
    """What comes out for words that follow each other in a text file."""
    assert calibrate(home / "llama").code == 0
    return statistics(home / "llama")


def records() -> list[list[str]]:
    words = text().split()
    return [words[begin : begin + 20] for begin in range(0, len(words), 20)]


def as_chats(first: str, second: str, roles: tuple[str, str]) -> list[list[dict[str, str]]]:
    """Every record as two messages, whose roles are its first word and its eleventh."""
    return [
        [{first: roles[0], second: " ".join(one[:10])}, {first: roles[1], second: " ".join(one[10:])}]
        for one in records()
    ]


TEXTS: dict[str, tuple[str, tuple[object, ...]]] = {
    "lists.json": (json.dumps([" ".join(one) for one in records()], indent=1), ()),
    "objects.json": (json.dumps([{"text": " ".join(one)} for one in records()]), ()),
    "lines.json": ("\n".join(json.dumps({"text": " ".join(one)}) for one in records()), ()),
    "spread.json": (
        "\n".join(json.dumps({"b": " ".join(one)}, indent=2) for one in records()),
        ("--field", "b"),
    ),
    "strings.jsonl": ("\n".join(json.dumps(" ".join(one)) for one in records()), ()),
}


@pytest.mark.parametrize("name", TEXTS)
def test_records_are_documents_however_they_are_written(
    name: str, home: Path, plain: bytes, tmp_path: Path
) -> None:
    content, words = TEXTS[name]
    (tmp_path / name).write_text(content)
    model = copied(home, "llama", tmp_path / "model")
    said = calibrate(model, "--text", tmp_path / name, *words)
    assert (said.code, said.err) == (0, "")
    assert statistics(model) == plain


@pytest.mark.parametrize(
    ("field", "chats"),
    [
        ("messages", as_chats("role", "content", ("user", "assistant"))),
        ("conversations", as_chats("from", "value", ("human", "gpt"))),
    ],
)
def test_messages_are_text_as_the_chat_template_writes_it(
    field: str, chats: list[Any], home: Path, tmp_path: Path
) -> None:
    """Without one, as lines of role and content, which is told."""
    (tmp_path / "chats.json").write_text(json.dumps([{"id": 3, field: chat} for chat in chats]))
    model = copied(home, "llama", tmp_path / "model")
    joined = [
        (f"{role} {' '.join(part)} w9 ", f"{role}: {' '.join(part)}\n")
        for one in records()
        for role, part in (("user", one[:10]), ("assistant", one[10:]))
    ]
    for place, template in enumerate((TEMPLATE, None)):
        spoken = tokenizer()
        spoken.chat_template = template
        for file in model.glob("*token*"):
            file.unlink()
        (model / "chat_template.jinja").unlink(missing_ok=True)
        spoken.save_pretrained(model)
        (tmp_path / "words.txt").write_text("".join(one[place] for one in joined))
        assert calibrate(model, "--force").code == 0
        expected = statistics(model)
        arguments = ("--text", tmp_path / "chats.json", "--length", 16, "--sequences", 5, "--force")
        said = ok("calibrate", model, *arguments, "-o", tmp_path / "model-out")
        assert statistics(model) == expected
        assert ('no chat template: messages are read as "role: content" lines' in said.err) == (not template)


STRANGE: list[tuple[str, str, tuple[object, ...], str]] = [
    ("a.jsonl", '{"text": "w1"}\n{"text": "\\ud83d"}', (),
     "line 2 has a lone surrogate, half of a character"),
    ("a.json", '[{"text": "w1"},\n\n {"text": 3}]', (),
     'line 3 has a number under "text", wanted text or a list'),
    ("a.json", '[{"text": "w1"},\n', (), "line 2 is not JSON: the list has no end"),
    ("a.json", "w1 w2 w3", (), "line 1 is not JSON: Expecting value"),
    ("a.jsonl", '{"messages": []}', (), 'line 1 has an empty list under "messages", wanted text or a list'),
    ("a.jsonl", '{"messages": [{"content": "w1"}]}', (),
     '"messages": the role of a message is nothing, wanted'),
    ("a.jsonl", '{"id": 3, "q": "w1"}', (), 'no text under "text", but id, q; name the field with --field'),
    ("a.jsonl", '{"q": {"w": 1}}', ("--field", "q"),
     'has an object under "q", wanted text or a list of messages'),
    ("a.jsonl", "[[1]]", (), 'line 1 has no text under "text", but a list'),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "words", "line"), STRANGE)
def test_a_record_that_is_no_text_gets_one_line_with_its_place(
    name: str, content: str, words: tuple[object, ...], line: str, tmp_path: Path
) -> None:
    from sparseprune.calibration import read_documents
    from sparseprune.errors import SparsepruneError

    (tmp_path / name).write_text(content)
    with pytest.raises(SparsepruneError) as caught:
        read_documents([tmp_path / name], str(words[1]) if words else None, 1000)
    assert str(caught.value).startswith(f"{tmp_path / name}: line ")
    assert line in str(caught.value)


@pytest.mark.parametrize("piece", [1, 7])
def test_a_list_is_read_in_pieces_and_no_further_than_asked(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparseprune.calibration import read_documents
    from sparseprune.calibration import text as texts

    monkeypatch.setattr(texts, "_PIECE", piece)
    (tmp_path / "a.json").write_text('[ "ab", {"text":"c\\nd"} ,\n"ef", ' + '"gh", broken')
    assert read_documents([tmp_path / "a.json"], None, 7) == ["ab", "c\nd", "ef"]


def test_a_template_that_refuses_messages_is_told_with_their_place(home: Path, tmp_path: Path) -> None:
    model = copied(home, "llama", tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    (tmp_path / "a.jsonl").write_text('"w1"\n{"messages": [{"role": "user", "content": "w2"}]}')
    said = calibrate(model, "--text", tmp_path / "a.jsonl")
    refused = "the tokenizer's chat template refuses these messages: roles must alternate"
    assert (said.code, said.err) == (2, f"sparseprune: {tmp_path}/a.jsonl: line 2: {refused}\n")


def test_a_huge_number_of_sequences_is_as_many_as_the_text_has(home: Path, tmp_path: Path) -> None:
    model = copied(home, "llama", tmp_path / "model")
    (tmp_path / "words.txt").write_text(" ".join(WORDS))
    arguments = ("--length", 16, "--sequences", 10**18, "--text", tmp_path / "words.txt")
    said = ok("calibrate", model, *arguments, "-o", tmp_path / "out")
    assert f"the text has 3 sequences, fewer than the {10**18} asked for" in said.err
