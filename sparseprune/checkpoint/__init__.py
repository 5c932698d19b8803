"""The bytes: headers, what a checkpoint holds, the layout of an output, writing it, mask files.

Owns the safetensors format and everything that is done to files. Knows neither specs nor the
mathematics of pruning. Called by execution and the reports; imports no torch until masks are loaded.
"""

from sparseprune.checkpoint.discovery import OtherFile
from sparseprune.checkpoint.file_io import (
    checkpoint_identity,
    refuse_changed,
    refuse_changed_shards,
    shards_identity,
)
from sparseprune.checkpoint.header import Header, TensorEntry, lay_out, read_header
from sparseprune.checkpoint.layout import (
    CopyRange,
    MaskFormat,
    OutputFile,
    OutputLayout,
    Place,
    lay_out_apply,
    lay_out_masks,
)
from sparseprune.checkpoint.masks import (
    MaskSet,
    Provenance,
    StoredMask,
    load_masks,
    open_masks,
    provenance_of,
    read_kept,
)
from sparseprune.checkpoint.output import Sink, StagedOutput
from sparseprune.checkpoint.publish import refuse_replacing
from sparseprune.checkpoint.resizing import (
    ResizedTensor,
    lay_out_choice,
    lay_out_decisions,
    lay_out_removal,
    open_choice,
)
from sparseprune.checkpoint.source import (
    Checkpoint,
    Shard,
    Source,
    StoredTensor,
    TensorReader,
    open_checkpoint,
    read_beside,
    read_config,
)
from sparseprune.checkpoint.statistics import (
    Collected,
    Statistic,
    Statistics,
    StatisticsKind,
    lay_out_statistics,
    open_statistics,
)

__all__ = [
    "Checkpoint",
    "Collected",
    "CopyRange",
    "Header",
    "MaskFormat",
    "MaskSet",
    "OtherFile",
    "OutputFile",
    "OutputLayout",
    "Place",
    "Provenance",
    "ResizedTensor",
    "Shard",
    "Sink",
    "Source",
    "StagedOutput",
    "Statistic",
    "Statistics",
    "StatisticsKind",
    "StoredMask",
    "StoredTensor",
    "TensorEntry",
    "TensorReader",
    "checkpoint_identity",
    "lay_out",
    "lay_out_apply",
    "lay_out_choice",
    "lay_out_decisions",
    "lay_out_masks",
    "lay_out_removal",
    "lay_out_statistics",
    "load_masks",
    "open_checkpoint",
    "open_choice",
    "open_masks",
    "open_statistics",
    "provenance_of",
    "read_beside",
    "read_config",
    "read_header",
    "read_kept",
    "refuse_changed",
    "refuse_changed_shards",
    "refuse_replacing",
    "shards_identity",
]
