"""Every action on every model of the zoo: what comes of it, told by the model's own class.

`python -m tests.families.harness [--json FILE] [NAME...]` prints a table, types by actions, and the totals.
"""

import argparse
import inspect
import json
import random
import re
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
import transformers
from msgspec import Struct, to_builtins
from safetensors.torch import load_file

import sparseprune
from sparseprune.checkpoint import open_statistics
from sparseprune.errors import SparsepruneError
from sparseprune.spec import TensorInfo, find_spec
from sparseprune.spec.naming import OTHER_TOWERS
from sparseprune.spec.structures import Index, find_layers
from tests.calibration.gradients import Met, gradients_of
from tests.calibration.models import BEGIN, END, text, tokenizer
from tests.families.checkpoints import read
from tests.families.zoo import SPECIES, Species, output, run, save, wanted_by_llama4

Kind = Literal["right", "refused", "none", "unbound", "wrong"]
REMOVALS = ("mlp-channels", "heads", "experts", "expert-channels", "layers", "hidden")
ACTIONS = ("2of4", *REMOVALS, "calibrate", "gradients")
SETTINGS = {"layers": {"sparsity": "0.34"}, "hidden": {"multiple": "8"}}  # of few layers a quarter is none
_OF_TWO = ("gemma4_text", "gemma4_shared", "codegen", "diffllama")  # heads, in some layers or blocks
OWN_SETTINGS = {
    **{(name, "heads"): {"sparsity": "0.5"} for name in _OF_TWO},
    ("dinov2", "mlp-channels"): {"sparsity": "0.5"},  # an integer ratio counts them in halves
}
# Types whose layers share biases of heads, so that the same heads go in all of them.
ALIGNED = {"t5", "t5_gated", "mt5", "switch_transformers"}
_UNFED = "layer == 0 if 'visual' in stack else layer >= 2"
CHOSEN_LAYERS: Mapping[str, str] = {
    **dict.fromkeys(("swin", "swinv2"), "layer >= 2"),
    **dict.fromkeys(("hiera", "resnet", "resnet_bottleneck"), "layer == 1"),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe_thinker"), _UNFED),
    "modernbert": "layer == 1",
    "albert": "layer == 0",
}
"""Of types in which not every layer can go: what holds for those that do."""
CLOSE, APART = 1e-5, 1e-3
ROUNDED = 2e-4  # where weights are scaled, and rounded once more
REACHED = 0.95  # of the layers' matrices
TOKENS, SEQUENCES = 14, 6

_RECURRENT = {"mamba", "mamba2", "falcon_mamba"}
_CONVOLUTIONS = {"resnet", "resnet_bottleneck", "mobilenet_v2"}
WITHOUT: Mapping[str, set[str]] = {
    "mlp-channels": _RECURRENT | _CONVOLUTIONS,
    "heads": _RECURRENT | _CONVOLUTIONS | {"convnext", "convnextv2", "rwkv"},
    "layers": {"albert", "mobilenet_v2"},
    "hidden": _CONVOLUTIONS,
    "experts": {"doge"},
    "expert-channels": {"doge"},
}
"""Types that have no such structure; others have experts where a config counts them."""
_COUNTS_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class Outcome(Struct, frozen=True):
    """What came of an action: `detail` is the reason, or the share that was reached."""

    kind: Kind
    detail: str = ""


class Zoo(Struct, frozen=True):
    """One model of the zoo on disk, and what it computes; its class leaves tensors `beside` alone."""

    species: Species
    folder: Path
    dense: torch.Tensor
    beside: str = ""

    def load(self, folder: Path) -> Any:
        """The model by its own class; ValueError where a tensor does not find its place."""
        kind = getattr(transformers, self.species.model)
        told = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = kind.from_pretrained(folder, **told)
        report["unexpected_keys"] = [
            name for name in report["unexpected_keys"] if not (self.beside and re.match(self.beside, name))
        ]
        amiss = {key: sorted(map(str, report[key]))[:3] for key in _AMISS if report[key]}
        if amiss:
            raise ValueError(f"does not load: {amiss}")
        return model.eval()


_AMISS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def settle(species: Species, folder: Path) -> Zoo:
    """Its checkpoint, with a tokenizer, below a folder."""
    path = save(species, folder)
    tokenizer().save_pretrained(path)
    one = Zoo(species, path, torch.empty(0))
    return Zoo(species, path, output(species, one.load(path)))


def examine(one: Zoo, action: str) -> Outcome:
    """Do it beside the checkpoint, and judge what comes of it."""
    try:
        with tempfile.TemporaryDirectory(dir=one.folder.parent) as place:
            return _ACT[action](one, action, Path(place))
    except Exception as error:  # noqa: BLE001 - a traceback is an outcome, too
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Outcome("wrong", f"{type(error).__name__} at {where.name}:{where.lineno}: {error}")


def _plan(one: Zoo, action: str, place: Path) -> Outcome:
    try:
        totals = sparseprune.plan(one.folder, action, place / "pruned").totals
    except SparsepruneError as error:
        return Outcome("unbound" if _binds_nothing(error) else "refused", str(error))
    left = ", ".join(each.name for each in totals.uncovered)
    share = totals.layer_coverage or 0.0
    detail = "" if share == 1 else f"{share:.1%}, without {left}"
    return Outcome("right" if share >= REACHED else "unbound", detail)


def _binds_nothing(error: SparsepruneError) -> bool:
    return "under names that are known" in str(error) or "of which where leaves none" in str(error)


def _remove(one: Zoo, action: str, place: Path) -> Outcome:
    """Of all stacks, or where a tower beside the text model refuses, of the text model alone."""
    whole = _remove_from(one, action, place, "")
    text = text_stack(one.folder)
    if whole.kind != "refused" or not text or "expert" in action:
        return whole
    alone = _remove_from(one, action, place, text)
    if alone.kind == "wrong":
        return alone
    return Outcome("right", f"of {text} alone") if alone.kind == "right" else whole


def text_stack(folder: Path) -> str:
    """The list of layers of a text model that has other towers beside it; empty without any."""
    config = json.loads((folder / "config.json").read_text())
    tensors = [TensorInfo(name, "F32", tuple(each.shape)) for name, each in read(folder).items()]
    stacks = {str(dict(each.place)["stack"]) for each in find_layers(Index.of(tensors, config))}
    texts = {stack for stack in stacks if not OTHER_TOWERS.search(stack)}
    return next(iter(texts)) if len(texts) == 1 < len(stacks) else ""


def _remove_from(one: Zoo, action: str, place: Path, stack: str) -> Outcome:
    settings = {**SETTINGS.get(action, {}), **OWN_SETTINGS.get((one.species.name, action), {})}
    settings |= {"only": f"'{stack}'"} if stack else {}
    there = has(one, action)
    spec: str | Path = "heads-aligned" if action == "heads" and one.species.name in ALIGNED else action
    if action == "layers" and one.species.name in CHOSEN_LAYERS:
        spec, settings["sparsity"] = place / "layers.toml", "1"
        chosen = f'"only in stack and ({CHOSEN_LAYERS[one.species.name]})"'
        spec.write_text(find_spec("layers").text.replace('"only in stack"', chosen))
    try:
        removal = sparseprune.remove(one.folder, spec, output=place / "smaller", set=settings)
    except SparsepruneError as error:
        if error.exit_code != 2:
            raise
        if not _binds_nothing(error):
            return Outcome("refused", str(error))
        return Outcome("unbound" if there else "none", str(error))
    if not there:
        return Outcome("wrong", "there is no such structure")
    sparseprune.apply(one.folder, spec, place / "masked", set=settings, mask_format=None)
    skips = any("are skipped" in line for line in removal.warnings)
    for skipped in {action == "layers", skips}:
        if wrong := _difference(one, action, place, skipped=skipped):
            return Outcome("wrong", wrong)
    share = removal.totals.declared_coverage
    return Outcome("right", "" if share in {1, None} else f"{share:.1%} of {removal.totals.covers}")


def _difference(one: Zoo, action: str, place: Path, *, skipped: bool) -> str:
    """How the outputs of the smaller model are not those of the masked one; empty where they are.

    `skipped`: not those of the dense one whose modules are skipped that the masked one has without weights.
    Some models make large what is a rounding error at first: these are compared in double precision.
    """
    smaller, masked = one.load(place / "smaller"), one.load(place / "masked")
    if skipped:
        masked = skip(one.load(one.folder), empty_members(masked))
    apart = close = ROUNDED if action == "hidden" else CLOSE
    for precise in (False, True):
        for model in (smaller, masked) if precise else ():
            model.double().set_experts_implementation("eager")
        found = output(one.species, smaller)
        with never_chosen(masked, smaller) if action == "experts" else nullcontext():
            expected = output(one.species, masked)
        if not found.isfinite().all() or found.shape != expected.shape:
            return f"outputs are {list(found.shape)}, finite: {bool(found.isfinite().all())}"
        scale = max(1.0, float(expected.abs().max()))
        apart = float((found - expected).abs().max()) / scale
        if apart <= close:
            same = float((found - one.dense).abs().max()) / scale < APART
            return "computes what the dense model does" if same else ""
    return f"outputs differ by {apart:.2g} of the largest"


def empty_members(model: Any) -> list[str]:
    """The members of lists that have weights, and none but zeros; of nested ones the outermost."""
    lists = [
        name
        for name, each in model.named_modules()
        if isinstance(each, torch.nn.ModuleList | torch.nn.Sequential)
    ]
    members = [
        f"{name}.{number}" for name in lists for number, _ in model.get_submodule(name).named_children()
    ]
    weights = {name: [*model.get_submodule(name).parameters()] for name in members}
    empty = [name for name in members if weights[name] and not any(each.any() for each in weights[name])]
    return [name for name in empty if not any(name.startswith(f"{other}.") for other in empty)]


def skip(model: Any, members: Sequence[str]) -> Any:
    """The model in which these modules pass on what they get."""

    def passed(_module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], made: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *made[1:]) if isinstance(made, tuple | list) else given

    for name in members:
        model.get_submodule(name).register_forward_hook(passed, with_kwargs=True)
    return model


def has(one: Zoo, action: str) -> bool:
    """Whether the model has the structure at all."""
    if one.species.name in WITHOUT[action]:
        return False
    if "expert" not in action:
        return True
    config = json.loads((one.folder / "config.json").read_text())
    parts = [part for part in (config, *config.values()) if isinstance(part, dict)]
    return any((part.get(key) or 0) > 1 for part in parts for key in _COUNTS_EXPERTS)


@contextmanager
def never_chosen(masked: Any, smaller: Any) -> Iterator[None]:
    """What it means that a router has lost experts: in the masked model their logits are -inf.

    Routers are told by their weights, which have fewer rows in the smaller model; which rows these are, by
    their values. What corrects the choice of experts is -inf as well.
    """
    left = {**dict(smaller.named_parameters()), **dict(smaller.named_buffers())}
    lost: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}
    for name, mine in [*masked.named_parameters(), *masked.named_buffers()]:
        if name not in left or left[name].shape == mine.shape:
            continue
        ours, theirs = mine.detach(), left[name].detach()
        if ours.ndim == 2 and ours.shape[1] == theirs.shape[1]:
            gone = ~(ours[:, None] == theirs).all(-1).any(-1)
            lost[mine.data_ptr(), tuple(mine.shape)] = gone
        elif "correction" in name or name.endswith("expert_bias"):
            ours.view(-1)[~torch.isin(ours.view(-1), theirs.view(-1))] = float("-inf")
    if not lost:
        raise ValueError("no router has lost rows")
    own = torch.nn.functional.linear

    def linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        result = own(states, weight, bias)
        gone = lost.get((weight.data_ptr(), tuple(weight.shape)))
        return result if gone is None else result.masked_fill(gone, float("-inf"))

    with patch.object(torch.nn.functional, "linear", linear):
        yield


def _calibrate(one: Zoo, action: str, place: Path) -> Outcome:
    (place / "words.txt").write_text(text())
    try:
        sparseprune.calibrate(
            one.folder,
            [place / "words.txt"],
            place / "stats",
            length=TOKENS,
            sequences=SEQUENCES,
            special=False,
        )
    except SparsepruneError as error:
        return Outcome("refused", str(error))
    model = one.load(one.folder)
    seen = _seen_by_hooks(model, _sequences())
    stored = {
        name: each for file in one.folder.glob("*.safetensors") for name, each in load_file(file).items()
    }
    moments = load_file(place / "stats" / "statistics.safetensors")
    compared = set()
    for name, statistic in open_statistics(place / "stats").of.items():
        for weight, inputs in seen.items():
            rows = stored[name].mT if statistic.input_dim == 0 else stored[name]
            if rows.ndim != 2 or not _is_part(rows, weight.detach()):
                continue
            wanted = inputs.T @ inputs / len(inputs)
            mine = moments[statistic.stored.name].double().reshape(wanted.shape)
            apart = float((mine - wanted).norm() / wanted.norm())
            if apart > 1e-4:
                return Outcome("wrong", f"{name}: the moment differs by {apart:.2g}")
            compared.add(weight)
    missing = len(seen) - len(compared)
    return Outcome("right", f"without {missing} of {len(seen)} linear layers" if missing else "")


def _gradients(one: Zoo, action: str, place: Path) -> Outcome:
    """The same of gradients, of all tokens, for every matrix that Python code multiplies with."""
    (place / "words.txt").write_text(text())
    sizes: dict[str, Any] = {"length": TOKENS, "sequences": SEQUENCES, "gradients": True}
    try:
        report = sparseprune.calibrate(one.folder, [place / "words.txt"], place / "stats", **sizes)
    except SparsepruneError as error:
        return Outcome("refused", str(error))
    if lost := [each.name for each in report.matrices if each.tokens == 0 and ".experts." not in each.name]:
        return Outcome("wrong", f"{lost[0]}: no inputs are counted on the way that goes back")
    model = one.load(one.folder)
    model.set_experts_implementation("eager")
    ids = _sequences()
    met = gradients_of(model, ids, torch.ones_like(ids, dtype=torch.bool), there)
    stored = {
        name: each for file in one.folder.glob("*.safetensors") for name, each in load_file(file).items()
    }
    moments = load_file(place / "stats" / "statistics.safetensors")
    compared: set[int] = set()
    for name, statistic in open_statistics(place / "stats").of.items():
        if statistic.gradients is None:
            continue
        shape, dim = statistic.stacked(tuple(stored[name].shape), statistic.input_dim or 0)
        mine = moments[statistic.gradients.name].double()
        stack = stored[name].reshape(shape)
        stack = stack if dim == len(shape) - 1 else stack.mT
        if stack.ndim == 2:  # parts that the model has apart have gradients of their own
            stack = stack.reshape(1 if mine.ndim == 2 else len(mine), -1, shape[dim])
        for rows, moment in zip(stack, mine.reshape(-1, *mine.shape[-2:]), strict=True):
            alike = [each for each in met if _is_part(rows, each.weight)]
            compared |= {id(each) for each in alike}
            for each in alike:
                if (apart := _apart(moment, rows, each)) > 1e-3:
                    return Outcome("wrong", f"{name}: the moment of its gradients differs by {apart:.2g}")
    reached = [each for each in met if any(bool(rows.any()) for rows in each.gradients)]
    missing = sum(id(each) not in compared for each in reached)
    detail = f"without {missing} of {len(reached)} matrices" if missing else ""
    return Outcome("right", detail or ", ".join(each.name for each in report.without_gradients))


def _apart(moment: torch.Tensor, rows: torch.Tensor, met: Met) -> float:
    """How far a moment is from that of the gradients at the outputs that these rows of a weight make."""
    begin = next(at for at in range(len(met.weight)) if torch.equal(met.weight[at], rows[0]))
    gradients = torch.cat(met.gradients)[:, begin : begin + len(rows)]
    wanted = gradients.T @ gradients / max(1, len(gradients))
    return float((moment - wanted).norm() / max(1e-30, float(wanted.norm())))


def there(model: Any, ids: torch.Tensor) -> Any:
    """What a model makes of text, in one pass that can go back."""
    words = inspect.signature(model.forward).parameters
    offered = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    offered["global_attention_mask"] = torch.zeros_like(ids).index_fill_(1, ids.new_zeros(1), 1)
    offered |= {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with wanted_by_llama4():
        return model(**{word: one for word, one in offered.items() if word in words})


def _sequences() -> torch.Tensor:
    """The sequences that a run with these sizes draws, from the words and the same seed alone."""
    own, inside = tokenizer(), TOKENS - 2
    ids = [own.convert_tokens_to_ids(word) for word in text().split()]
    drawn = sorted(random.Random(0).sample(range(len(ids) // inside), SEQUENCES))
    return torch.tensor([[BEGIN, *ids[inside * at : inside * (at + 1)], END] for at in drawn])


def _seen_by_hooks(model: Any, ids: torch.Tensor) -> dict[torch.Tensor, torch.Tensor]:
    """The inputs of every linear layer that the text meets, of the tokens that are its own, by its weight."""
    seen: dict[torch.Tensor, torch.Tensor] = {}

    length = ids.shape[1]
    padded = hasattr(model.config, "attention_window")  # its own padding lies behind the text

    def keep(module: Any, given: tuple[torch.Tensor, ...]) -> None:
        states = given[0].detach().double()
        behind = padded and states.ndim == 3 and len(states) == len(ids) and states.shape[1] > length
        rows = states[:, 1 : length - 1] if behind or states.shape[:2] == ids.shape else states[:0]
        rows = rows.reshape(-1, rows.shape[-1])
        seen[module.weight] = torch.cat([seen[module.weight], rows]) if module.weight in seen else rows

    hooks = [
        module.register_forward_pre_hook(keep)
        for module in model.modules()
        if type(module) is torch.nn.Linear
    ]
    given = {"input_ids": ids}
    if "global_attention_mask" in inspect.signature(model.forward).parameters:  # the first token sees all
        given["global_attention_mask"] = torch.zeros_like(ids).index_fill_(1, ids.new_zeros(1), 1)
    run(model, given)
    for hook in hooks:
        hook.remove()
    return {weight: inputs for weight, inputs in seen.items() if len(inputs)}


def _is_part(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether some rows of a weight, all together, are these."""
    places = max(1, len(weight) - len(rows) + 1)
    return weight.shape[1] == rows.shape[1] and any(
        torch.equal(weight[begin : begin + len(rows)], rows) for begin in range(places)
    )


_ACT: Mapping[str, Callable[[Zoo, str, Path], Outcome]] = {
    "2of4": _plan,
    **dict.fromkeys(REMOVALS, _remove),
    "calibrate": _calibrate,
    "gradients": _gradients,
}
CALIBRATED = frozenset([one.name for one in SPECIES.values() if one.given == "text"][::3])


def results(names: Sequence[str]) -> Iterator[tuple[str, dict[str, Outcome]]]:
    """The outcomes of all actions, a model at a time."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            one = settle(SPECIES[name], Path(folder))
            actions = ACTIONS if name in CALIBRATED else ACTIONS[:-2]
            yield name, {action: examine(one, action) for action in actions}


def main() -> None:
    """Print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found: dict[str, dict[str, Outcome]] = {}
    totals: dict[str, Counter[str]] = {action: Counter() for action in ACTIONS}
    sys.stdout.write("".join([" " * 26, *(f"{action:17}" for action in ACTIONS)]).rstrip() + "\n")
    for name, outcomes in results(asked.names or list(SPECIES)):
        found[name] = outcomes
        cells = [f"{name:26}"]
        for action in ACTIONS:
            outcome = outcomes.get(action)
            cells.append(f"{outcome.kind.replace('wrong', 'WRONG') if outcome else '':17}")
            totals[action].update([outcome.kind] if outcome else [])
        sys.stdout.write("".join(cells).rstrip() + "\n")
        sys.stdout.flush()
    for action, counts in totals.items():
        kinds = ", ".join(f"{number} {kind}" for kind, number in counts.most_common())
        sys.stdout.write(f"{action}: {kinds}\n")
    for name, outcomes in found.items():
        for action, outcome in outcomes.items():
            if outcome.detail and outcome.kind not in {"refused", "none"}:
                sys.stdout.write(f"{name}, {action}: {outcome.kind}: {outcome.detail.splitlines()[0]}\n")
    if asked.json:
        asked.json.write_text(json.dumps(to_builtins(found), indent=1))


if __name__ == "__main__":
    main()
