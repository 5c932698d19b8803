"""`--tune`: what survives of a layer is tuned towards the dense model, also after a run was interrupted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sparseprune
from sparseprune.calibration import make_sequences, sweeping
from sparseprune.calibration.sweeping import Sweep
from sparseprune.checkpoint import StagedOutput
from tests.calibration.models import made, tokenizer
from tests.commands import ok, refused, run, valid
from tests.families.models import build

pytestmark = pytest.mark.usefixtures("quiet_transformers")

SIZES = ("--length", "12", "--sequences", "12", "--jobs", "1")
LAYERS = ["model.layers.0", "model.layers.1"]
# Of o a part is reached, and of k a part is not tuned, so that none of either is. The rules of v are nested.
SPEC = """
version = 1
[reconstruct]
method = "refit"
tune = 6
[scope.matrix]
tensors = "model.layers.{layer}.{part}.{name:q_proj|gate_proj|up_proj|down_proj}.weight"
block = [1, 1]
shape = [1, 4]
nnz = 2
[scope.part]
tensors = "model.layers.{layer}.self_attn.o_proj.weight"
view = { offset = 0, shape = [16, 32], stride = [32, 1] }
block = [1, 1]
shape = [1, 4]
nnz = 2
[scope.upper]
tensors = "model.layers.{layer}.self_attn.k_proj.weight"
view = { offset = 0, shape = [8, 32], stride = [32, 1] }
block = [1, 1]
shape = [1, 4]
nnz = 2
[scope.lower]
tensors = "model.layers.{layer}.self_attn.k_proj.weight"
view = { offset = 256, shape = [8, 32], stride = [32, 1] }
block = [1, 1]
shape = [1, 4]
nnz = 2
reconstruct = { tune = 0 }
[scope.coarse]
tensors = "model.layers.{layer}.self_attn.v_proj.weight"
block = [1, 1]
shape = [1, 8]
nnz = 6
[scope.fine]
tensors = "model.layers.{layer}.self_attn.v_proj.weight"
within = "coarse"
block = [1, 1]
shape = [1, 4]
nnz = 2
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, a text and a spec; nothing in it is changed by tests."""
    folder = made(tmp_path_factory.mktemp("tuned"), "llama", "mixtral")
    (folder / "spec.toml").write_text(SPEC)
    return folder


def words(home: Path, out: Path, *more: object, by: str = "spec.toml", verb: str = "apply") -> list[object]:
    spec = home / by if by.endswith(".toml") else by
    return [verb, home / "llama", spec, "--text", home / "words.txt", *SIZES, "-o", out, *more]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def tuned(folder: Path, kind: str = "report") -> list[tuple[str, float, float]]:
    found = valid((folder / "sparseprune" / "report.json").read_text(), kind)["tuned"]
    return [(one["layer"], one["before"], one["after"]) for one in found]


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    """What a run writes that nothing interrupts."""
    ok(*words(home, home / "whole"))
    return home / "whole"


def states(model: Path, ids: torch.Tensor) -> list[torch.Tensor]:
    """The hidden states behind each layer."""
    found: list[torch.Tensor] = []
    loaded = build("llama").from_pretrained(model).eval()
    for layer in loaded.model.layers:
        layer.register_forward_hook(
            lambda _, __, made: found.append(made[0] if isinstance(made, tuple) else made)
        )
    with torch.no_grad():
        loaded(ids)
    return found


def test_the_loss_of_each_layer_falls_to_what_the_written_model_has(home: Path, whole: Path) -> None:
    ids = make_sequences([(home / "words.txt").read_text()], tokenizer(), 12, 12, 0).ids
    pairs = zip(states(home / "llama", ids), states(whole, ids), strict=True)
    apart = [float((one - other).square().sum()) for one, other in pairs]
    assert [layer for layer, _, _ in tuned(whole)] == LAYERS
    for (_, before, after), wanted in zip(tuned(whole), apart, strict=True):
        assert after < before
        assert after == pytest.approx(wanted, rel=1e-3)


def test_masks_are_those_without_tuning_and_what_no_rule_reaches_wholly_keeps_its_bits(
    home: Path, whole: Path, tmp_path: Path
) -> None:
    ok(*words(home, tmp_path / "out", "--tune", "0"))
    assert tuned(tmp_path / "out") == []
    before, after, dense = weights(tmp_path / "out"), weights(whole), weights(home / "llama")
    for name, one in after.items():
        if "layers.0" in name and "_proj" in name:  # what follows meets other inputs
            assert torch.equal(one == 0, before[name] == 0), name
            assert torch.equal(one, before[name]) == any(part in name for part in ("o_proj", "k_proj")), name
        elif "_proj" not in name:
            assert torch.equal(one, dense[name]), name
        else:
            assert float((one == 0).float().mean()) == pytest.approx(0.25 if "o_proj" in name else 0.5)


def test_bytes_do_not_depend_on_jobs_or_on_where_states_wait(
    home: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "TARGETS", 0)
    usual = Sweep.__init__

    def narrow(this: Any, loaded: Any, drawn: Any, reads: Any, where: Any, **named: Any) -> None:
        usual(this, loaded, drawn, reads, (where[0], 0), **named)

    monkeypatch.setattr(Sweep, "__init__", narrow)
    read: dict[str, Any] = {"text": [home / "words.txt"], "length": 12, "sequences": 12}
    (tmp_path / "states").mkdir()
    sparseprune.apply(
        home / "llama", home / "spec.toml", tmp_path / "out", jobs=2, scratch=tmp_path / "states", **read
    )
    assert not list((tmp_path / "states").glob("kept*"))
    assert (tmp_path / "out/model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


PLACES = {  # what is called last, and how often
    "before a layer is tuned": (Sweep, "tune", 1),
    "before the second layer is tuned": (Sweep, "tune", 2),
    "while what was tuned is written": (StagedOutput, "write_weight", 2),
    "between layers": (Sweep, "go", 1),
    "at the end": (Sweep, "go", 2),
}


@pytest.mark.parametrize("place", PLACES)
def test_an_interrupted_run_is_continued_to_the_same_bytes(
    place: str, home: Path, whole: Path, tmp_path: Path
) -> None:
    kind, method, times = PLACES[place]
    usual: Any = getattr(kind, method)
    seen = {"tuned": kind is not StagedOutput}

    def called(*arguments: Any, **named: Any) -> Any:
        nonlocal times
        times -= seen["tuned"]
        if not times:
            raise KeyboardInterrupt
        return usual(*arguments, **named)

    noting = StagedOutput.note

    def note(this: Any, key: str, record: object, *more: Any) -> None:
        seen["tuned"] |= key.startswith("tuning ")
        noting(this, key, record, *more)

    for _ in range(2):  # the second time a run that continues is interrupted at the same place
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StagedOutput, "note", note)
            patch.setattr(kind, method, called)
            assert run(*words(home, tmp_path / "out")).code == 130
        times, seen["tuned"] = 1 if kind is Sweep else 2, kind is not StagedOutput
    ok(*words(home, tmp_path / "out"))
    assert (tmp_path / "out/model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert tuned(tmp_path / "out") == tuned(whole)


def test_with_gradients_the_loss_is_that_in_their_metric(home: Path, tmp_path: Path) -> None:
    ok(*words(home, tmp_path / "out", "--gradients"))
    found = tuned(tmp_path / "out")
    assert [layer for layer, _, _ in found] == LAYERS
    assert all(after < before for _, before, after in found)


def test_what_remove_cuts_out_is_tuned_as_well(home: Path, tmp_path: Path) -> None:
    more = ("--reconstruct", "admm", "--tune", 6)
    ok(*words(home, tmp_path / "zeroed", *more, by="mlp-channels"))
    ok(*words(home, tmp_path / "smaller", *more, by="mlp-channels", verb="remove"))
    assert tuned(tmp_path / "zeroed") == tuned(tmp_path / "smaller", "remove") != []
    large, small = weights(tmp_path / "zeroed"), weights(tmp_path / "smaller")
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(large[name][:, large[name].any(0)], small[name])


def test_experts_are_tuned_with_the_layer_that_routes_to_them(home: Path, tmp_path: Path) -> None:
    given = ["2of4-admm", "--text", home / "words.txt", *SIZES, "-o", tmp_path / "out", "--tune", 4]
    ok("apply", home / "mixtral", *given)
    assert all(after < before for _, before, after in tuned(tmp_path / "out"))
    found = weights(tmp_path / "out")
    experts = [one for name, one in found.items() if ".w1." in name]
    assert experts
    assert all(float((one == 0).float().mean()) == 0.5 for one in experts)


def test_plan_tells_the_steps_and_the_memory_that_they_take(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(*more: object, weight: int) -> int:
        monkeypatch.setattr("sparseprune.api.sweeping._TUNED_BYTES", weight)
        plan = valid(ok(*words(home, tmp_path / "out", "--json", *more, verb="plan")).out, "plan")
        steps = [0] * 6 if more else [6, 6, 6, 0, 6, 6]
        assert [rule["reconstruct"]["tune"] for rule in plan["rules"]] == steps
        return int(plan["bytes"]["peak"])

    dense = weights(home / "llama")
    tuned = sum(one.numel() for name, one in dense.items() if "layers.1." in name and "_proj" in name)
    none = planned("--tune", 0, weight=21)
    usual, small, large = (planned(weight=number) for number in (21, 9000, 10000))
    assert none == usual < small  # matrices are worked on before, and take more
    assert large - small == 1000 * tuned
    monkeypatch.setattr("sparseprune.api.sweeping._TUNED_BYTES", 1 << 20)
    assert "a block, its second moments" in refused(*words(home, tmp_path / "out", "--memory", "1GB")).err


def test_tuning_is_refused_where_no_text_runs_and_towards_own_targets(home: Path, tmp_path: Path) -> None:
    ok("calibrate", home / "llama", "--text", home / "words.txt", *SIZES[:4], "-o", tmp_path / "stats")
    said = refused("apply", home / "llama", home / "spec.toml", "--stats", tmp_path / "stats")
    assert "tune: only a text runs through layers: give --text, or tune = 0" in said.err
    own = SPEC.replace("tune = 6", 'tune = 6\ntarget = "own"')
    (tmp_path / "own.toml").write_text(own)
    said = refused("apply", home / "llama", tmp_path / "own.toml", "--text", home / "words.txt", *SIZES)
    assert 'tunes towards the dense model: leave target = "own" out, or tune = 0' in said.err
    said = refused(*words(home, tmp_path / "out", "--tune", "-1"))
    assert "--tune" in said.err
