"""What calibrate keeps of experts, and the score reap, against plain loops over tokens and experts."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparseprune
from sparseprune.checkpoint import open_statistics
from sparseprune.errors import SpecError
from sparseprune.spec import find_spec
from tests.calibration.models import dbrx, save, save_family, tokenizer
from tests.calibration.test_gradients import loaded
from tests.calibration.test_statistics_of_models import calibrate, sequences
from tests.families import zoo
from tests.samples import write_spec

pytestmark = pytest.mark.usefixtures("quiet_transformers")

REAP = find_spec("experts-by-router").text.replace(
    'kind = "router"\nnorm = 2', 'kind = "reap"\nfile = "stats"'
)
Sums = dict[tuple[str, int], tuple[int, float, float]]


def activated(module: Any, expert: int, rows: torch.Tensor) -> torch.Tensor:
    """The outputs of one expert, by the weights of its class."""
    kind = type(module).__name__
    if kind == "DbrxExperts":
        stacks = [one.unflatten(0, (module.num_experts, -1)) for one in module.mlp.parameters()]
        gate, up, down = (one[expert] for one in stacks)
        made: torch.Tensor = (module.mlp.activation_fn(rows @ gate.T) * (rows @ up.T)) @ down
        return made
    if kind == "GptOssExperts":
        middle = rows @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
        return module._apply_gate(middle) @ module.down_proj[expert] + module.down_proj_bias[expert]  # type: ignore[no-any-return]
    if kind == "Llama4TextExperts":
        gate, up = (rows @ module.gate_up_proj[expert]).chunk(2, -1)
        return (up * module.act_fn(gate)) @ module.down_proj[expert]  # type: ignore[no-any-return]
    gate, up = (rows @ module.gate_up_proj[expert].T).chunk(2, -1)
    return (module.act_fn(gate) * up) @ module.down_proj[expert].T  # type: ignore[no-any-return]


class Loops:
    """Hooks that add up what each expert does with each token that counts, one after the other."""

    def __init__(self, model: Any, counted: torch.Tensor) -> None:
        self.tokens = counted.reshape(-1).nonzero().reshape(-1).tolist()
        self.states: dict[str, torch.Tensor] = {}  # that a router sends on, by its module
        self.sums: Sums = {}
        for name, module in model.named_modules():
            kind = type(module).__name__
            if kind == "Llama4TextMoe":
                module.register_forward_pre_hook(partial(self.keep, name))
            elif kind == "Llama4TextExperts":
                module.register_forward_pre_hook(partial(self.of_scaled, name))
            elif kind.endswith("Experts"):
                module.register_forward_pre_hook(partial(self.of_chosen, name), with_kwargs=True)

    def keep(self, name: str, _: Any, given: Any) -> None:
        self.states[name] = given[0].reshape(-1, given[0].shape[-1])

    def of_chosen(self, name: str, module: Any, given: Any, words: Any) -> None:
        hidden = given[0] if given else words["hidden_states"]
        hidden = hidden.reshape(-1, hidden.shape[-1])
        names = ("router_indices", "routing_weights")
        chosen, gates = given[1:3] if len(given) > 2 else (words[one] for one in names)
        for token in self.tokens:
            for expert, gate in zip(chosen[token].tolist(), gates[token].tolist(), strict=True):
                norm = activated(module, expert, hidden[token : token + 1]).norm()
                self.add((name, expert), gate, gate * float(norm))

    def of_scaled(self, name: str, module: Any, given: Any) -> None:
        """Rows have their gates in them: by how much they are the states that were sent on."""
        states = self.states[name.rpartition(".")[0]]
        for expert, rows in enumerate(given[0].unflatten(0, (-1, len(states)))):
            for token in self.tokens:
                if rows[token].any():
                    norm = activated(module, expert, rows[token : token + 1]).norm()
                    self.add((name, expert), float((rows[token] / states[token]).median()), float(norm))

    def add(self, expert: tuple[str, int], gate: float, norm: float) -> None:
        tokens, gates, norms = self.sums.get(expert, (0, 0.0, 0.0))
        self.sums[expert] = (tokens + 1, gates + gate, norms + norm)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "llama4", "dbrx"])
def test_tokens_gates_and_norms_of_experts_are_those_of_plain_loops(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if family == "dbrx":
        save(dbrx(), folder)
    else:
        save_family(family, folder)
    report = calibrate(folder, tmp_path / "stats")
    ids = sequences(folder, tmp_path)
    counted = torch.ones_like(ids, dtype=torch.bool)
    counted[:, 0] = counted[:, -1] = False
    model = loaded(folder)
    loops = Loops(model, counted)
    with torch.no_grad():
        model(input_ids=ids)
    written = load_file(tmp_path / "stats" / "statistics.safetensors")
    found: list[Any] = []
    for one in report["experts"]:
        assert torch.equal(written[one["name"]].reshape(-1, 3).T, torch.tensor(
            [one["tokens"], one["gate"], one["gated_norm"]], dtype=torch.float64
        ))  # fmt: skip
        found += zip(one["tokens"], one["gate"], one["gated_norm"], strict=True)
    mine = torch.tensor(sorted(sums for sums in found if sums[0]), dtype=torch.float64)
    wanted = torch.tensor(sorted(loops.sums.values()), dtype=torch.float64)
    torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)


def test_experts_whose_tokens_are_taken_behind_a_dimension_of_one_are_routed(tmp_path: Path) -> None:
    zoo.save(zoo.SPECIES["switch_transformers"], tmp_path)
    folder = tmp_path / "switch_transformers"
    tokenizer().save_pretrained(folder)
    report = calibrate(folder, tmp_path / "stats")
    layers = {one["name"].split(".experts.")[0] for one in report["experts"]}
    assert sum(sum(one["tokens"]) for one in report["experts"]) == len(layers) * report["tokens"]
    experts = [one for one in report["matrices"] if ".experts." in one["name"]]
    assert {one["divided_by"] for one in experts} == {report["tokens"]}


def statistics_of(folder: Path, sums: torch.Tensor) -> dict[str, torch.Tensor]:
    """The statistics in a folder, with these sums for the experts of every layer."""
    file = folder / "statistics.safetensors"
    tensors = load_file(file)
    metadata = _metadata(file)
    for name, one in tensors.items():
        if name.endswith(".routing"):
            own = sums if one.ndim == 2 else sums[int(name.split(".experts.")[1].split(".")[0])]
            tensors[name] = own.clone()
    save_file(tensors, file, metadata)
    return tensors


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata())


def kept(folder: Path, spec: Path, out: Path) -> set[tuple[int, ...]]:
    """Which experts of each layer the masks keep."""
    sparseprune.mask(folder, spec, out, force=True)
    found: dict[str, set[int]] = {}
    for name, mask in sparseprune.load_masks(out).items():
        layer = name.split(".experts")[0]
        alone = re.search(r"\.experts\.(\d+)\.", name)
        rows, first = ([mask], int(alone[1])) if alone else (list(mask), 0)
        found.setdefault(layer, set()).update(first + at for at, row in enumerate(rows) if row.all())
    return {tuple(sorted(experts)) for experts in found.values()}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_reap_keeps_experts_with_the_largest_mean_of_gate_times_norm(family: str, tmp_path: Path) -> None:
    save_family(family, tmp_path / "model")
    calibrate(tmp_path / "model", tmp_path / "stats")
    count = len(open_experts(tmp_path / "stats"))
    sums = torch.zeros(count, 3, dtype=torch.float64)
    sums[:, 0] = torch.arange(1, count + 1)
    sums[:, 2] = torch.tensor([5.0, 4.0, 9.0, 8.0])[:count]  # means 5, 2, 3, 2
    spec = write_spec(tmp_path, REAP.replace("sparsity = 0.25", "sparsity = 0.5"))
    statistics_of(tmp_path / "stats", sums)
    assert kept(tmp_path / "model", spec, tmp_path / "masks") == {(0, 2)}
    sums[2] = 0.0  # met no token
    sums[3, 2] = 0.0  # met some, in vain
    statistics_of(tmp_path / "stats", sums)
    assert kept(tmp_path / "model", spec, tmp_path / "masks") == {(0, 1)}
    spec = write_spec(tmp_path, REAP)
    assert kept(tmp_path / "model", spec, tmp_path / "masks") == {(0, 1, 3)}


def open_experts(folder: Path) -> range:
    """The numbers of the experts that statistics tell of."""
    names = [name for name, one in open_statistics(folder).of.items() if one.routing is not None]
    stored = open_statistics(folder).of[names[0]].routing
    assert stored is not None
    if len(stored.shape) == 2:
        return range(stored.shape[0])
    return range(len({name.split(".experts.")[1].split(".")[0] for name in names}))


def test_reap_asks_for_statistics_that_tell_of_experts(tmp_path: Path) -> None:
    save_family("mixtral", tmp_path / "model")
    calibrate(tmp_path / "model", tmp_path / "stats")
    file = tmp_path / "stats" / "statistics.safetensors"
    tensors = {name: one for name, one in load_file(file).items() if not name.endswith(".routing")}
    save_file(tensors, file, _metadata(file))
    with pytest.raises(SpecError, match=r"stats: does not tell what expert.* did on text: calibrate again"):
        kept(tmp_path / "model", write_spec(tmp_path, REAP), tmp_path / "masks")


def test_reap_ranks_nothing_but_experts(tmp_path: Path) -> None:
    save_family("mixtral", tmp_path / "model")
    calibrate(tmp_path / "model", tmp_path / "stats")
    text = """
    version = 1
    [scope.rows]
    tensors = "model.layers.{layer}.self_attn.q_proj.weight"
    block = [1, -1]
    shape = []
    nnz = 4
    score = { kind = "reap", file = "stats" }
    """
    with pytest.raises(SpecError, match=r"rows\[layer=0\] is no expert, and kind reap ranks experts"):
        kept(tmp_path / "model", write_spec(tmp_path, text), tmp_path / "masks")
