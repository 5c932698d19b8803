"""Small random checkpoints of real model classes: saved, pruned, run, and run with units ablated by hooks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import sparseprune
from tests.commands import run
from tests.families.models import PICTURES, build

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A dense checkpoint on disk, the class that loads it and an input for its model."""

    folder: Path
    model_class: Any
    inputs: Mapping[str, torch.Tensor]

    def tensors(self) -> Tensors:
        return read(self.folder)

    def load(self, folder: Path | None = None) -> Any:
        """The model, from this or another folder of its kind; every tensor has to find its place."""
        model, report = self.model_class.from_pretrained(folder or self.folder, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert not report["mismatched_keys"]
        return model.eval()

    def output(self, model: Any) -> torch.Tensor:
        """What the model computes: the first of its outputs, logits or hidden states."""
        with torch.inference_mode():
            result: torch.Tensor = model(**self.inputs, return_dict=True)[0]
        assert result.isfinite().all()
        return result


def read(folder: Path) -> Tensors:
    """All tensors of a directory, whether it has one file or several."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def make(family: str, folder: Path) -> Checkpoint:
    """A checkpoint of this family below a folder: random everywhere, biases and running statistics too."""
    return save(build(family), family, folder)


def fill(model: Any, generator: torch.Generator) -> Any:
    """Random numbers everywhere, norms near one and biases too: nothing is zero, nothing alike."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise.abs())
            elif tensor.ndim <= 1 and name.endswith("weight"):  # a norm
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_(0.3 * noise)
    return model


def save(model: Any, family: str, folder: Path) -> Checkpoint:
    """As `make`, of a model of one's own."""
    generator = torch.Generator().manual_seed(11)
    fill(model, generator).save_pretrained(folder / family)
    if family in PICTURES:
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    else:
        inputs = {"input_ids": torch.randint(2, 60, (2, 12), generator=generator)}
    return Checkpoint(folder / family, type(model), inputs)


def write_statistics(dense: Checkpoint, folder: Path) -> None:
    """Second moments of every matrix, as a user may have them; inputs that depend on their neighbours."""
    found = {}
    for name, tensor in dense.tensors().items():
        if tensor.ndim == 2:
            places = torch.arange(tensor.shape[1])
            found[name] = 0.5 ** (places[:, None] - places).abs().float()
    (folder / "stats").mkdir()
    save_file(found, folder / "stats" / "statistics.safetensors")


def prune(dense: Checkpoint, spec: str, *options: str, output: str | None = None) -> Path:
    """`sparseprune apply` with a shipped spec, beside the dense folder, under a name made of all that."""
    name = output or "-".join([dense.folder.name, spec, *(o.strip("-") for o in options)])
    pruned = dense.folder.with_name(name)
    said = run("apply", dense.folder, spec, "-o", pruned, "-q", *options)
    assert (said.code, said.out) == (0, f"{pruned}\n"), said.err
    return pruned


def changed(dense: Checkpoint, pruned: Path) -> set[str]:
    """The tensors that a spec reached, which differ by the mask's zeros alone; others have the same bytes."""
    before, after, masks = dense.tensors(), read(pruned), sparseprune.load_masks(pruned)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        expected = torch.where(masks[name], tensor, 0) if name in masks else tensor
        assert expected.dtype == after[name].dtype
        assert expected.numpy().tobytes() == after[name].numpy().tobytes(), name
    return set(masks)


def surviving(parts: Sequence[Sequence[torch.Tensor]], keep: int) -> torch.Tensor:
    """Which units survive (bool): the `keep` of the largest norm over the elements of all their parts.

    `parts` are those of the dense checkpoint and those of the pruned one, units first: there, all parts of
    the surviving units have to be as they were, and all parts of the others zero.
    """
    before, after = parts
    squares = sum(part.double().reshape(len(part), -1).square().sum(1) for part in before)
    kept = torch.zeros(len(before[0]), dtype=torch.bool)
    kept[torch.as_tensor(squares).topk(keep).indices] = True
    for whole, left in zip(before, after, strict=True):
        assert whole.all()
        assert torch.equal(left, whole * kept.view(-1, *[1] * (whole.ndim - 1)))
    return kept


def by_column(matrix: torch.Tensor, units: int) -> torch.Tensor:
    """What each unit writes to or reads from the columns of a matrix: (units, rows, columns of a unit)."""
    return matrix.reshape(len(matrix), units, -1).movedim(1, 0)


def by_row(tensor: torch.Tensor, units: int) -> torch.Tensor:
    """The rows of each unit, or its elements of a vector: (units, rows of a unit, ...)."""
    return tensor.reshape(units, -1, *tensor.shape[1:])


def with_inputs_ablated(model: Any, kept: Mapping[str, torch.Tensor]) -> Any:
    """The model with forward hooks that zero what the named modules are given for the units that are lost.

    `kept` has one bool for each unit; a unit is as many neighbouring input features as it takes.
    """

    def hook_for(keep: torch.Tensor) -> Callable[..., tuple[torch.Tensor, ...]]:
        def zero(_module: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            states, *others = arguments
            features = keep.repeat_interleave(states.shape[-1] // keep.numel())
            return (states.masked_fill(~features, 0), *others)

        return zero

    for name, keep in kept.items():
        model.get_submodule(name).register_forward_pre_hook(hook_for(keep))
    return model


def check_ablation(dense: Checkpoint, pruned: Path, ablated: Any) -> None:
    """The pruned checkpoint computes what the ablated dense model does, and not what the dense one does."""
    whole = dense.output(dense.load())
    expected = dense.output(ablated)
    found = dense.output(dense.load(pruned))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - whole).abs().max() > 1e-2
