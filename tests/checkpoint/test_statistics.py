"""Statistics files: laid out, written, opened again; by whose names; and what is none."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseprune.checkpoint import (
    Collected,
    StagedOutput,
    StatisticsKind,
    open_checkpoint,
    open_statistics,
)
from sparseprune.checkpoint.statistics import ROUTING, STATISTICS_KEY, lay_out_statistics
from sparseprune.errors import CheckpointError

TENSORS = (
    Collected(4, None, {"q": 1, "k": 1, "turned": 0}),
    Collected(6, 3, {"experts": 2}),
    Collected(2, None, {"last": 1}),
)


BESIDE = (
    Collected(6, None, {"q": 0}, "gradients"),
    Collected(8, None, {"k": 0}, "gradients", groups=2),
    Collected(8, 3, {"experts": 1}, "gradients", groups=4),
    Collected(5, 3, {"experts": 1}, "routing"),
)


def write(
    folder: Path, kind: StatisticsKind, shard_bytes: int, tensors: tuple[Collected, ...] = TENSORS
) -> dict[str, torch.Tensor]:
    """Numbers in every place, and a report."""
    save_file({"q": torch.zeros(3, 4)}, folder / "m.safetensors")
    layout = lay_out_statistics(
        open_checkpoint(folder / "m.safetensors"), folder / "stats", kind, tensors, shard_bytes
    )
    dtypes = {"F32": torch.float32, "F64": torch.float64}
    values = {
        one.name: torch.arange(torch.Size(one.shape(kind)).numel(), dtype=dtypes[one.dtype]).reshape(
            one.shape(kind)
        )
        for one in tensors
    }
    with StagedOutput(layout) as output:
        for name, value in values.items():
            output.write_weight(name, 0, value.numpy().reshape(-1).data)
        matrices = [{"name": "q", "tokens": 7}, {"name": "experts", "tokens": [1, 0, 2]}]
        output.add_file(layout.report_file, json.dumps({"matrices": matrices}).encode())
        output.commit()
    return values


@pytest.mark.parametrize(
    ("kind", "shapes"), [("hessian", [(4, 4), (3, 6, 6), (2, 2)]), ("norm", [(4,), (3, 6), (2,)])]
)
@pytest.mark.parametrize("shard_bytes", [1 << 30, 100, 1])
def test_what_is_written_is_found_by_every_weight(
    tmp_path: Path, kind: StatisticsKind, shapes: list[tuple[int, ...]], shard_bytes: int
) -> None:
    values = write(tmp_path, kind, shard_bytes)
    files = sorted((tmp_path / "stats").glob("*.safetensors"))
    stored = {name: one for file in files for name, one in load_file(file).items()}
    assert all(torch.equal(stored[name], one) for name, one in values.items())
    assert [tuple(one.shape) for one in values.values()] == shapes
    found = open_statistics(tmp_path / "stats").of
    assert {name: (one.stored.name, one.kind, one.input_dim, one.tokens) for name, one in found.items()} == {
        "q": ("q", kind, 1, (7,)),
        "k": ("q", kind, 1, (7,)),
        "turned": ("q", kind, 0, (7,)),
        "experts": ("experts", kind, 2, (1, 0, 2)),
        "last": ("last", kind, 1, ()),
    }
    if shard_bytes == 1:
        assert [file.name for file in files] == [
            f"statistics-0000{place}-of-00003.safetensors" for place in (1, 2, 3)
        ]


@pytest.mark.parametrize("shard_bytes", [1 << 30, 1])
def test_gradients_and_what_experts_do_belong_to_their_weights(tmp_path: Path, shard_bytes: int) -> None:
    values = write(tmp_path, "hessian", shard_bytes, TENSORS + BESIDE)
    found = open_statistics(tmp_path / "stats").of
    assert sorted(found) == ["experts", "k", "last", "q", "turned"]
    gradients = {name: one.gradients for name, one in found.items() if one.gradients}
    assert {name: one.shape for name, one in gradients.items()} == {
        "q": (6, 6),
        "k": (2, 4, 4),
        "experts": (3, 4, 2, 2),
    }
    routing = found["experts"].routing
    assert routing is not None
    assert (routing.dtype, routing.shape) == ("F64", (3, len(ROUTING)))
    assert [name for name, one in found.items() if one.routing] == ["experts"]
    stored = load_file(gradients["q"].shard.path)
    assert torch.equal(stored["q.gradients"], values["q.gradients"])


def test_a_file_without_our_word_has_tensors_by_the_names_of_weights(tmp_path: Path) -> None:
    save_file({"w": torch.eye(3)}, tmp_path / "s.safetensors")
    (one,) = open_statistics(tmp_path / "s.safetensors").of.values()
    assert (one.kind, one.input_dim, one.tokens, one.stored.shape) == (None, None, (), (3, 3))


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        '{"kind": "hessian"}',
        '{"kind": "other", "weights": {}}',
        '{"kind": "hessian", "weights": []}',
        '{"kind": "hessian", "weights": {"w": {"w": -1}}}',
        '{"kind": "hessian", "weights": {"w": {"w": "1"}}}',
        '{"kind": "hessian", "weights": {"w": 3}}',
        '{"kind": "hessian", "weights": {}, "gradients": {"w": 3}}',
        '{"kind": "hessian", "weights": {}, "routing": []}',
    ],
)
def test_metadata_that_is_not_ours_is_told(tmp_path: Path, text: str) -> None:
    save_file({"w": torch.eye(3)}, tmp_path / "s.safetensors", metadata={STATISTICS_KEY: text})
    with pytest.raises(CheckpointError, match="is not that of a statistics file; calibrate again"):
        open_statistics(tmp_path / "s.safetensors")


@pytest.mark.parametrize(
    "text",
    [
        '{"kind": "hessian", "weights": {"w": {"w": 1}, "v": {"w": 1}}}',
        '{"kind": "hessian", "weights": {}, "gradients": {"w": {"w": 1}, "v": {"w": 1}}}',
    ],
)
def test_a_weight_that_has_two_is_told(tmp_path: Path, text: str) -> None:
    save_file(
        {"w": torch.eye(3), "v": torch.eye(3)}, tmp_path / "s.safetensors", metadata={STATISTICS_KEY: text}
    )
    with pytest.raises(CheckpointError, match="has statistics of w twice"):
        open_statistics(tmp_path / "s.safetensors")


@pytest.mark.parametrize(
    "report", ['{"matrices": 3}', '{"matrices": [3, {"name": 1}, {"name": "q", "tokens": "many"}]}', "{}"]
)
def test_a_report_without_counts_gives_none(tmp_path: Path, report: str) -> None:
    write(tmp_path, "norm", 1 << 30)
    (tmp_path / "stats/sparseprune/report.json").write_text(report)
    assert open_statistics(tmp_path / "stats").of["q"].tokens == ()


def test_a_report_that_is_no_json_is_told(tmp_path: Path) -> None:
    write(tmp_path, "norm", 1 << 30)
    (tmp_path / "stats/sparseprune/report.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        open_statistics(tmp_path / "stats")
    (tmp_path / "stats/sparseprune/report.json").unlink()
    assert open_statistics(tmp_path / "stats").of["q"].tokens == ()
