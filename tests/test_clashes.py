"""Recipes that say nothing of the vocabulary: models that number tokens differently are told of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken

import merge
from merge.errors import RecipeError
from merge.recipe.compile import compile_recipe
from merge.recipe.read import parse_recipe
from tests.conftest import write_model
from tests.tokens import save_tokenizer, word_piece

WORDS = ["one", "two", "three"]
RECIPE = """merge_method: linear
models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]
"""


def make(folder: Path, words: list[str], added: str = "<x>", at: str = "", **config: str) -> None:
    write_model(folder, {"model.embed_tokens.weight": torch.ones(9, 2)})
    made = word_piece(words, [AddedToken(added, special=True)])
    save_tokenizer(made, folder / at, **config)


def notes(text: str = RECIPE) -> list[str]:
    return list(compile_recipe(parse_recipe(text), merge.open).notes)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("a"), WORDS)


def test_the_same_numbers_are_no_news() -> None:
    make(Path("b"), WORDS, padding_side="left")  # other files, the same tokens
    assert notes() == []


def test_tokens_that_changed_places_are_counted_and_shown() -> None:
    make(Path("b"), ["one", "three", "two"])
    (note,) = notes()
    assert "b numbers 2 tokens otherwise than a, such as 'three', 'two'" in note
    assert "`tokenizer_source: union` merges them by token" in note
    assert len(notes(f"{RECIPE}tokenizer_source: union\n")) == 1, "of the union, and no more"


def test_one_number_for_two_tokens_is_a_clash_too() -> None:
    make(Path("b"), WORDS, added="<y>")
    (note,) = notes()
    assert "b numbers 1 tokens otherwise than a, such as '<y>'" in note


def test_a_tokenizer_that_cannot_be_read_is_told_of() -> None:
    make(Path("b"), WORDS)
    Path("b/tokenizer.json").write_text('{"model": 3}')
    (note,) = notes()
    assert "is not known" in note and "file tokenizer.json, key model" in note


def test_the_tokenizer_of_a_pipeline_is_looked_at_in_its_folder() -> None:
    for name, words in {"p": WORDS, "q": WORDS[::-1]}.items():
        make(Path(name) / "text", words)
        save_tokenizer(word_piece(words), Path(name) / "tokenizer")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            Path(name, "text", file).unlink()
        parts = {"text": ["transformers", "T"], "tokenizer": ["transformers", "K"]}
        Path(name, "model_index.json").write_text(json.dumps({"_class_name": "P", **parts}))
    text = RECIPE.replace("model: a", "model: p").replace("model: b", "model: q")
    (note,) = notes(text)
    assert "q numbers 2 tokens otherwise than p" in note and "tokenizer_source" not in note
    asked = notes(f"{text}tokenizer_source: union\n")
    assert asked[0].endswith("no model has a tokenizer beside its weights")
    assert asked[1] == note


def test_an_adapter_on_a_stage_is_refused_by_its_name() -> None:
    text = f"name: first\n{RECIPE.replace('model: b', 'model: a')}---\n"
    text += "merge_method: linear\nmodels: [{model: first+lora, parameters: {weight: 1}}]\n"
    with pytest.raises(RecipeError, match="an adapter cannot be put on a stage") as caught:
        notes(text)
    assert caught.value.where["line"] == "6"
