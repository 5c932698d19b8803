"""What the commands do, as functions: the command line is made from their signatures and docstrings.

A function checks nothing and prints nothing: it hands on what was given to a module of this package, which it
loads when it is called. Paths may be text or pathlib's. Results are those of `sparseprune.results`.
"""

from collections.abc import Callable
from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sparseprune.api import options
from sparseprune.api.options import Target, machine, path_or_none, source, texts
from sparseprune.api.run import Listener, Progress, Run
from sparseprune.api.windows import AskedText, Windows

if TYPE_CHECKING:
    from sparseprune import results
    from sparseprune.execution.plan import Plan

Listen = Listener | Callable[[Progress], None] | None
"""Who hears of a run: a function that is called with each step, or a Listener, who hears of warnings too."""


def apply(
    checkpoint: options.Checkpoint,
    spec: options.Spec,
    output: options.Output = None,
    *,
    device: options.Device = "auto",
    jobs: options.Jobs = None,
    memory: options.Memory = None,
    mask_format: options.MaskFormatOrNone = "packed",
    set: options.Set = None,
    target: options.Goal = None,
    reconstruct: options.Reconstruct = None,
    stats: options.StatsToRebuild = None,
    text: options.TextToSweep = (),
    sequences: options.Sequences = 128,
    length: options.Length = None,
    field: options.Field = None,
    seed: options.Seed = 0,
    special: options.Special = True,
    gradients: options.GradientsFirst = False,
    scratch: options.Place | None = None,
    strict: options.Strict = False,
    force: options.Force = False,
    progress: Listen = None,
) -> "results.Report":
    """Prune a checkpoint: write its weights with the losers zero, masks and a report.

    The output is CKPT-pruned beside a directory, or m.pruned.safetensors beside m.safetensors, unless
    --output says otherwise. Its path is printed on stdout, all else on stderr.

    --reconstruct and --stats rebuild what survives by what calibrate wrote, whatever the spec says of that.

    Example: sparseprune apply ./llama 2of4 -o ./llama-2of4

    `spec` may be the text of a spec as well; `set` has numbers or expressions by the names of its variables.
    `target`, such as "params=6B", finds one of these numbers; the report's `target` tells which.

    Raises:
        SpecError: the spec is wrong in itself, or does not fit the checkpoint.
        CheckpointError: the input cannot be read, or the output may not be written there.
        MachineError: the disk is full, or the input changed meanwhile.
    """
    from sparseprune.api.pruning import prepare, prune

    run = Run(progress, strict=strict)
    goes = Target(path_or_none(output), mask_format, force)
    windows = Windows([Path(one) for one in text], sequences, length, field, seed, special)
    read = AskedText(windows, gradients, path_or_none(scratch))
    asked = source(checkpoint, spec, set, target, (reconstruct, stats), read)
    return prune(run, prepare(asked, goes, machine(device, jobs, memory, sweeps=bool(text)), run))


def mask(
    checkpoint: options.Checkpoint,
    spec: options.Spec,
    output: options.Output = None,
    *,
    device: options.Device = "auto",
    jobs: options.Jobs = None,
    memory: options.Memory = None,
    mask_format: options.MaskFormat = "packed",
    set: options.Set = None,
    target: options.Goal = None,
    reconstruct: options.Reconstruct = None,
    stats: options.StatsToRebuild = None,
    strict: options.Strict = False,
    force: options.Force = False,
    progress: Listen = None,
) -> "results.Report":
    """Write only the masks of a spec, True where a weight is kept, and a report.

    The output is CKPT-masks beside a directory, or m.masks.safetensors beside m.safetensors, unless
    --output says otherwise.

    Example: sparseprune mask ./llama 2of4 --mask-format bool

    Raises what `apply` raises.
    """
    from sparseprune.api.pruning import prepare, prune

    run = Run(progress, strict=strict)
    goes = Target(path_or_none(output), mask_format, force, weights=False)
    asked = source(checkpoint, spec, set, target, (reconstruct, stats))
    return prune(run, prepare(asked, goes, machine(device, jobs, memory)))


def plan(
    checkpoint: options.Checkpoint,
    spec: options.Spec,
    output: options.Output = None,
    *,
    jobs: options.Jobs = None,
    memory: options.Memory = None,
    mask_format: options.MaskFormatOrNone = "packed",
    set: options.Set = None,
    target: options.Goal = None,
    reconstruct: options.Reconstruct = None,
    stats: options.StatsToRebuild = None,
    text: options.TextToSweep = (),
    sequences: options.Sequences = 128,
    length: options.Length = None,
    field: options.Field = None,
    seed: options.Seed = 0,
    special: options.Special = True,
    gradients: options.GradientsFirst = False,
    strict: options.Strict = False,
    allocation: options.Allocation = False,
    device: str = "cpu",
    as_model: str | None = None,
    command: Literal["apply", "mask", "remove"] = "apply",
    look: "Callable[[Plan], None] | None" = None,
    progress: Listen = None,
) -> "results.Plan":
    """Show what a spec binds to and what it would do, without reading tensor data but for --allocation.

    Rule by rule: tensors, views, block grids, scopes, what survives. Then what no rule reaches, and the
    size of the output.

    Example: sparseprune plan ./llama 2of4

    `command` is what is planned for, on `device`, `as_model` another model type of what would be left; `look`
    gets the bound rules with every shape, and the checkpoint. Raises SpecError and CheckpointError as `apply`
    does.
    """
    from sparseprune.api.pruning import planned, prepare, with_parts_of_budgets

    run = Run(progress, strict=strict)
    goes = Target(path_or_none(output), mask_format, weights=command != "mask")
    if command == "remove":
        goes = Target(goes.output, resized=True, model_type=as_model)
    windows = Windows([Path(one) for one in text], sequences, length, field, seed, special)
    read = AskedText(windows, gradients)
    asked = source(checkpoint, spec, set, target, (reconstruct, stats), read)
    prepared = prepare(asked, goes, machine(device, jobs, memory, sweeps=bool(text)), run, plans=True)
    if allocation:
        prepared = with_parts_of_budgets(run, prepared)
    if look is not None:
        look(prepared.plan)
    if command == "remove":
        from sparseprune.api.removing import planned_removal

        return planned_removal(run, prepared)
    return planned(run, prepared)


def remove(
    checkpoint: options.Checkpoint,
    spec: options.SpecOrNone = None,
    *,
    masks: options.MasksToCut = None,
    zeros_of: options.ZerosOf = None,
    experts: options.ExpertsToKeep = None,
    vocabulary: options.TokensToKeep = None,
    output: options.Output = None,
    match: options.Match = (),
    exclude: options.Exclude = (),
    rename: options.Rename = None,
    partial: options.Partial = False,
    as_model: options.AsModel = None,
    device: options.Device = "auto",
    jobs: options.Jobs = None,
    memory: options.Memory = None,
    set: options.Set = None,
    target: options.Goal = None,
    reconstruct: options.Reconstruct = None,
    stats: options.StatsToRebuild = None,
    text: options.TextToSweep = (),
    sequences: options.Sequences = 128,
    length: options.Length = None,
    field: options.Field = None,
    seed: options.Seed = 0,
    special: options.Special = True,
    gradients: options.GradientsFirst = False,
    scratch: options.Place | None = None,
    strict: options.Strict = False,
    force: options.Force = False,
    dry_run: bool = False,
    progress: Listen = None,
) -> "results.Removal":
    """Write a smaller dense checkpoint: channels, heads, experts or layers that lose are cut out.

    The config is rewritten, so that the model's own class loads it; it computes what the zeroed checkpoint
    does. The output is CKPT-smaller beside the directory unless --output says otherwise.

    Example: sparseprune remove ./llama mlp-channels -o ./llama-smaller

    `experts` and `vocabulary` may be the list itself. A `dry_run`, which goes with a list, tells what would
    be left and writes nothing. Raises what `apply` raises, and SpecError or CheckpointError where no class of
    a model has what would be left.
    """
    from sparseprune.api.masked import mask_source
    from sparseprune.api.removing import Asked
    from sparseprune.api.removing import remove as cut_out

    windows = Windows([Path(one) for one in text], sequences, length, field, seed, special)
    read = AskedText(windows, gradients, path_or_none(scratch))
    lists: dict[str, object] = {"--experts": experts, "--vocabulary": vocabulary}
    asked = Asked(
        checkpoint=Path(checkpoint),
        spec=None if spec is None else fspath(spec),
        source=mask_source(masks, zeros_of, (match, exclude, rename), partial=partial),
        lists={name: each for name, each in lists.items() if each is not None},
        dry_run=dry_run,
        overrides=texts(set),
        goal=target,
        rebuilding=(reconstruct, path_or_none(stats)),
        text=read,
        target=Target(path_or_none(output), None, force, resized=True, model_type=as_model),
        machine=machine(device, jobs, memory, sweeps=bool(text)),
    )
    return cut_out(Run(progress, strict=strict), asked)


def calibrate(
    checkpoint: options.Checkpoint,
    text: options.Text,
    output: options.Output = None,
    *,
    stats: options.Kind = "hessian",
    gradients: options.Gradients = False,
    sequences: options.Sequences = 128,
    length: options.Length = None,
    field: options.Field = None,
    seed: options.Seed = 0,
    special: options.Special = True,
    device: options.Device = "auto",
    memory: options.MomentMemory = None,
    force: options.Force = False,
    scratch: options.Place | None = None,
    progress: Listen = None,
) -> "results.Statistics":
    """Run text through the checkpoint's model and write what its matrices are multiplied with.

    The output is CKPT-stats beside the directory unless --output says otherwise: for every matrix the second
    moment of its inputs, which [reconstruct] and the scores wanda and obd of a spec read. A run that was
    interrupted is continued by the same command. Needs transformers, which the extra `calibrate` brings.

    Example: sparseprune calibrate ./llama --text corpus.txt -o stats

    A moment has the shape (inputs, inputs), or (experts, inputs, inputs). `scratch` is a folder for what the
    model is loaded from, by default a temporary one. Raises SparsepruneError and its subclasses.
    """
    from sparseprune.api.calibrating import Collecting
    from sparseprune.api.calibrating import calibrate as collect

    asked = Collecting(
        checkpoint=Path(checkpoint),
        windows=Windows([Path(one) for one in text], sequences, length, field, seed, special),
        output=path_or_none(output),
        kind=stats,
        gradients=gradients,
        device=device,
        memory=options.quarter_of_memory() if memory is None else options.memory_of(memory),
        force=force,
        scratch=path_or_none(scratch),
    )
    return collect(Run(progress), asked)


def evaluate(
    checkpoint: options.Checkpoint,
    text: options.Text,
    *,
    against: options.Against = None,
    sequences: options.Sequences = 128,
    length: options.Length = None,
    field: options.Field = None,
    seed: options.Seed = 0,
    special: options.Special = True,
    device: options.Device = "auto",
    memory: options.StateMemory = None,
    require: options.RequireMean = (),
    scratch: options.Place | None = None,
    progress: Listen = None,
) -> "results.Evaluation":
    """Tell what a checkpoint's model says of text, and how far it is from the dense one.

    Models that predict next tokens get a perplexity, and with --against the KL divergence to the dense model
    and the share of tokens of which both hold the same for most probable; encoders get the cosine of their
    embeddings to the dense ones. Layers are loaded one at a time. With --require the exit code is 1 where a
    mean fails. Needs transformers, which the extra `calibrate` brings.

    Example: sparseprune eval ./llama-2of4 --against ./llama --text held-out.txt --require "kl<=0.05"

    `scratch` is a folder for hidden states, by default a temporary one. Raises CheckFailedError with the
    result where a mean fails, else SparsepruneError and its subclasses.
    """
    from sparseprune.api.evaluating import Evaluating
    from sparseprune.api.evaluating import evaluate as evaluate_it

    asked = Evaluating(
        checkpoint=Path(checkpoint),
        against=path_or_none(against),
        windows=Windows([Path(one) for one in text], sequences, length, field, seed, special),
        device=device,
        memory=options.quarter_of_memory() if memory is None else options.memory_of(memory),
        requirements=require,
        scratch=path_or_none(scratch),
    )
    return evaluate_it(Run(progress), asked)


def specs(
    name: options.SpecName = None, *, checkpoint: options.CheckpointToFit = None
) -> "dict[str, results.ShippedSpec]":
    """List the specs that ship with sparseprune, or print one; with --for those that fit a checkpoint.

    Of those that fit: the share of the checkpoint that they reach, what --set may change, and what remove
    would make of it.

    Example: sparseprune specs 2of4

    By their names; of one alone if it is named, by its path where it is your own. SpecError if there is none,
    or where the one that is named does not fit.
    """
    from sparseprune.api.shipped import shipped

    return shipped(None if name is None else fspath(name), path_or_none(checkpoint))


def inspect(
    checkpoint: options.Checkpoint,
    *,
    by: options.By = "tensor",
    match: options.Match = (),
    exclude: options.Exclude = (),
    sort: options.Sort = None,
    reverse: options.Reverse = False,
    pattern: options.Pattern = (),
    block: options.Block = (),
    runtimes: options.Runtimes = None,
    require: options.Require = (),
    plot: options.Plot = None,
    tensor: options.Tensor = None,
    spec: options.SpecOfRules = None,
    set: options.Set = None,
    jobs: options.Jobs = None,
    progress: Listen = None,
) -> "results.Inspection":
    """Report how sparse a checkpoint is, where, in which patterns, and which runtimes can use it.

    With --require the exit code is 1 where a tensor fails, and stderr names each.

    Example: sparseprune inspect ./llama-2of4 --require "2:4 in **_proj.weight"

    Raises:
        CheckFailedError: a requirement does not hold; its `result` is what was found.
        CheckpointError: the checkpoint cannot be read.
        SparsepruneError: what is asked contradicts itself or has no meaning.
    """
    from sparseprune.api.measuring import Look
    from sparseprune.api.measuring import inspect as look_at

    asked = Look(
        checkpoint=Path(checkpoint),
        listing=options.Listing(match, exclude, sort, reverse),
        jobs=machine(jobs=jobs).jobs,
        by=by,
        patterns=pattern,
        blocks=block,
        runtimes=runtimes,
        requirements=require,
        plot=path_or_none(plot),
        tensor=tensor,
        spec=None if spec is None else fspath(spec),
        overrides=texts(set),
    )
    return look_at(Run(progress), asked)


def verify(
    checkpoint: options.Checkpoint,
    spec: options.SpecOrNone = None,
    *,
    masks: options.MasksOrNone = None,
    zeros_of: options.ZerosOf = None,
    match: options.Match = (),
    exclude: options.Exclude = (),
    rename: options.Rename = None,
    partial: options.Partial = False,
    set: options.Set = None,
    jobs: options.Jobs = None,
    memory: options.Memory = None,
    strict: options.Strict = False,
    progress: Listen = None,
) -> "results.Verification | results.MaskVerification":
    """Check that a checkpoint is as sparse as a spec or masks say; exit 1 where it is not.

    Against a spec: no scope has more than nnz blocks that are not zero. Against masks: every weight that a
    mask drops is zero. Broken scopes and lost zeros are counted, tensor by tensor, with the first place.

    Example: sparseprune verify ./llama-2of4 2of4

    Raises:
        CheckFailedError: it is not as sparse; its `result` is what was found.
        SpecError: the spec is wrong in itself, or does not fit the checkpoint.
        CheckpointError: the checkpoint or the masks cannot be read, or do not fit each other.
    """
    from sparseprune.api import checking
    from sparseprune.api.masked import mask_source, refuse_contradictions

    named = None if spec is None else fspath(spec)
    found = mask_source(masks, zeros_of, (match, exclude, rename), partial=partial)
    nothing = "there is nothing to check against; give a SPEC, such as 2of4, or --masks MASKS"
    refuse_contradictions(named, found, set, nothing=nothing)
    run, limits = Run(progress, strict=strict), machine(jobs=jobs, memory=memory)
    if found.path is not None:
        return checking.verify_masks(run, Path(checkpoint), found, limits)
    return checking.verify_spec(run, source(checkpoint, named or "", set), limits)


def reapply(
    checkpoint: options.Checkpoint,
    masks: options.Masks = None,
    output: options.Output = None,
    *,
    zeros_of: options.ZerosOf = None,
    match: options.Match = (),
    exclude: options.Exclude = (),
    rename: options.Rename = None,
    partial: options.Partial = False,
    jobs: options.Jobs = None,
    memory: options.Memory = None,
    mask_format: options.MaskFormatOrNone = "packed",
    strict: options.Strict = False,
    force: options.Force = False,
    progress: Listen = None,
) -> "results.Reapplication":
    """Put the zeros of masks back, after fine-tuning, merging or quantization; tell how many were lost.

    The output is CKPT-pruned beside a directory, or m.pruned.safetensors beside m.safetensors, unless
    --output says otherwise. With --zeros-of the zeros of a sparse checkpoint are the masks. Where CKPT itself
    holds masks as torch.nn.utils.prune does, giving it twice makes one weight of X_orig and X_mask.

    Example: sparseprune reapply ./llama-tuned ./llama-2of4 -o ./llama-tuned-2of4

    Raises CheckpointError where the masks do not fit the checkpoint, and MachineError as `apply` does.
    """
    from sparseprune.api import checking
    from sparseprune.api.masked import mask_source, refuse_contradictions

    source = mask_source(masks, zeros_of, (match, exclude, rename), partial=partial, flag="MASKS")
    nothing = "there are no zeros to put back; give MASKS, or --zeros-of SPARSE"
    refuse_contradictions(None, source, None, nothing=nothing)
    run, target = Run(progress, strict=strict), Target(path_or_none(output), mask_format, force)
    limits = machine(jobs=jobs, memory=memory)
    return checking.reapply(run, Path(checkpoint), source, target, limits)


def compare(
    dense: options.Dense,
    pruned: options.Pruned,
    *,
    match: options.Match = (),
    exclude: options.Exclude = (),
    sort: options.Sort = None,
    reverse: options.Reverse = False,
    require: options.Require = (),
    stats: options.Stats = None,
    plot: options.Plot = None,
    jobs: options.Jobs = None,
    progress: Listen = None,
) -> "results.Comparison":
    """Compare two checkpoints: what was zeroed, what energy is kept, which survivors were altered.

    Tensors that were added, removed or reshaped are named. With --stats it tells by how much the outputs of
    matrices change, relative to the dense ones. With --require the exit code is 1 where a tensor
    fails, and stderr names each.

    Example: sparseprune compare ./llama ./llama-2of4 --require "altered==0"

    Raises what `inspect` raises.
    """
    from sparseprune.api.measuring import Comparing
    from sparseprune.api.measuring import compare as compare_both

    asked = Comparing(
        dense=Path(dense),
        pruned=Path(pruned),
        listing=options.Listing(match, exclude, sort, reverse),
        jobs=machine(jobs=jobs).jobs,
        requirements=require,
        plot=path_or_none(plot),
        stats=path_or_none(stats),
    )
    return compare_both(Run(progress), asked)
