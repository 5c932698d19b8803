"""Loading the model and the tokenizer of a checkpoint, and running text through the model.

Owns the calls of transformers, and turns its errors into one line. Runs no code of a checkpoint, downloads
nothing, and builds no model that is far larger than the checkpoint. Called by commands.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from msgspec import Struct
from torch.utils._pytree import SUPPORTED_NODES, register_pytree_node

from sparseprune.calibration.blocks import open_blocks, reading
from sparseprune.calibration.model_files import model_folder
from sparseprune.calibration.runs import halting
from sparseprune.calibration.watching import EnoughError
from sparseprune.checkpoint import read_config
from sparseprune.checkpoint.codes import QUANTIZED_FILES, quantization_of
from sparseprune.checkpoint.documents import shown
from sparseprune.errors import CheckpointError, SparsepruneError, is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from sparseprune.calibration.blocks import Blocks, Read
    from sparseprune.checkpoint import Checkpoint, Source

_LONGEST = 2048  # tokens of a sequence by default, if the model takes that many
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
_SUMS_SHARE = 0.5  # of what a model leaves of its device; the rest is for what comes up when it runs
_MODULES = re.compile(r"(layers?|blocks|depth|experts|hidden_groups)$")  # config keys that count modules
_POSITIONS = re.compile(r"position|n_ctx$")
_LABELS = re.compile(r"^num_labels$")
_FEW_MODULES, _MOST_POSITIONS = 1024, 1 << 27  # numbers up to these are always harmless
# Classifiers need a padding token to run two sequences; no token has this number.
_NO_PADDING = -1
_FEW_WEIGHTS = 50_000_000  # that a model may have beyond four times those of its checkpoint
# Inputs beside text, in the words of transformers and in ours.
_MODALITIES = MappingProxyType(
    {"image": "images", "video": "videos", "audio": "sound", "time": "time series"}
)


class Elsewhere(Struct, frozen=True):
    """Where text runs through a model, if not here: a device, what identifies it, and its room for sums."""

    device: str
    machine: str
    room: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model with its tokenizer, of which the weights of `blocks` are loaded when these run.

    `missing` are weights outside of them that the checkpoint lacks; `others` names what it takes beside
    text, such as images.
    """

    checkpoint: Checkpoint = field(repr=False)
    model: Any = field(repr=False)
    blocks: Blocks = field(repr=False)
    tokenizer: Any = field(repr=False)
    longest: int | None
    device: torch.device
    missing: tuple[str, ...]
    others: tuple[str, ...] = ()
    elsewhere: Elsewhere | None = None

    @property
    def place(self) -> str:
        """The device on which text runs through it, in words."""
        return str(self.device) if self.elsewhere is None else self.elsewhere.device

    @property
    def length(self) -> int:
        """Tokens of a sequence by default."""
        return min(_LONGEST, self.longest or _LONGEST)

    @property
    def versions(self) -> str:
        """The packages that run it; other versions may round differently."""
        return f"torch {torch.__version__}, transformers {_transformers().__version__}"

    @property
    def machine(self) -> str:
        """The hardware that runs it, which decides the order of sums."""
        if self.elsewhere is not None:
            return self.elsewhere.machine
        if self.device.type == "cuda":
            return f"{self.device} {torch.cuda.get_device_name(self.device)}"
        return cpu_machine(torch.get_num_threads())

    @property
    def room(self) -> int | None:
        """Bytes of its device that sums may take, a power of two; None on the CPU, for which it is told.

        Rounded down, so that a run that is continued finds the same number though a little more or less is
        free.
        """
        if self.elsewhere is not None:
            return self.elsewhere.room
        if self.device.type == "cpu":
            return None
        free, _ = torch.cuda.mem_get_info(self.device)
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return room_for_sums(free + kept)

    @property
    def nbytes(self) -> int:
        """Bytes of what is loaded of it now."""
        there = (*self.model.parameters(), *self.model.buffers())
        return sum(one.nbytes for one in there if not one.is_meta)

    @property
    def vocabulary(self) -> int | None:
        """Of how many words the model gives logits, None if it has no head for them."""
        owner = getattr(_of_text(self.model), "__self__", self.model)
        try:
            head = owner.get_output_embeddings()
        except (AttributeError, NotImplementedError):
            return None
        weight = getattr(head, "weight", None)
        return None if weight is None else int(weight.shape[0])

    def forward(self, ids: Tensor) -> Any:
        """What the model gives for (sequences, length); halts in front of its blocks in a run.

        Raises:
            SparsepruneError: the model does not take this many tokens.
        """
        forward = _of_text(self.model)
        words = inspect.signature(forward).parameters
        given = ids.to(self.device)
        offered = {
            "input_ids": given,
            "attention_mask": torch.ones_like(given),
            "use_cache": False,
            "global_attention_mask": torch.zeros_like(given).index_fill_(1, given.new_zeros(1), 1),
            "decoder_input_ids": given if self.model.config.is_encoder_decoder else None,
        }
        with self.telling(ids.shape[1]):
            return forward(**{key: offered[key] for key in words if offered.get(key) is not None})

    @contextmanager
    def telling(self, length: int) -> Iterator[None]:
        """Turn errors of the model's code over so many tokens into one line."""
        try:
            yield
        except (EnoughError, SparsepruneError):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            there = "run, and differentiated," if torch.is_grad_enabled() else "run"
            raise SparsepruneError(
                f"the model cannot be {there} over {length} tokens of text alone: {_first_line(error)}"
            ) from error

    def read(self, source: Source) -> Read:
        """The function that reads tensors of the checkpoint for `blocks`."""
        return reading(self.checkpoint, source, self.device)

    def refuse_strange(self, ids: Tensor) -> None:
        """SparsepruneError if the tokenizer gives tokens without an embedding in the model."""
        try:
            known = getattr(self.model.get_input_embeddings(), "num_embeddings", None)
        except NotImplementedError:  # transformers does not know the embeddings
            known = None
        if known is not None and int(ids.max()) >= known:
            raise SparsepruneError(
                f"the tokenizer gives token {int(ids.max())}, the model has {known} of them: these two do "
                "not belong together"
            )


def cpu_machine(threads: int) -> str:
    """What identifies a CPU with so many threads, for a run that is continued."""
    return f"cpu {torch.backends.cpu.get_cpu_capability()} {threads}"


def room_for_sums(free: int) -> int:
    """Bytes that sums may take of what is free on a device beside a model."""
    return 1 << max(0, int(_SUMS_SHARE * max(0, free)).bit_length() - 1)


def gpus_here() -> list[tuple[str, int]]:
    """The name and the memory of each GPU of this machine."""
    found = [torch.cuda.get_device_properties(place) for place in range(torch.cuda.device_count())]
    return [(one.name, one.total_memory) for one in found]


def load_model(checkpoint: Checkpoint, device: str, source: Source) -> LoadedModel:
    """The model of a checkpoint's directory, whose tensors `source` reads, on a device.

    Raises:
        SparsepruneError: transformers is not installed, does not know the architecture, cannot load it.
        CheckpointError: no directory, no config.json, no tokenizer.
    """
    path = checkpoint.path
    if not checkpoint.is_directory:
        raise CheckpointError(
            f"{path}: running a model needs its config and its tokenizer; give the directory that has them"
        )
    document = read_config(checkpoint)
    if document is None:
        raise CheckpointError(f"{path}: there is no config.json, which says what the model is")
    _refuse_quantized(checkpoint, document)
    _refuse_huge(checkpoint, document)
    transformers = _transformers()
    version = f"transformers {transformers.__version__}"
    own = {"local_files_only": True, "trust_remote_code": False}
    known = str(document.get("model_type")) in transformers.CONFIG_MAPPING
    refuses = "refuses this config" if known else "does not know this model"
    with model_folder(checkpoint) as folder:
        said = _Saying(path, folder)
        with said.one_line(f"{path / 'config.json'}: {version} {refuses}"):
            config = _plain(transformers.AutoConfig.from_pretrained(folder, **own))
        kind = _model_class(transformers, config)
        _refuse_other_inputs(path, kind)
        with said.one_line(f"{path}: there is no tokenizer that transformers can read"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **own)
        with said.one_line(f"{path}: {version} cannot build the model that config.json describes"):
            _refuse_larger(kind, config, checkpoint)
        place = _numbered(device)
        with said.one_line(f"{path}: {version} cannot load this model"):
            # A config may name another file, and pickles can run code.
            safe = {"use_safetensors": True, "use_kernels": False, "ignore_mismatched_sizes": True, **own}
            how = {"config": config, "dtype": "auto", "pretrained_model_name_or_path": folder, **safe}
            model, blocks, missing = open_blocks(kind, path, place, reading(checkpoint, source, place), **how)
    if folder != path and not blocks.are_read:
        raise SparsepruneError(
            f"{path}: {version} reads the weights of this model from files alone; copy it to this machine"
        )
    model.eval()
    for name, block in blocks.modules.items():
        halting(name, block)
    for part in _configs(model.config):
        if getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = _NO_PADDING
    others = tuple(_MODALITIES[one] for one in _modalities(model) if one in _MODALITIES)
    return LoadedModel(
        checkpoint, model, blocks, tokenizer, _longest(model, tokenizer), place, missing, others
    )


def _refuse_other_inputs(path: Path, kind: Any) -> None:
    """SparsepruneError if the model takes images or sound in the first place."""
    taken = getattr(kind, "main_input_name", "input_ids")
    if taken != "input_ids":
        what = " and ".join(_MODALITIES[one] for one in _modalities(kind) if one in _MODALITIES)
        raise SparsepruneError(
            f"{path}: {kind.__name__} takes {what or 'no text'} ({taken}), and is fed text alone; to prune "
            "it use a spec that reads no statistics, or one that reads yours"
        )


def _modalities(kind: Any) -> tuple[str, ...]:
    """What a model or its class takes, in the words of transformers."""
    found = getattr(kind, "input_modalities", None) or ()
    return (found,) if isinstance(found, str) else tuple(found)


def _transformers() -> Any:
    """The package transformers, made silent and offline, whatever a checkpoint names."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ |= {"USE_HUB_KERNELS": "NO"}
    try:
        from huggingface_hub import constants  # noqa: PLC0415

        constants.HF_HUB_OFFLINE = True  # whatever the environment says, which stays
        import transformers  # noqa: PLC0415
    except ImportError as error:
        raise SparsepruneError(
            "running a model needs transformers, which is not installed: "
            "pip install 'sparseprune[calibrate]' (in a clone: '.[calibrate]')"
        ) from error
    shared = getattr(transformers.cache_utils, "KVSharingDict", None)
    if shared is not None and shared not in SUPPORTED_NODES:  # else torch sees no tensors in it
        register_pytree_node(
            shared,
            lambda found: ([*found.values()], [*found]),
            lambda values, keys: shared(zip(keys, values, strict=True)),
        )
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return transformers


def _refuse_quantized(checkpoint: Checkpoint, document: Mapping[str, Any]) -> None:
    """CheckpointError if the tensors are quantized codes: they are not the matrices of the model."""
    files = [name for name in QUANTIZED_FILES if (checkpoint.path / name).is_file()]
    codes = [name for name, stored in checkpoint.tensors.items() if stored.codes is not None]
    found = quantization_of(document)
    found = found or (f"{files[0]} lies beside it" if files else f"it has {codes[0]}" if codes else "")
    if found:
        raise CheckpointError(
            f"{checkpoint.path}: the checkpoint is quantized ({found}); give the unquantized one that "
            "it was made from"
        )


def _refuse_huge(checkpoint: Checkpoint, document: Mapping[str, Any]) -> None:
    """CheckpointError if config.json has numbers of modules that would take too long to build."""
    tensors = checkpoint.tensors.values()
    widest = max((extent for stored in tensors for extent in stored.shape), default=0)
    limits = (
        (_POSITIONS, _MOST_POSITIONS),
        (_MODULES, max(len(tensors), _FEW_MODULES)),
        (_LABELS, max(widest, _FEW_MODULES)),
    )
    for key, value in _numbers(document):
        name = key.rpartition(".")[2]
        most = next((most for pattern, most in limits if pattern.search(name)), value)
        if value > most:
            raise CheckpointError(
                f"{checkpoint.path / 'config.json'}: {key} is {shown(value)}, which does not fit a "
                f"checkpoint of {len(tensors)} tensors"
            )


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """All numbers of a document with their dotted keys; places in lists have empty keys."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value
    elif isinstance(value, list):
        for one in value:
            yield from _numbers(one, f"{key}.")
    elif isinstance(value, dict | MappingProxyType):
        for name, one in value.items():
            yield from _numbers(one, f"{key}.{name}" if key else name)


def _refuse_larger(kind: Any, config: Any, checkpoint: Checkpoint) -> None:
    """CheckpointError if the model has far more weights than the checkpoint; builds it without memory.

    A model that cannot be built that way is left to transformers.
    """
    try:
        with torch.device("meta"):
            model = kind(copy.deepcopy(config))
    except Exception:  # noqa: BLE001  (the error occurs again later, or is due to the device)
        return
    wanted = sum(one.numel() for one in (*model.parameters(), *model.buffers()))
    stored = sum(one.numel for one in checkpoint.tensors.values())
    if wanted > 4 * stored + _FEW_WEIGHTS:
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'}: describes a model of {wanted:,} weights, the checkpoint has "
            f"{stored:,}: these two do not belong together"
        )


def _of_text(model: Any) -> Any:
    """What takes text alone: models of text and images have a method (CLIP) or a model (Llama 4) for it."""
    if hasattr(model, "get_text_features"):
        return model.get_text_features
    inner: Any = getattr(model, "language_model", None)
    has_head = hasattr(inner, "get_output_embeddings") and inner.get_output_embeddings() is not None
    return inner.forward if has_head else model.forward


def _plain(config: Any) -> Any:
    """A config that runs only the code of transformers itself, without the kernels that it names."""
    for part in _configs(config):
        part._attn_implementation = None  # noqa: SLF001  (may name a repository; there is no public way)
        part._experts_implementation = "eager"  # noqa: SLF001  (each expert a product of its own)
        if getattr(part, "use_cache", None):
            part.use_cache = False  # a block that runs again would find itself in it
        for key in ("quantization_config", "fusion_config", "transformers_weights"):
            if getattr(part, key, None) is not None:
                setattr(part, key, None)
    return config


def _configs(config: Any) -> Iterator[Any]:
    """A config and its parts, such as text_config."""
    yield config
    for key in getattr(config, "sub_configs", {}):
        part = getattr(config, key, None)
        if part is not None:
            yield from _configs(part)


def _model_class(transformers: Any, config: Any) -> Any:
    """The class that the config names, with its head; else the one for the model type."""
    named = config.architectures
    for name in named if isinstance(named, list) else ():
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if inspect.isclass(found) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.MODEL_MAPPING.get(type(config), None) or transformers.AutoModel


def _numbered(device: str) -> torch.device:
    """A device by its name and number: which one has none may depend on the thread that asks."""
    found = torch.device(device)
    is_open = found.type == "cuda" and found.index is None
    return torch.device("cuda", torch.cuda.current_device()) if is_open else found


def _longest(model: Any, tokenizer: Any) -> int | None:
    """The most tokens that a sequence may have, None if unknown."""
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limits = [getattr(text, key, None) for key in _LENGTH_KEYS]
    limits.append(tokenizer.model_max_length)  # a huge number if it is not set
    limits += [
        # RoBERTa and its descendants count positions from the one after padding.
        module.num_embeddings - module.padding_idx - 1
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding)
        and module.padding_idx is not None
        and "position" in name.rpartition(".")[2]
    ]
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 1 << 40]
    return min(known, default=None)


class _Saying(Struct, frozen=True):
    """Says in one line what transformers says of a checkpoint, by the path that the user knows."""

    path: Path
    folder: Path

    @contextmanager
    def one_line(self, what: str) -> Iterator[None]:
        """Turn any error of transformers into one line, without its warnings."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except SparsepruneError:
            raise
        except torch.OutOfMemoryError as error:
            raise SparsepruneError(f"{what}: the device has too little memory") from error
        except Exception as error:
            if is_out_of_memory(error):
                raise
            line = _first_line(error).replace(str(self.folder), str(self.path))
            raise CheckpointError(f"{what}: {line}") from error


def _first_line(error: Exception) -> str:
    """The first line of an error, and the next ones while a line ends with a colon."""
    kind = type(error).__name__
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    if not lines:
        return kind
    said = " ".join(lines[: 1 + next((at for at, line in enumerate(lines) if not line.endswith(":")), 0)])
    return said if isinstance(error, OSError | ValueError | RuntimeError) else f"{kind}: {said}"
