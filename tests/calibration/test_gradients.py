"""Second moments of gradients that calibrate writes, against what autograd gives for each output."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparseprune.api.calibrating import Collecting
from sparseprune.api.calibrating import calibrate as calibrate_alone
from sparseprune.api.run import Run
from sparseprune.api.windows import Windows
from sparseprune.calibration.gradients import differentiable
from sparseprune.calibration.watching import Product, Watch
from sparseprune.checkpoint import open_statistics
from tests.calibration.gradients import Met, gradients_of
from tests.calibration.models import made, save, save_family, text, tokenizer
from tests.calibration.test_statistics_of_models import BUILT, calibrate, sequences
from tests.commands import ok, refused
from tests.families import zoo

pytestmark = pytest.mark.usefixtures("quiet_transformers")

SHARED_KEYS = "gemma4_shared"  # its last layers have keys of earlier ones
FAMILIES = [
    "llama", "phi3", "gpt2", "bert", "bert_for_masked_lm", "t5", "albert",
    "deberta_v2_with_keys_of_positions",
    "nomic_bert", "longformer", "mixtral", "gpt_oss", "llama4", "dbrx", SHARED_KEYS,
]  # fmt: skip
UNREACHED = {"bert": ["pooler.dense.weight"], "albert": ["pooler.weight"]}
UNREACHED["longformer"] = UNREACHED["bert"]


SIZES = ("--length", 12, "--sequences", 5)


def run(model: Any, ids: torch.Tensor) -> Any:
    """The outputs of a forward pass over text alone."""
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    if model.config.model_type == "longformer":  # its first token sees all others
        more = {"attention_mask": torch.ones_like(ids), "global_attention_mask": torch.zeros_like(ids)}
        more["global_attention_mask"][:, 0] = 1
    return (model.language_model if model.config.model_type == "llama4" else model)(input_ids=ids, **more)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a llama and a mixtral; nothing in it is changed by tests."""
    return made(tmp_path_factory.mktemp("gradients"), "llama", "mixtral")


def loaded(folder: Path) -> Any:
    """The model of a checkpoint, each expert a product of its own."""
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(folder)
    for part in (config, getattr(config, "text_config", None)):
        if part is not None:
            part._experts_implementation = "eager"
    kind: Any = getattr(transformers, config.architectures[0])
    return kind.from_pretrained(folder, config=config).eval()


def expected(rows: torch.Tensor, met: list[Met]) -> tuple[int, torch.Tensor]:
    """The tokens and the moment of the gradients of a matrix: of what has its rows, looked up by value."""
    (found,) = [
        (one, begin)
        for one in met
        if one.weight.shape[1] == rows.shape[1]
        for begin in range(len(one.weight) - len(rows) + 1)
        if torch.equal(one.weight[begin : begin + len(rows)], rows)
    ]
    one, begin = found
    gradients = torch.cat(one.gradients)[:, begin : begin + len(rows)]
    return len(gradients), gradients.T @ gradients / max(1, len(gradients))


# Where all tokens count, those that a router chose for an expert are known without asking the model.
EXPERTS = {"mixtral", "mixtral_of_two", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4", "dbrx"}


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_the_gradients_that_autograd_has(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if family in BUILT:
        save(BUILT[family](), folder)
    elif family == SHARED_KEYS:
        save(zoo.build(zoo.SPECIES[family]), folder, torch.float64)
    else:
        save_family(family, folder)
    special = ["--special"] if family in EXPERTS else []
    report = calibrate(folder, tmp_path / "stats", "--gradients", *special)
    dense = {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}
    ids = sequences(folder, tmp_path)
    counted = torch.ones_like(ids, dtype=torch.bool)
    if not special:
        counted[:, 0] = counted[:, -1] = False
    met = gradients_of(loaded(folder), ids, counted, run)
    statistics = open_statistics(tmp_path / "stats")
    written = load_file(tmp_path / "stats" / "statistics.safetensors")
    counts = {one["weight"]: one["tokens"] for one in report["gradients"]}
    without = [one["name"] for one in report["without_gradients"]]
    assert without == UNREACHED.get(family, [])
    assert statistics.of.keys() == counts.keys() | set(without)
    for name, one in statistics.of.items():
        assert (one.gradients is None) == (name in without)
        if one.gradients is None or one.input_dim is None:
            continue
        shape, dim = one.stacked(tuple(dense[name].shape), one.input_dim)
        stack = dense[name].reshape(shape)
        stack = stack if dim == len(shape) - 1 else stack.mT
        moments, tokens = written[one.gradients.name], counts[name]
        if isinstance(tokens, int):  # parts that the model has apart are matrices of their own here
            stack = stack.reshape(len(moments) if moments.ndim == 3 else 1, -1, stack.shape[-1])
            moments, tokens = moments.reshape(len(stack), *moments.shape[-2:]), [tokens] * len(stack)
        for rows, moment, count in zip(stack, moments, tokens, strict=True):
            number, wanted = expected(rows, met)
            assert (name, count) == (name, number)
            # Sums have 24 bits, and moments of shared keys are far from 1. Gradients themselves differ, too,
            # as processors sum in orders of their own: by 2e-5 of the largest moment of T5's first queries.
            largest = float(wanted.abs().max())
            atol = 1e-6 * largest if family == SHARED_KEYS else max(1e-6, 3e-5 * largest)
            torch.testing.assert_close(moment.double(), wanted, rtol=2e-4, atol=atol)


def collected(home: Path, model: str, out: Path, *words: object) -> dict[str, torch.Tensor]:
    """What calibrate writes, with gradients."""
    text = ("--text", home / "words.txt", *SIZES)
    ok("calibrate", home / model, *text, "-o", out, "--gradients", "-q", *words)
    return load_file(out / "statistics.safetensors")


def test_neither_memory_nor_batches_change_what_is_collected(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparseprune.calibration import collecting

    one = collected(home, "mixtral", tmp_path / "one")
    many = collected(home, "mixtral", tmp_path / "many", "--memory", 4 * 64 * 64)
    assert (tmp_path / "one/statistics.safetensors").read_bytes() == (
        tmp_path / "many/statistics.safetensors"
    ).read_bytes()
    assert one.keys() == many.keys()
    monkeypatch.setattr(collecting, "_BATCH_VALUES", 1)  # draws are those of a sequence, in any batch
    for name, alone in collected(home, "mixtral", tmp_path / "alone").items():
        torch.testing.assert_close(alone, one[name], rtol=1e-3, atol=1e-5)


def test_a_seed_draws_the_same_labels_and_another_one_others(home: Path, tmp_path: Path) -> None:
    one, same, other = (
        collected(home, "llama", tmp_path / str(at), "--seed", seed, "--sequences", 40)  # all there are
        for at, seed in enumerate((0, 0, 1))
    )
    differs = {name for name in one if not torch.equal(one[name], other[name])}
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert differs == {name for name in one if name.endswith(".gradients")}


def test_large_outputs_have_gradients_in_groups_of_consecutive_ones(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparseprune.calibration import planning

    whole = collected(home, "mixtral", tmp_path / "whole")
    monkeypatch.setattr(planning, "_GROUP", 20)
    for name, one in collected(home, "mixtral", tmp_path / "groups").items():
        if not name.endswith(".gradients"):
            assert torch.equal(one, whole[name])
        elif one.ndim == 2:
            assert len(one) <= 20
        else:
            assert len(one) == -(-len(whole[name]) // 20)
            groups = whole[name].unflatten(0, (len(one), -1)).unflatten(-1, (len(one), -1))  # type: ignore[no-untyped-call]
            torch.testing.assert_close(one, torch.stack([groups[at, :, at] for at in range(len(one))]))


def test_outputs_without_equal_groups_have_no_gradients_and_it_is_told(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparseprune.calibration import planning

    whole = collected(home, "llama", tmp_path / "whole")
    monkeypatch.setattr(planning, "_GROUP", 40)
    monkeypatch.setattr(planning, "_SMALLER", 1)
    found = collected(home, "llama", tmp_path / "some")
    large = {name for name, one in whole.items() if name.endswith(".gradients") and len(one) > 40}
    assert {len(whole[name]) for name in large} == {48, 64}
    assert found.keys() == whole.keys() - large
    without = json.loads((tmp_path / "some/sparseprune/report.json").read_text())["without_gradients"]
    assert {f"{one['name']}.gradients" for one in without} == large
    assert {one["why"] for one in without} == {
        f"its {outputs} outputs make no equal groups of 40 to 40" for outputs in (48, 64)
    }


def test_a_model_that_would_keep_keys_for_later_runs_its_blocks_again(tmp_path: Path) -> None:
    zoo.save(zoo.SPECIES["switch_transformers"], tmp_path)
    folder = tmp_path / "switch_transformers"
    tokenizer().save_pretrained(folder)
    (tmp_path / "words.txt").write_text(text())
    one = collected(tmp_path, "switch_transformers", tmp_path / "one")
    many = collected(tmp_path, "switch_transformers", tmp_path / "many", "--memory", 160_000)
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_gradients_alone_are_those_that_come_with_moments_of_inputs(home: Path, tmp_path: Path) -> None:
    both = collected(home, "mixtral", tmp_path / "both")
    asked = Collecting(
        checkpoint=home / "mixtral",
        windows=Windows([home / "words.txt"], 5, 12, None, 0),
        output=tmp_path / "alone",
        kind="hessian",
        device="cpu",
        memory=1 << 30,
        gradients="alone",
    )
    found = calibrate_alone(Run(None), asked)
    assert not found.matrices
    assert not found.experts
    alone = load_file(tmp_path / "alone/statistics.safetensors")
    assert alone.keys() == {name for name in both if name.endswith(".gradients")}
    assert all(torch.equal(alone[name], both[name]) for name in alone)
    assert not open_statistics(tmp_path / "alone").of
    stored = open_statistics(tmp_path / "alone").gradients
    together = open_statistics(tmp_path / "both")
    assert stored.keys() == together.gradients.keys() == together.of.keys()
    assert all(stored[name].name == one.gradients.name for name, one in together.of.items() if one.gradients)


def test_norms_have_no_gradients(home: Path, tmp_path: Path) -> None:
    text = ("--text", home / "words.txt")
    said = refused(
        "calibrate", home / "llama", *text, "-o", tmp_path / "stats", "--gradients", "--kind", "norm"
    )
    assert "--gradients and --kind norm contradict each other" in said.err


def test_what_has_gradients_and_what_has_none_is_told(home: Path, tmp_path: Path) -> None:
    save_family("bert", tmp_path / "bert")
    text = ("--text", home / "words.txt", *SIZES, "--no-special")
    said = ok("calibrate", tmp_path / "bert", *text, "-o", tmp_path / "stats", "--gradients")
    lines = said.err.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("gradients of "))
    assert lines[at] == "gradients of 12 matrices, in 59.39 kB"
    assert lines[at + 1] == "no gradients of 1 matrix"
    assert lines[at + 2] == "  pooler.dense.weight: no gradient of the loss reaches it"


class OneForAll(torch.nn.Module):
    """Its matrices stand in front of the inputs, and behind inputs that lie in another order."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.front = torch.nn.Parameter(torch.randn(6, 4, generator=generator))
        self.behind = torch.nn.Linear(6, 5)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        turned = self.front @ states.transpose(1, 2)  # (sequences, 6, places)
        made: torch.Tensor = self.behind(turned.permute(2, 0, 1)).tanh()
        return made.transpose(0, 1)


@pytest.mark.parametrize("sequences", [1, 3])
def test_a_matrix_that_torch_repeats_for_each_sequence_is_seen_there_and_back(sequences: int) -> None:
    model = OneForAll()
    states = torch.randn(sequences, 7, 4, generator=torch.Generator().manual_seed(1))
    seen = Kept()
    with closing(Watch(model, seen)) as watch, differentiable(model):
        watch.begin(torch.ones(sequences, 7, dtype=torch.bool), gradients=True)
        with watch:
            made = model(states.clone().requires_grad_())
            watch.turn()
            torch.autograd.backward([made], [torch.ones_like(made)])
    inputs = states.reshape(-1, 4)
    torch.testing.assert_close(seen.inputs["front"].T @ seen.inputs["front"], inputs.T @ inputs)
    middle = (states @ model.front.T).detach().requires_grad_()
    ends = (middle @ model.behind.weight.T + model.behind.bias).detach().requires_grad_()
    (of_ends,) = torch.autograd.grad(ends.tanh().sum(), ends)
    of_middle = (of_ends @ model.behind.weight).reshape(-1, 6)
    of_ends = of_ends.reshape(-1, 5)
    wanted = {"front": of_middle.T @ of_middle, "behind.weight": of_ends.T @ of_ends}
    assert seen.rows.keys() == wanted.keys()
    for name, rows in seen.rows.items():
        torch.testing.assert_close(rows.T @ rows, wanted[name].detach())


class Kept:
    """The inputs of products and the gradients at their outputs, by parameter."""

    def __init__(self) -> None:
        self.inputs: dict[str, torch.Tensor] = {}
        self.rows: dict[str, torch.Tensor] = {}

    def product(self, product: Product) -> None:
        self.inputs[product.parameter] = product.inputs.clone()

    def gradients(self, product: Product, chosen: Any, rows: torch.Tensor) -> None:
        assert chosen.keys() == {0}
        self.rows[product.parameter] = rows.clone()

    def gated(self, product: Product, matrix: int, *which: object) -> None:
        raise AssertionError("there are no experts")
