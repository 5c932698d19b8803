"""Loops become machine code: compiled by numba, kept on disk, loaded without numba.

Importing numba takes longer than pruning a gigabyte, so compiled loops are kept as object files, in the
package's cache folder or in the user's, and linked into later processes by llvmlite alone. If nothing can be
kept, every process compiles again. Knows no loop.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import stat
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_KEY = "K"
_C_TYPES: dict[str, Any] = {
    "int64": ctypes.c_int64,
    "uint64": ctypes.c_uint64,
    "uint32": ctypes.c_uint32,
    "uint16": ctypes.c_uint16,
    "uint8": ctypes.c_uint8,
    "float32": ctypes.c_float,
    "float64": ctypes.c_double,
}
# Symbols that only a process that imported numba has: no object file that is kept may need them.
_FOREIGN = (b"NRT_", b"numba_", b"PyErr", b"PyGILState")
_LOCK = threading.Lock()
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True)
class Loop:
    """A function over memory: contiguous arrays are passed as pointers, sizes as numbers.

    `signature` has numba's types, the result's first: "int64(K*, K, int64)", where K is the dtype of the
    first array of a call and `*` marks an array. Releases the interpreter's lock. It must not use what could
    raise (min, max, range with a step that is no constant), as its machine code would need numba.
    """

    function: Callable[..., Any]
    signature: str
    reorders: bool
    _loaded: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *arguments: Any) -> Any:  # noqa: ANN401  (numbers and arrays; a number or None)
        """Run it; ValueError for an array that is not contiguous."""
        first = next(argument for argument in arguments if isinstance(argument, np.ndarray))
        kind = first.dtype.name
        function = self._loaded.get(kind) or self._load(kind)
        return function(*(_pointer(one) if isinstance(one, np.ndarray) else one for one in arguments))

    def _load(self, kind: str) -> Any:  # noqa: ANN401
        """The machine code for one dtype of keys as a ctypes function."""
        with _LOCK:
            if kind not in self._loaded:
                result, *parameters = self._types(kind)
                c_result = _C_TYPES.get(result)
                c_types = [_c_type(each) for each in parameters]
                address = _address(self, kind)
                self._loaded[kind] = ctypes.CFUNCTYPE(c_result, *c_types)(address)
            return self._loaded[kind]

    def _types(self, kind: str) -> list[str]:
        result, _, rest = self.signature.partition("(")
        words = [result, *(word.strip() for word in rest.rstrip(")").split(","))]
        return [kind + word[1:] if word[:1] == _KEY else word for word in words]


def compiled(signature: str) -> Callable[[Callable[..., Any]], Loop]:
    """Makes a function a Loop; it may call functions that are `inlined`."""
    return lambda function: Loop(function, signature, reorders=False)


def compiled_sum(signature: str) -> Callable[[Callable[..., Any]], Loop]:
    """As `compiled`, for sums of floats whose last bits may depend on the width of the machine's vectors."""
    return lambda function: Loop(function, signature, reorders=True)


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a function that loops call; it is compiled with them."""
    function.__dict__["inlined"] = True
    return function


def value_of(pattern: Any, magnitude: Any, shift: Any, infinity: Any) -> Any:  # noqa: ANN401, ARG001
    """|x| / scale in float64 of the bits of a float, by the `numbers` of its Format; for compiled loops.

    NaN becomes infinite, except in F64.
    """
    raise TypeError("value_of is for compiled loops alone")


def _pointer(array: np.ndarray[Any, Any]) -> int:
    if not array.flags.c_contiguous:
        raise ValueError("a loop takes contiguous arrays")
    return array.ctypes.data


def _c_type(word: str) -> Any:  # noqa: ANN401
    return ctypes.c_void_p if word.endswith("*") else _C_TYPES[word]


def _address(loop: Loop, kind: str) -> int:
    """The address of the machine code, from a kept file or compiled now."""
    name = f"{loop.function.__name__.strip('_')}-{kind}-{_digest(loop, kind)}.o"
    for folder in _folders():
        with suppress(OSError, ValueError, RuntimeError):
            return _linked(_checked(_trusted(folder / name)))
    return _compile(loop, kind, name)


def _compile(loop: Loop, kind: str, file_name: str) -> int:
    """Compile by numba, and keep the result if possible."""
    import numba  # noqa: PLC0415  (only where nothing was kept)

    result, *parameters = (_numba_type(word) for word in loop._types(kind))  # noqa: SLF001  (same module)
    cfunc: Any = numba.cfunc  # its stub knows fewer options than it takes
    compiler = cfunc(
        result(*parameters),
        nopython=True,
        error_model="numpy",
        fastmath={"reassoc"} if loop.reorders else False,
    )
    callback = compiler(_with_jitted(loop.function))
    _KEPT_ALIVE.append(callback)
    with suppress(OSError, AttributeError):
        # numba has no public way to the bytes; if this one is gone, every process compiles.
        code = callback._library._get_compiled_object()  # noqa: SLF001
        if not needs_numba(code):
            _keep(file_name, callback._wrapper_name.encode() + b"\0" + code)  # noqa: SLF001
    return int(callback.address)


def needs_numba(code: bytes) -> bool:
    """Whether an object file needs symbols that only a process that imported numba has."""
    return any(word in code for word in _FOREIGN)


_KEPT_ALIVE: list[Any] = []
"""The owners of machine code, which must live as long as the process."""


def _numba_type(word: str) -> Any:  # noqa: ANN401
    from numba import types  # noqa: PLC0415

    if word.endswith("*"):
        return types.CPointer(_numba_type(word[:-1]))
    return getattr(types, word)


def _with_jitted(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the inlined ones that it names compiled, as numba wants them."""
    import numba  # noqa: PLC0415

    names = dict(function.__globals__)
    for name in function.__code__.co_names:
        value = names.get(name)
        if value is value_of:
            names[name] = _value_intrinsic()
        elif isinstance(value, FunctionType) and "inlined" in value.__dict__:
            names[name] = numba.njit(error_model="numpy", inline="always")(_with_jitted(value))
    code = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    code.__module__ = function.__module__
    return code


def _value_intrinsic() -> Any:  # noqa: ANN401
    """The code of `value_of`; the method `view` of numbers would add error handling."""
    from llvmlite import ir  # noqa: PLC0415
    from numba import types  # noqa: PLC0415
    from numba.extending import intrinsic  # noqa: PLC0415

    @intrinsic
    def value(_: Any, pattern: Any, magnitude: Any, shift: Any, infinity: Any) -> Any:  # noqa: ANN401, ARG001
        def code(__: Any, builder: Any, ___: Any, arguments: Any) -> Any:  # noqa: ANN401
            key = builder.and_(arguments[0], arguments[1])
            if pattern.bitwidth == 64:
                return builder.bitcast(key, ir.DoubleType())
            single = builder.bitcast(
                builder.shl(builder.zext(key, ir.IntType(32)), arguments[2]), ir.FloatType()
            )
            finite = builder.icmp_unsigned("<", key, arguments[3])
            wide = builder.fpext(single, ir.DoubleType())
            return builder.select(finite, wide, ir.Constant(ir.DoubleType(), float("inf")))

        return types.float64(pattern, pattern, types.uint32, pattern), code

    return value


def _linked(content: bytes) -> int:
    """The address of the function in an object file that was kept."""
    import llvmlite.binding as llvm  # noqa: PLC0415  (not needed to read about a checkpoint)

    name, _, code = content.partition(b"\0")
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    engine = llvm.create_mcjit_compiler(
        llvm.parse_assembly(""), llvm.Target.from_default_triple().create_target_machine()
    )
    engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _KEPT_ALIVE.append(engine)
    address = engine.get_function_address(name.decode())
    if not address:
        raise ValueError(f"{name!r} is not in its object file")
    return int(address)


def _digest(loop: Loop, kind: str) -> str:
    """A digest of what machine code depends on: its module, this one, the compiler, the processor."""
    import llvmlite.binding as llvm  # noqa: PLC0415

    source = Path(loop.function.__code__.co_filename).read_bytes() + Path(__file__).read_bytes()
    features = sorted(llvm.get_host_cpu_features().items())
    versions = (version("numba"), version("llvmlite"), version("numpy"), sys.implementation.cache_tag)
    parts = (kind, loop.signature, llvm.get_host_cpu_name(), repr(features), repr(versions))
    return hashlib.sha256(source + "\0".join(parts).encode()).hexdigest()[:24]


def _folders() -> Iterator[Path]:
    """Folders for machine code, the best one first; a relative XDG_CACHE_HOME counts as none."""
    yield Path(__file__).parent / "__pycache__"
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    with suppress(RuntimeError):
        yield (home if home.is_absolute() else Path.home() / ".cache") / "sparseprune"


def _keep(name: str, content: bytes) -> None:
    """Write a file whole or not at all, in the first folder that can be written to."""
    for folder in _folders():
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".", suffix=".o")
            with os.fdopen(descriptor, "wb") as file:
                file.write(hashlib.sha256(content).digest() + content)
            Path(temporary).replace(folder / name)
            return


def _trusted(path: Path) -> bytes:
    """The content of a file; OSError where others than this user, root or our owner could write it."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        owners = (
            {os.geteuid(), 0, Path(__file__).stat().st_uid} if hasattr(os, "geteuid") else {status.st_uid}
        )
        if not stat.S_ISREG(status.st_mode) or status.st_mode & _OTHERS_WRITE or status.st_uid not in owners:
            raise PermissionError(f"{path}: others may write machine code there")
        return file.read()


def _checked(content: bytes) -> bytes:
    """The machine code of a kept file; ValueError if it is damaged."""
    digest, kept = content[:32], content[32:]
    if hashlib.sha256(kept).digest() != digest:
        raise ValueError("the file is damaged")
    return kept
