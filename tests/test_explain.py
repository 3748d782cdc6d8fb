"""``merge plan --explain``: which value a parameter takes for a tensor, and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from merge_cli.app import cli

from merge.errors import PlanError
from merge.recipe.compile import Compiled

from .conftest import write_model
from .tiny import ATTENTION, EMBED, HEAD, NORM, compiled, layer, model, noise, value_at, zoo

OPEN = zoo(a=4, b=4, c=4, base=4)


def why(made: Compiled, tensor: str, parameter: str, owner: str | None = None) -> str:
    """The value and its reason, in the result's stage."""
    (found,) = [
        r for r in made.explain(tensor)[0].reasons if (r.parameter, r.model) == (parameter, owner)
    ]
    return f"{found.value}: {found.why}"


LEVELS = """\
merge_method: ties
base_model: base
modules:
  default:
    slices:
    - sources:
      - {model: base, layer_range: [0, 2]}
      - model: a
        layer_range: [2, 4]
        parameters:
          density: [{filter: layers.3., value: 0.1}]
      parameters:
        density: [{filter: self_attn, value: [0.2, 0.4]}]
    parameters:
      density:
      - filter: norm
        value: 0.5
      lambda: [1, 3]
parameters:
  weight: 1
  density: [{filter: '*', value: 0.6}]
"""
REASONS = {
    "the model's own": (
        layer(1), "density", "a",
        "0.1: line 11, parameters of a: filter 'layers.3.'",
    ),
    "the slice's": (
        layer(0, ATTENTION), "density", "a",
        "0.2: line 13, parameters of slice 1: filter 'self_attn', gradient [0.2, 0.4] at depth 0",
    ),
    "the module's": (
        NORM, "density", "a", "0.5: line 17, parameters of module default: filter 'norm'",
    ),
    "the recipe's": (HEAD, "density", "a", "0.6: line 21, the recipe's parameters: filter '*'"),
    "a gradient": (
        layer(1), "lambda", None,
        "3.0: line 18, parameters of module default: gradient [1.0, 3.0] at depth 1",
    ),
    "a gradient outside the layers": (
        HEAD, "lambda", None,
        "1.0: line 18, parameters of module default: gradient [1.0, 3.0] at depth 0",
    ),
    "plain": (EMBED, "weight", "a", "1.0: line 20, the recipe's parameters"),
    "a default": (EMBED, "normalize", None, "True: default"),
}  # fmt: skip


@pytest.mark.parametrize(("tensor", "key", "owner", "said"), REASONS.values(), ids=REASONS)
def test_every_level_says_where_it_stands(
    tensor: str, key: str, owner: str | None, said: str
) -> None:
    assert why(compiled(LEVELS, OPEN), tensor, key, owner) == said


def test_what_is_explained_is_what_is_computed() -> None:
    made = compiled(LEVELS, OPEN)
    for tensor in made.checkpoint:
        (found,) = made.explain(tensor)
        for reason in found.reasons:
            key = "lambda_" if reason.parameter == "lambda" else reason.parameter
            computed = value_at(made, tensor, key)
            assert computed == (reason.value if reason.model is None else (reason.value,))


def test_slices_show_which_layer_of_which_model() -> None:
    (found,) = compiled(LEVELS, OPEN).explain(layer(1))
    assert found.inputs == (f"a[{layer(3)}]",)
    assert (found.method, found.base, found.depth, found.stage) == ("ties", "base", 1.0, None)


def test_a_setting_is_named_in_place_of_a_line() -> None:
    text = "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\n"
    made = compiled(text + "parameters: {t: 0.5}\n", OPEN, settings=["parameters.t=[0, 1]"])
    said = "1.0: setting parameters.t=[0, 1], the recipe's parameters: gradient [0.0, 1.0] at depth"
    assert why(made, layer(3), "t") == f"{said} 1"
    made = compiled(text, OPEN, settings=["parameters={t: 0.5}"])
    assert why(made, HEAD, "t") == "0.5: setting parameters={t: 0.5}, the recipe's parameters"


STAGES = """\
name: mean
merge_method: linear
models: [{model: a}, {model: b}]
parameters: {weight: [1, 0.5]}
---
merge_method: passthrough
slices:
- sources: [{model: c, layer_range: [0, 2]}]
- sources: [{model: mean, layer_range: [1, 3], parameters: {scale: 2}}]
---
name: aside
merge_method: passthrough
models: [{model: mean}]
save: aside
"""


def test_stages_are_followed_to_their_own_tensors() -> None:
    first, second = compiled(STAGES, OPEN).explain(layer(3))
    assert (first.stage, first.tensor, first.inputs) == (None, layer(3), (f"mean[{layer(2)}]",))
    assert (second.stage, second.tensor, second.method) == ("mean", layer(2), "linear")
    assert second.inputs == (f"a[{layer(2)}]", f"b[{layer(2)}]")
    values = {(r.parameter, r.model): r.value for r in second.reasons}
    assert values["weight", "a"] == pytest.approx(1 - 0.5 * 2 / 3)


def test_a_stage_that_is_not_needed_for_the_tensor_is_not_shown() -> None:
    assert [e.stage for e in compiled(STAGES, OPEN).explain(layer(0))] == [None]


def test_what_a_module_leaves_to_the_donor_is_said() -> None:
    text = (
        "merge_method: linear\nmodules:\n  mlp:\n    models: [{model: a}, {model: b}]\n"
        "parameters: {weight: 1}\n"
    )
    made = compiled(text, OPEN)
    (found,) = made.explain(HEAD)
    assert (found.method, found.inputs, found.reasons) == ("no module", (f"a[{HEAD}]",), ())
    assert len(made.explain(layer(0))[0].reasons) == 3


@pytest.mark.parametrize(
    ("tensor", "do"),
    [
        ("lm_heda.weight", "did you mean 'lm_head.weight'?"),
        ("model.layers.3.mlp.up_proj", f"did you mean '{layer(3)}'?"),
        ("embed", f"did you mean '{EMBED}'?"),
        ("qqqq", "see `merge plan --tensors`"),
        ("", f"did you mean '{EMBED}'?"),
    ],
)
def test_a_tensor_that_is_not_there_is_refused(tensor: str, do: str) -> None:
    text = "merge_method: passthrough\nmodels: [{model: a}]\n"
    with pytest.raises(PlanError, match="no such tensor") as caught:
        compiled(text, OPEN).explain(tensor)
    assert (caught.value.do, caught.value.where["tensor"]) == (do, tensor)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        write_model(tmp_path / name, model(name, 4), config={"num_hidden_layers": 4})
    (tmp_path / "r.yml").write_text(STAGES)
    return tmp_path / "r.yml"


def test_the_command_prints_operands_and_reasons(recipe: Path) -> None:
    done = CliRunner().invoke(cli, ["plan", str(recipe), "--explain", layer(3)])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines() == [
        f"{layer(3)}: passthrough at depth 1",
        f"  of mean[{layer(2)}]",
        "  scale mean = 2.0  line 9, parameters of mean",
        f"{layer(2)} in stage mean: linear at depth 0.6667",
        f"  of a[{layer(2)}], b[{layer(2)}]",
        "  weight a  = 0.6666666666666667  line 4, the recipe's parameters: gradient [1.0, 0.5] at"
        " depth 0.6667",
        "  weight b  = 0.6666666666666667  line 4, the recipe's parameters: gradient [1.0, 0.5] at"
        " depth 0.6667",
        "  normalize = True                default",
    ]


def test_the_command_gives_json(recipe: Path) -> None:
    done = CliRunner().invoke(cli, ["plan", str(recipe), "--explain", layer(3), "--json"])
    first, second = json.loads(done.stdout)
    assert first["tensor"] == layer(3) and first["stage"] is None
    assert second["stage"] == "mean"
    assert {r["parameter"] for r in second["reasons"]} == {"weight", "normalize"}
    assert set(second) == {"tensor", "stage", "method", "depth", "inputs", "base", "reasons"}


def test_constants_that_are_dropped_are_not_there(tmp_path: Path) -> None:
    states = {"a": {"w": noise(1), "position_ids": noise(2)}, "b": {"w": noise(3)}}
    for name, state in states.items():
        write_model(tmp_path / name, state)
    (tmp_path / "r.yml").write_text(
        f"merge_method: linear\nmodels: [{{model: {tmp_path / 'a'}}}, {{model: {tmp_path / 'b'}}}]"
        "\nparameters: {weight: 1}\n"
    )
    done = CliRunner().invoke(cli, ["plan", str(tmp_path / "r.yml"), "--explain", "position_ids"])
    assert isinstance(done.exception, PlanError)
