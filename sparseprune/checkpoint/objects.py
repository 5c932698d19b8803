"""Buckets of S3, Google Cloud Storage and Azure as a `Store`, read through obstore.

Owns how a bucket is opened, how long a failing server is asked again, and what obstore's errors mean in plain
words. Credentials, region and endpoint are found by obstore. Called by remote.py and by what writes objects.
"""

from __future__ import annotations

import errno
import os
import re
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from sparseprune.checkpoint.remote import Facts, Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from _typeshed import ReadableBuffer
    from obstore import GetResult
    from obstore.store import ObjectStore as Bucket


INSTALL = "pip install 'sparseprune[remote]'"
_GIVEN_UP = timedelta(seconds=40)  # after the first try; the last one may take as long as a request may
_REQUEST = timedelta(seconds=30)
_PAGE = 1000
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


def _facts(meta: Any) -> Facts:  # noqa: ANN401  (obstore's is a dictionary that is known to type checkers only)
    """Of a store without ETags the time stands for the content."""
    return Facts(meta["size"], meta["e_tag"] or f"{_OF_TIME}{meta['last_modified'].isoformat()}")


_OF_TIME = "time:"


def _is_matched(etag: str) -> bool:
    """Whether a store can be asked for the content that has this ETag."""
    return bool(etag) and not etag.startswith(_OF_TIME)
