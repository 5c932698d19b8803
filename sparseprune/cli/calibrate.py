"""`calibrate`: from text and a checkpoint to statistics under their name, and what is told about it."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparseprune import __version__
from sparseprune.checkpoint import (
    StagedOutput,
    checkpoint_identity,
    lay_out_statistics,
    open_checkpoint,
    refuse_changed,
)
from sparseprune.checkpoint.publish import free_bytes
from sparseprune.cli.console import print_json, print_result, stderr_console, tell
from sparseprune.cli.progress import TOKENS, progress
from sparseprune.cli.signals import temporary_folder
from sparseprune.cli.writing import digest, interrupts_told, output_shown, report_bytes, write_output
from sparseprune.errors import SparsepruneError, printable
from sparseprune.report.wording import many
from sparseprune.results.measuring import CollectedStatistics, Statistics, WithoutStatistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparseprune.calibration import Calibration, LoadedModel, Sequences
    from sparseprune.checkpoint import Checkpoint, Collected, OutputLayout, StatisticsKind

_CHARACTERS = 64  # of text that are read for each token that is asked for: some to choose from


@dataclass(frozen=True, slots=True)
class Request:
    """What was typed; `length` None for what the model takes."""

    checkpoint: Path
    text: tuple[Path, ...]
    output: Path | None
    kind: StatisticsKind
    sequences: int
    length: int | None
    field: str | None
    seed: int
    device: str
    memory: int
    special: bool = True
    force: bool = False
    json: bool = False
    quiet: bool = False
    verbose: bool = False


def run(request: Request) -> None:
    """Read, plan, run the text through the model, commit, tell."""
    from sparseprune.calibration import Chat, read_documents

    began = time.perf_counter()
    checkpoint = open_checkpoint(request.checkpoint)
    target = _target(request, checkpoint)
    # Before minutes are spent on a model.
    StagedOutput(lay_out_statistics(checkpoint, target, request.kind, ()), request.force).refuse_early()
    most = _CHARACTERS * request.sequences * (request.length or 2048)
    documents = read_documents(request.text, request.field, most)
    _say(request, f"loading the model of {request.checkpoint}")
    # Not before something is said: this takes seconds.
    from sparseprune.calibration import load_model, make_sequences, plan_calibration
    from sparseprune.execution import resolve_device

    device = resolve_device(request.device, uses_torch=True)
    with temporary_folder("sparseprune-") as folder:
        loaded = load_model(checkpoint, device, Path(folder))
        if any(isinstance(one, Chat) for one in documents) and not loaded.tokenizer.chat_template:
            _say(request, 'the tokenizer has no chat template: messages are read as "role: content" lines')
        _say(request, "cutting the text into sequences")
        sequences = make_sequences(
            documents,
            loaded.tokenizer,
            request.sequences,
            _length(request, loaded),
            request.seed,
            special=request.special,
        )
        loaded.refuse_strange(sequences.ids)
        _say(request, "finding out which matrices meet text")
        plan = plan_calibration(loaded, sequences, checkpoint, request.kind, request.memory)
        layout = lay_out_statistics(checkpoint, target, request.kind, plan.tensors)
        output = StagedOutput(layout, request.force, _identity(request, loaded, sequences, plan, checkpoint))
        _warn_of_little_room(request, plan, layout)
        with interrupts_told(output):
            found = write_output(
                output,
                lambda _: _worked(request, loaded, sequences, plan, output, began),
                lambda: refuse_changed(checkpoint, ()),
                quiet=request.quiet,
            )
            if not request.quiet:
                _tell(request, loaded, sequences, found)
            if request.json:
                print_json(found)
            else:
                print_result(output_shown(request, layout))


def _say(request: Request, text: str) -> None:
    if not request.quiet:
        tell(text)


def _warn_of_little_room(request: Request, plan: Calibration, layout: OutputLayout) -> None:
    """The sums of an unfinished pass are written while those of a moment before are still there."""
    sums = max(sum(unit.nbytes(request.kind) for unit in units) for units in plan.passes)
    wanted, free = layout.output_bytes + 2 * sums, free_bytes(layout.target.parent)
    if free < wanted:
        _say(
            request,
            f"warning: {layout.target.parent}: {free} bytes are free, but keeping the sums of an unfinished "
            f"run takes {wanted}: it may have to begin anew after an interruption",
        )


def _identity(
    request: Request, loaded: LoadedModel, sequences: Sequences, plan: Calibration, checkpoint: Checkpoint
) -> dict[str, str]:
    """What an unfinished run must agree with to be continued, to the same bytes."""
    from sparseprune.calibration import passes_digest

    drawn = hashlib.sha256(sequences.ids.numpy().tobytes() + sequences.counted.numpy().tobytes())
    length = sequences.ids.shape[1]
    options = (request.sequences, length, request.seed, request.special, request.field, request.kind)
    return {
        "the version": __version__,
        "the versions of torch and transformers": loaded.versions,
        "the input": checkpoint_identity(checkpoint),
        "the options": json.dumps(options),
        "the text": json.dumps([list(sequences.ids.shape), drawn.hexdigest()]),
        "--memory": digest(passes_digest(plan)),
        "the device or its number of threads": loaded.machine,
    }


def _length(request: Request, loaded: LoadedModel) -> int:
    if request.length is not None and loaded.longest is not None and request.length > loaded.longest:
        raise SparsepruneError(f"--length {request.length}: the model takes {loaded.longest} tokens at most")
    return request.length or loaded.length


def _target(request: Request, checkpoint: Checkpoint) -> Path:
    if request.output is not None:
        return request.output
    source = checkpoint.path.absolute()
    return source.with_name(f"{source.name}-stats")


def _worked(
    request: Request,
    loaded: LoadedModel,
    sequences: Sequences,
    plan: Calibration,
    output: StagedOutput,
    began: float,
) -> Statistics:
    """Collect, and write the report beside the statistics."""
    from sparseprune.calibration import already_run, calibrate

    total = sequences.ids.numel() * len(plan.passes)
    already = already_run(sequences, plan, output)
    with progress("calibrating", total, quiet=request.quiet, already=already, sizes=TOKENS) as advance:
        counted = calibrate(loaded, sequences, plan, output, request.kind, advance)
    statistics = Statistics(
        input=str(request.checkpoint),
        output=output_shown(request, output.layout),
        kind=request.kind,
        device=str(loaded.device),
        seconds=round(time.perf_counter() - began, 3),
        text=tuple(str(path) for path in request.text),
        sequences=len(sequences.ids),
        length=sequences.ids.shape[1],
        seed=request.seed,
        special=request.special,
        tokens=sequences.tokens,
        passes=len(plan.passes),
        matrices=tuple(
            CollectedStatistics(
                name=one.name,
                features=one.features,
                experts=one.experts,
                tokens=_one_or_all(one, counted[one.name].rows),
                divided_by=_one_or_all(one, counted[one.name].divisors),
                weights=dict(one.weights),
            )
            for one in plan.tensors
        ),
        missing=tuple(loaded.missing),
        without=tuple(WithoutStatistics(name=name, why=why) for name, why in plan.without),
    )
    output.add_file(output.layout.report_file, report_bytes(statistics))
    return statistics


def _one_or_all(one: Collected, numbers: list[int]) -> int | tuple[int, ...]:
    return tuple(numbers) if one.experts is not None else numbers[0]


def _tell(request: Request, loaded: LoadedModel, sequences: Sequences, found: Statistics) -> None:
    for line in _summary(request, loaded, sequences, found):
        stderr_console().print(printable(line), markup=False, highlight=False, soft_wrap=True)


def _summary(request: Request, loaded: LoadedModel, sequences: Sequences, found: Statistics) -> list[str]:
    matrices, without = found.matrices, found.without
    weights = sum(len(one.weights) for one in matrices)
    lines = []
    if len(sequences.ids) < request.sequences:
        lines.append(
            f"the text has {len(sequences.ids)} sequences, fewer than the {request.sequences} asked for"
        )
    if loaded.missing:
        lines.append(
            f"the checkpoint lacks {len(loaded.missing)} weights of the model, such as {loaded.missing[0]}"
        )
    lines += [
        (
            f"{found.kind} statistics of {weights:,} matrices in {len(matrices):,} tensors, over "
            f"{found.tokens:,} tokens in {found.sequences} sequences of {found.length}"
        ),
        *_few(matrices, verbose=request.verbose),
    ]
    if without:
        shown = without if request.verbose else without[:1]
        such = "" if request.verbose or len(without) == 1 else ", such as"
        lines.append(f"no statistics of {many(len(without), 'matrix')}{such}")
        lines += [f"  {one.name}: {one.why}" for one in shown]
    rate = found.tokens * found.passes / max(found.seconds, 1e-9)
    passes = f", in {found.passes} passes" if found.passes > 1 else ""
    lines.append(f"{found.seconds:.1f} s, {rate:,.0f} tokens/s{passes}, on {found.device}")
    return lines


def _few(matrices: Sequence[CollectedStatistics], *, verbose: bool) -> list[str]:
    """What is to be told of experts that met fewer tokens than they have inputs."""
    found = sorted(
        (count, f"{one.name}[{place}]" if one.experts is not None else one.name, one.features)
        for one in matrices
        for place, count in enumerate(one.tokens if isinstance(one.tokens, tuple) else (one.tokens,))
        if count < one.features
    )
    if not found:
        return []
    fewest, name, features = found[0]
    worst = f"{name} the fewest: {fewest} for {features}"
    return [
        f"{many(len(found), 'matrix')} met fewer tokens than inputs, {worst}; give more text",
        *(f"  {name}: {count} tokens, {inputs} inputs" for count, name, inputs in found if verbose),
    ]
