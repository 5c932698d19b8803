"""Documents out of text files: plain text, or JSON lines with a field.

Owns reading and what is wrong with a file; knows neither tokens nor models.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sparseprune.errors import MachineError, SparsepruneError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from typing import TextIO

FIELD = "text"  # of a JSON line, where no other one is asked for
_LINES = (".jsonl", ".ndjson")


def read_documents(paths: Sequence[Path], field: str | None, most: int) -> list[str]:
    """The documents of some files, of each file the first `most` characters or a little more.

    A file is one document; one that ends in .jsonl, or any if `field` is given, has a document in this field
    of each line.

    Raises:
        SparsepruneError: no such file, no text in it, not UTF-8, a line that has no such field.
    """
    documents = [document for path in paths for document in _documents(path, field, most)]
    if not any(document.strip() for document in documents):
        raise SparsepruneError(f"{', '.join(map(str, paths))}: there is no text in it")
    return documents


def _documents(path: Path, field: str | None, most: int) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            if field is None and path.suffix.lower() not in _LINES:
                return [file.read(most)]
            return list(_lines(path, file, field or FIELD, most))
    except FileNotFoundError as error:
        raise SparsepruneError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise SparsepruneError(f"{path}: this is a directory, wanted a file of text") from error
    except UnicodeDecodeError as error:
        raise SparsepruneError(f"{path}: not UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise MachineError(f"{path}: cannot be read: {error.strerror}") from error


def _lines(path: Path, file: TextIO, field: str, most: int) -> Iterator[str]:
    read = 0
    for number, line in enumerate(file, 1):
        if read >= most:
            return
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SparsepruneError(f"{path}: line {number} is not JSON: {error}") from error
        text = value.get(field) if isinstance(value, dict) else None
        if not isinstance(text, str):
            there = ", ".join(value) if isinstance(value, dict) else "no object"
            raise SparsepruneError(
                f'{path}: line {number} has no text under "{field}", but {there}; name the field with --field'
            )
        read += len(text)
        yield text
