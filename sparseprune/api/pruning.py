"""`apply`, `mask` and `plan`: from a checkpoint and a spec to a plan, an output and its report.

`prepare` reads headers and the spec, no tensor data, and imports no torch. Called by the public functions,
and by removing.py for what it decides by.
"""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from msgspec import Struct
from msgspec.structs import replace

from sparseprune import __version__, results
from sparseprune.api.applied import read_spec, rebuilt_by, warn_of_broken, warn_of_earlier
from sparseprune.api.explaining import Explained, explained_by_spec
from sparseprune.api.options import located
from sparseprune.api.run import Run, collector_paused, digest, output_shown, sizes_of, weight_bytes
from sparseprune.checkpoint import (
    lay_out_apply,
    lay_out_masks,
    make_output,
    open_checkpoint,
    read_config,
)
from sparseprune.checkpoint.file_io import checkpoint_identity, refuse_changed, shards_identity
from sparseprune.checkpoint.folding import refuse_split
from sparseprune.checkpoint.layout import output_target
from sparseprune.checkpoint.remote import RemotePath
from sparseprune.checkpoint.statistics import statistics_beside
from sparseprune.errors import SparsepruneError, SpecError, printable
from sparseprune.execution.inputs import SWEPT, Left
from sparseprune.execution.plan import bind_to, make_plan, plan_within, rebuilding_rules, rests_on_few
from sparseprune.execution.schedule import cpu_lines, make_schedule
from sparseprune.report.coverage import coverage_of
from sparseprune.report.wording import many, percent
from sparseprune.spec.problems import listed
from sparseprune.spec.rebuilding import OF_STATISTICS, Rebuilding, rebuilt

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from sparseprune.api.options import Source, Target
    from sparseprune.api.resources import Machine
    from sparseprune.api.sweeping import Swept, SweptText
    from sparseprune.checkpoint import Checkpoint, Output, OutputLayout, Shard
    from sparseprune.checkpoint import Source as SourceOfBytes
    from sparseprune.execution.allocation import Allocation
    from sparseprune.execution.passes import TensorOutcome
    from sparseprune.execution.permuting import Found
    from sparseprune.execution.plan import Plan
    from sparseprune.execution.schedule import Schedule
    from sparseprune.removal.preview import Preview
    from sparseprune.report.coverage import Coverage
    from sparseprune.results.pruning import TargetReached, TunedLayer
    from sparseprune.spec import Spec, SpecSource


class Prepared(Struct, frozen=True):
    """Everything that is known before the first byte of a tensor is read, and what was asked for.

    `asked` has the number that was found for a target as if it had been set; `found` tells of it.
    `unrebuilt` are lines on rules that are not rebuilt as it was asked for.
    """

    asked: Source
    target: Target
    machine: Machine
    source: SpecSource
    spec: Spec
    plan: Plan
    schedule: Schedule
    layout: OutputLayout
    coverage: Coverage
    found: TargetReached | None = None
    allocation: Allocation | None = None
    unrebuilt: tuple[str, ...] = ()
    swept: Swept | None = None

    @property
    def peak_bytes(self) -> int:
        """Resident memory of a run at the most, about."""
        peak = self.schedule.peak_bytes
        if self.swept is not None:
            peak = max(peak + self.swept.rooms.expected, self.swept.rooms.tuning)
        return peak if self.allocation is None else max(peak, self.allocation.peak)


def prepare(
    asked: Source, target: Target, machine: Machine, run: Run | None = None, *, plans: bool = False
) -> Prepared:
    """Find and read the spec, read the headers, bind one to the other, lay out the output.

    With a text the model is opened, and one sequence goes through it; `run` hears of that. Unless one only
    `plans`, gradients of the dense model are taken where they are asked for.
    """
    with collector_paused():
        source, spec, told = _read(asked)
        checkpoint = open_checkpoint(asked.checkpoint)
        refuse_split(checkpoint)
        found = None
        if asked.goal is not None:
            mark = explained_by_spec(asked, source.text, checkpoint, verb="remove").mark()
            asked, found = _reaching(asked, asked.goal, target, checkpoint, spec, mark)
            source, spec, told = _read(asked)
        text = None
        if asked.text is not None:
            from sparseprune.api.sweeping import read_text, with_gradients  # with torch and transformers

            run = run or Run(None)
            text = read_text(run, asked.text, checkpoint, machine, asked.stats)
            if not plans:
                text = with_gradients(run, text, target_of(checkpoint, target), machine)
        plan, schedule = _plan(checkpoint, spec, target, machine, text, asked.within)
        allocation = None
        if spec.shares:
            from sparseprune.execution.allocation import make_allocation  # with numpy, which starts slowly

            allocation = make_allocation(plan, machine.memory, machine.jobs)
        coverage = coverage_of(plan.checkpoint.tensors, plan.bound, read_config(plan.checkpoint))
        where = (plan.checkpoint, target.output, plan.reached)
        scores, mask_format = score_shards(plan), target.mask_format
        if target.weights or mask_format is None:
            layout = lay_out_apply(*where, mask_format, scores, plan.permutations.moved)
            if not target.resized:
                layout = explained_by_spec(asked, source.text, checkpoint, verb="apply").layout(layout)
        else:
            layout = lay_out_masks(*where, mask_format, scores)
    unrebuilt = (*(f"{rule} {why}" for rule, why in told.items()), *_left_lines(plan.left))
    swept = None
    if text is not None:
        from sparseprune.api.sweeping import divide

        swept = divide(plan, text, machine)
        schedule = schedule_of(plan, target, beside(machine, swept))
    parts = (plan, schedule, layout, coverage)
    return Prepared(asked, target, machine, source, spec, *parts, found, allocation, unrebuilt, swept)


def target_of(checkpoint: Checkpoint, target: Target) -> Path:
    """Where the output goes."""
    return output_target(checkpoint, target.output, "smaller" if target.resized else "pruned")


def _read(asked: Source) -> tuple[SpecSource, Spec, dict[str, str]]:
    """The spec with what was asked of all of its rules, and why some do not do it."""
    source, spec = read_spec(asked.spec, asked.overrides)
    return source, *rebuilt(spec, rebuilding_of(asked, stands_in=source.shipped))


def _reaching(
    asked: Source, text: str, target: Target, checkpoint: Checkpoint, spec: Spec, mark: Mapping[str, str]
) -> tuple[Source, TargetReached]:
    """What would have to be asked for to reach a target without naming one, and what is reached."""
    from sparseprune.api.goals import Bound, Goal, reach
    from sparseprune.removal.sections import as_model

    overrides = asked.overrides
    config, _ = as_model(read_config(checkpoint), target.model_type)
    bound = Bound(spec, checkpoint, bind_to(checkpoint, spec), overrides, config, mark)
    found = reach(Goal.of(text), bound, removed=target.resized)
    return dataclasses.replace(asked, overrides={**overrides, found.name: repr(found.value)}), found


def _plan(
    checkpoint: Checkpoint,
    spec: Spec,
    target: Target,
    machine: Machine,
    text: SweptText | None = None,
    within: Path | None = None,
) -> tuple[Plan, Schedule]:
    """What a spec means for a checkpoint, and how that is done."""
    permutes = target.weights and not target.resized and text is None
    sweeping = None if text is None else text.statistics()
    plan = make_plan(checkpoint, spec, writes=permutes, permutes=permutes, sweeping=sweeping)
    if within is not None:
        from sparseprune.api.masked import masks_within  # with numpy, which starts slowly

        plan = plan_within(plan, masks_within(checkpoint, within))
    _refuse_tuning(plan, checkpoint, target, swept=text is not None)
    if not permutes:
        _refuse_permuting(plan, "a sweep" if text else "remove" if target.resized else "mask")
    return plan, schedule_of(plan, target, machine)


def schedule_of(plan: Plan, target: Target, machine: Machine) -> Schedule:
    """How a plan, or a part of it, is done."""
    return make_schedule(
        plan,
        machine.memory,
        machine.jobs,
        device=machine.device,
        masks=target.mask_format is not None,
        resized=target.resized,
    )


def decided(run: Run, prepared: Prepared, reader: SourceOfBytes, output: Output | None = None) -> Prepared:
    """With the parts that instances have of common budgets: reads weights and statistics.

    What is found is noted in the `output`, if there is one.
    """
    work, machine = prepared.allocation, prepared.machine
    if work is None:
        return prepared
    from sparseprune.execution.allocation import allocate
    from sparseprune.execution.schedule import resolve_device

    device = resolve_device(machine.device, uses_torch=True)
    tensors = {leaf.tensor for task in work.tasks for leaf in task.instance.scope.leaves}
    size = sum(prepared.plan.checkpoint.tensors[name].nbytes for name in tensors)
    with run.progress("sharing the budget", work.nbytes(output), size=size) as advance:
        found = allocate(work, reader, device, advance, output)
    spec = replace(prepared.spec, allocated=found)
    with collector_paused():
        text = None if prepared.swept is None else prepared.swept.text
        plan, schedule = _plan(prepared.plan.checkpoint, spec, prepared.target, machine, text)
    if text is None:
        return replace(prepared, spec=spec, plan=plan, schedule=schedule)
    from sparseprune.api.sweeping import divide

    swept = divide(plan, text, machine)
    schedule = schedule_of(plan, prepared.target, beside(machine, swept))
    return replace(prepared, spec=spec, plan=plan, schedule=schedule, swept=swept)


def _refuse_permuting(plan: Plan, command: str) -> None:
    """SpecError where a rule permutes, and the command writes no permuted weights."""
    rule = next((rule.name for rule, instance in plan.bound.instances() if instance.permute), None)
    if rule is not None:
        why = {
            "mask": "masks of another order do not fit the checkpoint",
            "remove": "what is removed is not permuted",
            "a sweep": "an order would have to be known before",
        }
        raise SpecError(f"[{rule}] permute: {command} does without it, as {why[command]}; use apply")


def _refuse_tuning(plan: Plan, checkpoint: Checkpoint, target: Target, *, swept: bool) -> None:
    """SpecError where a rule tunes layers, and none is run, or what was written cannot be replaced."""
    tuned = ((rule.name, one.reconstruct) for rule, one in plan.bound.instances())
    rule = next((name for name, method in tuned if method is not None and method.tune), None)
    if rule is None:
        return
    if not swept:
        raise SpecError(f"[{rule}] tune: only a text runs through layers: give --text, or tune = 0")
    if not target.resized and isinstance(target_of(checkpoint, target), RemotePath):
        raise SpecError(
            f"[{rule}] tune: tuning replaces what was written, which an object store has by then; give a "
            "folder of this machine with -o, or --tune 0"
        )


def rebuilding_of(asked: Source, *, stands_in: bool = False) -> Rebuilding:
    """What is asked of every rule, with the statistics beside the checkpoint if no others are named.

    These `stand in` for a file of the spec that is not there.
    """
    if asked.text is not None:
        return Rebuilding(method=asked.reconstruct, file=SWEPT, tune=asked.text.tune)
    return Rebuilding(
        method=asked.reconstruct,
        file=None if asked.stats is None else asked.stats.absolute(),
        usual=statistics_beside(asked.checkpoint),
        stands_in=stands_in,
    )


def _left_lines(left: Iterable[Left]) -> Iterator[str]:
    """What rules do not rebuild although that was asked for."""
    for one in left:
        such = f", such as those with {one.weights[0]}" if len(one.weights) > 1 else f", {one.weights[0]}"
        yield f"{one.rule} is not rebuilt in {many(len(one.weights), 'instance')}{such}: {one.why} these"


def warn(run: Run, prepared: Prepared) -> None:
    """Warn of what a user should know before any work; an error under `strict`."""
    run.warn(*prepared.coverage.warnings(), *cpu_lines(prepared.schedule, prepared.machine.device))
    beyond = prepared.plan.beyond
    if beyond:
        more = f" and {many(len(beyond) - 1, 'more tensor')}" if beyond[1:] else ""
        run.warn(
            f"--within: no rule reaches {printable(beyond[0])}{more}, which has a mask of the earlier step; "
            "reapply puts its zeros back"
        )


def with_parts_of_budgets(run: Run, prepared: Prepared) -> Prepared:
    """As `decided`, for who writes nothing; SparsepruneError where no budget is shared."""
    if prepared.allocation is None:
        raise SparsepruneError(
            f'--allocation: no rule of {prepared.asked.spec} shares a budget; write allocate = "loss" in its '
            "[reconstruct]"
        )
    with run.reading() as reader:
        found = decided(run, prepared, reader)
    refuse_changed(prepared.plan.checkpoint, score_shards(prepared.plan))
    return found


def planned(
    run: Run, prepared: Prepared, expected: Preview | None = None, layout: OutputLayout | None = None
) -> results.Plan:
    """What the spec binds to and would do; of a removal with what it would come to, and its own layout."""
    from sparseprune.removal.preview import preview
    from sparseprune.report.permuted import planned_permutations
    from sparseprune.report.plan import plan_totals, planned_removal, rule_plan, unreached
    from sparseprune.results.pruning import PlannedBytes

    plan, asked, layout = prepared.plan, prepared.asked, layout or prepared.layout
    bound, tensors, rebuilds = plan.bound, plan.checkpoint.tensors, rebuilding_rules(plan)
    with collector_paused():
        if expected is None:
            expected = preview(plan, read_config(plan.checkpoint))
        warn(run, prepared)
        run.note(*prepared.unrebuilt)
        weights, masks = sizes_of(layout)
        return results.Plan(
            input=str(asked.checkpoint),
            spec=asked.spec,
            output=output_shown(prepared.target.output, asked.checkpoint, layout),
            output_exists=layout.target.exists(),
            warnings=tuple(run.warnings),
            totals=plan_totals(plan.checkpoint, bound, prepared.coverage),
            rules=tuple(rule_plan(rule, tensors, expected, rebuilds.get(rule.name)) for rule in bound.rules),
            removal=planned_removal(expected),
            target=prepared.found,
            unreached=unreached(tensors, set(bound.covered)),
            bytes=PlannedBytes(
                input=weights,
                masks=masks,
                output=layout.output_bytes,
                peak=prepared.peak_bytes,
            ),
            permuted=planned_permutations(plan.permutations),
            not_permuted=plan.permutations.unmoved,
        )


def prune(run: Run, prepared: Prepared) -> results.Report:
    """Do the work, write the report beside it, and give the output its name."""
    warn(run, prepared)
    layout, machine, weights = prepared.layout, prepared.machine, prepared.target.weights
    swept = prepared.swept is not None
    output = make_output(layout, prepared.target.force, identity_of(prepared), reads_back=swept)

    def work(reader: SourceOfBytes) -> results.Report:
        # Numpy and the compiled loops come in here, after everything that can be refused without them.
        from sparseprune.execution.pruning import execute, work_bytes
        from sparseprune.execution.schedule import device_text, devices_of_rules, resolve_device
        from sparseprune.report import pruning
        from sparseprune.report.coverage import unpruned_lines
        from sparseprune.report.faster import uses_of
        from sparseprune.report.permuted import permuted_modules
        from sparseprune.report.wording import other_weights
        from sparseprune.results.fields import Made, WrittenBytes

        final = decided(run, prepared, reader, output)
        plan, schedule = final.plan, final.schedule
        device = resolve_device(machine.device, uses_torch=schedule.uses_torch)
        earlier = warn_of_earlier(run, plan.checkpoint, rebuilt_by(plan) if weights else {}, machine)
        total, already = work_bytes(schedule, output)
        orders: tuple[Found, ...] = ()
        source: SourceOfBytes = reader
        lacking: tuple[str, ...] = ()
        tuned: tuple[TunedLayer, ...] = ()
        if final.swept is not None:
            outcomes, lacking, tuned = swept_outcomes(run, final, reader, output, device)
        else:
            size = layout.input_bytes
            with run.progress("pruning" if weights else "masking", total, already, size=size) as advance:
                if plan.permutations.found:
                    from sparseprune.execution.permuting import find_orders

                    orders, source = find_orders(schedule, reader, output, advance)
                outcomes = execute(schedule, source, output, device, advance)
        found = pruning.summed_up(outcomes)
        run.warn(*unpruned_lines(plan.bound.rules, found.pruned))
        warn_of_broken(run, earlier, output)
        _, mask_bytes = sizes_of(layout)
        return results.Report(
            input=str(prepared.asked.checkpoint),
            output=output_shown(prepared.target.output, prepared.asked.checkpoint, layout),
            spec_sha256=digest(prepared.source.text),
            set=dict(prepared.asked.overrides),
            target=prepared.found,
            reconstruct=prepared.asked.reconstruct,
            stats=stats_told(prepared),
            within=None if prepared.asked.within is None else str(prepared.asked.within),
            device=device_text(schedule.every_group, device),
            seconds=round(run.seconds, 3),
            warnings=tuple(run.warnings),
            notes=(*notes_of(prepared), *lacking),
            files_left_out=other_weights(layout.left_out),
            bytes=WrittenBytes(
                weights=weight_bytes(layout) if weights else layout.input_bytes, masks=mask_bytes
            ),
            totals=pruning.report_totals(plan.checkpoint, found, prepared.coverage),
            rules=pruning.rule_results(
                plan.bound, found, devices_of_rules(schedule, device), rebuilding_rules(plan)
            ),
            tensors=Made(outcomes, pruning.tensor_result),
            runtimes=uses_of(plan.bound, outcomes),
            permuted=permuted_modules(orders),
            not_permuted=plan.permutations.unmoved,
            tuned=tuned,
        )

    def refuse() -> None:
        refuse_changed(prepared.plan.checkpoint, score_shards(prepared.plan))

    told = explained(prepared, "apply")
    report = run.write(output, work, refuse, spec=as_applied(prepared), card=told.card)
    forget(prepared)
    return report


def explained(prepared: Prepared, verb: Literal["apply", "remove"], more: Sequence[str] = ()) -> Explained:
    """What the output tells of the command, which had `more` words."""
    checkpoint, statistics = prepared.plan.checkpoint, stats_told(prepared)
    told = explained_by_spec(prepared.asked, prepared.source.text, checkpoint, verb=verb, more=more)
    return replace(told, statistics=None if statistics is None else located(statistics))


def forget(prepared: Prepared) -> None:
    """Remove what was kept for a run that continues this one, which has ended well."""
    if prepared.swept is not None:
        from sparseprune.api.sweeping import forget_gradients

        forget_gradients(target_of(prepared.plan.checkpoint, prepared.target))


def beside(machine: Machine, swept: Swept) -> Machine:
    """What a sweep leaves of a machine for the work on matrices."""
    return dataclasses.replace(machine, memory=machine.memory - swept.rooms.taken)


def swept_outcomes(
    run: Run, prepared: Prepared, reader: SourceOfBytes, output: Output, device: str
) -> tuple[Sequence[TensorOutcome], tuple[str, ...], tuple[TunedLayer, ...]]:
    """Do the work with a text, block by block; also gives lines on it, and the layers that were tuned."""
    from sparseprune.api.sweeping import Sweeper
    from sparseprune.results.pruning import TunedLayer

    swept, target = prepared.swept, prepared.target
    if swept is None:
        raise TypeError("there is no text")
    left = beside(prepared.machine, swept)
    sweeper = Sweeper(run, swept, output, reader, lambda plan: schedule_of(plan, target, left))
    outcomes = sweeper.execute(device)
    unrebuilt: dict[tuple[str, str], list[str]] = {}
    for one in sweeper.left:
        unrebuilt.setdefault((one.rule, one.why), []).extend(one.weights)
    lines = _left_lines(Left(rule, why, tuple(names)) for (rule, why), names in unrebuilt.items())
    tuned = tuple(
        TunedLayer(layer=name, before=before, after=after) for name, (before, after) in sweeper.tuned.items()
    )
    told = (*lines, *_few_tokens(sweeper.rests_on_few), *_tuned_lines(tuned, sweeper.untuned))
    return outcomes, told, tuned


def _tuned_lines(tuned: Sequence[TunedLayer], untuned: Sequence[str]) -> Iterator[str]:
    """Lines on layers that were tuned, and on those that were not."""
    shares = [one.after / one.before for one in tuned if one.before > 0]
    if shares:
        text = "what their outputs differ by from the dense model's fell to"
        yield f"tuned {many(len(tuned), 'layer')}: {text} {percent(sum(shares) / len(shares))} on average"
    if untuned:
        yield (
            f"{many(len(untuned), 'layer')} not tuned, such as {untuned[0]}: no matrix before its outputs "
            'has gradients; metric = "outputs" does without'
        )


def identity_of(prepared: Prepared) -> dict[str, str]:
    """What an unfinished output must agree with to be continued; the number of jobs is no part of it."""
    checkpoint, target, machine = prepared.plan.checkpoint, prepared.target, prepared.machine
    scores = shards_identity(score_shards(prepared.plan))
    # Variables of the spec may come from it; that beside a single file is no part of the checkpoint.
    config = dict(read_config(checkpoint) or {})
    asked = prepared.asked
    room = prepared.schedule.limits.device  # by which the work is cut
    how = (machine.device, target.mask_format, target.weights, machine.memory, *([room] if room else ()))
    options = (*how, *_asked_words(asked))
    spec = json.dumps([prepared.source.text, sorted(asked.overrides.items())])
    swept = {} if prepared.swept is None else prepared.swept.text.identity
    return {
        **swept,
        "the version": __version__,
        "the input": digest(json.dumps([checkpoint_identity(checkpoint), config, scores])),
        "the spec": digest(spec),
        "the options": json.dumps(options),
    }


def score_shards(plan: Plan) -> Iterable[Shard]:
    """The shards of score files, statistics and masks of an earlier step, each once."""
    tasks = [task for unit in plan.units for task in unit.tasks]
    beside = [each.stored.shard for one in plan.permutations.found for each in one.beside]
    inputs = [one.stored.shard for task in tasks for one in task.inputs]
    inputs += [one.stored.shard for task in tasks for one in task.within]
    return dict.fromkeys(one for one in (*inputs, *beside) if one.size)  # what is in memory has none


def as_applied(prepared: Prepared) -> bytes:
    """The spec's text, below a comment with what else was asked for."""
    asked = prepared.asked
    words = [*(f"--set {name}={value}" for name, value in asked.overrides.items()), *_asked_words(asked)]
    above = f"# Applied with {' '.join(' '.join(words).split())}\n" if words else ""
    return f"{above}{prepared.source.text}".encode()


def _asked_words(asked: Source) -> list[str]:
    """The options by which survivors are rebuilt, or by which few may survive."""
    given = {"--within": asked.within, "--reconstruct": asked.reconstruct, "--stats": asked.stats}
    words = [f"{option} {value}" for option, value in given.items() if value is not None]
    return words if asked.text is None else [*words, *asked.text.words]


def stats_told(prepared: Prepared) -> str | None:
    """The statistics that a command named, else those that it took."""
    if prepared.asked.stats is not None:
        return str(prepared.asked.stats)
    return next(iter(_statistics_of(prepared)), None)


def _statistics_of(prepared: Prepared) -> list[str]:
    """The paths of the statistics that are read, each once."""
    found: dict[str, None] = {}
    for _, instance in prepared.plan.bound.instances():
        score = instance.score.file if instance.score.kind in OF_STATISTICS else None
        for file in (score, *(one.file for one in (instance.reconstruct, instance.allocate) if one)):
            if file is not None and file != SWEPT:
                found[_from_here(file)] = None
    return list(found)


def _from_here(path: Path) -> str:
    """A path as one would type it in this folder, so that it is the same wherever the folder lies."""
    with suppress(OSError, ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def _read_line(prepared: Prepared) -> Iterator[str]:
    """A line on the statistics that were read, and on how many tokens they rest."""
    paths = _statistics_of(prepared)
    inputs = (one for unit in prepared.plan.units for task in unit.tasks for one in task.inputs)
    tokens = max((count for one in inputs for count in one.tokens), default=0)
    if paths:
        yield (
            f"statistics of {many(tokens, 'token')} in {listed(paths)}"
            if tokens
            else (f"statistics in {listed(paths)}")
        )


def notes_of(prepared: Prepared) -> tuple[str, ...]:
    """Lines on how survivors were rebuilt, and what that rests on."""
    shared = () if prepared.allocation is None else prepared.allocation.notes()
    return (*_read_line(prepared), *prepared.unrebuilt, *_few_tokens(rests_on_few(prepared.plan)), *shared)


def _few_tokens(matrices: Mapping[str, bool]) -> list[str]:
    """A line where statistics rest on fewer tokens than a matrix has inputs."""
    few = [name for name, is_so in matrices.items() if is_so]
    if not few:
        return []
    text = f"{len(few)} of {len(matrices)} matrices rest on fewer tokens than they have inputs"
    return [f"statistics of {text}, such as those of {few[0]}: calibrate on more text"]
