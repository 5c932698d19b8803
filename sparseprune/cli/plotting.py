"""`inspect --plot`: what the picture needs besides the document, which is the spec and a second look.

Finds the spec that was named or applied, counts survivors by it, or looks at one tensor from close up.
Draws nothing itself. Called by inspect.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from sparseprune.checkpoint import TensorReader, read_config
from sparseprune.cli.applied import applied_spec
from sparseprune.cli.console import tell
from sparseprune.cli.options import default_memory
from sparseprune.cli.progress import progress
from sparseprune.errors import SparsepruneError, printable
from sparseprune.spec import TensorInfo, bind
from sparseprune.spec.problems import suggestion

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sparseprune.checkpoint import Checkpoint
    from sparseprune.cli.inspect import InspectRequest
    from sparseprune.report.pictures.charts import Survivors
    from sparseprune.results import Inspection
    from sparseprune.spec import BoundSpec, Spec

Found = TypeVar("Found")


def check_tensor(checkpoint: Checkpoint, name: str) -> None:
    """SparsepruneError, with the nearest name, for a tensor that is not there."""
    if name not in checkpoint.tensors:
        hint = suggestion(name, checkpoint.tensors)
        raise SparsepruneError(f"--tensor {printable(name)}: {checkpoint.path} has no such tensor{hint}")


def plot_inspect(request: InspectRequest, checkpoint: Checkpoint, document: Inspection, path: Path) -> None:
    """Write the picture that `request` asks for to `path`, and tell that on stderr.

    By a spec that was named it is drawn or fails. One that only lies beside the weights may be unable to be
    bound, as where tensors were renamed since: then the picture does without, and stderr says so.
    """
    if request.tensor is None:
        from sparseprune.report.pictures import plot_inspection

        plot_inspection(document, path, _by_spec(request, checkpoint, _survivors))
    else:
        _plot_close_up(request, checkpoint, request.tensor, path)
    if not request.quiet:
        tell(f"wrote {path}")


def _plot_close_up(request: InspectRequest, checkpoint: Checkpoint, name: str, path: Path) -> None:
    from sparseprune.report.pictures import close_up, plot_mask

    bound = _by_spec(request, checkpoint, _bound)
    with TensorReader() as reader:
        plot_mask(close_up(checkpoint.tensors[name], reader, bound), path)


def _by_spec(
    request: InspectRequest, checkpoint: Checkpoint, look: Callable[[InspectRequest, Checkpoint, Spec], Found]
) -> Found | None:
    """What is found by the spec that was named or applied; None where there is none that can be used."""
    if request.spec is not None:
        spec = applied_spec(checkpoint, request.spec, request.overrides)
        return None if spec is None else look(request, checkpoint, spec)
    try:
        spec = applied_spec(checkpoint, None, request.overrides)
        return None if spec is None else look(request, checkpoint, spec)
    except SparsepruneError as error:
        if request.overrides or error.exit_code != SparsepruneError.exit_code:
            raise
        first = str(error).splitlines()[0]
        tell(f"drawn without the spec that lies beside the weights: {first}")
        return None


def _bound(request: InspectRequest, checkpoint: Checkpoint, spec: Spec) -> BoundSpec:  # noqa: ARG001
    tensors = [TensorInfo(one.name, one.dtype, one.shape) for one in checkpoint.tensors.values()]
    return bind(spec, tensors, read_config(checkpoint))


def _survivors(request: InspectRequest, checkpoint: Checkpoint, spec: Spec) -> list[Survivors]:
    """For each rule that says how many blocks survive, how many do."""
    from sparseprune.execution.verifying import count_survivors, make_check
    from sparseprune.report.pictures.charts import Survivors

    check = make_check(checkpoint, spec, default_memory(), request.jobs)
    with TensorReader() as reader, progress("counting", check.nbytes, quiet=request.quiet) as advance:
        found = count_survivors(check, reader, advance)
    return [
        Survivors(rule.name, rule.nnz, sorted(rule.survivors.items()))
        for rule in found.rules
        if rule.survivors
    ]
