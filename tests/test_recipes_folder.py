"""Every recipe in recipes/ runs, on tiny models with the names that it uses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import merge
from merge.recipe.schema import read_recipe

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.yml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_it_runs_and_loads(
    recipe: Path,
    tmp_path: Path,
    llamas: Callable[[str], list[Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = read_recipe(recipe).model
    names = dict.fromkeys([model.base_model, *(m.model for m in model.models)])
    for name, folder in zip([n for n in names if n], llamas("bfloat16"), strict=False):
        shutil.copytree(folder, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    merge.apply(recipe, "out")
    loaded = AutoModelForCausalLM.from_pretrained("out", dtype="auto")
    assert all(p.isfinite().all() for p in loaded.parameters())
    assert (tmp_path / "out" / "merge_recipe.yml").read_text() == recipe.read_text()
