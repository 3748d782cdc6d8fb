"""The examples of docs/training.md run, one after another."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import merge
from merge.recipe.read import parse_recipe

PAGE = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)


def test_the_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    known: dict[str, object] = {}
    for language, code in BLOCKS:
        if language == "python":
            exec(code, known)
    assert "<- chosen" in capsys.readouterr().out
    assert merge.open("delta").space == "delta"
    average, model = known["average"], known["model"]
    assert isinstance(average, merge.WeightAverage) and isinstance(model, torch.nn.Module)
    assert torch.equal(model[0].weight, average.average()["0.weight"])  # type: ignore[index]


def test_the_recipe_is_one() -> None:
    (text,) = (code for language, code in BLOCKS if language == "yaml")
    assert parse_recipe(text, "docs").final.model.merge_method == "regmean"


def test_the_commands_are_there() -> None:
    from merge_cli.app import cli

    lines = re.findall(r"^\$ merge (\S+) (.*)$", PAGE, re.MULTILINE)
    assert lines
    for name, rest in lines:
        options = {o for p in cli.commands[name].params for o in p.opts}
        assert {w for w in rest.split() if w.startswith("-")} <= options
