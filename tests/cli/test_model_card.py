"""The model card of an output, and the mark in its config.json, as a user finds them."""

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

import sparseprune
from sparseprune.api.explaining import Explained
from sparseprune.checkpoint.documents import strict_json
from tests.cli.removal import LLAMA, decoder, write
from tests.commands import ok, run, valid
from tests.samples import write_spec

OLD = "---\nlicense: mit\ntags:\n- text-generation\n---\n\n# My model\n\nIt writes.\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A decoder with a model card."""
    folder = write(tmp_path / "mine", decoder(), LLAMA)
    (folder / "README.md").write_text(OLD)
    return folder


def card_of(folder: Path) -> tuple[Any, str]:
    """The metadata of a card, and its text."""
    text = (folder / "README.md").read_bytes().decode(errors="surrogateescape")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_apply_tells_what_was_done_above_the_old_card(model: Path) -> None:
    ok("apply", model, "2of4", "-q")
    metadata, text = card_of(model.with_name("mine-pruned"))
    assert metadata == {
        "license": "mit",
        "tags": ["text-generation", "pruning", "sparse"],
        "library_name": "transformers",
    }
    lines = text.splitlines()
    report = json.loads((model.with_name("mine-pruned") / "sparseprune/report.json").read_text())
    totals = report["totals"]
    assert lines[3] == "# `mine`, pruned"
    assert f"with {totals['pruned']:,} of {totals['numel']:,} parameters (" in lines[5]
    assert f"| scope.matrix | 14 | {report['rules'][0]['scopes']:,} | 2 of 4 |" in text
    assert "- reached: 100.00% of the layers' matrices" in lines
    assert "sparseprune apply mine 2of4" in lines
    assert "sparseprune verify ." in lines
    assert 'covers = "matrices"' in lines
    assert text.endswith("# The model card of `mine`\n\n# My model\n\nIt writes.\n")


def test_words_of_the_command_are_told_without_places_on_the_machine(model: Path, tmp_path: Path) -> None:
    spec = write_spec(
        tmp_path,
        'version = 1\n[vars]\nn = 2\n[scope.a]\nstructure = "matrices"\nblock = [1, 1]\nshape = [1, 4]\n'
        'nnz = "n"\n',
    )
    ok("apply", model, spec, "--set", "n=1", "-q", "-o", tmp_path / "out", "--jobs", 1)
    _, text = card_of(tmp_path / "out")
    assert "sparseprune apply mine spec.toml --set n=1\n" in text
    for path in (tmp_path / "out/README.md", tmp_path / "out/config.json"):
        assert str(tmp_path) not in path.read_text()


def test_the_same_run_elsewhere_has_the_same_card(model: Path, tmp_path: Path) -> None:
    ok("apply", model, "2of4", "-q", "-o", tmp_path / "one", "--jobs", 1)
    (tmp_path / "there").mkdir()
    shutil.copytree(model, tmp_path / "there" / "mine")
    ok("apply", tmp_path / "there" / "mine", "2of4", "-q", "-o", tmp_path / "two", "--memory", "500MB")
    for name in ("README.md", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_card_that_an_earlier_run_wrote_stays_below(model: Path, tmp_path: Path) -> None:
    ok("apply", model, "2of4", "-q", "-o", tmp_path / "half")
    ok("apply", tmp_path / "half", "mlp-channels", "-q", "-o", tmp_path / "less")
    ok("remove", tmp_path / "half", "mlp-channels", "-q", "-o", tmp_path / "small")
    (metadata, earlier), (again, text), (_, small) = (
        card_of(tmp_path / name) for name in ("half", "less", "small")
    )
    assert again == metadata
    for name, each in (("pruned", text), ("made smaller", small)):
        heads = [line for line in each.splitlines() if line.startswith("# `") or line == "# My model"]
        assert heads == [f"# `half`, {name}", "# `mine`, pruned", "# My model"]
        assert each.endswith(earlier.lstrip("\n"))
        assert each.count("# The model card of ") == 1


def test_remove_tells_what_became_smaller(model: Path) -> None:
    ok("remove", model, "mlp-channels", "-q")
    metadata, text = card_of(model.with_name("mine-smaller"))
    assert metadata["tags"] == ["text-generation", "pruning"]
    config = json.loads((model.with_name("mine-smaller") / "config.json").read_text())
    assert (
        f"- `config.json`: `intermediate_size` {LLAMA['intermediate_size']} -> {config['intermediate_size']}"
        in text
    )
    assert "sparseprune remove mine mlp-channels" in text
    assert "verify" not in text


def test_lists_and_masks_are_told_by_their_names(model: Path, tmp_path: Path) -> None:
    ok("apply", model, "mlp-channels", "-q", "-o", tmp_path / "zeros")
    ok("remove", model, "--masks", tmp_path / "zeros", "-q", "-o", tmp_path / "small")
    (tmp_path / "rows.json").write_text(json.dumps([*range(8)]))
    ok("remove", model, "--vocabulary", tmp_path / "rows.json", "-q", "-o", tmp_path / "less")
    assert "sparseprune remove mine --masks zeros\n" in card_of(tmp_path / "small")[1]
    assert "sparseprune remove mine --vocabulary rows.json\n" in card_of(tmp_path / "less")[1]


def test_reapply_tells_which_masks_were_put_back(model: Path, tmp_path: Path) -> None:
    ok("apply", model, "2of4", "-q", "-o", tmp_path / "half")
    ok("reapply", model, tmp_path / "half", "--match", "**.mlp.**", "-q", "-o", tmp_path / "out")
    _, text = card_of(tmp_path / "out")
    assert "sparseprune reapply mine half --match '**.mlp.**'\n" in text
    assert "# `mine`, with its zeros put back" in text
    pruned = json.loads((tmp_path / "out/sparseprune/report.json").read_text())["totals"]["pruned"]
    assert f"they drop {pruned:,} of " in text


CARDS = {
    "none": None,
    "an empty one": b"",
    "front matter that is not closed": b"---\nlicense: mit\n# Model\n",
    "front matter that is no YAML": b"---\nlicense: [mit\n---\n# Model\n",
    "bytes that are no UTF-8": b"# Model\n\xff\xfe\x00",
    "line ends of Windows": b"---\r\nlicense: mit\r\n---\r\n# Model\r\n",
    "backticks": b"# Model\n```\ncode\n",
}


@pytest.mark.parametrize("name", CARDS)
def test_every_byte_of_an_old_card_stays(model: Path, name: str) -> None:
    old = CARDS[name]
    (model / "README.md").unlink()
    if old is not None:
        (model / "README.md").write_bytes(old)
    ok("apply", model, "2of4", "-q")
    metadata, _ = card_of(model.with_name("mine-pruned"))
    assert metadata["tags"] == ["pruning", "sparse"]
    new = (model.with_name("mine-pruned") / "README.md").read_bytes()
    if name == "line ends of Windows":
        assert metadata["license"] == "mit"
        assert new.endswith(b"# Model\r\n")
    else:
        assert new.endswith(old or b"<!-- sparseprune: end -->\n")


def test_a_folder_of_that_name_and_a_huge_card_are_copied_as_they_are(model: Path, tmp_path: Path) -> None:
    (model / "README.md").write_bytes(b"x" * 10_000_001)
    ok("apply", model, "2of4", "-q", "-o", tmp_path / "one")
    assert (tmp_path / "one/README.md").read_bytes() == b"x" * 10_000_001
    (model / "README.md").unlink()
    (model / "README.md").mkdir()
    (model / "README.md" / "a.txt").write_text("a")
    ok("apply", model, "2of4", "-q", "-o", tmp_path / "two")
    assert (tmp_path / "two/README.md/a.txt").read_text() == "a"


def test_nobody_reads_a_card_who_may_not_read_the_weights_or_the_old_card(
    model: Path, tmp_path: Path
) -> None:
    def mode() -> int:
        ok("apply", model, "2of4", "-q", "-o", tmp_path / "out", "--force")
        return stat.S_IMODE((tmp_path / "out/README.md").stat().st_mode)

    (model / "model.safetensors").chmod(0o644)
    (model / "README.md").chmod(0o640)
    assert mode() == 0o640
    (model / "README.md").chmod(0o644)
    assert mode() == 0o644
    (model / "model.safetensors").chmod(0o600)
    assert mode() == 0o600


def test_a_model_in_the_cache_of_the_hub_is_told_by_its_id(model: Path, tmp_path: Path) -> None:
    (model / "README.md").write_text("---\nbase_model: org/grandparent\n---\n")
    cached = tmp_path / "hub/models--org--a--b"
    (cached / "blobs").mkdir(parents=True)
    folder = cached / "snapshots/0123abc"
    folder.mkdir(parents=True)
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(cached / "blobs" / str(number))
        (folder / path.name).symlink_to(cached / "blobs" / str(number))
    before = {path: path.read_bytes() for path in cached.rglob("*") if path.is_file()}
    ok("apply", folder, "2of4", "-q", "-o", tmp_path / "out")
    metadata, text = card_of(tmp_path / "out")
    assert metadata["base_model"] == "org/a--b"
    assert "# `org/a--b`, pruned" in text
    assert json.loads((tmp_path / "out/config.json").read_text())["sparseprune"]["from"] == "org/a--b"
    assert not (tmp_path / "out/README.md").is_symlink()
    assert {path: path.read_bytes() for path in cached.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("named", "card", "base", "model_told"),
    [
        ("org/mine", OLD, "org/mine", "org/mine"),
        ("org/Mine", "---\nbase_model: org/other\n---\n", "org/Mine", "org/Mine"),
        ("org/other", OLD, "org/other", "mine"),
        ("org/other", "---\nbase_model: org/its\n---\n", "org/its", "mine"),
        ("/data/other", OLD, None, "mine"),
        ("other", OLD, None, "mine"),
        (3, OLD, None, "mine"),
    ],
)
def test_a_base_model_is_told_where_it_is_known(
    model: Path, named: object, card: str, base: str | None, model_told: str
) -> None:
    (model / "README.md").write_text(card)
    (model / "config.json").write_text(json.dumps({**LLAMA, "_name_or_path": named}))
    ok("apply", model, "2of4", "-q")
    metadata, text = card_of(model.with_name("mine-pruned"))
    assert metadata.get("base_model") == base
    assert f"# `{model_told}`, pruned" in text


def test_config_has_a_mark_and_keeps_every_other_byte(model: Path, tmp_path: Path) -> None:
    text = '{"model_type": "llama", "rms_norm_eps": 1.0E-5,\n\t"n": [1,2] }\n\n'
    (model / "config.json").write_text(text)
    ok("apply", model, "2of4", "-q", "-o", tmp_path / "out")
    marked = (tmp_path / "out/config.json").read_text()
    assert marked.startswith(text.rstrip().removesuffix("}").rstrip())
    mark = json.loads(marked).pop("sparseprune")
    assert (
        mark["spec_sha256"]
        == json.loads((tmp_path / "out/sparseprune/report.json").read_text())["spec_sha256"]
    )
    assert {key: mark[key] for key in ("command", "from", "spec")} == {
        "command": "apply",
        "from": "mine",
        "spec": "2of4",
    }
    ok("apply", tmp_path / "out", "4of8", "-q", "-o", tmp_path / "again")
    again = json.loads((tmp_path / "again/config.json").read_text())
    assert (again.pop("sparseprune")["spec"], again) == ("4of8", json.loads(text))


@pytest.mark.parametrize("text", ["{}", "{ }\n", "\n{\n}"])
def test_an_empty_config_gets_the_mark_alone(model: Path, tmp_path: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    spec = write_spec(
        tmp_path,
        'version = 1\n[scope.a]\ntensors = "**.up_proj.weight"\nblock = [1, 1]\nshape = [1, 4]\nnnz = 2\n',
    )
    ok("apply", model, spec, "-q", "-o", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text()).keys() == {"sparseprune"}


def test_a_file_alone_and_masks_alone_have_no_card(model: Path, tmp_path: Path) -> None:
    ok("apply", model / "model.safetensors", "2of4", "-q")
    assert not list(model.glob("*.md.*"))
    assert (model / "README.md").read_text() == OLD
    ok("mask", model, "2of4", "-q", "-o", tmp_path / "masks")
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == [
        "masks.safetensors",
        "report.json",
        "spec.toml",
    ]


def test_a_card_that_changes_while_it_is_read_ends_the_run(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Explained.card

    def changing(self: Explained, result: Any) -> bytes:
        (model / "README.md").write_text("other")
        return usual(self, result)

    monkeypatch.setattr(Explained, "card", changing)
    said = run("apply", model, "2of4", "-q")
    assert (said.code, "README.md: changed while it was read" in said.err) == (3, True)
    assert not model.with_name("mine-pruned").exists()


def line_of(*words: object) -> str:
    """What `inspect` says of how a checkpoint was made: the line below its table."""
    lines = ok("inspect", *words).out.splitlines()
    return next((line for line in lines if " by sparseprune " in line), "")


def test_inspect_tells_how_an_output_was_made(model: Path, tmp_path: Path) -> None:
    version = sparseprune.__version__
    ok("apply", model, "2of4", "-q", "-o", tmp_path / "half")
    ok("remove", tmp_path / "half", "mlp-channels", "-q", "-o", tmp_path / "small")
    ok("reapply", model, tmp_path / "half", "-q", "-o", tmp_path / "again")
    ok("apply", model / "model.safetensors", "2of4", "-q", "-o", tmp_path / "m.safetensors")
    assert line_of(tmp_path / "half") == f"pruned by sparseprune {version} with 2of4 from mine"
    assert line_of(tmp_path / "small") == f"made smaller by sparseprune {version} with mlp-channels from half"
    assert line_of(tmp_path / "again") == f"zeros put back by sparseprune {version} from mine"
    assert line_of(tmp_path / "m.safetensors") == f"pruned by sparseprune {version} from model.safetensors"
    assert line_of(model) == ""
    found = valid(ok("inspect", tmp_path / "half", "--json").out, "inspect")
    assert found["made_by"] == {"version": version, "command": "apply", "model": "mine", "spec": "2of4"}
    assert "made_by" not in valid(ok("inspect", model, "--json").out, "inspect")


def test_the_mark_outlives_what_else_tells_of_the_run(model: Path, tmp_path: Path) -> None:
    ok("apply", model, "2of4", "-q", "-o", tmp_path / "half")
    shutil.rmtree(tmp_path / "half/sparseprune")
    assert line_of(tmp_path / "half").endswith(" with 2of4 from mine")


@pytest.mark.parametrize(
    "mark", [3, "x", [], {}, {"version": 1, "command": "apply"}, {"version": "1", "command": "rm"}]
)
def test_a_mark_that_makes_no_sense_tells_nothing(model: Path, mark: object) -> None:
    (model / "config.json").write_text(json.dumps({**LLAMA, "sparseprune": mark}))
    assert line_of(model) == ""


def test_a_folder_may_be_called_anything(model: Path, tmp_path: Path) -> None:
    folder = model.rename(tmp_path / os.fsdecode(b"in\xff`x\n"))
    ok("apply", folder, "2of4", "-q", "-o", tmp_path / "out")
    mark = strict_json((tmp_path / "out/config.json").read_text())["sparseprune"]
    assert mark["from"] == "in\\udcff`x\\n"
    assert "# `` in\\udcff`x\\n ``, pruned" in card_of(tmp_path / "out")[1]


def test_a_shard_alone_tells_what_was_done_to_it(model: Path, tmp_path: Path) -> None:
    def marked(path: Path) -> dict[str, str]:
        with safe_open(path, framework="pt") as opened:
            return {key: text for key, text in opened.metadata().items() if key.startswith("sparseprune.")}

    ok("apply", model, "2of4", "-q", "-o", tmp_path / "half")
    alone = tmp_path / "alone.safetensors"
    shutil.copy(tmp_path / "half/model.safetensors", alone)
    found = marked(alone)
    assert {**found, "sparseprune.spec_sha256": ""} == {
        "sparseprune.version": sparseprune.__version__,
        "sparseprune.command": "apply",
        "sparseprune.spec": "2of4",
        "sparseprune.spec_sha256": "",
    }
    made_by = json.loads(ok("inspect", alone, "--json").out)["made_by"]
    assert (made_by["command"], made_by["spec"], "from" in made_by) == ("apply", "2of4", False)
    # A later command replaces the mark in the room that it has; put back, zeros have the name of no spec.
    ok("apply", alone, "mlp-channels", "-q", "-o", tmp_path / "less.safetensors", "--no-masks")
    assert marked(tmp_path / "less.safetensors")["sparseprune.spec"] == "mlp-channels"
    assert (tmp_path / "less.safetensors").stat().st_size == alone.stat().st_size
    ok("reapply", alone, tmp_path / "half", "-q", "-o", tmp_path / "again.safetensors")
    again = marked(tmp_path / "again.safetensors")
    assert (again["sparseprune.command"], "sparseprune.spec" in again) == ("reapply", False)
    # A removal tells of itself in place of what made its input, without room for more.
    ok("remove", tmp_path / "half", "mlp-channels", "-q", "-o", tmp_path / "smaller")
    smaller = tmp_path / "smaller/model.safetensors"
    names = ("command", "spec")
    assert [marked(smaller)[f"sparseprune.{name}"] for name in names] == ["remove", "mlp-channels"]
    assert 0 < int.from_bytes(smaller.read_bytes()[:8], "little") < 4096
