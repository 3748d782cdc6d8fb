"""What learning refuses before it begins, what it survives, and what a state is taken up for."""

from __future__ import annotations

import math
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import merge
from merge.learning.objectives import (
    Contrastive,
    CrossEntropy,
    Distill,
    Features,
    Negation,
    PseudoLabels,
)

from .test_learning_guarantees import QUICK, Names, both


def others(tasks: dict[str, merge.Task], **how: Any) -> dict[str, merge.Task]:
    """The tasks, the second of them given other data or functions."""
    own = tasks["task 1"]
    given = {"module": own.module, "criterion": own.criterion, "train": own.train,
             "validate": own.validate, **how}  # fmt: skip
    return {**tasks, "task 1": merge.Task(**given)}


def spoilt(models: Names, value: float) -> Names:
    """The models, one number of the second replaced."""
    bad = models["task 1"]["body.2.weight"].clone()
    bad[3, 4] = value
    return {**models, "task 1": {**models["task 1"], "body.2.weight": bad}}


# -- numbers of the models -------------------------------------------------------------------------
@pytest.mark.parametrize("memory", ["resident", "stream"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_expert_with_a_number_that_is_not_finite_is_named(value: float, memory: str) -> None:
    base, experts, tasks = both()
    with pytest.raises(merge.SourceError, match="an expert has numbers") as caught:
        merge.learn(spoilt(experts, value), base=base, tasks=tasks, memory=memory, **QUICK)
    assert caught.value.where == {"tensor": "body.2.weight", "expert": "task 1"}
    assert caught.value.found == "1 of 96 are NaN or infinite"


def test_a_base_with_a_number_that_is_not_finite_is_named() -> None:
    base, experts, tasks = both()
    base["body.0.bias"][2] = math.nan
    with pytest.raises(merge.SourceError, match="a base has numbers") as caught:
        merge.learn(experts, base=base, tasks=tasks, learn_base=True, **QUICK)
    assert caught.value.where["tensor"] == "body.0.bias"


def test_experts_of_another_architecture_are_told_by_a_tensor() -> None:
    base, experts, tasks = both()
    alien = {"task 0": experts["task 0"], "task 1": {"conv.weight": torch.ones(3, 3)}}
    with pytest.raises(merge.PlanError, match="no tensor in common") as caught:
        merge.learn(alien, base=base, tasks=tasks, **QUICK)
    assert caught.value.found == "body.0.weight: task 1 has no such tensor"


# -- validation data -------------------------------------------------------------------------------
@pytest.mark.parametrize("shift", [3, -1])
@pytest.mark.parametrize("right", [None, lambda out, y: float((out.argmax(-1) == y).sum())])
def test_validation_labels_out_of_range_are_refused(shift: int, right: Any) -> None:
    """They would count as wrong for every candidate, and nobody would know."""
    base, experts, tasks = both()
    x, y = tasks["task 1"].validate[0]  # type: ignore[index]
    with pytest.raises(merge.PlanError, match="out of range") as caught:
        wrong = others(tasks, validate=[(x, y + shift)], right=right)
        merge.learn(experts, base=base, tasks=wrong, **QUICK)
    assert caught.value.where["task"] == "task 1"
    assert caught.value.expected == "0 to 2"


def test_validation_labels_of_one_class_are_refused() -> None:
    base, experts, tasks = both()
    x, y = tasks["task 1"].validate[0]  # type: ignore[index]
    with pytest.raises(merge.PlanError, match="validation labels are all of one class") as caught:
        merge.learn(experts, base=base, tasks=others(tasks, validate=[(x, y * 0 + 2)]), **QUICK)
    assert (caught.value.where["task"], caught.value.found) == ("task 1", "class 2 in all 32 rows")

    def positive(out: Tensor, target: Tensor) -> float:  # of targets that are no classes
        return float((out.sum(-1) > target).float().mean())

    loose = others(tasks, validate=[(x, y * 0)], right=positive, criterion=F.mse_loss)
    assert merge.learn(experts, base=base, tasks=loose, **QUICK).scores


def test_validation_data_that_is_empty_or_breaks_is_told_apart_from_the_rest() -> None:
    base, experts, tasks = both()
    with pytest.raises(merge.PlanError, match="no data to choose by") as caught:
        merge.learn(experts, base=base, tasks=others(tasks, validate=iter([])), **QUICK)
    assert "validate= out" in str(caught.value.do)

    def broken() -> Iterator[Any]:
        yield tasks["task 1"].validate[0]  # type: ignore[index]
        raise OSError("the disk is gone")

    with pytest.raises(merge.SourceError, match="loader raised") as told:
        merge.learn(experts, base=base, tasks=others(tasks, validate=broken()), **QUICK)
    assert (told.value.where["task"], told.value.where["batch"]) == ("task 1", "1")


def test_a_negation_needs_something_to_keep_and_validation_data() -> None:
    base, experts, tasks = both()
    how: dict[str, Any] = {**QUICK, "init": 0.0, "link": "identity"}
    with pytest.raises(merge.PlanError, match="all tasks are to be forgotten"):
        merge.learn(experts, base=base, tasks=tasks, objective=Negation(), **how)
    with pytest.raises(merge.PlanError, match="no task is to be forgotten"):
        merge.learn(experts, base=base, tasks=tasks, objective=Negation(("task 9",)), **how)
    x, y = tasks["task 1"].validate[0]  # type: ignore[index]
    blind = others(tasks, train=[(x, y)], validate=[])
    with pytest.raises(merge.PlanError, match="no validation data") as caught:
        merge.learn(experts, base=base, tasks=blind, objective=Negation(("task 0",)), **how)
    assert caught.value.where["task"] == "task 1"
    free = merge.learn(experts, base=base, tasks=tasks, objective=Negation(floor=0), **how)
    assert free.scores


# -- settings --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rate", "fast"), ("rate", -1.0), ("rate", math.nan), ("decay", None), ("steps", 1.5),
        ("steps", True), ("every", 0), ("batch", 0), ("batch", 2.5), ("patience", 0), ("clip", 0.0),
        ("clip", "1"), ("depth_smooth", 1), ("bounds", "ab"), ("bounds", (0.0, 1.0, 2.0)),
        ("bounds", (0.0, math.nan)), ("scales", ("a",)), ("scales", 0.3), ("freeze", "body"),
        ("freeze", ("(",)), ("groups", (("(", "x"),)), ("groups", ("body",)), ("free", "head"),
        ("seed", -1), ("surgery_rank", 0), ("candidates", ("strat",)), ("dead", "nul"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused_by_their_key(key: str, value: object) -> None:
    base, experts, tasks = both()
    with pytest.raises(merge.RecipeError) as caught:
        merge.learn(experts, base=base, tasks=tasks, **{**QUICK, key: value})
    assert caught.value.where["key"] == key
    assert caught.value.expected


def test_bounds_may_have_no_end() -> None:
    base, experts, tasks = both()
    found = merge.learn(experts, base=base, tasks=tasks, **QUICK, bounds=(0, math.inf), rate=1.0)
    assert found.history


@pytest.mark.parametrize(
    ("objective", "found"),
    [
        (lambda *_: 1.0, "float"),
        (lambda out, *_: out, "a tensor of [16, 3]"),
        (lambda *_: None, ""),
    ],
)
def test_what_is_no_loss_is_refused(objective: Callable[..., Any], found: str) -> None:
    base, experts, tasks = both()
    with pytest.raises(merge.PlanError, match="gives no loss") as caught:
        merge.learn(experts, base=base, tasks=tasks, objective=objective, **QUICK)
    assert caught.value.where["task"] == "task 0"
    assert found in str(caught.value.found)


@pytest.mark.parametrize(
    ("objective", "found"),
    [
        (PseudoLabels(gate="sure"), "sure"), (Distill("kll"), "kll"), (Features("l2"), "l2"),  # type: ignore[arg-type]
        (Distill(temperature=0.0), "temperature: 0.0"), (Contrastive(math.nan), "temperature: nan"),
        (Distill("mse", top=0), "top: 0"), (CrossEntropy("much"), "smoothing: 'much'"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_options_of_objectives_that_cannot_be_are_refused(objective: Any, found: str) -> None:
    base, experts, tasks = both()
    with pytest.raises(merge.RecipeError) as caught:
        merge.learn(experts, base=base, tasks=tasks, objective=objective, **QUICK)
    assert (caught.value.where["key"], caught.value.found) == ("objective", found)


# -- states ----------------------------------------------------------------------------------------
def test_a_state_of_other_models_or_tasks_is_refused(tmp_path: Path) -> None:
    """The same names and shapes are not enough: going on would end in a merge of neither."""
    base, experts, tasks = both()
    state = tmp_path / "state"
    given: dict[str, Any] = {"base": base, "tasks": tasks, "state": state, **QUICK}
    merge.learn(experts, **given)
    other = {k: {n: t * 1.01 for n, t in e.items()} for k, e in experts.items()}
    base_too = {n: t * 1.01 for n, t in base.items()}
    alone = {"task 0": tasks["task 0"]}
    more = others(tasks, train=[*tasks["task 1"].train, *tasks["task 0"].train])
    for change, key in (
        ({"experts": other}, "base and experts"),
        ({"base": base_too}, "base and experts"),
        ({"tasks": alone}, "tasks"),
        ({"tasks": more}, "tasks"),
        ({"memory": "int8"}, "memory"),
    ):
        with pytest.raises(merge.PlanError, match="other settings") as caught:
            merge.learn(**{"experts": experts, **given, **change})
        assert caught.value.where["key"] == key
    again = merge.learn(experts, **{**given, "memory": "stream"})  # to the bit the same
    assert len(again.history) == QUICK["steps"]


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 500 bytes: what a full disk does to whoever writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, small_files: None) -> None:
    base, experts, tasks = both()
    state = tmp_path / "state"
    with pytest.raises(merge.SinkError, match="cannot be written") as caught:
        merge.learn(experts, base=base, tasks=tasks, state=state, **QUICK)
    assert caught.value.where["file"] == str(state)
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_told_even_where_the_state_cannot_be_saved(
    tmp_path: Path, small_files: None
) -> None:
    """What stopped the run comes first, and what was lost with it."""
    base, experts, tasks = both()

    def breaks(out: Tensor, batch: Any, task: merge.Task, expert: Any) -> Tensor:
        if next(calls) == 5:
            raise ValueError("no such thing")
        return F.cross_entropy(out, batch[1])

    calls = iter(range(99))
    with pytest.raises(merge.PlanError, match="cannot be computed") as caught:
        merge.learn(experts, base=base, tasks=tasks, objective=breaks, state=tmp_path / "state",
                    **{**QUICK, "rebuild": 20})  # fmt: skip
    assert "no such thing" in str(caught.value.found)
    assert "the state of learning cannot be written" in caught.value.where["lost"]
