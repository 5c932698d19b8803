"""The blocks of a model, such as its layers: modules whose weights are in memory only while they run.

Owns how transformers loads weights into a model that is on no device yet. What stands outside of the blocks
(embeddings, norms, heads) is loaded once. Called by loading.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch

from sparseprune.engine.dtypes import torch_dtype
from sparseprune.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from torch import Tensor

    from sparseprune.checkpoint import Checkpoint, Source

    Read = Callable[[str], Tensor]
    Opened = tuple[Any, "Blocks", tuple[str, ...]]

_LOADS = "convert_and_load_state_dict_in_model"  # of transformers.modeling_utils; it is not public
_MMAP_THRESHOLD, _MAPPED = -3, 1 << 20  # glibc's M_MMAP_THRESHOLD, and bytes


def reading(checkpoint: Checkpoint, source: Source, device: torch.device) -> Read:
    """The function that reads a tensor of a checkpoint by its name."""

    def read(name: str) -> Tensor:
        stored = checkpoint.tensors[name]
        found = torch.empty(stored.shape, dtype=torch_dtype(stored.dtype))
        if stored.nbytes:
            source.read_into(stored, 0, found.view(-1).view(torch.uint8).numpy().data)
        return found.to(device)

    return read


class Blocks:
    """The blocks of a model by their names, in the order of the model; all of their weights are absent.

    Blocks are the members of the outermost lists of modules whose members all have matrices. `missing` are
    the weights outside of blocks that the checkpoint lacks. Where transformers has no such way to load,
    `are_resident`: all weights are there and stay.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self.modules: dict[str, torch.nn.Module] = {}
        self.are_resident = False
        self.tied: frozenset[str] = frozenset()
        self._path = path
        self._device = device
        self._keys: dict[str, list[str]] = {}
        self._model: Any = None
        self._how: Any = None
        self._load: Any = None
        self._ahead: tuple[str, Future[dict[str, Tensor]]] | None = None

    @property
    def are_read(self) -> bool:
        """Whether all weights came from who reads the checkpoint, and none from its files."""
        return self._load is not None

    @property
    def names(self) -> tuple[str, ...]:
        """In the order of the model."""
        return tuple(self.modules)

    def owner(self, name: str) -> str | None:
        """The block in which a parameter, by its name in the model, is loaded; None outside of all."""
        if name in self.tied:
            return None
        end = name.rfind(".")
        while end > 0:
            if name[:end] in self.modules:
                return name[:end]
            end = name.rfind(".", 0, end)
        return None

    def stored(self, name: str) -> Sequence[str]:
        """The tensors of the checkpoint of which a block is made."""
        return self._keys.get(name, ())

    def nbytes(self, name: str) -> int:
        """Bytes of a block's weights, whether they are there or not."""
        return sum(one.nbytes for one in self.modules[name].parameters())

    def parameters(self, name: str) -> dict[str, torch.nn.Parameter]:
        """The parameters of a block by their names in it, as they are now."""
        return dict(self.modules[name].named_parameters())

    def load(self, name: str, read: Read) -> dict[str, torch.nn.Parameter]:
        """Read a block; returns its parameters, which are new tensors each time.

        Raises:
            CheckpointError: the checkpoint lacks a weight of it.
        """
        if self.are_resident:
            return self.parameters(name)
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            found = ahead[1].result()  # also where it is of another block: two are never read at a time
            read = found.__getitem__ if ahead[0] == name else read
        given = {key: _Late(key, read) for key in self._keys[name]}
        kept = getattr(self._model, "_weight_conversions", None)
        info, _ = self._load(
            model=self._model, state_dict=given, load_config=self._how, disk_offload_index=None
        )
        self._model._weight_conversions = kept  # noqa: SLF001  (which only knows the last ones loaded)
        lacking = [
            key
            for key in info.missing_keys
            if self.owner(key) == name and self._model.get_parameter_or_buffer(key).is_meta
        ]
        _refuse_unlike(self._path, info.mismatched_keys)
        if lacking:
            raise CheckpointError(
                f"{self._path}: lacks {len(lacking)} weights of the model that config.json describes, such "
                f"as {min(lacking)}, so that it cannot be run"
            )
        _placed(self.modules[name], self._device)
        return self.parameters(name)

    def read_ahead(self, name: str, read: Read) -> None:
        """Begin to read a block onto its device in a thread, while another one is worked on; `load` waits."""
        if self._ahead is None and self._keys.get(name):
            pool = ThreadPoolExecutor(1)
            keys = tuple(self._keys[name])
            self._ahead = name, pool.submit(lambda: {key: read(key) for key in keys})
            pool.shutdown(wait=False)

    def put(self, name: str, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Give a block these parameters, by their names in it."""
        module = self.modules[name]
        for key, parameter in parameters.items():
            owner, _, own = key.rpartition(".")
            module.get_submodule(owner)._parameters[own] = parameter  # noqa: SLF001

    def free(self, name: str) -> None:
        """Forget the weights of a block."""
        if self.are_resident:
            return
        for path, module in self.modules[name].named_modules(prefix=name):
            for key, parameter in module._parameters.items():  # noqa: SLF001
                if parameter is not None and not parameter.is_meta and f"{path}.{key}" not in self.tied:
                    module._parameters[key] = _parameter(parameter.to("meta"))  # noqa: SLF001
        _give_memory_back()

    @contextmanager
    def opened(self, name: str, read: Read) -> Iterator[dict[str, torch.nn.Parameter]]:
        """A block with its weights, which are forgotten at the end."""
        try:
            yield self.load(name, read)
        finally:
            self.free(name)


def open_blocks(kind: Any, path: Path, device: torch.device, read: Read, **how: Any) -> Opened:
    """A model of a class with all that stands outside of its blocks, its blocks, and what it lacks.

    `read` reads the tensors of the checkpoint at `path`; `how` goes to `from_pretrained`.

    Raises:
        CheckpointError: tensors have other shapes than the model.
    """
    from transformers import core_model_loading, modeling_utils  # noqa: PLC0415

    blocks = Blocks(path, device)
    original = getattr(modeling_utils, _LOADS, None)
    if original is None:
        model, info = kind.from_pretrained(output_loading_info=True, **how)
        blocks.modules, blocks.are_resident = _found(model), True
        return _opened(path, model.to(device), blocks, info)
    _map_large_memory()

    def outside_alone(
        model: Any, state_dict: Mapping[str, Any], load_config: Any, disk_offload_index: Any = None
    ) -> Any:
        blocks._model, blocks._how, blocks._load = model, load_config, original  # noqa: SLF001
        blocks.modules = _found(model)
        blocks.tied = _tied(model, blocks)
        names = model.state_dict()
        mapping = load_config.weight_mapping or []
        renaming = [one for one in mapping if isinstance(one, core_model_loading.WeightRenaming)]
        converting = [one for one in mapping if isinstance(one, core_model_loading.WeightConverter)]
        outside: dict[str, Any] = {}
        owned: dict[str, list[str]] = {name: [] for name in blocks.modules}
        for key in state_dict:
            renamed, _ = core_model_loading.rename_source_key(
                key, renaming, converting, model.base_model_prefix, names
            )
            owner = blocks.owner(key if renamed not in names and key in names else renamed)
            if owner is None:
                outside[key] = _Late(key, read)
            else:
                owned[owner].append(key)
        blocks._keys = owned  # noqa: SLF001
        info, index = original(
            model=model, state_dict=outside, load_config=load_config, disk_offload_index=disk_offload_index
        )
        later = {key for key in info.missing_keys if blocks.owner(key) is not None}
        info.missing_keys -= later
        for key in later:  # else transformers fills them with random numbers
            model.get_parameter_or_buffer(key)._is_hf_initialized = True  # noqa: SLF001
        return info, index

    setattr(modeling_utils, _LOADS, outside_alone)
    try:
        model, info = kind.from_pretrained(output_loading_info=True, **how)
    finally:
        setattr(modeling_utils, _LOADS, original)
    if not blocks.modules:  # another way to load was taken
        blocks.modules, blocks.are_resident = _found(model), True
    _placed(model, device)
    return _opened(path, model, blocks, info)


def _refuse_unlike(path: Path, keys: Collection[Any]) -> None:
    """CheckpointError for parameters whose tensors have other shapes."""
    names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)
    if names:
        raise CheckpointError(
            f"{path}: {len(names)} tensors have other shapes than config.json says, such as {names[0]}"
        )


def _opened(path: Path, model: Any, blocks: Blocks, info: dict[str, Any]) -> Opened:
    _refuse_unlike(path, info["mismatched_keys"])
    return model, blocks, tuple(sorted(info["missing_keys"]))


class _Late:
    """A tensor of a checkpoint that is read when transformers wants its elements."""

    def __init__(self, key: str, read: Read) -> None:
        self._key = key
        self._read = read

    def __getitem__(self, which: Any) -> Tensor:
        return self._read(self._key)[which]


def _found(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The blocks of a model."""
    found: dict[str, torch.nn.Module] = {}

    def walk(path: str, module: torch.nn.Module) -> None:
        for name, child in module.named_children():
            inner = f"{path}.{name}" if path else name
            members = list(child.named_children()) if isinstance(child, torch.nn.ModuleList) else []
            if members and all(any(one.ndim > 1 for one in part.parameters()) for _, part in members):
                found.update({f"{inner}.{number}": part for number, part in members})
            else:
                walk(inner, child)

    walk("", model)
    return found


def _tied(model: Any, blocks: Blocks) -> frozenset[str]:
    """The names of parameters that are one with a parameter of another block, or outside."""
    found: set[str] = set()
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if blocks.owner(target) != blocks.owner(source):
            found |= {target, source}
    return frozenset(found)


def _placed(module: torch.nn.Module, device: torch.device) -> None:
    """Move what is there to a device."""
    for part in module.modules():
        tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)  # noqa: SLF001
        for own in tables:
            for key, one in own.items():
                if one is None or one.is_meta or one.device == device:
                    continue
                moved = one.detach().to(device)
                own[key] = _parameter(moved) if isinstance(one, torch.nn.Parameter) else moved


def _parameter(one: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(one, requires_grad=False)


def _map_large_memory() -> None:
    """Let glibc give large memory back when it is free; else it keeps some more of it after each block."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _MAPPED)


def _give_memory_back() -> None:
    """Give back what is free, in a millisecond; else threads that load keep some of it after each block."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
