"""`inspect` and `compare`: facts of the tensors of one checkpoint, and differences to another one.

Owns which tensors are listed in which order, the requirements, and what a picture needs beside the facts.
Called by the public functions.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from sparseprune.api.applied import applied_name, applied_report, applied_spec, note_left_behind
from sparseprune.api.explaining import made_by
from sparseprune.api.run import collector_paused
from sparseprune.checkpoint import (
    open_checkpoint,
    open_statistics,
    read_config,
    refuse_changed_shards,
)
from sparseprune.checkpoint.codes import names_beside
from sparseprune.checkpoint.folding import split_line
from sparseprune.checkpoint.layout import permutations_path
from sparseprune.errors import CheckpointError, SparsepruneError, printable
from sparseprune.report.inspection import ordered, selected
from sparseprune.spec.problems import shown, suggestion

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from sparseprune import results
    from sparseprune.api.options import Listing
    from sparseprune.api.resources import Machine
    from sparseprune.api.run import Run
    from sparseprune.checkpoint import Checkpoint, Source, Statistics
    from sparseprune.checkpoint import Source as SourceOfBytes
    from sparseprune.execution.compare import Pair, Sides
    from sparseprune.execution.inspect import Questions
    from sparseprune.report.pictures.charts import Survivors
    from sparseprune.report.requirements import Absent, Requirement
    from sparseprune.report.runtimes import Runtime
    from sparseprune.results.measuring import ComparedTensor
    from sparseprune.spec import BoundSpec, Spec


Found = TypeVar("Found")
_RELATED = 0.5  # the share of tensors that checkpoints of one model have in common at least
By = Literal["tensor", "layer", "module", "rule"]


class Look(Struct, frozen=True):
    """What `inspect` looks at, and in which words it is asked; `plot` with `tensor` for a close-up."""

    checkpoint: Path
    listing: Listing
    machine: Machine
    by: By = "tensor"
    patterns: Sequence[str] = ()
    blocks: Sequence[str] = ()
    runtimes: str | None = None
    requirements: Sequence[str] = ()
    plot: Path | None = None
    tensor: str | None = None
    window: str | None = None
    spec: str | None = None
    overrides: Mapping[str, str] | None = None


def inspect(run: Run, look: Look) -> results.Inspection:
    """Measure, and draw; CheckFailedError with the result where a requirement does not hold."""
    _refuse_contradictions(look)
    questions, runtimes, requirements = _asked(look)
    checkpoint = open_checkpoint(look.checkpoint)
    note_left_behind(run, look.checkpoint)
    run.note(split_line(checkpoint))
    if look.tensor is not None and look.tensor not in checkpoint.tensors:
        absent = f"--tensor {printable(look.tensor)}: {checkpoint.path} has no such tensor"
        raise SparsepruneError(f"{absent}{suggestion(look.tensor, checkpoint.tensors)}")
    names = selected(checkpoint.tensors, look.listing.match, look.listing.exclude)
    if requirements:
        from sparseprune.report.requirements import check_names

        check_names(requirements, names)
    with collector_paused():
        result = _inspected(run, look, checkpoint, names, questions, runtimes)
    if look.plot is not None:
        _plot(run, look, checkpoint, result, look.plot)
    if not requirements:
        return result
    from sparseprune.report.requirements import failures

    weights = [one for one in result.tensors if one.holds != "beside"]
    return run.checked(result, failures(requirements, weights))


def _refuse_contradictions(look: Look) -> None:
    """SparsepruneError for what is wrong whatever the checkpoint holds."""
    if look.plot is None and look.tensor is not None:
        raise SparsepruneError(
            f"--tensor {shown(look.tensor)}: goes with --plot FILE; to list a tensor alone give --match"
        )
    if look.window is not None and look.tensor is None:
        raise SparsepruneError(f"--window {shown(look.window)}: goes with --plot FILE --tensor NAME")
    if look.plot is not None:
        from sparseprune.report.pictures.files import check_picture

        check_picture(look.plot)
    elif look.by != "rule" and (look.spec is not None or look.overrides):
        option = "--spec" if look.spec is not None else "--set"
        raise SparsepruneError(f"{option}: goes with --by rule or --plot FILE, which have a use for a spec")


def _asked(look: Look) -> tuple[Questions, tuple[Runtime, ...], list[Requirement]]:
    """What to look for, and what has to hold; requirements add their patterns and runtimes."""
    from sparseprune.execution.inspect import BLOCKS, PATTERNS, Questions, block_of, pattern_of
    from sparseprune.report.inspection import fields_of
    from sparseprune.report.runtimes import RUNTIMES, runtimes_of

    patterns = (*PATTERNS, *map(pattern_of, look.patterns))
    blocks = tuple(dict.fromkeys((*BLOCKS, *map(block_of, look.blocks))))
    runtimes = () if look.runtimes is None else runtimes_of(look.runtimes)
    fields = fields_of(Questions(patterns, blocks))
    requirements = _parsed(look.requirements, fields, RUNTIMES)
    required = [one.pattern for one in requirements if one.pattern is not None]
    runtimes = (*runtimes, *(RUNTIMES[one.runtime] for one in requirements if one.runtime is not None))
    questions = Questions(tuple(dict.fromkeys((*patterns, *required))), blocks)
    return questions, tuple({one.name: one for one in runtimes}.values()), requirements


def _parsed(
    texts: Sequence[str], fields: Collection[str], runtimes: Collection[str] = ()
) -> list[Requirement]:
    """The conditions of --require; most calls have none, and load nothing for it."""
    if not texts:
        return []
    from sparseprune.report.requirements import parse_requirement

    return [parse_requirement(text, fields, runtimes) for text in texts]


def _inspected(
    run: Run,
    look: Look,
    checkpoint: Checkpoint,
    names: Sequence[str],
    asked: Questions,
    runtimes: Sequence[Runtime],
) -> results.Inspection:
    """The facts of the tensors that were asked for, in the order that was asked for."""
    from sparseprune.execution.inspect import inspect_checkpoint
    from sparseprune.execution.regions import Resources
    from sparseprune.report.inspection import grouping_of, make_inspection
    from sparseprune.report.runtimes import needed_patterns

    rules = _rules(look, checkpoint) if look.by == "rule" else None
    grouping = None if look.by == "tensor" else grouping_of(look.by, names, rules)
    tensors = [checkpoint.tensors[name] for name in names]
    questions = replace(asked, patterns=tuple(dict.fromkeys((*asked.patterns, *needed_patterns(runtimes)))))
    total = sum(one.nbytes for one in tensors)
    with run.reading() as reader, run.progress("inspecting", total) as advance:
        facts = inspect_checkpoint(
            tensors, reader, questions, Resources(look.machine.jobs, look.machine.memory), advance
        )
    beside = names_beside(checkpoint.tensors)
    if beside:
        facts = tuple(replace(one, holds="beside") if one.name in beside else one for one in facts)
    refuse_changed_shards(one.shard for one in tensors)
    found = make_inspection(str(look.checkpoint), facts, asked, runtimes, grouping, checkpoint.left_out)
    found = dataclasses.replace(found, made_by=made_by(checkpoint))
    listing = look.listing
    if found.groups is not None:
        return dataclasses.replace(found, groups=ordered(found.groups, listing.sort, listing.reverse))
    return dataclasses.replace(found, tensors=ordered(found.tensors, listing.sort, listing.reverse))


def _rules(look: Look, checkpoint: Checkpoint) -> Mapping[str, str]:
    """For each tensor the rules that reach it: of the spec that is named or was applied, or as reported."""
    from sparseprune.report.inspection import rules_of_report, rules_of_spec

    spec = applied_spec(checkpoint, look.spec, look.overrides or {})
    if spec is not None:
        return rules_of_spec(_bound(checkpoint, spec))
    rules = rules_of_report(applied_report(checkpoint) or {})
    if not rules:
        raise SparsepruneError(
            f"{look.checkpoint}: there is no spec and no report beside it that tells which rule reached "
            "which tensor; give --spec SPEC"
        )
    return rules


def _plot(run: Run, look: Look, checkpoint: Checkpoint, result: results.Inspection, path: Path) -> None:
    """Write the picture of everything, or of one tensor from close up, and note that."""
    spec = applied_name(checkpoint, look.spec, look.overrides or {})
    if look.tensor is None:
        from sparseprune.report.pictures.results import plot_inspection

        survivors = _by_spec(run, look, checkpoint, lambda *found: _survivors(run, look.machine, *found))
        plot_inspection(result, path, survivors, spec)
    else:
        from sparseprune.report.pictures.mask import Window, close_up, plot_mask

        window = None if look.window is None else Window.parsed(look.window)
        bound = _by_spec(run, look, checkpoint, _bound)
        with run.reading() as reader:
            seen = close_up(checkpoint.tensors[look.tensor], reader, bound, window)
        title = f"{look.tensor} of {checkpoint.path.name}"
        plot_mask(seen, path, title if spec is None else f"{title}, spec {spec}")
    run.note(f"wrote {path}")


def _by_spec(
    run: Run, look: Look, checkpoint: Checkpoint, find: Callable[[Checkpoint, Spec], Found]
) -> Found | None:
    """What is found by the spec that was named or applied; None, and a note, where there is none to use.

    A spec that was named must fit. One that lies beside the weights may not, if tensors were renamed since.
    """
    try:
        spec = applied_spec(checkpoint, look.spec, look.overrides or {})
        return None if spec is None else find(checkpoint, spec)
    except SparsepruneError as error:
        if look.spec is not None or look.overrides or error.exit_code != SparsepruneError.exit_code:
            raise
        first = str(error).splitlines()[0]
        run.listener.shortfall(f"drawn without the spec that lies beside the weights: {first}")
        return None


def _bound(checkpoint: Checkpoint, spec: Spec) -> BoundSpec:
    from sparseprune.execution.plan import tensor_infos
    from sparseprune.spec import bind

    return bind(spec, tensor_infos(checkpoint), read_config(checkpoint))


def _survivors(run: Run, machine: Machine, checkpoint: Checkpoint, spec: Spec) -> list[Survivors]:
    """For each rule that says how many blocks survive, how many do."""
    from sparseprune.execution.verify import count_survivors, make_check
    from sparseprune.report.pictures.charts import Survivors

    check = make_check(checkpoint, spec, machine.memory, machine.jobs)
    with run.reading() as reader, run.progress("counting survivors", check.nbytes) as advance:
        found = count_survivors(check, reader, advance)
    return [Survivors(rule.name, rule.nnz, rule.survivors) for rule in found.rules if rule.survivors]


class Comparing(Struct, frozen=True):
    """What `compare` compares; `stats` names what calibrate wrote, for the errors of outputs."""

    dense: Path
    pruned: Path
    listing: Listing
    machine: Machine
    requirements: Sequence[str] = ()
    plot: Path | None = None
    stats: Path | None = None


def compare(run: Run, asked: Comparing) -> results.Comparison:
    """Measure, and draw; CheckFailedError with the result where a requirement does not hold."""
    if asked.plot is not None:
        from sparseprune.report.pictures.files import check_picture

        check_picture(asked.plot)
    sides = _sides(run, asked)
    requirements = _requirements(asked, sides)
    statistics = None if asked.stats is None else open_statistics(asked.stats)
    matrices = _matrices(asked, sides, statistics)
    with collector_paused():
        result = _compared(run, asked, sides, statistics, matrices)
    if asked.plot is not None:
        from sparseprune.report.pictures.results import plot_comparison

        plot_comparison(result, asked.plot, applied_name(open_checkpoint(asked.pruned)))
        run.note(f"wrote {asked.plot}")
    if not requirements:
        return result
    names = [pair.before.name for pair in matrices]
    of = {} if statistics is None else statistics.of
    measured = {
        "output_error": frozenset(names),
        "loss_error": frozenset(name for name in names if of[name].gradients is not None),
    }
    return run.checked(result, _failed(requirements, [*result.tensors, *_absent(sides)], measured))


def _unrelated(dense: Checkpoint, pruned: Checkpoint) -> Iterator[str]:
    """A line for two checkpoints that have few names in common; CheckpointError where they have none."""
    fewest = min(len(dense.tensors), len(pruned.tensors))
    common = len(dense.tensors.keys() & pruned.tensors.keys())
    if common or not fewest:
        if common < _RELATED * fewest:
            yield (
                f"only {common:,} of {fewest:,} tensors have their names in both {dense.path} and "
                f"{pruned.path}: are these checkpoints of one model?"
            )
        return
    one, other = next(iter(dense.tensors)), next(iter(pruned.tensors))
    raise CheckpointError(
        f"{dense.path} and {pruned.path} have no tensor in common: the first names are {shown(one)} and "
        f"{shown(other)}; compare checkpoints of one model"
    )


def _sides(run: Run, asked: Comparing) -> Sides:
    """Which of the tensors that were asked for are in both, and which in one."""
    from sparseprune.execution.compare import sides_of

    dense, pruned = open_checkpoint(asked.dense), open_checkpoint(asked.pruned)
    run.warn(*_unrelated(dense, pruned))
    names = dict.fromkeys((*dense.tensors, *pruned.tensors))
    listing = asked.listing
    return sides_of(dense.tensors, pruned.tensors, selected(names, listing.match, listing.exclude))


def _requirements(asked: Comparing, sides: Sides) -> list[Requirement]:
    """What has to hold; SparsepruneError for conditions or columns without a meaning."""
    from sparseprune.report.comparison import ERRORS, FIELDS, unmeasured

    requirements = _parsed(asked.requirements, FIELDS)
    compared = [one.comparison.field for one in requirements if one.comparison is not None]
    of_statistics = [field for field in ERRORS if field in (*compared, asked.listing.sort)]
    if asked.stats is None and of_statistics:
        raise SparsepruneError(f"{of_statistics[0]} is not known without --stats: give what calibrate wrote")
    if asked.listing.sort is not None:
        ordered(unmeasured(sides.pairs[:1]), asked.listing.sort, asked.listing.reverse)
    if requirements:
        from sparseprune.report.requirements import failures

        failures(requirements, [*unmeasured(sides.pairs), *_absent(sides)])
    return requirements


def _failed(
    requirements: list[Requirement],
    tensors: Sequence[ComparedTensor | Absent],
    measured: Mapping[str, frozenset[str]],
) -> list[str]:
    """What does not hold; errors are asked of the tensors of which there are statistics."""
    from sparseprune.report.requirements import Absent, failures

    lines = []
    for requirement in requirements:
        names = measured.get("" if requirement.comparison is None else requirement.comparison.field)
        known = [one for one in tensors if names is None or one.name in names or isinstance(one, Absent)]
        lines += failures([requirement], known)
    return lines


def _in_one_order(run: Run, asked: Comparing, statistics: Statistics | None, reader: SourceOfBytes) -> Source:
    """What both are read by: where PRUNED was permuted before it was pruned, DENSE comes in that order."""
    pruned = open_checkpoint(asked.pruned)
    path = permutations_path(pruned)
    if not path.is_file():
        return reader
    from sparseprune.execution.reordered import in_order_of

    source = in_order_of(pruned, open_checkpoint(asked.dense), statistics, reader)
    if source is None:
        return reader
    run.note(f"{asked.dense} is compared in the order that {path} tells")
    return source


def _absent(sides: Sides) -> list[Absent]:
    """Tensors that fail every requirement: they are gone, or have another shape."""
    from sparseprune.report.requirements import Absent
    from sparseprune.report.wording import shape_text

    gone = [Absent(stored.name, stored.shape, "is not in PRUNED") for stored in sides.removed]
    for pair in sides.reshaped:
        was, now = shape_text(pair.before.shape), shape_text(pair.after.shape)
        gone.append(Absent(pair.before.name, pair.before.shape, f"was {was}, is {now} in PRUNED"))
    return gone


def _matrices(asked: Comparing, sides: Sides, statistics: Statistics | None) -> tuple[Pair, ...]:
    """What there are second moments of."""
    from sparseprune.execution.compare import with_statistics

    if statistics is None:
        return ()
    everything = not (asked.listing.match or asked.listing.exclude)
    if everything and not any(pair.before.name in statistics.of for pair in sides.pairs):
        raise CheckpointError(
            f"{asked.stats}: has statistics of none of the tensors of {asked.dense}; are they of another "
            "checkpoint?"
        )
    found = with_statistics(sides.pairs, statistics)
    if _asks_for_loss(asked) and not any(statistics.of[pair.before.name].gradients for pair in found):
        raise SparsepruneError(
            f"loss_error is not known: {asked.stats} has no gradients; calibrate --gradients"
        )
    return found


def _asks_for_loss(asked: Comparing) -> bool:
    """Whether something is required of what the loss loses, or tensors are ordered by it."""
    from sparseprune.report.comparison import FIELDS

    required = [one.comparison.field for one in _parsed(asked.requirements, FIELDS) if one.comparison]
    return "loss_error" in (*required, asked.listing.sort)


def _compared(
    run: Run, asked: Comparing, sides: Sides, statistics: Statistics | None, matrices: tuple[Pair, ...]
) -> results.Comparison:
    """What is found in the tensors, in the order that was asked for."""
    from sparseprune.execution.compare import compare_checkpoints, matrix_errors
    from sparseprune.execution.regions import Resources
    from sparseprune.report.comparison import make_comparison

    resources = Resources(asked.machine.jobs, asked.machine.memory)
    nbytes = sum(pair.nbytes for pair in (*sides.pairs, *matrices))
    with run.reading() as reader, run.progress("comparing", nbytes) as advance:
        source = _in_one_order(run, asked, statistics, reader)
        found = compare_checkpoints(sides.pairs, source, resources, advance)
        errors = None
        if statistics is not None:
            errors = matrix_errors(matrices, statistics, source, resources, advance)
    read = [one.shard for pair in sides.pairs for one in (pair.before, pair.after)]
    for one in [statistics.of[pair.before.name] for pair in matrices] if statistics else []:
        read += [stored.shard for stored in (one.stored, one.gradients) if stored is not None]
    refuse_changed_shards(read)
    result = make_comparison(str(asked.dense), str(asked.pruned), found, sides, errors)
    return dataclasses.replace(
        result, tensors=ordered(result.tensors, asked.listing.sort, asked.listing.reverse)
    )
