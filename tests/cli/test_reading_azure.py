"""A container of Azure is read as a folder is, against a server that answers as Azurite does."""

from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from sparseprune.checkpoint.remote import forget_stores
from tests.checkpoint.files import content
from tests.commands import ok, run
from tests.samples import TWO_OF_FOUR, mlp_tensors, without_marks, write_shards, write_spec
from tests.stores import serving

_TIME = "Thu, 01 Jan 2026 00:00:00 GMT"
_BLOB = (
    "<Blob><Name>{}</Name><Properties><Last-Modified>" + _TIME + "</Last-Modified>"
    "<Content-Length>{}</Content-Length><Content-Type>a/b</Content-Type><Etag>0x1</Etag></Properties></Blob>"
)


class _Container(BaseHTTPRequestHandler):
    """The blobs of `container` in the account of the emulator."""

    protocol_version = "HTTP/1.1"
    blobs: dict[str, bytes]

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        container, _, name = unquote(parts.path).removeprefix("/devstoreaccount1/").partition("/")
        if container != "container":
            self._answer(404, b"<Error><Code>ContainerNotFound</Code></Error>")
        elif name:
            self._blob(name)
        else:
            prefix = parse_qs(parts.query).get("prefix", [""])[0]
            found = [(one, data) for one, data in self.blobs.items() if one.startswith(prefix)]
            blobs = "".join(_BLOB.format(one, len(data)) for one, data in found)
            page = f"<EnumerationResults><Blobs>{blobs}</Blobs><NextMarker/></EnumerationResults>"
            self._answer(200, page.encode())

    do_HEAD = do_GET  # noqa: N815

    def _blob(self, name: str) -> None:
        data = self.blobs.get(name)
        asked = self.headers.get("x-ms-range") or self.headers.get("Range")
        if data is None:
            self._answer(404, b"<Error><Code>BlobNotFound</Code></Error>")
        elif asked is None:
            self._answer(200, data)
        else:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last) + 1, len(data))
            self._answer(206, data[begin:end], f"bytes {begin}-{end - 1}/{len(data)}")

    def _answer(self, status: int, data: bytes, part: str = "") -> None:
        self.send_response_only(status)
        headers = {"content-length": str(len(data)), "etag": "0x1", "last-modified": _TIME}
        for name, value in (headers | ({"content-range": part} if part else {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def test_reads_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = write_shards(tmp_path / "dense", {"model.safetensors": mlp_tensors()})
    spec = write_spec(tmp_path, TWO_OF_FOUR)
    ok("apply", dense, spec, "-o", tmp_path / "local")
    blobs = {f"models/dense/{name}": data for name, data in content(dense).items()}
    with serving(type("Container", (_Container,), {"blobs": blobs})) as endpoint:
        monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
        monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", endpoint)
        forget_stores()
        ok("apply", "az://container/models/dense", spec, "-o", tmp_path / "out")
        said = run("inspect", "az://other/models/dense")
    forget_stores()
    of_store, local = (without_marks(content(tmp_path / name)) for name in ("out", "local"))
    report = "sparseprune/report.json"
    assert of_store.pop(report) != local.pop(report)
    assert of_store == local
    why = "there is no bucket az://other; give an existing one"
    assert (said.code, said.err) == (2, f"sparseprune: az://other/models/dense: {why}\n")
