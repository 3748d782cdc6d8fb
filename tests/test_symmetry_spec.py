"""Symmetry specs: read, written, fitted to checkpoints, and what their elements do to tensors."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from merge.errors import MergeError, PlanError, RecipeError
from merge.symmetry.action import apply, takes
from merge.symmetry.axes import parse_axis
from merge.symmetry.elements import (
    Element,
    Scaled,
    compose,
    identity,
    inverse,
    matrix_of,
    random_element,
)
from merge.symmetry.patterns import Pattern
from merge.symmetry.resolve import resolve
from merge.symmetry.sizes import evaluate
from merge.symmetry.spec import parse_spec
from merge.symmetry.symmetry import Symmetry

from .symmetries import HEADS, LLAMA, MLP, distance, randomised

Tensors = dict[str, torch.Tensor]


def changed(data: dict[str, Any], *path: str, to: Any) -> dict[str, Any]:
    """A spec with one entry replaced, or taken out where ``to`` is None."""
    data = copy.deepcopy(data)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    if to is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    return data


def mlp() -> torch.nn.Module:
    torch.manual_seed(0)
    linear, relu = torch.nn.Linear, torch.nn.ReLU()
    return randomised(torch.nn.Sequential(linear(3, 8), relu, linear(8, 6), relu, linear(6, 2)))


CONFIG = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "head_dim": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**CONFIG, attn_implementation="eager")
    return randomised(transformers.LlamaForCausalLM(config))


def shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in tensors.items()}


def symmetry_of_llama(model: Any) -> Symmetry:
    return resolve(parse_spec(LLAMA), shapes(model.state_dict()), CONFIG)


def outputs(model: Any, tensors: Tensors) -> torch.Tensor:
    tokens = torch.arange(12).reshape(2, 6) * 3 % 40
    with torch.no_grad():
        return torch.func.functional_call(model, tensors, (tokens,)).logits


# -- the texts -----------------------------------------------------------------------------------

NAMES = st.sampled_from(["d", "kv{i}", "f{i}_{j}", "d{i+1}"])
FIXED = st.builds(lambda n, w: f"_{n or ''}{w}", st.integers(0, 9), st.sampled_from(["", "rope"]))
FACTORS = st.one_of(NAMES, NAMES.map("{}*".format), NAMES.map("|{}|".format), FIXED)


def joined(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    product = st.lists(st.one_of(FACTORS, inner.map("({})".format)), min_size=1, max_size=3)
    return st.lists(product.map(".".join), min_size=1, max_size=3).map("+".join)


@given(st.recursive(FACTORS, joined, max_leaves=8))
def test_an_axis_is_written_as_it_was_read(text: str) -> None:
    axis = parse_axis(text)
    assert parse_axis(str(axis)) == axis
    assert str(parse_axis(" " + text.replace("+", " + "))) == str(axis)


@pytest.mark.parametrize("text", ["", "d+", "d..k", "(d", "d)", "|d", "3", "d k!", "*d", "d**"])
def test_what_is_no_axis_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="does not describe an axis"):
        parse_axis(text)


def test_a_pattern_is_anchored_at_both_ends() -> None:
    pattern = Pattern.of("[model.]layers.{i}.w")
    assert pattern.match("layers.3.w") and pattern.match("model.layers.10.w")
    for name in ("xlayers.3.w", "layers.3.wx", "layers.x.w", "model.model.layers.3.w", "layers..w"):
        assert pattern.match(name) is None


def test_numbers_in_patterns() -> None:
    pattern = Pattern.of("a.{i}.b.{j>0}.{i}")
    found = pattern.match("a.2.b.1.2")
    assert found and found.numbers == {"i": 2, "j": 1}
    assert pattern.match("a.2.b.0.2") is None
    assert pattern.match("a.2.b.1.3") is None
    stacked = Pattern.of("h.{i}.experts.{e{i}}.w").match("h.1.experts.12.w")
    assert stacked and (stacked.stack, stacked.member) == ("e1", 12)


@pytest.mark.parametrize("text", ["a.{i>x}", "a[b", "a.{e{i}}.{f{i}}", "a.{}"])
def test_a_pattern_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        Pattern.of(text)


def test_sizes_over_config_keys() -> None:
    config = {"a": 12, "b": 3, "c": None, "t": {"x": 5}, "l": [7, 9]}
    assert evaluate("a/b", config) == 4
    assert evaluate("a*b + 2", config) == 38
    assert evaluate("c or missing or t.x", config) == 5
    assert evaluate("l[i]", config, {"i": 1}) == 9
    assert evaluate("missing", config) is None
    with pytest.raises(PlanError, match="no size by 'b / a'"):
        evaluate("b/a", config)
    for text in ("a**b", "f(a)", "a if b else c", "'a'", "a;", "-a", "1.5"):
        with pytest.raises(RecipeError, match="is no size"):
            evaluate(text, config)


@pytest.mark.parametrize("spec", [MLP, LLAMA], ids=["mlp", "llama"])
def test_a_spec_survives_json(spec: dict[str, Any]) -> None:
    read = parse_spec(spec)
    assert parse_spec(json.loads(json.dumps(read.to_json()))) == read


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (changed(MLP, "group", to={}), "perhaps 'groups'"),
        (changed(MLP, "tensors", "0.bias", to=["c"]), "there is no group 'c'"),
        (changed(MLP, "tensors", "0.bias", to="a"), "is no list"),
        (changed(MLP, "tensors", "0.bias", to=["a+"]), "does not describe an axis"),
        (changed(MLP, "groups", "a", to={"flags": "PX"}), "flags"),
        (changed(MLP, "groups", "a", to={"flag": "P"}), "perhaps 'flags'"),
        (changed(MLP, "groups", "a", to={"per": ["z"]}), "there is no group 'z'"),
        (changed(MLP, "groups", "a", to={"size": "x("}), "is no size"),
        (changed(MLP, "groups", "a", to={"per": ["a"]}), "depends on"),
        (changed(LLAMA, "groups", "f{i}", to={"per": ["slot{i}"]}), "also kv"),
        (changed(MLP, "tensors", to=None), "tensors is no mapping"),
        ([], "is no mapping"),
    ],
)
def test_a_spec_with_a_mistake_is_refused_with_its_place(spec: Any, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_spec(spec, "my.json")
    assert said in str(caught.value)
    assert caught.value.where["file"] == "my.json"


# -- fitted to a checkpoint ----------------------------------------------------------------------


def test_groups_and_sizes_of_a_llama(llama: Any) -> None:
    found = symmetry_of_llama(llama)
    sizes = {n: (g.size, g.per) for n, g in found.groups.items() if not n.endswith("1")}
    assert sizes == {
        "d": (24, ()),
        "kv0": (2, ()),
        "slot0": (3, ("kv0",)),
        "v0": (8, ("kv0",)),
        "f0": (20, ()),
    }
    o_proj = found.tensors["model.layers.1.self_attn.o_proj.weight"]
    assert [str(a) for a in o_proj.axes] == ["d", "kv1.slot1.v1*"]
    assert found.copies("slot0") == 2 and found.copies("d") == 1
    assert found.places("f1") == [
        f"model.layers.1.mlp.{p}_proj.weight" for p in ("gate", "up", "down")
    ]


def test_sizes_that_the_shapes_tell_need_no_config() -> None:
    found = resolve(parse_spec(MLP), shapes(mlp().state_dict()))
    assert {n: g.size for n, g in found.groups.items()} == {"a": 8, "b": 6}


def test_a_size_that_nothing_tells_is_asked_for(llama: Any) -> None:
    with pytest.raises(PlanError, match=r"config\.json") as caught:
        resolve(parse_spec(LLAMA), shapes(llama.state_dict()))
    assert "q_proj" in caught.value.where["tensor"]


def test_a_tensor_that_no_pattern_knows_is_named() -> None:
    with pytest.raises(PlanError) as caught:
        resolve(parse_spec(MLP), {**shapes(mlp().state_dict()), "6.weight": (1, 2)})
    assert caught.value.where["tensor"] == "6.weight"
    assert "exactly one pattern" in str(caught.value)


def test_a_tensor_that_two_patterns_know_is_named() -> None:
    spec = changed(MLP, "tensors", "{i}.bias", to=["a"])
    with pytest.raises(PlanError, match=r"several patterns(.|\n)*0.bias, {i}.bias"):
        resolve(parse_spec(spec), shapes(mlp().state_dict()))


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((21, 24), ["axis: 0 (f1)", "found: 21", "expected: 20"]),
        ((20, 24, 1), ["shape [20, 24, 1]", "2 axes: f{i}, d"]),
    ],
)
def test_a_length_that_does_not_fit_names_tensor_axis_found_and_expected(
    llama: Any, shape: tuple[int, ...], said: list[str]
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(PlanError) as caught:
        resolve(parse_spec(LLAMA), {**shapes(llama.state_dict()), name: shape}, CONFIG)
    assert caught.value.where["tensor"] == name
    assert all(text in str(caught.value) for text in said), str(caught.value)


def test_a_config_of_another_model_does_not_fit(llama: Any) -> None:
    with pytest.raises(PlanError, match="another length") as caught:
        resolve(parse_spec(LLAMA), shapes(llama.state_dict()), {**CONFIG, "head_dim": 6})
    assert "v_proj" in caught.value.where["tensor"] and "v0 = 6" in str(caught.value)


def test_a_group_must_stand_beside_what_it_depends_on() -> None:
    spec = changed(MLP, "groups", "a", to={"per": ["b"]})
    with pytest.raises(PlanError, match="without the group that it depends on"):
        resolve(parse_spec(spec), shapes(mlp().state_dict()))


def test_reading_and_fitting_a_spec_needs_no_torch() -> None:
    code = (
        "import sys, json\n"
        "from merge.symmetry.spec import parse_spec\n"
        "from merge.symmetry.resolve import resolve\n"
        f"resolve(parse_spec(json.loads({json.dumps(json.dumps(MLP))})), "
        "{'0.weight': (8, 3), '0.bias': (8,)})\n"
        "print(*(m for m in ('torch', 'transformers', 'scipy') if m in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# -- elements and what they do -------------------------------------------------------------------


@pytest.mark.parametrize("kinds", ["P", "D", "PD", "PSDR"])
def test_elements_keep_the_function(llama: Any, kinds: str) -> None:
    net = mlp()
    x = torch.randn(5, 3, dtype=torch.float64)
    symmetry = resolve(parse_spec(MLP), shapes(net.state_dict()))
    moved = apply(symmetry, net.state_dict(), random_element(symmetry, 1, kinds))
    assert distance(torch.func.functional_call(net, moved, (x,)), net(x)) < 1e-14
    assert not torch.equal(moved["0.weight"], net.state_dict()["0.weight"])

    symmetry = symmetry_of_llama(llama)
    element = random_element(symmetry, 1, kinds)
    moved = apply(symmetry, llama.state_dict(), element)
    assert distance(outputs(llama, moved), outputs(llama, llama.state_dict())) < 1e-5


LARGER = {
    "query slots across key/value heads": {
        "q_proj": ["slot{i}._", "d"], "k_proj": ["_", "d"], "v_proj": ["_", "d"],
        "o_proj": ["d", "slot{i}._"],
    },
    "rotary coordinates": {
        "q_proj": ["kv{i}._3.v{i}", "d"], "k_proj": ["kv{i}.v{i}", "d"], "v_proj": ["kv{i}._", "d"],
        "o_proj": ["d", "kv{i}._"],
    },
    "units across heads": {
        "q_proj": ["_", "d"], "k_proj": ["_", "d"], "v_proj": ["kv{i}.v{i}", "d"],
        "o_proj": ["d", "slot{i}.v{i}*"],
    },
}  # fmt: skip


@pytest.mark.parametrize("called", LARGER)
def test_the_next_larger_group_changes_the_function(llama: Any, called: str) -> None:
    """All other groups keep still."""
    spec = changed(LLAMA, "groups", "slot{i}", to={"size": HEADS})
    spec["groups"]["v{i}"] = {"size": "head_dim"}
    for name, axes in LARGER[called].items():
        spec["tensors"][f"[model.]layers.{{i}}.self_attn.{name}.weight"] = axes
    symmetry = resolve(parse_spec(spec), shapes(llama.state_dict()), CONFIG)
    element = random_element(symmetry, 1)
    element = {n: m for n, m in element.items() if n[:-1] in ("slot", "v")}
    moved = apply(symmetry, llama.state_dict(), element)
    assert distance(outputs(llama, moved), outputs(llama, llama.state_dict())) > 1e-2


def test_permutations_by_hand() -> None:
    """Two heads of two units, units exchanged in the old head 0, then the heads exchanged."""
    spec = {"tensors": {"w": ["h.(q+q)"]}, "groups": {"h": {"size": "2"}, "q": {"per": ["h"]}}}
    symmetry = resolve(parse_spec(spec), {"w": (8,)})
    element = {"h": np.array([1, 0]), "q": np.array([[1, 0], [0, 1]])}
    w = np.arange(8)  # head 0: 0 1 | 2 3, head 1: 4 5 | 6 7
    assert apply(symmetry, {"w": w}, element)["w"].tolist() == [4, 5, 6, 7, 1, 0, 3, 2]


def test_signs_scales_and_duals_by_hand() -> None:
    axes = {"w": ["a"], "dual": ["a*"], "gain": ["|a|"]}
    symmetry = resolve(parse_spec({"tensors": axes, "groups": {"a": {"flags": "PSDR"}}}),
                       {"w": (2,), "dual": (2,), "gain": (2,)})  # fmt: skip
    tensors = {n: np.array([3.0, 5.0]) for n in axes}
    element: Element = {"a": Scaled(np.array([1, 0]), np.array([-2.0, 1.0]))}
    out = apply(symmetry, tensors, element)
    assert {n: v.tolist() for n, v in out.items()} == {
        "w": [-10.0, 3.0],
        "dual": [-2.5, 3.0],
        "gain": [5.0, 3.0],
    }
    out = apply(symmetry, tensors, {"a": np.array([[1.0, 1.0], [0.0, 1.0]])})
    assert out["w"].tolist() == [8.0, 5.0]
    assert out["dual"].tolist() == [3.0, 2.0]


STACKED = {
    "groups": {"e{i}": {}, "f{i}": {"per": ["e{i}"], "flags": "PSDR"}, "d": {}},
    "tensors": {
        "h.{i}.router": ["e{i}", "d"],
        "h.{i}.up": ["e{i}", "f{i}+f{i}", "d"],
        "h.{i}.experts.{e{i}}.up": ["f{i}+f{i}", "d"],
    },
}  # fmt: skip


@pytest.mark.parametrize("kinds", ["P", "PSDR"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_experts_on_their_own_move_as_slices_of_the_stack_do(kinds: str, library: str) -> None:
    tensors: dict[str, Any] = {
        "h.0.router": torch.randn(3, 4, dtype=torch.float64),
        "h.0.up": torch.randn(3, 10, 4, dtype=torch.float64),
    }
    tensors |= {f"h.0.experts.{j}.up": tensors["h.0.up"][j] for j in range(3)}
    symmetry = resolve(parse_spec(STACKED), shapes(tensors))
    if library == "numpy":
        tensors = {n: t.numpy() for n, t in tensors.items()}
    out = apply(symmetry, tensors, random_element(symmetry, 3, kinds))
    for j in range(3):
        assert (out[f"h.0.experts.{j}.up"] == out["h.0.up"][j]).all()
    assert not (out["h.0.up"] == tensors["h.0.up"]).all()


def test_experts_that_are_missing_are_told() -> None:
    found = {"h.0.experts.0.up": (4, 2), "h.0.experts.2.up": (4, 2)}
    with pytest.raises(PlanError, match="not all there"):
        resolve(parse_spec(STACKED), found)


WREATH = {
    "groups": {"a": {}, "b": {"per": ["a"], "flags": "PSDR"}, "c": {"per": ["a", "b0"]},
               "b0": {"per": ["a"]}, "d": {"per": ["c", "b0", "a"]}},
    "tensors": {"w": ["a.b0", "c.d", "_2"], "v": ["_2+a.b+a.b*"], "u": ["a.b0.c.d.(_1+_1)"]},
}  # fmt: skip
SHAPES = {"w": (6, 8, 2), "v": (14,), "u": (96,)}
KINDS = st.sampled_from(["P", "PS", "PD", "PSDR"])


def wreath() -> tuple[Symmetry, dict[str, Any]]:
    sizes = {"a": "2", "b0": "3", "c": "4"}
    spec = changed(WREATH, "model", to="wreath")
    for name, size in sizes.items():
        spec["groups"][name]["size"] = size
    rng = np.random.default_rng(0)
    return resolve(parse_spec(spec), SHAPES), {n: rng.normal(size=s) for n, s in SHAPES.items()}


@given(st.integers(0, 99), st.integers(0, 99), KINDS, KINDS)
def test_a_product_does_one_element_and_then_the_other(s: int, t: int, k: str, m: str) -> None:
    symmetry, tensors = wreath()
    first, second = random_element(symmetry, s, k), random_element(symmetry, t, m)
    both = apply(symmetry, tensors, compose(symmetry, first, second))
    wanted = apply(symmetry, apply(symmetry, tensors, first), second)
    for name in tensors:
        np.testing.assert_allclose(both[name], wanted[name], rtol=1e-9, atol=1e-12)


@given(st.integers(0, 99), KINDS)
def test_an_inverse_takes_back(seed: int, kinds: str) -> None:
    symmetry, tensors = wreath()
    element = random_element(symmetry, seed, kinds)
    back = apply(symmetry, apply(symmetry, tensors, element), inverse(symmetry, element))
    for name in tensors:
        if kinds == "P":
            assert np.array_equal(back[name], tensors[name])
        np.testing.assert_allclose(back[name], tensors[name], rtol=1e-9, atol=1e-12)


def test_the_identity_takes_nothing() -> None:
    symmetry, tensors = wreath()
    assert all(not takes(symmetry, name, identity(symmetry)) for name in tensors)
    assert sum(len(takes(symmetry, name, random_element(symmetry))) for name in tensors) == 3


def test_bfloat16_is_permuted_to_the_bit(llama: Any) -> None:
    symmetry = symmetry_of_llama(llama)
    tensors = {n: t.bfloat16() for n, t in llama.state_dict().items()}
    moved = apply(symmetry, tensors, random_element(symmetry))
    for name, tensor in tensors.items():
        assert moved[name].dtype == torch.bfloat16
        assert torch.equal(moved[name].flatten().sort().values, tensor.flatten().sort().values)


def test_matrices_of_moves_agree_with_their_action() -> None:
    move = Scaled(np.array([2, 0, 1]), np.array([1.0, -2.0, 3.0]))
    x = np.array([1.0, 10.0, 100.0])
    assert (matrix_of(move, 3) @ x).tolist() == (move.factor * x[move.index]).tolist()


@pytest.mark.parametrize(
    "element", [{"z": np.array([0])}, {"a": np.array([0, 1])}, {"a": np.eye(3)}]
)
def test_an_element_that_does_not_fit_is_refused(element: dict[str, Any]) -> None:
    symmetry = resolve(parse_spec(MLP), shapes(mlp().state_dict()))
    with pytest.raises(MergeError, match=r"an element moves|another shape"):
        inverse(symmetry, element)
    with pytest.raises(MergeError, match=r"an element moves|another shape"):
        apply(symmetry, mlp().state_dict(), element)
