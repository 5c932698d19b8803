"""Where masks come from: the report and the spec that the run which wrote them left beside them.

Owns what counts as a report of ours, and which of it outlives the run. Judges neither. Called by the
command line for whoever matches masks with weights, or writes a checkpoint by them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sparseprune.checkpoint.folder import LARGEST_DOCUMENT, read_object
from sparseprune.checkpoint.masks import REPORT
from sparseprune.checkpoint.transfer import machine_errors
from sparseprune.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sparseprune.checkpoint.masks import MaskSet

_SCHEMA = "sparseprune."
_SPEC = "spec.toml"


@dataclass(frozen=True, slots=True)
class Provenance:
    """The run that wrote masks: its report, the tensors that this lists, variables that were set, the spec.

    `spec` is the text of its spec.toml, None where it left none.
    """

    report: Path
    tensors: frozenset[str]
    overrides: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    spec: bytes | None = None


def provenance_of(masks: MaskSet) -> Provenance | None:
    """What lies beside masks; None where no run of sparseprune left a report there.

    CheckpointError for a report that is no JSON, MachineError for what cannot be read.
    """
    path = next((report for report in masks.beside if report.is_file()), None)
    report = None if path is None else read_object(path)
    names = None if report is None else _names(report)
    if path is None or report is None or names is None:
        return None
    were_set = report.get("set")
    return Provenance(
        report=path,
        tensors=names,
        overrides=MappingProxyType(
            {name: str(value) for name, value in (were_set if isinstance(were_set, dict) else {}).items()}
        ),
        spec=_spec_beside(path),
    )


def _names(report: Mapping[str, Any]) -> frozenset[str] | None:
    """The tensors that a report lists; None where it is not ours, or not whole."""
    tensors = report.get("tensors")
    if not str(report.get("schema", "")).startswith(_SCHEMA) or not isinstance(tensors, list):
        return None
    names = [tensor.get("name") if isinstance(tensor, dict) else None for tensor in tensors]
    listed = frozenset(name for name in names if isinstance(name, str))
    return listed if len(listed) == len(tensors) else None


def _spec_beside(report: Path) -> bytes | None:
    """The spec of a report in a folder of its own; beside a file none is written."""
    spec = report.with_name(_SPEC)
    if report.name != REPORT or not spec.is_file():
        return None
    with machine_errors(spec, "cannot be read"):
        if spec.stat().st_size > LARGEST_DOCUMENT:
            raise CheckpointError(f"{spec}: larger than {LARGEST_DOCUMENT} bytes; wanted a page of TOML")
        return spec.read_bytes()
