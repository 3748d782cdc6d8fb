"""The lock file of an output makes it again, byte for byte, or says why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import merge
from merge import applying
from merge.ir.reference import parse_reference
from merge.recipe.pinned import Lock, LockedInput, lock_text, pinned, read_lock

from .faults.conftest import files_of

MakeModel = Callable[..., Path]


@pytest.fixture
def recipe(make_model: MakeModel, tmp_path: Path) -> Path:
    draw = torch.Generator().manual_seed(5)
    for name in ("base", "a", "b"):
        make_model(name, {f"layers.{i}.w": torch.randn(30, 40, generator=draw) for i in range(3)})
    models = "".join(f"  - model: {tmp_path}/{n}\n" for n in "ab")
    text = f"merge_method: dare_linear\nbase_model: {tmp_path}/base\nmodels:\n{models}"
    (tmp_path / "r.yml").write_text(text + "parameters: {weight: 0.5, density: 0.5}\n")
    return tmp_path / "r.yml"


def made(path: Path, out: Path, **options: Any) -> dict[str, bytes]:
    """The files of what a recipe or a lock file makes."""
    applying.apply_plan(applying.plan_recipe(path, **options), out)
    return files_of(out)


OPTIONS: dict[str, Any] = {
    "seed": 7,
    "dtype": "bfloat16",
    "shard_size": "5kB",
    "settings": ["parameters.density=0.25"],
    "licence": "mit",
}


def test_a_lock_file_makes_the_same_bytes(recipe: Path, tmp_path: Path) -> None:
    first = made(recipe, tmp_path / "first", **OPTIONS)
    assert made(tmp_path / "first" / "merge.lock.yml", tmp_path / "again") == first
    plain = made(recipe, tmp_path / "plain")
    assert plain["merge_manifest.json"] != first["merge_manifest.json"]
    assert made(tmp_path / "plain" / "merge.lock.yml", tmp_path / "plain2") == plain


def test_what_is_given_anew_goes_before_the_lock(recipe: Path, tmp_path: Path) -> None:
    made(recipe, tmp_path / "first", **OPTIONS)
    lock = tmp_path / "first" / "merge.lock.yml"
    other = made(lock, tmp_path / "other", seed=8)
    wanted = made(recipe, tmp_path / "wanted", **{**OPTIONS, "seed": 8})
    assert other == wanted


def test_an_input_that_changed_is_refused_by_name(recipe: Path, tmp_path: Path) -> None:
    made(recipe, tmp_path / "out")
    lock = tmp_path / "out" / "merge.lock.yml"
    (tmp_path / "b" / "config.json").write_text('{"model_type": "other"}')
    with pytest.raises(merge.SourceError, match="not what it was") as caught:
        applying.plan_recipe(lock)
    where = caught.value.where
    assert (where["model"], where["file"]) == (str(tmp_path / "b"), "config.json")
    assert {"recipe", "line", "column"} <= set(where)
    applying.plan_recipe(recipe)  # the recipe itself does not mind


def test_a_damaged_lock_file_says_where(recipe: Path, tmp_path: Path) -> None:
    made(recipe, tmp_path / "out")
    text = (tmp_path / "out" / "merge.lock.yml").read_text()
    (tmp_path / "bad.yml").write_text(text.replace("hf_merge:", "hf_murge:"))
    with pytest.raises(merge.RecipeError, match="lock file is damaged") as caught:
        applying.plan_recipe(tmp_path / "bad.yml")
    assert caught.value.where["recipe"] == str(tmp_path / "bad.yml")
    (tmp_path / "new.yml").write_text(text.replace("merge_lock: 1", "merge_lock: 2"))
    with pytest.raises(merge.RecipeError, match="lock file is damaged"):
        applying.plan_recipe(tmp_path / "new.yml")


def test_a_recipe_is_no_lock_file(recipe: Path) -> None:
    assert read_lock(recipe) is None


@given(
    st.text(
        st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\t ")
    )
)
@example("a: 1  \n\n\n")
@example("  indented first line\nthen: not\n")
@example("# only a comment")
@example("tab:\there\n")
def test_any_recipe_text_survives_in_a_lock_file(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.yml"
        path.write_text(
            lock_text(text, ["a=1"], {"seed": 3, "dtype": None}, {}, "0", {}), newline=""
        )
        lock = read_lock(path)
    assert lock is not None
    assert (lock.recipe, lock.settings, lock.options) == (text, ["a=1"], {"seed": 3})


COMMIT, OTHER = "1" * 40, "2" * 40


def test_models_of_the_hub_are_taken_at_their_commits() -> None:
    lock = Lock(
        merge_lock=1,
        hf_merge="0",
        recipe="",
        inputs=[
            LockedInput(model="org/base@main", commits={"org/base": COMMIT}),
            LockedInput(model="org/base+org/lora", commits={"org/base": COMMIT, "org/lora": OTHER}),
        ],
    )
    found = pinned(parse_reference("org/base@main"), lock)
    assert (found.path, found.revision) == ("org/base", COMMIT)
    both = pinned(parse_reference("org/base+org/lora"), lock)
    assert (both.revision, both.adapter, both.adapter_revision) == (COMMIT, "org/lora", OTHER)
    other = parse_reference("org/else")
    assert pinned(other, lock) is other
