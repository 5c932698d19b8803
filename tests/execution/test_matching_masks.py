"""Matching: which mask is for which tensor, what is missing, and how all of it is told at once."""

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import pytest

from sparseprune.checkpoint import Provenance, lay_out, open_checkpoint, open_masks
from sparseprune.checkpoint.masks import MaskSet
from sparseprune.errors import CheckpointError
from sparseprune.execution.reapply import Matched, match_masks

Shapes = dict[str, tuple[int, ...]]
REPORT = Path("masks/report.json")
WANTED = (
    "give the masks of this checkpoint, --rename OLD=NEW where only names differ, or --partial to ignore "
    "what has no counterpart"
)


def write(path: Path, shapes: Shapes, dtype: str) -> Path:
    header = lay_out([(name, dtype, shape) for name, shape in shapes.items()], {})
    path.write_bytes(header.raw.ljust(header.file_size, b"\0"))
    return path


def match(
    folder: Path,
    tensors: Shapes,
    masks: Shapes,
    *,
    listed: set[str] | None = None,
    missing: Mapping[str, PurePosixPath] | None = None,
    whole: Iterable[str] = (),
    chosen: Iterable[str] | None = None,
    partial: bool = False,
    dtype: str = "F32",
) -> Matched:
    """The match of a checkpoint and masks of these shapes; `listed` by a report of ours, if there is one."""
    checkpoint = open_checkpoint(write(folder / "c.safetensors", tensors, dtype))
    opened = open_masks(write(folder / "m.safetensors", masks, "BOOL"))
    opened = MaskSet(Path("masks"), opened.shards, opened.masks, missing or {}, frozenset(whole))
    origin = None if listed is None else Provenance(REPORT, frozenset(listed))
    return match_masks(
        checkpoint, opened, origin, partial=partial, chosen=None if chosen is None else [*chosen]
    )


def lines_of(folder: Path, *arguments: Shapes, **keywords: object) -> list[str]:
    with pytest.raises(CheckpointError) as raised:
        match(folder, *arguments, **keywords)  # type: ignore[arg-type]
    return str(raised.value).replace(str(folder), "").splitlines()


def layers(count: int, *names: str, before: str = "") -> Shapes:
    return {f"{before}{layer}.{name}": (2, 4) for layer in range(count) for name in names}


def test_tensors_get_their_masks_in_the_order_of_the_checkpoint(tmp_path: Path) -> None:
    tensors = layers(2, "q", "k") | {"norm": (4,)}
    matched = match(tmp_path, tensors, dict(reversed(layers(2, "k", "q").items())))
    assert [pair.stored.name for pair in matched.pairs] == ["0.q", "0.k", "1.q", "1.k"]
    assert [pair.mask.name for pair in matched.pairs] == ["0.q", "0.k", "1.q", "1.k"]
    assert (matched.unused, matched.unmasked, matched.nbytes) == ((), (), 4 * 32)


def test_masks_without_a_tensor_are_one_line_with_the_nearest_name_of_the_first(tmp_path: Path) -> None:
    tensors = layers(2, "q", "k", before="model.layers.")
    masks: Shapes = {"model.layers.1.q": (2, 4), "layers.0.q": (2, 4), "model.layers.0.kk": (2, 4)}
    assert lines_of(tmp_path, tensors, {**masks, "else": (1,)}, listed=set()) == [
        (
            "masks: 3 of 4 masks are for no tensor of /c.safetensors, such as 'layers.0.q'; the nearest name "
            f"is 'model.layers.0.q'; {WANTED}"
        )
    ]
    del masks["layers.0.q"]
    assert lines_of(tmp_path, tensors, masks, listed=set()) == [
        (
            "masks: mask 'model.layers.0.kk' is for no tensor of /c.safetensors; the nearest name is "
            f"'model.layers.0.k'; {WANTED}"
        )
    ]


def test_of_longer_names_the_longest_is_the_nearest(tmp_path: Path) -> None:
    (line,) = lines_of(tmp_path, {"w": (2,), "0.w": (2,), "k": (2,)}, {"model.0.w": (2,), "k": (2,)})
    assert line.endswith(f"the nearest name is '0.w'; {WANTED}")


def test_masks_of_another_model_are_one_line(tmp_path: Path) -> None:
    for partial in (False, True):
        (line,) = lines_of(tmp_path, layers(12, "q"), layers(12, "q", before="model."), partial=partial)
        assert line.startswith(
            "masks: none of its 12 masks is for a tensor of /c.safetensors, such as 'model.0.q'; the nearest"
        )


def test_names_stand_on_one_line_and_literally(tmp_path: Path) -> None:
    (line,) = lines_of(tmp_path, {"w": (2,)}, {"w": (2,), "[red]\n": (2,)})
    assert line == rf"masks: mask '[red]\n' is for no tensor of /c.safetensors; {WANTED}"


def test_a_tensor_that_the_report_lists_must_have_a_mask(tmp_path: Path) -> None:
    tensors = layers(2, "q", "k")
    assert lines_of(tmp_path, tensors, {"0.q": (2, 4)}, listed={"1.k", "0.q", "gone"}) == [
        "/c.safetensors: 2 tensors have no mask, such as '1.k', but masks/report.json lists it; " + WANTED
    ]


def test_a_tensor_that_the_report_does_not_list_needs_none_whatever_others_have(tmp_path: Path) -> None:
    assert len(match(tmp_path, layers(3, "q"), {"0.q": (2, 4)}, listed={"0.q"}).pairs) == 1


def test_masks_of_other_shapes_are_one_line(tmp_path: Path) -> None:
    (line,) = lines_of(tmp_path, layers(3, "q"), {f"{n}.q": (4, 4) for n in range(3)})
    assert line.startswith(
        "masks: 3 of 3 masks have other shapes than their tensors in /c.safetensors, such as [4, 4] for "
        "[2, 4] of '0.q'; give the masks of this checkpoint"
    )


def test_without_a_report_a_tensor_needs_a_mask_if_its_like_in_another_layer_has_one(tmp_path: Path) -> None:
    tensors = layers(2, "q", "k") | {"norm": (4,), "1.q.bias": (4,)}
    assert lines_of(tmp_path, tensors, {"0.q": (2, 4), "norm": (4,)}) == [
        f"/c.safetensors: tensor '1.q' has no mask, but '0.q' has one; {WANTED}"
    ]


@pytest.mark.parametrize("name", ["x1.q", "1.k", "1.q.extra", "1"])
def test_names_that_differ_in_more_than_whole_numbers_are_not_alike(tmp_path: Path, name: str) -> None:
    assert len(match(tmp_path, {"0.q": (2, 4), name: (2, 4)}, {"0.q": (2, 4)}).pairs) == 1


def test_tensors_of_other_rank_are_not_alike(tmp_path: Path) -> None:
    assert len(match(tmp_path, {"0.q": (2, 4), "1.q": (8,)}, {"0.q": (2, 4)}).pairs) == 1


@pytest.mark.parametrize("listed", [None, {"0.q"}])
def test_what_an_index_lists_must_have_a_mask(tmp_path: Path, listed: set[str] | None) -> None:
    missing = {"1.k": PurePosixPath("x.safetensors")}
    told = lines_of(tmp_path, layers(2, "q"), layers(2, "q"), listed=listed, missing=missing)
    assert told == [
        "/c.safetensors: tensor '1.k' has no mask, but the index of masks lists one in x.safetensors; "
        + WANTED
    ]


def test_a_mask_that_is_left_over_is_near_to_a_tensor_that_lacks_one(tmp_path: Path) -> None:
    told = lines_of(tmp_path, layers(2, "q"), {"0.q": (2, 4), "model.1.q": (2, 4)})
    assert told[0].endswith("; the nearest name is '1.q'")
    assert told[1].endswith(f"has no mask, but '0.q' has one; the nearest name is 'model.1.q'; {WANTED}")


def test_partial_lets_be_what_has_no_counterpart_and_tells_it(tmp_path: Path) -> None:
    masks = {"0.q": (2, 4), "gone": (3,)}
    matched = match(
        tmp_path, layers(3, "q"), masks, missing={"1.q": PurePosixPath("x.safetensors")}, partial=True
    )
    assert [pair.stored.name for pair in matched.pairs] == ["0.q"]
    assert (matched.unused, matched.unmasked) == (("gone",), ("1.q", "2.q"))


@pytest.mark.parametrize("partial", [False, True])
def test_another_shape_is_an_error_always(tmp_path: Path, partial: bool) -> None:
    told = lines_of(tmp_path, {"w": (2, 4)}, {"w": (4, 2)}, partial=partial)
    assert told == [
        (
            "masks: mask 'w' has the shape [4, 2], the tensor in /c.safetensors [2, 4]; give the masks of "
            "this checkpoint, or leave this one out by --exclude"
        )
    ]


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("dtype", ["U8", "BOOL", "C64", "F8_E8M0", "F4"])
def test_a_dtype_that_cannot_be_pruned_is_an_error_always(tmp_path: Path, dtype: str, partial: bool) -> None:
    (line,) = lines_of(tmp_path, {"w": (2, 4)}, {"w": (2, 4)}, partial=partial, dtype=dtype)
    assert line.startswith(f"/c.safetensors: tensor 'w', which has a mask, is {dtype}, and need not be zero")
    assert "wanted one of I8, F8_E5M2, " in line


def test_partial_with_no_mask_for_any_tensor_is_an_error(tmp_path: Path) -> None:
    told = lines_of(tmp_path, {"0.q": (2,)}, {"model.0.q": (2,)}, partial=True)
    assert told == [
        (
            "masks: its mask is not for a tensor of /c.safetensors, such as 'model.0.q'; the nearest name is "
            "'0.q'; give the masks of this checkpoint, or --rename OLD=NEW where only names differ"
        )
    ]


def test_masks_get_the_names_of_their_tensors_where_wrappers_made_others(tmp_path: Path) -> None:
    tensors = layers(2, "q.base_layer.weight", before="base_model.model.model.")
    matched = match(tmp_path, tensors, layers(2, "q.weight", before="model."))
    assert [pair.stored.name for pair in matched.pairs] == list(tensors)
    assert [pair.mask.name for pair in matched.pairs] == list(tensors)
    assert [pair.mask.stored.name for pair in matched.pairs] == ["model.0.q.weight", "model.1.q.weight"]
    assert (matched.unused, matched.unmasked) == ((), ())


@pytest.mark.parametrize("partial", [False, True])
def test_two_masks_for_one_tensor_are_an_error_always(tmp_path: Path, partial: bool) -> None:
    masks: Shapes = {"module.w": (2,), "w": (2,)}
    (line,) = lines_of(tmp_path, {"w": (2,)}, masks, partial=partial)
    assert line == "masks: masks 'w' and 'module.w' are both for tensor 'w'; leave one of them out"


def test_a_report_lists_the_names_that_masks_are_stored_under(tmp_path: Path) -> None:
    tensors = layers(2, "q", before="module.")
    assert len(match(tmp_path, tensors, layers(2, "q"), listed={"0.q", "1.q"}).pairs) == 2
    told = lines_of(tmp_path, tensors, layers(1, "q"), listed={"0.q", "1.q"})
    assert told == [f"/c.safetensors: tensor '1.q' has no mask, but masks/report.json lists it; {WANTED}"]


def test_what_is_known_to_be_kept_whole_needs_no_mask(tmp_path: Path) -> None:
    masks: Shapes = {"0.q": (2, 4)}
    matched = match(tmp_path, layers(3, "q", before="module."), masks, whole=["1.q", "2.q"])
    assert [pair.stored.name for pair in matched.pairs] == ["module.0.q"]
    told = lines_of(tmp_path, layers(3, "q"), masks, whole=["1.q"])
    assert told == ["/c.safetensors: tensor '2.q' has no mask, but '0.q' has one; " + WANTED]


def test_of_chosen_tensors_alone_masks_are_wanted(tmp_path: Path) -> None:
    masks: Shapes = {"0.q": (2, 4), "1.k": (2, 4), "1.q": (9,), "gone": (1,)}
    matched = match(tmp_path, layers(2, "q", "k"), masks, chosen=["0.q", "0.k"], partial=True)
    assert [pair.stored.name for pair in matched.pairs] == ["0.q"]
    assert (matched.unused, matched.unmasked) == ((), ("0.k",))
    told = lines_of(tmp_path, layers(2, "q", "k"), masks, chosen=["0.q", "0.k"])
    assert told == ["/c.safetensors: tensor '0.k' has no mask, but '1.k' has one; " + WANTED]


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    told = lines_of(tmp_path, layers(3, "q"), {"0.q": (2, 4), "1.q": (9,), "x": (1,)})
    assert [line.split(": ")[1][:11] for line in told[:3]] == ["mask '1.q' ", "mask 'x' is", "tensor '2.q"]
