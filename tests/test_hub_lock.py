"""A lock file pins models of the Hub to their commits: what is pushed later changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

import merge
from merge.applying import apply_plan, plan_recipe
from tests.conftest import MakeModel
from tests.faults.conftest import files_of
from tests.hub import Hub
from tests.pushing import Push, state


@pytest.fixture
def recipe(hub: Hub, push: Push, make_model: MakeModel, tmp_path: Path) -> Path:
    """An average of two models on the Hub."""
    for seed in (0, 1):
        push(merge.open(make_model(f"m{seed}", state(seed))), repo=f"me/m{seed}")
    text = "merge_method: linear\nmodels: [{model: me/m0}, {model: me/m1@main}]\n"
    (tmp_path / "r.yml").write_text(text + "parameters: {weight: 1}\n")
    return tmp_path / "r.yml"


def test_the_commits_of_then_are_read_again(
    hub: Hub, push: Push, recipe: Path, make_model: MakeModel, tmp_path: Path
) -> None:
    apply_plan(plan_recipe(recipe), tmp_path / "first")
    text = (tmp_path / "first" / "merge.lock.yml").read_text()
    for name in ("me/m0", "me/m1"):
        assert f"{name}: {hub.repos[name].head.sha}" in text
    push(merge.open(make_model("other", state(7))), repo="me/m0")
    apply_plan(plan_recipe(tmp_path / "first" / "merge.lock.yml"), tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "first")
    apply_plan(plan_recipe(recipe), tmp_path / "new")
    name = "model.safetensors"
    assert (tmp_path / "new" / name).read_bytes() != (tmp_path / "first" / name).read_bytes()
