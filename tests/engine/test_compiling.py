"""Machine code is kept, loaded without numba, and made anew where it is missing, damaged or out of date."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseprune.engine.kernels import compiling, counting, selecting, sums
from sparseprune.engine.kernels.compiling import Loop, compiled, inlined
from sparseprune.engine.kernels.formats import FORMATS, Format
from tests.commands import python

LOOPS = sorted(
    {
        loop.function.__name__: loop
        for module in (counting, selecting, sums)
        for loop in vars(module).values()
        if isinstance(loop, Loop)
    }.items()
)
USE = """
import sys, numpy as np
from sparseprune.engine.kernels import compiling
from pathlib import Path
folder = Path(sys.argv[1])
compiling._folders = lambda: iter([folder])
from sparseprune.engine.kernels.selecting import cut_blocks
bits, keep = np.arange(8, dtype=np.uint16), np.array([1, 0] * 4, dtype=np.uint8)
cut_blocks(bits, keep, 1, keep.copy())
print(bits.tolist(), "numba" in sys.modules)
"""


@inlined
def twice(number: Any) -> Any:
    return number + number


@inlined
def four_times(number: Any) -> Any:
    return twice(twice(number))


@compiled("int64(K*, int64)")
def four_times_the_sum(numbers: Any, size: Any) -> Any:
    total = 0
    for i in range(size):
        total += four_times(numbers[i])
    return total


def use(folder: Path) -> str:
    """What a process says that keeps machine code in a folder: the result, and was numba imported."""
    done = python("-c", USE, folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(("name", "loop"), LOOPS, ids=[name for name, _ in LOOPS])
def test_the_machine_code_of_every_loop_does_without_numba(name: str, loop: Loop) -> None:
    """Code that needs it is not kept."""
    kind = "uint64" if "words" in loop.function.__code__.co_varnames else "uint16"
    kind = "float32" if "wide" in name else kind
    assert compiling._address(loop, kind)
    file_name = f"{name.strip('_')}-{kind}-{compiling._digest(loop, kind)}.o"
    kept = next(folder / file_name for folder in compiling._folders() if (folder / file_name).exists())
    content = kept.read_bytes()
    assert not compiling.needs_numba(content)
    assert compiling._linked(compiling._checked(content))


def test_a_second_process_loads_what_the_first_one_compiled(tmp_path: Path) -> None:
    assert use(tmp_path) == "[0, 0, 2, 0, 4, 0, 6, 0] True"
    (kept,) = tmp_path.iterdir()
    assert use(tmp_path) == "[0, 0, 2, 0, 4, 0, 6, 0] False"
    kept.write_bytes(kept.read_bytes()[:-1])  # a write that did not reach the disk
    assert use(tmp_path) == "[0, 0, 2, 0, 4, 0, 6, 0] True"
    (kept,) = tmp_path.iterdir()
    kept.chmod(0o602)  # others could have written it
    assert use(tmp_path) == "[0, 0, 2, 0, 4, 0, 6, 0] True"


def test_machine_code_that_others_could_have_written_is_not_trusted(tmp_path: Path) -> None:
    kept = tmp_path / "kept.o"
    kept.write_bytes(b"code")
    for mode in (0o600, 0o644):
        kept.chmod(mode)
        assert compiling._trusted(kept) == b"code"
    for mode in (0o620, 0o602):
        kept.chmod(mode)
        with pytest.raises(PermissionError, match="others may write machine code there"):
            compiling._trusted(kept)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
def test_machine_code_of_another_user_is_not_trusted(tmp_path: Path) -> None:
    kept = tmp_path / "kept.o"
    kept.write_bytes(b"code")
    os.chown(kept, 65534, 65534)
    with pytest.raises(PermissionError, match="others may write machine code there"):
        compiling._trusted(kept)


def test_where_nothing_can_be_kept_code_is_compiled(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("")
    assert use(taken) == "[0, 0, 2, 0, 4, 0, 6, 0] True"
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_code_of_another_source_signature_or_dtype_has_another_name() -> None:
    loop = selecting._cut_elements
    other = Loop(loop.function, loop.signature.replace("K*", "K*,"), reorders=False)
    names = {
        compiling._digest(loop, "uint16"),
        compiling._digest(loop, "uint8"),
        compiling._digest(other, "uint16"),
    }
    assert len(names) == 3
    assert compiling._digest(loop, "uint16") != compiling._digest(counting._zeros, "uint16")


def test_the_users_cache_folder_comes_second(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert list(compiling._folders())[1] == tmp_path / "sparseprune"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert list(compiling._folders())[1].is_absolute()
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert list(compiling._folders())[1] == Path(os.path.expanduser("~/.cache/sparseprune"))  # noqa: PTH111


def test_loops_call_what_is_inlined_also_through_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "_folders", lambda: iter([tmp_path]))
    fresh = Loop(four_times_the_sum.function, four_times_the_sum.signature, reorders=False)
    assert fresh(np.arange(5, dtype=np.uint16), 5) == 40


@pytest.mark.parametrize("form", [FORMATS["F32"], FORMATS["F64"]], ids=lambda form: form.name)
def test_loops_read_values_of_both_widths(
    form: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "_folders", lambda: iter([tmp_path]))
    fresh = Loop(counting._energy.function, counting._energy.signature, reorders=True)
    bits = np.array([3.0, -0.0, -4.0], dtype=f"f{form.itemsize}").view(form.pattern)
    assert fresh(bits, bits.size, *form.numbers) * form.scale**2 == 25.0


def test_an_array_with_gaps_is_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        four_times_the_sum(np.arange(6, dtype=np.uint16)[::2], 3)


def test_words_of_loops_mean_nothing_outside() -> None:
    with pytest.raises(TypeError, match="compiled loops alone"):
        compiling.value_of(1, 1, 0, 1)
