"""The text of a spec: from a file, or from a spec that ships with the package.

Knows the directory of the text (paths in a spec are relative to it), not its meaning. Called by commands.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sparseprune.errors import SpecError
from sparseprune.spec.problems import listed, nearest, shown

LARGEST_SPEC = 1_000_000  # bytes: thousands of tables; a larger file is not meant as a spec
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class SpecSource:
    """The text of a spec, the name under which its problems are reported, and its directory."""

    text: str
    source: str
    directory: Path


def find_spec(name_or_path: str | Path) -> SpecSource:
    """The spec at a path, else the shipped spec of that name; SpecError if there is neither."""
    path, shipped = Path(name_or_path), _shipped().get(str(name_or_path))
    if _exists(path) and not (shipped and path.is_dir()):
        return _read(path, str(path))
    if shipped:
        # No user's files lie beside a shipped spec: its paths are relative to the current directory.
        return replace(_read(shipped, shipped.name), directory=Path.cwd())
    raise SpecError(_unknown(str(name_or_path)))


def list_specs() -> tuple[str, ...]:
    """The names of the specs that ship with the package, sorted."""
    return tuple(_shipped())


def _shipped() -> dict[str, Path]:
    """Paths of shipped specs by name: inside the package in a wheel, beside it in a source checkout."""
    inside = _PACKAGE / "specs"
    directory = inside if inside.is_dir() else _PACKAGE.parent / "specs"
    return {path.stem: path for path in sorted(directory.glob("*.toml"), key=lambda path: path.stem)}


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except PermissionError:
        return True  # reading it gives the error
    except (OSError, ValueError):  # also a name that is too long or has a null character
        return False
    return True


def _read(path: Path, source: str) -> SpecSource:
    try:
        with path.open("rb") as file:  # may be a pipe, or endless
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
    """The error for a name that is neither a file nor a shipped spec, with the nearest shipped specs."""
    names = list_specs()
    close = nearest(Path(name).name.removesuffix(".toml"), names, 3)
    there = f"did you mean {listed(close, 'or')}?" if close else "`sparseprune specs` lists those that do."
    return (
        f"{shown(name)} is neither a file nor a spec that ships with sparseprune; {there} "
        "A spec of your own is named by its path, such as path/to/spec.toml"
    )
