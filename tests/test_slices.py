"""Slices: which layers come out where, with which values, under which parameters."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merge.checkpoint.memory import open_state_dict
from merge.errors import PlanError, RecipeError
from merge.ir.checkpoint import Checkpoint
from merge.ir.reference import Reference, parse_reference
from merge.ir.side import Side
from merge.recipe.compile import compile_recipe
from merge.recipe.read import parse_recipe

from .tiny import (
    ATTENTION,
    EMBED,
    HEAD,
    MLP,
    NORM,
    assert_near,
    assert_same,
    compiled,
    error_of,
    layer,
    model,
    noise,
    place,
    result,
    value_at,
    zoo,
)

Span = tuple[int, int]


def sources(*entries: str) -> str:
    """One slice of sources written as ``a[0,2]``, with more keys after a space."""
    lines = ["  - sources:"]
    for entry in entries:
        first, _, more = entry.partition(" ")
        name, _, span = first.partition("[")
        lines.append(f"    - {{model: {name}, layer_range: [{span}{more and ', ' + more}}}")
    return "\n".join(lines) + "\n"


def stacked(*slices: str, method: str = "passthrough", top: str = "") -> str:
    return f"merge_method: {method}\n{top}slices:\n{''.join(slices)}"


# -- layers --------------------------------------------------------------------------------------


def test_layers_are_numbered_anew_and_copied_to_the_bit() -> None:
    text = stacked(sources("a[0,3]"), sources("b[2,5]"), sources("a[1,2]"))
    found = result(text, zoo(a=4, b=6))
    a, b = model("a", 4), model("b", 6)
    order = [(a, 0), (a, 1), (a, 2), (b, 2), (b, 3), (b, 4), (a, 1)]
    assert set(found) == set(model("x", len(order)))
    for new, (of, old) in enumerate(order):
        for part in (ATTENTION, MLP):
            assert_same(found[layer(new, part)], of[layer(old, part)])


def test_what_comes_before_is_of_the_first_slice_and_what_comes_after_of_the_last() -> None:
    text = stacked(sources("b[0,1]"), sources("c[0,1]"), sources("a[0,1]"))
    found = result(text, zoo(a=1, b=2, c=3))
    assert_same(found[EMBED], model("b", 2)[EMBED])
    assert_same(found[NORM], model("a", 1)[NORM])
    assert_same(found[HEAD], model("a", 1)[HEAD])


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_stack_of_layers_is_what_it_says(data: st.DataObject) -> None:
    counts = {"a": 5, "b": 3}
    slices, order = [], list[tuple[str, int]]()
    for _ in range(data.draw(st.integers(1, 4))):
        name = data.draw(st.sampled_from("ab"))
        first = data.draw(st.integers(0, counts[name] - 1))
        end = data.draw(st.integers(first + 1, counts[name]))
        slices.append(sources(f"{name}[{first},{end}]"))
        order += [(name, i) for i in range(first, end)]
    made = compiled(stacked(*slices), zoo(**counts))
    found = made.checkpoint.state_dict()
    assert set(found) == set(model("x", len(order)))
    for new, (name, old) in enumerate(order):
        assert_same(found[layer(new)], model(name, counts[name])[layer(old)])
    assert made.checkpoint.side.config["num_hidden_layers"] == len(order)
    assert_same(found[HEAD], model(order[-1][0], counts[order[-1][0]])[HEAD])


def test_models_of_other_depths_give_equally_many_layers() -> None:
    """Layer 0 of the result is made of layer 0 of a and layer 5 of b."""
    text = stacked(sources("a[0,2]", "b[5,7]"), method="linear", top="parameters: {weight: 1}\n")
    found = result(text, zoo(a=2, b=8))
    a, b = model("a", 2), model("b", 8)
    for i in (0, 1):
        wanted = (a[layer(i)].double() + b[layer(i + 5)].double()) / 2
        assert_near(found[layer(i)], wanted)
    assert_near(found[NORM], (a[NORM].double() + b[NORM].double()) / 2)


# -- methods over slices, against float64 ----------------------------------------------------------


def slerp64(v0: Tensor, v1: Tensor, t: float) -> Tensor:
    v0, v1 = v0.double(), v1.double()
    cosine = float((v0 * v1).sum() / (v0.norm() * v1.norm()))
    if abs(cosine) > 0.9995:
        return (1 - t) * v0 + t * v1
    theta = math.acos(cosine)
    return (math.sin((1 - t) * theta) * v0 + math.sin(t * theta) * v1) / math.sin(theta)


def ties64(base: Tensor, tuned: list[Tensor], weights: list[float]) -> Tensor:
    """With density 1: the signs vote, what agrees is averaged."""
    deltas = torch.stack([t.double() - base.double() for t in tuned])
    w = torch.tensor(weights, dtype=torch.float64).reshape(-1, *[1] * base.dim())
    voted = torch.where((w * deltas).sum(0) >= 0, 1.0, -1.0)
    agrees = (w * deltas).sign() == voted
    total = (w * agrees).sum(0)
    return base.double() + (w * deltas * agrees).sum(0) / torch.where(total == 0, 1, total)


def test_slerp_over_slices() -> None:
    text = stacked(
        sources("a[0,2]", "b[1,3]"),
        sources("b[0,3]", "a[0,3]"),
        method="slerp",
        top="base_model: a\nparameters: {t: [0, 1]}\n",
    )
    found = result(text, zoo(a=3, b=3))
    a, b = model("a", 3), model("b", 3)
    assert_near(found[layer(0)], a[layer(0)])
    assert_near(found[layer(1)], b[layer(2)])
    for i, t in enumerate((0.0, 0.5, 1.0)):  # the base is first wherever it is listed
        assert_near(found[layer(2 + i)], slerp64(a[layer(i)], b[layer(i)], t))
    for name in (EMBED, NORM, HEAD):  # outside the layers t is the first value of the gradient
        assert_near(found[name], a[name])


def test_slerp_of_two_ranges_of_one_model() -> None:
    text = stacked(
        sources("a[0,2]", "a[2,4]"), method="slerp", top="base_model: a\nparameters: {t: 0.25}\n"
    )
    found, a = result(text, zoo(a=4)), model("a", 4)
    for i in (0, 1):
        assert_near(found[layer(i)], slerp64(a[layer(i)], a[layer(i + 2)], 0.25))
    for name in (EMBED, NORM, HEAD):
        assert_near(found[name], a[name])


def test_a_self_merge_of_two_ranges_by_weight() -> None:
    text = stacked(
        sources("a[0,2] parameters: {weight: 1}", "a[1,3] parameters: {weight: 3}"),
        method="linear",
    )
    found, a = result(text, zoo(a=3)), model("a", 3)
    for i in (0, 1):
        wanted = 0.25 * a[layer(i)].double() + 0.75 * a[layer(i + 1)].double()
        assert_near(found[layer(i)], wanted)
    assert_near(found[HEAD], a[HEAD])


TASK = "base_model: base\nparameters: {weight: 0.5}\n"


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_linear", "ties", "dare_ties"])
def test_delta_methods_over_slices(method: str) -> None:
    """The base is listed with other layers than the rest."""
    top = TASK.replace("}", ", normalize: true}") if method.endswith("ties") else TASK
    text = stacked(
        sources("base[0,2]", "a[2,4]", "b[1,3] parameters: {weight: 2}"), method=method, top=top
    )
    found = result(text, zoo(base=3, a=4, b=4))
    base, a, b = model("base", 3), model("a", 4), model("b", 4)
    for i in (0, 1):
        w = base[layer(i)].double(), a[layer(i + 2)].double(), b[layer(i + 1)].double()
        plain = w[0] + 0.5 * (w[1] - w[0]) + 2 * (w[2] - w[0])
        normal = ties64(w[0], [w[1], w[2]], [0.5, 2.0])
        summed = method in ("task_arithmetic", "dare_linear")
        assert_near(found[layer(i)], plain if summed else normal)


def test_dare_over_slices_drops_what_it_drops_and_restores_the_norm() -> None:
    opener = zoo(base=2, a=2)
    text = stacked(
        sources("base[0,2]", "a[0,2]"),
        sources("base[0,2]", "a[0,2]"),
        method="dare_linear",
        top="base_model: base\nparameters: {weight: 1, density: 0.5}\n",
    )
    found, base, a = result(text, opener), model("base", 2), model("a", 2)
    masks = []
    for new, old in ((0, 0), (1, 1), (2, 0), (3, 1)):
        delta = a[layer(old)].double() - base[layer(old)].double()
        got = found[layer(new)].double() - base[layer(old)].double()
        kept = got.abs() > 1e-6
        factor = delta.abs().sum() / (delta * kept).abs().sum()
        torch.testing.assert_close(got, delta * kept * factor, rtol=1e-4, atol=1e-5)
        masks.append(kept)
    assert not torch.equal(masks[0], masks[2])  # drawn for the new tensor, not for the old


def test_a_base_that_is_not_listed_gives_the_layers_that_the_sources_agree_on() -> None:
    text = stacked(sources("a[1,3]", "b[1,3]"), method="task_arithmetic", top=TASK)
    found = result(text, zoo(base=4, a=4, b=4))
    base, a, b = (model(n, 4) for n in ("base", "a", "b"))
    wanted = 0.5 * (a[layer(1)].double() + b[layer(1)].double())
    assert_near(found[layer(0)], wanted)  # base + 0.5 (a - base) + 0.5 (b - base)
    assert_near(found[HEAD], 0.5 * (a[HEAD].double() + b[HEAD].double()))
    assert base[layer(0)].shape == found[layer(0)].shape


def test_a_base_model_of_a_slice_goes_before_the_recipes() -> None:
    own = sources("a[0,1]") + "    base_model: c\n"
    text = stacked(sources("a[0,1]"), own, method="task_arithmetic", top=TASK)
    found = result(text, zoo(base=2, a=2, c=2))
    a, base, c = model("a", 2), model("base", 2), model("c", 2)
    assert_near(found[layer(0)], (a[layer(0)].double() + base[layer(0)].double()) / 2)
    assert_near(found[layer(1)], (a[layer(0)].double() + c[layer(0)].double()) / 2)
    assert_near(found[EMBED], (a[EMBED].double() + base[EMBED].double()) / 2)
    assert_near(found[HEAD], (a[HEAD].double() + c[HEAD].double()) / 2)


def test_a_base_of_slices_only() -> None:
    own = sources("a[0,2]", "c[0,2]") + "    base_model: c\n"
    text = stacked(own, method="task_arithmetic", top="parameters: {weight: 1}\n")
    made = compiled(text, zoo(a=2, c=2))
    assert_near(made.checkpoint.state_dict()[layer(1)], model("a", 2)[layer(1)])
    assert made.checkpoint.side.config["of"] == "a"


def test_slices_without_the_base_that_a_method_needs_are_refused() -> None:
    error = error_of(
        stacked(sources("a[0,1]"), method="ties", top="parameters: {weight: 1}\n"), zoo(a=1)
    )
    assert error.what == "method 'ties' needs a base_model"
    assert place(error) == (1, 1)


# -- config --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "donor"), [("", "b"), ("base_model: a\n", "a")])
def test_side_files_are_the_bases_or_the_first_models(base: str, donor: str) -> None:
    text = stacked(sources("b[0,1]"), sources("a[0,4]"), top=base)
    config = compiled(text, zoo(a=4, b=2)).checkpoint.side.config
    assert config == {"num_hidden_layers": 5, "of": donor}


def test_a_base_that_only_lends_its_config_may_have_other_layers() -> None:
    """Passthrough has no base: one of two layers may stand beside models of eight."""
    text = stacked(sources("a[0,8]"), sources("a[4,8]"), top="base_model: c\n")
    made = compiled(text, zoo(a=8, c=2))
    assert made.checkpoint.side.config == {"num_hidden_layers": 12, "of": "c"}
    assert_same(made.checkpoint.state_dict()[layer(11)], model("a", 8)[layer(7)])


def test_a_config_that_counts_no_layers_is_noted() -> None:
    recipe = parse_recipe(stacked(sources("a[0,1]")))
    made = compile_recipe(recipe, lambda r: open_state_dict(model("a", 2), "a"))
    assert not any("config.json" in n for n in made.notes)  # there is none


# -- parameters ------------------------------------------------------------------------------------


def test_a_gradient_runs_anew_in_each_slice() -> None:
    text = stacked(
        sources("a[0,3]", "b[0,3]"),
        sources("a[0,1]", "b[0,1]"),
        sources("a[0,2]", "b[0,2]"),
        method="slerp",
        top="base_model: a\nparameters: {t: [0.25, 0.5, 1]}\n",
    )
    made = compiled(text, zoo(a=3, b=3))
    found = [value_at(made, layer(i), "t") for i in range(6)]
    assert found == [0.25, 0.5, 1.0, 1.0, 0.25, 1.0]
    assert {value_at(made, n, "t") for n in (EMBED, NORM, HEAD)} == {0.25}


def test_a_filter_sees_the_outputs_names_for_what_is_shared() -> None:
    text = stacked(
        sources("a[2,4]", "b[2,4]"),
        method="slerp",
        top="base_model: a\nparameters: {t: [{filter: layers.0., value: 0.1}, {filter: layers.3.,"
        " value: 0.2}, {value: 0.3}]}\n",
    )
    made = compiled(text, zoo(a=4, b=4))
    assert [value_at(made, layer(i), "t") for i in (0, 1)] == [0.1, 0.3]
    assert not any("holds the filter 'layers.0.'" in n for n in made.notes)


@pytest.mark.parametrize("level", ["model", "slice", "recipe"])
def test_a_filter_sees_the_models_own_names_for_what_each_model_has(level: str) -> None:
    value = "parameters: {density: [{filter: layers.3., value: 0.5}, {value: 1}]}"
    own = f" {value}" if level == "model" else ""
    text = stacked(
        sources("base[0,2]", f"a[2,4]{own}", f"b[1,3]{own}")
        + (f"    {value}\n" if level == "slice" else ""),
        method="ties",
        top="base_model: base\nparameters:\n  weight: 1\n"
        + ("  density: [{filter: layers.3., value: 0.5}, {value: 1}]\n" * (level == "recipe")),
    )
    made = compiled(text, zoo(base=4, a=4, b=4))
    assert [value_at(made, layer(i), "density") for i in (0, 1)] == [(1, 1), (0.5, 1)]
    assert not any("holds the filter" in n for n in made.notes)


LEVELS = ("model", "slice", "module", "recipe")
NUMBER = st.integers(0, 100).map(lambda n: n / 100)
VALUE = st.one_of(
    NUMBER,
    st.lists(NUMBER, min_size=1, max_size=4),
    st.lists(
        st.fixed_dictionaries(
            {
                "filter": st.sampled_from(["mlp", "self_attn", "layers.1.", "norm", None, "*"]),
                "value": st.one_of(NUMBER, st.lists(NUMBER, min_size=1, max_size=3), st.none()),
            }
        ),
        max_size=3,
    ),
    st.none(),
)


def oracle(values: list[Any], name: str, t: float, default: float) -> float:
    """The first level that says something about the tensor, by the rules as they are written."""
    for value in values:
        entries = value if isinstance(value, list) else [value]
        if not any(isinstance(e, dict) for e in entries):
            entries = [{"filter": None, "value": value}] if entries else []
        for entry in entries:
            if entry["filter"] in (None, "*") or entry["filter"] in name:
                chosen = entry["value"]
                if chosen is None:
                    break
                if not isinstance(chosen, list):
                    return float(chosen)
                s = t * (len(chosen) - 1)
                i = math.floor(s)
                j = min(len(chosen) - 1, i + 1)
                return (1 - (s - i)) * chosen[i] + (s - i) * chosen[j]
    return default


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_nearest_level_that_says_something_counts(data: st.DataObject) -> None:
    said = {
        level: {
            key: data.draw(VALUE, label=f"{level} {key}")
            for key in (("density",) if level == "model" else ("density", "lambda"))
            if data.draw(st.booleans())
        }
        for level in LEVELS
    }
    text = (
        "merge_method: ties\nbase_model: base\nmodules:\n  default:\n    slices:\n    - sources:\n"
        "      - {model: base, layer_range: [0, 3]}\n"
        f"      - {{model: a, layer_range: [1, 4], parameters: {written(said['model'])}}}\n"
        f"      parameters: {written(said['slice'])}\n"
        f"    parameters: {written(said['module'])}\n"
        f"parameters: {written({'weight': 1, **said['recipe']})}\n"
    )
    made = compiled(text, zoo(base=3, a=4))
    for name in (EMBED, NORM, layer(0), layer(1, ATTENTION), layer(2)):
        number = int(name.split(".")[2]) if "layers" in name else None
        own = name if number is None else name.replace(f".{number}.", f".{number + 1}.")
        t = 0.0 if number is None else number / 2
        levels = [said[level] for level in LEVELS]
        density = oracle([v.get("density") for v in levels], own, t, 1.0)
        scale = oracle([v.get("lambda") for v in levels[1:]], name, t, 1.0)
        assert value_at(made, name, "density") == (density,)
        assert value_at(made, name, "lambda_") == scale


def written(value: object) -> str:
    """YAML of one line, as JSON is."""
    return json.dumps(value)


# -- what is refused -------------------------------------------------------------------------------

RANGES = {
    "past the end": ("[3, 5]", "a has no layer 4"),
    "far past the end": ("[40, 44]", "a has no layer 43"),
    "reversed": ("[3, 1]", "expected [first, end]"),
    "of nothing": ("[2, 2]", "expected [first, end]"),
    "negative": ("[0, -1]", "expected [first, end]"),
    "negative first": ("[-2, 2]", "expected [first, end]"),
    "fractions": ("[0, 1.5]", "expected two whole numbers"),
    "whole fractions": ("[0.0, 2.0]", "expected two whole numbers"),
    "texts": ("[a, b]", "expected two whole numbers"),
    "switches": ("[false, true]", "expected two whole numbers"),
    "one": ("[2]", "expected two whole numbers"),
    "three": ("[0, 1, 2]", "expected two whole numbers"),
    "a number": ("2", "expected two whole numbers"),
    "text": ("'0-2'", "expected two whole numbers"),
    "nothing": ("", "expected two whole numbers"),
}


@pytest.mark.parametrize(("span", "what"), RANGES.values(), ids=RANGES)
def test_a_range_that_is_wrong_is_refused_at_its_place(span: str, what: str) -> None:
    text = (
        "merge_method: passthrough\nslices:\n- sources:\n  - model: a\n"
        f"    layer_range: [0, 2]\n- sources:\n  - model: a\n    layer_range: {span}\n"
    )
    error = error_of(text, zoo(a=4))
    assert what in error.what
    assert place(error) == (8, 5)
    assert error.where["key"] == "layer_range"


REFUSED = {
    "different lengths": (
        stacked(sources("a[0,2]", "b[0,3]"), method="linear", top="parameters: {weight: 1}\n"),
        "the sources of a slice have different numbers of layers",
        (6, 18),
    ),
    "an unlisted base beside other ranges": (
        stacked(sources("a[0,2]", "b[1,3]"), method="ties", top=TASK),
        "the sources have different layers, and the base_model is not among them",
        (5, 5),
    ),
    "an unlisted base without the layers": (
        stacked(sources("a[2,4]", "b[2,4]"), method="ties", top=TASK),
        "base has no layer 3",
        (2, 1),
    ),
    "a slice's base without the layers": (
        stacked(sources("a[2,4]") + "    base_model: base\n", method="ties", top=TASK),
        "base has no layer 3",
        (7, 5),
    ),
    "no sources": (
        "merge_method: passthrough\nslices:\n- sources: []\n",
        "the value of 'sources' is wrong",
        (3, 3),
    ),
    "no range": (
        "merge_method: passthrough\nslices:\n- sources:\n  - model: a\n",
        "the key 'layer_range' is missing",
        (4, 5),
    ),
    "no slices": ("merge_method: passthrough\nslices: []\n", "the value of 'slices'", (2, 1)),
    "models too": (
        "merge_method: passthrough\nmodels: [{model: a}]\nslices:\n" + sources("a[0,1]"),
        "both models and slices are given",
        (3, 1),
    ),
    "too many sources": (
        stacked(sources("a[0,1]"), sources("a[0,1]", "b[0,1]")),
        "method 'passthrough' takes exactly 1",
        (5, 5),
    ),
    "a missing weight": (
        stacked(sources("a[0,1]"), method="linear"),
        "method 'linear' needs parameter 'weight' for every model",
        (3, 5),
    ),
}


@pytest.mark.parametrize(("text", "what", "where"), REFUSED.values(), ids=REFUSED)
def test_slices_that_cannot_be_are_refused(text: str, what: str, where: tuple[int, int]) -> None:
    error = error_of(text, zoo(a=4, b=4, base=3))
    assert what in error.what
    assert place(error) == where


def test_a_missing_parameter_names_the_model_that_lacks_it() -> None:
    text = stacked(sources("a[0,1] parameters: {weight: 1}", "b[0,1]"), method="linear")
    assert error_of(text, zoo(a=1, b=1)).where["model"] == "b"


def towers() -> dict[str, Tensor]:
    names = [f"{t}.layers.{i}.w" for t, n in (("text", 2), ("image", 3)) for i in range(n)]
    return {n: noise(n) for n in names}


def test_slices_of_a_model_with_several_stacks_ask_for_modules() -> None:
    recipe = parse_recipe(stacked(sources("a[0,1]")))
    with pytest.raises(RecipeError, match="several stacks") as caught:
        compile_recipe(recipe, lambda r: open_state_dict(towers(), str(r)))
    error = caught.value
    assert error.found == "text.layers (2 layers), image.layers (3 layers)"
    assert "modules:" in str(error.do)
    assert (error.where["line"], error.where["column"]) == ("3", "5")


def test_slices_of_a_model_without_layers_are_refused() -> None:
    recipe = parse_recipe(stacked(sources("a[0,1]")))
    with pytest.raises(RecipeError, match="has no layers"):
        compile_recipe(recipe, lambda r: open_state_dict({"w": noise()}, str(r)))


def test_stacks_of_other_names_do_not_mix() -> None:
    states = {"a": {"h.0.w": noise(0)}, "b": {"layers.0.v": noise(1)}}
    recipe = parse_recipe(stacked(sources("a[0,1]"), sources("b[0,1]")))
    with pytest.raises(RecipeError, match="name their layers differently") as caught:
        compile_recipe(recipe, lambda r: open_state_dict(states[str(r)], str(r)))
    assert (caught.value.where["line"], caught.value.where["column"]) == ("6", "8")
    both = parse_recipe(
        stacked(sources("a[0,1]", "b[0,1]"), method="linear", top="parameters: {weight: 1}\n")
    )
    with pytest.raises(RecipeError, match="b has no layer 0"):
        compile_recipe(both, lambda r: open_state_dict(states[str(r)], str(r)))


def test_layers_of_other_shapes_do_not_blend() -> None:
    states = {"a": {"h.0.w": noise(0)}, "b": {"h.0.w": noise(1, shape=(2, 2))}}
    both = parse_recipe(
        stacked(sources("a[0,1]", "b[0,1]"), method="linear", top="parameters: {weight: 1}\n")
    )
    with pytest.raises(PlanError, match="different shapes") as caught:
        compile_recipe(both, lambda r: open_state_dict(states[str(r)], str(r)))
    assert caught.value.where["line"] == "4"


def test_a_model_that_ties_its_head_gives_its_embeddings_beside_one_with_a_head() -> None:
    """The config says whether there is a head: it cannot hold for both, so nothing is tied."""

    def opener(reference: Reference) -> Checkpoint:
        state = model(str(reference), 2)
        if str(reference) == "tied":
            del state[HEAD]
        config = {"tie_word_embeddings": str(reference) == "tied"}
        return open_state_dict(state, str(reference), Side(config=config))

    ends = sources("a[0,1]"), sources("tied[0,1]")
    for order, head in ((ends, noise("tied", EMBED)), (ends[::-1], noise("a", HEAD))):
        made = compile_recipe(parse_recipe(stacked(*order)), opener).checkpoint
        assert_same(made.state_dict()[HEAD], head)
        assert made.side.config["tie_word_embeddings"] is False and HEAD not in made.tied


def test_weights_and_differences_do_not_stack() -> None:
    def opener(reference: Reference) -> Checkpoint:
        found = open_state_dict(model(str(reference), 2), str(reference))
        return found - zoo(base=2)(parse_reference("base")) if str(reference) == "d" else found

    with pytest.raises(PlanError, match="in different spaces") as caught:
        compile_recipe(parse_recipe(stacked(sources("a[0,1]"), sources("d[0,1]"))), opener)
    assert caught.value.where["line"] == "1"


def test_residual_weight_is_noted() -> None:
    made = compiled(stacked(sources("a[0,1]") + "    residual_weight: 0.5\n"), zoo(a=1))
    assert made.notes == ("line 5: 'residual_weight' is ignored, as ever",)


def test_many_slices_are_compiled_quickly() -> None:
    """A hundred slices of one layer each; every order of layers is one of them."""
    draw = random.Random(3)
    order = [draw.randrange(12) for _ in range(100)]
    made = compiled(stacked(*(sources(f"a[{i},{i + 1}]") for i in order)), zoo(a=12))
    assert made.checkpoint.side.config["num_hidden_layers"] == 100
    assert_same(made.checkpoint.state_dict()[layer(99)], model("a", 12)[layer(order[99])])


# -- widths --------------------------------------------------------------------------------------


def test_layers_of_different_widths_are_refused() -> None:
    """Transformers would load such a stack only to fail at the first word."""

    def opened(reference: Reference) -> Checkpoint:
        width = {"a": 4, "wide": 6}[str(reference)]
        norms = {f"model.layers.{i}.input_layernorm.weight": torch.ones(width) for i in (0, 1)}
        state = {EMBED: torch.ones(9, width), **norms, NORM: torch.ones(width)}
        return open_state_dict(state, str(reference))

    error = error_of(stacked(sources("a[0,1]"), sources("wide[1,2]")), opened)
    assert "different widths" in error.what
    assert error.where["tensor"] == "model.layers.*.input_layernorm.weight"
    assert (error.found, error.expected) == ("[6] in wide", "[4], as in a")
    assert place(error)[0] == 6


def test_layers_may_have_matrices_of_different_shapes() -> None:
    """Pruned models have fewer heads or hidden units in some layers, and norms of one width."""
    shapes = [(4, 4), (2, 4), (4, 4)]
    state = {EMBED: torch.ones(9, 4), NORM: torch.ones(4)}
    for i, shape in enumerate(shapes):
        state[layer(i)] = torch.ones(shape)
        state[f"model.layers.{i}.norm.weight"] = torch.ones(4)
    found = result(
        stacked(sources("a[1,2]"), sources("a[0,1]")), lambda _: open_state_dict(state, "a")
    )
    assert [tuple(found[layer(i)].shape) for i in (0, 1)] == [(2, 4), (4, 4)]
