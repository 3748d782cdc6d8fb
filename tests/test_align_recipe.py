"""``align:`` and ``repair:`` in recipes: what they make, what a plan says, where errors point."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch
from merge_cli.app import cli
from safetensors.torch import load_file, save_file
from torch import Tensor

import merge
from merge import aligning, steps
from merge.applying import plan_recipe
from merge.errors import RecipeError
from merge.recipe.schema import json_schema, keys_at

from .conftest import write_model
from .networks import (
    mlp,
    mlp_spec,
    one_thread,  # noqa: F401  (a fixture)
    planted,
    symmetry_of,
)
from .symmetries import randomised

SPEC = mlp_spec(3)
TASK = """
import merge, torch
from torch import nn


def data():
    return _made(None)


def labelled():
    return _made(torch.arange(99) % 3)


def _made(target):
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))
    torch.manual_seed(0)
    return merge.Task(net, nn.functional.cross_entropy, train=[(torch.randn(99, 6), target)])
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Tensor]]:
    """Folders a, and b and c that are a in other coordinates, a spec and a task."""
    monkeypatch.chdir(tmp_path)
    a = {n: t.float() for n, t in randomised(mlp([6, 12, 9, 3])).state_dict().items()}
    states = {"a": a}
    for seed, name in enumerate("bc", 1):
        moved, _ = planted(symmetry_of(SPEC, a), a, seed)
        states[name] = {n: t.contiguous() for n, t in moved.items()}
    for name, state in states.items():
        write_model(tmp_path / name, state)
    (tmp_path / "spec.json").write_text(json.dumps(SPEC))
    (tmp_path / "recipe_task.py").write_text(TASK)
    return states


def recipe(text: str) -> Path:
    file = Path("recipe.yml")
    file.write_text(text)
    return file


def tensors(text: str) -> dict[str, Tensor]:
    merge.apply(recipe(text), "out", replace=True)
    return load_file("out/model.safetensors")


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return all(torch.allclose(found[n], wanted[n], rtol=0, atol=1e-6) for n in wanted)


MEAN = """
merge_method: linear
models:
  - model: a
  - model: b
  - model: c
parameters: {weight: 1.0}
"""
States = dict[str, dict[str, Tensor]]


# -- what they make --------------------------------------------------------------------------------
def test_all_models_come_to_the_first(here: States) -> None:
    assert not close(tensors(MEAN), here["a"])
    assert close(tensors(f"{MEAN}align: {{symmetry: spec.json}}\n"), here["a"])


def test_or_to_the_base(here: States) -> None:
    text = """
merge_method: task_arithmetic
base_model: b
models: [{model: a}, {model: c}]
parameters: {weight: 0.5}
align: {to: base, symmetry: spec.json}
"""
    assert close(tensors(text), here["b"])


def test_or_to_the_one_that_is_named(here: States) -> None:
    assert close(tensors(f"{MEAN}align: {{to: c, symmetry: spec.json}}\n"), here["c"])


def test_one_model_alone_is_aligned_or_left_out(here: States) -> None:
    text = """
merge_method: linear
models:
  - model: a
  - model: b
    align: {symmetry: spec.json}
parameters: {weight: 1.0}
"""
    assert close(tensors(text), here["a"])
    without = text.replace("{symmetry: spec.json}", "none") + "align: {symmetry: spec.json}\n"
    assert not close(tensors(without), here["a"])


@pytest.mark.parametrize("method", ["activation", "ste"])
def test_data_decides_where_it_is_given(here: States, method: str) -> None:
    how = f"{{method: {method}, data: 'recipe_task:labelled', symmetry: spec.json}}"
    assert close(tensors(f"{MEAN}align: {how}\n"), here["a"])


def test_layers_of_aligned_models_are_sliced(here: States) -> None:
    """Slices are cut from models that are aligned as a whole."""
    text = """
merge_method: linear
slices:
  - sources:
      - {model: a, layer_range: [0, 5], parameters: {weight: 0.5}}
      - {model: b, layer_range: [0, 5], parameters: {weight: 0.5}}
align: {symmetry: spec.json}
"""
    assert close(tensors(text), here["a"])


def test_statistics_go_along_with_their_model(here: States) -> None:
    """Weights that count by statistics in their own coordinates would be mixed up."""
    big = {n: torch.full_like(t, 1e-3) for n, t in here["b"].items()}
    big["0.weight"][0] = 1e3
    write_model(Path("fb"), big)
    write_model(Path("fa"), {n: torch.ones_like(t) for n, t in here["a"].items()})
    other = {n: t + 1 for n, t in here["b"].items()}
    write_model(Path("b2"), other)
    text = """
merge_method: fisher
models:
  - {model: a, statistics: fa}
  - {model: b2, statistics: fb}
"""
    made = plan_recipe(recipe(f"{text}align: {{symmetry: spec.json}}\n")).compiled.checkpoint
    found = made.state_dict()["0.weight"]
    own = aligning.align("b2", to="a", symmetry="spec.json").state_dict()["0.weight"]
    row = int((found - own).abs().sum(1).argmin())
    assert torch.allclose(found[row], own[row], atol=0.01)
    assert torch.equal(own[row], other["0.weight"][0])


def test_a_result_is_repaired_on_data(here: States) -> None:
    noisy = {n: t + 0.3 * torch.randn_like(t) for n, t in here["a"].items()}
    write_model(Path("d"), noisy)
    text = """
merge_method: linear
models: [{model: a}, {model: d}]
parameters: {weight: 1.0}
"""
    plain, repaired = tensors(text), tensors(f"{text}repair: recipe_task:data\n")
    torch.manual_seed(0)
    x = torch.randn(99, 6)

    def deviation(state: dict[str, Tensor]) -> Tensor:
        return (x @ state["0.weight"].T + state["0.bias"]).std(0, correction=0)

    goal = (deviation(here["a"]) + deviation(noisy)) / 2
    torch.testing.assert_close(deviation(repaired), goal, rtol=1e-4, atol=1e-5)
    assert (deviation(plain) - goal).abs().max() > 0.01
    assert torch.equal(plain["4.weight"], repaired["4.weight"])


def test_repaired_weights_keep_their_type(here: States) -> None:
    for name in "ab":
        half = {n: t.bfloat16() for n, t in here[name].items()}
        write_model(Path(f"{name}16"), half)
    text = """
merge_method: linear
models: [{model: a16}, {model: b16}]
parameters: {weight: 1.0}
align: {symmetry: spec.json}
repair: {data: 'recipe_task:data', weights: [1, 2]}
"""
    assert {t.dtype for t in tensors(text).values()} == {torch.bfloat16}


# -- what a plan says ------------------------------------------------------------------------------
def test_a_plan_reads_no_weights_and_says_so(here: States, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> Any:
        raise AssertionError("matched")

    monkeypatch.setattr(aligning, "match_weights", never)
    file = recipe(f"{MEAN}align: {{symmetry: spec.json}}\nrepair: recipe_task:data\n")
    done = click.testing.CliRunner().invoke(cli, ["plan", str(file)])
    assert done.exit_code == 0, done.output
    assert "line 8: b to a is aligned when the recipe is applied" in done.output
    assert "line 9: the result's statistics will be put right" in done.output
    dry = click.testing.CliRunner().invoke(cli, ["apply", str(file), "out", "--dry-run"])
    assert "is aligned when the recipe is applied" in dry.output and not Path("out").exists()


def test_a_plan_with_align_computes_it(here: States) -> None:
    file = recipe(f"{MEAN}align: {{symmetry: spec.json}}\n")
    done = click.testing.CliRunner().invoke(cli, ["plan", str(file), "--align", "--tensors"])
    assert done.exit_code == 0, done.output
    assert "line 8: b to a: weight matching, " in done.output and "reordered(" in done.output
    applied = click.testing.CliRunner().invoke(cli, ["apply", str(file), "out", "--json", "-q"])
    data = json.loads(applied.output)
    assert data["plan"][:16] in done.output
    assert any("cosine of the weights" in note for note in data["notes"])


def test_the_same_recipe_makes_the_same_bytes(here: States) -> None:
    noise = {n: torch.randn_like(t) for n, t in here["a"].items()}
    write_model(Path("d"), noise)
    text = MEAN.replace("model: b", "model: d") + "align: {symmetry: spec.json}\n"
    first = tensors(text)
    steps._found.clear()
    assert all(torch.equal(t, first[n]) for n, t in tensors(text).items())


def test_a_match_is_found_once_for_all_values_of_a_sweep(
    here: States, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps._found.clear()
    calls = []
    plain = aligning.match_weights
    monkeypatch.setattr(
        aligning, "match_weights", lambda *a, **k: calls.append(1) or plain(*a, **k)
    )
    file = recipe(f"{MEAN}align: {{symmetry: spec.json}}\n")
    for weight in (0.5, 0.7):
        plan_recipe(file, settings=[f"parameters.weight={weight}"])
    assert len(calls) == 2  # b and c
    save_file({n: t + 1 for n, t in here["b"].items()}, "b/model.safetensors")
    plan_recipe(file)
    assert len(calls) == 3


# -- what is refused, and where --------------------------------------------------------------------
def error_of(text: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        plan_recipe(recipe(text), compute=False)
    return caught.value


@pytest.mark.parametrize(
    ("line", "what", "at", "do"),
    [
        ("align: weigth", "no known word", "8:1", "weight"),
        ("align: {metod: weight}", "unknown key 'metod'", "8:9", "method"),
        ("align: {to: base}", "there is none", "8:9", None),
        ("align: {to: z}", "the stage does not name", "8:9", None),
        ("align: {keep: d}", "is wrong", "8:9", None),
        ("repair: {}", "key 'data' is missing", "8:1", None),
        ("repair: {data: x.npz, wieghts: []}", "unknown key 'wieghts'", "8:23", "weights"),
        ("repair: {data: x.npz, weights: [1]}", "not one weight for each", "8:23", None),
    ],
)
def test_words_that_are_wrong_have_a_place(
    here: States, line: str, what: str, at: str, do: str | None
) -> None:
    error = error_of(f"{MEAN}{line}\n")
    assert what in str(error)
    assert f"{error.where['line']}:{error.where['column']}" == at
    assert do is None or do in str(error.do)


def test_a_model_is_not_aligned_with_itself_or_in_circles(here: States) -> None:
    own = MEAN.replace("- model: a", "- {model: a, align: {to: a}}")
    assert "with itself" in str(error_of(own))
    chain = MEAN.replace("- model: b", "- {model: b, align: {to: c}}").replace(
        "- model: c", "- {model: c, align: {to: a}}"
    )
    assert "itself aligned with another" in str(error_of(chain))


def test_parts_of_models_are_not_aligned(here: States) -> None:
    text = """
merge_method: linear
modules: {"0": {models: [{model: a}, {model: b}]}}
parameters: {weight: 1.0}
align: weight
"""
    assert "aligned whole" in str(error_of(text))


def test_slices_are_not_repaired(here: States) -> None:
    text = """
merge_method: linear
slices: [{sources: [{model: a, layer_range: [0, 5]}, {model: b, layer_range: [0, 5]}]}]
parameters: {weight: 1.0}
repair: recipe_task:data
"""
    assert "whole models" in str(error_of(text))


def test_an_error_while_matching_has_the_recipes_place(here: States) -> None:
    with pytest.raises(merge.MergeError) as caught:
        plan_recipe(recipe(f"{MEAN}align: weight\n"))
    assert (caught.value.where["line"], caught.value.where["model"]) == ("8", "b")


def test_the_schema_knows_the_words() -> None:
    schema = json_schema()
    shown = json.dumps(schema["properties"]["align"])
    assert "activation" in shown and "symmetry" in shown
    assert set(keys_at(("align", ""))) == {
        "method",
        "to",
        "data",
        "symmetry",
        "keep",
        "signed",
        "rotate",
        *("by", "regularisation", "marginals", "metric", "features", "sweeps", "residual"),
    }
    assert keys_at(("models", 0, "align", "")) == keys_at(("align", ""))
    assert set(keys_at(("repair", ""))) == {"data", "weights"}
