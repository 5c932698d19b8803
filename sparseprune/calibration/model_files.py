"""What transformers reads of a checkpoint as files, as a folder on this machine.

Owns which files of a checkpoint in a store are fetched for that: those that are no weights. Of the weights
there are files with the headers alone, whose data are holes. Called by loading.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from sparseprune.checkpoint import file_io
from sparseprune.checkpoint.file_io import machine_errors, remote_errors
from sparseprune.checkpoint.remote import RemotePath

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import PurePosixPath

    from sparseprune.checkpoint import Checkpoint
    from sparseprune.checkpoint.discovery import OtherFile

_LARGEST = 256 << 20  # bytes of a tokenizer; the largest known ones have a tenth
_SIDE_BY_SIDE = 8
_TEMPLATES = "additional_chat_templates"
_UNREAD = frozenset({".md", ".py", ".png", ".jpg", ".gif", ".pdf"})


@contextmanager
def model_folder(checkpoint: Checkpoint) -> Iterator[Path]:
    """A folder from which transformers can load a checkpoint, but for the data of its weights.

    That of the checkpoint itself, or a temporary one where the checkpoint lies in a store; then the data are
    zeros, which nobody may take for weights.

    Raises:
        MachineError: the store fails, or the temporary folder is full.
    """
    place = checkpoint.path
    if not isinstance(place, RemotePath):
        yield place
        return
    with TemporaryDirectory(prefix="sparseprune-") as name:
        folder = Path(name)
        wanted = [one.path for one in checkpoint.others if _is_read(one)]
        _fetch(place, wanted, folder)
        for shard, header in checkpoint.headers.items():
            path = folder / shard.relative
            with machine_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                file_io.create(path, header.file_size, header.raw)
        yield folder


def _is_read(file: OtherFile) -> bool:
    """Whether transformers may want a file that holds no weights of the checkpoint."""
    near = file.path.parent.parts in {(), (_TEMPLATES,)}
    return near and file.nbytes <= _LARGEST and file.path.suffix.lower() not in _UNREAD


def _fetch(place: RemotePath, paths: Sequence[PurePosixPath], folder: Path) -> None:
    def fetch(path: PurePosixPath) -> None:
        with remote_errors(place / path):
            data = (place / path).read_bytes()
        with machine_errors(folder / path):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)

    with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
        list(pool.map(fetch, paths))
