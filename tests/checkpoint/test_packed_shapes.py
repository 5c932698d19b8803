"""The shapes that a packed mask file tells of itself: integers from 0 on, however few bytes they come to."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparseprune.checkpoint import open_masks
from sparseprune.errors import CheckpointError


def _written(folder: Path, shape: list[int], size: int) -> Path:
    path = folder / "m.safetensors"
    metadata = {"sparseprune.mask_format": "packed", "sparseprune.shapes": json.dumps({"a": shape})}
    save_file({"a": torch.zeros(size, dtype=torch.uint8)}, path, metadata)
    return path


@pytest.mark.parametrize(
    ("shape", "size"),
    [([], 1), ([0], 0), ([1], 1), ([8], 1), ([9], 2), ([0, 5], 0), ([2**63 - 1, 0], 0), ([0, 2**63 - 1], 0)],
    ids=str,
)
def test_takes_a_shape_that_fits(tmp_path: Path, shape: list[int], size: int) -> None:
    assert open_masks(_written(tmp_path, shape, size)).masks["a"].shape == tuple(shape)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ([-1], 0),
        ([-1, 0], 0),
        ([0, -1], 0),
        ([-1, -1], 1),
        ([-1, -8], 1),
        ([2**63, 0], 0),
        ([0, 2**63], 0),
        ([2**32, 2**31], 0),
    ],
    ids=str,
)
def test_refuses_a_size_below_0_and_one_that_cannot_be_counted(
    tmp_path: Path, shape: list[int], size: int
) -> None:
    path = _written(tmp_path, shape, size)
    with pytest.raises(
        CheckpointError, match=r"packed mask 'a' has the shape .*wanted a list of integers from 0"
    ):
        open_masks(path)
