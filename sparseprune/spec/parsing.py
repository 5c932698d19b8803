"""TOML text -> Spec: reads every table by its model and reports whatever is wrong, all at once.

Turns what tomllib and pydantic say into lines of one wording. Knows no checkpoint: what `parse_spec`
returns may still not fit one. Called by the pipeline.
"""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from sparseprune.errors import SpecError
from sparseprune.spec.checking import check_spec
from sparseprune.spec.problems import Problems, nearest, shown, suggestion
from sparseprune.spec.schema import (
    KINDS,
    OWN_WORDS,
    VERSION,
    BlockCouplingTable,
    BlockTable,
    ScopeCouplingTable,
    ScopeTable,
    Spec,
    Table,
)

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

AnyTable = TypeVar("AnyTable", bound=Table)
_TABLE_NAME = re.compile(r"[A-Za-z0-9_-]+")


def parse_spec(text: str, source: str = "spec.toml") -> Spec:
    """Read the text of a spec; SpecError with every problem, each named by `source`, table and key."""
    document = _load(text, source)
    problems = Problems(source)
    _check_version(document, problems)
    problems.raise_if_any()
    _check_top_level(document, problems)
    declared = {kind: _tables(document.get(kind)) for kind in KINDS}
    spec = Spec(
        source,
        _read_tables("block", BlockTable, declared, problems),
        _read_tables("block_coupling", BlockCouplingTable, declared, problems),
        _read_tables("scope", ScopeTable, declared, problems),
        _read_tables("scope_coupling", ScopeCouplingTable, declared, problems),
    )
    if any(nearest(key, ["scope"]) for key in document.keys() - KINDS.keys()):
        problems.raise_if_any()  # the rules stand under a misspelt name: what follows would be guesses
    check_spec(spec, {kind: tuple(tables) for kind, tables in declared.items()}, problems)
    problems.raise_if_any()
    return spec


def _load(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        last_line = text.count("\n") + 1
        end = f"at line {last_line}, the end of the document"
        reason = str(error).replace("at end of document", end)
        raise SpecError(f"{source}: this is not TOML: {reason}") from error
    except (ValueError, RecursionError) as error:  # a number too long to convert, brackets nested too deep
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
                problems.add(
                    "", key, f"found {shown(value)}, wanted tables [{key}.NAME] with names you choose"
                )
        elif key != "version":
            what, place = ("table", f"[{key}]") if isinstance(value, dict | list) else ("key", key)
            problems.add("", place, f"unknown {what}{suggestion(key, KINDS)}")


def _tables(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _read_tables(
    kind: str, model: type[AnyTable], declared: dict[str, dict[str, Any]], problems: Problems
) -> dict[str, AnyTable]:
    """The tables of a kind that can be read; the others are problems."""
    tables: dict[str, AnyTable] = {}
    for name, values in declared[kind].items():
        if not isinstance(values, dict):
            problems.add(
                kind, name, f"found {shown(values)}, wanted a table: write [{kind}.NAME] above its keys"
            )
        elif not _TABLE_NAME.fullmatch(name):
            problems.add(f"{kind}.{name}", "", "a table's name is made of letters, digits, - and _")
        else:
            try:
                tables[name] = model.model_validate(values)
            except ValidationError as error:
                for details in _without_misspelt(error.errors(include_url=False), model):
                    problems.add(f"{kind}.{name}", *_worded(details, model, values))
    return tables


def _without_misspelt(errors: list[ErrorDetails], model: type[Table]) -> list[ErrorDetails]:
    """A key that is missing because it is misspelt is told once, as the unknown key that it is."""
    unknown = [str(details["loc"][0]) for details in errors if details["type"] == "extra_forbidden"]
    meant = {name for key in unknown for name in nearest(key, model.model_fields)}
    return [details for details in errors if details["type"] != "missing" or details["loc"][0] not in meant]


def _worded(details: ErrorDetails, model: type[Table], values: dict[str, Any]) -> tuple[str, str]:
    """The key at fault and what to say about it."""
    key = str(details["loc"][0])
    if details["type"] == "extra_forbidden":
        return key, f"unknown key{suggestion(key, model.model_fields)}"
    if details["type"] == OWN_WORDS:
        return key, str(details["msg"])
    wanted = model.model_fields[key].description
    if details["type"] == "missing":
        return key, f"missing; wanted {wanted}"
    return key, f"found {shown(values[key])}, wanted {wanted}"
