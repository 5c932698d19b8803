"""`permute = true`: what comes out is what the plain spec makes of the dense model in that order."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparseprune
from sparseprune.api.options import Source, Target
from sparseprune.api.pruning import prepare
from sparseprune.api.resources import machine
from sparseprune.checkpoint import TensorReader
from sparseprune.checkpoint.permuted import PermutedSource
from sparseprune.checkpoint.statistics import STATISTICS_KEY
from sparseprune.execution import permutable, runner
from sparseprune.execution.permuting import beside
from tests import statistics
from tests.commands import ok, refused, valid
from tests.engine.reconstruction.oracle import moments
from tests.samples import save_statistics, write_spec

Tensors = dict[str, torch.Tensor]
SPEC = """
version = 1
[scope.matrix]
structure = "matrices"
where = "shape[-1] % 4 == 0"
block = [1, 1]
shape = [1, 4]
nnz = 2
permute = true
"""
PLAIN = SPEC.replace("permute = true\n", "")
ADMM = '[reconstruct]\nfile = "stats.safetensors"\n'
WANDA = '[score]\nkind = "wanda"\nfile = "stats.safetensors"\n'
CONFIG = {
    "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24, "vocab_size": 20,
}  # fmt: skip
HIDDEN, DIM, HEADS, GROUPS, WIDTH = 16, 8, 4, 2, 24


def decoder(dtype: torch.dtype = torch.float32, *, bias: bool = True, seed: int = 0) -> Tensors:
    """Two layers of a decoder with biases in its MLPs and its values, and an embedding."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (20, HIDDEN)}
    for layer in range(2):
        own: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (HEADS * DIM, HIDDEN),
            "self_attn.k_proj.weight": (GROUPS * DIM, HIDDEN),
            "self_attn.v_proj.weight": (GROUPS * DIM, HIDDEN),
            "self_attn.o_proj.weight": (HIDDEN, HEADS * DIM),
            "mlp.gate_proj.weight": (WIDTH, HIDDEN),
            "mlp.up_proj.weight": (WIDTH, HIDDEN),
            "mlp.down_proj.weight": (HIDDEN, WIDTH),
        }
        if bias:
            own |= {"self_attn.v_proj.bias": (GROUPS * DIM,), "mlp.up_proj.bias": (WIDTH,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def saved(folder: Path, tensors: Tensors, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    return folder


def applied(folder: Path, spec: str, *words: object) -> tuple[Tensors, Tensors, Any]:
    """The pruned weights, the orders by tensor, and the report of a checkpoint in `folder / "dense"`."""
    text = write_spec(folder, spec)
    report = valid(
        ok("apply", folder / "dense", text, "-o", folder / "out", "--json", "-q", *words).out, "report"
    )
    return (
        load_file(folder / "out" / "model.safetensors"),
        load_file(folder / "out" / "sparseprune" / "permutations.safetensors"),
        report,
    )


def dims(folder: Path) -> dict[str, int]:
    """The dimension along which each tensor was permuted."""
    from safetensors import safe_open

    with safe_open(folder / "out" / "sparseprune" / "permutations.safetensors", "pt") as file:
        found: dict[str, int] = json.loads(file.metadata()["sparseprune.permutations"])
    return found


def reordered(tensors: Tensors, orders: Tensors, along: dict[str, int]) -> Tensors:
    """The dense model in this order; of the members of a stack each in its own."""
    found = dict(tensors)
    for name, order in orders.items():
        tensor, dim = tensors[name], along[name]
        if order.ndim == 1:
            found[name] = tensor.index_select(dim, order)
        else:
            pairs = zip(tensor, order, strict=True)
            found[name] = torch.stack([one.index_select(dim - 1, own) for one, own in pairs])
    return {name: tensor.contiguous() for name, tensor in found.items()}


def of_stacks(stats: Tensors) -> dict[str, dict[str, int]]:
    """The dimension of the inputs in each stack of matrices."""
    return {name: {name: 2} for name, tensor in stats.items() if tensor.ndim == 3}


def again(
    folder: Path, dense: Tensors, spec: str, stats: Tensors | None = None, config: Any = None
) -> Tensors:
    """What a spec without `permute` makes of another dense model, and of statistics of it."""
    other = folder / "again"
    saved(other / "dense", dense, config)
    if stats is not None:
        save_statistics(other / "stats.safetensors", "hessian", stats, **of_stacks(stats))
    ok("apply", other / "dense", write_spec(other, spec), "-o", other / "out", "-q")
    return load_file(other / "out" / "model.safetensors")


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_what_the_spec_makes_of_the_permuted_model(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    dense = decoder(dtype)
    saved(tmp_path / "dense", dense)
    pruned, orders, report = applied(tmp_path, SPEC)
    moved = reordered(dense, orders, dims(tmp_path))
    assert_same(pruned, again(tmp_path, moved, PLAIN))
    assert [one["module"] for one in report["permuted"]] == [
        "model.layers.0.mlp", "model.layers.1.mlp", "model.layers.0.self_attn", "model.layers.1.self_attn",
    ]  # fmt: skip
    assert all(one["pruned_after"] < one["pruned_before"] for one in report["permuted"])
    assert report["not_permuted"] == []


def test_matrices_and_biases_of_a_module_move_together(tmp_path: Path) -> None:
    saved(tmp_path / "dense", decoder())
    _, orders, _ = applied(tmp_path, SPEC)
    for layer in ("model.layers.0", "model.layers.1"):
        down = orders[f"{layer}.mlp.down_proj.weight"]
        assert down.tolist() != list(range(WIDTH))
        for name in ("gate_proj.weight", "up_proj.weight", "up_proj.bias"):
            assert torch.equal(orders[f"{layer}.mlp.{name}"], down)
        rows, read = orders[f"{layer}.self_attn.v_proj.weight"], orders[f"{layer}.self_attn.o_proj.weight"]
        assert torch.equal(orders[f"{layer}.self_attn.v_proj.bias"], rows)
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            own = rows[DIM * group : DIM * (group + 1)] - DIM * group
            assert sorted(own.tolist()) == list(range(DIM))
            assert torch.equal(read[DIM * head : DIM * (head + 1)] - DIM * head, own)
    assert not any("q_proj" in name or "k_proj" in name or "embed" in name for name in orders)


def test_a_module_moves_though_a_rule_reaches_what_reads_it_alone(tmp_path: Path) -> None:
    dense = decoder()
    saved(tmp_path / "dense", dense)
    only = 'structure = "matrices"\nwhere = "part == \'down_proj\'"'
    spec = SPEC.replace('structure = "matrices"\nwhere = "shape[-1] % 4 == 0"', only)
    pruned, orders, _ = applied(tmp_path, spec)
    moved = reordered(dense, orders, dims(tmp_path))
    assert_same(pruned, again(tmp_path, moved, spec.replace("permute = true\n", "")))
    name = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(pruned[name], moved[name])
    assert not torch.equal(pruned[name], dense[name])
    assert torch.equal(
        pruned["model.layers.0.self_attn.v_proj.weight"], dense["model.layers.0.self_attn.v_proj.weight"]
    )


def inputs_of(dense: Tensors) -> Tensors:
    """A second moment of the inputs of every matrix of the layers."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: moments(tensor.shape[-1], 60, generator).float().contiguous()
        for name, tensor in dense.items()
        if tensor.ndim == 2 and "layers" in name
    }


def inputs_reordered(stats: Tensors, orders: Tensors, along: dict[str, int]) -> Tensors:
    """Moments in the order of the inputs of permuted matrices."""
    found = dict(stats)
    for name, order in orders.items():
        if along[name] == 1:
            found[name] = stats[name][order][:, order].contiguous()
    return found


@pytest.mark.parametrize("head", [ADMM, WANDA, '[score]\nkind = "obd"\nfile = "stats.safetensors"\n'])
def test_statistics_move_with_their_matrices(tmp_path: Path, head: str) -> None:
    dense = decoder()
    stats = inputs_of(dense)
    saved(tmp_path / "dense", dense)
    save_statistics(tmp_path / "stats.safetensors", "hessian", stats, **of_stacks(stats))
    with_head = SPEC.replace("[scope", f"{head}[scope")
    pruned, orders, report = applied(tmp_path, with_head)
    along = dims(tmp_path)
    moved = reordered(dense, orders, along)
    expected = again(
        tmp_path, moved, PLAIN.replace("[scope", f"{head}[scope"), inputs_reordered(stats, orders, along)
    )
    assert_same(pruned, expected)
    assert all(one["pruned_after"] < one["pruned_before"] for one in report["permuted"])
    assert len(report["permuted"]) == 4


def test_scores_of_a_file_move_with_their_matrices(tmp_path: Path) -> None:
    dense, scores = decoder(), {name: tensor.abs() + 1 for name, tensor in decoder(seed=9).items()}
    saved(tmp_path / "dense", dense)
    save_file(scores, tmp_path / "values.safetensors")
    head = '[score]\nkind = "values"\nfile = "values.safetensors"\n'
    pruned, orders, _ = applied(tmp_path, SPEC.replace("[scope", f"{head}[scope"))
    along = dims(tmp_path)
    (tmp_path / "again").mkdir()
    save_file(reordered(scores, orders, along), tmp_path / "again" / "values.safetensors")
    expected = again(tmp_path, reordered(dense, orders, along), PLAIN.replace("[scope", f"{head}[scope"))
    assert_same(pruned, expected)


def stack(experts: int = 3) -> tuple[Tensors, dict[str, Any]]:
    """A layer whose experts lie in stacks, gate and up in one."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_up_proj": (experts, 2 * WIDTH, HIDDEN), "down_proj": (experts, HIDDEN, WIDTH)}
    dense = {
        f"model.layers.0.mlp.experts.{name}": torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    dense["model.layers.0.mlp.gate.weight"] = torch.randn(experts, HIDDEN, generator=generator)
    return dense, {"model_type": "qwen3_moe", "num_experts": experts}


@pytest.mark.parametrize("rebuilt", [False, True])
def test_each_expert_of_a_stack_has_an_order_of_its_own(tmp_path: Path, rebuilt: bool) -> None:
    dense, config = stack()
    saved(tmp_path / "dense", dense, config)
    head, stats = "", None
    if rebuilt:
        generator = torch.Generator().manual_seed(3)
        stats = {
            name: moments(tensor.shape[-1], 60, generator, 3).float().contiguous()
            for name, tensor in dense.items()
            if tensor.ndim == 3
        }
        save_statistics(tmp_path / "stats.safetensors", "hessian", stats, **of_stacks(stats))
        head = ADMM
    pruned, orders, report = applied(tmp_path, SPEC.replace("[scope", f"{head}[scope"))
    up, down = (orders[f"model.layers.0.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
    assert (up.shape, down.shape) == ((3, 2 * WIDTH), (3, WIDTH))
    assert torch.equal(up[:, :WIDTH], down)
    assert torch.equal(up[:, WIDTH:], down + WIDTH)
    assert len({tuple(row) for row in down.tolist()}) == 3
    if stats is not None:
        name = "model.layers.0.mlp.experts.down_proj"
        pairs = zip(stats[name], down, strict=True)
        stats = stats | {name: torch.stack([one[own][:, own] for one, own in pairs])}
    moved = reordered(dense, orders, dims(tmp_path))
    plain = PLAIN.replace("[scope", f"{head}[scope")
    assert_same(pruned, again(tmp_path, moved, plain, stats, config=config))
    assert (report["permuted"][0]["orders"], report["permuted"][0]["units"]) == (3, WIDTH)


def with_gradients(folder: Path, dense: Tensors, groups: int) -> Tensors:
    """Statistics of inputs and of gradients, these in groups of rows for what writes channels; gives all."""
    generator = torch.Generator().manual_seed(4)
    stats, of = inputs_of(dense), dict[str, dict[str, int]]()
    named = {name: {name: 1} for name in stats}
    for name in list(stats):
        if ".mlp.gate" in name or ".mlp.up" in name:
            moment = moments(WIDTH // groups, 60, generator, groups).float().contiguous()
            stats[f"{name}.gradients"] = moment if groups > 1 else moment[0].contiguous()
            of[f"{name}.gradients"] = {name: 0}
    text = json.dumps({"kind": "hessian", "weights": named, "gradients": of})
    save_file(stats, folder / "stats.safetensors", {STATISTICS_KEY: text})
    return stats


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_move_with_what_writes_the_channels_and_none_leaves_its_group(
    tmp_path: Path, groups: int
) -> None:
    dense = decoder()
    saved(tmp_path / "dense", dense)
    stats = with_gradients(tmp_path, dense, groups)
    _, orders, _ = applied(tmp_path, SPEC.replace("[scope", f"{ADMM}[scope"))
    own = orders["model.layers.0.mlp.gate_proj.weight"]
    size = WIDTH // groups
    assert torch.equal(own // size, torch.arange(WIDTH) // size)
    asked = Source(tmp_path / "dense", str(tmp_path / "spec.toml"), {})
    found = prepare(asked, Target(None, None, force=False), machine("cpu", 1, None)).plan.permutations.found
    (one,) = (each for each in found if each.interior.module == "model.layers.0.mlp")
    along = {name: {dim: orders[name].numpy()[None]} for name, dim in dims(tmp_path).items()}
    moved = {each.stored.name: each for each in beside(one, along)}
    name = "model.layers.0.mlp.gate_proj.weight.gradients"
    assert moved.keys() == {name, name.replace("gate", "up"), "model.layers.0.mlp.down_proj.weight"}
    with TensorReader() as reader:
        data = PermutedSource(reader, moved.values()).read(moved[name].stored)
    served = torch.frombuffer(data, dtype=torch.float32).reshape(stats[name].shape)
    for group in range(groups):
        local = own[size * group : size * (group + 1)] - size * group
        before, after = (stats[name], served) if groups == 1 else (stats[name][group], served[group])
        assert torch.equal(after, before[local][:, local])


def test_a_module_stays_where_the_pattern_would_break_groups_of_gradients(tmp_path: Path) -> None:
    dense = decoder()
    saved(tmp_path / "dense", dense)
    with_gradients(tmp_path, dense, 4)
    _, _, report = applied(tmp_path, SPEC.replace("[scope", f"{ADMM}[scope"))
    assert report["not_permuted"][0] == {
        "module": "model.layers.0.mlp",
        "reason": "its gradients are kept in groups of 6, in which 4 units break",
    }


# -- what people are told ----------------------------------------------------------------------------


def test_the_summary_and_the_plan_tell_what_moves(tmp_path: Path) -> None:
    saved(tmp_path / "dense", decoder())
    spec = write_spec(tmp_path, SPEC)
    card = ok("plan", tmp_path / "dense", spec).out
    assert "permutes  2 attention modules, 2 MLP modules: 80 units in 14 tensors" in card
    planned = valid(ok("plan", tmp_path / "dense", spec, "--json").out, "plan")
    assert [one["orders"] for one in planned["permuted"]] == [1, 1, GROUPS, GROUPS]
    said = ok("apply", tmp_path / "dense", spec, "-o", tmp_path / "out")
    assert "permuted 2 attention modules, 2 MLP modules: 80 units in 14 tensors; there " in said.err
    assert "compare by permutations.safetensors" in said.err
    assert "all 1,344 scopes are as the spec says" in ok("verify", tmp_path / "out", spec).out


def test_modules_that_stay_as_they_are_are_told_with_the_reason(tmp_path: Path) -> None:
    dense = decoder(bias=False)
    dense["model.layers.0.mlp.act.beta"] = torch.ones(WIDTH)
    dense["model.layers.1.self_attn.v_norm.weight"] = torch.ones(DIM)
    saved(tmp_path / "dense", dense)
    pruned, orders, report = applied(tmp_path, SPEC)
    assert report["not_permuted"] == [
        {
            "module": "model.layers.0.mlp",
            "reason": "model.layers.0.mlp.act.beta is as long as its channels, and nothing tells whether "
            "they are these",
        },
        {
            "module": "model.layers.1.self_attn",
            "reason": "nothing tells whether values pass through model.layers.1.self_attn.v_norm.weight",
        },
    ]
    assert not any(name.startswith(("model.layers.0.mlp", "model.layers.1.self_attn")) for name in orders)
    name = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(pruned[name][pruned[name] != 0], dense[name][pruned[name] != 0])
    said = ok("apply", tmp_path / "dense", tmp_path / "spec.toml", "-o", tmp_path / "more")
    assert "not permuted model.layers.0.mlp: act.beta is as long as its channels" in said.err


def test_a_module_stays_where_another_rule_has_groups_along_its_channels(tmp_path: Path) -> None:
    saved(tmp_path / "dense", decoder())
    other = """
[scope.rows]
tensors = "model.layers.{layer}.mlp.up_proj.weight"
block = [4, 1]
shape = [2, 1]
nnz = 1
"""
    spec = SPEC.replace('% 4 == 0"', "% 4 == 0 and part != 'up_proj'\"") + other
    _, orders, report = applied(tmp_path, spec)
    assert {one["reason"] for one in report["not_permuted"]} == {
        f"scope.rows has groups of 8 in model.layers.{layer}.mlp.up_proj.weight where it moves"
        for layer in range(2)
    }
    assert not any(".mlp." in name for name in orders)


def test_a_head_of_broken_groups_stays(tmp_path: Path) -> None:
    saved(tmp_path / "dense", decoder())
    spec = (
        SPEC.replace("shape[-1] % 4", "shape[-1] % 16")
        .replace("[1, 4]", "[1, 16]")
        .replace("nnz = 2", "nnz = 8")
    )
    report = valid(ok("plan", tmp_path / "dense", write_spec(tmp_path, spec), "--json").out, "plan")
    assert report["not_permuted"][0]["reason"] == (
        "its 8 units are no whole groups of 16 in model.layers.0.self_attn.o_proj.weight"
    )


@pytest.mark.parametrize("command", ["mask", "remove"])
def test_commands_that_write_no_permuted_weights_refuse(tmp_path: Path, command: str) -> None:
    saved(tmp_path / "dense", decoder())
    said = refused(command, tmp_path / "dense", write_spec(tmp_path, SPEC), "-o", tmp_path / "out")
    assert f"[scope.matrix] permute: {command} does without it" in said.err
    assert not (tmp_path / "out").exists()


def test_a_file_gets_its_orders_beside_it(tmp_path: Path) -> None:
    saved(tmp_path / "dense", decoder())
    file = tmp_path / "dense" / "model.safetensors"
    ok("apply", file, write_spec(tmp_path, SPEC), "-q")
    orders = load_file(tmp_path / "dense" / "model.pruned.permutations.safetensors")
    assert "model.layers.0.mlp.down_proj.weight" in orders
    ok("apply", file, write_spec(tmp_path, PLAIN), "-q", "--force")
    assert not (tmp_path / "dense" / "model.pruned.permutations.safetensors").exists()


def test_a_spec_that_permutes_nothing_writes_no_orders(tmp_path: Path) -> None:
    saved(tmp_path / "dense", decoder())
    ok("apply", tmp_path / "dense", write_spec(tmp_path, PLAIN), "-o", tmp_path / "out", "-q")
    assert not (tmp_path / "out" / "sparseprune" / "permutations.safetensors").exists()


# -- what is compared with it ------------------------------------------------------------------------


def test_compare_takes_the_dense_model_in_the_order_of_the_pruned_one(tmp_path: Path) -> None:
    dense = decoder()
    saved(tmp_path / "dense", dense)
    pruned, _, report = applied(tmp_path, SPEC)
    said = ok("compare", tmp_path / "dense", tmp_path / "out", "--json")
    assert "is compared in the order that" in said.err
    found = valid(said.out, "compare")
    assert found["totals"]["altered"] == 0
    assert found["totals"]["zeroed"] == report["totals"]["pruned"]
    saved(tmp_path / "tuned", {name: tensor * 1.01 for name, tensor in pruned.items()})
    said = ok("compare", tmp_path / "tuned", tmp_path / "out", "--json")
    assert "is compared in the order" not in said.err
    assert valid(said.out, "compare")["totals"]["zeroed"] == 0


def test_compare_takes_statistics_in_that_order_too(tmp_path: Path) -> None:
    dense = decoder()
    saved(tmp_path / "dense", dense)
    save_statistics(tmp_path / "stats.safetensors", "hessian", inputs_of(dense))
    _, _, report = applied(tmp_path, SPEC.replace("[scope", f"{ADMM}[scope"))
    said = ok(
        "compare",
        tmp_path / "dense",
        tmp_path / "out",
        "--stats",
        tmp_path / "stats.safetensors",
        "--json",
        "-q",
    )
    errors = {one["name"]: one["output_error"] for one in valid(said.out, "compare")["tensors"]}
    for one in report["tensors"]:
        assert errors[one["name"]] == pytest.approx(one["output_error"], rel=1e-3)


def test_masks_say_in_which_order_they_are(tmp_path: Path) -> None:
    saved(tmp_path / "dense", decoder())
    pruned, _, _ = applied(tmp_path, SPEC)
    saved(tmp_path / "tuned", {name: tensor + 0.5 for name, tensor in pruned.items()})
    said = ok("reapply", tmp_path / "tuned", tmp_path / "out", "-o", tmp_path / "final")
    assert "these masks are in the order that" in said.err
    final = load_file(tmp_path / "final" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(final[name] == 0, pruned[name] == 0)


# -- how it is done ----------------------------------------------------------------------------------


def test_the_same_bytes_for_every_number_of_jobs(tmp_path: Path) -> None:
    saved(tmp_path / "dense", decoder())
    spec = write_spec(tmp_path, SPEC)
    for jobs in (1, 3):
        ok("apply", tmp_path / "dense", spec, "-o", tmp_path / f"out{jobs}", "-q", "--jobs", jobs)
    one, three = (
        (tmp_path / f"out{jobs}" / "sparseprune" / "permutations.safetensors").read_bytes() for jobs in (1, 3)
    )
    assert one == three


def test_orders_by_a_sample_of_rows_never_prune_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseprune.execution import permuting

    monkeypatch.setattr(permuting, "SAMPLED", 200)
    monkeypatch.setattr(permuting, "_PIECE", 10)
    dense = decoder()
    saved(tmp_path / "dense", dense)
    pruned, orders, report = applied(tmp_path, SPEC)
    assert all(one["pruned_after"] <= one["pruned_before"] for one in report["permuted"])
    assert any(one["pruned_after"] < one["pruned_before"] for one in report["permuted"])
    assert_same(pruned, again(tmp_path, reordered(dense, orders, dims(tmp_path)), PLAIN))


def test_a_run_that_is_continued_takes_over_its_orders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "dense", decoder())
    spec = write_spec(tmp_path, SPEC)
    ok("apply", tmp_path / "dense", spec, "-o", tmp_path / "whole", "-q")
    searched: list[object] = []
    work = runner.Runner.do

    def do(self: Any, current: Any, chunk: Any, io: Any) -> Any:
        if type(current).__name__ == "FindOrders":
            searched.append(current)
        elif len(searched) == 4:
            raise KeyboardInterrupt
        return work(self, current, chunk, io)

    monkeypatch.setattr(runner.Runner, "do", do)
    with pytest.raises(KeyboardInterrupt):
        sparseprune.apply(tmp_path / "dense", spec, tmp_path / "out", jobs=1)
    assert len(searched) == 4
    searched.append(None)
    ok("apply", tmp_path / "dense", spec, "-o", tmp_path / "out", "-q", "--jobs", 1)
    assert len(searched) == 5
    for name in (
        "model.safetensors",
        "sparseprune/permutations.safetensors",
        "sparseprune/masks.safetensors",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_plan_counts_the_memory_of_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "dense", decoder())
    peaks = []
    for slabs in (0, 1 << 30):
        monkeypatch.setattr(permutable, "_BESIDE", slabs)
        result = sparseprune.plan(tmp_path / "dense", write_spec(tmp_path, SPEC))
        peaks.append(result.bytes.peak or 0)
    assert peaks[1] > peaks[0] + (1 << 29)


def test_weights_that_are_not_finite_are_refused_as_without_it(tmp_path: Path) -> None:
    dense = decoder()
    dense["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")
    saved(tmp_path / "dense", dense)
    said = refused("apply", tmp_path / "dense", write_spec(tmp_path, SPEC), "-o", tmp_path / "out", "-q")
    assert "down_proj.weight: NaN at [0, 0]" in said.err


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_move_with_the_outputs_that_they_are_of(tmp_path: Path, groups: int) -> None:
    dense = decoder()
    saved(tmp_path / "dense", dense)
    layers = {name: one for name, one in dense.items() if name.startswith("model.layers") and one.ndim == 2}
    inputs, gradients = statistics.drawn(layers, groups=groups)
    statistics.save(tmp_path / "stats.safetensors", inputs, gradients)
    pruned, orders, report = applied(tmp_path, SPEC + ADMM)
    assert len(report["permuted"]) == 4
    assert not report["not_permuted"]
    assert {one["metric"] for one in report["tensors"] if one["name"] in layers} == {"loss"}
    along = dims(tmp_path)
    for name, order in orders.items():
        if name in layers and along[name] == 1:
            inputs[name] = inputs[name][order][:, order]
        elif name in layers:
            block_diag: Any = torch.block_diag
            whole = block_diag(*gradients[name].reshape(groups, -1, gradients[name].shape[-1]))
            blocks = whole[order][:, order].reshape(groups, len(order) // groups, groups, -1)
            own = [blocks[place, :, place] for place in range(groups)]
            gradients[name] = torch.stack(own) if groups > 1 else own[0]
    other = tmp_path / "again"
    saved(other / "dense", reordered(dense, orders, along))
    inputs, gradients = (
        {name: one.contiguous() for name, one in some.items()} for some in (inputs, gradients)
    )
    statistics.save(other / "stats.safetensors", inputs, gradients)
    ok("apply", other / "dense", write_spec(other, PLAIN + ADMM), "-o", other / "out", "-q")
    assert_same(pruned, load_file(other / "out" / "model.safetensors"))
