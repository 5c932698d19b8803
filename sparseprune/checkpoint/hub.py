"""Models of the Hugging Face hub as a `Store`, read through huggingface_hub and its cache.

Owns which commit an address stands for, which files are read in parts and which are fetched whole, and what
failures mean in plain words. huggingface_hub finds tokens and cache. Called by remote.py, and by the
api to pin an address.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import quote, unquote

from msgspec import Struct

from sparseprune.checkpoint.remote import INSTALL, Facts, Store
from sparseprune.checkpoint.threads import Worker
from sparseprune.errors import CheckpointError, MachineError, SparsepruneError, size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from huggingface_hub.hf_api import ModelInfo, RepoSibling

COMMIT = re.compile(r"[0-9a-f]{40}")
_ADDRESS = re.compile(
    r"hf://(?P<owner>[^/@]+)/(?P<name>[^/@]+)"
    r"(?:@(?P<revision>refs/(?:pr|convert|heads|tags)/[^/]+|[^/]+))?(?:/(?P<inside>.+))?",
    re.DOTALL,
)
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_NO_MODELS = {"datasets": "a data set", "spaces": "a space", "buckets": "a bucket", "kernels": "a kernel"}
_WANTED = "wanted hf://ORGANIZATION/MODEL, or with @REVISION, such as hf://Qwen/Qwen3-8B@main"
_SIGN_IN = "sign in with `hf auth login`, or set HF_TOKEN"
_NO_MODEL = f"no such model on the hub, or a private one; check the name, or {_SIGN_IN}"
_REVISIONS = "wanted a branch, a tag, a commit or refs/pr/NUMBER, and %2F for a slash in the name of a branch"
_OTHER_CACHE = "the cache is there, HF_HUB_CACHE names another folder for it"
_STATUSES = {
    401: (errno.EACCES, f"the hub does not know the token (401); {_SIGN_IN}"),
    403: (errno.EACCES, "the hub refuses access (403); use a token that may read this model"),
    429: (errno.EAGAIN, f"the hub had too many requests (429); wait some minutes, or {_SIGN_IN}"),
}
_SHOWN = 200  # characters of an error of the library
_PATIENCE = 10.0  # seconds that an answer may take
_PAUSES = (1.0, 3.0)  # seconds before a question is asked again
_FAILING = frozenset({408, 500, 502, 503, 504})
_SMALL = 1 << 18  # bytes of a file that is read whole and kept
_AT_ONCE = 2  # files on their way
_AGAIN = 0.25  # seconds between two words about a file on its way
_NUMBERED = re.compile(r"(?P<before>.*-)(?P<number>\d{5,6})(?P<after>-of-\d{5,6}\.safetensors)")
# What may be in the cache although the hub cannot be asked.
_UNREACHABLE = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EIO, errno.EAGAIN, errno.EACCES})

Given = TypeVar("Given")


class HubAddress(Struct, frozen=True):
    """A model, a revision of it ("" where none is named), and a file or folder inside of it.

    >>> HubAddress.of("hf://Qwen/Qwen3-8B@refs/pr/1/onnx")
    HubAddress(model='Qwen/Qwen3-8B', revision='refs/pr/1', inside='onnx')
    """

    model: str
    revision: str = ""
    inside: str = ""

    @classmethod
    def of(cls, address: str) -> Self:
        """CheckpointError where the address names no model."""
        found = _ADDRESS.fullmatch(address)
        what = _NO_MODELS.get(address.removeprefix("hf://").partition("/")[0])
        if what is not None:
            raise CheckpointError(f"{address}: {what} of the hub, which holds no checkpoint; {_WANTED}")
        if found is None or _ID.fullmatch(f"{found['owner']}/{found['name']}") is None:
            raise CheckpointError(f"{address}: names no model of the hub; {_WANTED}")
        revision = unquote(found["revision"] or "")
        return cls(f"{found['owner']}/{found['name']}", revision, found["inside"] or "")

    @property
    def is_pinned(self) -> bool:
        return COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        revision = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"hf://{self.model}{revision}{'/' if self.inside else ''}{self.inside}"


def pinned(address: str, given: str = "") -> tuple[str, bool]:
    """An address with the commit that it stands for now, and whether the local cache had to tell it.

    CheckpointError where there is no such model or revision, MachineError where the hub cannot be asked;
    `given` is what they name, where no address was given.
    """
    place = HubAddress.of(address)
    try:
        commit, is_cached = _commit_of(place)
    except OSError as error:
        kind = CheckpointError if error.errno == errno.ENOENT else MachineError
        also = "no such file or folder here, and on the hub: " if given not in {"", address} else ""
        raise kind(f"{given or address}: {also}{error.strerror}") from error
    return str(HubAddress(place.model, commit, place.inside)), is_cached


class HubStore(Store):
    """One model at one commit.

    Files in the local cache are read there. Others are read in parts, and fetched whole into the cache by
    `local`. `hears` is called with the name of such a file, the bytes that are there and its size.
    """

    def __init__(self, address: str) -> None:
        place = HubAddress.of(address)
        self.hears: Callable[[str, int, int], None] | None = None
        self._at = place if place.is_pinned else HubAddress(place.model, _commit_of(place)[0])
        self._lock = threading.Lock()
        self._listed: dict[str, Facts] | None = None
        self._small: dict[str, bytes] = {}
        self._fetches: dict[str, _Fetch] = {}
        self._turns = threading.Semaphore(_AT_ONCE)

    def facts(self, key: str) -> Facts | None:
        return self._files().get(key)

    def below(self, folder: str) -> dict[str, Facts]:
        start = f"{folder}/" if folder else ""
        return {key: facts for key, facts in self._files().items() if key.startswith(start)}

    def read(self, key: str, begin: int, end: int, etag: str = "") -> bytes:  # noqa: ARG002  (a commit stays)
        nbytes = self._size(key)
        begin, end = min(begin, nbytes), min(end, nbytes)
        if begin >= end:
            return b""
        cached = self._cached(key)
        if cached is not None:
            with cached.open("rb") as file:
                file.seek(begin)
                return file.read(end - begin)
        if nbytes > _SMALL:
            return self._part(key, begin, end)
        with self._lock:
            found = self._small.get(key)
        if found is None:
            found = self._part(key, 0, nbytes)
            with self._lock:
                self._small[key] = found
        return found[begin:end]

    def local(self, key: str) -> Path:
        """The file in the cache, fetched now if need be; the next one of a row begins to come, too."""
        nbytes = self._size(key)
        cached = self._cached(key)
        if cached is None:
            fetch = self._fetch(key, nbytes)
            self._begin_next(key)
            try:
                cached = fetch.result(lambda done: self._tell(key, done, nbytes))
            finally:
                with self._lock:
                    self._fetches.pop(key, None)
        return cached

    def _files(self) -> dict[str, Facts]:
        with self._lock:
            if self._listed is None:
                self._listed = self._asked_files()
            return self._listed

    def _asked_files(self) -> dict[str, Facts]:
        """Every file of the commit; those in the cache where the hub cannot be asked."""
        try:
            info = _model_info(self._at, with_files=True)
        except OSError as error:
            found = _cached_files(self._at)
            if not found or error.errno not in _UNREACHABLE:
                raise
            return found
        return {one.rfilename: Facts(*_size_and_etag(one)) for one in info.siblings or ()}

    def _size(self, key: str) -> int:
        found = self.facts(key)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self._at}/{key}")
        return found.nbytes

    def _cached(self, key: str) -> Path | None:
        """The file in the local cache; OSError where it has another length there."""
        from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415

        found = try_to_load_from_cache(self._at.model, key, revision=self._at.revision)
        if not isinstance(found, str):
            return None
        nbytes, wanted = Path(found).stat().st_size, self._size(key)
        if nbytes != wanted:
            wrong = f"its copy in the cache has {nbytes} bytes, wanted {wanted}"
            raise OSError(errno.EIO, f"{wrong}; remove {os.path.realpath(found)}")
        return Path(found)

    def _part(self, key: str, begin: int, end: int) -> bytes:
        """Bytes of a file from the hub."""
        hub = _library(self._at)
        url = hub.hf_hub_url(self._at.model, key, revision=self._at.revision)
        asked = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}

        def get() -> bytes:
            headers = hub.utils.build_hf_headers() | asked
            how = {"timeout": _PATIENCE, "retry_on_exceptions": (), "retry_on_status_codes": ()}
            with hub.utils.http_stream_backoff("GET", url, headers=headers, **how) as answer:
                hub.utils.hf_raise_for_status(answer)
                is_part = answer.status_code == 206
                if not is_part and int(answer.headers.get("Content-Length", _SMALL + 1)) > _SMALL:
                    raise OSError(errno.EIO, "the server of the hub gives no parts of files")
                data: bytes = answer.read()
            return data if is_part else data[begin:end]

        data = _answered(self._at, get)
        if len(data) != end - begin:
            raise OSError(errno.EIO, f"the hub sent {len(data)} bytes, wanted {end - begin}; run it again")
        return data

    def _fetch(self, key: str, nbytes: int) -> _Fetch:
        """The file on its way; OSError where the cache has no room for it."""
        with self._lock:
            fetch = self._fetches.get(key)
            if fetch is None:
                _refuse_too_large(key, nbytes)
                fetch = self._fetches[key] = _Fetch(self._at, key, self._turns)
        return fetch

    def _begin_next(self, key: str) -> None:
        """Where the shard before this one is here, the one after it is probably wanted next."""
        found = _NUMBERED.fullmatch(key)
        if found is None:
            return
        before, number, after = found["before"], int(found["number"]), found["after"]
        last, following = (
            f"{before}{other:0{len(found['number'])}d}{after}" for other in (number - 1, number + 1)
        )
        files = self._files()
        if following in files and (number == 1 or last not in files or self._cached(last) is not None):
            with suppress(OSError):
                if self._cached(following) is None:
                    self._fetch(following, files[following].nbytes)

    def _tell(self, key: str, done: int, nbytes: int) -> None:
        if self.hears is not None:
            self.hears(key, done, nbytes)


class _Fetch:
    """A file on its way into the cache, in a thread of its own; it ends soon once nobody wants it."""

    def __init__(self, at: HubAddress, key: str, turns: threading.Semaphore) -> None:
        self._at, self._key, self._turns = at, key, turns
        self._done, self._unwanted = 0, False
        self._found: Path | BaseException | None = None
        self._over = threading.Event()
        self._worker = Worker(self._work, f"sparseprune-fetch-{key}", daemon=True)
        if not self._worker.begin():
            self._work()

    def result(self, tell: Callable[[int], None]) -> Path:
        """The file, once it is there; `tell` hears how many bytes are there meanwhile."""
        try:
            tell(self._done)
            while not self._over.wait(_AGAIN):
                tell(self._done)
        except BaseException:
            self._unwanted = True
            raise
        if isinstance(self._found, Path):
            return self._found
        raise self._found or OSError(errno.EIO, "not fetched")

    def _work(self) -> None:
        try:
            with self._turns:
                self._found = self._downloaded()
        except BaseException as error:  # noqa: BLE001  (raised again where it is waited for)
            self._found = error
        finally:
            self._over.set()

    def _downloaded(self) -> Path:
        hub = _library(self._at)
        fetch = self

        class Bar:
            """What huggingface_hub takes for a bar of tqdm."""

            def __init__(self, *_: object, **__: object) -> None:
                pass

            def __enter__(self) -> Self:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def __getattr__(self, name: str) -> Callable[..., None]:
                return lambda *_, **__: None

            def update(self, count: float | None = 1) -> None:
                fetch._advance(int(count or 0))

        def download() -> Path:
            kind: Any = Bar
            found = hub.hf_hub_download(
                self._at.model, self._key, revision=self._at.revision, tqdm_class=kind, etag_timeout=_PATIENCE
            )
            return Path(found)

        return _answered(self._at, download)

    def _advance(self, count: int) -> None:
        if self._unwanted:
            raise _UnwantedError
        self._done += count


class _UnwantedError(Exception):
    """Nobody waits for a file any more."""


def _library(at: HubAddress) -> Any:  # noqa: ANN401  (a module)
    """The package huggingface_hub, which then says nothing on stderr; a line where it is not installed."""
    try:
        import huggingface_hub  # noqa: PLC0415
        import huggingface_hub.errors  # noqa: PLC0415
        import huggingface_hub.utils  # noqa: PLC0415
    except ImportError as error:
        raise SparsepruneError(f"{at}: the hub is read through huggingface_hub; {INSTALL}") from error
    log: Any = huggingface_hub.utils.logging
    if log.get_verbosity() == log.WARNING:  # nobody chose another one
        log.set_verbosity(log.CRITICAL)
    return huggingface_hub


def _commit_of(place: HubAddress) -> tuple[str, bool]:
    """The commit of a revision, and whether the cache told it; it does where the hub cannot be asked."""
    if place.is_pinned:
        return place.revision, False
    cached = _cached_commit(place)
    try:
        sha = _model_info(place, pauses=() if cached else _PAUSES).sha
    except OSError as error:
        if cached is None or error.errno not in _UNREACHABLE:
            raise
        return cached, True
    if sha is None or COMMIT.fullmatch(sha) is None:
        raise OSError(errno.EIO, "the hub does not say which commit it is")
    return sha, False


def _model_info(
    place: HubAddress, *, with_files: bool = False, pauses: tuple[float, ...] = _PAUSES
) -> ModelInfo:
    hub, revision = _library(place), place.revision or "main"

    def ask() -> ModelInfo:
        found: ModelInfo = hub.HfApi().model_info(
            place.model, revision=revision, files_metadata=with_files, timeout=_PATIENCE
        )
        return found

    return _answered(place, ask, pauses)


def _size_and_etag(file: RepoSibling) -> tuple[int, str]:
    """As the server tells them for the file: of a large one the SHA-256, of a small one git's."""
    if file.lfs is not None:
        return file.lfs.size, file.lfs.sha256
    return file.size or 0, file.blob_id or ""


def _cached_folder(place: HubAddress) -> Path:
    _library(place)
    from huggingface_hub import constants  # noqa: PLC0415

    return Path(constants.HF_HUB_CACHE) / f"models--{place.model.replace('/', '--')}"


def _cached_commit(place: HubAddress) -> str | None:
    """The commit of a branch or tag when it was fetched last."""
    with suppress(OSError, UnicodeDecodeError):
        commit = (_cached_folder(place) / "refs" / (place.revision or "main")).read_text().strip()
        if COMMIT.fullmatch(commit) and (_cached_folder(place) / "snapshots" / commit).is_dir():
            return commit
    return None


def _cached_files(at: HubAddress) -> dict[str, Facts]:
    """The files of a commit that are in the cache; links lead to files that have the names of ETags."""
    folder = _cached_folder(at) / "snapshots" / at.revision
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            final = path.resolve()
            etag = final.name if path.is_symlink() else f"{path.stat().st_mtime_ns}"
            found[path.relative_to(folder).as_posix()] = Facts(final.stat().st_size, etag)
    return found


def _refuse_too_large(key: str, nbytes: int) -> None:
    from huggingface_hub import constants  # noqa: PLC0415

    cache = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (cache.absolute(), *cache.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if free < nbytes:
        raise OSError(
            errno.ENOSPC,
            f"{key} has {size(nbytes)}, and {size(free)} are free in {cache}, where it is fetched to; "
            "make room, or set HF_HUB_CACHE to a folder on another disk",
        )


def _answered(place: HubAddress, ask: Callable[[], Given], pauses: tuple[float, ...] = _PAUSES) -> Given:
    """What a question gives, which is asked again where the hub fails for a moment; errors in plain words."""
    for pause in pauses:
        with suppress(_MomentaryError), _plain_errors(place, again=True):
            return ask()
        time.sleep(pause)
    with _plain_errors(place, again=False):
        return ask()


class _Switch:
    """Whether huggingface_hub may use the network: never for models that run, as the user has it for us.

    It has one switch for the whole process, which is given back when the last question is answered.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asking = 0
        self._before = False

    @contextmanager
    def as_the_user_has_it(self) -> Iterator[None]:
        from huggingface_hub import constants  # noqa: PLC0415

        given = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
        with self._lock:
            if not self._asking:
                self._before = constants.HF_HUB_OFFLINE
                constants.HF_HUB_OFFLINE = given.upper() in {"1", "ON", "YES", "TRUE"}
            self._asking += 1
        try:
            yield
        finally:
            with self._lock:
                self._asking -= 1
                if not self._asking:
                    constants.HF_HUB_OFFLINE = self._before


_SWITCH = _Switch()


class _MomentaryError(Exception):
    """A failure that may be over soon."""


@contextmanager
def _plain_errors(place: HubAddress, *, again: bool) -> Iterator[None]:
    """OSErrors whose `strerror` says what failed and what to do; _MomentaryError to try it `again`."""
    errors = _library(place).errors
    try:
        with _SWITCH.as_the_user_has_it():
            yield
    except (_UnwantedError, SparsepruneError):
        raise
    except (OSError, errors.HTTPError, ValueError) as error:
        answer: Any = getattr(error, "response", None) if isinstance(error, errors.HfHubHTTPError) else None
        lost = isinstance(error, errors.HTTPError) and not isinstance(error, OSError)
        if again and (lost or (answer is not None and answer.status_code in _FAILING)):
            raise _MomentaryError from error
        raise OSError(*_told(place, error)) from error


def _told(place: HubAddress, error: Exception) -> tuple[int, str]:
    """The number of an error and its line."""
    hub = _library(place)
    errors, cause = hub.errors, error.__cause__ or error.__context__
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(cause, (OSError, errors.HTTPError)):
        error = cause  # it hides why the hub was not asked
    if isinstance(error, errors.HfHubHTTPError):
        return _refusal(place, error)
    if isinstance(error, errors.OfflineModeIsEnabled):
        advice = "unset it, or fetch the model before"
        return errno.ENETUNREACH, f"not in the local cache, and HF_HUB_OFFLINE forbids to fetch it; {advice}"
    if isinstance(error, OSError) and error.errno is not None:
        wrong = error.strerror or str(error)
        return error.errno, wrong if error.filename is None else f"{error.filename}: {wrong}; {_OTHER_CACHE}"
    if isinstance(error, errors.HTTPError):
        slow = " in time" if "Timeout" in type(error).__name__ else ""
        silent = f"the hub at {hub.constants.ENDPOINT} does not answer{slow}"
        return errno.EHOSTUNREACH, f"{silent}; check the network, or run it again later"
    if "hf_xet" in str(error):
        return errno.EIO, "files of more than 50 GB are fetched by hf_xet; pip install hf_xet"
    words = " ".join(str(error).split())[:_SHOWN]
    return errno.EIO, f"the hub sent something else than was asked for ({words}); run it again"


def _refusal(place: HubAddress, error: Any) -> tuple[int, str]:  # noqa: ANN401  (an error of the library)
    """As `_told`, for an answer that refuses."""
    hub = _library(place)
    page, errors = f"{hub.constants.ENDPOINT}/{place.model}", hub.errors
    # The first kind that fits: a gated model is one that was not found, to the library.
    kinds = (
        (
            errors.GatedRepoError,
            errno.EACCES,
            f"the model is gated; ask for access at {page}, then {_SIGN_IN}",
        ),
        (errors.RepositoryNotFoundError, errno.ENOENT, _NO_MODEL),
        (errors.RevisionNotFoundError, errno.ENOENT, f"no revision {place.revision!r}; {_REVISIONS}"),
        (errors.RemoteEntryNotFoundError, errno.ENOENT, "the hub has no such file at this commit"),
    )
    for kind, number, line in kinds:
        if isinstance(error, kind):
            return number, line
    status = error.response.status_code
    failing = errno.EIO, f"the hub answers with the error {status}; run it again later"
    return _STATUSES.get(status, failing)
