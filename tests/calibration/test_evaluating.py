"""What an evaluation finds, against plain forward passes of transformers and plain loops over tokens."""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseprune.calibration import (
    LoadedModel,
    NextTokens,
    Room,
    Sequences,
    Sides,
    bytes_of,
    evaluate,
    kind_of,
    load_model,
    ratio,
    refuse_unlike,
)
from sparseprune.calibration.predictions import Embeddings
from sparseprune.checkpoint import TensorReader, open_checkpoint
from sparseprune.errors import SparsepruneError
from tests.calibration.models import save_family, tokenizer
from tests.families import zoo
from tests.families.models import HIDDEN

pytestmark = pytest.mark.usefixtures("quiet_transformers")

DECODERS = (
    "llama qwen3_next gemma3n_text gemma4_shared gpt2 opt bloom falcon mpt dbrx zamba2 mamba2 "
    "recurrent_gemma lfm2_moe minimax deepseek_v3 gpt_oss longcat_flash openai-gpt qwen2_vl"
).split()
ENCODER_DECODERS = "t5 bart t5gemma".split()
ENCODERS = "bert deberta_v2 modernbert esm xlnet clip".split()
ROOMY = 1 << 30
ZOO = {species.name: species for species in zoo.ZOO}


def drawn(windows: int = 5, length: int = 12) -> Sequences:
    """Random tokens, of which a few do not count."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(4, 50, (windows, length), generator=generator)
    counted = torch.rand(ids.shape, generator=generator) > 0.2
    return Sequences(ids, counted, windows)


def made(name: str, folder: Path) -> tuple[Path, Path]:
    """A model of the zoo, and the same with half of the elements of each matrix zero."""
    dense = zoo.save(ZOO[name], folder)
    return dense, halved(dense)


def halved(dense: Path) -> Path:
    pruned = dense.with_name(f"{dense.name}-half")
    pruned.mkdir()
    for folder in (dense, pruned):
        tokenizer().save_pretrained(folder)
    (pruned / "config.json").write_bytes((dense / "config.json").read_bytes())
    tensors = load_file(dense / "model.safetensors")
    for tensor in tensors.values():
        if tensor.ndim > 1 and tensor.is_floating_point():
            tensor[tensor.abs() < tensor.abs().median()] = 0
    save_file(tensors, pruned / "model.safetensors", {"format": "pt"})
    return pruned


@contextmanager
def opened(*folders: Path) -> Iterator[tuple[list[LoadedModel], TensorReader]]:
    with TensorReader() as reader:
        yield [load_model(open_checkpoint(one), "cpu", reader) for one in folders], reader


def evaluated(own: Path, dense: Path | None, sequences: Sequences, room: Room) -> Any:
    with opened(own, *([dense] if dense else [])) as (models, reader):
        sides = Sides(*models)
        refuse_unlike(sides)
        return evaluate(sides, sequences, reader, room, lambda tokens, unit: None)


def plain(folder: Path, ids: torch.Tensor, *, headless: bool = False) -> torch.Tensor:
    """Logits, or last hidden states, of the whole model in memory."""
    with opened(folder) as ((loaded,), _):
        kind, config = type(loaded.model), loaded.model.config
        model = kind.from_pretrained(folder, config=config, dtype="auto", use_safetensors=True).eval()
        one = dataclasses.replace(loaded, model=model.base_model if headless else model)
        with torch.no_grad():
            given = one.forward(ids)
    found: torch.Tensor = given.last_hidden_state if headless else given.logits
    return found.double()


def by_loops(own: torch.Tensor, dense: torch.Tensor, sequences: Sequences) -> dict[str, float]:
    """The means over all tokens that count and have one before them."""
    sums = dict.fromkeys(("loss", "dense_loss", "kl", "same"), 0.0)
    tokens, worst = 0, (-1.0, 0, 0)
    for window, (ids, counted) in enumerate(zip(sequences.ids, sequences.counted, strict=True)):
        for place in range(1, len(ids)):
            if not counted[place]:
                continue
            p, q = (one[window, place - 1].softmax(-1) for one in (dense, own))
            kl = float((p * (p.log() - q.log())).sum())
            tokens += 1
            sums["loss"] -= float(q[ids[place]].log())
            sums["dense_loss"] -= float(p[ids[place]].log())
            sums["kl"] += kl
            sums["same"] += float(p.argmax() == q.argmax())
            worst = max(worst, (kl, window, place))
    return {name: one / tokens for name, one in sums.items()} | {"window": worst[1], "place": worst[2]}


@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_next_tokens_are_those_of_the_plain_forward(name: str, tmp_path: Path) -> None:
    dense, pruned = made(name, tmp_path)
    sequences = drawn()
    found = evaluated(pruned, dense, sequences, Room(ROOMY, tmp_path))
    assert isinstance(found, NextTokens)
    wanted = by_loops(plain(pruned, sequences.ids), plain(dense, sequences.ids), sequences)
    for key in ("loss", "dense_loss", "kl", "same"):
        assert ratio(getattr(found, key), found.tokens).mean == pytest.approx(wanted[key], rel=1e-5, abs=1e-6)
    worst = found.worst[0]
    assert (worst.window, worst.place) == (wanted["window"], wanted["place"])
    assert [one.kl for one in found.worst] == sorted([one.kl for one in found.worst], reverse=True)
    assert wanted["kl"] > 1e-4


@pytest.mark.parametrize("name", ENCODERS)
def test_cosines_are_those_of_the_plain_forward(name: str, tmp_path: Path) -> None:
    dense, pruned = made(name, tmp_path)
    sequences = drawn()
    found = evaluated(pruned, dense, sequences, Room(ROOMY, tmp_path))
    assert isinstance(found, Embeddings)
    if name == "clip":
        with opened(pruned, dense) as (models, reader):
            states = []
            for one in models:
                for block in one.blocks.names:
                    one.blocks.load(block, one.read(reader))
                states.append(one.forward(sequences.ids).last_hidden_state.detach().double())
    else:
        states = [plain(one, sequences.ids, headless=True) for one in (pruned, dense)]
    for window, counted in enumerate(sequences.counted):
        means = [one[window][counted].mean(0) for one in states]
        firsts = [one[window, 0] for one in states]
        for (a, b), cosines in ((means, found.mean), (firsts, found.first)):
            wanted = float(a @ b / (a.norm() * b.norm()))
            assert float(cosines[window]) == pytest.approx(wanted, rel=1e-5)
            assert wanted < 0.9999


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5", "gemma3n_text"])
def test_batches_and_room_for_states_do_not_show(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, pruned = made(name, tmp_path)
    sequences = drawn()
    one = evaluated(pruned, dense, sequences, Room(ROOMY, tmp_path))
    written: list[str] = []
    opened_file = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda path, *mode, **how: written.append(path.name) or opened_file(path, *mode, **how),  # type: ignore[func-returns-value]
    )
    many = evaluated(pruned, dense, sequences, Room(1, tmp_path))
    assert len({each for each in written if each.startswith("states")}) == 2 * len(sequences.ids)
    for key in ("tokens", "loss", "dense_loss", "kl", "same"):
        torch.testing.assert_close(getattr(many, key), getattr(one, key), rtol=1e-5, atol=1e-6)
    assert [each.window for each in many.worst] == [each.window for each in one.worst]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_model_is_no_way_from_itself(name: str, tmp_path: Path) -> None:
    dense, _ = made(name, tmp_path)
    found = evaluated(dense, dense, drawn(), Room(ROOMY, tmp_path))
    assert float(found.kl.abs().max()) == 0
    assert torch.equal(found.same, found.tokens)
    assert torch.equal(found.loss, found.dense_loss)
    assert found.worst == []
    alone = evaluated(dense, None, drawn(), Room(ROOMY, tmp_path))
    assert torch.equal(alone.loss, found.loss)
    assert alone.worst == []


def test_progress_ends_with_all_tokens_and_names_layers(tmp_path: Path) -> None:
    dense, pruned = made("llama", tmp_path)
    sequences, steps = drawn(), []
    with opened(pruned, dense) as (models, reader):
        room = Room(ROOMY, tmp_path)
        evaluate(Sides(*models), sequences, reader, room, lambda tokens, unit: steps.append((tokens, unit)))
    assert sum(tokens for tokens, _ in steps) == sequences.ids.numel()
    assert min(tokens for tokens, _ in steps) >= 0
    units = [unit for _, unit in steps if unit]
    assert units[0] == "model.layers 1 of 4, llama-half"
    assert units[-1] == "model.layers 4 of 4, llama"


@pytest.mark.parametrize(
    ("name", "kind"), [("bert", "encoder"), ("gpt2", "decoder"), ("bart", "encoder-decoder")]
)
def test_kinds_of_models(name: str, kind: str, tmp_path: Path) -> None:
    dense, _ = made(name, tmp_path)
    with opened(dense) as ((loaded,), _):
        assert kind_of(loaded) == kind


def test_models_that_cannot_be_compared_are_told(tmp_path: Path) -> None:
    dense, _ = made("llama", tmp_path)
    encoder, _ = made("bert", tmp_path)
    other = save_family("llama", tmp_path / "other")  # of 64 words
    for own, against, said in (
        (encoder, dense, "cannot be compared, one is an encoder, the other a decoder"),
        (other, dense, "cannot be compared, they have 64 and 99 words"),
        (encoder, None, "this model predicts no next tokens; give --against DENSE"),
    ):
        folders = [own] if against is None else [own, against]
        with opened(*folders) as (models, _), pytest.raises(SparsepruneError, match=said):
            refuse_unlike(Sides(*models))


def test_embeddings_of_two_lengths_are_told(tmp_path: Path) -> None:
    narrow, _ = made("bert", tmp_path)
    wide = save_family("bert", tmp_path / "wide")
    with pytest.raises(SparsepruneError, match=rf"they give {HIDDEN} and {zoo.HIDDEN} numbers a token"):
        evaluated(wide, narrow, drawn(), Room(ROOMY, tmp_path))


def test_bytes_are_those_of_the_text_behind_the_first_token() -> None:
    ids = torch.tensor([[1, 5, 14, 2], [5, 14, 6, 6]])  # [CLS] w1 w10 [SEP], w1 w10 w2 w2
    assert bytes_of(tokenizer(), ids).tolist() == [len("w1 w10"), len(" w10 w2 w2")]


def test_an_error_of_a_ratio_is_that_of_its_windows() -> None:
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(5, 20, (400, 50), generator=generator).double()
    things = torch.rand(400, 50, 20, generator=generator).double()
    sums = (things * (torch.arange(20) < counts[..., None])).sum(-1)
    found = [ratio(*pair) for pair in zip(sums, counts, strict=True)]
    spread = torch.tensor([one.mean for one in found]).std()
    assert sum(one.error or 0 for one in found) / 400 == pytest.approx(float(spread), rel=0.1)
    assert ratio(sums[0, :1], counts[0, :1]).error is None
    assert math.isnan(ratio(torch.zeros(2), torch.zeros(2)).mean)


def test_words_that_a_model_rules_out_spoil_no_divergence() -> None:
    logits = torch.tensor([[[0.0, 1.0, -math.inf], [0.0, 0.0, 0.0]]])
    found = NextTokens(1)
    found.add(0, torch.tensor([[1, -1]]), logits, logits)
    assert (float(found.kl[0]), float(found.tokens[0]), float(found.same[0])) == (0.0, 1.0, 1.0)
