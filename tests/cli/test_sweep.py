"""`apply --text`: what a sweep writes, against two whole models of transformers with hooks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from msgspec import Struct
from safetensors.torch import load_file

from sparseprune.calibration import Sequences, make_sequences
from tests.calibration.models import made, tokenizer
from tests.commands import Said, run
from tests.families import zoo

pytestmark = pytest.mark.usefixtures("quiet_transformers")

LENGTH, MANY, FEW = 12, 36, 8  # enough tokens for residuals of 48 inputs, and too few
Tensors = Mapping[str, torch.Tensor]

HALF = """
version = 1
[reconstruct]
method = "refit"
target = "TARGET"
[scope.matrix]
structure = "matrices"
block = [1, 1]
shape = [1, 4]
nnz = 2
"""


class Matrix(Struct, frozen=True):
    """A matrix in a block by its module, and the modules whose inputs (<) or outputs (>) its outputs join."""

    module: str
    beside: tuple[str, ...] = ()
    inputs_first: bool = False  # as Conv1D has them


Stages = tuple[tuple[Matrix, ...], ...]
_LLAMA_ATTENTION = (
    tuple(Matrix(f"self_attn.{one}_proj") for one in "qkv"),
    (Matrix("self_attn.o_proj", ("<input_layernorm",)),),
)
_GATE_AND_UP = tuple(Matrix(f"mlp.{one}_proj") for one in ("gate", "up"))
LLAMA: Stages = (
    *_LLAMA_ATTENTION,
    _GATE_AND_UP,
    (Matrix("mlp.down_proj", ("<post_attention_layernorm",)),),
)
GEMMA3: Stages = (
    tuple(Matrix(f"self_attn.{one}_proj") for one in "qkv"),
    (Matrix("self_attn.o_proj"),),  # a norm stands before the sum
    _GATE_AND_UP,
    (Matrix("mlp.down_proj"),),
)
GPT2: Stages = (
    (Matrix("attn.c_attn", inputs_first=True),),
    (Matrix("attn.c_proj", ("<ln_1",), inputs_first=True),),
    (Matrix("mlp.c_fc", inputs_first=True),),
    (Matrix("mlp.c_proj", ("<ln_2",), inputs_first=True),),
)
BERT: Stages = (
    tuple(Matrix(f"attention.self.{one}") for one in ("query", "key", "value")),
    (Matrix("attention.output.dense", ("<attention.self.query",)),),
    (Matrix("intermediate.dense"),),
    (Matrix("output.dense", ("<intermediate.dense",)),),
)
GPTJ: Stages = (  # attention and MLP at the same time, whose outputs are each other's addends
    (*(Matrix(f"attn.{one}_proj") for one in "qkv"), Matrix("mlp.fc_in")),
    (
        Matrix("attn.out_proj", ("<ln_1", ">mlp.fc_out")),
        Matrix("mlp.fc_out", ("<ln_1", ">attn.out_proj")),
    ),
)
OF: Mapping[str, Stages] = {"llama": LLAMA, "gemma3": GEMMA3, "gpt2": GPT2, "bert": BERT, "gptj": GPTJ}
BLOCKS = {"bert": "encoder.layer", "gpt2": "transformer.h", "gptj": "transformer.h"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and a text; nothing in it is changed by tests."""
    folder = made(tmp_path_factory.mktemp("sweep"), "llama", "gemma3", "gpt2", "bert", "mixtral")
    species = next(one for one in zoo.ZOO if one.name == "gptj")
    zoo.save(species, folder)
    tokenizer().save_pretrained(folder / "gptj")
    return folder


def spec(folder: Path, text: str = HALF, target: str = "dense") -> Path:
    path = folder / "spec.toml"
    path.write_text(text.replace("TARGET", target))
    return path


def swept(home: Path, model: str, out: Path, by: object, *words: object, sequences: int = MANY) -> Said:
    sizes = ("--length", LENGTH, "--sequences", sequences)
    return run("apply", home / model, by, "--text", home / "words.txt", *sizes, "-o", out, *words)


def windows(home: Path, sequences: int) -> Sequences:
    """The tokens that a sweep with so many sequences goes over."""
    documents = [(home / "words.txt").read_text()]
    return make_sequences(documents, tokenizer(), sequences, LENGTH, 0)


def whole(path: Path) -> Any:
    """The plain model of a checkpoint."""
    kind: Any = transformers.AutoModelForCausalLM
    if "bert" in path.name:
        kind = transformers.AutoModel
    return kind.from_pretrained(path, dtype=torch.float32).eval()


@contextmanager
def recorded(model: Any, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """The rows of first inputs ("<module") and outputs (">module") of a forward pass."""
    found: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(_: Any, inputs: Any, kwargs: Any, output: Any) -> None:
            given = inputs[0] if inputs else next(iter(kwargs.values()))
            for sign, one in (("<", given), (">", output)):
                if isinstance(one, torch.Tensor):
                    found[sign + name] = one.detach().reshape(-1, one.shape[-1]).double().clone()

        return keep

    hooks = [model.get_submodule(one).register_forward_hook(hook(one), with_kwargs=True) for one in names]
    try:
        yield found
    finally:
        for one in hooks:
            one.remove()


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    groups = weight.abs().reshape(len(weight), -1, 4)
    first = groups.argsort(dim=-1, descending=True, stable=True)[..., :2]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, first, value=True).flatten(-2)


def solved(
    weight: torch.Tensor, mask: torch.Tensor, moment: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """Each row by itself: the survivors w of w H' = C there, H' damped and C what is `wanted`."""
    damping = 0.01 * moment.diagonal().mean()
    damped = moment + damping * torch.eye(len(moment), dtype=torch.float64)
    wanted = wanted + damping * weight
    found = torch.zeros_like(weight)
    for row, kept in enumerate(mask):
        found[row, kept] = torch.linalg.solve(damped[kept][:, kept], wanted[row, kept])
    return found


def oracle(
    home: Path, model: str, target: str, sequences: int, stages: Stages = ()
) -> dict[str, torch.Tensor]:
    """The weights that a sweep should write, by their names in the model; by default of all stages."""
    dense, pruned = whole(home / model), whole(home / model)
    drawn = windows(home, sequences)
    counted = drawn.counted.reshape(-1)
    stem = BLOCKS.get(model, "model.layers")
    written = {}
    for layer in range(len(dense.get_submodule(stem))):
        for stage in stages or OF[model]:
            names = [one.module for one in stage] + [one[1:] for each in stage for one in each.beside]
            names = [f"{stem}.{layer}.{one}" for one in dict.fromkeys(names)]
            seen = []
            for each in (dense, pruned):
                with recorded(each, names) as found, torch.no_grad():
                    each(drawn.ids)
                seen.append({name: rows[counted] for name, rows in found.items()})
            for one in stage:
                name = f"{stem}.{layer}.{one.module}"
                joined = [f"{each[0]}{stem}.{layer}.{each[1:]}" for each in one.beside]
                found_there = rebuilt(dense, name, one.inputs_first, target, seen, joined)
                written[f"{name}.weight"] = found_there
            for one in stage:
                name = f"{stem}.{layer}.{one.module}.weight"
                turned = written[name].T if one.inputs_first else written[name]
                written[name] = turned.float()
                pruned.get_parameter(name).data.copy_(turned)
    return written


def rebuilt(
    dense: Any, name: str, inputs_first: bool, target: str, seen: list[dict[str, Any]], joined: list[str]
) -> torch.Tensor:
    """One matrix, (outputs, inputs), by the inputs that both models have for it."""
    weight = dense.get_submodule(name).weight.detach().double()
    weight = weight.T if inputs_first else weight
    theirs, mine = (one[f"<{name}"] for one in seen)
    moment, mixed = mine.T @ mine / len(mine), theirs.T @ mine / len(mine)
    wanted = weight @ (moment if target == "own" else mixed)
    if target == "dense" and len(mine) >= 8 * weight.shape[1]:
        for one in joined:
            wanted = wanted + (seen[0][one] - seen[1][one]).T @ mine / len(mine)
    return solved(weight, two_of_four(weight), moment, wanted)


def same(found: Tensors, wanted: Tensors) -> None:
    """Equal to the precision with which weights are solved for, for every tensor that is wanted."""
    for name, one in wanted.items():
        stored = next(tensor for key, tensor in found.items() if key.endswith(name) or name.endswith(key))
        assert torch.equal(stored == 0, one == 0), name
        assert float((stored - one).norm() / one.norm()) < 3e-3, name


@pytest.mark.parametrize(
    ("model", "target", "sequences"),
    [
        *(("llama", target, sequences) for target in ("dense", "own") for sequences in (MANY, FEW)),
        *(("gemma3", "dense", MANY), ("gpt2", "dense", MANY), ("bert", "dense", MANY), ("bert", "own", FEW)),
        ("gptj", "dense", MANY),
    ],
)
def test_a_sweep_writes_what_two_whole_models_with_hooks_say(
    model: str, target: str, sequences: int, home: Path, tmp_path: Path
) -> None:
    said = swept(home, model, tmp_path / "out", spec(tmp_path, target=target), sequences=sequences)
    assert said.code == 0, said.err
    same(load_file(tmp_path / "out" / "model.safetensors"), oracle(home, model, target, sequences))


@pytest.mark.parametrize("place", range(4), ids=["qkv", "o", "gate_up", "down"])
def test_a_stage_that_is_pruned_alone_has_the_dense_pass_beside_it_in_every_layer(
    place: int, home: Path, tmp_path: Path
) -> None:
    """Whatever stands behind it in a layer is not pruned, and no pass is needed for it."""
    stage = LLAMA[place]
    names = ", ".join(f'"model.layers.{{layer}}.{one.module}.weight"' for one in stage)
    rule = HALF.replace('structure = "matrices"', f"tensors = [{names}]")
    said = swept(home, "llama", tmp_path / "out", spec(tmp_path, rule), sequences=MANY)
    assert said.code == 0, said.err
    found = load_file(tmp_path / "out" / "model.safetensors")
    same(found, oracle(home, "llama", "dense", MANY, (stage,)))
