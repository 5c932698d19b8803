"""Where the text of a spec comes from: a file that was named, or one that ships with the package.

Reads text and knows where it lay (paths in a spec are relative to that directory), not what it means.
Called by the command line and by execution.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sparseprune.errors import SpecError
from sparseprune.spec.problems import listed, nearest, shown

LARGEST_SPEC = 1_000_000  # bytes: thousands of tables; what is larger was not meant as a spec
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class SpecSource:
    """The text of a spec, the name under which its problems are reported, and where it lies."""

    text: str
    source: str
    directory: Path


def find_spec(name_or_path: str | Path) -> SpecSource:
    """The spec at a path, else the shipped spec of that name; SpecError where there is neither."""
    path, shipped = Path(name_or_path), _shipped().get(str(name_or_path))
    if _exists(path) and not (shipped and path.is_dir()):
        return _read(path, str(path))
    if shipped:
        # Nobody's files lie beside a spec that ships: what it names is looked for where the command is run.
        return replace(_read(shipped, shipped.name), directory=Path.cwd())
    raise SpecError(_unknown(str(name_or_path)))


def list_specs() -> tuple[str, ...]:
    """The names of the specs that ship with the package, sorted."""
    return tuple(_shipped())


def _shipped() -> dict[str, Path]:
    """In a wheel the specs lie inside the package, in a source checkout beside it."""
    inside = _PACKAGE / "specs"
    directory = inside if inside.is_dir() else _PACKAGE.parent / "specs"
    return {path.stem: path for path in sorted(directory.glob("*.toml"), key=lambda path: path.stem)}


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except PermissionError:
        return True  # reading it says what is wrong
    except (OSError, ValueError):  # also a name that is too long, or has a null character in it
        return False
    return True


def _read(path: Path, source: str) -> SpecSource:
    try:
        with path.open("rb") as file:  # a pipe too, and what never ends is not read to its end
            content = file.read(LARGEST_SPEC + 1)
        if len(content) > LARGEST_SPEC:
            raise SpecError(f"{source}: larger than {LARGEST_SPEC:,} bytes; a spec is a page of TOML")
        text = content.decode("utf-8-sig")
    except IsADirectoryError as error:
        raise SpecError(f"{source}: this is a directory, wanted a spec, which is a TOML file") from error
    except OSError as error:
        raise SpecError(f"{source}: the spec cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        text = f"byte {error.start} is not UTF-8: save the spec as UTF-8 text"
        raise SpecError(f"{source}: {text}") from error
    return SpecSource(text, source, path.resolve().parent)


def _unknown(name: str) -> str:
    """Both readings of a name that is neither, with the shipped specs that it may mean."""
    names = list_specs()
    close = nearest(Path(name).name.removesuffix(".toml"), names, 3)
    there = f"did you mean {listed(close, 'or')}?" if close else "`sparseprune specs` lists those that do."
    return (
        f"{shown(name)} is neither a file nor a spec that ships with sparseprune; {there} "
        "A spec of your own is named by its path, such as path/to/spec.toml"
    )
