"""What removal of a family's units can be told: parts, groups, masks, rebuilt weights, and what is refused.

That what is left computes what the masked model does is shown of all actions and kinds in test_harness.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from sparseprune.spec import find_spec
from tests.commands import ok, refused, run
from tests.families.checkpoints import Checkpoint, make, prune, read, save
from tests.families.harness import never_chosen
from tests.families.models import DECODER, DEEPSEEK
from tests.samples import config_of as without_mark
from tests.samples import unmarked, write_spec

pytestmark = pytest.mark.usefixtures("untraced")

WITHOUT_HEADS = ("llama_without_head", "gpt2_without_head", "bert", "vit")
FOURS = ("--set", "multiple=4")  # grouped products of torch take rows of 16 bytes


def removed(dense: Checkpoint, spec: object, *options: object) -> Path:
    """`sparseprune remove` beside the dense folder."""
    folder = dense.folder.with_name(f"{dense.folder.name}-smaller")
    said = run("remove", dense.folder, spec, "-o", folder, "-q", "--force", *options)
    assert (said.code, said.out) == (0, f"{folder}\n"), said.err
    return folder


def check_same_outputs(dense: Checkpoint, pruned: Path, smaller: Path) -> None:
    """What is left computes what the checkpoint with zeros does, and not what the dense one does."""
    masked = dense.output(dense.load(pruned))
    torch.testing.assert_close(dense.output(dense.load(smaller)), masked, rtol=1e-5, atol=1e-5)
    assert (masked - dense.output(dense.load())).abs().max() > 1e-2


def config_of(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text())
    return config.get("text_config", config)


@pytest.mark.parametrize("family", WITHOUT_HEADS)
def test_channels_are_cut_out_of_a_model_that_has_no_head(family: str, tmp_path: Path) -> None:
    dense = make(family, tmp_path)
    pruned = prune(dense, "mlp-channels", "--no-masks")
    smaller = removed(dense, "mlp-channels")
    check_same_outputs(dense, pruned, smaller)
    before, after = dense.tensors(), read(smaller)
    assert {name for name in before if before[name].shape != after[name].shape} == {
        name for name in before if name.endswith(MLP_ENDINGS) and ".attention." not in name
    }


MLP_ENDINGS = (
    *(f"{name}_proj.weight" for name in ("gate", "up", "down")),
    *(f"intermediate.dense.{end}" for end in ("weight", "bias")),
    *("output.dense.weight", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight"),
    *("fc1.weight", "fc1.bias", "fc2.weight"),
)


def test_channels_of_a_tower_and_of_its_language_model_are_counted_by_their_own_configs(
    tmp_path: Path,
) -> None:
    dense = make("gemma3_with_pictures", tmp_path)
    smaller = removed(dense, "mlp-channels")
    for folder, width in ((dense.folder, 48), (smaller, 36)):
        config = json.loads((folder / "config.json").read_text())
        assert [config[each]["intermediate_size"] for each in ("text_config", "vision_config")] == [width] * 2
    dense.load(smaller)
    removed(dense, "mlp-channels", "--set", "only='vision'")
    config = json.loads((smaller / "config.json").read_text())
    assert config["text_config"]["intermediate_size"] == 48
    assert config["vision_config"]["intermediate_size"] == 36
    dense.load(smaller)


def test_heads_of_a_tower_of_which_the_class_derives_the_size_are_refused(tmp_path: Path) -> None:
    dense = make("gemma3_with_pictures", tmp_path)
    said = refused("remove", dense.folder, "heads", "--set", "sparsity=0.5", "-o", tmp_path / "o")
    assert "heads of vision_tower.encoder.layers cannot go: the class derives" in said.err


QUERIES = """
version = 1
[vars]
kv = "config.num_key_value_heads"
group = "config.num_attention_heads // config.num_key_value_heads"
[block.rows]
tensors = "**.layers.{layer}.self_attn.q_proj.weight"
view = "(kv g d) k -> kv g d k"
axes = { kv = "kv", g = "group" }
shape = [1, 1, -1, -1]
[block.columns]
tensors = "**.layers.{layer}.self_attn.o_proj.weight"
view = "m (kv g d) -> kv g m d"
axes = { kv = "kv", g = "group" }
shape = [1, 1, -1, -1]
[block_coupling.head]
blocks = ["rows", "columns"]
[scope.attention]
block = "head"
shape = [1, -1]
nnz = 1
"""


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_as_many_query_heads_of_every_key_value_head_are_cut_out(family: str, tmp_path: Path) -> None:
    dense, spec = make(family, tmp_path), write_spec(tmp_path, QUERIES)
    pruned = prune(dense, str(spec), "--no-masks", output="pruned")
    smaller = removed(dense, spec)
    check_same_outputs(dense, pruned, smaller)
    config = config_of(smaller)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 4)


def check_experts(dense: Checkpoint, pruned: Path, smaller: Path) -> None:
    """What is left computes what the masked model does where no router chooses what is lost."""
    masked, left = dense.load(pruned), dense.load(smaller)
    with never_chosen(masked, left):
        expected = dense.output(masked)
    found = dense.output(left)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - dense.output(dense.load())).abs().max() > 1e-2


def test_experts_may_be_coupled_with_the_rows_of_their_routers(tmp_path: Path) -> None:
    """They are the same experts as without, where these rows have no say."""
    dense = make("mixtral", tmp_path)
    spec = write_spec(
        tmp_path,
        """
        version = 1
        [block.matrix]
        tensors = "**.layers.{layer}.block_sparse_moe.experts.{expert}.{name:w1|w2|w3}.weight"
        shape = [-1, -1]
        [block.row]
        tensors = "**.layers.{layer}.block_sparse_moe.gate.weight"
        slice = ["expert", ":"]
        shape = [-1, -1]
        [block_coupling.whole]
        blocks = ["matrix", "row"]
        across = ["name"]
        [scope.expert]
        block = "whole"
        shape = []
        [scope_coupling.experts]
        scopes = ["expert"]
        across = ["expert"]
        nnz = 3
        """,
    )
    smaller = removed(dense, spec)
    found = {name: tensor.shape for name, tensor in read(smaller).items() if "block_sparse_moe" in name}
    assert found["model.layers.0.block_sparse_moe.gate.weight"] == (3, 32)
    assert len(found) == 2 * (1 + 3 * 3)
    dense.output(dense.load(smaller))


GROUPED = """
version = 1
[vars]
kept = [3, 3]
[block.matrix]
tensors = "**.layers.{layer}.mlp.experts.{expert}.{name:gate|up|down}_proj.weight"
where = "expert < 4"
shape = [-1, -1]
[block.other]
tensors = "**.layers.{layer}.mlp.experts.{expert}.{name:gate|up|down}_proj.weight"
where = "expert >= 4"
shape = [-1, -1]
[block_coupling.whole]
blocks = ["matrix"]
across = ["name"]
[block_coupling.wholes]
blocks = ["other"]
across = ["name"]
[scope.first]
block = "whole"
shape = []
[scope.second]
block = "wholes"
shape = []
[scope_coupling.firsts]
scopes = ["first"]
across = ["expert"]
nnz = "kept[0]"
[scope_coupling.seconds]
scopes = ["second"]
across = ["expert"]
nnz = "kept[1]"
"""


def deepseek_with_groups(folder: Path) -> Checkpoint:
    """Eight experts in two groups of four, of which one serves a token, with a correction for choosing."""
    sizes = {**DECODER, **DEEPSEEK, "n_routed_experts": 8}
    torch.manual_seed(5)
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes))
    return save(model, "deepseek_v3", folder)


@pytest.mark.parametrize(("kept", "groups", "experts"), [("[3, 3]", 2, 6), ("[0, 3]", 1, 3)])
def test_groups_of_experts_keep_one_size(kept: str, groups: int, experts: int, tmp_path: Path) -> None:
    dense = deepseek_with_groups(tmp_path)
    spec = write_spec(tmp_path, GROUPED)
    pruned = prune(dense, str(spec), "--no-masks", "--set", f"kept={kept}", output="pruned")
    smaller = removed(dense, spec, "--set", f"kept={kept}")
    check_experts(dense, pruned, smaller)
    config = config_of(smaller)
    assert (config["n_group"], config["n_routed_experts"]) == (groups, experts)


@pytest.mark.parametrize(
    ("kept", "why"),
    [
        ("[4, 3]", "would have [4, 3] members, and n_group counts groups of one size: prune the same number"),
        ("[1, 1]", "would have 1 of 4 members each, and the router takes the best 2 of each"),
    ],
)
def test_groups_that_no_router_can_have_are_refused(kept: str, why: str, tmp_path: Path) -> None:
    dense, spec = deepseek_with_groups(tmp_path), write_spec(tmp_path, GROUPED)
    options = ("--set", f"kept={kept}", "-o", tmp_path / "o")
    said = refused("remove", dense.folder, spec, *options, "-q")
    assert said.err.startswith(
        f"sparseprune: {spec}: model.layers.1.mlp.experts: its groups of experts {why}"
    )
    assert sorted(tmp_path.iterdir()) == sorted([dense.folder, spec])


def test_fewer_experts_than_are_chosen_are_refused(tmp_path: Path) -> None:
    dense = make("qwen3_moe", tmp_path)
    said = run("remove", dense.folder, "experts", "--set", "sparsity=0.75", "-o", tmp_path / "o")
    assert (said.code, said.err) == (
        2,
        "sparseprune: experts.toml: num_local_experts would be 1, fewer than the 2 of num_experts_per_tok\n",
    )


def test_a_number_of_heads_that_the_class_refuses_is_refused(tmp_path: Path) -> None:
    dense = make("llama", tmp_path)
    said = run("remove", dense.folder, "heads", "-o", tmp_path / "o")
    assert (said.code, said.err) == (
        2,
        (
            "sparseprune: heads.toml: num_attention_heads would be 6, and the config's class wants a divisor "
            "of hidden_size, 32, such as 4 or 8; or --as mistral, whose class takes any\n"
        ),
    )


def moments(tensors: Mapping[str, torch.Tensor], dim: int, folder: Path) -> None:
    """Second moments of the inputs of every matrix, which lie along this dimension: neighbours are alike."""
    found = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            places = torch.arange(tensor.shape[dim])
            found[name] = 0.5 ** (places[:, None] - places).abs().float()
    (folder / "stats").mkdir()
    save_file(found, folder / "stats" / "statistics.safetensors")


REFITTED = ("llama", "phi3", "gpt2", "mixtral", "bert")
REBUILT = [
    *((family, "admm") for family in (*REFITTED, "vit", "deepseek_v3", "gemma3_with_pictures")),
    *((family, "refit") for family in REFITTED),
]


@pytest.mark.parametrize(("family", "method"), REBUILT)
def test_rebuilt_channels_are_cut_out_as_they_are(family: str, method: str, tmp_path: Path) -> None:
    """By the spec, by the masks of what it made, and from what it made by the spec: the same bytes."""
    dense = make(family, tmp_path)
    dim = 0 if family.startswith("gpt2") else -1  # its matrices are input-first
    moments(dense.tensors(), dim, tmp_path)
    rebuilt = f'[reconstruct]\nfile = "stats"\nmethod = "{method}"\ninput_dim = {dim}\n'
    spec = write_spec(tmp_path, f"{find_spec('mlp-channels').text}\n{rebuilt}")
    options = FOURS if family in {"mixtral", "deepseek_v3"} else ()
    pruned = prune(dense, str(spec), *options, output="pruned")
    smaller = removed(dense, spec, *options)
    check_same_outputs(dense, pruned, smaller)
    ok("remove", pruned, "--masks", pruned, "-o", tmp_path / "by-masks", "-q")
    ok("remove", pruned, spec, "-o", tmp_path / "again", "-q", *options)
    weights = "model.safetensors"
    for other in (tmp_path / "by-masks", tmp_path / "again"):
        assert unmarked((other / weights).read_bytes()) == unmarked((smaller / weights).read_bytes())
        assert without_mark(other) == without_mark(smaller)
