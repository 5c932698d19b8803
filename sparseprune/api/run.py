"""One call of the library: who hears of it, its warnings, its progress, and its output until that has a name.

Knows no command. Nothing here prints, and nothing touches signals: the command line listens. Called by the
other modules of this package.
"""

from __future__ import annotations

import gc
import hashlib
import os
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from sparseprune.errors import CheckFailedError, SparsepruneError, printable
from sparseprune.errors import size as size_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from sparseprune.checkpoint import Output, OutputLayout, Source
    from sparseprune.execution.cluster import Cluster
    from sparseprune.results.fields import Document

Made = TypeVar("Made", bound="Document")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a step of a run is: `done` of `total` bytes, or of what else `counts` says.

    `what` names the step, such as "pruning"; `unit` what is at work, such as "model.layers.7.mlp"; `already`
    of them were done by an earlier run that this one continues. Where bytes are read several times, or take
    unlike work, `done` is the share of the work that is done. The last of a step has `ended`, also where an
    error ends it.
    """

    what: str
    done: int
    total: int
    already: int = 0
    unit: str = ""
    counts: Literal["bytes", "tokens"] = "bytes"
    ended: bool = False


class Ending(Protocol):
    """An output at work: whether it has its name yet, and what it must agree with to be continued."""

    @property
    def named(self) -> bool: ...
    @property
    def identity(self) -> Mapping[str, str] | None: ...


def _unheard(*_: object, **__: object) -> None:
    """What happens where nobody listens."""


@dataclass(frozen=True, slots=True)
class Listener:
    """Functions that hear of a run while it goes on.

    `progress` is called from any thread, one call at a time. `warning` gets the lines that results have as
    `warnings`, when they come up; `note` what else a person may want to know; `output` each output that
    begins to be written; `shortfall` what is missing from what was asked for, although the call succeeds.
    """

    progress: Callable[[Progress], None] | None = None
    warning: Callable[[str], None] = _unheard
    note: Callable[[str], None] = _unheard
    output: Callable[[Ending], None] = _unheard
    shortfall: Callable[[str], None] = _unheard


class Advance(Protocol):
    """Says that so much more work is done, on what this label names; cheap, and from any thread."""

    def __call__(self, nbytes: int, unit: str = "") -> None: ...


class Run:
    """A call while it lasts; `warnings` are the lines so far, `strict` makes the first of them an error."""

    def __init__(self, hears: Listener | Callable[[Progress], None] | None, *, strict: bool = False) -> None:
        self.listener = hears if isinstance(hears, Listener) else Listener(hears)
        self.warnings: list[str] = []
        self.cluster: Cluster | None = None
        self._strict = strict
        self._began = time.perf_counter()
        self._advance: Advance | None = None

    @contextmanager
    def on(self, address: str | None, jobs: int | None, *, text: bool = False) -> Iterator[int | None]:
        """Work on the cluster at an address meanwhile, here where it is None; gives the jobs of a machine.

        SparsepruneError for a run with a `text`, which goes through the model block by block.
        """
        if address is None:
            yield jobs
            return
        if text:
            raise SparsepruneError(
                "--on: goes without --text, which runs the model block by block on one machine; use "
                "calibrate, and then --stats"
            )
        from sparseprune.execution.cluster import Cluster
        from sparseprune.execution.machines import refuse_unlike
        from sparseprune.report.wording import many

        with Cluster(address, jobs) as cluster:
            self.warn(*refuse_unlike(cluster))
            self.note(f"on {many(len(cluster.nodes), 'machine')} with {many(cluster.cpus, 'CPU')}")
            self.cluster = cluster
            try:
                yield max(node.cpus for node in cluster.nodes)
            finally:
                self.cluster = None

    @contextmanager
    def reading(self) -> Iterator[Source]:
        """Where the input is read, by the machines of the cluster where there is one."""
        from sparseprune.checkpoint import TensorReader

        with TensorReader() as reader:
            if self.cluster is None:
                yield reader
                return
            from sparseprune.execution.spreading import ClusterSource

            yield ClusterSource(reader, self.cluster)

    @property
    def seconds(self) -> float:
        """Wall time since the call."""
        return time.perf_counter() - self._began

    def warn(self, *lines: str) -> None:
        """Keep these lines and let them be heard; SparsepruneError with all of them under `strict`."""
        if self._strict and lines:
            raise SparsepruneError(*(f"--strict: {line}" for line in lines))
        for line in map(printable, lines):
            if line not in self.warnings:
                self.warnings.append(line)
                self.listener.warning(line)

    def note(self, *lines: str | None) -> None:
        """Let lines be heard that no result has; None is none."""
        for line in filter(None, lines):
            self.listener.note(line)

    def fetching(self, name: str, done: int, total: int) -> None:
        """So many bytes of a file that is fetched are here; heard with the step at work."""
        if not done:
            self.note(f"fetching {name}, {size_text(total)}")
        if self._advance is not None:
            self._advance(0, f"fetching {name}, {size_text(done)} of {size_text(total)}")

    def checked(self, result: Made, failures: Sequence[str]) -> Made:
        """A result; CheckFailedError with it where something fails."""
        if failures:
            raise CheckFailedError(*failures, result=result)
        return result

    @contextmanager
    def progress(
        self,
        what: str,
        total: int,
        already: int = 0,
        counts: Literal["bytes", "tokens"] = "bytes",
        size: int | None = None,
    ) -> Iterator[Advance]:
        """A step of so much work; gives the function that advances it.

        What is heard counts up to `size` bytes or tokens, to the `total` of the work where that is None.
        """
        hear = self.listener.progress
        if hear is None:
            yield _unheard
            return
        lock, done, label = threading.Lock(), already, ""
        whole = total if size is None else size

        def at(*, ended: bool = False) -> Progress:
            shown, before = (part * whole // total if total else 0 for part in (done, already))
            return Progress(what, shown, whole, before, label, counts, ended)

        def advance(nbytes: int, unit: str = "") -> None:
            nonlocal done, label
            with lock:
                done, label = done + nbytes, unit or label
                hear(at())

        try:
            hear(at())
            self._advance = advance
            yield advance
        finally:
            self._advance = None
            hear(at(ended=True))

    @contextmanager
    def staged(self, output: Output, *, continued: bool = False) -> Iterator[None]:
        """An output while it is written; an error says whether what is finished is kept.

        Notes whether an unfinished run is continued, unless that was `continued` before.
        """
        self.listener.output(output)
        output.tell = self.note
        try:
            with output:
                self.warn(*output.warnings)
                if output.started_over and not continued:
                    changed = " and ".join(output.started_over)
                    self.note(f"an unfinished run is not continued, since {changed} changed")
                if output.resumed and not continued:
                    self.note("an unfinished run is continued")
                yield
        except BaseException as error:
            if output.kept:
                error.add_note(
                    f"what is finished is kept in {output.partial_path}: the same command continues, "
                    "removing the folder gives it up"
                )
            raise

    def write(
        self,
        output: Output,
        work: Callable[[Source], Made],
        refuse_changed: Callable[[], None],
        *,
        spec: bytes | None = None,
        card: Callable[[Made], bytes] | None = None,
        continued: bool = False,
    ) -> Made:
        """Everything between the first byte written and the output's name; gives what `work` gives.

        Beside the output it writes that result, the `spec` and the `card` that tells of the result, where
        the layout has a place for them. Then `refuse_changed` raises where an input is no longer what it was;
        last the output gets its name.
        """
        layout = output.layout
        with self.staged(output, continued=continued), self.reading() as reader:
            result = work(reader)
            output.add_file(layout.report_file, _json_bytes(result))
            if layout.spec_file is not None and spec is not None:
                output.add_file(layout.spec_file, spec)
            if layout.card is not None and card is not None:
                output.add_file(layout.card.path, card(result))
            with self._sending(output) as sent:
                output.complete(sent)
            refuse_changed()
            output.commit()
        return result

    @contextmanager
    def _sending(self, output: Output) -> Iterator[Callable[[int], None]]:
        """The step of what is written and not yet where it belongs, if there is anything."""
        left = output.left_bytes
        if left:
            with self.progress("sending", left) as advance:
                yield advance
        else:
            yield lambda _: None


@contextmanager
def collector_paused() -> Iterator[None]:
    """No search for cyclic garbage, which takes two thirds of the time of planning 50,000 tensors."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            # What is there now is old: else the next object that is made lets all of it be looked through.
            gc.freeze()
            gc.unfreeze()
            gc.enable()


def _json_bytes(document: Document) -> Iterator[bytes]:
    """A result as JSON, in pieces, since all of it may be larger than all else in memory."""
    for piece in chain(document.json_pieces(), ("\n",)):
        # A path that is not UTF-8 has surrogates, which are escapes of JSON as well.
        yield piece.encode(errors="backslashreplace")


def output_shown(output: Path | None, source: Path, layout: OutputLayout) -> str:
    """The output's path as the user would write it: relative where the paths that were given are."""
    if output is not None:
        return str(output)
    from sparseprune.checkpoint.remote import is_on_hub

    is_far = source.is_absolute() and not is_on_hub(source)
    return str(layout.target) if is_far else os.path.relpath(layout.target)


def sizes_of(layout: OutputLayout) -> tuple[int, int]:
    """Bytes of the weights and of the masks of an output."""
    return layout.input_bytes, sum([place.nbytes for place in layout.masks.values()])


def weight_bytes(layout: OutputLayout) -> int:
    """Bytes of the files of an output that hold weights."""
    others = {other.path for other in layout.checkpoint.others} | set(layout.mask_files)
    return sum(file.size for file in layout.files if file.path not in others)


def digest(text: str) -> str:
    """The SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
