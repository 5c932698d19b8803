"""Masks in training: pruned weights stay zero while the optimizer updates a model in memory.

Owns the conversion of masks, which have names of a checkpoint, to parameters, which transformers may have
renamed, fused and transposed, and the hooks that restore zeros. Works for any torch module; transformers is
imported only for its own models. Called by users.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from msgspec import Struct

from sparseprune.calibration.stored import as_saved
from sparseprune.checkpoint import load_masks
from sparseprune.errors import ShapeMismatchError, SparsityError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

# Parts of names that wrappers add: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


class KeptMasks:
    """Masks that are applied again after every optimizer step, until `remove` is called."""

    def __init__(
        self, pruned: Sequence[tuple[Tensor, Tensor]], optimizers: Iterable[torch.optim.Optimizer]
    ) -> None:
        self._pruned = [(parameter, _placed_like(parameter, one)) for parameter, one in pruned]
        self._handles = [
            _innermost(optimizer).register_step_post_hook(lambda *_: self.apply()) for optimizer in optimizers
        ]

    @torch.no_grad()
    def apply(self) -> None:
        """Write +0.0 to every pruned weight; call it after `load_state_dict`, for example."""
        for place, (parameter, pruned) in enumerate(self._pruned):
            if pruned.device != parameter.device:  # the model was moved
                self._pruned[place] = (parameter, _placed_like(parameter, pruned))
            parameter.masked_fill_(self._pruned[place][1], 0)

    def remove(self) -> None:
        """Stop; the optimizers are as they were before."""
        for handle in self._handles:
            handle.remove()


def keep_masked(
    model: nn.Module, masks: str | Path | Mapping[str, Tensor], *optimizers: torch.optim.Optimizer
) -> KeptMasks:
    """Prune a model in memory by masks now, and again after every step of the optimizers.

    The result has `apply`, to prune again at any other time, and `remove`, to stop.

    `masks` is an argument or a result of `load_masks`; names and shapes are those of the checkpoint (see
    `parameter_masks`). A pruned weight is +0.0 after each step, even if the step made it NaN. A skipped step
    (accumulated gradients, a `GradScaler` that found infinities) changes nothing. Gradients and the
    optimizer's state of pruned weights are not changed: they never influence a kept weight, only the norm by
    which gradients are clipped. Masks take one byte for each element, on the parameter's device, and are
    sharded like it. Call this after the model is wrapped and the optimizer is made, because both have
    references to parameters.

    >>> layer = torch.nn.Linear(4, 1)
    >>> optimizer = torch.optim.AdamW(layer.parameters())
    >>> kept = keep_masked(layer, {"weight": torch.tensor([[True, False, True, False]])}, optimizer)
    >>> layer(torch.ones(4)).backward()
    >>> optimizer.step()
    >>> layer.weight[0, 1::2].tolist()
    [0.0, 0.0]

    Raises:
        SparsityError: a mask belongs to no parameter, or to one without data.
        ShapeMismatchError: a mask of another shape than its parameter has in the checkpoint.
        CheckpointError: there are no masks under the path.
    """
    found = parameter_masks(model, masks)
    parameters = dict(model.named_parameters())
    empty = [name for name in found if parameters[name].is_meta]
    if empty:
        raise SparsityError(f"{empty[0]} has no data (device meta): load the model's weights first")
    kept = KeptMasks([(parameters[name], ~found.pop(name)) for name in list(found)], optimizers)
    kept.apply()
    return kept


def parameter_masks(model: nn.Module, masks: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bool masks, True where kept, by the names of `model.named_parameters()`: of their shape and device.

    `masks` is an argument or a result of `load_masks`, by the names of the checkpoint. Parameters that
    transformers renamed, fused, split or transposed when it loaded a model are found by how it would save
    them. Wrappers (DistributedDataParallel, torch.compile) make no difference, nor does one prefix that all
    names in memory have and those in the checkpoint lack, or the other way round. If a parameter is stored in
    several tensors, those without a mask are kept whole; a parameter with two names and two masks keeps what
    both keep.

    Raises:
        SparsityError: a mask belongs to no parameter.
        ShapeMismatchError: a mask of another shape than its parameter has in the checkpoint.
        CheckpointError: there are no masks under the path.
    """
    given = load_masks(masks) if isinstance(masks, str | Path) else masks
    groups = list(_groups(model))
    places = {name: (group, shape) for group in groups for name, shape in group.stored().items()}
    names = _stored_names(given, places, type(model).__name__)
    wanted: defaultdict[_Group, dict[str, Tensor]] = defaultdict(dict)
    for name, mask in given.items():
        group, shape = places[names[name]]
        wanted[group][names[name]] = _in_shape(mask, shape, name, turned=group.owner is not None)
    kept: dict[int, Tensor] = {}
    for group, some in wanted.items():
        group.lay_out(some, kept)
    return {
        name: kept.pop(id(parameter)).to(parameter.device)
        for name, parameter in model.named_parameters()
        if id(parameter) in kept
    }


class _Uncopied(torch.Tensor):
    """A tensor whose parts stay views: `contiguous` makes no copy."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.contiguous:
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


class _Group(Struct, frozen=True, eq=False):
    """Parameters, by their names in `owner`, that may be stored in separate or in common tensors."""

    owner: Any
    prefix: str
    parameters: dict[str, Tensor]

    def stored(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors of a checkpoint, by name."""
        outlines = {name: torch.empty(one.shape, device="meta") for name, one in self.parameters.items()}
        return {self.prefix + name: tuple(one.shape) for name, one in self._saved(outlines).items()}

    def lay_out(self, masks: Mapping[str, Tensor], kept: dict[int, Tensor]) -> None:
        """Combine masks, by the names of `stored`, into masks of parameters, by their ids."""
        own = {name.removeprefix(self.prefix): mask.to("cpu", torch.bool) for name, mask in masks.items()}
        fresh = {id(one): one.shape for one in self.parameters.values() if id(one) not in kept}
        by_id = kept | {key: torch.ones(shape, dtype=torch.bool) for key, shape in fresh.items()}
        keeps = {name: by_id[id(one)] for name, one in self.parameters.items()}
        holders = {keep.untyped_storage()._cdata: name for name, keep in keeps.items()}  # noqa: SLF001
        saved = self._saved({name: keep.as_subclass(_Uncopied) for name, keep in keeps.items()})
        copied = {}
        for stored, mask in own.items():
            holder = holders.get(saved[stored].untyped_storage()._cdata)  # noqa: SLF001
            if holder is None:
                copied[stored] = mask
            else:  # a view of a parameter's mask: a whole tensor, or an expert of a stack
                saved[stored].as_subclass(torch.Tensor).logical_and_(mask)
                kept[id(self.parameters[holder])] = keeps[holder]
        if copied:
            self._lay_out_by_element(copied, keeps, kept)

    def _lay_out_by_element(
        self, masks: Mapping[str, Tensor], keeps: Mapping[str, Tensor], kept: dict[int, Tensor]
    ) -> None:
        """Combine masks of tensors that are copies, by numbers that say where each element comes from."""
        end, begins = 1, {}  # 0 is for padding
        for name, keep in keeps.items():
            begins[name], end = end, end + keep.numel()
        saved = self._saved(
            {
                name: torch.arange(keep.numel()).reshape(keep.shape) + begins[name]
                for name, keep in keeps.items()
            }
        )
        for stored, mask in masks.items():
            places, flags = saved[stored].reshape(-1), mask.reshape(-1)
            for name, keep in keeps.items():
                inside = (places >= begins[name]) & (places < begins[name] + keep.numel())
                if bool(inside.any()):
                    keep.view(-1)[places[inside] - begins[name]] &= flags[inside]
                    kept[id(self.parameters[name])] = keep

    def _saved(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as transformers would save them; unchanged if it does not convert them."""
        return tensors if self.owner is None else as_saved(self.owner, tensors)


def _groups(model: nn.Module) -> Iterator[_Group]:
    """All parameters, under all of their names, in groups that are saved together."""
    owners = _pretrained_models(model)
    groups: defaultdict[tuple[str | None, str], dict[str, Tensor]] = defaultdict(dict)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path = next((path for path in owners if name.startswith(path)), None)
        own = _unwrapped(name.removeprefix(path or ""))
        # transformers fuses and splits parameters of one module, or of sibling modules.
        groups[path, own if path is None else own.rpartition(".")[0].rpartition(".")[0]][own] = parameter
    for (path, _), parameters in groups.items():
        yield _Group(None if path is None else owners[path], _unwrapped(path or ""), parameters)


def _pretrained_models(model: nn.Module) -> dict[str, Any]:
    """The outermost transformers models in a module, by their path with a dot behind."""
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return {}
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        if isinstance(module, transformers.PreTrainedModel) and not any(map(f"{path}.".startswith, found)):
            found[f"{path}." if path else ""] = module
    return found


def _unwrapped(name: str) -> str:
    """A name without the parts that come from wrappers.

    >>> _unwrapped("_orig_mod.layers.0._checkpoint_wrapped_module.up.weight")
    'layers.0.up.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _stored_names(given: Iterable[str], stored: Collection[str], model: str) -> dict[str, str]:
    """The stored name of each mask: the same name, or one that differs by one prefix."""
    names = {name: name for name in given if name in stored}
    rest = [name for name in given if name not in stored]
    if not rest:
        return names
    longer = [(one.removesuffix(rest[0]), "") for one in stored if one.endswith(f".{rest[0]}")]
    shorter = [("", rest[0].removesuffix(one)) for one in stored if rest[0].endswith(f".{one}")]
    ways = [
        {name: more + name.removeprefix(less) for name in rest if name.startswith(less)}
        for more, less in (*longer, *shorter)
    ]
    fitting = [way for way in ways if len(way) == len(rest) and all(name in stored for name in way.values())]
    if len(fitting) != 1:
        others = f" and {len(rest) - 1} more" if len(rest) > 1 else ""
        raise SparsityError(
            f"mask {rest[0]}{others}: {model} has no parameter that is stored under this name; give the "
            "model of the checkpoint that was pruned, or leave such masks out"
        )
    return names | fitting[0]


def _in_shape(mask: Tensor, shape: tuple[int, ...], name: str, *, turned: bool) -> Tensor:
    """A mask in the stored shape of its parameter; `turned` says that a stack may be transposed.

    transformers transposes stacks of experts if they then fit the model, and saves them transposed.
    """
    if tuple(mask.shape) == shape:
        return mask
    if turned and mask.ndim == 3 and tuple(mask.mT.shape) == shape:
        return mask.mT
    raise ShapeMismatchError(
        f"mask {name} has shape {list(mask.shape)}, its parameter is stored in shape {list(shape)}"
    )


def _placed_like(parameter: Any, mask: Tensor) -> Tensor:
    """A mask on the device of its parameter, sharded if the parameter is."""
    if not hasattr(parameter, "device_mesh"):
        return mask.to(parameter.device)
    from torch.distributed.tensor import DTensor, distribute_tensor  # noqa: PLC0415  (slow to import)

    if isinstance(mask, DTensor):
        return mask.to(parameter.device)
    return distribute_tensor(mask.to(parameter.device), parameter.device_mesh, parameter.placements)


def _innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside the wrapper of accelerate, which has no hooks."""
    inner = getattr(optimizer, "optimizer", None)
    return _innermost(inner) if isinstance(inner, torch.optim.Optimizer) else optimizer
