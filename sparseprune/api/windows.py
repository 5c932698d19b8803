"""Which windows of which text a model reads: as they are asked for, and cut.

Called by `calibrate`, `eval` and sweeps. Loads torch and transformers only when the text is cut.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from msgspec import Struct

from sparseprune.errors import SparsepruneError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sparseprune.api.run import Run
    from sparseprune.calibration import Chat, LoadedModel, Sequences

_CHARACTERS = 64  # of text that are read for each token that is asked for: some to choose from


class Windows(Struct, frozen=True):
    """What text to read, and how many windows to draw from it; `length` None for what the model takes."""

    text: Sequence[Path]
    sequences: int
    length: int | None
    field: str | None
    seed: int
    special: bool = True

    @property
    def words(self) -> list[str]:
        """The options as they are typed, where they are not the usual ones."""
        usual = {"sequences": 128, "length": None, "field": None, "seed": 0}
        changed = {name: getattr(self, name) for name in usual if getattr(self, name) != usual[name]}
        return [
            *(f"--text {file}" for file in self.text),
            *(f"--{name} {value}" for name, value in changed.items()),
            *([] if self.special else ["--no-special"]),
        ]

    def documents(self) -> list[str | Chat]:
        """The text, as much of it as there is a use for."""
        from sparseprune.calibration import read_documents

        return read_documents(self.text, self.field, _CHARACTERS * self.sequences * (self.length or 2048))

    def cut(self, run: Run, documents: Sequence[str | Chat], models: Sequence[LoadedModel]) -> Sequences:
        """Windows of documents that all of the models take, by the tokenizer of the first one."""
        from sparseprune.calibration import Chat, make_sequences

        tokenizer = models[0].tokenizer
        if any(isinstance(one, Chat) for one in documents) and not tokenizer.chat_template:
            run.note('the tokenizer has no chat template: messages are read as "role: content" lines')
        run.note("cutting the text into sequences")
        length = self.length or min(one.length for one in models)
        longest = min((one.longest for one in models if one.longest is not None), default=length)
        if length > longest:
            raise SparsepruneError(f"--length {length}: the model takes {longest} tokens at most")
        drawn = (self.sequences, length, self.seed)
        sequences = make_sequences(documents, tokenizer, *drawn, special=self.special)
        for one in models:
            one.refuse_strange(sequences.ids)
        return sequences


class AskedText(Struct, frozen=True):
    """A text by which survivors are rebuilt, block by block.

    `gradients` of the dense model are taken first. `tune` replaces that of every rule. `scratch` is a folder
    for hidden states, None for a temporary one.
    """

    windows: Windows
    gradients: bool = False
    tune: int | None = None
    scratch: Path | None = None

    @property
    def words(self) -> list[str]:
        """The options as they are typed."""
        tune = [] if self.tune is None else [f"--tune {self.tune}"]
        return [*self.windows.words, *(["--gradients"] if self.gradients else []), *tune]


@contextmanager
def folder_for_states(given: Path | None) -> Iterator[Path]:
    """The folder in which hidden states wait: a given one, or one that is gone afterwards."""
    if given is not None:
        yield given
        return
    with TemporaryDirectory(prefix="sparseprune-") as folder:
        yield Path(folder)
