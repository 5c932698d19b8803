"""`demo`: runs without anything, keeps nothing unless told to, and makes a checkpoint that loads."""

import tempfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparseprune
from tests.commands import ok, refused


def test_demo_shows_its_commands_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    said = ok("demo")
    commands = [line for line in said.out.splitlines() if line.startswith("$ ")]
    assert commands == [
        "$ sparseprune apply decoder 2of4 -o decoder-half",
        "$ sparseprune inspect decoder-half",
        "$ sparseprune apply decoder mlp-channels -o decoder-channels",
        "$ sparseprune inspect decoder-channels",
    ]
    assert "satisfied: 2:4 by 14 tensors, 4:8 by 14 tensors" in said.out
    assert "pruned 49,152 of 131,392 parameters (37.41%)" in said.err
    assert list(tmp_path.iterdir()) == []


def test_demo_keeps_a_folder_and_transformers_loads_what_is_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    ok("demo", folder)
    assert sorted(path.name for path in folder.iterdir()) == ["decoder", "decoder-channels", "decoder-half"]
    dense = AutoModelForCausalLM.from_pretrained(folder / "decoder")
    pruned = AutoModelForCausalLM.from_pretrained(folder / "decoder-channels")
    masks = sparseprune.load_masks(folder / "decoder-channels")
    with torch.inference_mode():
        parameters = dict(dense.named_parameters())
        for name, mask in masks.items():
            parameters[name].mul_(mask)
        tokens = torch.arange(12).view(2, 6)
        assert torch.equal(dense(tokens).logits, pruned(tokens).logits)


def test_demo_refuses_a_folder_that_is_there(tmp_path: Path) -> None:
    said = refused("demo", tmp_path)
    assert said.err == f"sparseprune: {tmp_path}: exists already; name a folder that is not there yet\n"
