"""Every recipe in recipes/ runs, on tiny models with the names that it uses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import merge
from merge import methods
from merge.recipe.read import Recipe, read_recipe

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.yml"))


def names_of(recipe: Recipe) -> list[str]:
    """The models that a recipe reads, bases first."""
    found: dict[str, None] = {}
    for stage in recipe.stages:
        bases = [stage.model.base_model, *(s.base_model for s in stage.model.slices or [])]
        sources = [s for part in stage.model.slices or [] for s in part.sources]
        entries = [e for m in (stage.model.modules or {}).values() for e in m.models or []]
        everything = (*(stage.model.models or []), *sources, *entries)
        listed = [r for e in everything for r in (e.model, e.statistics)]
        found.update(dict.fromkeys(str(r) for r in (*bases, *listed) if r is not None))
    return [name for name in found if name not in {s.name for s in recipe.stages}]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_it_runs_and_loads(
    recipe: Path,
    tmp_path: Path,
    llamas: Callable[[str], list[Path]],
    t5s: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = read_recipe(recipe)
    has_encoder = "encoder" in (read.final.model.modules or {})
    models = t5s if has_encoder else llamas("bfloat16")
    for name, folder in zip(names_of(read), models, strict=False):
        shutil.copytree(folder, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    merge.apply(recipe, "out")
    kind = AutoModelForSeq2SeqLM if has_encoder else AutoModelForCausalLM
    loaded = kind.from_pretrained("out", dtype="auto")
    assert all(p.isfinite().all() for p in loaded.parameters())
    assert (tmp_path / "out" / "merge_recipe.yml").read_text() == recipe.read_text()


def test_every_method_has_a_recipe() -> None:
    used = {stage.model.merge_method for path in RECIPES for stage in read_recipe(path).stages}
    assert used == set(methods.registry())
