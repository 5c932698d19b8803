"""Scores of experts: rows of routers, and vectors with a number for each expert, for lists and for stacks."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sparseprune
from sparseprune.errors import SparsityError, SpecError
from sparseprune.spec import find_spec
from tests.cli.removal import EXPERTS, HIDDEN, MIXTRAL, WIDTH, Draw, Tensors, attention, mixture, write
from tests.samples import write_spec
from tests.spec.test_reference import EXAMPLES

GPT_OSS = {**MIXTRAL, "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]}
ROUTER = find_spec("experts-by-router").text
(READY,) = (text for text in EXAMPLES if "saliencies.safetensors" in text)
MODULES = {"list": "model.layers.{}.block_sparse_moe", "stack": "model.layers.{}.mlp"}


def stacks() -> Tensors:
    """As gpt-oss stores its experts and routers."""
    draw = Draw()
    tensors = {"model.embed_tokens.weight": draw(12, HIDDEN)}
    for layer in range(2):
        at = f"model.layers.{layer}"
        tensors |= attention(draw, at) | {
            f"{at}.mlp.router.weight": draw(EXPERTS, HIDDEN),
            f"{at}.mlp.router.bias": 100 * draw(EXPERTS),
            f"{at}.mlp.experts.gate_up_proj": draw(EXPERTS, HIDDEN, 2 * WIDTH),
            f"{at}.mlp.experts.gate_up_proj_bias": draw(EXPERTS, 2 * WIDTH),
            f"{at}.mlp.experts.down_proj": draw(EXPERTS, WIDTH, HIDDEN),
            f"{at}.mlp.experts.down_proj_bias": draw(EXPERTS, HIDDEN),
        }
    return tensors


def checkpoint(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Tensors]:
    tensors = mixture(dtype) if kind == "list" else {n: t.to(dtype) for n, t in stacks().items()}
    return write(folder / "in", tensors, MIXTRAL if kind == "list" else GPT_OSS), tensors


def kept(folder: Path, spec: Path, kind: str, **options: object) -> list[set[int]]:
    """The experts of each layer that masks keep, all of each tensor or nothing."""
    sparseprune.mask(folder, spec, folder.with_name("masks"), force=True, set=options)
    found: list[set[int]] = [set(), set()]
    for name, mask in sparseprune.load_masks(folder.with_name("masks")).items():
        place = re.fullmatch(r"model\.layers\.(\d+)\.\w+\.experts\.(?:(\d+)\.)?.*", name)
        assert place is not None
        rows = [mask] if kind == "list" else list(mask)
        for number, row in enumerate(rows):
            assert bool(row.all()) == bool(row.any())
            if row.all():
                found[int(place[1])].add(int(place[2] or number))
    return found


def best(scores: torch.Tensor, keep: int) -> set[int]:
    return set(scores.topk(keep).indices.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("norm", "order"), [("1", 1.0), ("2", 2.0), ('"inf"', float("inf"))])
@pytest.mark.parametrize("kind", MODULES)
def test_experts_with_the_largest_rows_of_the_router_stay(
    kind: str, norm: str, order: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder, tensors = checkpoint(kind, tmp_path, dtype)
    spec = write_spec(tmp_path, ROUTER.replace("norm = 2", f"norm = {norm}"))
    router = f"{MODULES[kind]}.{'gate' if kind == 'list' else 'router'}.weight"
    for sparsity, keep in (("0.25", 3), ("0.5", 2), ("0", EXPERTS), ("1", 0)):
        found = kept(folder, spec, kind, sparsity=sparsity)
        norms = [
            torch.linalg.vector_norm(tensors[router.format(layer)].double(), order, 1) for layer in (0, 1)
        ]
        assert found == [best(each, keep) for each in norms]


def test_a_router_may_have_its_experts_as_columns(tmp_path: Path) -> None:
    tensors = mixture()
    names = [name for name in tensors if name.endswith("gate.weight")]
    turned = tensors | {name: tensors[name].T.contiguous() for name in names}
    folder = write(tmp_path / "in", turned, MIXTRAL)
    norms = [torch.linalg.vector_norm(tensors[name].double(), 2, 1) for name in names]
    assert kept(folder, write_spec(tmp_path, ROUTER), "list") == [best(each, 3) for each in norms]


def test_a_router_without_a_rank_is_refused(tmp_path: Path) -> None:
    tensors = mixture()
    tensors["model.layers.1.block_sparse_moe.gate.weight"][2, 3] = float("nan")
    folder = write(tmp_path / "in", tensors, MIXTRAL)
    with pytest.raises(SparsityError, match=r"1\.block_sparse_moe\.gate\.weight: NaN or .* of expert 2,"):
        kept(folder, write_spec(tmp_path, ROUTER), "list")


def test_experts_without_a_router_are_refused(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in mixture().items() if ".1.block_sparse_moe.gate" not in name}
    folder = write(tmp_path / "in", tensors, MIXTRAL)
    line = "no matrix beside model.layers.1.block_sparse_moe.experts has a row for each expert"
    with pytest.raises(SpecError, match=line):
        kept(folder, write_spec(tmp_path, ROUTER), "list")


CHANNELS = """
version = 1
[scope.rows]
tensors = "model.layers.{layer}.self_attn.q_proj.weight"
block = [1, -1]
shape = []
nnz = 4
score = { kind = "router" }
"""
PARTS = """
version = 1
[scope.rows]
tensors = "**.mlp.experts.down_proj"
block = [-1, 4, -1]    # as many blocks as there are experts, and none of them is one
shape = []
nnz = 2
score = { kind = "router" }
"""


@pytest.mark.parametrize(("text", "label"), [(CHANNELS, "rows[layer=0]"), (PARTS, "rows")])
def test_a_router_ranks_nothing_but_experts(text: str, label: str, tmp_path: Path) -> None:
    folder, _ = checkpoint("stack", tmp_path)
    wanted = 'is no expert, and kind router ranks experts: wanted structure = "experts"'
    with pytest.raises(SpecError, match=re.escape(label) + ".*" + wanted):
        kept(folder, write_spec(tmp_path, text), "stack")


def vectors(kind: str, count: int = EXPERTS) -> Tensors:
    generator = torch.Generator().manual_seed(3)
    names = [f"{MODULES[kind].format(layer)}.experts" for layer in (0, 1)]
    return {name: torch.randn(count, generator=generator) for name in names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", MODULES)
def test_a_vector_for_each_layer_ranks_its_experts(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder, _ = checkpoint(kind, tmp_path)
    scores = {name: each.to(dtype) for name, each in vectors(kind).items()}
    save_file(scores, tmp_path / "saliencies.safetensors")
    assert kept(folder, write_spec(tmp_path, READY), kind) == [best(each, 3) for each in scores.values()]


@pytest.mark.parametrize("kind", MODULES)
def test_labels_of_blocks_name_scores_too_and_come_first(kind: str, tmp_path: Path) -> None:
    folder, _ = checkpoint(kind, tmp_path)
    module = "block_sparse_moe.experts" if kind == "list" else "mlp.experts"
    scores = vectors(kind)
    labelled = {
        f"expert[stack=model.layers,layer={layer},module={module},expert={expert}]": one.reshape(-1, 1, 1)
        for layer, each in enumerate(scores.values())
        for expert, one in (enumerate(each) if kind == "list" else [("*", each)])
    }
    flipped = {name: -each for name, each in scores.items()}
    save_file(labelled | flipped, tmp_path / "saliencies.safetensors")
    assert kept(folder, write_spec(tmp_path, READY), kind) == [best(each, 3) for each in scores.values()]


@pytest.mark.parametrize("kind", MODULES)
def test_vectors_that_are_missing_or_of_another_length_are_refused(kind: str, tmp_path: Path) -> None:
    folder, _ = checkpoint(kind, tmp_path)
    first, second = vectors(kind, EXPERTS + 1).items()
    save_file({first[0]: first[1], f"{second[0]}s": second[1]}, tmp_path / "saliencies.safetensors")
    with pytest.raises(SpecError) as caught:
        kept(folder, write_spec(tmp_path, READY), kind)
    said = str(caught.value)
    assert f"{first[0]} has shape [5], wanted [4]" in said
    assert f"there is no tensor {second[0]} of shape [4], nor expert[" in said
    assert f"; the nearest name is {second[0]}s" in said


def test_groups_of_a_router_keep_as_many_each(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", stacks(), {**GPT_OSS, "n_group": 2})
    scores = {f"model.layers.{layer}.mlp.experts": torch.tensor([4.0, 3.0, 2.0, 1.0]) for layer in (0, 1)}
    save_file(scores, tmp_path / "saliencies.safetensors")
    spec = write_spec(tmp_path, READY.replace("0.25", "0.5"))
    assert kept(folder, spec, "stack") == [{0, 2}, {0, 2}]
