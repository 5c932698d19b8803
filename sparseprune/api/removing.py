"""`remove`: from a spec or masks to what survives, and from there to a smaller checkpoint under its name.

By a spec the decisions are those of `apply`. Both sources give kept indices, these give shapes and a config,
and the survivors are moved. Owns what is refused before a byte is written. Called by the public functions.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from sparseprune import __version__
from sparseprune.api.applied import rebuilt_by, warn_of_broken, warn_of_earlier
from sparseprune.api.explaining import Explained, name_of
from sparseprune.api.masked import MaskSource, masked_by, refuse_contradictions
from sparseprune.api.options import source, text_if_any
from sparseprune.api.pruning import (
    as_applied,
    decided,
    explained,
    forget,
    identity_of,
    notes_of,
    planned,
    prepare,
    score_shards,
    stats_told,
    swept_outcomes,
    warn,
)
from sparseprune.api.run import collector_paused, digest, output_shown, weight_bytes
from sparseprune.checkpoint import OutputLayout, make_output, open_checkpoint, read_config
from sparseprune.checkpoint.codes import codes_in
from sparseprune.checkpoint.file_io import checkpoint_identity, refuse_changed
from sparseprune.checkpoint.folding import refuse_split
from sparseprune.checkpoint.not_safetensors import PICKLE_SUFFIXES, names_training_state
from sparseprune.checkpoint.publish import refuse_replacing
from sparseprune.checkpoint.resizing import lay_out_choice, lay_out_decisions, lay_out_removal, open_choice
from sparseprune.checkpoint.source import read_beside
from sparseprune.engine.grids import prod
from sparseprune.errors import CheckpointError, SparsepruneError, SpecError
from sparseprune.execution.plan import rebuilding_rules
from sparseprune.report.coverage import idle_lines
from sparseprune.report.wording import many, other_weights, some_of
from sparseprune.spec.problems import listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from sparseprune import results
    from sparseprune.api.options import Method, Target
    from sparseprune.api.pruning import Prepared
    from sparseprune.api.resources import Machine
    from sparseprune.api.run import Run
    from sparseprune.api.windows import AskedText
    from sparseprune.checkpoint import Checkpoint, Output, StoredMask, StoredTensor
    from sparseprune.checkpoint import Source as SourceOfBytes
    from sparseprune.execution.earlier import Touched
    from sparseprune.execution.passes import TensorOutcome
    from sparseprune.execution.plan import Plan
    from sparseprune.execution.regions import Limits
    from sparseprune.removal.preview import Preview
    from sparseprune.removal.shrink import Removal
    from sparseprune.removal.slices import BlockDecisions, KeptIndices
    from sparseprune.results.pruning import TunedLayer


class Asked(Struct, frozen=True):
    """What to remove from which checkpoint: by a `spec`, by the masks of a `source`, or by `lists`.

    `lists` have by their options a path or what would be in a file there. A `dry_run`, which writes nothing,
    goes with lists. `rebuilding` has a method and statistics, which go with a spec, as a `text` does.
    """

    checkpoint: Path
    spec: str | None
    source: MaskSource
    lists: Mapping[str, object]
    dry_run: bool
    overrides: Mapping[str, str]
    target: Target
    machine: Machine
    goal: str | None = None
    rebuilding: tuple[Method | None, Path | None] = (None, None)
    text: AskedText | None = None


def refuse_unclear(
    spec: str | None,
    source: MaskSource,
    lists: Iterable[str],
    overrides: Mapping[str, object],
    *,
    dry_run: bool = False,
) -> None:
    """SparsepruneError where it is not clear what to remove: by a spec, by masks, or by lists."""
    masks = "--zeros-of" if source.zeros else "--masks"
    for option in lists:
        if spec is not None or source.path is not None:
            raise SparsepruneError(f"{spec or masks} and {option} exclude each other; give one of them")
    nothing = (
        "nothing says what to remove; give a SPEC, such as mlp-channels, --masks, --experts or --vocabulary"
    )
    refuse_contradictions(spec, source, overrides, nothing=None if lists else nothing)
    if dry_run and not lists:
        raise SparsepruneError("--dry-run: goes with a SPEC, whose plan it shows, or with a list")


def remove(run: Run, asked: Asked) -> results.Removal:
    """Decide, cut, write the report, and give the output its name."""
    refuse_unclear(asked.spec, asked.source, asked.lists, asked.overrides, dry_run=asked.dry_run)
    if asked.spec is None and asked.goal is not None:
        raise SparsepruneError(f"--target {asked.goal}: goes with a SPEC, of which it varies a number")
    for option, given in zip(("--reconstruct", "--stats"), asked.rebuilding, strict=True):
        if asked.spec is None and given is not None:
            raise SparsepruneError(f"{option} {given}: goes with a SPEC, of which survivors are rebuilt")
    text = text_if_any(asked.text)
    if asked.spec is None and text is not None:
        file = text.windows.text[0]
        raise SparsepruneError(f"--text {file}: goes with a SPEC, of which survivors are rebuilt")
    run.listener.output(_Undecided())
    with _chosen(run, asked) as choice:
        result = _cut(run, asked, choice)
    if choice.prepared is not None:
        forget(choice.prepared)
    return result


class _Undecided:
    """An output of which nothing is written yet, as what survives is not known."""

    named = False
    identity = None


def planned_removal(run: Run, prepared: Prepared) -> results.Plan:
    """The plan of a removal, whose output is the smaller checkpoint; what cannot be removed is refused."""
    with collector_paused():
        expected = _removable(run, prepared)
        removal = expected.removal
        tensors, config = (None, None) if removal is None else (removal.left, removal.config)
        beside = {} if removal is None else removal.beside
        told = explained(prepared, "remove", _as_words(prepared.target))
        where = (prepared.plan.checkpoint, prepared.target.output)
        layout = told.layout(lay_out_removal(*where, tensors, config, beside, told.mark()))
    return planned(run, prepared, expected, layout)


class Choice(Struct, frozen=True):
    """What survives, from whichever source: kept indices, rebuilt tensors, and what the result has of that.

    Errors begin with `source`; `explained` is what the output tells of itself. `refuse_changed` raises where
    something that was read has changed since. `spec` is the text that the output keeps. `told` are members of
    the result, `totals` of its totals, `idle` lines on rules that drop nothing; `left_out` names what has no
    counterpart. `scratch` is the output in which the decisions wait: discard it once nothing reads from it,
    before the smaller output gets its name.
    """

    source: str
    explained: Explained
    checkpoint: Checkpoint
    kept: Mapping[str, KeptIndices]
    limits: Limits
    identity: Mapping[str, str]
    refuse_changed: Callable[[], None]
    spec: bytes | None
    told: Mapping[str, Any] = {}
    totals: Mapping[str, Any] = {}
    notes: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    left_out: str | None = None
    plan: Plan | None = None
    prepared: Prepared | None = None
    scratch: Output | None = None
    rebuilt: Mapping[str, StoredTensor] = {}


@contextmanager
def _chosen(run: Run, asked: Asked) -> Iterator[Choice]:
    """What survives, as long as the context lasts."""
    if asked.source.path is not None:
        with run.reading() as reader:
            choice = _by_masks(run, asked, reader)
        yield choice
        return
    if asked.lists:
        yield _by_lists(asked)
        return
    from sparseprune.removal.slices import block_decisions

    what = (asked.checkpoint, asked.spec or "", asked.overrides, asked.goal)
    given = source(*what, asked.rebuilding, asked.text)
    prepared = prepare(given, asked.target, asked.machine, run)
    with collector_paused():
        final = _target(asked, prepared.plan.checkpoint)
        _removable(run, prepared)
    if prepared.allocation is not None:
        with run.reading() as reader:
            prepared = decided(run, prepared, reader)
        _removable(run, prepared)
    with collector_paused():
        decisions = None if prepared.swept else block_decisions(prepared.schedule)
    warn(run, prepared)
    layout = _lay_out_masks(prepared, final) if decisions is None else lay_out_decisions(final)
    found = identity_of(prepared)
    identity = {**found, "the options": json.dumps(["remove", found["the options"]])}
    output = make_output(layout, identity=identity)
    with run.staged(output):
        yield _by_spec(run, prepared, output, decisions)


def _by_masks(run: Run, asked: Asked, reader: SourceOfBytes) -> Choice:
    path = str(asked.source.path)
    masked = masked_by(run, asked.checkpoint, asked.source, asked.machine, cuts=True)
    matched = masked.matched
    refuse_split(matched.checkpoint)
    refuse_replacing(_target(asked, matched.checkpoint), [one.path for one in matched.masks.shards], "masks")
    from sparseprune.execution.reapply import resident_of
    from sparseprune.execution.regions import limits_of
    from sparseprune.report.checks import left_out_text

    limits = limits_of(asked.machine.memory, uses_torch=False, resident=resident_of(matched, resized=True))
    masks = [pair.mask for pair in matched.pairs]
    options = json.dumps(["remove", asked.source.identity, limits.slab])
    words = [
        "--zeros-of" if asked.source.zeros else "--masks",
        name_of(asked.source.path or asked.checkpoint),
    ]
    words += [*asked.source.words, *_as_words(asked.target)]
    text = None if masked.spec is None else masked.spec.decode(errors="replace")
    return Choice(
        source=path,
        explained=Explained(matched.checkpoint, "remove", words, text),
        checkpoint=matched.checkpoint,
        kept=_kept_by(run, asked.machine.jobs, masks, reader, limits),
        limits=limits,
        identity={**masked.identity, "the options": options},
        refuse_changed=lambda: refuse_changed(matched.checkpoint, matched.masks.shards),
        told={"masks": path, "set": dict(masked.overrides)},
        spec=masked.spec,
        left_out=left_out_text(masked.left_out),
    )


def _by_lists(asked: Asked) -> Choice:
    """Kept indices that lists say."""
    from sparseprune.execution.regions import Resident, limits_of
    from sparseprune.removal.lists import KEPT, Listed

    with collector_paused():
        checkpoint = open_checkpoint(asked.checkpoint)
        if asked.dry_run:
            lay_out_removal(checkpoint, asked.target.output, None, None)
        else:
            _target(asked, checkpoint)
        lists = {option: Listed.of(given, option) for option, given in asked.lists.items()}
        shapes = {name: stored.shape for name, stored in checkpoint.tensors.items()}
        kept: dict[str, KeptIndices] = {}
        for option, listed in lists.items():
            try:
                kept |= KEPT[option](listed.value, shapes, read_config(checkpoint))
            except CheckpointError as error:
                raise CheckpointError(*(f"{listed.source}: {line}" for line in error.args)) from error
    header_bytes = sum(shard.data_begin for shard in checkpoint.shards)
    resident = Resident.of(len(shapes), header_bytes, reached=len(kept), scopes=0, masks=False, resized=True)
    limits = limits_of(asked.machine.memory, uses_torch=False, resident=resident)
    sources = {option.strip("-"): listed.source for option, listed in lists.items()}
    words = [word for option, listed in lists.items() for word in (option, name_of(Path(listed.source)))]
    return Choice(
        source=" and ".join(sources.values()),
        explained=Explained(checkpoint, "remove", [*words, *_as_words(asked.target)]),
        checkpoint=checkpoint,
        kept=kept,
        limits=limits,
        identity={
            "the version": __version__,
            "the input": checkpoint_identity(checkpoint),
            "the options": json.dumps(["remove", sorted(sources), limits.slab]),
        },
        refuse_changed=lambda: refuse_changed(checkpoint, ()),
        spec=None,
        told=sources,
    )


def _lay_out_masks(prepared: Prepared, final: OutputLayout) -> OutputLayout:
    """The scratch output for masks, and for weights that are shrunk or rebuilt."""
    plan = prepared.plan
    instances = [instance for _, instance in plan.bound.instances()]
    rebuilt = any(one.soft or one.reconstruct or one.within for one in instances)
    return lay_out_choice(plan.checkpoint, final, plan.reached, rebuilt=rebuilt)


def _removable(run: Run, prepared: Prepared) -> Preview:
    """What a removal would leave; warns of statements that may no longer be true.

    Raises:
        SpecError: a rule cannot be removed, no class has such a model, or every block survives.
    """
    from sparseprune.removal.preview import preview
    from sparseprune.removal.sections import as_model

    checkpoint = prepared.plan.checkpoint
    config, turned = as_model(read_config(checkpoint), prepared.target.model_type)
    expected = preview(prepared.plan, config, read_beside(checkpoint))
    refusals = expected.refusals(prepared.source.source)
    if refusals:
        raise SpecError(*refusals)
    idle, rules = list(idle_lines(prepared.plan.bound.rules)), prepared.plan.bound.rules
    if idle and len(idle) == sum(bool(rule.instances) for rule in rules):
        raise SpecError(*(f"{prepared.source.source}: nothing to remove: {line}" for line in idle))
    if expected.removal is None:
        return expected
    run.warn(*expected.removal.remarks)
    changes = (*turned, *expected.removal.changes)
    return replace(expected, removal=replace(expected.removal, changes=changes))


def _target(asked: Asked, checkpoint: Checkpoint) -> OutputLayout:
    """The output if nothing were cut, once it may be written there."""
    layout = lay_out_removal(checkpoint, asked.target.output, None, None)
    make_output(layout, asked.target.force).refuse_early()
    return layout


def _by_spec(run: Run, prepared: Prepared, output: Output, decisions: BlockDecisions | None) -> Choice:
    """Kept indices from decisions in memory, or else from masks that are written to the scratch folder."""
    from sparseprune.execution.pruning import execute, work_bytes
    from sparseprune.execution.schedule import device_text, devices_of_rules, resolve_device
    from sparseprune.report.coverage import coverage_totals, unpruned_lines
    from sparseprune.report.pruning import rule_results, summed_up

    asked, plan, schedule = prepared.asked, prepared.plan, prepared.schedule
    device = resolve_device(prepared.machine.device, uses_torch=schedule.uses_torch)
    kept: Mapping[str, KeptIndices] = {}
    rebuilt: Mapping[str, StoredTensor] = {}
    outcomes: Sequence[TensorOutcome]
    total, already = work_bytes(schedule, output) if decisions is None else decisions.work_bytes(output)
    with run.reading() as reader:
        lacking: tuple[str, ...] = ()
        tuned: tuple[TunedLayer, ...] = ()
        if prepared.swept is not None:
            outcomes, lacking, tuned = swept_outcomes(run, prepared, reader, output, device)
        else:
            size = output.layout.input_bytes
            with run.progress("deciding", total, already, size=size) as advance:
                if decisions is None:
                    outcomes = execute(schedule, reader, output, device, advance)
                else:
                    kept, outcomes = decisions.decide(reader, output, advance)
        output.flush()
        if decisions is None:
            masks, rebuilt = open_choice(output)
            if plan.bound.outer:
                kept = _left_by(run, prepared, masks, reader)
            else:
                kept = _kept_by(run, prepared.machine.jobs, masks, reader, schedule.limits)
    found = summed_up(outcomes)
    return Choice(
        source=prepared.source.source,
        explained=explained(prepared, "remove", _as_words(prepared.target)),
        checkpoint=plan.checkpoint,
        kept=kept,
        limits=schedule.limits,
        identity=output.identity or {},
        refuse_changed=lambda: refuse_changed(plan.checkpoint, score_shards(plan)),
        spec=as_applied(prepared),
        told={
            "spec_sha256": digest(prepared.source.text),
            "set": dict(asked.overrides),
            "target": prepared.found,
            "reconstruct": asked.reconstruct,
            "stats": stats_told(prepared),
            "tuned": tuned,
            "device": device_text(schedule.every_group, device),
            "rules": rule_results(
                plan.bound, found, devices_of_rules(schedule, device), rebuilding_rules(plan)
            ),
        },
        totals={**coverage_totals(prepared.coverage), **found.lost},
        notes=(*notes_of(prepared), *lacking),
        idle=tuple(unpruned_lines(plan.bound.rules, found.pruned)),
        plan=plan,
        prepared=prepared,
        scratch=output,
        rebuilt=rebuilt,
    )


def _kept_by(
    run: Run, jobs: int, masks: Sequence[StoredMask], reader: SourceOfBytes, limits: Limits
) -> dict[str, KeptIndices]:
    from sparseprune.removal.slices import read_slices

    total = sum(mask.stored.nbytes for mask in masks)
    with run.progress("reading masks", total) as advance:
        return read_slices(masks, reader, limits, jobs, advance)


def _left_by(
    run: Run, prepared: Prepared, masks: Sequence[StoredMask], reader: SourceOfBytes
) -> dict[str, KeptIndices]:
    from sparseprune.execution.regions import Resources
    from sparseprune.removal.slices import slices_left

    plan, total = prepared.plan, sum(mask.stored.nbytes for mask in masks)
    resources = Resources(prepared.machine.jobs, prepared.schedule.limits.memory)
    with run.progress("reading masks", total) as advance:
        return slices_left(plan.bound, masks, plan.checkpoint.tensors, reader, resources, advance)


def _cut(run: Run, asked: Asked, choice: Choice) -> results.Removal:
    """Everything from kept indices to the output's name."""
    from sparseprune.removal.dim_constraints import refuse
    from sparseprune.removal.scales import unscalable
    from sparseprune.removal.sections import as_model
    from sparseprune.removal.shrink import make_removal
    from sparseprune.removal.slices import summed_up

    checkpoint = choice.checkpoint
    shapes = {name: stored.shape for name, stored in checkpoint.tensors.items()}
    config, turned = as_model(read_config(checkpoint), asked.target.model_type)
    try:
        codes = codes_in(checkpoint.tensors)
        removal = make_removal(shapes, choice.kept, config, codes=codes, beside=read_beside(checkpoint))
        removal = replace(removal, changes=(*turned, *removal.changes))
        refuse(unscalable(removal.scales, checkpoint.tensors))
    except CheckpointError as error:
        raise CheckpointError(*(f"{choice.source}: {line}" for line in error.args)) from error
    _refuse_nothing(run, asked, choice, removal)
    run.warn(*removal.remarks)
    tensors = {
        name: replace(left, whole=left.whole and name not in choice.rebuilt)
        for name, left in removal.left.items()
    }
    told = choice.explained
    changed = tensors, removal.config, removal.beside
    layout = told.layout(lay_out_removal(checkpoint, asked.target.output, *changed, told.mark()))
    if asked.dry_run:
        return _result(run, asked, choice, removal, layout)
    identity = {**choice.identity, "what survives": digest(summed_up(choice.kept))}
    output = make_output(layout, asked.target.force, identity)

    scratch = choice.scratch

    def is_complete() -> None:
        choice.refuse_changed()
        output.flush()  # while the choice can still be continued if this fails
        if scratch is not None:
            scratch.discard()

    return run.write(
        output,
        lambda reader: _removed(run, asked, choice, removal, output, reader),
        is_complete,
        spec=choice.spec,
        card=told.card,
        # The user knows already whether an unfinished run goes on.
        continued=scratch is not None and (scratch.resumed or bool(scratch.started_over)),
    )


def _as_words(target: Target) -> list[str]:
    return [] if target.model_type is None else ["--as", target.model_type]


def _refuse_nothing(run: Run, asked: Asked, choice: Choice, removal: Removal) -> None:
    """SparsepruneError where nothing would be removed; a warning of each rule that removes nothing."""
    if not removal.kept and len(removal.left) == len(choice.checkpoint.tensors):
        every = "all of it stays" if asked.lists else "every mask keeps all of its tensor"
        raise SparsepruneError(
            *(f"{choice.source}: nothing to remove: {line}" for line in choice.idle or [every])
        )
    run.warn(*choice.idle)


def _removed(
    run: Run, asked: Asked, choice: Choice, removal: Removal, output: Output, reader: SourceOfBytes
) -> results.Removal:
    """Move the survivors."""
    from sparseprune.removal.shrink import Cuts
    from sparseprune.removal.slices import kept_whole

    layout = output.layout
    run.note(choice.left_out)
    earlier = warn_of_earlier(run, choice.checkpoint, _touched(choice, removal), asked.machine)
    tensors = {**choice.checkpoint.tensors, **choice.rebuilt}
    kept = {name: removal.kept.get(name) or kept_whole(tensors[name].shape) for name in layout.weights}
    cuts = Cuts(kept, tensors, choice.limits, removal.scales)
    total, already = cuts.work_bytes(reader, output)
    with run.progress("removing", total, already) as advance:
        cuts.write(reader, output, asked.machine.jobs, advance)
    warn_of_broken(run, earlier, output)
    if choice.prepared is not None and choice.prepared.plan.bound.outer:
        run.warn(*_broken_inside(choice.prepared, output))
    return _result(run, asked, choice, removal, layout)


def _broken_inside(prepared: Prepared, output: Output) -> Iterator[str]:
    """A line for each nested rule whose pattern the output no longer has, where cuts moved its neighbours."""
    from sparseprune.checkpoint import TensorReader
    from sparseprune.execution.verify import count_survivors, make_check

    inner = {rule.name for rule in prepared.plan.bound.rules if rule.within is not None}
    machine = prepared.machine
    try:
        check = make_check(output.written(), prepared.spec, machine.memory, machine.jobs)
    except SpecError as error:
        yield f"whether the output has the patterns of {listed(sorted(inner))} is not known: {error.args[0]}"
        return
    with TensorReader() as reader:
        found = count_survivors(check, reader, lambda *_: None)
    for rule in found.rules:
        if rule.broken and rule.name in inner:
            broken = f"{rule.broken:,} of {many(rule.scopes, 'scope')}"
            yield (
                f"{rule.name} no longer holds in {broken}: what was cut out moved neighbours; let the outer "
                "rule drop whole groups of them"
            )


def _result(
    run: Run, asked: Asked, choice: Choice, removal: Removal, layout: OutputLayout
) -> results.Removal:
    """What was cut out, or would be."""
    from sparseprune import results
    from sparseprune.report.coverage import coverage_totals
    from sparseprune.report.faster import smaller_line
    from sparseprune.report.pruning import Sums, changed_tensors
    from sparseprune.results.pruning import RemovalTotals

    checkpoint = choice.checkpoint
    given = dict.fromkeys(("spec_sha256", "masks", "experts", "vocabulary", "target", "reconstruct", "stats"))
    return results.Removal(
        **{**given, "set": {}, "device": "cpu", "rules": (), **choice.told},
        input=str(asked.checkpoint),
        output=output_shown(asked.target.output, asked.checkpoint, layout),
        seconds=round(run.seconds, 3),
        warnings=tuple(run.warnings),
        notes=(
            *choice.notes,
            *(f"{file}: ids of tokens are the new ones" for file in removal.beside),
            *_training_state(checkpoint),
        ),
        files_left_out=other_weights(layout.left_out),
        totals=RemovalTotals(
            tensors=len(checkpoint.tensors),
            tensors_after=len(removal.left),
            numel=sum(stored.numel for stored in checkpoint.tensors.values()),
            numel_after=sum(prod(one.shape) for one in removal.left.values()),
            bytes=layout.input_bytes,
            bytes_after=weight_bytes(layout),
            **(choice.totals or {**coverage_totals(None), **Sums().lost}),
        ),
        faster=smaller_line(removal.changes),
        config=removal.changes,
        tensors=tuple(changed_tensors(checkpoint, removal.left)),
    )


def _touched(choice: Choice, removal: Removal) -> dict[str, Touched]:
    """The tensors whose zeros move, or come back."""
    from sparseprune.execution.earlier import Touched

    rules = {} if choice.plan is None else rebuilt_by(choice.plan)
    found = {}
    for name, left in removal.left.items():
        again = rules[name].rules if name in rules else ()
        cut = removal.kept[name].cut if name in removal.kept else ()
        if again or cut:
            found[name] = Touched(left.name, again, cut)
    return found


def _training_state(checkpoint: Checkpoint) -> list[str]:
    """A line where a trainer left what it would go on with, of the shapes that tensors had."""
    names = [
        str(other.path)
        for other in checkpoint.others
        if names_training_state(other.path.name) and other.path.suffix in PICKLE_SUFFIXES
    ]
    why = "copied as it is, though a trainer wrote it for the larger model"
    return [f"{why}: {some_of(names)}"] if names else []
