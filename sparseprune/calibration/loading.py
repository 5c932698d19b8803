"""The model and the tokenizer of a checkpoint, and how text is run through it.

Owns what is asked of transformers, and what its refusals mean in one line. No code of a checkpoint is run and
nothing is fetched.
"""

from __future__ import annotations

import inspect
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from sparseprune.calibration.watching import EnoughError
from sparseprune.errors import CheckpointError, SparsepruneError, is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from sparseprune.checkpoint import Checkpoint

_LONGEST = 2048  # tokens of a sequence where nobody asks for another length and the model takes more
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
_FREE_SHARE = 0.7  # of the free memory, that a model may take before parts of it stay on disk


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model that computes nothing but what text needs; `missing` are weights that the checkpoint lacks."""

    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    longest: int | None
    device: torch.device
    missing: tuple[str, ...]

    @property
    def length(self) -> int:
        """Tokens of a sequence, where nobody asks for another number."""
        return min(_LONGEST, self.longest or _LONGEST)

    def run(self, ids: Tensor) -> None:
        """One forward pass over (sequences, length); what comes out is not looked at.

        Raises:
            SparsepruneError: the model does not take this many tokens.
        """
        forward, words = _text_forward(self.model)
        given = ids.to(self.device)
        offered = {
            "input_ids": given,
            "attention_mask": torch.ones_like(given),
            "use_cache": False,
            "decoder_input_ids": given if self.model.config.is_encoder_decoder else None,
        }
        try:
            with torch.no_grad():
                forward(**{key: offered[key] for key in words if offered.get(key) is not None})
        except (EnoughError, SparsepruneError):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise SparsepruneError(
                f"the model cannot be run over {ids.shape[1]} tokens of text alone: {reason}"
            ) from error

    def refuse_strange(self, ids: Tensor) -> None:
        """SparsepruneError where the tokenizer gives tokens that the model has no embeddings for."""
        try:
            known = getattr(self.model.get_input_embeddings(), "num_embeddings", None)
        except NotImplementedError:  # transformers does not know which they are
            known = None
        if known is not None and int(ids.max()) >= known:
            raise SparsepruneError(
                f"the tokenizer gives token {int(ids.max())}, the model has {known} of them: these two do "
                "not belong together"
            )


def load_model(
    checkpoint: Checkpoint,
    device: str,
    folder: Path,
    max_memory: Mapping[Any, Any] | None = None,
) -> LoadedModel:
    """The model of a checkpoint's directory on a device; what has no room there is kept in `folder`.

    `max_memory` is that of accelerate: bytes by device.

    Raises:
        SparsepruneError: transformers is not installed, does not know the architecture, cannot load it.
        CheckpointError: no directory, no config.json, no tokenizer.
    """
    transformers = _transformers()
    path = checkpoint.path
    if not checkpoint.is_directory:
        raise CheckpointError(
            f"{path}: a model is run by its config and its tokenizer; give the directory that has them"
        )
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: there is no config.json, by which the model is known")
    own = {"local_files_only": True, "trust_remote_code": False}
    with _told(f"{path}: transformers {transformers.__version__} does not know this model"):
        config = transformers.AutoConfig.from_pretrained(path, **own)
    with _told(f"{path}: there is no tokenizer that transformers can read"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **own)
    for part in _configs(config):
        part._experts_implementation = "eager"  # noqa: SLF001  (each expert a product of its own; no public way)
    placed = _placement(checkpoint, device, folder, max_memory)
    with _told(f"{path}: transformers {transformers.__version__} cannot load this model"):
        model, info = _model_class(transformers, config).from_pretrained(
            path,
            config=config,
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **own,
            **placed,
        )
    unlike = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"])
    if unlike:
        raise CheckpointError(
            f"{path}: {len(unlike)} tensors have other shapes than config.json says, such as {unlike[0]}"
        )
    with _told(f"{path}: the model cannot be put on {device}"):
        model = model.eval() if "device_map" in placed else model.eval().to(device)
    return LoadedModel(
        model,
        tokenizer,
        _longest(config, tokenizer),
        torch.device(device),
        tuple(sorted(info["missing_keys"])),
    )


def _transformers() -> Any:
    """The package, silent from here on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        import transformers  # noqa: PLC0415
    except ImportError as error:
        raise SparsepruneError(
            "calibrate needs transformers, which is not installed: pip install 'sparseprune[calibrate]'"
        ) from error
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return transformers


def _configs(config: Any) -> Iterator[Any]:
    """A config and those of its parts, such as text_config."""
    yield config
    for key in getattr(config, "sub_configs", {}):
        part = getattr(config, key, None)
        if part is not None:
            yield from _configs(part)


def _model_class(transformers: Any, config: Any) -> Any:
    """The class that the config names, with its head; else the one that goes with the model type."""
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if inspect.isclass(found) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModel


def _placement(
    checkpoint: Checkpoint, device: str, folder: Path, max_memory: Mapping[Any, Any] | None
) -> dict[str, Any]:
    """Where from_pretrained puts what: all on the device, or as accelerate finds room for it."""
    if find_spec("accelerate") is None:
        return {}
    nbytes = sum(stored.nbytes for stored in checkpoint.tensors.values())
    if device == "cpu" and max_memory is None and nbytes < _FREE_SHARE * _free_bytes():
        return {}
    if device == "cpu":  # whatever else there is: it was not asked for
        max_memory = max_memory or {"cpu": int(_FREE_SHARE * _free_bytes())}
    elif max_memory is None:
        free, _ = torch.cuda.mem_get_info(device)
        if nbytes < _FREE_SHARE * free:
            return {}
    return {"device_map": "auto", "offload_folder": str(folder), "max_memory": max_memory}


def _free_bytes() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 1 << 62


def _longest(config: Any, tokenizer: Any) -> int | None:
    """The most tokens that a sequence may have, None where nothing says so."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limits = [getattr(text, key, None) for key in _LENGTH_KEYS]
    limits.append(tokenizer.model_max_length)  # a huge number where it is not set
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 1 << 40]
    return min(known, default=None)


def _text_forward(model: Any) -> tuple[Callable[..., Any], list[str]]:
    """What to call with tokens, and the names of what it takes."""
    # Models of text beside images (CLIP, SigLIP) want both, or their text alone under this name.
    forward = getattr(model, "get_text_features", None) or model.forward
    return forward, list(inspect.signature(forward).parameters)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """A refusal by transformers, whichever kind it has, in one line."""
    try:
        yield
    except SparsepruneError:
        raise
    except torch.OutOfMemoryError as error:
        raise SparsepruneError(f"{what}: the device has too little memory") from error
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{what}: {reason}") from error
