"""Slices: what masks keep of every dimension, as plain loops over their elements find it."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

from sparseprune.checkpoint import MaskFormat, TensorReader, open_masks
from sparseprune.checkpoint.layout import FORMAT_KEY, SHAPES_KEY
from sparseprune.execution.regions import Limits
from sparseprune.removal.slices import KeptIndices, kept_slices, kept_whole, read_slices, summed_up

Shape = tuple[int, ...]
Masks = dict[str, torch.Tensor]

SHAPES = [(), (1,), (7,), (3, 5), (5, 1), (1, 1, 4), (2, 3, 3), (3, 2, 2, 5), (0,), (2, 0, 3)]


def indices_kept(mask: torch.Tensor) -> list[list[bool]]:
    """For each dimension, whether anything is kept at each index."""
    found = [[False] * size for size in mask.shape]
    for place in product(*map(range, mask.shape)):
        if mask[place]:
            for dim, index in enumerate(place):
                found[dim][index] = True
    return found


def is_made_of_slices(mask: torch.Tensor) -> bool:
    """Whether every element is kept whose index is kept along every dimension."""
    kept = indices_kept(mask)
    return all(
        bool(mask[place]) == all(kept[dim][index] for dim, index in enumerate(place))
        for place in product(*map(range, mask.shape))
        if mask.shape
    )


def write_masks(path: Path, masks: Masks, mask_format: MaskFormat) -> Path:
    """A mask file, in either form."""
    flags = {name: mask.numpy() for name, mask in masks.items()}
    metadata: dict[str, str] = {FORMAT_KEY: mask_format}
    if mask_format == "packed":
        metadata[SHAPES_KEY] = json.dumps({name: mask.shape for name, mask in flags.items()})
        flags = {name: np.packbits(mask.reshape(-1), bitorder="little") for name, mask in flags.items()}
    save_file(flags, path, metadata)
    return path


def read(path: Path, slab: int, workers: int) -> tuple[dict[str, KeptIndices], int]:
    """What the masks of a file keep, and the bytes that progress was told of."""
    told: Counter[str] = Counter()
    with TensorReader() as reader:
        masks = list(open_masks(path).masks.values())
        kept = read_slices(
            masks, reader, Limits(1 << 30, slab), workers, lambda nbytes, name: told.update({name: nbytes})
        )
        assert told == {mask.name: mask.stored.nbytes for mask in masks if mask.numel}
    return kept, sum(told.values())


def check_kept(kept: KeptIndices, mask: torch.Tensor) -> None:
    indices = indices_kept(mask)
    assert [flags.tolist() for flags in kept.along] == indices
    assert all(flags.dtype == np.bool_ for flags in kept.along)
    assert kept.elements == int(mask.sum())
    assert kept.shape == tuple(sum(flags) for flags in indices)
    assert kept.cut == tuple(dim for dim, flags in enumerate(indices) if not all(flags))
    assert kept.is_empty == (not mask.any())
    assert kept.is_whole == bool(mask.all())
    assert kept.is_sliced == is_made_of_slices(mask)


def sliced_mask(shape: Shape, random: Random) -> torch.Tensor:
    """A mask made of whole slices, of a few dimensions."""
    mask = torch.ones(shape, dtype=torch.bool)
    for dim, size in enumerate(shape):
        if random.random() < 0.6:
            flags = torch.tensor([random.random() < 0.6 for _ in range(size)], dtype=torch.bool)
            mask = mask & flags.reshape([-1 if other == dim else 1 for other in range(len(shape))])
    return mask


def any_mask(shape: Shape, random: Random) -> torch.Tensor:
    kind = random.choice(["slices", "slices", "one more", "one less", "elements", "all", "none"])
    if kind in ("all", "none"):
        return torch.full(shape, kind == "all")
    share = random.choice([0.1, 0.5, 0.9])
    mask = sliced_mask(shape, random)
    if kind == "elements":
        mask = torch.tensor([random.random() < share for _ in range(mask.numel())]).bool().reshape(shape)
    if kind.startswith("one") and mask.numel():
        mask.view(-1)[random.randrange(mask.numel())] = kind == "one more"
    return mask


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mask_format=st.sampled_from(["bool", "packed"]),
    slab=st.one_of(st.integers(1, 9), st.sampled_from([16, 60, 1 << 20])),
    workers=st.integers(1, 3),
    seed=st.integers(0, 1 << 32),
)
def test_masks_keep_what_loops_over_their_elements_find(
    mask_format: MaskFormat, slab: int, workers: int, seed: int, tmp_path: Path
) -> None:
    random = Random(seed)
    masks = {
        f"{number}.{many}": any_mask(shape, random)
        for number, shape in enumerate(SHAPES)
        for many in range(3)
    }
    path = write_masks(tmp_path / "masks.safetensors", masks, mask_format)
    kept, nbytes = read(path, slab, workers)
    assert list(kept) == [name for name in open_masks(path).masks if masks[name].numel()]
    for name, each in kept.items():
        check_kept(each, masks[name])
    assert nbytes == sum(
        mask.numel() if mask_format == "bool" else -(-mask.numel() // 8) for mask in masks.values()
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_kept_whole_is_whole(shape: Shape) -> None:
    kept = kept_whole(shape)
    assert (kept.shape, kept.cut, kept.elements) == (shape, (), math.prod(shape))
    assert kept.is_whole
    assert kept.is_sliced
    assert kept.is_empty == (0 in shape)


FLAGS: dict[str, tuple[list[str], Shape, tuple[int, ...], bool, bool]] = {
    # flags of each dimension -> the shape that is left, dimensions in which something goes, empty, whole
    "one row less": (["101", "11"], (2, 2), (0,), False, False),
    "one column less": (["111", "01"], (3, 1), (1,), False, False),
    "a row and a column less": (["110", "10"], (2, 1), (0, 1), False, False),
    "no row": (["000", "11"], (0, 2), (0,), True, False),
    "nothing along a dimension of three": (["1", "11", "00"], (1, 2, 0), (2,), True, False),
    "all": (["11", "1"], (2, 1), (), False, True),
    "a vector": (["0110"], (2,), (0,), False, False),
}


@pytest.mark.parametrize("case", FLAGS)
def test_slices_keep_all_elements_where_they_meet(case: str) -> None:
    flags, shape, cut, empty, whole = FLAGS[case]
    kept = kept_slices([flags_of(each) for each in flags])
    assert (kept.shape, kept.cut, kept.elements) == (shape, cut, math.prod(shape))
    assert (kept.is_empty, kept.is_whole, kept.is_sliced) == (empty, whole, True)


def flags_of(text: str) -> NDArray[np.bool_]:
    return np.array([each == "1" for each in text])


def test_a_number_without_dimensions_is_kept_or_not() -> None:
    kept, dropped = KeptIndices((), 1), KeptIndices((), 0)
    assert (kept.shape, kept.is_whole, kept.is_empty, kept.is_sliced) == ((), True, False, True)
    assert (dropped.shape, dropped.is_whole, dropped.is_empty, dropped.is_sliced) == ((), False, True, True)


def test_a_text_tells_apart_what_survives() -> None:
    """Of each other these differ in one flag, one element, one name, or in their order."""
    different: list[Mapping[str, KeptIndices]] = [
        {"a": kept_slices([flags_of("1011"), flags_of("11")])},
        {"a": kept_slices([flags_of("1101"), flags_of("11")])},
        {"a": kept_slices([flags_of("1011"), flags_of("10")])},
        {"a": KeptIndices((flags_of("1011"), flags_of("11")), 5)},
        {"b": kept_slices([flags_of("1011"), flags_of("11")])},
        {"a": kept_whole((1,)), "b": kept_whole((1,))},
        {"b": kept_whole((1,)), "a": kept_whole((1,))},
        {},
    ]
    texts = [summed_up(kept) for kept in different]
    assert len(set(texts)) == len(texts)
    assert summed_up({"a": kept_slices([flags_of("1011"), flags_of("11")])}) == texts[0]
