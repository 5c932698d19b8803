"""`calibrate`: the summary of collected statistics."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparseprune import api, results
from sparseprune.cli.command import Call, Json, Verbose, command
from sparseprune.cli.console import print_outcome
from sparseprune.cli.signals import temporary_folder
from sparseprune.report.wording import many, size

if TYPE_CHECKING:
    from sparseprune.results import measuring


def show_collected(call: "Call[results.Statistics]", json: Json = False, verbose: Verbose = False) -> None:
    with temporary_folder("sparseprune-") as scratch:
        result = call(scratch=scratch)
        call.summarize(_summary(result, call.options["sequences"], verbose=verbose))
        print_outcome(result, json=json)


calibrate = command(api.calibrate, show_collected)


def _summary(result: "results.Statistics", asked: int, *, verbose: bool) -> list[str]:
    matrices, without = result.matrices, result.without
    weights = sum(len(one.weights) for one in matrices)
    lines = []
    if result.sequences < asked:
        lines.append(f"the text has {result.sequences} sequences, fewer than the {asked} asked for")
    if result.missing:
        lines.append(
            f"the checkpoint lacks {len(result.missing)} weights of the model, such as {result.missing[0]}"
        )
    lines += [
        (
            f"{result.kind} statistics of {weights:,} matrices in {len(matrices):,} tensors, over "
            f"{result.tokens:,} tokens in {result.sequences} sequences of {result.length}"
        ),
        *_few(matrices, verbose=verbose),
    ]
    if without:
        shown = without if verbose else without[:1]
        such = "" if verbose or len(without) == 1 else ", such as"
        lines.append(f"no statistics of {many(len(without), 'matrix')}{such}")
        lines += [f"  {one.name}: {one.why}" for one in shown]
    lines += [*_gradients(result, verbose=verbose), *_experts(result)]
    rate = result.tokens * result.passes / max(result.seconds, 1e-9)
    passes = f", in {result.passes} passes" if result.passes > 1 else ""
    lines.append(f"{result.seconds:.1f} s, {rate:,.0f} tokens/s{passes}, on {result.device}")
    return lines


def _gradients(result: "results.Statistics", *, verbose: bool) -> list[str]:
    """Lines about gradients, if they were asked for."""
    found, without = result.gradients, result.without_gradients
    lines = []
    if found:
        nbytes = sum(4 * (one.experts or 1) * one.outputs**2 // one.groups for one in found)
        lines.append(f"gradients of {many(len(found), 'matrix')}, in {size(nbytes)}")
    if without:
        such = "" if verbose or len(without) == 1 else ", such as"
        lines.append(f"no gradients of {many(len(without), 'matrix')}{such}")
        lines += [f"  {one.name}: {one.why}" for one in (without if verbose else without[:1])]
    return lines


def _experts(result: "results.Statistics") -> list[str]:
    """A line about experts, if a router chooses some."""
    counts = [count for one in result.experts for count in one.tokens]
    if not counts:
        return []
    idle = counts.count(0)
    alone = f", {idle:,} of which met no token" if idle else ""
    return [f"gates and outputs of {many(len(counts), 'expert')}{alone}"]


def _few(matrices: "Sequence[measuring.CollectedStatistics]", *, verbose: bool) -> list[str]:
    """Lines about matrices that met fewer tokens than they have inputs."""
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
