"""What the commands do, as functions: the command line is made from their signatures and docstrings.

A function checks nothing and prints nothing: it hands on what was given to a module of this package, which it
loads when it is called. Paths may be text or pathlib's. Results are those of `sparseprune.results`.
"""

from collections.abc import Callable
from os import fspath
from typing import TYPE_CHECKING, Literal

from sparseprune.api import inputs, options
from sparseprune.api.options import Target, located, path_or_none, source, texts
from sparseprune.api.resources import machine, memory_of, quarter_of_memory
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
    on: options.On = None,
    mask_format: options.MaskFormatOrNone = "packed",
    set: options.Set = None,
    target: options.Goal = None,
    within: options.Within = None,
    reconstruct: options.Reconstruct = None,
    stats: options.StatsToRebuild = None,
    text: options.TextToSweep = (),
    sequences: options.Sequences = 128,
    length: options.Length = None,
    field: options.Field = None,
    seed: options.Seed = 0,
    special: options.Special = True,
    gradients: options.GradientsFirst = False,
    tune: options.Tune = None,
    scratch: options.Place | None = None,
    strict: options.Strict = False,
    force: options.Force = False,
    progress: Listen = None,
) -> "results.Report":
    """Prune a checkpoint: set weights to zero, write masks and a report.

    SPEC decides which weights become zero. All other weights keep their bytes, unless --reconstruct, --stats
    or --text adjust them to keep the outputs of the layers. Shapes and files stay as they are: `remove` makes
    a smaller model.

    Without --output, the result is written to CKPT-pruned beside a directory, or to m.pruned.safetensors
    beside m.safetensors. The command prints the path of the output on stdout and messages on stderr.

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
    windows = Windows([located(one) for one in text], sequences, length, field, seed, special)
    read = AskedText(windows, gradients, tune, path_or_none(scratch))
    place, given = inputs.found(run, checkpoint), inputs.found_if_any(run, stats)
    asked = source(
        place, spec, set, target, (reconstruct, given), read, within=inputs.found_if_any(run, within)
    )
    with run.on(on, jobs, text=bool(text)) as threads:
        return prune(run, prepare(asked, goes, machine(device, threads, memory, sweeps=bool(text)), run))


def mask(
    checkpoint: options.Checkpoint,
    spec: options.Spec,
    output: options.Output = None,
    *,
    device: options.Device = "auto",
    jobs: options.Jobs = None,
    memory: options.Memory = None,
    on: options.On = None,
    mask_format: options.MaskFormat = "packed",
    set: options.Set = None,
    target: options.Goal = None,
    within: options.Within = None,
    reconstruct: options.Reconstruct = None,
    stats: options.StatsToRebuild = None,
    strict: options.Strict = False,
    force: options.Force = False,
    progress: Listen = None,
) -> "results.Report":
    """Write only the masks of a spec, and a report, but no weights.

    A mask has the name and shape of its weight and is true where the weight is kept. Without --output, the
    masks are written to CKPT-masks beside a directory, or to m.masks.safetensors beside m.safetensors.

    Example: sparseprune mask ./llama 2of4 --mask-format bool

    Raises what `apply` raises.
    """
    from sparseprune.api.pruning import prepare, prune

    run = Run(progress, strict=strict)
    goes = Target(path_or_none(output), mask_format, force, weights=False)
    place, given = inputs.found(run, checkpoint), inputs.found_if_any(run, stats)
    asked = source(place, spec, set, target, (reconstruct, given), within=inputs.found_if_any(run, within))
    with run.on(on, jobs) as threads:
        return prune(run, prepare(asked, goes, machine(device, threads, memory)))


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
    within: options.Within = None,
    reconstruct: options.Reconstruct = None,
    stats: options.StatsToRebuild = None,
    text: options.TextToSweep = (),
    sequences: options.Sequences = 128,
    length: options.Length = None,
    field: options.Field = None,
    seed: options.Seed = 0,
    special: options.Special = True,
    gradients: options.GradientsFirst = False,
    tune: options.Tune = None,
    strict: options.Strict = False,
    allocation: options.Allocation = False,
    device: options.Device = "auto",
    as_model: str | None = None,
    command: Literal["apply", "mask", "remove"] = "apply",
    look: "Callable[[Plan], None] | None" = None,
    progress: Listen = None,
) -> "results.Plan":
    """Show what a spec would prune, without reading any weights.

    The command shows, for each rule, the tensors, views, block grids and scopes, and how many blocks stay. It
    then shows the tensors that no rule reaches, and the size of the output. Only --allocation reads weights.

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
    windows = Windows([located(one) for one in text], sequences, length, field, seed, special)
    read = AskedText(windows, gradients, tune)
    place, given = inputs.found(run, checkpoint), inputs.found_if_any(run, stats)
    asked = source(
        place, spec, set, target, (reconstruct, given), read, within=inputs.found_if_any(run, within)
    )
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
    on: options.On = None,
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
    tune: options.Tune = None,
    scratch: options.Place | None = None,
    strict: options.Strict = False,
    force: options.Force = False,
    dry_run: bool = False,
    progress: Listen = None,
) -> "results.Removal":
    """Write a smaller model without the pruned channels, heads or layers.

    The command removes what SPEC, masks or a list prune from every tensor, experts included, and rewrites
    config.json. The model's own class loads the result, which computes the same as the checkpoint with zeros.
    Without --output, the result is written to CKPT-smaller beside the directory.

    Example: sparseprune remove ./llama mlp-channels -o ./llama-smaller

    `experts` and `vocabulary` may be the list itself. A `dry_run`, which goes with a list, tells what would
    be left and writes nothing. Raises what `apply` raises, and SpecError or CheckpointError where no class of
    a model has what would be left.
    """
    from sparseprune.api.masked import mask_source
    from sparseprune.api.removing import Asked
    from sparseprune.api.removing import remove as cut_out

    run = Run(progress, strict=strict)
    windows = Windows([located(one) for one in text], sequences, length, field, seed, special)
    read = AskedText(windows, gradients, tune, path_or_none(scratch))
    lists: dict[str, object] = {"--experts": experts, "--vocabulary": vocabulary}
    with run.on(on, jobs, text=bool(text)) as threads:
        asked = Asked(
            checkpoint=inputs.found(run, checkpoint),
            spec=None if spec is None else fspath(spec),
            source=mask_source(run, (masks, zeros_of), (match, exclude, rename), partial=partial),
            lists={name: each for name, each in lists.items() if each is not None},
            dry_run=dry_run,
            overrides=texts(set),
            goal=target,
            rebuilding=(reconstruct, inputs.found_if_any(run, stats)),
            text=read,
            target=Target(path_or_none(output), None, force, resized=True, model_type=as_model),
            machine=machine(device, threads, memory, sweeps=bool(text)),
        )
        return cut_out(run, asked)


def calibrate(
    checkpoint: options.Checkpoint,
    text: options.Text,
    output: options.Output = None,
    *,
    kind: options.Kind = "hessian",
    gradients: options.Gradients = False,
    sequences: options.Sequences = 128,
    length: options.Length = None,
    field: options.Field = None,
    seed: options.Seed = 0,
    special: options.Special = True,
    device: options.Device = "auto",
    memory: options.MomentMemory = None,
    on: options.On = None,
    force: options.Force = False,
    scratch: options.Place | None = None,
    progress: Listen = None,
) -> "results.Statistics":
    """Run text through the model and save statistics of layer inputs.

    The statistics are the second moment of each layer's input activations. `apply --stats`, [reconstruct],
    and the scores wanda and obd read them. Without --output, they are written to CKPT-stats beside the
    directory. The same command continues an interrupted run. The command needs transformers, which the extra
    `calibrate` installs.

    Example: sparseprune calibrate ./llama --text corpus.txt -o stats

    A moment has the shape (inputs, inputs), or (experts, inputs, inputs). `scratch` is a folder for what the
    model is loaded from, by default a temporary one. Raises SparsepruneError and its subclasses.
    """
    from sparseprune.api.calibrating import Collecting
    from sparseprune.api.calibrating import calibrate as collect

    run = Run(progress)
    asked = Collecting(
        checkpoint=inputs.found(run, checkpoint),
        windows=Windows([located(one) for one in text], sequences, length, field, seed, special),
        output=path_or_none(output),
        kind=kind,
        gradients=gradients,
        device=device,
        memory=quarter_of_memory() if memory is None else memory_of(memory),
        force=force,
        scratch=path_or_none(scratch),
    )
    with run.on(on, None):
        return collect(run, asked)


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
    """Measure perplexity on text, and the distance to the dense model.

    For language models the command reports the perplexity and, with --against, the KL divergence to the dense
    model and how often both models predict the same token. For encoders it reports the cosine similarity of
    their embeddings to those of the dense model. It loads one layer at a time. It exits with 1 if a --require
    condition fails. The command needs transformers, which the extra `calibrate` installs.

    Example: sparseprune eval ./llama-2of4 --against ./llama --text held-out.txt --require "kl<=0.05"

    `scratch` is a folder for hidden states, by default a temporary one. Raises CheckFailedError with the
    result where a mean fails, else SparsepruneError and its subclasses.
    """
    from sparseprune.api.evaluating import Evaluating
    from sparseprune.api.evaluating import evaluate as evaluate_it

    run = Run(progress)
    asked = Evaluating(
        checkpoint=inputs.found(run, checkpoint),
        against=inputs.found_if_any(run, against),
        windows=Windows([located(one) for one in text], sequences, length, field, seed, special),
        device=device,
        memory=quarter_of_memory() if memory is None else memory_of(memory),
        requirements=require,
        scratch=path_or_none(scratch),
    )
    return evaluate_it(run, asked)


def specs(
    name: options.SpecName = None, *, checkpoint: options.CheckpointToFit = None
) -> "dict[str, results.ShippedSpec]":
    """List the shipped specs, print one, or find those that fit a model.

    With --for, the command lists the specs that fit a checkpoint: the share of its weights that each of them
    reaches, the variables for --set, and what `remove` would leave.

    Example: sparseprune specs 2of4

    By their names; of one alone if it is named, by its path where it is your own. SpecError if there is none,
    or where the one that is named does not fit.
    """
    from sparseprune.api.shipped import shipped

    return shipped(None if name is None else fspath(name), inputs.found_if_any(Run(None), checkpoint))


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
    window: options.Window = None,
    spec: options.SpecOfRules = None,
    set: options.Set = None,
    jobs: options.Jobs = None,
    memory: options.Memory = None,
    on: options.On = None,
    progress: Listen = None,
) -> "results.Inspection":
    """Report sparsity, zero patterns, and which runtimes can use them.

    The command reads all weights and shows, for each tensor, its zeros and the patterns that they form. It
    exits with 1 if a --require condition fails, and names each tensor that fails.

    Example: sparseprune inspect ./llama-2of4 --require "2:4 in **_proj.weight"

    Raises:
        CheckFailedError: a requirement does not hold; its `result` is what was found.
        CheckpointError: the checkpoint cannot be read.
        SparsepruneError: what is asked contradicts itself or has no meaning.
    """
    from sparseprune.api.measuring import Look
    from sparseprune.api.measuring import inspect as look_at

    run = Run(progress)
    with run.on(on, jobs) as threads:
        asked = Look(
            checkpoint=inputs.found(run, checkpoint),
            listing=options.Listing(match, exclude, sort, reverse),
            machine=machine(jobs=threads, memory=memory),
            by=by,
            patterns=pattern,
            blocks=block,
            runtimes=runtimes,
            requirements=require,
            plot=path_or_none(plot),
            tensor=tensor,
            window=window,
            spec=None if spec is None else fspath(spec),
            overrides=texts(set),
        )
        return look_at(run, asked)


def verify(
    checkpoint: options.Checkpoint,
    spec: options.SpecToCheck = None,
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
    on: options.On = None,
    strict: options.Strict = False,
    progress: Listen = None,
) -> "results.Verification | results.MaskVerification":
    """Check that a checkpoint is as sparse as its spec or masks say.

    With a spec, no scope may have more than nnz nonzero blocks. With masks, every weight that a mask drops
    must be zero. Without either, the command uses the spec and variables that the checkpoint was pruned by,
    from its folder sparseprune/. It exits with 1 if the check fails, and shows for each tensor the broken
    scopes or lost zeros and where the first one is.

    Example: sparseprune verify ./llama-2of4 2of4

    Raises:
        CheckFailedError: it is not as sparse; its `result` is what was found.
        SpecError: the spec is wrong in itself, or does not fit the checkpoint.
        CheckpointError: the checkpoint or the masks cannot be read, or do not fit each other.
    """
    from sparseprune.api import checking
    from sparseprune.api.masked import mask_source, refuse_contradictions

    named, variables = None if spec is None else fspath(spec), texts(set)
    run = Run(progress, strict=strict)
    found = mask_source(run, (masks, zeros_of), (match, exclude, rename), partial=partial)
    place = inputs.found(run, checkpoint)
    if named is not None:
        checking.refuse_checkpoint(named)
    elif found.path is None:
        named, variables = checking.carried_spec(run, place, variables)
    refuse_contradictions(named, found, variables, nothing=None)
    with run.on(on, jobs) as threads:
        limits = machine(jobs=threads, memory=memory)
        if found.path is not None:
            return checking.verify_masks(run, place, found, limits)
        return checking.verify_spec(run, source(place, named or "", variables), limits)


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
    on: options.On = None,
    mask_format: options.MaskFormatOrNone = "packed",
    strict: options.Strict = False,
    force: options.Force = False,
    progress: Listen = None,
) -> "results.Reapplication":
    """Put zeros back after fine-tuning, merging or quantization.

    The command sets every weight that MASKS drop to zero again and reports how many of them were not zero.
    --zeros-of uses the zeros of a sparse checkpoint as masks. If CKPT itself holds masks from
    torch.nn.utils.prune, give it twice: X_orig and X_mask become one weight.

    Without --output, the result is written to CKPT-pruned beside a directory, or to m.pruned.safetensors
    beside m.safetensors.

    Example: sparseprune reapply ./llama-tuned ./llama-2of4 -o ./llama-tuned-2of4

    Raises CheckpointError where the masks do not fit the checkpoint, and MachineError as `apply` does.
    """
    from sparseprune.api import checking
    from sparseprune.api.masked import mask_source, refuse_contradictions

    run, target = Run(progress, strict=strict), Target(path_or_none(output), mask_format, force)
    source = mask_source(run, (masks, zeros_of), (match, exclude, rename), partial=partial, flag="MASKS")
    nothing = "there are no zeros to put back; give MASKS, or --zeros-of SPARSE"
    refuse_contradictions(None, source, None, nothing=nothing)
    with run.on(on, jobs) as threads:
        limits = machine(jobs=threads, memory=memory)
        return checking.reapply(run, inputs.found(run, checkpoint), source, target, limits)


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
    memory: options.Memory = None,
    on: options.On = None,
    progress: Listen = None,
) -> "results.Comparison":
    """Compare two checkpoints: new zeros, kept energy, changed weights.

    The command shows each tensor that differs, and names tensors that were added, removed or reshaped. With
    --stats, it also reports by how much the outputs of each layer change. It exits with 1 if a --require
    condition fails, and names each tensor that fails.

    Example: sparseprune compare ./llama ./llama-2of4 --require "altered==0"

    Raises what `inspect` raises.
    """
    from sparseprune.api.measuring import Comparing
    from sparseprune.api.measuring import compare as compare_both

    run = Run(progress)
    with run.on(on, jobs) as threads:
        asked = Comparing(
            dense=inputs.found(run, dense),
            pruned=inputs.found(run, pruned),
            listing=options.Listing(match, exclude, sort, reverse),
            machine=machine(jobs=threads, memory=memory),
            requirements=require,
            plot=path_or_none(plot),
            stats=inputs.found_if_any(run, stats),
        )
        return compare_both(run, asked)
