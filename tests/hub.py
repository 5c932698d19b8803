"""A hub on loopback that speaks what huggingface_hub asks, and counts requests and bytes.

`hub` lets this process, and every one that begins meanwhile, take it for the Hugging Face hub, with an empty
cache. Only what tests ask for by name is imported from here.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from sparseprune.checkpoint.remote import forget_stores

_LARGE = ".safetensors"  # such files lie on another host, as those of the hub do


@dataclass
class Model:
    """Its commits with the files of each, and where branches, tags and pull requests stand."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    is_gated: bool = False


class Hub(ThreadingHTTPServer):
    """`asked` are the requests in order, `sent` the bytes of all answers. The next ones get `refusals`."""

    daemon_threads = False  # their sockets are closed when the server is

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.models: dict[str, Model] = {}
        self.asked: list[str] = []
        self.sent = 0
        self.refusals: list[int] = []
        self.has_parts = True
        self.cut = 0
        self.lock = threading.Lock()

    def handle_error(self, *_: object) -> None:
        """A client that left says so itself."""

    def put(self, name: str, folder: Path, ref: str = "main") -> str:
        """A commit of all files in a folder, on a branch; gives its name."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        text = "".join(f"{path} {hashlib.sha256(data).hexdigest()}\n" for path, data in files.items())
        commit = hashlib.sha1(f"{ref} {text}".encode(), usedforsecurity=False).hexdigest()
        model = self.models.setdefault(name, Model())
        model.commits[commit] = files
        model.refs[ref] = commit
        return commit

    def requests(self, word: str = "") -> list[str]:
        return [line for line in self.asked if word in line]

    def forget(self) -> None:
        """Counts from zero."""
        self.asked, self.sent = [], 0


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 20
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        if self.path.startswith("/api/agent"):  # of the library's own, now and then
            self._send(404, b"")
            return
        with self.server.lock:
            self.server.asked.append(f"{self.command} {self.path}")
            refusal = self.server.refusals.pop(0) if self.server.refusals else None
        if refusal is not None:
            self._send(refusal, b"{}")
            return
        url = urlsplit(self.path)
        match [unquote(part) for part in url.path.strip("/").split("/")]:
            case ["api", "models", owner, name, "revision", revision]:
                self._info(f"{owner}/{name}", revision, has_files="blobs" in parse_qs(url.query))
            case ["cdn", name]:
                self._file(self._contents()[name], {"ETag": f'"{name}"'})
            case [owner, name, "resolve", revision, *path]:
                self._resolve(f"{owner}/{name}", revision, "/".join(path))
            case _:
                self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _model(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and its files; what is wrong is sent."""
        model = self.server.models.get(name)
        if model is None:
            self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
            return None
        if model.is_gated and self.headers.get("Authorization") is None:
            self._send(403, b"", {"X-Error-Code": "GatedRepo"})
            return None
        commit = model.refs.get(revision, revision)
        if commit not in model.commits:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit, model.commits[commit]

    def _info(self, name: str, revision: str, *, has_files: bool) -> None:
        found = self._model(name, revision)
        if found is None:
            return
        commit, files = found
        siblings = [
            {"rfilename": path, **(_described(path, data) if has_files else {})}
            for path, data in files.items()
        ]
        self._send(200, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode())

    def _resolve(self, name: str, revision: str, path: str) -> None:
        found = self._model(name, revision)
        if found is None:
            return
        commit, files = found
        said = {"X-Repo-Commit": commit}
        if path not in files:
            self._send(404, b"", {**said, "X-Error-Code": "EntryNotFound"})
            return
        data = files[path]
        if not path.endswith(_LARGE):
            self._file(data, {**said, "ETag": f'"{_blob_id(data)}"'})
            return
        digest = hashlib.sha256(data).hexdigest()
        said |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{digest}"'}
        self._send(302, b"", {**said, "Location": f"http://localhost:{self.server.server_port}/cdn/{digest}"})

    def _contents(self) -> dict[str, bytes]:
        every = [files for model in self.server.models.values() for files in model.commits.values()]
        return {hashlib.sha256(data).hexdigest(): data for files in every for data in files.values()}

    def _file(self, data: bytes, said: dict[str, str]) -> None:
        asked = self.headers.get("Range")
        if asked is None or not self.server.has_parts:
            self._send(200, data, said)
            return
        first, last = asked.removeprefix("bytes=").split("-")
        begin, end = int(first), min(int(last or len(data)) + 1, len(data))
        self._send(206, data[begin:end], {**said, "Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"})

    def _send(self, status: int, data: bytes, said: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, text in (said or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        with self.server.lock:
            self.server.sent += len(data)
            cut = self.server.cut and len(data) > self.server.cut
        if cut:
            self.wfile.write(data[: self.server.cut])
            self.close_connection = True
            return
        self.wfile.write(data)


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%s" % (len(data), data), usedforsecurity=False).hexdigest()


def _described(path: str, data: bytes) -> dict[str, object]:
    found: dict[str, object] = {"size": len(data), "blobId": _blob_id(data)}
    if path.endswith(_LARGE):
        digest = hashlib.sha256(data).hexdigest()
        found["lfs"] = {"size": len(data), "sha256": digest, "pointerSize": 134}
    return found


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub without models, and an empty cache."""
    from huggingface_hub import close_session

    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    reach(monkeypatch, server.endpoint, tmp_path_factory.mktemp("cache"))
    yield server
    close_session()
    server.shutdown()
    thread.join()
    server.server_close()
    forget_stores()


def reach(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path, *, offline: bool = False) -> None:
    """Lets this process, and those that it starts, find the hub at an endpoint, and that cache."""
    from huggingface_hub import constants

    for name, text in {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_HUB_OFFLINE": "1" if offline else "0",
    }.items():
        monkeypatch.setenv(name, text)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    # They are read when the package is loaded.
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    forget_stores()
