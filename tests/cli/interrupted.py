"""The command line in processes that are killed, interrupted, or have a broken disk, at a moment of choice.

    python -m tests.cli.interrupted          a server: JSON lines of commands in, JSON lines of endings out
    python -m tests.cli.interrupted COMMAND  one command, as JSON, in this process

The server loads everything once and forks for every command. Moments are counted in calls of the system that
touch data or names. Tests start both by `Commands` and `started`.
"""

import ctypes
import errno
import gc
import hashlib
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType, TracebackType
from typing import IO, Any, NoReturn, Self

import pytest
from msgspec.structs import replace

from sparseprune.checkpoint import StagedOutput, publish
from sparseprune.cli import signals
from sparseprune.errors import MachineError
from sparseprune.execution import reapply, schedule
from sparseprune.execution.regions import Limits, limits_of
from tests.faults import fill
from tests.limits import WAYS, force, narrow

ROOT = Path(__file__).parents[2]
WRITES = ("pwrite", "copy_file_range", "ftruncate")
SYNCS = ("fdatasync", "fsync")
NAMES = ("mkdir", "rename", "unlink", "rmdir", "swap")
# Moments of their own, never counted with the others: after a thread was started, before a piece is noted,
# before torch does a step of those that rebuild a matrix.
THREADS, NOTES, TORCH = ("start",), ("note",), ("where",)
EVERYTHING = ("preadv", *WRITES, *SYNCS, *NAMES)
_LONGEST = 300  # seconds that a command may take until it is killed
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a pool would not survive a fork


@dataclass(frozen=True)
class Moment:
    """What happens at the call numbered `at`, from 1, of the functions `on` of the module os, or of `swap`.

    `do` is "kill" (a write is torn), "interrupt" or "interrupt twice", "hang" (a library that does not return
    after SIGTERM), "fail" with a `code` of errno, "bug", or what `change` does to the file `path`.
    """

    do: str
    at: int
    on: tuple[str, ...] = EVERYTHING
    path: str = ""
    code: int = errno.EIO


@dataclass(frozen=True)
class Command:
    """`sparseprune WORDS` in the folder `home`, worked by one `way` in slabs and tiles of such a size.

    `memory` in flight replaces what --memory leaves. `slow` seconds are slept before every read. With
    `prompt` every piece is on disk and noted when the next one begins. `powerless`: root as any other user.
    `grace` seconds are left to the orderly end after a signal: more than the busiest machine needs.
    """

    home: str
    words: tuple[str, ...]
    way: str = ""
    slab: int = 64
    tile: int = 16
    memory: int = 0
    moment: Moment | None = None
    slow: float = 0.0
    prompt: bool = True
    powerless: bool = False
    version: str = ""
    grace: float = 60.0


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, or minus the signal that killed it, and its streams.

    `calls` of the system that were counted, bytes of tensors `read`, and bytes `written` to weights.
    """

    code: int
    out: str
    err: str
    calls: int = 0
    read: int = 0
    written: int = 0


class Commands:
    """The server, from the side of a test; a context manager."""

    def __enter__(self) -> Self:
        # What a tracer saw is lost where a fork ends: none is there.
        plain = {name: value for name, value in os.environ.items() if name != "COVERAGE_PROCESS_CONFIG"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.cli.interrupted"],
            cwd=ROOT,
            env=plain | _ONE_THREAD,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._server:
            pass

    def run(self, command: Command) -> Ended:
        if self._server.stdin is None or self._server.stdout is None:
            raise ValueError("the server has no pipes")
        self._server.stdin.write(json.dumps(asdict(command)) + "\n")
        self._server.stdin.flush()
        return Ended(**json.loads(self._server.stdout.readline()))


def started(command: Command) -> subprocess.Popen[str]:
    """The command in a process of its own, which the test may send signals to."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.cli.interrupted", json.dumps(asdict(command))],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> Ended:
    out, err = process.communicate(timeout=600)
    return Ended(process.returncode, out, err)


@dataclass
class _Counters:
    """Numbers that a process counts up and another one reads, also once the first one is dead."""

    memory: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 24))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, place: int, amount: int) -> int:
        with self.lock:
            total = self.numbers()[place] + amount
            self.memory[8 * place : 8 * place + 8] = total.to_bytes(8, "little")
        return total

    def numbers(self) -> list[int]:
        return [int.from_bytes(self.memory[begin : begin + 8], "little") for begin in (0, 8, 16)]


_CALLS, _READ, _WRITTEN = range(3)


def _owner(name: str) -> ModuleType:
    """The module whose function it is."""
    return publish if name == "swap" else os


class _System:
    """The functions of the module os that are counted, and that break at a moment."""

    def __init__(self, command: Command, counters: _Counters) -> None:
        self._command = command
        self._counters = counters
        self._real = {name: getattr(_owner(name), name) for name in EVERYTHING}
        for name in EVERYTHING:
            setattr(_owner(name), name, self._counting(name))
        real_start, real_note = threading.Thread.start, StagedOutput.note

        def start(thread: threading.Thread) -> None:
            real_start(thread)
            self._happen(THREADS)

        def note(output: StagedOutput, key: str, record: object, files: Any = None) -> None:
            self._happen(NOTES)
            real_note(output, key, record, files)

        patch = pytest.MonkeyPatch()
        patch.setattr(threading.Thread, "start", start)
        patch.setattr(StagedOutput, "note", note)
        if command.moment is not None and command.moment.on == TORCH:
            import torch

            real_where = torch.where

            def where(*args: Any) -> Any:
                self._happen(TORCH)
                return real_where(*args)

            patch.setattr(torch, "where", where)

    def _happen(self, on: tuple[str, ...]) -> None:
        moment = self._command.moment
        if moment is not None and moment.on == on and self._counters.add(_CALLS, 1) == moment.at:
            self._act(moment, "", ())

    def _counting(self, name: str) -> Callable[..., Any]:
        moment = self._command.moment
        counts = moment is None or name in moment.on

        def call(*args: Any, **keywords: Any) -> Any:
            number = self._counters.add(_CALLS, int(counts))
            if moment is not None and counts and number == moment.at:
                self._act(moment, name, args)
            if moment is not None and moment.do == "interrupt twice" and counts and number == moment.at + 2:
                os.kill(os.getpid(), signal.SIGINT)
            if name == "preadv" and self._command.slow:
                time.sleep(self._command.slow)
            # What a killed process has written stays, synced or not.
            done = None if name in SYNCS else self._real[name](*args, **keywords)
            self._measure(name, args, done)
            return done

        return call

    def _measure(self, name: str, args: tuple[Any, ...], done: Any) -> None:
        if name == "preadv":
            self._counters.add(_READ, done)
        if name == "copy_file_range" or (name == "pwrite" and args[2] and _is_weights(args[0])):
            self._counters.add(_WRITTEN, done)

    def _act(self, moment: Moment, name: str, args: tuple[Any, ...]) -> None:
        match moment.do:
            case "kill":
                if name == "pwrite":
                    self._real[name](args[0], args[1][: len(args[1]) // 2], args[2])
                os.kill(os.getpid(), signal.SIGKILL)
            case "interrupt" | "interrupt twice":
                os.kill(os.getpid(), signal.SIGINT)
            case "hang":
                threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
                hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)  # for minutes, without the interpreter
            case "fail":
                raise OSError(moment.code, os.strerror(moment.code))
            case "bug":
                raise ZeroDivisionError("a bug")
            case _:
                change(Path(self._command.home, moment.path), moment.do)


def change(path: Path, how: str) -> None:
    """Something happens to a file or a folder that a run uses, or to the disk that `path` is a folder of."""
    match how:
        case "truncate":
            os.truncate(path, path.stat().st_size - 9)
        case "grow":
            with path.open("ab") as file:
                file.write(b"{}")
        case "rewrite":
            with path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                (last,) = file.read(1)
                file.seek(-1, os.SEEK_END)
                file.write(bytes([last ^ 1]))
        case "replace":
            other = path.with_name(f"{path.name}.away")
            shutil.copy2(path, other)  # as large, and as old
            other.replace(path)
        case "remove":
            path.rename(path.with_name(f"{path.name}.away"))
        case "lock":
            path.chmod(0o555)
        case "fill":
            fill(path, 100)
        case _:
            raise ValueError(how)


def _is_weights(descriptor: int) -> bool:
    name = str(Path(f"/proc/self/fd/{descriptor}").readlink()).rpartition("/output/")[2]
    return name.endswith(".safetensors") and "masks" not in name


def _prepare(command: Command) -> None:
    """Small pieces, by one way, each noted at once."""

    def limits(memory: int, **others: Any) -> Limits:
        usual = limits_of(memory, **others)
        return replace(usual, slab=command.slab, tile=command.tile, memory=command.memory or usual.memory)

    def note(self: StagedOutput, key: str, record: object, files: Any = None) -> None:
        own(self, key, record, files)
        with suppress(MachineError):  # told by the flush that follows
            self.flush()

    own = StagedOutput.note
    patch = pytest.MonkeyPatch()
    patch.setattr(signals, "_GRACE", command.grace)
    patch.setattr(reapply, "limits_of", limits)
    patch.setattr(schedule, "limits_of", limits)
    if command.prompt:
        patch.setattr(StagedOutput, "note", note)
    if command.way:
        force(patch, command.way)
    if command.version:
        for module in ("api.pruning", "api.masked", "api.removing"):
            patch.setattr(f"sparseprune.{module}.__version__", command.version)
    if command.powerless:
        _give_up_powers()


def _give_up_powers() -> None:
    """Root becomes a user whom permissions bind: no capability is left."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


def _do(command: Command, counters: _Counters) -> None:
    """The command; ends with SystemExit, or with what nobody caught."""
    from sparseprune.cli import main

    signal.alarm(_LONGEST)
    # A shell that runs tests in the background lets them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(command.home)
    _prepare(command)
    _System(command, counters)
    sys.argv = ["sparseprune", *command.words]
    main()


def _serve() -> None:
    _load()
    for line in sys.stdin:
        counters = _Counters()
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                _exit_after(_read(line), counters)
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
            end = Ended(code, _text(out), _text(err), *counters.numbers())
        sys.stdout.write(json.dumps(asdict(end)) + "\n")
        sys.stdout.flush()


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


def _load() -> None:
    """Everything that commands import and compile, so that forks find it there."""
    import rich.live  # noqa: F401

    from sparseprune.cli import app as application
    from tests.commands import COMMAND, run
    from tests.samples import CHANNELS, TWO_OF_FOUR, mlp_tensors, write_shards, write_spec

    setattr(application, "app", COMMAND)  # noqa: B010  (no fork has to make it)
    with tempfile.TemporaryDirectory() as name:
        source = write_shards(Path(name, "in"), {"a.safetensors": mlp_tensors()})
        for number, way in enumerate(WAYS):
            spec = write_spec(Path(name), CHANNELS if way == "block_norms" else TWO_OF_FOUR)
            with pytest.MonkeyPatch.context() as patch:
                narrow(patch, 64, 16)
                force(patch, way)
                said = run("apply", source, spec, "-o", Path(name, str(number)))
            if said.code:
                raise RuntimeError(said.err)
    gc.collect()
    gc.freeze()


def _exit_after(command: Command, counters: _Counters) -> NoReturn:
    """As the interpreter ends a process, without taking down all that the server has loaded."""
    code: Any = 0
    try:
        _do(command, counters)
    except SystemExit as stop:
        code = stop.code
    except BaseException:  # noqa: BLE001  (the interpreter's own business)
        traceback.print_exc()
        code = 1
    getattr(threading, "_shutdown")()  # noqa: B009  (as the interpreter does; no type knows it)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _read(line: str) -> Command:
    document = json.loads(line)
    moment = document.pop("moment")
    document["words"] = tuple(document["words"])
    if moment is not None:
        moment = Moment(**{**moment, "on": tuple(moment["on"])})
    return Command(**document, moment=moment)


if __name__ == "__main__":
    if sys.argv[1:]:
        _do(_read(sys.argv[1]), _Counters())
    _serve()
