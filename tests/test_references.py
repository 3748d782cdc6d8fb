"""How a model is named: text, mappings, paths with odd signs; and the words about tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import merge
from merge.errors import MergeError, RecipeError, SourceError
from merge.ir.reference import Reference, parse_reference
from merge.recipe.compile import Compiled, compile_recipe
from merge.recipe.read import parse_recipe
from merge.recipe.schema import TokenSource

from .conftest import write_model
from .tiny import assert_same, error_of, noise, place, zoo

OPEN = zoo(a=1, b=1)
FORMS: dict[str, tuple[object, Reference]] = {
    "a path": ("a/b", Reference("a/b")),
    "a revision": ("a/b@v1", Reference("a/b", "v1")),
    "an adapter": ("a/b+c/d", Reference("a/b", None, "c/d")),
    "both": ("a@1+c@2", Reference("a", "1", "c", "2")),
    "path as a mapping": ({"path": "a"}, Reference("a")),
    "path and revision": ({"path": "a", "revision": "v"}, Reference("a", "v")),
    "no revision": ({"path": "a", "revision": None}, Reference("a")),
    "an empty revision": ({"path": "a", "revision": ""}, Reference("a")),
    "model as text": ({"model": "a@v"}, Reference("a", "v")),
    "model as a mapping": ({"model": {"path": "a@v"}}, Reference("a@v")),
    "a mapping with an adapter": (
        {"model": {"path": "a", "revision": "1"}, "lora": {"path": "c", "revision": "2"}},
        Reference("a", "1", "c", "2"),
    ),
    "an adapter as text": ({"model": "a", "lora": "c@2"}, Reference("a", None, "c", "2")),
    "no adapter": ({"model": "a", "lora": None}, Reference("a")),
    "an architecture": (
        {"model": "a", "override_architecture": "X"},
        Reference("a", architecture="X"),
    ),
    "two at signs": ("a@b@c", Reference("a@b@c")),
    "two plus signs": ("a+b+c", Reference("a+b+c")),
    "an at sign at the end": ("a@", Reference("a@")),
    "an at sign before": ("@a", Reference("@a")),
    "a plus sign at the end": ("a+", Reference("a+")),
    "backslashes": (r"C:\models\a", Reference(r"C:\models\a")),
}


def same(found: Reference, wanted: Reference) -> bool:
    """Equal but for the text that it was written as."""
    return (
        Reference(
            found.path, found.revision, found.adapter, found.adapter_revision, found.architecture
        )
        == wanted
    )


@pytest.mark.parametrize(("value", "wanted"), FORMS.values(), ids=FORMS)
def test_a_reference_is_read(value: object, wanted: Reference) -> None:
    found = parse_reference(value)
    assert same(found, wanted)
    assert parse_reference(found) is found
    if isinstance(value, str):
        assert str(found) == value


@given(st.text(min_size=1).filter(lambda t: bool(t.strip())))
def test_any_text_is_some_reference(text: str) -> None:
    found = parse_reference(text)
    assert str(found) == text
    assert found.path


WRONG: dict[str, tuple[str, str, tuple[int, int]]] = {
    "empty": ("''", "the name of a model is empty", (3, 3)),
    "blank": ("'  '", "the name of a model is empty", (3, 3)),
    "a number": ("7", "named by text or a mapping", (3, 3)),
    "a list": ("[a]", "named by text or a mapping", (3, 3)),
    "an empty mapping": ("{}", "expected model", (3, 3)),
    "an adapter alone": ("{lora: a}", "expected model", (3, 3)),
    "an empty path": ("{path: ''}", "expected a path", (3, 3)),
    "a path that is a number": ("{path: 3}", "expected a path", (3, 3)),
    "a revision that is a number": ("{path: a, revision: 3}", "expected a path", (3, 3)),
    "an empty adapter": ("{model: a, lora: ''}", "expected a path", (3, 3)),
    "an architecture that is a list": (
        "{model: a, override_architecture: [X]}",
        "override_architecture is not text",
        (3, 3),
    ),
    "a key misspelt": ("{path: a, revison: b}", "unknown key 'revison'", (3, 20)),
    "a key within misspelt": ("{model: {pth: a}}", "unknown key 'pth'", (3, 19)),
    "an adapter misspelt": ("{model: a, loar: b}", "unknown key 'loar'", (3, 21)),
    "both forms at once": ("{path: a, lora: b}", "unknown key 'lora'", (3, 20)),
}


@pytest.mark.parametrize(("written", "what", "where"), WRONG.values(), ids=WRONG)
def test_a_name_that_is_none_is_refused(written: str, what: str, where: tuple[int, int]) -> None:
    error = error_of(f"merge_method: passthrough\nmodels:\n- model: {written}\n", OPEN)
    assert what in error.what
    assert place(error) == where


@pytest.mark.parametrize(
    "key", ["base_model", "tokenizer_source", "models.0.statistics", "slices.0.base_model"]
)
def test_every_key_that_names_a_model_takes_all_forms(key: str) -> None:
    from merge.recipe.settings import override

    parts = (
        "models: [{model: a}]"
        if "slices" not in key
        else ("slices: [{sources: [{model: a, layer_range: [0, 1]}]}]")
    )
    text = f"merge_method: passthrough\n{parts}\n"
    setting = f"{key}={{model: {{path: b, revision: v}}, lora: c}}"
    stage = parse_recipe(text, settings=[setting]).final.model
    found: object = stage
    for part in key.split("."):
        found = found[int(part)] if isinstance(found, list) else getattr(found, part)
    assert isinstance(found, Reference) and same(found, Reference("b", "v", "c"))
    assert override({"a": 1}, "b=2") == {"a": 1, "b": 2}


# -- folders ------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name", ["a@v1", "a+b", "a@1+b@2", "a@b@c", "@a", "a+", "with space", "ü", "2024-01-01", "1e3x"]
)
def test_a_folder_that_exists_goes_before_what_its_name_could_mean(here: Path, name: str) -> None:
    write_model(here / name, {"w": noise(name)})
    for written in (name, {"path": name}, {"model": name}, {"model": {"path": name}}):
        found = merge.open(parse_reference(written))
        assert_same(found.state_dict()["w"], noise(name))
    text = f"merge_method: passthrough\nmodels: [{{model: {json.dumps(name)}}}]\n"
    made = compile_recipe(parse_recipe(text), merge.open)
    assert_same(made.checkpoint.state_dict()["w"], noise(name))


def test_a_folder_called_like_a_date_needs_no_quotes(here: Path) -> None:
    write_model(here / "2024-01-01", {"w": noise(1)})
    recipe = parse_recipe("merge_method: passthrough\nmodels:\n- model: 2024-01-01\n")
    assert_same(compile_recipe(recipe, merge.open).checkpoint.state_dict()["w"], noise(1))


def test_backslashes_are_read_as_windows_would(here: Path) -> None:
    write_model(here / "models" / "a", {"w": noise(1)})
    for name in (r"models\a", r".\models\a"):
        assert_same(merge.open(name).state_dict()["w"], noise(1))
    with pytest.raises(SourceError, match="no such model"):
        merge.open(r"C:\models\a")


def test_a_path_that_has_a_backslash_in_it_goes_first(here: Path) -> None:
    write_model(here / "models" / "a", {"w": noise(1)})
    write_model(here / r"models\a", {"w": noise(2)})
    assert_same(merge.open(r"models\a").state_dict()["w"], noise(2))


def test_two_spellings_of_one_folder_are_one_model(here: Path) -> None:
    """The base listed as ./a is still the base."""
    write_model(here / "a", {"w": noise(1)})
    write_model(here / "b", {"w": noise(2)})
    text = (
        "merge_method: task_arithmetic\nbase_model: ./a\n"
        "models: [{model: a}, {model: {path: b}}]\nparameters: {weight: 1}\n"
    )
    made = compile_recipe(parse_recipe(text), merge.open)
    assert made.checkpoint.label == "task_arithmetic of a, b over ./a"
    assert [e.model for e in made.explain("w")[0].reasons if e.parameter == "weight"] == ["b"]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("a@v1", "a folder has no revisions"),
        ("a+b", "no such adapter"),
        ("absent", "no such model"),
        ("absent@v1", "no such model"),
        ("x@y@z", "no such model"),
    ],
)
def test_what_cannot_be_opened_says_why_and_where(here: Path, name: str, what: str) -> None:
    write_model(here / "a", {"w": noise(1)})
    recipe = parse_recipe(f"merge_method: passthrough\nmodels:\n  - model: {name}\n", "r.yml")
    with pytest.raises(SourceError, match=what) as caught:
        compile_recipe(recipe, merge.open)
    assert (caught.value.where["line"], caught.value.where["column"]) == ("3", "5")
    assert name in str(caught.value)


@pytest.mark.parametrize("which", ["models", "base_model"])
def test_an_architecture_goes_into_the_written_config(here: Path, which: str) -> None:
    write_model(here / "a", {"w": noise(1)}, config={"architectures": ["A"], "x": 1})
    other = "{model: a, override_architecture: B}"
    text = "merge_method: passthrough\nmodels:\n- model: " + (other if which == "models" else "a")
    text += f"\nbase_model: {other}\n" if which == "base_model" else "\n"
    (here / "r.yml").write_text(text)
    merge.apply("r.yml", "out")
    written = json.loads((here / "out" / "config.json").read_text())
    assert (written["architectures"], written["x"]) == (["B"], 1)


# -- tokenizers -----------------------------------------------------------------------------------


def tokenized(here: Path, **files: str) -> None:
    for name, text in files.items():
        write_model(here / name, {"embed_tokens.weight": torch.ones(1, 2)})
        (here / name / "tokenizer.json").write_text(text)


def mean(here: Path, extra: str) -> Compiled:
    text = f"merge_method: linear\nmodels: [{{model: a}}, {{model: b}}]\n{extra}\n"
    return compile_recipe(parse_recipe(text + "parameters: {weight: 1}\n", "r.yml"), merge.open)


SAME = [
    "tokenizer_source: union",
    "tokenizer_source: base",
    "tokenizer_source: b",
    "tokenizer_source: model:b",
    "tokenizer_source: {model: b}",
    "tokenizer: {source: union}",
    "tokenizer: {source: 'model:a'}",
    "tokenizer: {}",
    "tokenizer: {source: base, tokens: ~, pad_to_multiple_of: ~}",
    "tokenizer: {source: base, tokens: {}}",
]


@pytest.mark.parametrize("written", SAME)
def test_equal_tokenizers_are_taken_with_a_note(here: Path, written: str) -> None:
    tokenized(here, a="{}", b="{}")
    (note,) = mean(here, written).notes
    assert note == "line 3: all models have one tokenizer, which is taken as it is"


@pytest.mark.parametrize("written", SAME)
def test_different_tokenizers_are_read_and_errors_in_them_have_a_place(
    here: Path, written: str
) -> None:
    tokenized(here, a='{"model": {"vocab": {"x": 0}}}', b="[]")
    with pytest.raises(SourceError, match="not sound JSON") as caught:
        mean(here, written)
    where = caught.value.where
    assert (where["file"], where["model"]) == ("tokenizer.json", "b")
    assert (where["line"], where["column"]) == ("2", "23")


def test_tokens_that_were_added_are_part_of_a_vocabulary(here: Path) -> None:
    tokenized(here, a='{"model": {"vocab": {"x": 0}}}', b='{"model": {"vocab": {"x": 0}}}')
    (here / "b" / "added_tokens.json").write_text('{"<x>": 9}')
    notes = mean(here, "tokenizer_source: base").notes
    assert not any("which is taken as it is" in note for note in notes)
    assert any("the vocabulary has" in note for note in notes)


def test_models_without_embeddings_have_no_vocabulary_to_merge(here: Path) -> None:
    for name in "ab":
        write_model(here / name, {"w": torch.ones(1)})
        (here / name / "vocab.txt").write_text(name)
    with pytest.raises(RecipeError, match="no tensor of the models is known") as caught:
        mean(here, "tokenizer_source: base")
    where = caught.value.where
    assert (where["line"], where["key"]) == ("3", "tokenizer_source")


def test_without_a_word_about_it_the_donors_tokenizer_is_kept(here: Path) -> None:
    tokenized(here, a="{}", b="[]")
    made = mean(here, "")
    (note,) = made.notes
    assert note.startswith("whether b and a number tokens alike is not known")
    assert "tokenizer.json" in [f.name for f in made.checkpoint.side.files]


def test_a_tokenizer_of_a_model_that_is_not_there_has_its_place(here: Path) -> None:
    tokenized(here, a="{}", b="{}")
    for written, at in (("tokenizer_source: c", "1"), ("tokenizer: {source: c}", "13")):
        with pytest.raises(MergeError, match="no such model") as caught:
            mean(here, written)
        assert (caught.value.where["line"], caught.value.where["column"]) == ("3", at)


TOKENS = {
    "a model": ("source: a", Reference("a", text="a")),
    "a model's mapping": ("source: {path: a, revision: v}", Reference("a", "v")),
    "nothing": ("source: ~", None),
    "zero": ("source: {kind: zero}", TokenSource(kind="zero")),
    "a token": (
        "source: {kind: model_token, model: a, token: <s>}",
        TokenSource(kind="model_token", model=parse_reference("a"), token="<s>"),
    ),
    "a token's number": (
        "source: {kind: model_token, model: a, token_id: 3}",
        TokenSource(kind="model_token", model=parse_reference("a"), token_id=3),
    ),
    "force": ("force: true, source: a", Reference("a", text="a")),
}
HEAD = "merge_method: passthrough\nmodels: [{model: a}]\n"


@pytest.mark.parametrize(("written", "wanted"), TOKENS.values(), ids=TOKENS)
def test_tokens_are_read(written: str, wanted: object) -> None:
    recipe = parse_recipe(f"{HEAD}tokenizer:\n  tokens:\n    <s>: {{{written}}}\n")
    entry = recipe.final.model.tokenizer
    assert entry is not None and entry.tokens["<s>"].source == wanted
    assert entry.tokens["<s>"].force is written.startswith("force")


WRONG_TOKENS = {
    "a kind": ("source: {kind: zro}", "the value of 'source' is wrong", (5, 11)),
    "a key of a token": ("sourc: a", "unknown key 'sourc'", (5, 11)),
    "a key of a source": (
        "source: {kind: model_token, model: a, tokn: x}",
        "unknown key 'tokn'",
        (5, 49),
    ),
    "the kind misspelt": ("source: {knd: zero}", "unknown key 'knd'", (5, 20)),
    "no model": ("source: {kind: model_token, token: x}", "a model_token needs model", (5, 11)),
    "both": (
        "source: {kind: model_token, model: a, token: x, token_id: 1}",
        "either token or token_id",
        (5, 11),
    ),
    "a negative number": (
        "source: {kind: model_token, model: a, token_id: -1}",
        "token_id",
        (5, 11),
    ),
    "force as text": ("force: maybe", "the value of 'force' is wrong", (5, 11)),
}


@pytest.mark.parametrize(("written", "what", "where"), WRONG_TOKENS.values(), ids=WRONG_TOKENS)
def test_tokens_that_are_wrong_are_refused(written: str, what: str, where: tuple[int, int]) -> None:
    error = error_of(f"{HEAD}tokenizer:\n  tokens:\n    <s>: {{{written}}}\n", OPEN)
    assert what in error.what
    assert place(error) == where


@pytest.mark.parametrize("name", ["source", "models", "tokens", "tokenizer"])
def test_a_token_may_be_called_like_a_key(name: str) -> None:
    error = error_of(f"{HEAD}tokenizer:\n  tokens:\n    {name}: {{forc: true}}\n", OPEN)
    assert (error.what, error.do) == ("unknown key 'forc'", "did you mean 'force'?")
    assert error.expected == "one of source, force"


def test_both_keys_about_tokenizers_are_refused() -> None:
    error = error_of(f"{HEAD}tokenizer: {{}}\ntokenizer_source: base\n", OPEN)
    assert error.what == "both tokenizer and tokenizer_source are given"
    assert place(error) == (4, 1)
