"""Models by name wherever several are given: the same as a list of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import merge

State = dict[str, Tensor]


def model(seed: int) -> State:
    draw = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(6, 4, generator=draw), "b": torch.randn(6, generator=draw)}


BASE, MODELS = model(9), {"math": model(1), "code": model(2), "law": model(3)}


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("linear", {"weight": {"code": 2.0, "law": 0.5, "math": 1.0}}),
        ("ties", {"weight": {"law": 0.3, "math": 0.7, "code": 1.0}, "density": 0.5}),
        ("task_arithmetic", {"weight": 0.4}),
        ("model_stock", {}),
    ],
)
def test_a_mapping_is_the_list_of_its_models(method: str, given: dict[str, Any]) -> None:
    """Values by name go to the model of that name, in whatever order they are written."""
    function = getattr(merge, method)
    base = {} if method == "linear" else {"base": BASE}
    listed = {k: [v[n] for n in MODELS] if isinstance(v, dict) else v for k, v in given.items()}
    named = function(MODELS, **base, **given).state_dict()
    wanted = function(list(MODELS.values()), **base, **listed).state_dict()
    assert all(torch.equal(named[n], t) for n, t in wanted.items())


def test_statistics_go_by_name_too() -> None:
    known = {n: {"w": torch.eye(4) * (i + 1)} for i, n in enumerate(MODELS)}
    turned = dict(reversed(known.items()))
    named = merge.regmean(MODELS, statistics=turned).state_dict()
    wanted = merge.regmean(list(MODELS.values()), statistics=list(known.values())).state_dict()
    assert torch.equal(named["w"], wanted["w"])
    other = merge.regmean(list(MODELS.values()), statistics=list(turned.values())).state_dict()
    assert not torch.equal(named["w"], other["w"])


def test_averages_and_soups_take_names() -> None:
    wanted = sum(m["w"] for m in MODELS.values()) / 3
    torch.testing.assert_close(merge.average(MODELS).state_dict()["w"], wanted)
    assert merge.greedy_soup(MODELS, lambda c: 0.0).members == (0, 1, 2)


@pytest.mark.parametrize(
    ("models", "how", "what"),
    [
        (BASE, {}, "found: a state dict"),
        ("math", {}, "found: str"),
        (merge.open(BASE), {}, "found: Checkpoint"),
        (7, {}, "found: int"),
        (MODELS, {"weight": {"math": 1.0, "code": 1.0, "lwa": 1.0}}, "did you mean 'law'"),
        (MODELS, {"weight": {"math": 1.0, "code": 1.0}}, "found: none for law"),
    ],
)
def test_one_model_and_other_names_are_refused(models: Any, how: Any, what: str) -> None:
    with pytest.raises(merge.RecipeError) as caught:
        merge.linear(models, **{"weight": 1.0, **how})
    assert what in str(caught.value)
    if not how:
        with pytest.raises(merge.RecipeError, match="experts are not a list"):
            merge.learn(models, base=BASE, tasks=[])
