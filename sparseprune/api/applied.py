"""What was applied to a checkpoint before: its spec and report, and patterns that a further run may break.

Reads specs and reports, looks for what a killed run left, reads no tensor data; imports no torch. Called by
the modules that look at a pruned checkpoint, and by those that prune it again.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct, ValidationError, convert
from msgspec.structs import replace

from sparseprune.api.options import located
from sparseprune.checkpoint.discovery import RESULTS, SUFFIX
from sparseprune.checkpoint.documents import read_object_if_any
from sparseprune.checkpoint.publish import left_behind
from sparseprune.checkpoint.remote import RemotePath, folder_of_files
from sparseprune.errors import SparsepruneError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparseprune.api.resources import Machine
    from sparseprune.api.run import Run
    from sparseprune.checkpoint import Checkpoint, Output
    from sparseprune.execution.earlier import Earlier, Touched
    from sparseprune.execution.plan import Plan
    from sparseprune.spec import Spec, SpecSource


_VERSION = re.compile(r"^version *= *1 *$", re.MULTILINE)
_REMOVAL = "sparseprune.remove."  # how the schemas of reports begin of what was cut out


def read_spec(named: str, overrides: Mapping[str, str]) -> tuple[SpecSource, Spec]:
    """A spec by its path, its shipped name or its text, with other values for its variables."""
    from sparseprune.spec import SpecSource, find_spec, parse_spec

    is_text = _VERSION.search(named) is not None
    source = SpecSource(named, "the spec", Path.cwd()) if is_text else find_spec(_place(named))
    source = replace(source, directory=folder_of_files(source.directory))
    return source, parse_spec(source.text, source.source, source.directory, overrides)


def _place(named: str) -> str | Path:
    """An address, or the text as it is: the name of a shipped spec, or a path."""
    place = located(named)
    return place if isinstance(place, RemotePath) else named


def applied_spec(checkpoint: Checkpoint, named: str | None, overrides: Mapping[str, str]) -> Spec | None:
    """The spec that was `named`, else the one that the checkpoint was pruned by, None where it has none.

    Of the latter the variables count that were set when it was applied, unless `overrides` has others. By
    what was removed nothing can be looked at.
    """
    if named is not None:
        return with_parts(read_spec(named, overrides)[1], checkpoint)
    carried = applied_source(checkpoint)
    if carried is None:
        return None
    from sparseprune.spec import find_spec, parse_spec

    path, were_set = carried
    source = find_spec(path)
    spec = parse_spec(
        source.text, source.source, folder_of_files(source.directory), were_set | dict(overrides)
    )
    return with_parts(spec, checkpoint)


def applied_source(checkpoint: Checkpoint) -> tuple[Path, dict[str, str]] | None:
    """Where the spec lies that a checkpoint was pruned by, and the variables that were set.

    None where it carries none, or where what was pruned was removed: then nothing can be checked.
    """
    path = checkpoint.path / RESULTS / "spec.toml"
    if not checkpoint.is_directory or not path.is_file():
        return None
    report = applied_report(checkpoint) or {}
    if str(report.get("schema")).startswith(_REMOVAL):
        return None
    typed = report.get("set")
    return path, {name: str(value) for name, value in (typed if isinstance(typed, dict) else {}).items()}


def applied_name(
    checkpoint: Checkpoint, named: str | None = None, overrides: Mapping[str, str] | None = None
) -> str | None:
    """What a title calls the spec that was `named` or applied, with the variables that were set.

    A shipped one is known by its text, above which a run may have put a comment. None where there is none.
    """
    typed: Mapping[str, object] = overrides or {}
    path = checkpoint.path / RESULTS / "spec.toml"
    if named is not None:
        name = "of its own" if _VERSION.search(named) else Path(named).name
    elif checkpoint.is_directory and path.is_file():
        from sparseprune.spec import find_spec, list_specs

        text = find_spec(path).text
        name = next((one for one in list_specs() if text.endswith(find_spec(one).text)), path.name)
        were_set = (applied_report(checkpoint) or {}).get("set")
        typed = {**(were_set if isinstance(were_set, dict) else {}), **typed}
    else:
        return None
    values = ", ".join(f"{key}={value}" for key, value in typed.items())
    return f"{name} with {values}" if values else name


def with_parts(spec: Spec, checkpoint: Checkpoint) -> Spec:
    """A spec with the parts that its instances had of common budgets, where the checkpoint's report has them.

    As it is where the report has none, or they are those of another spec.
    """
    if not spec.shares:
        return spec
    try:
        rules = convert(applied_report(checkpoint) or {}, _Reported).rules
    except ValidationError:
        return spec
    parts = {rule.name: {one.instance: one.nnz for one in rule.allocation or ()} for rule in rules}
    return replace(spec, allocated={place: parts[place] for place in spec.shares if place in parts})


class _Part(Struct, frozen=True):
    instance: str
    nnz: int


class _ReportedRule(Struct, frozen=True):
    name: str
    allocation: list[_Part] | None = None


class _Reported(Struct, frozen=True):
    """What a report has of common budgets."""

    rules: list[_ReportedRule] = []


def applied_report(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """The report.json of the run that wrote the checkpoint, None where it has none."""
    return read_object_if_any(_report_path(checkpoint))


def note_left_behind(run: Run, checkpoint: Path) -> None:
    """Note it where a run to this output was killed and left its hidden folder beside it."""
    folder = left_behind(checkpoint.absolute())
    if folder is not None:
        run.note(
            f"{folder}: left by a run that was killed; the command that wrote it continues it or removes it"
        )


def rebuilt_by(plan: Plan) -> dict[str, Touched]:
    """The tensors whose survivors a plan rebuilds, which is all that brings zeros back."""
    if all(instance.reconstruct is None for _, instance in plan.bound.instances()):
        return {}
    from sparseprune.execution.earlier import rebuilt  # with numpy, which starts slowly

    return rebuilt(plan)


def warn_of_earlier(
    run: Run, checkpoint: Checkpoint, touched: Mapping[str, Touched], machine: Machine
) -> Earlier | None:
    """Before the work: warn where the work may break a pattern that tensors have.

    None where nothing is `touched`.
    """
    if not touched:
        return None
    from sparseprune.execution.earlier import earlier_of

    try:
        spec = applied_spec(checkpoint, None, {})
    except SparsepruneError:  # it was changed since
        spec = None
    earlier = earlier_of(checkpoint, touched, spec, (machine.memory, machine.jobs))
    run.warn(*earlier.may_break())
    return earlier


def warn_of_broken(run: Run, earlier: Earlier | None, output: Output) -> None:
    """After the work, before the output gets its name: which of these patterns it has no longer."""
    if earlier is None or not (earlier.risks or earlier.seen):
        return
    run.warn(*earlier.broken(output.written()))


def _report_path(checkpoint: Checkpoint) -> Path:
    if checkpoint.is_directory:
        return checkpoint.path / RESULTS / "report.json"
    return checkpoint.path.with_name(f"{checkpoint.path.name.removesuffix(SUFFIX)}.report.json")
