"""Recipes of several documents: one graph, the same result as one run after another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import merge
from merge.applying import plan_recipe
from merge.errors import MergeError, RecipeError
from merge.ir.expr import Apply, walk
from merge.recipe.compile import compile_recipe
from merge.recipe.read import parse_recipe, read_recipe

from .conftest import write_model
from .tiny import (
    HEAD,
    NORM,
    assert_near,
    assert_same,
    compiled,
    error_of,
    layer,
    model,
    place,
    result,
    zoo,
)

OPEN = zoo(a=3, b=3, c=3, base=3)
MEAN = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"


def named(name: str, text: str) -> str:
    return f"name: {name}\n{text}"


def linear(*models: str) -> str:
    listed = ", ".join(f"{{model: {m}}}" for m in models)
    return f"merge_method: linear\nmodels: [{listed}]\nparameters: {{weight: 1}}\n"


# -- which stage is the result ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "stages",
    [
        (named("m", MEAN), linear("m", "c")),
        (linear("m", "c"), named("m", MEAN)),
        (named("m", MEAN), named("result", linear("m", "c"))),
    ],
    ids=["unnamed last", "unnamed first", "all named"],
)
def test_the_result_is_the_document_without_a_name_or_the_last(stages: tuple[str, ...]) -> None:
    found = result("---\n".join(stages), OPEN)
    a, b, c = (model(n, 3)[HEAD].double() for n in "abc")
    assert_near(found[HEAD], ((a + b) / 2 + c) / 2)


def test_a_stage_that_nothing_uses_is_noted_and_not_opened() -> None:
    text = "---\n".join([named("m", linear("absent")), MEAN])
    assert compiled(text, OPEN).notes == ("stage 'm' is not used",)


def test_one_named_document_is_a_recipe() -> None:
    made = compiled(named("m", MEAN), OPEN)
    assert not made.notes and not made.saved


def test_a_last_line_of_dashes_is_no_stage() -> None:
    assert len(parse_recipe(f"---\n{MEAN}---\n# the end\n").stages) == 1


# -- references ------------------------------------------------------------------------------------


def test_a_stage_may_be_the_base() -> None:
    text = "---\n".join(
        [
            named("m", MEAN),
            "merge_method: task_arithmetic\nbase_model: m\nmodels: [{model: c}]\n"
            "parameters: {weight: 0.25}\n",
        ]
    )
    found = result(text, OPEN)
    a, b, c = (model(n, 3)[NORM].double() for n in "abc")
    mean = (a + b) / 2
    assert_near(found[NORM], mean + 0.25 * (c - mean))


def test_a_stage_that_is_base_and_model_is_one_model() -> None:
    text = "---\n".join(
        [
            named("m", MEAN),
            "merge_method: slerp\nbase_model: m\nmodels: [{model: m}, {model: c}]\n"
            "parameters: {t: 1}\n",
        ]
    )
    assert_near(result(text, OPEN)[HEAD], model("c", 3)[HEAD])


def test_a_stage_goes_before_a_folder_of_its_name() -> None:
    text = "---\n".join([named("c", MEAN), "merge_method: passthrough\nmodels: [{model: c}]\n"])
    found = result(text, OPEN)
    assert_near(found[HEAD], (model("a", 3)[HEAD] + model("b", 3)[HEAD]) / 2)


@pytest.mark.parametrize("written", ["m", "'m'", "{model: m}", "{path: m}", "{model: {path: m}}"])
def test_a_stage_is_named_as_a_model_is(written: str) -> None:
    text = "---\n".join(
        [named("m", MEAN), f"merge_method: passthrough\nmodels: [{{model: {written}}}]\n"]
    )
    assert_near(result(text, OPEN)[HEAD], (model("a", 3)[HEAD] + model("b", 3)[HEAD]) / 2)


def test_a_stage_may_get_another_architecture() -> None:
    text = "---\n".join(
        [
            named("m", MEAN),
            "merge_method: passthrough\n"
            "models: [{model: {model: m, override_architecture: Other}}]\n",
        ]
    )
    assert compiled(text, OPEN).checkpoint.side.config["architectures"] == ["Other"]


def test_slices_of_a_stage() -> None:
    text = "---\n".join(
        [
            named("m", MEAN),
            "merge_method: passthrough\nslices:\n"
            "- sources: [{model: c, layer_range: [0, 2]}]\n"
            "- sources: [{model: m, layer_range: [1, 3]}]\n",
        ]
    )
    made = compiled(text, OPEN)
    found = made.checkpoint.state_dict()
    assert_same(found[layer(1)], model("c", 3)[layer(1)])
    assert_near(found[layer(3)], (model("a", 3)[layer(2)] + model("b", 3)[layer(2)]) / 2)
    assert made.checkpoint.side.config == {"num_hidden_layers": 4, "of": "c"}


def test_a_stage_of_slices_has_as_many_layers_as_it_made() -> None:
    stage = (
        "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 3]}]\n"
        "- sources: [{model: b, layer_range: [0, 3]}]\n"
    )
    use = "merge_method: passthrough\nslices:\n- sources: [{model: m, layer_range: [%s]}]\n"
    made = compiled("---\n".join([named("m", stage), use % "2, 5"]), OPEN)
    assert_same(made.checkpoint.state_dict()[layer(1)], model("b", 3)[layer(0)])
    assert made.checkpoint.side.config["num_hidden_layers"] == 3
    error = error_of("---\n".join([named("m", stage), use % "2, 7"]), OPEN)
    assert error.what == "m has no layer 6"
    assert error.expected == "at most [0, 6]: it has 6 layers in model.layers"


def test_five_stages_within_one_another() -> None:
    stages = [named("s1", linear("a", "b"))]
    stages += [named(f"s{i}", linear(f"s{i - 1}", "b")) for i in range(2, 6)]
    found = result("---\n".join([linear("s5", "b"), *reversed(stages)]), OPEN)
    a, b = (model(n, 3)[HEAD].double() for n in "ab")
    assert_near(found[HEAD], b + (a - b) / 64)


# -- the same as one after another -----------------------------------------------------------------

THREE = (
    named(
        "one",
        "merge_method: ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {weight: 0.5, density: 0.6}\n",
    ),
    named(
        "two",
        "merge_method: dare_linear\nbase_model: base\nmodels: [{model: b}, {model: c}]\n"
        "parameters: {weight: 0.5, density: 0.5}\nseed: 5\n",
    ),
    "merge_method: slerp\nbase_model: one\nmodels: [{model: one}, {model: two}]\n"
    "parameters: {t: [0.25, 0.75]}\n",
)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models a, b, c and base on disk, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c", "base"):
        write_model(tmp_path / name, model(name, 3), config={"num_hidden_layers": 3})
    return tmp_path


def apply(text: str, out: str) -> dict[str, torch.Tensor]:
    Path(f"{out}.yml").write_text(text)
    merge.apply(f"{out}.yml", out)
    return load_file(f"{out}/model.safetensors")


def test_stages_come_to_the_same_as_runs_through_folders(folders: Path) -> None:
    together = apply("---\n".join(THREE), "together")
    for text in THREE[:2]:
        apply(text, text.split()[1])
    apart = apply(THREE[2], "apart")
    assert set(together) == set(apart)
    for name, tensor in together.items():
        torch.testing.assert_close(tensor, apart[name], rtol=2e-6, atol=1e-6)


def test_a_stage_that_is_saved_is_what_it_is_alone(folders: Path) -> None:
    saved = THREE[1] + "save: kept\n"
    apply("---\n".join([THREE[0], saved, THREE[2]]), "out")
    alone = apply(THREE[1], "alone")
    assert alone.keys() == load_file("kept/model.safetensors").keys()
    for file in ("model.safetensors", "config.json"):
        assert (folders / "kept" / file).read_bytes() == (folders / "alone" / file).read_bytes()


def test_a_stage_that_is_saved_and_not_used_is_written_too(folders: Path) -> None:
    apply("---\n".join([named("m", MEAN) + "save: kept\n", linear("a", "c")]), "out")
    assert_near(load_file("kept/model.safetensors")[HEAD], sum_of("a", "b") / 2)
    assert_near(load_file("out/model.safetensors")[HEAD], sum_of("a", "c") / 2)


def sum_of(*names: str) -> torch.Tensor:
    return torch.stack([model(n, 3)[HEAD].double() for n in names]).sum(0)


def test_two_stages_cannot_be_saved_in_one_folder(folders: Path) -> None:
    text = "---\n".join(
        [named("m", MEAN) + "save: k\n", named("n", MEAN) + "save: ./k\n", linear("m", "n")]
    )
    with pytest.raises(MergeError, match="into one folder"):
        apply(text, "out")


def test_save_in_the_result_itself_is_noted() -> None:
    made = compiled(f"{MEAN}save: elsewhere\n", OPEN)
    assert made.notes == ("line 4: 'save' is ignored: this stage is the result itself",)
    assert made.saved == ()


# -- seeds, dtypes, settings -----------------------------------------------------------------------


def seeds(text: str, seed: int | None = None) -> set[tuple[str, int]]:
    recipe = parse_recipe(text)
    made = compile_recipe(recipe, OPEN, seed=seed)
    applied = [n for n in walk(made.checkpoint.tensors[HEAD]) if isinstance(n, Apply)]
    return {(n.method.name, n.seed) for n in applied}


def test_each_stage_has_its_own_seed_unless_the_caller_has_one() -> None:
    text = "---\n".join([THREE[0] + "seed: 3\n", THREE[1], THREE[2]])
    assert seeds(text) == {("ties", 3), ("dare_linear", 5), ("slerp", 0)}
    assert {s for _, s in seeds(text, seed=9)} == {9}


def test_the_dtype_of_a_stage_rounds_nothing_that_another_makes_of_it() -> None:
    text = "---\n".join([named("m", MEAN) + "dtype: bfloat16\n", linear("m", "c")])
    found = result(text, OPEN)[HEAD]
    assert found.dtype == torch.float32
    assert_near(found, (sum_of("a", "b") / 2 + sum_of("c")) / 2)


def test_a_setting_is_for_the_result_or_for_the_stage_that_it_names() -> None:
    text = "---\n".join([named("m", MEAN), linear("m", "c")])
    settings = ["m:models.0.parameters.weight=3", "models.1.parameters.weight=0"]
    found = result(text, OPEN, settings=settings)[HEAD]
    assert_near(found, 0.75 * sum_of("a") + 0.25 * sum_of("b"))


def test_a_stage_may_have_a_colon_in_its_name() -> None:
    text = "---\n".join([named("'m:1'", MEAN), linear("m:1", "c")])
    found = result(text, OPEN, settings=["m:1:parameters.weight=[1, 1]"])[HEAD]
    assert_near(found, (sum_of("a", "b") / 2 + sum_of("c")) / 2)


def test_a_setting_for_a_stage_that_is_not_there_is_refused() -> None:
    text = "---\n".join([named("mean", MEAN), linear("mean", "c")])
    with pytest.raises(RecipeError, match="for stage 'maen', which there is not") as caught:
        parse_recipe(text, settings=["maen:parameters.weight=3"])
    assert caught.value.do == "did you mean 'mean'?"
    with pytest.raises(RecipeError, match="for stage 'x'") as caught:
        parse_recipe(MEAN, settings=["x:parameters.weight=3"])
    assert caught.value.expected == "key=value: no stage has a name"


def test_lenient_notes_say_which_stage_they_are_of() -> None:
    first = named("m", MEAN) + "wieght: 1\ndtype: float32\ndtype: float16\n"
    made = compiled("---\n".join([first, linear("m", "c") + "extra: 1\n"]), OPEN, lenient=True)
    assert set(made.notes) == {
        "stage 'm': line 5: 'wieght' is not known and is ignored",
        "stage 'm': line 7: 'dtype' is given again: the last counts",
        "line 12: 'extra' is not known and is ignored",
    }


# -- what is refused -------------------------------------------------------------------------------

USES = "merge_method: passthrough\nmodels:\n- model: "
REFUSED: dict[str, tuple[tuple[str, ...], str, tuple[int, int]]] = {
    "itself": ((named("m", f"{USES}m\n"),), "in a circle", (4, 3)),
    "one another": (
        (named("m", f"{USES}n\n"), named("n", f"{USES}m\n"), f"{USES}n\n"),
        "in a circle",
        (4, 3),
    ),
    "a base in a circle": (
        (
            named("m", "base_model: n\n" + MEAN),
            named("n", "base_model: m\n" + MEAN),
            f"{USES}m\n",
        ),
        "in a circle",
        (8, 1),
    ),
    "two of one name": (
        (named("m", MEAN), named("m", MEAN), MEAN),
        "two stages are called 'm'",
        (6, 1),
    ),
    "two without a name": ((MEAN, MEAN), "two documents of the recipe have no name", (5, 1)),
    "an unknown key in the second": (
        (named("m", MEAN), linear("m", "c") + "dtyp: float32\n"),
        "unknown key 'dtyp'",
        (9, 1),
    ),
    "an unknown method in the first": (
        (named("m", "merge_method: liner\n" + MEAN.partition("\n")[2]), linear("m")),
        "unknown merge method 'liner'",
        (2, 1),
    ),
    "a value in the second": (
        (named("m", MEAN), linear("m", "c").replace("weight: 1", "weight: x")),
        "parameter 'weight' needs a number",
        (8, 14),
    ),
    "a value in the third": (
        (named("m", MEAN), named("n", MEAN), linear("m", "n").replace("weight: 1", "weight: x")),
        "parameter 'weight' needs a number",
        (13, 14),
    ),
    "no text for a name": ((named("[m]", MEAN), MEAN), "the value of 'name' is wrong", (1, 1)),
    "an empty name": ((named("''", MEAN), MEAN), "the value of 'name' is wrong", (1, 1)),
    "a list for a stage": ((named("m", MEAN), "- a\n"), "a recipe is a mapping", (6, 1)),
    "bad YAML in the second": ((named("m", MEAN), "models: [\n"), "not readable as YAML", (7, 1)),
}


@pytest.mark.parametrize(("stages", "what", "where"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_in_a_stage_has_its_place(
    stages: tuple[str, ...], what: str, where: tuple[int, int]
) -> None:
    error = error_of("---\n".join(stages), OPEN)
    assert what in error.what
    assert place(error) == where


def test_a_circle_is_shown() -> None:
    stages = (named("m", f"{USES}n\n"), named("n", f"{USES}o\n"), named("o", f"{USES}n\n"))
    assert error_of("---\n".join([*stages, f"{USES}m\n"]), OPEN).found == "n -> o -> n"


def test_a_model_that_is_missing_in_a_stage_has_its_place() -> None:
    text = "---\n".join([named("m", f"{USES}absent\n"), linear("a", "m")])
    with pytest.raises(MergeError, match="no such model") as caught:
        compiled(text, OPEN)
    assert (caught.value.where["line"], caught.value.where["column"]) == ("4", "3")


def test_a_stage_is_compiled_once(folders: Path) -> None:
    text = "---\n".join(
        [named("m", MEAN + "rubbish: 1\n"), named("n", linear("m", "a")), linear("m", "n", "m")]
    )
    made = compiled(text, OPEN, lenient=True)
    assert [n for n in made.notes if "rubbish" in n] == [
        "stage 'm': line 5: 'rubbish' is not known and is ignored"
    ]


def test_what_is_written_into_the_output_is_the_whole_recipe(folders: Path) -> None:
    text = "---\n".join([named("m", MEAN), linear("m", "c")])
    apply(text, "out")
    assert read_recipe("out/merge_recipe.yml").text == text
    assert plan_recipe("out/merge_recipe.yml").plan.hash == plan_recipe("out.yml").plan.hash
