"""From the text of a spec, in a file or shipped with the package, to a Spec: whatever is wrong, all at once.

Knows the directory of the text (paths in a spec are relative to it), and how each problem is worded. Knows no
checkpoint: a Spec may still not fit one. Called by commands.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from sparseprune.errors import SpecError, size
from sparseprune.spec.checking import check_spec
from sparseprune.spec.expressions import read_variables, typed_value
from sparseprune.spec.problems import Problems, listed, nearest, shown, suggestion
from sparseprune.spec.schema import (
    BUDGETS,
    COVERS,
    KINDS,
    VERSION,
    ReconstructTable,
    ScoreTable,
    Spec,
    SpecTable,
    Table,
    WrongValueError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

LARGEST_SPEC = 1_000_000  # bytes: thousands of tables; a larger file is not meant as a spec
_FEW_SPECS = 3  # that are named as having a variable
_PACKAGE = Path(__file__).resolve().parents[1]
# Earlier names of shipped specs, by family; a name by structure binds all of them.
ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "2:4": "2of4",
        "4:8": "4of8",
        "unstructured-row": "unstructured",
        **dict.fromkeys(("bert-2of4", "vit-2of4"), "2of4"),
        **dict.fromkeys(
            ("bert-heads", "vit-heads", "gpt2-heads", "decoder-gqa-heads", "phi3-gqa-heads"), "heads"
        ),
        "decoder-gqa-heads-global": "heads-global",
        **{f"{family}-mlp-channels": "mlp-channels" for family in ("bert", "vit", "gpt2", "phi3", "decoder")},
        "decoder-mlp-channels-global": "mlp-channels-global",
        **dict.fromkeys(("moe-experts", "gpt-oss-experts", "llama4-experts"), "experts"),
        "moe-expert-channels": "expert-channels",
        "decoder-layers": "layers",
    }
)


class SpecSource(Struct, frozen=True):
    """The text of a spec, the name under which its problems are reported, its directory; whether it ships."""

    text: str
    source: str
    directory: Path
    shipped: bool = False


def find_spec(name_or_path: str | Path) -> SpecSource:
    """The spec at a path, else the shipped spec of that name or alias; SpecError if there is neither."""
    name = str(name_or_path)
    path = name_or_path if isinstance(name_or_path, Path) else Path(name_or_path)
    shipped = _shipped().get(ALIASES.get(name, name))
    if _exists(path) and not (shipped and path.is_dir()):
        return _read(path, str(path))
    if shipped:
        # No user's files lie beside a shipped spec: its paths are relative to the current directory.
        return replace(_read(shipped, shipped.name), directory=Path.cwd(), shipped=True)
    raise SpecError(_unknown(str(name_or_path)))


def list_specs() -> tuple[str, ...]:
    """The names of the specs that ship with the package, sorted."""
    return tuple(_shipped())


def _shipped() -> dict[str, Path]:
    """Paths of shipped specs by name: inside the package in a wheel, beside it in a source checkout."""
    inside = _PACKAGE / "specs"
    directory = inside if inside.is_dir() else _PACKAGE.parent / "specs"
    return {path.stem: path for path in sorted(directory.glob("*.toml"), key=lambda path: path.stem)}


def _in_shipped(variable: str) -> str:
    """The end of a text about a variable that a spec lacks: the few shipped specs that have it.

    >>> _in_shipped("n"), _in_shipped("zzz")
    ('; among the shipped specs nofm and vnm have it', '')
    """
    texts = {name: path.read_text(encoding="utf-8") for name, path in _shipped().items()}
    having = [name for name, text in texts.items() if variable in tomllib.loads(text).get("vars", {})]
    if not 0 < len(having) <= _FEW_SPECS:
        return ""
    return f"; among the shipped specs {listed(having)} {'have' if len(having) > 1 else 'has'} it"


def _exists(path: Path) -> bool:
    if "://" in str(path):
        return True  # an address, no name: reading it gives the error
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
            raise SpecError(f"{source}: larger than {size(LARGEST_SPEC)}; a spec is a page of TOML")
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
    close = nearest(Path(name).name.removesuffix(".toml"), (*list_specs(), *ALIASES), 3)
    close = list(dict.fromkeys(ALIASES.get(each, each) for each in close))
    there = f"did you mean {listed(close, 'or')}?" if close else "`sparseprune specs` lists those that do."
    return (
        f"{shown(name)} is neither a file nor a spec that ships with sparseprune; {there} "
        "A spec of your own is named by its path, such as path/to/spec.toml"
    )


AnyTable = TypeVar("AnyTable", bound=Table)
_SINGLE = ("version", "covers", "vars", "score", "reconstruct")  # at the top beside the kinds of tables
_MOST_ERRORS = 100  # of one table that are reported
_TABLE_NAME = re.compile(r"[A-Za-z0-9_-]+")
# tomllib reads a dotted key in time that grows with the square of its parts.
_MOST_PARTS = 100
_PART = r"""(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*"""
_LONG_KEY = re.compile(rf"(?:^|[{{,\[])[ \t]*(?:{_PART}){{{_MOST_PARTS}}}", re.MULTILINE)


def parse_spec(
    text: str,
    source: str = "spec.toml",
    directory: Path = Path(),
    overrides: Mapping[str, str] = MappingProxyType({}),
) -> Spec:
    """Parse the text of a spec; SpecError with every problem, each named by `source`, table and key.

    Paths in the spec are relative to `directory`. `overrides` are values for names in `[vars]` and for
    budgets such as `scope.proj.nnz`, each typed as TOML or as an expression.
    """
    document = _load(text, source)
    problems = Problems(source)
    _check_version(document, problems)
    if "version" in document:
        problems.raise_if_any()  # the rest may have another meaning in another version
    _check_top_level(document, problems)
    declared = {kind: _object(document.get(kind)) for kind in KINDS}
    declared, of_variables = _with_budgets(declared, overrides, problems)
    spec = Spec(
        source,
        directory,
        read_variables(document.get("vars"), of_variables, problems, _in_shipped),
        _read_common("score", ScoreTable, document, problems),
        _read_common("reconstruct", ReconstructTable, document, problems),
        _read_tables(declared, problems),
        _read_covers(document, problems),
    )
    names = {kind: tuple(tables) for kind, tables in declared.items()}
    check_spec(spec, {**names, "vars": tuple(_object(document.get("vars")))}, problems)
    problems.raise_if_any()
    return spec


def _load(text: str, source: str) -> dict[str, Any]:
    long_key = _LONG_KEY.search(text)
    if long_key is not None:
        line = text.count("\n", 0, long_key.start() + 1) + 1
        found = f"the key on line {line} has more than {_MOST_PARTS} parts"
        raise SpecError(f"{source}: {found}, wanted 3 at most")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        last_line = text.count("\n") + 1
        end = f"at line {last_line}, the end of the document"
        reason = str(error).replace("at end of document", end)
        raise SpecError(f"{source}: this is not TOML: {reason}") from error
    except RecursionError as error:
        raise SpecError(f"{source}: this cannot be read as TOML: it is nested too deeply") from error
    except ValueError as error:  # a number too long to convert
        raise SpecError(f"{source}: this cannot be read as TOML: {error}") from error


def _check_version(document: dict[str, Any], problems: Problems) -> None:
    if "version" not in document:
        problems.add("", "version", f"missing; write version = {VERSION} in the first line")
        return
    version = document["version"]
    if type(version) is not int or version != VERSION:
        problems.add("", "version", f"found {shown(version)}, this release reads version = {VERSION}")


def _check_top_level(document: dict[str, Any], problems: Problems) -> None:
    for key, value in document.items():
        if key in KINDS:
            if not isinstance(value, dict):
                wanted = f"tables [{key}.NAME] with names you choose"
                problems.add("", key, f"found {shown(value)}, wanted {wanted}")
        elif key not in _SINGLE:
            is_table = isinstance(value, dict | list)
            what, place = ("table", f"[{key}]") if is_table else ("key", key)
            known = [*KINDS, *_SINGLE[2 if is_table else 1 :]]  # neither version nor covers is a table
            problems.add("", place, f"unknown {what}{suggestion(key, known)}")
            problems.leave_open("", nearest(key, known))


def _read_covers(document: dict[str, Any], problems: Problems) -> str:
    """Which matrices the spec is about, by default all."""
    found = document.get("covers", COVERS[0])
    if found not in COVERS:
        problems.add("", "covers", f"found {shown(found)}, wanted {listed(map(shown, COVERS), 'or')}")
    return str(found)


def _read_common(
    key: str, model: type[AnyTable], document: dict[str, Any], problems: Problems
) -> AnyTable | None:
    """A table that applies to all rules without one of their own."""
    value = document.get(key)
    if value is None:
        return None
    if not isinstance(value, dict):
        problems.add("", key, f"found {shown(value)}, wanted a table: write [{key}] above its keys")
        return None
    return _read_table(key, model, value, problems)


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _with_budgets(
    declared: dict[str, dict[str, Any]], overrides: Mapping[str, str], problems: Problems
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The tables with other values for budgets that they have, and overrides without a dot in the name."""
    tables, others = {kind: {**named} for kind, named in declared.items()}, {}
    budgets = {
        f"{kind}.{name}.{key}": (kind, name, key)
        for kind, named in declared.items()
        for name, table in named.items()
        for key in _object(table).keys() & BUDGETS
    }
    for name, text in overrides.items():
        if name in budgets:
            kind, table, key = budgets[name]
            tables[kind][table] = {**tables[kind][table], key: typed_value(text)}
        elif "." in name:
            problems.add("", f"--set {name}", f"the spec has no such budget{suggestion(name, budgets)}")
        else:
            others[name] = text
    return tables, others


def _read_tables(declared: dict[str, dict[str, Any]], problems: Problems) -> dict[str, SpecTable]:
    """The tables of all kinds by their places; those that cannot be read become problems."""
    tables: dict[str, SpecTable] = {}
    for kind, name in ((kind, name) for kind, named in declared.items() for name in named):
        values, place = declared[kind][name], f"{kind}.{name}"
        if not isinstance(values, dict):
            text = f"found {shown(values)}, wanted a table: write [{kind}.NAME] above its keys"
            problems.add(kind, name, text)
        elif not _TABLE_NAME.fullmatch(name):
            problems.add(place, "", "a table's name is made of letters, digits, - and _")
        else:
            tables[place] = _read_table(place, KINDS[kind], values, problems)
    return tables


def _read_table(
    place: str, model: type[AnyTable], values: dict[str, Any], problems: Problems, within: str = ""
) -> AnyTable:
    """One table with the tables in it; `within` is its key if it is inside another table.

    Wrong keys are reported, left open for later checks and have their defaults. A misspelt key is reported
    as an unknown key alone, not also as a missing one.
    """
    unknown = [key for key in values if key not in model.keys][:_MOST_ERRORS]
    meant = {name for key in unknown for name in nearest(key, model.keys)}
    read: dict[str, object] = {}
    for name, key in model.keys.items():
        value = values.get(name)
        if name not in values:
            if key.required and name not in meant:
                problems.add(place, within + name, f"missing; wanted {key.wanted}")
        elif key.table is not None and isinstance(value, dict):
            inner = _read_table(place, key.table, value, problems, f"{name}.")
            if not problems.is_open(place, *(f"{name}.{each}" for each in inner.essential)):
                read[name] = inner
        else:
            try:
                read[name] = key.read(value)
            except WrongValueError as error:
                for text in error.args[:_MOST_ERRORS] or (f"found {shown(value)}, wanted {key.wanted}",):
                    problems.add(place, within + name, text)
    for name in unknown:
        problems.add(place, within + name, f"unknown key{suggestion(name, model.keys)}")
    needed = {name for name, key in model.keys.items() if key.required or name in values or name in meant}
    problems.leave_open(place, [within + name for name in needed - read.keys()])
    return model(read)
