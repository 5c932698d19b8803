"""Every page keeps its word: its commands run, what they print is what the page shows, its specs bind.

The blocks of a page run one after the other in a folder that `demo` made: `console` with its output, `sh` as
a script whose output the next `text` block shows, `python` as it stands, `toml` as a spec for the decoder.
"""

import math
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from sparseprune.cli.app import app
from sparseprune.spec import list_specs
from tests.commands import ok, python
from tests.stores import upload

ROOT = Path(__file__).parents[1]
GUIDE = sorted((ROOT / "specs" / "guide").glob("*.md"))
PAGES = [ROOT / "README.md", *GUIDE]
OTHERS = [ROOT / "tests" / "README.md", ROOT / "sparseprune" / "README.md", ROOT / "specs" / "README.md"]
README = (ROOT / "README.md").read_text()
INSTALL = "python3 -m venv .venv && .venv/bin/pip install '.[calibrate]' && .venv/bin/"
CHECKS = "bash .ci/run"
FINETUNE = f"""#!{sys.executable}
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

source, target = sys.argv[1:]
torch.manual_seed(0)
model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
tokens = torch.tensor(tokenizer(open("corpus.txt").read(100_000))["input_ids"])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(10):
    begins = torch.randint(len(tokens) - 64, (8,))
    batch = torch.stack([tokens[begin : begin + 64] for begin in begins])
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained(target)
tokenizer.save_pretrained(target)
"""
JQ = f"""#!{sys.executable}
import json, sys

found = json.load(sys.stdin)
for key in sys.argv[1].strip(".").split("."):
    found = found[key]
print(json.dumps(found))
"""


def blocks(page: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page in their order, each with its language."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)


NUMBER = r"\d+\.\d+|\d+e-\d+"
NEAR = 0.05  # processors round unlike each other: what they train and measure differs by some percent


def same(line: str) -> str:
    """A line without times and rates; where it tells an error, without the spaces that align its numbers."""
    line = re.sub(r"\d+(\.\d+)? s, [\d.,]+ [\w ]+/s", "T", line.rstrip())
    return re.sub(" +", " ", line) if tells(line) or line.startswith(" " * 20) else line


def tells(line: str) -> bool:
    """Whether a line tells an error, a loss or a mean."""
    return re.search(r"error|\+-|nats|loss", line) is not None


def agree(shown: str, real: str) -> bool:
    """Whether two lines are the same, but for some percent of what is measured."""
    one, other = same(shown), same(real)
    if not tells(one) or re.sub(NUMBER, "", one) != re.sub(NUMBER, "", other):
        return one == other
    pairs = zip(re.findall(NUMBER, one), re.findall(NUMBER, other), strict=True)
    return all(math.isclose(float(a), float(b), rel_tol=NEAR) for a, b in pairs)


def shows(shown: list[str], real: list[str]) -> bool:
    """Whether the shown lines are the real ones, where `...` stands for any number of lines.

    >>> shows(["a", "...", "d"], ["a", "b", "c", "d"]), shows(["a", "c"], ["a", "b", "c"])
    (True, False)
    """
    if not shown:
        return not real
    if shown[0] == "...":
        return any(shows(shown[1:], real[skipped:]) for skipped in range(len(real) + 1))
    return bool(real) and agree(shown[0], real[0]) and shows(shown[1:], real[1:])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `demo` leaves in its folder."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    ok("demo", folder)
    return folder


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with `sparseprune`, `finetune` for any tool, and `jq` where it is not installed."""
    scripts = {"sparseprune": f'#!/bin/sh\nexec {sys.executable} -m sparseprune "$@"\n', "finetune": FINETUNE}
    if shutil.which("jq") is None:
        scripts["jq"] = JQ
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in scripts.items():
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return folder


def lines_of(script: str, folder: Path, programs: Path, *, errors: int) -> list[str]:
    """What a script prints, without the progress of slow commands; `errors` says where its stderr goes."""
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    environment |= {"PYTHONPATH": str(ROOT), "PATH": f"{programs}:{os.environ['PATH']}"}
    environment |= {"RAY_ADDRESS": "local"}  # not a cluster of other tests
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        stdout=subprocess.PIPE, stderr=errors, text=True, check=False, cwd=folder, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return [line for line in done.stdout.splitlines() if not re.match(r"sparseprune: \w+ \d+%, ", line)]


def check_session(session: str, folder: Path, programs: Path) -> Path:
    """Run the commands of a console and compare what they print; gives the folder where the session ends."""
    whole = session.startswith(f"$ {INSTALL}")  # what it prints has commands in it
    for command in re.split(r"\A\$ " if whole else r"^\$ ", session, flags=re.MULTILINE)[1:]:
        first, *shown = command.splitlines()
        if first.startswith("cd "):
            folder /= first.removeprefix("cd ")
        elif first != CHECKS:
            real = lines_of(first.removeprefix(INSTALL), folder, programs, errors=subprocess.STDOUT)
            assert shows(shown, real), "\n".join([f"$ {first}", *real])
    return folder


@pytest.fixture
def elsewhere(page: Path, made: Path, request: pytest.FixtureRequest) -> None:
    """The bucket `models` and the model `example/decoder` of a hub, for pages that speak of them."""
    if "s3://models" in page.read_text():
        request.getfixturevalue("bucket")  # from now on addresses lead to the server
        server = request.getfixturevalue("s3_server")
        urllib.request.urlopen(urllib.request.Request(f"{server}/models", method="PUT")).close()
        upload(made / "decoder", "s3://models/decoder")
        request.getfixturevalue("hub").put("example/decoder", made / "decoder")


@pytest.mark.usefixtures("untraced", "elsewhere")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_does_what_it_says(
    page: Path, made: Path, tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    if page in GUIDE:
        shutil.copytree(made, folder)
    else:
        folder.mkdir()
    printed: list[str] = []
    for language, block in blocks(page.read_text()):
        if language == "console":
            folder = check_session(block, folder, programs)
        elif language == "sh":
            printed = lines_of(block, folder, programs, errors=subprocess.PIPE)
        elif language == "text":
            assert shows(block.splitlines(), printed), "\n".join(printed)
        elif language == "python":
            with monkeypatch.context() as here:
                here.chdir(folder)
                exec(compile(block, page.name, "exec"), {})
        elif language == "toml":
            (folder / "spec.toml").write_text(block)
            lines_of(
                "sparseprune apply decoder spec.toml -q -o by-spec --force",
                folder,
                programs,
                errors=subprocess.PIPE,
            )
        else:
            pytest.fail(f"{page.name} has a block of {language or 'no language'}, which nothing runs")


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_every_link_leads_to_a_page_and_a_heading(page: Path) -> None:
    for link in re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    ):
        if not link.startswith("http"):
            file, _, heading = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            assert target.exists(), link
            if heading:
                assert heading in anchors(target.read_text()), link


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as the usual renderers make them.

    >>> sorted(anchors("# All keys\\n## In place of a file: `--text`"))
    ['all-keys', 'in-place-of-a-file---text']
    """
    headings = re.findall(r"^#+ (.+)$", page, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_ci_runs_the_checks_that_the_pages_name() -> None:
    assert f"`{CHECKS}`" in README
    script = (ROOT / ".ci/run").read_text()
    for check in ("ruff check", "ruff format --check", "mypy", "lint-imports", "pytest"):
        assert check in script


def test_commands_and_shipped_specs_are_all_named() -> None:
    commands = {command.callback.__name__ for command in app.registered_commands if command.callback}
    assert set(re.findall(r"^\| `sparseprune (\w+)", README, flags=re.MULTILINE)) == commands
    for name in list_specs():
        assert f"`{name}`" in README


def test_promises_name_tests_that_exist() -> None:
    for path in re.findall(r"`([\w/.]+\.py|[\w/]+/)`", (ROOT / "tests" / "README.md").read_text()):
        assert (ROOT / "tests" / path).exists(), path


def test_the_stand_in_for_jq_finds_what_jq_would(tmp_path: Path) -> None:
    (tmp_path / "jq").write_text(JQ)
    done = python(tmp_path / "jq", ".totals.lost", input='{"totals": {"lost": 12}}')
    assert done.stdout == "12\n"


def test_a_wrong_line_of_output_is_noticed() -> None:
    assert not shows(["pruned 1", "..."], ["pruned 2", "more"])
    assert not shows(["pruned 1"], ["pruned 1", "more"])
    assert not shows(["output error 0.3"], ["output error 0.1"])
    assert shows(["output error 0.1234"], ["output error 0.1191"])
