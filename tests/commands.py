"""The command line in this process or in one of its own, and the documents that it prints."""

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import typer.main
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from sparseprune.cli.app import app
from sparseprune.results.fields import Document


@dataclass(frozen=True)
class Said:
    """What a command left behind: its exit code and its two streams."""

    code: int
    out: str
    err: str


COMMAND = typer.main.get_command(app)
"""Made once: to make it takes longer than most commands of tests do."""


def run(*words: object) -> Said:
    """`sparseprune WORDS` in this process; an exception that is no exit is a bug and is raised."""
    code: Any = 0
    with CliRunner().isolation() as (out, err, _):
        try:
            COMMAND.main([str(word) for word in words], prog_name="sparseprune")
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
        return Said(code, *(stream.getvalue().decode(errors="replace") for stream in (out, err)))


def ok(*words: object) -> Said:
    """`sparseprune WORDS`, which succeeds."""
    said = run(*words)
    assert said.code == 0, said.err
    return said


def silent(*words: object) -> Said:
    """`sparseprune WORDS`, which succeeds and says nothing on stderr."""
    said = run(*words)
    assert (said.code, said.err) == (0, "")
    return said


def refused(*words: object) -> Said:
    """`sparseprune WORDS`, which is wrong use: nothing is on stdout."""
    said = run(*words)
    assert (said.code, said.out) == (2, ""), said.err
    return said


def valid(text: str, name: str) -> Any:
    """The document of this text, which has the schema of this name."""
    document = json.loads(text)
    schema(name).validate(document)
    return document


def python(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python WORDS` in a process of its own."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, **options)


def imported(code: str) -> set[str]:
    """The modules that are there after this code."""
    done = python("-c", f"{code}\nimport sys; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def loaded(*words: object) -> tuple[int, set[str]]:
    """The exit code of `sparseprune WORDS`, and the large libraries that it loads."""
    done = python("-c", _LOADED, *words)
    return done.returncode, set(done.stderr.splitlines()[-1].split())


_LOADED = """
import subprocess
import sys
from sparseprune.cli import main
sys.argv = ["sparseprune", *sys.argv[1:]]
try:
    main()
finally:
    print("", *{"torch", "numba", "numpy"} & {*sys.modules}, file=sys.stderr)
"""


def as_data(result: Document) -> Any:
    """A result as whoever reads its JSON has it."""
    return json.loads(result.to_json())


@cache
def schema(name: str) -> Any:
    """What validates by a shipped JSON schema; made once, to check it takes longer than most documents."""
    text = files("sparseprune.report").joinpath(f"schemas/{name}.schema.json").read_text()
    Draft202012Validator.check_schema(json.loads(text))
    return Draft202012Validator(json.loads(text))
