"""Experts: a tensor each or all in one, in memory and on disk, and merges of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import merge
from merge import applying
from merge.checkpoint.memory import open_state_dict
from merge.errors import PlanError
from merge.families.experts import experts_as_in, experts_layout
from merge.ir.checkpoint import Checkpoint

from .architectures import DECODERS, loaded_model, new_model, two_models
from .tiny import assert_near, assert_same, noise

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
LAYER = "model.layers.0"


def single(
    called: str, count: int = 3, words: tuple[str, str, str] = (GATE, UP, DOWN), block: str = "mlp"
) -> dict[str, Tensor]:
    """Experts of one layer, a tensor each: width 4, inner width 6."""
    path = f"{LAYER}.{block}"
    state = {
        f"{path}.experts.{i}.{word}.weight": noise(called, i, k, shape=(4, 6) if k == 2 else (6, 4))
        for i in range(count)
        for k, word in enumerate(words)
    }
    return {**state, f"{path}.gate.weight": noise(called, "gate", shape=(count, 4))}


def fused(called: str, count: int = 3, block: str = "mlp") -> dict[str, Tensor]:
    """The same experts in two tensors, by plain torch."""
    state = single(called, count)
    parts = {w: [state[f"{LAYER}.mlp.experts.{i}.{w}.weight"] for i in range(count)]
             for w in (GATE, UP, DOWN)}  # fmt: skip
    both = [torch.cat(pair) for pair in zip(parts[GATE], parts[UP], strict=True)]
    path = f"{LAYER}.{block}"
    return {
        f"{path}.experts.gate_up_proj": torch.stack(both),
        f"{path}.experts.down_proj": torch.stack(parts[DOWN]),
        f"{path}.gate.weight": state[f"{LAYER}.mlp.gate.weight"],
    }


def mixtral(called: str, count: int = 3) -> dict[str, Tensor]:
    return single(called, count, ("w1", "w3", "w2"), "block_sparse_moe")


SPELLINGS = {"single": single, "fused": fused, "mixtral": mixtral}


# -- laws ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", SPELLINGS)
@pytest.mark.parametrize("theirs", SPELLINGS)
def test_every_spelling_becomes_every_other(ours: str, theirs: str) -> None:
    a = open_state_dict(SPELLINGS[ours]("a"), "a")
    b = open_state_dict(SPELLINGS[theirs]("b"), "b")
    moved = experts_as_in(a, b).state_dict()
    wanted = SPELLINGS[theirs]("a")
    assert moved.keys() == wanted.keys()
    for name, tensor in moved.items():
        assert_same(tensor, wanted[name])


@given(st.integers(1, 5))
def test_there_and_back_is_no_work(count: int) -> None:
    """Taken apart and put together again, a tensor is the very expression that it was."""
    for ours, theirs in ((single, fused), (fused, single), (mixtral, fused), (mixtral, single)):
        a, b = (open_state_dict(s("a", count), "a") for s in (ours, theirs))
        back = experts_as_in(experts_as_in(a, b), a)
        assert dict(back.tensors) == dict(a.tensors)


def test_equal_spellings_are_left_alone() -> None:
    for spelling in SPELLINGS.values():
        a = open_state_dict(spelling("a"), "a")
        assert experts_as_in(a, open_state_dict(spelling("b"), "b")) is a


def test_layouts_have_names() -> None:
    assert experts_layout(single("a")) == experts_layout(mixtral("a")) == "per expert"
    assert experts_layout(fused("a")) == "fused"
    assert experts_layout({"model.layers.0.mlp.up_proj.weight": 0}) is None


# -- merges ----------------------------------------------------------------------------------------


def test_a_mean_is_in_the_first_models_layout_and_says_so() -> None:
    merged = merge.linear([fused("a"), mixtral("b"), single("c")], weight=1.0)
    means = {n: sum(fused(m)[n].double() for m in "abc") / 3 for n in fused("a")}
    found = merged.state_dict()
    assert found.keys() == means.keys()
    for name, tensor in found.items():
        assert_near(tensor, torch.as_tensor(means[name]))
    said = [n for n in merged.plan().notes if "experts of" in n]
    assert len(said) == 2 and all("one tensor" in n for n in said)


def test_each_expert_is_trimmed_by_itself_where_they_are_apart() -> None:
    """What a method measures, it measures on the tensors of the first model's layout."""
    base, a = single("base"), fused("a")
    found = merge.ties([a], base=base, weight=1.0, density=0.5).state_dict()
    wanted = merge.ties([single("a")], base=base, weight=1.0, density=0.5).state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert_same(tensor, wanted[name])


# -- what is not understood ------------------------------------------------------------------------


def transposed() -> dict[str, Tensor]:
    state = fused("a")
    return {n: t.transpose(1, 2).contiguous() if t.ndim == 3 else t for n, t in state.items()}


def biased() -> dict[str, Tensor]:
    return {**fused("a"), f"{LAYER}.mlp.experts.gate_up_proj_bias": torch.zeros(3, 12)}


def other_words() -> dict[str, Tensor]:
    return single("a", words=("wi", "wv", "wo"))


def halved() -> dict[str, Tensor]:
    state = single("a")
    del state[f"{LAYER}.mlp.experts.1.{UP}.weight"]
    return state


def uneven() -> dict[str, Tensor]:
    return {**single("a"), f"{LAYER}.mlp.experts.1.{UP}.weight": torch.zeros(5, 4)}


ODD = {
    "transposed": (transposed, single, "transposed: gate_up_proj"),
    "with biases": (biased, single, "gate_up_proj_bias"),
    "by other words": (other_words, fused, "wi.weight"),
}


@pytest.mark.parametrize(("odd", "plain", "word"), ODD.values(), ids=ODD)
@pytest.mark.parametrize("first", [True, False])
def test_what_is_not_understood_is_refused_by_name(
    odd: Any, plain: Any, word: str, first: bool
) -> None:
    models = [open_state_dict(odd(), "odd"), open_state_dict(plain("b"), "plain")]
    with pytest.raises(PlanError, match="not understood") as caught:
        merge.linear(models if first else models[::-1], weight=1.0)
    assert word in str(caught.value.found) and caught.value.where["model"] == "odd"


@pytest.mark.parametrize("odd", [halved, uneven])
def test_experts_that_are_not_alike_are_not_put_together(odd: Any) -> None:
    with pytest.raises(PlanError, match="not understood"):
        merge.linear([fused("b"), odd()], weight=1.0)
    with pytest.raises(PlanError, match=r"same tensors|different shapes"):
        merge.linear([odd(), fused("b")], weight=1.0)


def test_layouts_that_are_not_understood_merge_among_themselves() -> None:
    for odd in (transposed, biased, other_words):
        assert merge.linear([odd(), odd()], weight=1.0).state_dict()


def test_another_number_of_experts_is_another_shape() -> None:
    with pytest.raises(PlanError, match="different shapes"):
        merge.linear([fused("a", 3), single("b", 2)], weight=1.0)


# -- models of transformers ------------------------------------------------------------------------


def pair(name: str, root: Path, forms: tuple[bool, bool]) -> tuple[list[Any], list[Path]]:
    """Two models of a family, in memory and in folders of the two layouts."""
    family = DECODERS[name]
    models = list(two_models(family))
    for model, form, called in zip(models, forms, "ab", strict=True):
        model.save_pretrained(root / called, save_original_format=form)
    return models, [root / "a", root / "b"]


def assert_mean(found: dict[str, Tensor], models: list[Any]) -> None:
    a, b = (m.state_dict() for m in models)
    assert found.keys() == a.keys()
    for name, tensor in found.items():
        assert_near(tensor, (a[name].double() + b[name].double()) / 2)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("forms", [(True, False), (False, True)])
def test_folders_of_both_layouts_merge_and_load(
    name: str, forms: tuple[bool, bool], tmp_path: Path
) -> None:
    models, (a, b) = pair(name, tmp_path, forms)
    (tmp_path / "r.yml").write_text(
        f"merge_method: linear\nparameters: {{weight: 1}}\nmodels:\n- model: {a}\n- model: {b}\n"
    )
    planned = applying.plan_recipe(tmp_path / "r.yml")
    applying.apply_plan(planned, tmp_path / "out")
    assert sum("experts of" in n for n in planned.plan.notes) == 1
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == load_file(a / "model.safetensors").keys()
    assert_mean(loaded_model(DECODERS[name], tmp_path / "out").state_dict(), models)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_live_model_merges_with_a_folder_and_takes_the_result(name: str, tmp_path: Path) -> None:
    models, (_, b) = pair(name, tmp_path, (True, True))
    merged = merge.linear([models[0], b], weight=1.0)
    fresh = new_model(DECODERS[name])
    fresh.load_state_dict(merged.state_dict())
    assert_mean(fresh.state_dict(), models)
    by_hand = merge.open(models[0]) + 0.5 * (merge.open(b) - merge.open(models[0]))
    assert_mean(by_hand.state_dict(), models)
    merged.save(tmp_path / "out")
    assert_mean(loaded_model(DECODERS[name], tmp_path / "out").state_dict(), models)


def test_a_copy_of_one_expert_reads_that_expert_alone(tmp_path: Path) -> None:
    _, (a, b) = pair("mixtral", tmp_path, (True, False))
    merged: Checkpoint = merge.linear([a, b], weight=[1.0, 0.0])
    assert merged.plan().read_bytes < 1.5 * merge.linear([a], weight=1.0).plan().read_bytes
    found = merged.state_dict()
    for name, tensor in load_file(a / "model.safetensors").items():
        assert_same(found[name], tensor)
