"""Every shipped spec: what it says of itself, and a family with whose stored names it can be applied."""

import json
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import sparseprune
from sparseprune.spec import find_spec, list_specs
from tests.commands import ok, run
from tests.families.checkpoints import Checkpoint, write_statistics
from tests.samples import unmarked

SERVED = {
    "2of4": ("llama", "llama_without_head", "gemma3_with_pictures", "phi3", "gpt2", "mixtral", "deepseek_v3",
        "gpt_oss", "llama4", "bert_for_masked_lm", "vit", "resnet"),
    "2of4-admm": ("llama", "mixtral", "bert"),
    "4of8": ("llama", "mixtral"),
    "nofm": ("llama", "gpt_oss"),
    "vnm": ("llama", "gpt_oss"),
    "pairs-4of8": ("llama", "vit"),
    "coupled-2of4": ("llama", "phi3", "llama4"),
    "block16": ("llama",),
    "block16x16": ("llama", "gemma3_with_pictures"),
    "unstructured": ("llama", "qwen2_moe", "resnet"),
    "unstructured-admm": ("llama", "mixtral"),
    "unstructured-global": ("llama", "mixtral"),
    "unstructured-gradual": ("llama", "mixtral"),
    "mlp-channels": ("llama", "llama_without_head", "gemma3_with_pictures", "phi3", "gpt2", "mixtral",
        "deepseek_v3", "gpt_oss", "llama4", "bert_for_masked_lm", "vit"),
    "mlp-channels-2of4": ("llama", "mixtral", "gpt_oss", "gpt2", "phi3", "bert"),
    "mlp-channels-global": ("llama", "mixtral"),
    "mlp-channels-admm": ("llama", "llama_without_head", "qwen2", "phi3", "bert", "bert_for_masked_lm"),
    "heads": ("llama", "llama_without_head", "qwen2", "phi3", "gpt2", "gpt2_without_head", "mixtral",
        "gpt_oss", "llama4", "bert_for_masked_lm", "vit"),
    "heads-aligned": ("llama", "phi3"),
    "heads-global": ("llama", "gemma3_with_pictures"),
    "experts": ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4"),
    "expert-channels": ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4"),
    "layers": ("llama", "llama_without_head", "gpt2", "gpt_oss", "deepseek_v3", "gemma3_with_pictures"),
    "hidden": ("qwen3_moe", "gpt_oss"),
    "experts-by-router": ("mixtral", "gpt_oss", "llama4", "qwen2_moe"),
    "resnet-filters": ("resnet", "resnet_with_bottlenecks", "mobilenet"),
}  # fmt: skip
LEFT_ALONE = re.compile(
    r"embed_|embeddings|wte|wpe|lm_head|pooler|norm\.|layernorm|LayerNorm|ln_|running_"
    r"|router|\.gate\.|expert_gate|sinks"
)
OTHERS_ALONE = {
    "layers": re.compile(r"^(?!.*\.layers\.\d|layers\.\d|.*\.?h\.\d)"),
    "hidden": re.compile(r"[qkv]_(norm|proj\.bias)|sinks|router\.bias"),
}
OPTIONS = dict.fromkeys(("layers", "experts"), ("--set", "sparsity=0.5"))  # a quarter of two is none


@pytest.mark.parametrize(("spec", "family"), [(spec, family) for spec in SERVED for family in SERVED[spec]])
def test_a_spec_reaches_what_it_is_for_and_leaves_the_rest_alone(
    spec: str,
    family: str,
    checkpoint_of: Callable[[str], Checkpoint],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense = checkpoint_of(family)
    monkeypatch.chdir(tmp_path)  # where shipped specs look for statistics
    write_statistics(dense, tmp_path)
    said = ok("mask", dense.folder, spec, "-o", tmp_path / "masks", "-q", "--json", *OPTIONS.get(spec, ()))
    masks = sparseprune.load_masks(tmp_path / "masks")
    assert masks
    left_alone = OTHERS_ALONE.get(spec, LEFT_ALONE)
    assert not [name for name in masks if left_alone.search(name)]
    assert [name for name in dense.tensors() if name not in masks and left_alone.search(name)]
    assert any(not mask.all() for mask in masks.values())
    report = json.loads(said.out)
    assert report["totals"]["declared_coverage"] >= 0.9
    assert report["warnings"] == []


@pytest.mark.parametrize("spec", SERVED)
def test_a_zero_that_was_lost_is_found_and_put_back(
    spec: str, checkpoint_of: Callable[[str], Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apply, verify, lose one zero, verify against the spec and the masks, reapply: the bytes are apply's."""
    monkeypatch.chdir(tmp_path)
    write_statistics(checkpoint_of(SERVED[spec][0]), tmp_path)
    dense, pruned, tuned = checkpoint_of(SERVED[spec][0]), tmp_path / "pruned", tmp_path / "tuned"
    options = OPTIONS.get(spec, ())
    ok("apply", dense.folder, spec, "-o", pruned, "-q", *options)
    ok("verify", pruned, spec, "-q", *options)
    masks = sparseprune.load_masks(pruned)
    name = max(masks, key=lambda name: int((~masks[name]).sum()))
    place = tuple((~masks[name]).nonzero()[-1].tolist())
    shutil.copytree(pruned, tuned, ignore=shutil.ignore_patterns("sparseprune"))
    lose(tuned, name, place)
    against_spec = run("verify", tuned, spec, "--json", *options)
    assert against_spec.code == 1
    found = json.loads(against_spec.out)
    shared = [rule["together"] for rule in found["rules"] if "together" in rule]
    if shared:  # their parts were in the report
        assert [one["nonzero"] - one["allowed"] for one in shared] == [1]
    else:
        assert 1 <= found["totals"]["broken"] <= len(found["rules"])  # once for each level
        assert name in [tensor["name"] for tensor in found["tensors"] if tensor["broken"]]
    against_masks = run("verify", tuned, "--masks", pruned, "-q")
    assert against_masks.code == 1
    assert against_masks.err.startswith(f"sparseprune: {name}: 1 of ")
    assert against_masks.err.endswith(f"not zero, first {list(place)}\n")
    ok("reapply", tuned, pruned, "-o", tmp_path / "again", "-q")
    ok("verify", tmp_path / "again", spec, "-q", *options)
    for file in pruned.glob("*.safetensors"):
        assert unmarked((tmp_path / "again" / file.name).read_bytes()) == unmarked(file.read_bytes())


def lose(folder: Path, name: str, place: tuple[int, ...]) -> None:
    """One element of a tensor is 0.5, whatever it was."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name][place] = 0.5
            save_file(tensors, file, metadata={"format": "pt"})


def test_every_shipped_spec_is_applied_here() -> None:
    assert set(SERVED) == set(list_specs())


@pytest.mark.parametrize("spec", list_specs())
def test_the_first_line_of_a_spec_says_what_it_does(spec: str) -> None:
    found = find_spec(spec)
    first, second, *_ = found.text.splitlines()
    assert re.fullmatch(r"# [A-Z0-9].*[^.]\.", first)
    assert len(first) <= 110
    assert second == "version = 1"
    assert found.source == f"{spec}.toml"


@pytest.mark.parametrize("spec", list_specs())
def test_what_a_user_may_set_stands_in_vars(spec: str) -> None:
    """Only what a name promises (2of4) is written into a rule."""
    document = tomllib.loads(find_spec(spec).text)
    rules = [*document.get("scope", {}).values(), *document.get("scope_coupling", {}).values()]
    budgets = [rule[key] for rule in rules for key in ("nnz", "sparsity") if key in rule]
    assert len(set(budgets)) == 1 + sum("within" in rule for rule in rules)
    assert set(budgets) & document.get("vars", {}).keys() or re.search("4of8|2of4|block16$", spec)
