"""`apply`, `mask` and `plan`: from a checkpoint and a spec to a plan, an output and its report.

`prepare` reads headers and the spec, no tensor data, and imports no torch. Called by the public functions,
and by removing.py for what it decides by.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from msgspec import Struct

from sparseprune import __version__, results
from sparseprune.api.applied import read_spec, rebuilt_by, warn_of_broken, warn_of_earlier
from sparseprune.api.run import collector_paused, digest, output_shown, sizes_of
from sparseprune.checkpoint import StagedOutput, lay_out_apply, lay_out_masks, open_checkpoint, read_config
from sparseprune.checkpoint.file_io import checkpoint_identity, refuse_changed, shards_identity
from sparseprune.checkpoint.folding import refuse_split
from sparseprune.execution.plan import bind_to, metrics_of_rules, plan_of
from sparseprune.execution.schedule import cpu_lines, make_schedule
from sparseprune.report.coverage import coverage_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sparseprune.api.options import Machine, Source, Target
    from sparseprune.api.run import Run
    from sparseprune.checkpoint import Checkpoint, OutputLayout, Shard, TensorReader
    from sparseprune.execution.plan import Plan
    from sparseprune.execution.schedule import Schedule
    from sparseprune.removal.preview import Preview
    from sparseprune.report.coverage import Coverage
    from sparseprune.results.pruning import TargetReached
    from sparseprune.spec import BoundSpec, Spec, SpecSource


class Prepared(Struct, frozen=True):
    """Everything that is known before the first byte of a tensor is read, and what was asked for.

    `asked` has the number that was found for a target as if it had been set; `found` tells of it.
    """

    asked: Source
    target: Target
    machine: Machine
    source: SpecSource
    plan: Plan
    schedule: Schedule
    layout: OutputLayout
    coverage: Coverage
    found: TargetReached | None = None


def prepare(asked: Source, target: Target, machine: Machine) -> Prepared:
    """Find and read the spec, read the headers, bind one to the other, lay out the output."""
    with collector_paused():
        source, spec = read_spec(asked.spec, asked.overrides)
        checkpoint = open_checkpoint(asked.checkpoint)
        refuse_split(checkpoint)
        bound, found = bind_to(checkpoint, spec), None
        if asked.goal is not None:
            bound, asked, found = _reaching(asked, asked.goal, target, checkpoint, (spec, bound))
        plan = plan_of(checkpoint, bound, writes=target.weights and not target.resized)
        schedule = make_schedule(
            plan,
            machine.memory,
            machine.jobs,
            compiled=not machine.device.startswith("cuda"),
            masks=target.mask_format is not None,
            resized=target.resized,
        )
        coverage = coverage_of(plan.checkpoint.tensors, plan.bound, read_config(plan.checkpoint))
        where = (plan.checkpoint, target.output, plan.reached)
        scores, mask_format = score_shards(plan), target.mask_format
        if target.weights or mask_format is None:
            layout = lay_out_apply(*where, mask_format, scores)
        else:
            layout = lay_out_masks(*where, mask_format, scores)
    return Prepared(asked, target, machine, source, plan, schedule, layout, coverage, found)


def _reaching(
    asked: Source, text: str, target: Target, checkpoint: Checkpoint, given: tuple[Spec, BoundSpec]
) -> tuple[BoundSpec, Source, TargetReached]:
    """The bound spec that reaches a target, and what would have to be asked for to get it without one."""
    from sparseprune.api.goals import Bound, Goal, reach
    from sparseprune.removal.sections import as_model

    (spec, bound), overrides = given, asked.overrides
    config, _ = as_model(read_config(checkpoint), target.model_type)
    goal = Goal.of(text)
    reached = reach(goal, Bound(spec, checkpoint, bound, overrides, config), removed=target.resized)
    name, value = reached.override
    return reached.bound, replace(asked, overrides={**overrides, name: value}), reached.found


def warn(run: Run, prepared: Prepared) -> None:
    """Warn of what a user should know before any work; an error under `strict`."""
    run.warn(*prepared.coverage.warnings(), *cpu_lines(prepared.schedule, prepared.machine.device))


def planned(
    run: Run, prepared: Prepared, expected: Preview | None = None, layout: OutputLayout | None = None
) -> results.Plan:
    """What the spec binds to and would do; of a removal with what it would come to, and its own layout."""
    from sparseprune.removal.preview import preview
    from sparseprune.report.plan import plan_totals, planned_removal, rule_plan, unreached
    from sparseprune.results.pruning import PlannedBytes

    plan, asked, layout = prepared.plan, prepared.asked, layout or prepared.layout
    bound, tensors, metrics = plan.bound, plan.checkpoint.tensors, metrics_of_rules(plan)
    with collector_paused():
        if expected is None:
            expected = preview(plan, read_config(plan.checkpoint))
        warn(run, prepared)
        weights, masks = sizes_of(layout)
        return results.Plan(
            input=str(asked.checkpoint),
            spec=asked.spec,
            output=output_shown(prepared.target.output, asked.checkpoint, layout),
            output_exists=layout.target.exists(),
            warnings=tuple(run.warnings),
            totals=plan_totals(plan.checkpoint, bound, prepared.coverage),
            rules=tuple(rule_plan(rule, tensors, expected, metrics.get(rule.name)) for rule in bound.rules),
            removal=planned_removal(expected),
            target=prepared.found,
            unreached=unreached(tensors, set(bound.covered)),
            bytes=PlannedBytes(
                input=weights,
                masks=masks,
                output=layout.output_bytes,
                peak=prepared.schedule.peak_bytes,
            ),
        )


def prune(run: Run, prepared: Prepared) -> results.Report:
    """Do the work, write the report beside it, and give the output its name."""
    warn(run, prepared)
    plan, schedule, layout, machine = prepared.plan, prepared.schedule, prepared.layout, prepared.machine
    weights = prepared.target.weights
    output = StagedOutput(layout, prepared.target.force, identity=identity_of(prepared))

    def work(reader: TensorReader) -> results.Report:
        # Numpy and the compiled loops come in here, after everything that can be refused without them.
        from sparseprune.execution.pruning import execute, work_bytes
        from sparseprune.execution.schedule import device_text, devices_of_rules, resolve_device
        from sparseprune.report import pruning
        from sparseprune.report.coverage import unpruned_lines
        from sparseprune.report.wording import other_weights
        from sparseprune.results.fields import Made, WrittenBytes

        device = resolve_device(machine.device, uses_torch=schedule.uses_torch)
        earlier = warn_of_earlier(run, plan.checkpoint, rebuilt_by(plan) if weights else {}, machine)
        total, already = work_bytes(schedule, output)
        with run.progress("pruning" if weights else "masking", total, already) as advance:
            outcomes = execute(schedule, reader, output, device, advance)
        found = pruning.summed_up(outcomes)
        run.warn(*unpruned_lines(plan.bound.rules, found.pruned))
        warn_of_broken(run, earlier, output)
        nbytes, mask_bytes = sizes_of(layout)
        return results.Report(
            input=str(prepared.asked.checkpoint),
            output=output_shown(prepared.target.output, prepared.asked.checkpoint, layout),
            spec_sha256=digest(prepared.source.text),
            set=dict(prepared.asked.overrides),
            target=prepared.found,
            device=device_text(schedule.groups, device),
            seconds=round(run.seconds, 3),
            warnings=tuple(run.warnings),
            notes=tuple(few_tokens(plan)),
            files_left_out=other_weights(layout.left_out),
            bytes=WrittenBytes(weights=nbytes, masks=mask_bytes),
            totals=pruning.report_totals(plan.checkpoint, found, prepared.coverage),
            rules=pruning.rule_results(
                plan.bound, found, devices_of_rules(schedule, device), metrics_of_rules(plan)
            ),
            tensors=Made(outcomes, pruning.tensor_result),
        )

    read = score_shards(plan)
    spec = as_applied(prepared)
    return run.write(output, work, lambda: refuse_changed(plan.checkpoint, read), spec=spec)


def identity_of(prepared: Prepared) -> dict[str, str]:
    """What an unfinished output must agree with to be continued; the number of jobs is no part of it."""
    checkpoint, target, machine = prepared.plan.checkpoint, prepared.target, prepared.machine
    scores = shards_identity(score_shards(prepared.plan))
    # Variables of the spec may come from it; that beside a single file is no part of the checkpoint.
    config = dict(read_config(checkpoint) or {})
    options = (machine.device, target.mask_format, target.weights, machine.memory)
    spec = json.dumps([prepared.source.text, sorted(prepared.asked.overrides.items())])
    return {
        "the version": __version__,
        "the input": digest(json.dumps([checkpoint_identity(checkpoint), config, scores])),
        "the spec": digest(spec),
        "the options": json.dumps(options),
    }


def score_shards(plan: Plan) -> Iterable[Shard]:
    """The shards of score files and statistics, each once."""
    tasks = (task for unit in plan.units for task in unit.tasks)
    return dict.fromkeys(one.stored.shard for task in tasks for one in task.inputs)


def as_applied(prepared: Prepared) -> bytes:
    """The spec's text, below a comment with the variables that were set."""
    words = " ".join(f"--set {name}={value}" for name, value in prepared.asked.overrides.items())
    above = f"# Applied with {' '.join(words.split())}\n" if words else ""
    return f"{above}{prepared.source.text}".encode()


def few_tokens(plan: Plan) -> list[str]:
    """A line where statistics rest on fewer tokens than a matrix has inputs."""
    tasks = [task for unit in plan.units for task in unit.tasks]
    inputs = {one.key: one for task in tasks for one in task.inputs if one.role == "moment"}
    few = [name for name, one in inputs.items() if any(count < one.stored.shape[-1] for count in one.tokens)]
    if not few:
        return []
    text = f"{len(few)} of {len(inputs)} matrices rest on fewer tokens than they have inputs"
    return [f"statistics of {text}, such as those of {few[0]}: calibrate on more text"]
