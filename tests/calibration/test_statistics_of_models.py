"""What calibrate writes, against inputs that hooks and plain products gather from the same model."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparseprune.calibration import Sequences
from sparseprune.calibration.collecting import _batches
from sparseprune.calibration.stored import siblings
from sparseprune.calibration.watching import Product, Watch
from sparseprune.checkpoint import open_statistics
from tests.calibration.models import (
    BEGIN,
    END,
    albert,
    dbrx,
    deberta,
    llama4_with_pictures,
    longformer,
    nomic_bert,
    save,
    save_family,
    t5,
    text,
)
from tests.commands import ok

pytestmark = pytest.mark.usefixtures("quiet_transformers")

LENGTH, SEQUENCES = 14, 6
PADDED = 16  # by models that read eight tokens at a time
FAMILIES = [
    "llama", "llama_without_head", "qwen3", "gemma", "gemma3_with_pictures", "phi3", "gpt2", "mixtral",
    "mixtral_of_two", "deberta_v2", "deberta_v2_with_keys_of_positions", "albert", "t5", "qwen3_moe",
    "deepseek_v3", "gpt_oss", "llama4", "llama4_with_pictures", "bert", "bert_for_masked_lm", "nomic_bert",
    "longformer", "dbrx",
]  # fmt: skip


def calibrate(folder: Path, out: Path, *words: object) -> Any:
    """Run it; gives the report."""
    (out.parent / "words.txt").write_text(text())
    sizes = ("--length", LENGTH, "--sequences", SEQUENCES, "--no-special")
    said = ok("calibrate", folder, "--text", out.parent / "words.txt", *sizes, "-o", out, "--json", *words)
    return json.loads(said.out)


def sequences(folder: Path, out: Path) -> torch.Tensor:
    """The sequences that a run with these sizes draws, from the tokenizer and the same seed alone."""
    import random

    from transformers import PreTrainedTokenizerFast

    own: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = [own.convert_tokens_to_ids(word) for word in text().split()]
    inside = LENGTH - 2
    drawn = sorted(random.Random(0).sample(range(len(ids) // inside), SEQUENCES))
    return torch.tensor([[BEGIN, *ids[inside * one : inside * (one + 1)], END] for one in drawn])


def without_padding(given: torch.Tensor) -> torch.Tensor:
    """Inputs of a module, sequences first, without what the model adds behind them."""
    if given.shape[:2] in {(LENGTH, SEQUENCES), (PADDED, SEQUENCES)}:
        given = given.transpose(0, 1)
    return given[:, :LENGTH] if given.shape[:2] == (SEQUENCES, PADDED) else given


def inputs_by_hooks(model: Any, ids: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For each weight of a linear layer, seen (out, in), its inputs of tokens that count; experts by hand."""
    counts = torch.ones_like(ids, dtype=torch.bool)
    counts[:, 0] = counts[:, -1] = False
    rows_that_count = counts.reshape(-1)
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(name: str, weight: torch.Tensor, given: torch.Tensor) -> None:
        given = without_padding(given)
        rows = given.reshape(-1, given.shape[-1]).double()
        if len(rows) == len(rows_that_count):
            rows = rows[rows_that_count]
        found[name] = (weight, torch.cat([found[name][1], rows]) if name in found else rows)

    def of_linear(name: str, module: Any, turned: bool) -> Any:
        weight = module.weight.T if turned else module.weight
        return lambda _, given: keep(name, weight, given[0])

    hooks = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, torch.nn.Linear) or kind == "Conv1D":
            hooks.append(module.register_forward_pre_hook(of_linear(name, module, kind == "Conv1D")))
        elif kind.endswith("Experts") and hasattr(module, "gate_up_proj") and kind != "Llama4TextExperts":
            hook = of_experts(name, module, rows_that_count, keep)
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        elif kind == "DbrxExperts":
            hooks.append(module.register_forward_pre_hook(of_dbrx(name, module, rows_that_count, keep)))
    run(model, ids)
    for hook in hooks:
        hook.remove()
    return found


def run(model: Any, ids: torch.Tensor) -> None:
    """A forward pass over text alone."""
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    if model.config.model_type == "longformer":  # its first token sees all others
        more = {"attention_mask": torch.ones_like(ids), "global_attention_mask": torch.zeros_like(ids)}
        more["global_attention_mask"][:, 0] = 1
    with torch.no_grad():
        (model.language_model if model.config.model_type == "llama4" else model)(input_ids=ids, **more)


def of_experts(name: str, module: Any, rows_that_count: torch.Tensor, keep: Any) -> Any:
    """A hook that keeps what both matrices of each expert meet, by the experts' own rule."""
    turned = type(module).__name__ == "GptOssExperts"

    def hook(_: Any, given: Any, words: Any) -> None:
        hidden = given[0] if given else words["hidden_states"]
        hidden = hidden.reshape(-1, hidden.shape[-1])
        chosen = given[1] if len(given) > 1 else words["router_indices"]
        for expert, (up, down) in enumerate(zip(module.gate_up_proj, module.down_proj, strict=True)):
            here = (chosen == expert).any(-1) & rows_that_count
            wide, narrow = (up.T, down.T) if turned else (up, down)
            middle = hidden[here] @ wide.T
            if turned:
                middle = module._apply_gate(middle + module.gate_up_proj_bias[expert])
            else:
                gate, value = middle.chunk(2, -1)
                middle = module.act_fn(gate) * value
            keep(f"{name}.{expert}.up", wide, hidden[here])
            keep(f"{name}.{expert}.down", narrow, middle)

    return hook


def of_dbrx(name: str, module: Any, rows_that_count: torch.Tensor, keep: Any) -> Any:
    """As `of_experts`, of experts that lie one below another."""

    def hook(_: Any, given: Any) -> None:
        hidden, chosen = given[0].reshape(-1, given[0].shape[-1]), given[1]
        stacks = [one.unflatten(0, (module.num_experts, -1)) for one in module.mlp.parameters()]
        for expert, (gate, up, down) in enumerate(zip(*stacks, strict=True)):
            here = hidden[(chosen == expert).any(-1) & rows_that_count]
            keep(f"{name}.{expert}.gate", gate, here)
            keep(f"{name}.{expert}.up", up, here)
            middle = module.mlp.activation_fn(here @ gate.T) * (here @ up.T)
            keep(f"{name}.{expert}.down", down.T, middle)

    return hook


def mixtral_of_two() -> Any:
    """Both experts get every token, but not in the order of the sequence."""
    import transformers

    kind: Any = transformers.MixtralConfig
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 2, "num_key_value_heads": 4, "vocab_size": 64}
    return transformers.MixtralForCausalLM(kind(**small, **experts))


def expected(
    stored: torch.Tensor, dim: int, found: dict[str, Any], *, routed: bool
) -> list[tuple[int, torch.Tensor]]:
    """The moments of a stored tensor's inputs: of whatever has it among its rows, looked up by value.

    The mean over the rows that it met; of experts, their sum by the tokens of the text, so that they compare.
    """
    matrices = stored if stored.ndim == 3 else stored[None]
    moments = []
    for matrix in matrices:
        rows = matrix if dim == stored.ndim - 1 else matrix.T
        homes = [
            inputs
            for weight, inputs in found.values()
            if weight.shape[1] == rows.shape[1]
            and any(
                torch.equal(weight[begin : begin + len(rows)], rows[: len(weight)])
                for begin in range(max(1, len(weight) - len(rows) + 1))
            )
        ]
        (inputs,) = homes
        rows_or_tokens = SEQUENCES * (LENGTH - 2) if routed else len(inputs)
        moments.append((len(inputs), inputs.T @ inputs / rows_or_tokens))
    return moments


BUILT = {
    "mixtral_of_two": mixtral_of_two,
    "deberta_v2": lambda: deberta(share_att_key=True),
    "deberta_v2_with_keys_of_positions": lambda: deberta(share_att_key=False),
    "albert": albert,
    "t5": t5,
    "nomic_bert": nomic_bert,
    "dbrx": dbrx,
    "longformer": longformer,
    "llama4_with_pictures": llama4_with_pictures,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_the_inputs_that_hooks_see(family: str, tmp_path: Path) -> None:
    import transformers

    folder = tmp_path / "model"
    if family in BUILT:
        save(BUILT[family](), folder)
    else:
        save_family(family, folder)
    report = calibrate(folder, tmp_path / "stats")
    dense = {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}
    config: Any = transformers.AutoConfig.from_pretrained(folder)
    config._experts_implementation = "eager"
    for part in (getattr(config, "text_config", None),):
        if part is not None:
            part._experts_implementation = "eager"
    kind: Any = getattr(transformers, config.architectures[0])
    model = kind.from_pretrained(folder, config=config).eval()
    found = inputs_by_hooks(model, sequences(folder, tmp_path))
    statistics = open_statistics(tmp_path / "stats")
    written = load_file(tmp_path / "stats" / "statistics.safetensors")
    assert statistics.of.keys() <= dense.keys()
    apart = {"router", "gate", "experts", "k_proj", "v_proj"} if family == "nomic_bert" else set()
    apart |= {"router", "gate", "experts"}
    linear = sum(not apart & set(name.split(".")) for name in found)
    assert len(statistics.of) >= linear
    compared = 0
    for name, one in statistics.of.items():
        if "router" in name or name.endswith(("mlp.gate.weight", "block_sparse_moe.gate.weight")):
            continue  # no linear layer of torch's: its input is that of the layer's experts
        if family.startswith("llama4") and ".experts." in name:
            continue
        assert one.input_dim is not None
        moment = written[one.stored.name]
        routed = ".experts." in name and "shared" not in name
        shape, dim = one.stacked(tuple(dense[name].shape), one.input_dim)
        wanted = expected(dense[name].reshape(shape), dim, found, routed=routed)
        assert one.tokens == tuple(count for count, _ in wanted)
        for mine, (_, theirs) in zip(moment if moment.ndim == 3 else moment[None], wanted, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)
            compared += 1
    assert compared >= linear
    assert report["tokens"] == SEQUENCES * (LENGTH - 2)


class Seen:
    """The products of a pass."""

    def __init__(self) -> None:
        self.products: list[Product] = []

    @property
    def by_name(self) -> dict[str, Product]:
        return {product.parameter: product for product in self.products}

    def product(self, product: Product) -> None:
        self.products.append(product)

    def gradients(self, product: Product, chosen: Any, rows: torch.Tensor) -> None:
        raise AssertionError("there is no pass back")

    def gated(self, product: Product, matrix: int, *which: object) -> None:
        raise AssertionError("there are no experts")


def test_parameters_that_share_a_storage_are_told_apart() -> None:
    """As transformers loads parts of one stored tensor."""
    fused = torch.arange(48.0).reshape(12, 4)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4, bias=False) for name in "qkv"})
    for module, part in zip(model.values(), fused.chunk(3), strict=True):
        module.weight = torch.nn.Parameter(part, requires_grad=False)
    assert len({one.untyped_storage().data_ptr() for one in model.parameters()}) == 1
    seen = Seen()
    inputs = torch.ones(3, 4)
    with closing(Watch(model, seen)) as watch:
        watch.begin(torch.ones(1, 3, dtype=torch.bool))
        with watch:
            for name in "qvk":
                model[name](inputs)
    assert [one.parameter for one in seen.products] == ["q.weight", "v.weight", "k.weight"]


def test_matrices_of_other_inputs_are_no_siblings_though_their_names_differ_in_a_number() -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in ("w1", "w2", "fc1", "fc2")})
    assert siblings({"w1.weight": 0, "fc1.weight": 0}, model) == {}
    experts = torch.nn.ModuleDict({"experts": torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in "ab"])})
    assert siblings({"experts.0.weight": 0}, experts) == {"experts.1.weight": "experts.0.weight"}
    named = torch.nn.ModuleDict({f"expert_{number}": torch.nn.Linear(4, 4) for number in range(2)})
    assert siblings({"expert_1.weight": 0}, named) == {"expert_0.weight": "expert_1.weight"}


@pytest.mark.parametrize(
    ("count", "length", "sizes"),
    [(5, 14, [5]), (14, 14, [13, 1]), (1, 1, [1]), (70, 64, [63, 1, 6]), (3, 5000, [1, 1, 1])],
)
def test_a_batch_has_no_square_shape(count: int, length: int, sizes: list[int]) -> None:
    ids = torch.arange(count * length).reshape(count, length)
    parts = list(_batches(Sequences(ids, ids >= 0, count), None))
    assert [len(part) for part in parts] == sizes
    assert [number for part in parts for number in part] == list(range(count))
    assert {len(part) for part in _batches(Sequences(ids, ids >= 0, count), 1 << 40)} == {1}


def test_padding_that_a_model_adds_itself_counts_for_no_matrix() -> None:
    model = longformer().eval()
    ids = torch.randint(4, 60, (3, 13), generator=torch.Generator().manual_seed(1))
    counted = torch.ones(3, 13, dtype=torch.bool)
    counted[:, 0] = False
    seen = Seen()
    with closing(Watch(model, seen)) as watch:
        watch.begin(counted)
        with watch, torch.no_grad():
            model(input_ids=ids)
    of_layer = {name.partition(".0.")[2]: product for name, product in seen.by_name.items() if ".0." in name}
    for name, places_first in (("intermediate.dense.weight", False), ("attention.self.query.weight", True)):
        product = of_layer[name]
        assert product.counted is not None
        rows = product.inputs.reshape(*((16, 3) if places_first else (3, 16)), 32)  # eight at a time
        own = rows[1:13] if places_first else rows[:, 1:13]
        assert torch.equal(product.inputs[product.counted], own.reshape(-1, 32))
