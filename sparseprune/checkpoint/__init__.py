"""The bytes: headers, what a checkpoint holds, the layout of an output, writing it, mask files.

Owns the safetensors format and everything that is done to files. Knows neither specs nor the
mathematics of pruning. Called by execution and the reports; imports no torch until masks are loaded.
"""

from sparseprune.checkpoint.discovery import OtherFile
from sparseprune.checkpoint.file_io import refuse_changed_shards
from sparseprune.checkpoint.header import lay_out
from sparseprune.checkpoint.layout import (
    CopyRange,
    MaskFormat,
    OutputLayout,
    Place,
    lay_out_apply,
    lay_out_masks,
)
from sparseprune.checkpoint.masks import MaskSet, Provenance, StoredMask, load_masks, open_masks, read_kept
from sparseprune.checkpoint.output import Output, Sink, StagedOutput, make_output
from sparseprune.checkpoint.portions import Portion
from sparseprune.checkpoint.resizing import ResizedTensor
from sparseprune.checkpoint.source import (
    Checkpoint,
    Shard,
    Source,
    StoredTensor,
    TensorReader,
    open_checkpoint,
    read_config,
)
from sparseprune.checkpoint.statistics import (
    Collected,
    Statistic,
    Statistics,
    StatisticsKind,
    open_statistics,
)

__all__ = [
    "Checkpoint",
    "Collected",
    "CopyRange",
    "MaskFormat",
    "MaskSet",
    "OtherFile",
    "Output",
    "OutputLayout",
    "Place",
    "Portion",
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
    "TensorReader",
    "lay_out",
    "lay_out_apply",
    "lay_out_masks",
    "load_masks",
    "make_output",
    "open_checkpoint",
    "open_masks",
    "open_statistics",
    "read_config",
    "read_kept",
    "refuse_changed_shards",
]
