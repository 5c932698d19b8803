"""Object stores on loopback: moto's S3 server in a process of its own, and a server in front of it.

`bucket` gives the address of an empty bucket; every process that begins meanwhile reaches it by its
environment.
"""

import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import cast
from urllib.parse import unquote, urlsplit

import pytest

_SERVER = """
import logging
import sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").disabled = True
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""
_NUMBERS = count(1)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 server, which ends with the tests, however they end."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.stdin.close()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty bucket, such as `s3://tests-1`."""
    name = f"tests-{next(_NUMBERS)}"
    urllib.request.urlopen(urllib.request.Request(f"{s3_server}/{name}", method="PUT")).close()
    reach(monkeypatch, s3_server)
    yield f"s3://{name}"
    _forget()
    for key in keys(f"s3://{name}"):
        delete(f"s3://{name}/{key}")


def reach(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Lets this process, and those that it starts, find the S3 server at an endpoint."""
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    _forget()


def _forget() -> None:
    from sparseprune.checkpoint.remote import forget_stores

    forget_stores()


def upload(source: Path, address: str) -> str:
    """Puts a file, or all files of a folder, under an address, which is given back."""
    store, key = _store(address)
    files = [path for path in sorted(source.rglob("*")) if path.is_file()] if source.is_dir() else [source]
    for path in files:
        inside = path.relative_to(source).as_posix()
        store.put("/".join(part for part in (key, inside) if part not in ("", ".")), path)
    return address


def put(address: str, data: bytes) -> str:
    """Puts one object, which is given back by its ETag."""
    store, key = _store(address)
    return str(store.put(key, data)["e_tag"])


def download(address: str) -> dict[str, bytes]:
    """Every object below an address, by its path from there."""
    store, key = _store(address)
    return {name: bytes(store.get("/".join(filter(None, (key, name)))).bytes()) for name in keys(address)}


def keys(address: str) -> list[str]:
    """The paths of all objects below an address, from there."""
    store, key = _store(address)
    found = [str(meta["path"]) for page in store.list(key or None) for meta in page]
    return sorted(one[len(key) + 1 if key else 0 :] for one in found)


def delete(address: str) -> None:
    store, key = _store(address)
    store.delete(key)


def _store(address: str):  # type: ignore[no-untyped-def]  # noqa: ANN202
    from obstore.store import S3Store

    parts = urlsplit(address)
    return S3Store(parts.netloc, client_options={"allow_http": True}), parts.path.strip("/")


@dataclass
class Asked:
    """One request that a `Front` saw, and how many bytes of a body it answered."""

    method: str
    path: str
    range: str
    status: int = 0
    nbytes: int = 0


@dataclass
class Front:
    """A server in front of another one: it counts requests, and may answer some of them itself.

    `instead` gets a request and its number, from 1 on, and gives a status and a body, or None to pass it on.
    One that `is_google` takes what is asked of Google's store, whose requests of XML are nearly those of S3.
    """

    endpoint: str
    is_google: bool = False
    asked: list[Asked] = field(default_factory=list)
    instead: Callable[[Asked, int], tuple[int, bytes] | None] = lambda *_: None

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.asked if one.method == "GET")


class _Passing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    front: Front
    behind: str

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = Asked(self.command, self.path, self.headers.get("Range") or "")
        with _LOCK:
            self.front.asked.append(asked)
            number = len(self.front.asked)
        answer = self.front.instead(asked, number)
        if answer is not None:
            asked.status = answer[0]
            self._answer(answer[0], {}, answer[1])
            return
        connection = HTTPConnection(self.behind, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            path = self.path
            if self.front.is_google:
                headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
                path, headers["Authorization"] = unquote(path), _SIGNED
            connection.request(self.command, path, body or None, headers)
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        asked.status, asked.nbytes = response.status, len(data)
        of_google = {"x-goog-generation": "1"} if self.front.is_google else {}
        self._answer(response.status, dict(response.getheaders()) | of_google, data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass  # noqa: N815

    def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response_only(status)
        named = {name.lower(): value for name, value in headers.items()}
        for name, value in named.items():
            if name not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = named.get("content-length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("content-length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


_LOCK = threading.Lock()
_SIGNED = (
    "AWS4-HMAC-SHA256 Credential=tester/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
)


@contextmanager
def front(endpoint: str, monkeypatch: pytest.MonkeyPatch, *, is_google: bool = False) -> Iterator[Front]:
    """A server in front of one at an endpoint; this process and those that it starts go there from now on."""
    seen = Front("", is_google)
    handler = type("Passing", (_Passing,), {"front": seen, "behind": urlsplit(endpoint).netloc})
    with serving(cast("type[BaseHTTPRequestHandler]", handler)) as seen.endpoint:
        if is_google:
            unsigned = {"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
            monkeypatch.setenv("GOOGLE_BASE_URL", seen.endpoint)
            monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(unsigned))
        reach(monkeypatch, seen.endpoint)
        try:
            yield seen
        finally:
            reach(monkeypatch, endpoint)


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The endpoint of a server with this handler, which runs in threads of this process."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
