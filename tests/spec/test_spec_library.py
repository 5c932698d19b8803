"""Where specs come from; and every shipped spec and example on the names and shapes of real models."""

import re
from pathlib import Path

import pytest

from sparseprune.errors import SpecError
from sparseprune.spec import BoundSpec, SpecSource, TensorInfo, bind, find_spec, list_specs, parse_spec
from sparseprune.spec.parsing import ALIASES

SPECS = Path(__file__).parents[2] / "specs"
HIDDEN, WIDTH = 32, 96


def llama(prefix: str = "model.") -> list[TensorInfo]:
    """Names and (small) shapes of a Llama, Qwen or Mistral of 12 layers, four query heads to a key head."""
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 4, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (WIDTH, HIDDEN), "mlp.up_proj": (WIDTH, HIDDEN), "mlp.down_proj": (HIDDEN, WIDTH),
        "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    layers = [
        TensorInfo(f"{prefix}layers.{layer}.{name}.weight", "BF16", shape)
        for layer in range(12)
        for name, shape in shapes.items()
    ]
    ends = [("embed_tokens.weight", (100, HIDDEN)), ("norm.weight", (HIDDEN,))]
    head = [TensorInfo("lm_head.weight", "BF16", (100, HIDDEN))]
    return [*(TensorInfo(prefix + name, "BF16", shape) for name, shape in ends), *layers, *head]


def bert(prefix: str = "") -> list[TensorInfo]:
    """Names and (small) shapes of all-MiniLM-L6-v2: a BERT of 6 layers, with an integer buffer."""
    matrices = {
        "attention.self.query": (HIDDEN, HIDDEN),
        "attention.self.key": (HIDDEN, HIDDEN),
        "attention.self.value": (HIDDEN, HIDDEN),
        "attention.output.dense": (HIDDEN, HIDDEN),
        "intermediate.dense": (WIDTH, HIDDEN),
        "output.dense": (HIDDEN, WIDTH),
    }
    found = [
        TensorInfo("embeddings.position_ids", "I64", (1, 512)),
        TensorInfo("embeddings.word_embeddings.weight", "F32", (100, HIDDEN)),
        TensorInfo("pooler.dense.weight", "F32", (HIDDEN, HIDDEN)),
    ]
    for layer in range(6):
        for name, shape in matrices.items():
            stem = f"encoder.layer.{layer}.{name}"
            found += [
                TensorInfo(f"{stem}.weight", "F32", shape),
                TensorInfo(f"{stem}.bias", "F32", shape[:1]),
            ]
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            found.append(TensorInfo(f"encoder.layer.{layer}.{name}.weight", "F32", (HIDDEN,)))
    return [TensorInfo(prefix + each.name, each.dtype, each.shape) for each in found]


def shipped(name: str, tensors: list[TensorInfo]) -> BoundSpec:
    found = find_spec(name)
    return bind(parse_spec(found.text, found.source), tensors)


# ---- the shipped specs


@pytest.mark.parametrize("prefix", ["model.", "", "model.language_model."])
def test_2of4_reaches_all_projections_of_a_decoder(prefix: str) -> None:
    bound = shipped("2of4", llama(prefix))
    assert set(bound.covered) == {each.name for each in llama(prefix) if "_proj." in each.name}
    assert {instance.scope.blocks_per_scope for _, instance in bound.instances()} == {4}
    assert len(bound.covered) == 84


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_2of4_reaches_the_36_matrices_of_minilm(prefix: str) -> None:
    bound = shipped("2of4", bert(prefix))
    assert len(bound.covered) == 36
    assert all(
        re.search(r"encoder\.layer\.\d\..*(query|key|value|dense)\.weight", name) for name in bound.covered
    )


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_mlp_channels_couple_three_matrices_in_each_layer_of_a_decoder(prefix: str) -> None:
    bound = shipped("mlp-channels", llama(prefix))
    labels = [instance.label for _, instance in bound.instances()]
    assert labels == [f"mlp[stack={prefix}layers,layer={at},module=mlp]" for at in range(12)]
    assert {instance.budget.nnz for _, instance in bound.instances()} == {WIDTH - WIDTH // 4}
    assert bound.covered[:3] == tuple(
        f"{prefix}layers.0.mlp.{name}_proj.weight" for name in ("down", "gate", "up")
    )


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_mlp_channels_take_biases_along_and_leave_attention_alone(prefix: str) -> None:
    bound = shipped("mlp-channels", bert(prefix))
    assert len(bound.rules[0].instances) == 6
    assert set(bound.covered[:3]) == {
        f"{prefix}encoder.layer.0.intermediate.dense.weight",
        f"{prefix}encoder.layer.0.intermediate.dense.bias",
        f"{prefix}encoder.layer.0.output.dense.weight",
    }
    assert not [name for name in bound.covered if "attention" in name]
    assert {instance.budget.nnz for _, instance in bound.instances()} == {WIDTH - WIDTH // 4}


def test_unstructured_global_is_one_scope_over_all_projections() -> None:
    bound = shipped("unstructured-global", llama())
    ((_, instance),) = bound.instances()
    numel = sum(each.shape[0] * each.shape[1] for each in llama() if "_proj." in each.name)
    assert (instance.scope.blocks_per_scope, instance.budget.nnz) == (numel, numel // 2)
    assert instance.label == "everything"


@pytest.mark.parametrize("alias", ALIASES)
def test_an_earlier_name_is_the_spec_that_took_its_place(alias: str) -> None:
    assert alias not in list_specs()
    assert ALIASES[alias] in list_specs()
    assert find_spec(alias) == find_spec(ALIASES[alias])


def test_every_shipped_spec_is_in_the_reference_and_says_what_it_does() -> None:
    names = set(
        re.findall(
            r"^\| `([^`]+)` \|", (SPECS / "README.md").read_text("utf-8").split("## ")[0], re.MULTILINE
        )
    )
    assert names == set(list_specs())
    for name in list_specs():
        found = find_spec(name)
        assert re.match(r"# [A-Z0-9].+\.\n", found.text)
        assert (found.source, found.directory) == (f"{name}.toml", Path.cwd())


# ---- finding one


def test_a_file_is_read_with_its_directory(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes("\ufeff# é\r\nversion = 1\r\n".encode())
    assert find_spec(path) == SpecSource("# é\r\nversion = 1\r\n", str(path), tmp_path.resolve())
    assert find_spec(str(path)).source == str(path)


def test_an_existing_file_wins_over_a_shipped_name_and_a_directory_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("2of4").mkdir()
    assert find_spec("2of4").text == (SPECS / "2of4.toml").read_text("utf-8")
    assert find_spec("2of4").directory == tmp_path  # where what it names is looked for
    Path("2of4").rmdir()
    Path("2of4").write_text("mine")
    assert find_spec("2of4") == SpecSource("mine", "2of4", tmp_path.resolve())


def test_specs_are_listed_by_name() -> None:
    assert list_specs() == tuple(sorted(path.stem for path in SPECS.glob("*.toml")))
    assert {"2of4", "heads", "mlp-channels", "nofm", "unstructured-global"} <= {*list_specs()}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("2of44", "did you mean 2of4"),
        ("2of4.toml", "did you mean 2of4"),
        ("specs/bert-mlp-chanels.toml", "did you mean mlp-channels?"),
        ("decoder-gqa-head-global", "did you mean heads-global"),
        ("qqqq", "with sparseprune; `sparseprune specs` lists those that do."),
        ("", "is a directory"),
        ("a\0b", "neither a file nor a spec"),
        ("x" * 5000, "neither a file nor a spec"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_ones(
    name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError) as caught:
        find_spec(name)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 400


def test_the_answer_is_one_line_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError) as caught:
        find_spec("2of")
    assert str(caught.value) == (
        '"2of" is neither a file nor a spec that ships with sparseprune; did you mean 2of4? '
        "A spec of your own is named by its path, such as path/to/spec.toml"
    )


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="this is a directory, wanted a spec, which is a TOML file"):
        find_spec(tmp_path)
    binary = tmp_path / "model.safetensors"
    binary.write_bytes(b"ab\xff\x00")
    with pytest.raises(
        SpecError, match=r"model\.safetensors: byte 2 is not UTF-8: save the spec as UTF-8 text"
    ):
        find_spec(binary)
