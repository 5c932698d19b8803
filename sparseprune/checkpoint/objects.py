"""Buckets of S3, Google Cloud Storage and Azure: a `Store` to read, and folders of objects to write.

The only module that imports obstore, which finds credentials, region and endpoint. Owns how long a failing
server is asked again, and what errors mean in plain words. Knows no layout and no run. Called by remote.py;
writing is called by remote_output.py and remote_run.py.
"""

from __future__ import annotations

import errno
import os
import re
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, cast

from sparseprune.checkpoint.file_io import as_bytes, machine_errors
from sparseprune.checkpoint.remote import INSTALL, Facts, Store
from sparseprune.errors import CheckpointError, MachineError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from _typeshed import ReadableBuffer
    from obstore import GetResult, UpdateVersion
    from obstore.store import ObjectStore as Bucket

    from sparseprune.checkpoint.file_io import Bytes
    from sparseprune.checkpoint.remote import RemotePath


_GIVEN_UP = timedelta(seconds=40)  # after the first try; the last one may take as long as a request may
_REQUEST = timedelta(seconds=30)
_PAGE = 1000
_ALL_AT_ONCE = 1000  # objects that are removed by one request
_CHUNK = 1 << 18  # bytes of a response that are there before they are taken
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,220}")
_CODE = re.compile(r"<Code>(\w+)</Code>|\"code\": ?\"?(\w+)")
_STATUS = re.compile(r"non-2xx status code: (\d+)")
_SAID = re.compile(r"<Message>([^<\n]{1,300})")
# Services that give credentials to a machine, asked by obstore where there are no others.
_MACHINE_CREDENTIALS = ("169.254.169.254", "169.254.170.2", "fd00:ec2::254", "metadata.google.internal")
_HOW_TO_SIGN_IN = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_SERVICE_ACCOUNT to a key file",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"})
_NO_BUCKET = frozenset({"NoSuchBucket", "ContainerNotFound"})
_OTHER_REGION = frozenset({"PermanentRedirect", "AuthorizationHeaderMalformed"})
_WRONG_KEYS = frozenset(
    {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AuthFailure", "AuthenticationFailed"}
)


Mark = dict[str, str]
"""One version of one object, as its store tells versions apart."""
_OTHER = "give a local folder, or one in s3://, gs:// or az:// with -o"


class ObjectStore(Store):
    """One bucket; `bucket` is obstore's store of it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.bucket = open_bucket(address)

    def facts(self, key: str) -> Facts | None:
        from obstore.exceptions import BaseError  # noqa: PLC0415

        with store_errors(self.address, key):
            try:
                return _facts(self.bucket.head(key))
            except FileNotFoundError:
                return None
            except BaseError as error:
                found = _STATUS.search(str(error))
                if found is not None and found[1].startswith("4"):
                    self.bucket.get(key, options={"range": (0, 1)})  # a HEAD is refused without a reason
                raise

    def below(self, folder: str) -> dict[str, Facts]:
        found = {}
        with store_errors(self.address, folder):
            for page in self.bucket.list(folder or None, chunk_size=_PAGE):
                found.update({one["path"]: _facts(one) for one in page})
        return {key: facts for key, facts in found.items() if not key.endswith("/")}

    def read(self, key: str, begin: int, end: int, etag: str = "") -> ReadableBuffer:
        if begin >= end:
            return b""
        with store_errors(self.address, key):
            return self._got(key, begin, end, etag).bytes()

    def read_into(self, key: str, begin: int, view: memoryview, etag: str = "") -> int:
        done = 0
        with store_errors(self.address, key):
            for chunk in self._got(key, begin, begin + len(view), etag).stream(_CHUNK):
                part = memoryview(chunk)
                view[done : done + len(part)] = part
                done += len(part)
        return done

    def _got(self, key: str, begin: int, end: int, etag: str) -> GetResult:
        options: Any = {"range": (begin, end)}
        if _is_matched(etag):
            options["if_match"] = etag
        return self.bucket.get(key, options=options)

    def local(self, key: str) -> Path | None:  # noqa: ARG002
        return None


class ObjectFolder:
    """The objects below an address, by their paths from there. Errors of the store are MachineErrors."""

    def __init__(self, address: RemotePath) -> None:
        self.address = address
        try:
            store = address.store
        except OSError as error:
            kind = CheckpointError if error.errno == errno.ENOENT else MachineError
            raise kind(f"{address}: cannot be written: {error.strerror}") from error
        if not isinstance(store, ObjectStore):
            raise CheckpointError(f"{address}: cannot be written to; {_OTHER}")
        self._store = store
        self._bucket = store.bucket
        self._prefix = f"{address.key}/" if address.key else ""

    def put(self, name: str, data: Bytes) -> Facts:
        """A small object, which replaces what is there."""
        view = as_bytes(data)
        with self._told(name):
            done = self._bucket.put(self._prefix + name, view, use_multipart=False)
        return Facts(len(view), done["e_tag"] or "")

    def send(self, name: str, pieces: Iterator[Bytes], part_bytes: int, side_by_side: int) -> Facts:
        """A large one in pieces of `part_bytes`, the last one shorter; nothing is left if `pieces` fails."""
        nbytes = 0

        def counted() -> Iterator[memoryview]:
            nonlocal nbytes
            for piece in pieces:
                view = as_bytes(piece)
                nbytes += len(view)
                yield view

        with self._told(name):
            done = self._bucket.put(
                self._prefix + name,
                counted(),
                use_multipart=True,
                chunk_size=part_bytes,
                max_concurrency=side_by_side,
            )
        return Facts(nbytes, done["e_tag"] or "")

    def create(self, name: str, data: bytes) -> Mark | None:
        """A new object; None where there is one already."""
        from obstore.exceptions import AlreadyExistsError  # noqa: PLC0415

        with self._told(name):
            try:
                return _mark(self._bucket.put(self._prefix + name, data, mode="create"))
            except AlreadyExistsError:
                return None

    def replace(self, name: str, data: bytes, mark: Mark) -> Mark | None:
        """Another content of this version of an object; None where it is no longer the one that is there."""
        from obstore.exceptions import PreconditionError  # noqa: PLC0415

        with self._told(name):
            try:
                return _mark(self._bucket.put(self._prefix + name, data, mode=cast("UpdateVersion", mark)))
            except (PreconditionError, FileNotFoundError):
                return None

    def read(self, name: str) -> tuple[bytes, Mark] | None:
        """A small object and its version; None where there is none."""
        with self._told(name, "cannot be read"):
            try:
                found = self._bucket.get(self._prefix + name)
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise
                return None
            return bytes(found.bytes()), _mark(found.meta)

    def facts(self, name: str) -> Facts | None:
        """Of one object; None where there is none."""
        with machine_errors(self.address / name, "cannot be read"):
            return self._store.facts(self._prefix + name)

    def below(self, name: str = "") -> dict[str, Facts]:
        """Every object in a folder of this one, or in this one, by its path from here."""
        with machine_errors(self.address / name, "cannot be listed"):
            found = self._store.below((self._prefix + name).rstrip("/"))
        return {key[len(self._prefix) :]: facts for key, facts in found.items()}

    def delete(self, names: Iterable[str]) -> None:
        """These objects, of which some may be gone already."""
        wanted = sorted(names)
        for first in range(0, len(wanted), _ALL_AT_ONCE):
            some = wanted[first : first + _ALL_AT_ONCE]
            with self._told(some[0], "cannot be removed"):
                try:
                    self._bucket.delete([self._prefix + name for name in some])
                except FileNotFoundError:
                    # Some stores end there.
                    for name in some:
                        with suppress(FileNotFoundError):
                            self._bucket.delete(self._prefix + name)

    @contextmanager
    def _told(self, name: str, doing: str = "cannot be written") -> Iterator[None]:
        key = self._prefix + name
        with machine_errors(self.address / name, doing), store_errors(self.address.root_address, key):
            yield


def open_bucket(address: str) -> Bucket:
    """What obstore has for the bucket at `s3://bucket`; OSError where there is none, or no obstore."""
    scheme, _, name = address.partition("://")
    if not _NAME.fullmatch(name):
        raise OSError(errno.ENOENT, "this is no name of a bucket; wanted such as s3://bucket/folder", address)
    try:
        from obstore import store  # noqa: PLC0415
    except ImportError as error:
        raise OSError(errno.ENOPKG, f"needs obstore, which is not installed; {INSTALL}", address) from error
    # A request ends in time where a link has at least 300 kB/s: what is read at once has 8 MiB.
    how: dict[str, Any] = {
        "retry_config": {"max_retries": 8, "retry_timeout": _GIVEN_UP},
        "client_options": {"timeout": _REQUEST},
    }
    if any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS[scheme]):
        how["client_options"]["allow_http"] = True
    kinds: dict[str, Any] = {"s3": store.S3Store, "gs": store.GCSStore, "az": store.AzureStore}
    with store_errors(address, ""):
        bucket: Bucket = kinds[scheme](name, **how)
    return bucket


_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}


@contextmanager
def store_errors(address: str, key: str) -> Iterator[None]:
    """Turns what obstore raises into an OSError whose `strerror` says why, and what to do."""
    from obstore.exceptions import BaseError  # noqa: PLC0415

    try:
        yield
    except (BaseError, FileNotFoundError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        _refuse(error, address, key)


def _refuse(error: Exception, address: str, key: str) -> NoReturn:
    number, why = _meaning(error, address)
    raise OSError(number, why, f"{address}/{key}" if key else address) from error


def _meaning(error: Exception, address: str) -> tuple[int, str]:
    """The number of an error, and a clause on it."""
    text = str(error)
    head = text.partition("\n\nDebug source")[0]
    code = next((one for match in _CODE.findall(head) for one in match if one), "")
    status = int(found[1]) if (found := _STATUS.search(head)) else 0
    refusal = _refusal(text, code, status, _HOW_TO_SIGN_IN[address.partition(":")[0]])
    if refusal:
        return errno.EACCES, refusal
    if status == 412:
        return errno.ESTALE, "it changed while it was read"
    if code in _NO_BUCKET or (status == 404 and "list request" in head):
        return errno.ENOENT, f"there is no bucket {address}; give an existing one"
    if isinstance(error, FileNotFoundError):
        return errno.ENOENT, os.strerror(errno.ENOENT)
    if isinstance(error, ValueError):
        return errno.EINVAL, f"this is no name of an object: {head.splitlines()[0][:200]}"
    return errno.EREMOTEIO, _failure(head, code, status)


def _refusal(text: str, code: str, status: int, sign_in: str) -> str:
    """A clause on why a store refuses to answer this user; none where it does not."""
    if any(place in text for place in _MACHINE_CREDENTIALS) or "Account must be specified" in text:
        return f"no credentials were found; {sign_in}"
    if code in _EXPIRED:
        return f"the credentials have expired; sign in again, or {sign_in}"
    if code in _WRONG_KEYS or status == 401:
        return f"the store does not accept the credentials ({code or status}); {sign_in}"
    if status == 403:
        return f"permission denied{_said(text)}; ask for the right to list and read this bucket"
    return ""


def _failure(head: str, code: str, status: int) -> str:
    """A clause on how a store fails to answer."""
    if "redirect without LOCATION" in head or code in _OTHER_REGION:
        return "the bucket is in another region; set AWS_REGION to that of the bucket"
    if status:
        return f"the store answered {status}{_said(head)}; run again later"
    if "error sending request" in head:
        return "the store cannot be reached; check the network and the endpoint"
    return f"{head.splitlines()[0][:300]}; run again later"


def _said(head: str) -> str:
    """What the store itself says of an error, after a colon."""
    found = _SAID.search(head)
    return f": {found[1].rstrip('.')}" if found else ""


def _mark(found: Mapping[str, Any]) -> Mark:
    return {one: found[one] for one in ("e_tag", "version") if found.get(one)}


def _facts(meta: Any) -> Facts:  # noqa: ANN401  (obstore's is a dictionary that is known to type checkers only)
    """Of a store without ETags the time stands for the content."""
    return Facts(meta["size"], meta["e_tag"] or f"{_OF_TIME}{meta['last_modified'].isoformat()}")


_OF_TIME = "time:"


def _is_matched(etag: str) -> bool:
    """Whether a store can be asked for the content that has this ETag."""
    return bool(etag) and not etag.startswith(_OF_TIME)
