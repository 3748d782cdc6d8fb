"""Recipes: every word is known or refused at its place, every value means what it meant before."""

from __future__ import annotations

import json
import math
import random
import re
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import merge
from merge import methods
from merge.applying import plan_recipe
from merge.checkpoint.memory import open_state_dict
from merge.errors import MergeError, PlanError, RecipeError
from merge.ir.checkpoint import Checkpoint
from merge.ir.dtypes import BY_NAME
from merge.ir.expr import Apply, Linear, Read, reads, walk
from merge.ir.reference import Reference
from merge.methods.core.schema import Method, ParameterSpec
from merge.recipe.compile import Compiled, compile_recipe
from merge.recipe.read import parse_recipe, read_recipe
from merge.recipe.schema import RecipeModel, json_schema
from merge.recipe.values import interpolate

from .conftest import MakeModel

EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def layer(number: int, part: str = "mlp.up_proj") -> str:
    return f"model.layers.{number}.{part}.weight"


def opener(layers: int = 5) -> Callable[[Reference], Checkpoint]:
    """Opens any name as a small model with attention and MLP in every layer."""
    parts = [layer(i, p) for i in range(layers) for p in ("self_attn.q_proj", "mlp.up_proj")]
    state = {n: torch.ones(2, 2) for n in (EMBED, *parts, NORM, HEAD)}
    return lambda reference: open_state_dict(state, str(reference))


def compiled(text: str, *, layers: int = 5, seed: int | None = None, **options: Any) -> Compiled:
    """The recipe in ``text`` over models of ``layers`` layers."""
    return compile_recipe(parse_recipe(text, **options), opener(layers), seed=seed)


def error_of(text: str, **options: Any) -> RecipeError:
    """The error that parsing or compiling ``text`` yields; it always has a place."""
    with pytest.raises(RecipeError) as caught:
        compiled(text, **options)
    error = caught.value
    assert error.where["recipe"] == "recipe"
    assert int(error.where["line"]) >= 1 and int(error.where["column"]) >= 1
    assert f"line: {error.where['line']}, column: {error.where['column']}" in str(error)
    return error


def place(error: RecipeError) -> tuple[int, int]:
    return int(error.where["line"]), int(error.where["column"])


def value_at(made: Compiled, name: str, key: str) -> Any:
    """The parameter ``key`` with which ``name`` is computed."""
    apply = next(n for n in walk(made.checkpoint.tensors[name]) if isinstance(n, Apply))
    return apply.arguments[key]


def weights_at(made: Compiled, name: str) -> list[float]:
    """The coefficients with which ``name`` is summed."""
    expr = made.checkpoint.tensors[name]
    assert isinstance(expr, Linear)
    return [c for c, _ in expr.terms]


def inputs_of(made: Compiled, name: str = HEAD) -> list[str]:
    """The models that one tensor is made of, in order of first use."""
    return [r.source.identity for r in reads(made.checkpoint.tensors[name])]


SLERP = "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters:\n  t: "
LINEAR = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters:\n  weight: "
TIES = "merge_method: ties\nbase_model: base\nmodels: [{model: a}]\nparameters:\n  weight: 1\n  "


# -- structure -----------------------------------------------------------------------------------

WRONG: dict[str, tuple[str, str, tuple[int, int]]] = {
    "empty": ("", "a recipe is a mapping", (1, 1)),
    "a comment": ("# nothing\n", "a recipe is a mapping", (1, 1)),
    "a list": ("- a\n", "a recipe is a mapping", (1, 1)),
    "text": ("hello\n", "a recipe is a mapping", (1, 1)),
    "no method": ("models:\n- model: a\n", "the key 'merge_method' is missing", (1, 1)),
    "no models": ("merge_method: linear\n", "the key 'models' is missing", (1, 1)),
    "models empty": (
        "merge_method: linear\nmodels: []\n",
        "the value of 'models' is wrong",
        (2, 1),
    ),
    "models null": ("merge_method: linear\nmodels:\n", "the key 'models' is missing", (2, 1)),
    "models text": ("models: a\nmerge_method: linear\n", "the value of 'models' is wrong", (1, 1)),
    "a model without a name": (
        "merge_method: linear\nmodels:\n- model: a\n- parameters: {weight: 1}\n",
        "the key 'model' is missing",
        (4, 3),
    ),
    "a model that is a number": (
        "merge_method: linear\nmodels:\n  - model: 3\n",
        "the value of 'model' is wrong",
        (3, 5),
    ),
    "a model that is text": (
        "merge_method: linear\nmodels:\n  - a\n",
        "the value of 'models' is wrong",
        (3, 5),
    ),
    "parameters a list": (
        "merge_method: linear\nmodels: [{model: a}]\nparameters: [1]\n",
        "the value of 'parameters' is wrong",
        (3, 1),
    ),
    "method a number": (
        "merge_method: 3\nmodels: [{model: a}]\n",
        "'merge_method' is wrong",
        (1, 1),
    ),
    "dtype a number": (
        "merge_method: linear\nmodels: [{model: a}]\ndtype: 16\n",
        "the value of 'dtype' is wrong",
        (3, 1),
    ),
    "seed negative": (
        "merge_method: linear\nmodels: [{model: a}]\nseed: -1\n",
        "the value of 'seed' is wrong",
        (3, 1),
    ),
    "seed a fraction": (
        "merge_method: linear\nmodels: [{model: a}]\nseed: 1.5\n",
        "the value of 'seed' is wrong",
        (3, 1),
    ),
    "a key twice": ("merge_method: linear\nmerge_method: ties\n", "duplicate key", (2, 1)),
    "a parameter twice": (f"{LINEAR}1\n  weight: 2\n", 'duplicate key "weight"', (5, 3)),
    "bad YAML": ("merge_method: [\nmodels: a\n", "not readable as YAML", (3, 1)),
    "a tab": ("models:\n\t- model: a\n", "not readable as YAML", (2, 1)),
    "two documents": ("merge_method: linear\n---\nmodels: []\n", "have no name", (3, 1)),
    "an unknown alias": ("models: *nobody\n", "not readable as YAML", (1, 9)),
    "no base": (
        "models: [{model: a}]\nmerge_method: ties\nparameters: {weight: 1}\n",
        "method 'ties' needs a base_model",
        (2, 1),
    ),
    "no weight": (
        "models: [{model: a}]\nmerge_method: linear\n",
        "method 'linear' needs parameter 'weight' for every model",
        (2, 1),
    ),
    "weights of no sum": (
        "models:\n- {model: a, parameters: {weight: 1}}\n- {model: b, parameters: {weight: -1}}\n"
        "merge_method: linear\n",
        "sum to 0",
        (4, 1),
    ),
    "too few models": (
        "models: [{model: a}]\nmerge_method: slerp\nparameters: {t: 1}\n",
        "method 'slerp' takes exactly 2 models",
        (2, 1),
    ),
    "too many models": (
        "models: [{model: a}, {model: b}, {model: c}]\nmerge_method: slerp\nparameters: {t: 1}\n",
        "method 'slerp' takes exactly 2 models",
        (2, 1),
    ),
    "a filter without a value": (
        f"{LINEAR}\n  - filter: mlp\n",
        "filter entry has no value",
        (5, 5),
    ),
    "a word in a filter": (
        f"{LINEAR}\n  - value: 1\n    filtr: mlp\n",
        "unknown key 'filtr' in a filter",
        (6, 5),
    ),
    "a filter that is a number": (
        f"{LINEAR}\n  - {{filter: 3, value: 1}}\n",
        "a filter is not text",
        (5, 6),
    ),
    "a list in a list": (f"{LINEAR}[1, [2]]\n", "nested too deeply", (4, 15)),
    "a mapping in a value": (f"{LINEAR}\n  - value: {{a: 1}}\n", "nested too deeply", (5, 5)),
    "a date": (f"{LINEAR}2020-01-01\n", "parameter", (4, 3)),
}


@pytest.mark.parametrize(("text", "what", "where"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named_with_line_and_column(
    text: str, what: str, where: tuple[int, int]
) -> None:
    error = error_of(text)
    assert what in error.what
    assert place(error) == where


def test_characters_that_yaml_does_not_have_are_refused() -> None:
    with pytest.raises(RecipeError, match="not readable as YAML") as caught:
        parse_recipe("merge_method: \x00\n", "r.yml")
    assert caught.value.where["recipe"] == "r.yml"


def test_a_missing_base_says_what_it_is() -> None:
    error = error_of("merge_method: ties\nmodels: [{model: a}]\nparameters: {weight: 1}\n")
    assert error.where["key"] == "base_model"
    assert "fine-tuned from" in str(error.expected)


def test_a_missing_parameter_names_the_first_tensor_that_lacks_it() -> None:
    error = error_of(f"{LINEAR}{{filter: embed, value: 1}}\n")
    assert (error.where["key"], error.where["tensor"]) == ("weight", layer(0, "self_attn.q_proj"))
    assert "a value in" in str(error.expected)


def test_an_error_of_a_model_has_the_place_that_names_the_model(make_model: MakeModel) -> None:
    make_model("a", {"w": torch.ones(1)})
    text = "merge_method: linear\nmodels:\n  - model: absent/model\n    parameters: {weight: 1}\n"
    with pytest.raises(merge.SourceError, match="no such model") as caught:
        compile_recipe(parse_recipe(text, "r.yml"), merge.open)
    assert {k: caught.value.where[k] for k in ("model", "recipe", "line", "column")} == {
        "model": "absent/model",
        "recipe": "r.yml",
        "line": "3",
        "column": "5",
    }


def test_models_that_do_not_fit_are_an_error_with_a_place() -> None:
    states = {"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(2)}}
    recipe = parse_recipe(f"{LINEAR}1\n", "r.yml")
    with pytest.raises(PlanError, match="different shapes") as caught:
        compile_recipe(recipe, lambda name: open_state_dict(states[str(name)], str(name)))
    assert caught.value.where["tensor"] == "w"
    assert (caught.value.where["recipe"], caught.value.where["line"]) == ("r.yml", "1")


@pytest.mark.parametrize("written", ["{path: a}", "{model: a}", "{model: {path: a}}", '"a"', "a"])
def test_a_model_may_be_written_as_a_mapping(written: str) -> None:
    made = compiled(f"merge_method: passthrough\nmodels:\n- model: {written}\n")
    assert inputs_of(made) == ["a"]


@pytest.mark.parametrize("written", ["parameters:\n", "parameters: {}\n", "parameters: ~\n", ""])
def test_parameters_may_be_empty(written: str) -> None:
    made = compiled(f"merge_method: passthrough\nmodels: [{{model: a, parameters: }}]\n{written}")
    assert inputs_of(made) == ["a"]


# -- files ---------------------------------------------------------------------------------------

GOOD = "merge_method: linear\nmodels:\n  - model: ü\n    parameters: {weight: 1}\n"


@pytest.mark.parametrize(
    "content",
    [
        GOOD.encode(),
        GOOD.encode("utf-8-sig"),
        GOOD.replace("\n", "\r\n").encode(),
        GOOD.rstrip("\n").encode(),
        f"---\n{GOOD}...\n".encode(),
        f"%YAML 1.2\n---\n{GOOD}".encode(),
    ],
    ids=["plain", "byte order mark", "CRLF", "no last newline", "markers", "directive"],
)
def test_files_are_read_as_editors_write_them(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.yml").write_bytes(content)
    recipe = read_recipe(tmp_path / "r.yml")
    assert str(recipe.final.model.models[0].model) == "ü"
    assert recipe.text[0] in "m-%"
    assert recipe.final.document.where(("models", 0, "model"))["column"] == 5


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: None, "no such recipe"),
    "a folder": (lambda p: p.mkdir(), "cannot be read"),
    "not UTF-8": (lambda p: p.write_bytes(b"a: \xff"), "not UTF-8 at byte 3"),
    "over 1 MB": (lambda p: p.write_text("#" * 1_000_001), "more than a million characters"),
    "over 1 MB of keys": (lambda p: p.write_text("k: 1\n" * 200_001), "more than a million char"),
}


@pytest.mark.parametrize(("make", "what"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_recipe_is_named(
    make: Callable[[Path], object], what: str, tmp_path: Path
) -> None:
    path = tmp_path / "r.yml"
    make(path)
    with pytest.raises(RecipeError, match=what) as caught:
        read_recipe(path)
    assert caught.value.where["recipe"] == str(path)


def test_a_file_that_is_far_too_long_is_not_read(tmp_path: Path) -> None:
    """Weights named by mistake in place of a recipe: a sparse file of 200 MB."""
    with (tmp_path / "model.safetensors").open("wb") as f:
        f.truncate(200_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(RecipeError, match="more than a million characters"):
            read_recipe(tmp_path / "model.safetensors")
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def nested(levels: int) -> str:
    """A list of lists of ... of lists, each level nine times the one before."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for i in range(1, levels):
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]")
    return "\n".join(lines) + "\n"


BOMBS = {
    "aliases": nested(12),
    "depth": "a: " + "[" * 900 + "]" * 900,
    "depth of blocks": "".join(" " * i + "a:\n" for i in range(700)),
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"expands to far too many|not readable as YAML"):
        parse_recipe(text)


def test_anchors_and_merge_keys_are_welcome() -> None:
    text = (
        "merge_method: ties\nbase_model: base\nmodels:\n"
        "- {model: a, parameters: &p {weight: 0.5, density: 0.25}}\n"
        "- {model: b, parameters: *p}\n- {model: c, parameters: {<<: *p, weight: 2}}\n"
    )
    made = compiled(text)
    assert value_at(made, HEAD, "weight") == (0.5, 0.5, 2.0)
    assert value_at(made, HEAD, "density") == (0.25, 0.25, 0.25)


def test_an_anchor_may_be_given_anew() -> None:
    text = "merge_method: passthrough\nmodels: [{model: &m a}]\nbase_model: &m a\n"
    assert inputs_of(compiled(text)) == ["a"]


# -- words ---------------------------------------------------------------------------------------


def typos(word: str) -> Iterator[str]:
    """``word`` with one letter dropped, doubled with an x, replaced, or swapped with the next."""
    for i, letter in enumerate(word):
        yield word[:i] + word[i + 1 :]
        yield word[:i] + letter + "x" + word[i + 1 :]
        yield word[:i] + "x" + word[i + 1 :]
        yield word[:i] + word[i + 1 : i + 2] + letter + word[i + 2 :]


def one_edit(a: str, b: str) -> bool:
    """Whether one insertion, deletion, replacement or swap makes ``b`` of ``a``."""
    if len(a) > len(b):
        a, b = b, a
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
    if len(a) == len(b):
        swapped = a[start + 1 : start + 2] + a[start : start + 1] + a[start + 2 :]
        return a[start + 1 :] == b[start + 1 :] or swapped == b[start:]
    return len(a) + 1 == len(b) and a[start:] == b[start + 1 :]


def assert_suggested(word: str, known: Sequence[str], error: Callable[[str], RecipeError]) -> None:
    """Every typo of ``word`` yields an error that suggests a known word one edit away."""
    checked = 0
    for typo in dict.fromkeys(typos(word)):
        if typo in known:
            continue
        checked += 1
        found = error(typo)
        suggested = re.fullmatch(r"did you mean '(.*)'\?", str(found.do))
        assert suggested, f"{typo}: {found.do}"
        assert one_edit(typo, suggested[1]), f"{typo}: {suggested[1]}"
        assert word in found.what + str(found.expected) + str(found.do)
    assert checked > len(word)


ALL_METHODS = list(methods.registry())
ALL_PARAMETERS = sorted({k for m in methods.registry().values() for k in m.parameters})
DTYPES = ["float32", "float16", "bfloat16", "float64"]
ALL_DTYPES = [n for n, d in BY_NAME.items() if d.kind == "float"]
ALL_DTYPES += ["bf16", "fp16", "fp32", "fp64", "half", "float"]


@pytest.mark.parametrize("word", RecipeModel.model_fields)
def test_a_typo_in_a_recipe_key_is_corrected(word: str) -> None:
    def error(typo: str) -> RecipeError:
        found = error_of(f"merge_method: linear\nmodels: [{{model: a}}]\n\n  \n{typo}: 1\n")
        assert found.what == f"unknown key {typo!r}"
        assert (place(found), found.where["key"]) == ((5, 1), typo)
        return found

    known = list(RecipeModel.model_fields)
    if word in ("merge_method", "models"):  # one more key than the typo: the real one is there
        known.append(word)
    assert_suggested(word, known, error)


@pytest.mark.parametrize("word", ["model", "parameters"])
def test_a_typo_in_a_models_key_is_corrected(word: str) -> None:
    def error(typo: str) -> RecipeError:
        found = error_of(f"merge_method: linear\nmodels:\n- model: a\n  {typo}: 1\n")
        assert place(found) == (4, 3)
        return found

    assert_suggested(word, ["model", "parameters"], error)


@pytest.mark.parametrize("word", ALL_METHODS)
def test_a_typo_in_a_method_is_corrected(word: str) -> None:
    def error(typo: str) -> RecipeError:
        found = error_of(f"models: [{{model: a}}]\nmerge_method: {typo}\n")
        assert found.what == f"unknown merge method {typo!r}"
        assert (place(found), found.where["key"]) == ((2, 1), "merge_method")
        return found

    assert_suggested(word, ALL_METHODS, error)


@pytest.mark.parametrize(
    ("method", "word"),
    [(m.name, k) for m in methods.registry().values() for k in m.parameters if len(k) > 2],
)
def test_a_typo_in_a_parameter_is_corrected(method: str, word: str) -> None:
    made = methods.get(method)

    def error(typo: str) -> RecipeError:
        found = error_of(f"{recipe_for(made)}  {typo}: 1\n")
        assert found.what == f"unknown parameter {typo!r}"
        assert place(found) == (len(recipe_for(made).splitlines()) + 1, 3)
        return found

    assert_suggested(word, ALL_PARAMETERS, error)


@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
@pytest.mark.parametrize("word", DTYPES)
def test_a_typo_in_a_dtype_is_corrected(key: str, word: str) -> None:
    def error(typo: str) -> RecipeError:
        found = error_of(f"merge_method: linear\nmodels: [{{model: a}}]\n{key}: {typo}\n")
        assert found.what == f"unknown dtype {typo!r}"
        assert (place(found), found.where["key"]) == ((3, 1), key)
        return found

    assert_suggested(word, ALL_DTYPES, error)


def test_a_word_near_to_nothing_comes_with_all_there_are() -> None:
    error = error_of("merge_method: qqqq\nmodels: [{model: a}]\n")
    assert error.expected == f"one of {', '.join(ALL_METHODS)}"
    assert error.do == "see `merge methods`"


# -- values --------------------------------------------------------------------------------------


def good_value(spec: ParameterSpec) -> str:
    """A value in range, as it would be written."""
    if spec.type is bool:
        return "true"
    return "1" if 1.0 in spec.range else str(spec.range.high)


def recipe_for(method: Method, **parameters: str) -> str:
    """A recipe for ``method`` with its required parameters; ends within ``parameters:``."""
    needed = {s.key: good_value(s) for s in method.parameters.values() if s.required}
    count = max(1, method.inputs[0])
    lines = [f"merge_method: {method.name}"]
    lines += ["base_model: base"] * (method.base == "required")
    lines += ["models:", *(f"  - model: m{i}" for i in range(count)), "parameters:"]
    lines += [f"  {k}: {v}" for k, v in (needed | parameters).items()]
    return "\n".join(lines) + "\n"


def wrong_values(spec: ParameterSpec) -> Iterator[str]:
    """Values that do not fit: of another type, not finite, or past either end of the range."""
    if spec.type is bool:
        yield from ("maybe", "2", "0.5", "-1", ".nan", "''")
        return
    if spec.type is str:
        yield from ("3", "true")
        return
    yield from ("abc", "''", ".nan", ".inf", "-.inf", "1e999", "'nan'", "9" * 400, "1 2")
    if spec.type is int:
        yield from ("0.5", "'1.5'")
    low, high = spec.range.low, spec.range.high
    if math.isfinite(low):
        yield from (str(low - 1), f"'{low - 0.001}'")
        yield from [str(low)] * spec.range.open_low
    if math.isfinite(high):
        yield from (str(high + 1), str(high + 0.001), "1e9")


VALUES = [
    (m, s, value)
    for m in methods.registry().values()
    for s in m.parameters.values()
    for value in wrong_values(s)
]


@pytest.mark.parametrize(
    ("method", "spec", "value"), VALUES, ids=[f"{m.name}-{s.key}-{v[:9]}" for m, s, v in VALUES]
)
def test_a_value_that_does_not_fit_is_refused_with_the_range(
    method: Method, spec: ParameterSpec, value: str
) -> None:
    text = recipe_for(method, **{spec.key: value})
    line = next(i for i, x in enumerate(text.splitlines(), 1) if x.startswith(f"  {spec.key}:"))
    error = error_of(text)
    assert f"parameter {spec.key!r}" in error.what
    assert error.where["key"] == spec.key
    assert place(error) == (line, 3)
    assert error.found is not None and error.expected is not None
    if spec.type is float and "range" in error.what:
        assert error.expected == str(spec.range)


@pytest.mark.parametrize(
    ("written", "where"),
    [
        ("[0.5, abc]", (6, 3)),
        ("{filter: mlp, value: 2}", (6, 26)),
        ("\n  - value: 0.5\n  - filter: x\n    value: [0.5, -1]", (9, 5)),
        ("[{filter: x, value: ~}, -1]", (6, 36)),
    ],
)
def test_a_wrong_value_is_found_wherever_it_stands(written: str, where: tuple[int, int]) -> None:
    error = error_of(f"{TIES}density: {written}\n")
    assert "'density'" in error.what
    assert place(error) == where


NUMBERS = {
    "1e-4": 1e-4,
    "1E-4": 1e-4,
    "1.0e-4": 1e-4,
    "'1e-4'": 1e-4,
    ".5": 0.5,
    "-.5": -0.5,
    "+1": 1.0,
    "1.": 1.0,
    "1": 1.0,
    "'0.5'": 0.5,
    "true": 1.0,
    "1_0": 10.0,
}


@pytest.mark.parametrize(("written", "value"), NUMBERS.items())
def test_numbers_are_read_as_people_write_them(written: str, value: float) -> None:
    made = compiled(SLERP + written)
    assert value_at(made, HEAD, "t") == value
    assert type(value_at(made, HEAD, "t")) is float


SWITCHES = {
    "true": True, "True": True, "1": True, "1.0": True, "yes": True, "on": True, "'true'": True,
    "false": False, "FALSE": False, "0": False, "0.0": False, "no": False, "Off": False,
    "&anchor false": False,
}  # fmt: skip


@pytest.mark.parametrize(("written", "value"), SWITCHES.items())
def test_switches_are_read_as_people_write_them(written: str, value: bool) -> None:
    assert value_at(compiled(f"{TIES}normalize: {written}\n"), HEAD, "normalize") is value


def test_nothing_written_is_the_default() -> None:
    for written in ("density:", "density: ~", "density: []", "lambda:"):
        made = compiled(f"{TIES}{written}\n")
        assert value_at(made, HEAD, "density") == (1.0,)
        assert value_at(made, HEAD, "lambda_") == 1.0


# -- gradients -----------------------------------------------------------------------------------


def test_a_gradient_runs_from_the_first_layer_to_the_last() -> None:
    made = compiled(SLERP + "[0, 0.5, 1]")
    assert [value_at(made, layer(i), "t") for i in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    made = compiled(SLERP + "[1, 2, 4, 8]")
    assert [value_at(made, layer(i), "t") for i in range(5)] == [1.0, 1.75, 3.0, 5.0, 8.0]


@pytest.mark.parametrize("count", [2, 3, 7, 32])
@pytest.mark.parametrize("length", [2, 3, 5, 11])
def test_a_gradient_is_interpolated_to_the_bit(count: int, length: int) -> None:
    """s = t (L - 1), i = floor s, j = min(L - 1, i + 1), f = s - i: (1 - f) v_i + f v_j."""
    values = [random.Random(length).uniform(-1, 1) for _ in range(length)]
    made = compiled(SLERP + str(values), layers=count)
    for index in range(count):
        s = index / (count - 1) * (length - 1)
        i = int(s)
        f = s - i
        wanted = (1 - f) * values[i] + f * values[min(length - 1, i + 1)]
        assert value_at(made, layer(index), "t") == wanted


def test_what_is_in_no_layer_takes_the_first_value() -> None:
    made = compiled(SLERP + "[0.25, 1]")
    assert {value_at(made, name, "t") for name in (EMBED, NORM, HEAD)} == {0.25}


def test_the_layer_of_a_stack_of_one_takes_the_last_value() -> None:
    made = compiled(SLERP + "[0.25, 0.5, 1]", layers=1)
    assert value_at(made, layer(0), "t") == 1.0
    assert value_at(made, EMBED, "t") == 0.25


def test_every_stack_has_its_own_depth() -> None:
    names = [f"encoder.{i}.w" for i in range(3)] + [f"decoder.{i}.experts.7.w" for i in range(2)]
    state = {n: torch.ones(1) for n in names}
    made = compile_recipe(parse_recipe(SLERP + "[0, 1]"), lambda n: open_state_dict(state, str(n)))
    assert [value_at(made, n, "t") for n in names] == [0.0, 0.5, 1.0, 0.0, 1.0]


def test_a_gradient_of_one_value_is_that_value() -> None:
    made = compiled(SLERP + "[0.3]")
    assert {value_at(made, n, "t") for n in made.checkpoint} == {0.3}


def test_a_gradient_of_texts_of_numbers_is_one_of_numbers() -> None:
    made = compiled(SLERP + "['0', '1e0']")
    assert [value_at(made, layer(i), "t") for i in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_switches_are_stepped_through() -> None:
    made = compiled(f"{TIES}normalize: [true, false, true]\n")
    found = [value_at(made, layer(i), "normalize") for i in range(5)]
    assert found == [True, True, False, False, True]


def test_each_model_has_its_own_gradient() -> None:
    text = (
        "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: [1, 3]}}\n"
        "- {model: b, parameters: {weight: [3, 1]}}\n"
    )
    made = compiled(text)
    found = [weights_at(made, layer(i)) for i in (0, 1, 4)]
    assert found == [[0.25, 0.75], [0.375, 0.625], [0.75, 0.25]]


def test_interpolation_ends_at_the_ends() -> None:
    assert interpolate((3.0, 5.0), 0.0) == 3.0
    assert interpolate((3.0, 5.0), 1.0) == 5.0
    assert interpolate(("a", "b", "c"), 0.99) == "b"


# -- filters -------------------------------------------------------------------------------------

FILTERS: dict[str, tuple[str, dict[str, float]]] = {
    "the first that matches": (
        "[{filter: mlp, value: 1}, {filter: layers.0, value: 2}, {value: 3}]",
        {layer(0): 1, layer(0, "self_attn.q_proj"): 2, layer(1, "self_attn.q_proj"): 3, HEAD: 3},
    ),
    "without a filter all": ("[{value: 3}, {filter: mlp, value: 1}]", {layer(0): 3, HEAD: 3}),
    "a star all": ("[{filter: '*', value: 3}, {filter: mlp, value: 1}]", {layer(0): 3, HEAD: 3}),
    "empty text all": ("[{filter: '', value: 3}]", {layer(0): 3, HEAD: 3}),
    "null all": ("[{filter: ~, value: 3}]", {layer(0): 3, HEAD: 3}),
    "no list needed": ("{filter: model, value: 3}", {layer(0): 3, EMBED: 3}),
    "a plain value at the end": ("[{filter: mlp, value: 1}, 3]", {layer(0): 1, HEAD: 3}),
    "no pattern": ("[{filter: 'm.p', value: 1}, {filter: 'mlp*', value: 2}, 3]", {layer(0): 3}),
    "case counts": ("[{filter: MLP, value: 1}, 3]", {layer(0): 3}),
    "a gradient inside": (
        "[{filter: mlp, value: [0, 4]}, {value: [1, 5]}]",
        {layer(0): 0, layer(1): 1, layer(4): 4, layer(4, "self_attn.q_proj"): 5, HEAD: 1},
    ),
}


@pytest.mark.parametrize(("written", "wanted"), FILTERS.values(), ids=FILTERS)
def test_a_filter_is_part_of_a_name(written: str, wanted: dict[str, float]) -> None:
    made = compiled(f"{TIES}lambda: {written}\n")
    assert {n: value_at(made, n, "lambda_") for n in wanted} == wanted


def test_a_tensor_that_no_filter_matches_takes_the_next_level() -> None:
    """The model's own filters, then the recipe's, then the method's default."""
    text = (
        "merge_method: ties\nbase_model: base\nmodels:\n- model: a\n"
        "  parameters: {weight: 1, density: [{filter: mlp, value: 0.25}]}\n"
        "- model: b\n  parameters: {weight: 1}\n"
        "parameters: {density: [{filter: layers, value: 0.5}]}\n"
    )
    made = compiled(text)
    assert value_at(made, layer(1), "density") == (0.25, 0.5)
    assert value_at(made, layer(1, "self_attn.q_proj"), "density") == (0.5, 0.5)
    assert value_at(made, HEAD, "density") == (1.0, 1.0)


def test_a_filter_with_nothing_as_its_value_leaves_it_to_the_next_level() -> None:
    text = (
        "merge_method: ties\nbase_model: base\nmodels:\n- model: a\n"
        "  parameters: {weight: 1, density: [{filter: mlp, value: ~}, {value: 0.25}]}\n"
        "parameters: {density: 0.5}\n"
    )
    made = compiled(text)
    assert value_at(made, layer(1), "density") == (0.5,)
    assert value_at(made, HEAD, "density") == (0.25,)


def test_a_filter_sees_the_whole_name() -> None:
    made = compiled(f"{TIES}lambda: [{{filter: layers.1.mlp.up_proj.weight, value: 2}}]\n")
    assert [n for n in made.checkpoint if value_at(made, n, "lambda_") == 2.0] == [layer(1)]


def test_a_filter_that_matches_no_tensor_is_noted() -> None:
    made = compiled(
        f"{TIES}lambda:\n  - {{filter: up_porj, value: 2}}\n  - {{filter: mlp, value: 3}}\n"
    )
    (note,) = made.notes
    assert "'up_porj'" in note and "line 7" in note


# -- levels --------------------------------------------------------------------------------------


def test_a_model_goes_before_the_recipe() -> None:
    text = (
        "merge_method: linear\nparameters: {weight: 3, normalize: false}\nmodels:\n"
        "- {model: a, parameters: {weight: 2}}\n- model: b\n"
    )
    assert weights_at(compiled(text), HEAD) == [2.0, 3.0]


def test_a_switch_under_a_model_is_noted_and_changes_nothing() -> None:
    text = (
        "merge_method: slerp\nbase_model: a\nparameters: {t: 0.25}\nmodels:\n- model: a\n"
        "- model: b\n  parameters:\n    t: 0.75\n"
    )
    made = compiled(text)
    assert value_at(made, HEAD, "t") == 0.25
    (note,) = made.notes
    assert note.startswith("line 8: 't' is ignored under a model")


def test_a_switch_under_a_model_does_not_count_as_given() -> None:
    text = "merge_method: slerp\nmodels:\n- {model: a, parameters: {t: 1}}\n- model: b\n"
    assert "method 'slerp' needs parameter 't'" in error_of(text).what


@pytest.mark.parametrize("level", ["recipe", "model"])
def test_a_parameter_of_another_method_is_noted(level: str) -> None:
    if level == "recipe":
        text = f"{LINEAR}1\n  t: 0.5\n"
    else:
        text = "merge_method: linear\nmodels:\n- model: a\n  parameters:\n    weight: 1\n    t: 1\n"
    made = compiled(text)
    (note,) = made.notes
    line = len(text.splitlines())
    assert note.startswith(f"line {line}: 't' is ignored: linear has no such parameter (")
    assert "slerp" in note


def test_notes_of_a_recipe_reach_its_plan(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("a", {"w": torch.ones(1)})
    path = tmp_path / "r.yml"
    path.write_text(
        f"merge_method: passthrough\nmodels: [{{model: {model}}}]\nparameters: {{t: 1}}\n"
    )
    assert any(n.startswith("line 3: 't' is ignored") for n in plan_recipe(path).plan.notes)


# -- the base ------------------------------------------------------------------------------------


def listed(method: str, names: str, base: str | None, extra: str) -> str:
    """A recipe over models called by single letters."""
    lines = [f"merge_method: {method}", f"models: [{', '.join(f'{{model: {n}}}' for n in names)}]"]
    lines += [f"base_model: {base}"] * (base is not None)
    return "\n".join([*lines, f"parameters: {{{extra}}}", ""])


BASES = [
    ("slerp", "ab", "a", "t: 0.5", "ab"),
    ("slerp", "ab", "b", "t: 0.5", "ba"),
    ("slerp", "b", "a", "t: 0.5", "ab"),
    ("slerp", "ab", None, "t: 0.5", "ab"),
    ("linear", "ab", None, "weight: 1", "ab"),
    ("linear", "ab", "a", "weight: 1", "ab"),
    ("linear", "ab", "b", "weight: 1", "ab"),
    ("linear", "ab", "c", "weight: 1", "abc"),
    ("task_arithmetic", "ab", "c", "weight: 1", "cab"),
    ("task_arithmetic", "ab", "a", "weight: 0.5", "ab"),
    ("ties", "ab", "c", "weight: 1", "cab"),
    ("ties", "abc", "c", "weight: 1", "cab"),
    ("model_stock", "ab", "c", "", "cab"),
]


@pytest.mark.parametrize(("method", "names", "base", "extra", "used"), BASES)
def test_which_models_are_used_and_in_which_order(
    method: str, names: str, base: str | None, extra: str, used: str
) -> None:
    assert "".join(inputs_of(compiled(listed(method, names, base, extra)))) == used


def test_a_listed_base_needs_no_parameters() -> None:
    text = (
        "merge_method: ties\nbase_model: base\nmodels:\n- model: base\n"
        "- {model: a, parameters: {weight: 0.5}}\n"
    )
    assert value_at(compiled(text), HEAD, "weight") == (0.5,)


def test_slerp_of_two_models_and_another_base_is_refused() -> None:
    error = error_of(listed("slerp", "ab", "c", "t: 0.5"))
    assert error.what == "method 'slerp' takes exactly 2 models"
    assert error.found == "3"


def test_an_unlisted_base_of_an_average_is_counted_or_noted() -> None:
    """With a weight for all it is one more model, as in published recipes; else it lends files."""
    counted = compiled(listed("linear", "ab", "c", "weight: 1"))
    assert any("c is averaged in" in n for n in counted.notes)
    own = "models:\n- {model: a, parameters: {weight: 1}}\nmerge_method: linear\nbase_model: c\n"
    made = compiled(own)
    assert inputs_of(made) == ["a"]
    assert any("c gives config and tokenizer only" in n for n in made.notes)


def test_a_model_that_is_named_twice_is_opened_once() -> None:
    calls: list[str] = []
    real = opener()

    def count(name: Reference) -> Checkpoint:
        calls.append(str(name))
        return real(name)

    compile_recipe(parse_recipe(listed("ties", "aab", "b", "weight: 1")), count)
    assert calls == ["b", "a"]


# -- types, seeds --------------------------------------------------------------------------------

PLAIN = (
    "merge_method: dare_linear\nbase_model: base\nmodels: [{model: a}]\nparameters: {weight: 1}\n"
)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("", "float32"),
        ("dtype: bfloat16", "bfloat16"),
        ("dtype: torch.float16", "float16"),
        ("dtype: float16\nout_dtype: bfloat16", "bfloat16"),
        ("out_dtype: fp16", "float16"),
        ("dtype: ~\nout_dtype: ~", "float32"),
    ],
)
def test_out_dtype_goes_before_dtype(written: str, name: str) -> None:
    assert compiled(f"{PLAIN}{written}\n").checkpoint[HEAD].dtype.name == name


def seed_of(made: Compiled) -> int:
    return next(n for n in walk(made.checkpoint.tensors[HEAD]) if isinstance(n, Apply)).seed


def test_the_seed_is_the_callers_or_the_recipes_or_nought() -> None:
    assert seed_of(compiled(PLAIN)) == 0
    assert seed_of(compiled(f"{PLAIN}seed: 7\n")) == 7
    assert seed_of(compiled(f"{PLAIN}seed: 7\n", seed=9)) == 9
    assert seed_of(compiled(f"{PLAIN}seed: 7\n", seed=0)) == 0


# -- settings ------------------------------------------------------------------------------------


def test_a_setting_overrides_what_is_written() -> None:
    made = compiled(SLERP + "0.5", settings=["parameters.t=0.25"])
    assert value_at(made, HEAD, "t") == 0.25
    made = compiled(SLERP + "0.5", settings=["parameters.t=[0, 1]"])
    assert value_at(made, layer(4), "t") == 1.0
    made = compiled(SLERP + "0.5", settings=["parameters.t=1", "parameters.t=0.75"])
    assert value_at(made, HEAD, "t") == 0.75
    made = compiled(SLERP + "0.5", settings=["models.1.model=c"])
    assert inputs_of(made) == ["a", "c"]


def test_a_setting_adds_what_is_not_written() -> None:
    text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\n"
    made = compiled(text, settings=["models.0.parameters.weight=3", "models.1.parameters.weight=1"])
    assert weights_at(made, HEAD) == [0.75, 0.25]
    made = compiled(text, settings=["parameters.weight=1", "dtype=bfloat16"])
    assert made.checkpoint[HEAD].dtype.name == "bfloat16"


SETTINGS = {
    "no equals sign": ("parameters.t", "not KEY=VALUE"),
    "no key": ("=3", "not KEY=VALUE"),
    "a model too far": ("models.2.model=a", "names no item"),
    "a model by name": ("models.a.model=a", "names no item"),
    "a negative model": ("models.-1.model=a", "names no item"),
    "bad YAML": ("parameters.t=[", "not readable as YAML"),
    "an unknown key": ("parametrs.t=1", "unknown key 'parametrs'"),
    "an unknown parameter": ("parameters.x=1", "unknown parameter 'x'"),
    "a value out of type": ("parameters.t=abc", "parameter 't' needs a number"),
    "an unknown method": ("merge_method=slrp", "unknown merge method 'slrp'"),
}


@pytest.mark.parametrize(("setting", "what"), SETTINGS.values(), ids=SETTINGS)
def test_a_wrong_setting_is_refused(setting: str, what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        compiled(SLERP + "0.5", settings=[setting])
    assert what in caught.value.what


def test_the_copy_of_a_recipe_says_what_was_overridden() -> None:
    recipe = parse_recipe(PLAIN, settings=["seed=3", "dtype=bfloat16"])
    notes = [f"# overridden when it was run: {s}\n" for s in ("seed=3", "dtype=bfloat16")]
    assert recipe.text == "".join([*notes, PLAIN])
    assert parse_recipe(PLAIN).text == PLAIN


# -- old files -----------------------------------------------------------------------------------


def test_lenient_lists_unknown_keys_and_goes_on() -> None:
    text = (
        "merge_method: linear\nmodels:\n- model: a\n  wieght: 1\n  parameters: {weight: 1}\n"
        "extra: {deep: [1]}\n"
    )
    assert "unknown key" in error_of(text).what
    made = compiled(text, lenient=True)
    assert inputs_of(made) == ["a"]
    assert sorted(made.notes) == [
        "line 4: 'wieght' is not known and is ignored",
        "line 6: 'extra' is not known and is ignored",
    ]


def test_lenient_lists_unknown_parameters_too() -> None:
    made = compiled(f"{LINEAR}1\n  wieght: 2\n", lenient=True)
    assert weights_at(made, HEAD) == [0.5, 0.5]
    (note,) = made.notes
    assert "line 5" in note and "'wieght'" in note


def test_lenient_is_strict_about_everything_else() -> None:
    for text in (f"{LINEAR}abc\n", "merge_method: liner\nmodels: [{model: a}]\n", "models: [\n"):
        error_of(text, lenient=True)


# -- front doors ---------------------------------------------------------------------------------


def test_a_recipe_is_a_checkpoint_as_often_as_it_is_asked_for(
    make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model("a", {"w": torch.ones(1)})
    path = tmp_path / "r.yml"
    path.write_text(f"merge_method: passthrough\nmodels: [{{model: {model}}}]\n")
    for _ in range(2):
        assert isinstance(merge.load_recipe(path).tensors["w"], Linear | Read)
    assert merge.load_recipe(str(path)).state_dict()["w"].item() == 1.0


def test_no_error_of_a_recipe_is_a_bare_one() -> None:
    """A few hundred seeded mutations of a good recipe: it is refused by name, or it compiles."""
    good = (
        "merge_method: ties\nbase_model: base\nmodels:\n  - model: a\n    parameters:\n"
        "      weight: [0.5, 1e-1]\n      density:\n        - {filter: mlp, value: .5}\n"
        "        - value: 1\n  - model: b\nparameters: {weight: 1, normalize: yes}\n"
        "dtype: bfloat16\n"
    )
    pieces = [
        "[",
        "]",
        "{",
        "}",
        ":",
        "- ",
        "\n",
        " ",
        "'",
        '"',
        "&a ",
        "*a",
        "~",
        "!!",
        "#",
        "1e999",
    ]
    pieces += [
        "9" * 400,
        "<<: ",
        "? ",
        "|",
        ">",
        "%",
        "@",
        "\t",
        "\u2028",
        "\U0001f642",
        "0x1F",
        ".nan",
    ]
    draw, refused = random.Random(5), 0
    for _ in range(300):
        text = good
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(text))
            text = text[:at] + draw.choice([*pieces, ""]) + text[at + draw.randint(0, 3) :]
        try:
            compiled(text, layers=1)
        except MergeError as error:
            refused += 1
            assert error.where["recipe"] == "recipe"
    assert refused > 100


# -- the schema for editors ----------------------------------------------------------------------

KEYWORDS = {
    "$defs", "$ref", "$schema", "additionalProperties", "allOf", "anyOf", "const", "default",
    "deprecated", "description", "enum", "exclusiveMaximum", "exclusiveMinimum", "if", "items",
    "maxItems", "maximum", "minItems", "minLength", "minProperties", "minimum", "oneOf",
    "properties", "propertyNames", "required", "then", "title", "type",
}  # fmt: skip
TYPES = {"array", "boolean", "integer", "null", "number", "object", "string"}


def subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    """Every schema in ``schema``, itself first."""
    if isinstance(schema, bool):
        return
    assert isinstance(schema, dict), schema
    yield schema
    for key in ("additionalProperties", "items", "propertyNames", "if", "then"):
        if key in schema:
            yield from subschemas(schema[key])
    for key in ("allOf", "anyOf", "oneOf"):
        for inner in schema.get(key, []):
            yield from subschemas(inner)
    for key in ("properties", "$defs"):
        for inner in schema.get(key, {}).values():
            yield from subschemas(inner)


def test_the_schema_is_a_json_schema() -> None:
    schema = json_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    for inner in subschemas(schema):
        assert set(inner) <= KEYWORDS, set(inner) - KEYWORDS
        kinds = inner.get("type", [])
        assert {kinds} <= TYPES if isinstance(kinds, str) else set(kinds) <= TYPES
        if "$ref" in inner:
            assert inner["$ref"].removeprefix("#/$defs/") in schema["$defs"]
        if "required" in inner and "properties" in inner:
            assert set(inner["required"]) <= set(inner["properties"])


def test_the_schema_knows_every_key_method_and_parameter() -> None:
    schema = json_schema()
    assert list(schema["properties"]) == list(RecipeModel.model_fields)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["merge_method"]["enum"] == ALL_METHODS
    rules = {r["if"]["properties"]["merge_method"]["const"]: r["then"] for r in schema["allOf"]}
    assert list(rules) == ALL_METHODS
    for name, rule in rules.items():
        names = rule["properties"]["parameters"]["propertyNames"]["enum"]
        assert names == list(methods.get(name).parameters)
