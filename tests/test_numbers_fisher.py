"""Fisher-weighted averages against the formula in float64, and what is wrong with statistics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import merge

from .conftest import MakeModel

Array = NDArray[np.float64]


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"w": (70, 33), "b": (41,), "scale": ()}
    return {n: torch.randn(s, generator=draw).to(dtype) for n, s in shapes.items()}


def squared(seed: int) -> dict[str, torch.Tensor]:
    return {n: t.square() * 1e-3 for n, t in state(seed).items()}


def fisher(
    models: Sequence[Array],
    known: Sequence[Array],
    *,
    weight: Sequence[float],
    floor: float,
    normalize: bool,
) -> Array:
    f = [np.maximum(k / (np.linalg.norm(k) if normalize else 1.0), floor) for k in known]
    shares = np.stack([w * x for w, x in zip(weight, f, strict=True)])
    return np.asarray((shares * np.stack(models)).sum(0) / shares.sum(0))


FORMULAS = {"fisher": fisher}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_the_formula(normalize: bool, dtype: torch.dtype) -> None:
    models, known = [state(s, dtype) for s in (0, 1, 2)], [squared(s) for s in (3, 4, 5)]
    weights = (0.5, 1.0, 2.0)
    lazy = merge.fisher(
        models, statistics=known, weight=list(weights), floor=1e-5, normalize=normalize
    )
    for name, out in lazy.state_dict().items():
        exact = fisher(
            [m[name].double().numpy() for m in models],
            [k[name].double().numpy() for k in known],
            weight=weights,
            floor=1e-5,
            normalize=normalize,
        )
        expected = torch.from_numpy(exact)
        assert out.dtype == dtype
        bits = {torch.float32: 20, torch.bfloat16: 7, torch.float16: 10}[dtype]
        torch.testing.assert_close(out.double(), expected, rtol=2.0**-bits, atol=1e-6)


def test_equal_information_is_the_plain_mean_and_none_is_too() -> None:
    models = [state(0), state(1)]
    mean = merge.linear(models, weight=1.0).state_dict()
    for value in (1.0, 0.0):
        known = [{n: torch.full_like(t, value) for n, t in m.items()} for m in models]
        out = merge.fisher(models, statistics=known).state_dict()
        for name in mean:
            torch.testing.assert_close(out[name], mean[name])


def test_a_weight_that_only_one_model_knows_is_that_models() -> None:
    models, known = [state(0), state(1)], [squared(2), squared(3)]
    known[1] = {n: torch.zeros_like(t) for n, t in known[1].items()}
    out = merge.fisher(models, statistics=known, floor=1e-30).state_dict()
    torch.testing.assert_close(out["w"], models[0]["w"])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_every_model_needs_its_statistics(count: int) -> None:
    with pytest.raises(merge.RecipeError, match="needs a statistic of every model"):
        merge.fisher([state(0), state(1)], statistics=[squared(2)] * count)


def test_other_methods_take_none() -> None:
    with pytest.raises(merge.RecipeError, match="takes no statistics"):
        merge.linear([state(0)], weight=1.0, statistics=[squared(1)])


def test_statistics_of_another_shape_are_refused() -> None:
    wrong = {**squared(3), "b": torch.zeros(7)}
    with pytest.raises(merge.PlanError, match="different shapes"):
        merge.fisher([state(0), state(1)], statistics=[squared(2), wrong])


def test_a_recipe_names_the_statistics_under_each_model(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, name in enumerate(("a", "b")):
        make_model(name, state(i))
        make_model(f"{name}-fisher", squared(i + 2))
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        "merge_method: fisher\nmodels:\n- {model: a, statistics: a-fisher}\n"
        "- {model: b, statistics: b-fisher}\n"
    )
    monkeypatch.chdir(tmp_path)
    out = merge.load_recipe(recipe).state_dict()
    expected = merge.fisher([state(0), state(1)], statistics=[squared(2), squared(3)]).state_dict()
    assert all(torch.equal(out[n], expected[n]) for n in expected)


def test_one_model_is_given_back() -> None:
    out = merge.fisher([state(0)], statistics=[squared(1)]).state_dict()
    for name, tensor in state(0).items():
        torch.testing.assert_close(out[name], tensor, rtol=1e-6, atol=0)
