"""What an output says of itself: a model card, and a mark in its config.json and its headers.

Owns which names of the input and which words of a command they tell, so that nothing in them depends on where
a run was made. Reads small files, writes none. Called by the modules that write outputs.
"""

from __future__ import annotations

import json
import re
import shlex
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct

from sparseprune import __version__
from sparseprune.api.applied import applied_report
from sparseprune.api.run import digest
from sparseprune.checkpoint import read_config
from sparseprune.checkpoint.discovery import MARK, MARKED, RESULTS
from sparseprune.checkpoint.documents import read_object_if_any, strict_json
from sparseprune.checkpoint.file_io import machine_errors
from sparseprune.checkpoint.hub import HubAddress
from sparseprune.checkpoint.layout import with_mark, with_texts
from sparseprune.checkpoint.remote import is_on_hub, located
from sparseprune.errors import CheckpointError, SparsepruneError, printable
from sparseprune.results.measuring import MadeBy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sparseprune.api.options import Source
    from sparseprune.checkpoint import Checkpoint, OutputLayout
    from sparseprune.report.card import Deed
    from sparseprune.results import Reapplication, Removal, Report

_CARD, _CONFIG = PurePosixPath("README.md"), PurePosixPath("config.json")
_LARGEST_CARD = 10_000_000  # bytes; a larger one is copied as it is
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$")
_LIBRARIES = {
    "modules.json": "sentence-transformers",
    "config_sentence_transformers.json": "sentence-transformers",
    "model_index.json": "diffusers",
    "open_clip_config.json": "open_clip",
}
_Verb = Literal["apply", "remove", "reapply"]
_COMMANDS: dict[str, _Verb] = {
    "sparseprune.report.v1": "apply",
    "sparseprune.remove.v1": "remove",
    "sparseprune.reapply.v1": "reapply",
}
_LONGEST_WORD = 200  # characters of a value in a command that are told


class _Names(Struct, frozen=True):
    """The name of the input's folder, and the id of a model that its files have or lie under.

    That is the input's own where it `is_parent`, else that of what it was made from.
    """

    folder: str
    base: str | None
    is_parent: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint, config: Mapping[str, Any]) -> _Names:
        if is_on_hub(checkpoint.path):
            return cls(str(checkpoint.path), HubAddress.of(str(checkpoint.path)).model, is_parent=True)
        cached = _CACHED.search(checkpoint.path.absolute().as_posix())
        if cached is not None:
            return cls(cached[2], f"{cached[1]}/{cached[2]}", is_parent=True)
        folder, named = name_of(checkpoint.path), config.get("_name_or_path")
        base = named if isinstance(named, str) and _HUB_ID.fullmatch(named) else None
        is_parent = base is not None and base.rpartition("/")[2].lower() == folder.lower()
        return cls(folder, base, is_parent)

    @property
    def model(self) -> str:
        return self.base if self.base is not None and self.is_parent else self.folder


class Explained(Struct, frozen=True):
    """What was asked for, as the output tells of it.

    `words` stand behind the name of the input in the command. `spec` is the text of the spec and `spec_name`
    how it is named. `statistics` are those by which survivors were rebuilt.
    """

    checkpoint: Checkpoint
    verb: _Verb
    words: Sequence[str]
    spec: str | None = None
    spec_name: str | None = None
    statistics: Path | None = None

    def layout(self, layout: OutputLayout) -> OutputLayout:
        """The layout of an output that tells of itself; a single file does so in its header alone."""
        layout = with_mark(layout, self.mark())
        if not self.checkpoint.is_directory:
            return layout
        files = {file.path: file for file in layout.files}
        config = None
        if _CONFIG in files:
            config = self._marked(files[_CONFIG].begins_with or self._read(_CONFIG))
        is_taken = any(path.parts[0] == _CARD.name for path in files if path != _CARD)
        is_large = _CARD in files and files[_CARD].size > _LARGEST_CARD
        card = None if is_taken or is_large else _CARD
        return with_texts(layout, {} if config is None else {_CONFIG: config}, card)

    def card(self, result: Report | Removal | Reapplication) -> bytes:
        """The text of the model card, which keeps the bytes of the old one."""
        from sparseprune.report.card import card_text

        old = any(other.path == _CARD for other in self.checkpoint.others)
        text = self._read(_CARD).decode(errors="surrogateescape") if old else None
        return card_text(self.deed(), result, text).encode(errors="surrogateescape")

    def deed(self) -> Deed:
        """What the card tells of the input and the command."""
        from sparseprune.report.card import Deed

        config = self._config()
        names = _Names.of(self.checkpoint, config)
        return Deed(
            verb=self.verb,
            model=names.model,
            command=shlex.join(["sparseprune", self.verb, names.folder, *map(_short, self.words)]),
            spec=self.spec,
            base_model=names.base,
            is_parent=names.is_parent,
            library_name=self._library(config),
            statistics=None if self.statistics is None else _statistics_text(self.statistics),
        )

    def mark(self) -> dict[str, str]:
        """What config.json, and headers without the names, tell of how the output was made."""
        names = _Names.of(self.checkpoint, self._config())
        mark = {"version": __version__, "command": self.verb, "from": names.model}
        if self.spec_name is not None:
            mark["spec"] = self.spec_name
        if self.spec is not None:
            mark["spec_sha256"] = digest(self.spec)
        return {key: printable(text) for key, text in mark.items()}  # a name may be no UTF-8

    def _marked(self, text: bytes) -> bytes | None:
        """The text of a config.json with the mark at its end; None where it is no object that can be read."""
        try:
            value = strict_json(text.decode())
        except ValueError:
            return None
        if not isinstance(value, dict):
            return None
        mark = self.mark()
        if MARK in value:
            again = {key: each for key, each in value.items() if key != MARK}
            return f"{json.dumps({**again, MARK: mark}, indent=2)}\n".encode()
        head, brace, tail = text.decode().rpartition("}")
        between = "," if value else ""
        one = json.dumps(mark, ensure_ascii=True)
        return f'{head.rstrip()}{between}\n  "{MARK}": {one}\n{brace}{tail}'.encode()

    def _config(self) -> Mapping[str, Any]:
        """The config.json, empty where there is none that can be read."""
        try:
            return read_object_if_any(self.checkpoint.path / _CONFIG) or {}
        except SparsepruneError:
            return {}

    def _library(self, config: Mapping[str, Any]) -> str | None:
        names = {str(other.path) for other in self.checkpoint.others}
        found = next((library for file, library in _LIBRARIES.items() if file in names), None)
        return found or ("transformers" if "model_type" in config else None)

    def _read(self, path: PurePosixPath) -> bytes:
        with machine_errors(self.checkpoint.path / path, "cannot be read"):
            return (self.checkpoint.path / path).read_bytes()


def explained_by_spec(
    asked: Source,
    text: str,
    checkpoint: Checkpoint,
    *,
    verb: Literal["apply", "remove"],
    more: Sequence[str] = (),
) -> Explained:
    """What was asked for by a spec of this text, which has the usual name where it was given as a text."""
    name = "spec.toml" if "\n" in asked.spec else Path(asked.spec).name
    words = [name]
    for variable, value in asked.overrides.items():
        words += ["--set", f"{variable}={value}"]
    if asked.within is not None:
        words += ["--within", name_of(asked.within)]
    if asked.reconstruct is not None:
        words += ["--reconstruct", asked.reconstruct]
    if asked.stats is not None:
        words += ["--stats", name_of(asked.stats)]
    if asked.text is not None:
        for file in asked.text.windows.text:
            words += ["--text", name_of(Path(file))]
        for option in asked.text.words:
            words += [] if option.startswith("--text ") else option.split(" ", 1)
    return Explained(checkpoint, verb, [*words, *more], text, name)


def made_by(checkpoint: Checkpoint) -> MadeBy | None:
    """The run that made a checkpoint, by its config.json, the report beside it, or the header of a shard."""
    told: object = None
    with suppress(SparsepruneError):
        config = read_config(checkpoint) if checkpoint.is_directory else None
        told = (config or {}).get(MARK) or _told_by(applied_report(checkpoint)) or _marked_in(checkpoint)
    if not isinstance(told, dict):
        return None
    command = next((verb for verb in _COMMANDS.values() if verb == told.get("command")), None)
    found = [told.get(key) for key in ("version", "from", "spec")]
    version, model, spec = (one if isinstance(one, str) else None for one in found)
    if version is None or command is None:
        return None
    return MadeBy(version=version, command=command, model=model, spec=spec)


def _marked_in(checkpoint: Checkpoint) -> dict[str, str]:
    """The mark in the headers, by the first that has one."""
    marks = (
        {key: header.metadata[name] for name, key in MARKED.items() if name in header.metadata}
        for header in checkpoint.headers.values()
    )
    return next(filter(None, marks), {})


def _told_by(report: Mapping[str, Any] | None) -> dict[str, object]:
    """What a report has of what a mark has."""
    if report is None:
        return {}
    came = report.get("input")
    return {
        "version": report.get("sparseprune"),
        "command": _COMMANDS.get(str(report.get("schema"))),
        "from": name_of(located(came)) if isinstance(came, str) else None,
    }


def name_of(path: Path) -> str:
    """The name of a file or folder, wherever it lies; of one on the hub the whole address.

    >>> name_of(Path("/models/decoder/."))
    'decoder'
    """
    if is_on_hub(path):
        return str(path)
    whole = path.absolute()
    return (whole.resolve() if whole.name in {"", ".."} else whole).name


def _short(word: str) -> str:
    return word if len(word) <= _LONGEST_WORD else f"{word[:_LONGEST_WORD]}..."


def _statistics_text(path: Path) -> str:
    """The name of statistics, and what they rest on where their report tells it."""
    try:
        report = read_object_if_any(path / RESULTS / "report.json") or {}
    except CheckpointError:
        report = {}
    numbers = [report.get(key) for key in ("tokens", "sequences", "length")]
    name = name_of(path)
    if not all(isinstance(number, int) for number in numbers):
        return name
    tokens, sequences, length = numbers
    return f"{name}, over {tokens:,} tokens in {sequences:,} sequences of {length:,}"
