"""Reading from an object store: every byte once, ahead of the work, and nothing of a file that changed."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from sparseprune.checkpoint import TensorReader, open_checkpoint, read_ahead
from sparseprune.checkpoint.file_io import ChangedInputError
from sparseprune.checkpoint.remote import RemotePath
from tests.checkpoint.files import content
from tests.commands import ok, run
from tests.samples import TWO_OF_FOUR, mlp_tensors, without_marks, write_shards, write_spec
from tests.stores import Asked, download, front, put, upload

_REPORT = "sparseprune/report.json"


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """One shard of 12 MB, of which a header is less than a hundredth."""
    tensors = {f"layers.{layer}.mlp.up_proj.weight": torch.randn(1024, 1536) for layer in range(2)}
    return write_shards(tmp_path / "large", {"model.safetensors": tensors})


def _spec(folder: Path) -> Path:
    return write_spec(folder, TWO_OF_FOUR.replace("{layer}.{name}", "layers.{layer}.mlp.{name}"))


def test_parts_that_threads_read_in_any_order_are_those_of_the_file(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "BLOCK", 64)
    values = torch.arange(1500, dtype=torch.uint8)
    put(f"{bucket}/m.safetensors", save({"first": values[:7].clone(), "second": values}))
    stored = open_checkpoint(RemotePath(f"{bucket}/m.safetensors")).tensors["second"]
    wanted = values.numpy().tobytes()
    draw = random.Random(1)
    starts = [0, *range(0, 1500, 50), *(draw.randrange(1500) for _ in range(60))]
    parts = [(begin, min(1500, begin + draw.choice([1, 40, 64, 300]))) for begin in starts]
    with TensorReader() as reader, ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda part: bytes(reader.read(stored, *part)), parts))
    assert read == [wanted[begin:end] for begin, end in parts]


def test_a_file_that_changed_after_its_header_was_read_is_refused(bucket: str) -> None:
    address = f"{bucket}/m.safetensors"
    put(address, save({"w": torch.zeros(64)}))
    stored = open_checkpoint(RemotePath(address)).tensors["w"]
    put(address, save({"w": torch.ones(64)}))
    with TensorReader() as reader, pytest.raises(ChangedInputError) as refusal:
        reader.read(stored)
    assert str(refusal.value).startswith(f"{address}: changed while it was read: another file has taken")


def test_each_byte_is_read_about_once_and_a_plan_reads_headers_alone(
    large: Path, bucket: str, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, size = upload(large, f"{bucket}/large"), sum(file.stat().st_size for file in large.iterdir())
    spec = _spec(tmp_path)
    with front(s3_server, monkeypatch) as seen:
        ok("plan", address, spec)
        assert 0 < seen.nbytes < 200_000
        seen.asked.clear()
        ok("apply", address, spec, "-o", tmp_path / "out", "--jobs", 2)
    assert size <= seen.nbytes < 1.1 * size


def test_requests_that_fail_now_and_then_are_made_again(
    bucket: str, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = write_shards(tmp_path / "dense", {"model.safetensors": mlp_tensors()})
    address, spec = upload(dense, f"{bucket}/dense"), write_spec(tmp_path, TWO_OF_FOUR)
    ok("apply", dense, spec, "-o", tmp_path / "local")
    failed: list[str] = []

    def instead(asked: Asked, number: int) -> tuple[int, bytes] | None:
        if number % 3:
            return None
        failed.append(asked.path)
        return 503, b"<Error><Code>SlowDown</Code></Error>"

    with front(s3_server, monkeypatch) as seen:
        seen.instead = instead
        ok("apply", address, spec, "-o", tmp_path / "out")
    assert len(failed) > 2
    of_store, local = (without_marks(content(tmp_path / name)) for name in ("out", "local"))
    assert of_store.pop(_REPORT)
    assert local.pop(_REPORT)
    assert of_store == local


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("ExpiredToken", "the credentials have expired; sign in again, or "),
        ("InvalidAccessKeyId", "the store does not accept the credentials (InvalidAccessKeyId); "),
        ("AccessDenied", "permission denied"),
    ],
)
def test_a_refusal_of_the_store_is_one_line(
    code: str, why: str, bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with front(s3_server, monkeypatch) as seen:
        seen.instead = lambda *_: (403, f"<Error><Code>{code}</Code></Error>".encode())
        said = run("inspect", f"{bucket}/dense")
    assert (said.code, said.out, said.err.count("\n")) == (3, "", 1)
    assert why in said.err


def test_a_bucket_of_google_is_read_and_written(
    bucket: str, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = write_shards(tmp_path / "dense", {"model.safetensors": mlp_tensors()})
    spec, name = write_spec(tmp_path, TWO_OF_FOUR), bucket.removeprefix("s3://")
    upload(dense, f"{bucket}/dense")
    ok("apply", dense, spec, "-o", tmp_path / "local")
    with front(s3_server, monkeypatch, is_google=True):
        ok("apply", f"gs://{name}/dense", spec, "-o", f"gs://{name}/local")
    of_store, local = without_marks(download(f"{bucket}/local")), without_marks(content(tmp_path / "local"))
    assert of_store.pop(_REPORT)
    assert local.pop(_REPORT)
    assert of_store == local
