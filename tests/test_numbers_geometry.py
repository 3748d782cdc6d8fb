"""Methods that go by lengths, angles and distances, against their formulas in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize

import merge
from tests.test_numbers import Case, Family, every_dtype, load, nearness

Array = NDArray[Any]
State = dict[str, torch.Tensor]

# -- the formulas, on whole vectors ---------------------------------------------------------------


def uniform_soup(models: Sequence[Array], **_: object) -> Array:
    return sum(models[1:], models[0]) / len(models)


def wise_ft(models: Sequence[Array], *, base: Array, alpha: float = 0.5, **_: object) -> Array:
    return (1 - alpha) * base + alpha * models[0]


def nearswap(models: Sequence[Array], *, t: float, **_: object) -> Array:
    b, w = models
    a = np.clip(t / np.maximum(np.abs(b - w), 1e-6), 0, 1)
    return a * w + (1 - a) * b


def nuslerp(
    models: Sequence[Array],
    *,
    base: Array | None,
    weight: Sequence[float],
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    **_: object,
) -> Array:
    x0, x1 = relative(models, base)
    if nuslerp_flatten:
        rows: tuple[int, ...] = (1, -1)
    elif nuslerp_row_wise:
        rows = x0.shape
    else:
        rows = (x0.shape[0], -1) if x0.ndim > 1 else (1, -1)
    axis = 0 if nuslerp_row_wise and not nuslerp_flatten else -1
    out = arc(x0.reshape(rows), x1.reshape(rows), weight[1] / sum(weight), axis)
    return out.reshape(x0.shape) + (0 if base is None else base)


def arc(x0: Array, x1: Array, t: float, axis: int) -> Array:
    u0, u1 = (x / np.maximum(length(x, axis), 1e-7) for x in (x0, x1))
    cosine = np.clip(np.sum(u0 * u1, axis=axis, keepdims=True), -1, 1)
    theta = np.where(cosine**2 >= 1 - 1e-6, np.pi / 2, np.arccos(cosine))
    bent = (np.sin((1 - t) * theta) * x0 + np.sin(t * theta) * x1) / np.sin(theta)
    return np.where(cosine**2 >= 1 - 1e-6, (1 - t) * x0 + t * x1, bent)


def multislerp(
    models: Sequence[Array],
    *,
    base: Array | None,
    weight: Sequence[float],
    normalize_weights: bool = True,
    eps: float = 1e-8,
    **_: object,
) -> Array:
    x = relative(models, base)
    w = np.array(weight) / (sum(weight) if normalize_weights else 1)
    u = [xi / (length(xi) + eps) for xi in x]
    m = sum(wi * ui for wi, ui in zip(w, u, strict=True))
    m = m / length(m)
    tangent = sum(wi * (ui - np.sum(ui * m) * m) for wi, ui in zip(w, u, strict=True))
    n = length(tangent) + eps
    direction = m * np.cos(n) + tangent * (np.sin(n) / n)
    size = sum(wi * length(xi) for wi, xi in zip(w, x, strict=True))
    return size * direction + (0 if base is None else base)


def karcher(
    models: Sequence[Array], *, max_iter: int = 10, tol: float = 1e-5, **_: object
) -> Array:
    lengths = [length(x) for x in models]
    units = [x / n for x, n in zip(models, lengths, strict=True) if n > tol]
    u = sum(units) / len(units)
    u = u / length(u)
    for _i in range(max_iter):
        tangent = np.zeros_like(u)
        for unit in units:
            cosine = np.clip(np.sum(u * unit), -1, 1)
            theta = np.arccos(cosine)
            if np.sin(theta) > tol:
                tangent += theta / np.sin(theta) * (unit - cosine * u) / len(units)
        if length(tangent) < tol:
            break
        u = np.cos(length(tangent)) * u + np.sin(length(tangent)) * tangent / length(tangent)
        u = u / length(u)
    return sum(lengths) / len(lengths) * u


def geometric_median(
    models: Sequence[Array],
    *,
    weight: Sequence[float] = (1.0, 1.0, 1.0),
    max_iter: int = 1000,
    tol: float = 1e-9,
    eps: float = 1e-6,
    **_: object,
) -> Array:
    share = np.array(weight) / sum(weight)
    least = min(length(x - y).item() for x, y in combinations(models, 2))
    for _i in range(max_iter):
        y = sum(s * x for s, x in zip(share, models, strict=True))
        distances = np.array([length(y - x).item() for x in models])
        pull = np.array(weight) / np.maximum(distances, eps * least)
        before, share = share, pull / pull.sum()
        if np.max(np.abs(share - before)) <= tol:
            break
    return sum(s * x for s, x in zip(share, models, strict=True))


def relative(models: Sequence[Array], base: Array | None) -> list[Array]:
    return [x if base is None else x - base for x in models]


def length(x: Array, axis: int | None = None) -> Array:
    return np.sqrt(np.sum(x * x, axis=axis, keepdims=axis is not None))


FORMULAS: dict[str, Callable[..., Array]] = {
    f.__name__: f
    for f in (uniform_soup, wise_ft, nearswap, nuslerp, multislerp, karcher, geometric_median)
}

PAIR, THREE = [0.6, 0.2], [0.5, 0.3, 0.4]
ROWS = {"weight": PAIR, "nuslerp_flatten": False}
CASES = [
    Case("uniform_soup"),
    Case("wise_ft", {"alpha": 0.3}, models=1),
    Case("nearswap", {"t": 0.01}, models=2),
    *(
        Case("nuslerp", parameters, models=2, relative=relative)
        for relative in (False, True)
        for parameters in ({"weight": PAIR}, ROWS, {**ROWS, "nuslerp_row_wise": True})
    ),
    Case("multislerp", {"weight": THREE}),
    Case("multislerp", {"weight": THREE}, relative=True),
    Case("multislerp", {"weight": THREE, "normalize_weights": False}, relative=True),
    Case("karcher"),
    Case("geometric_median"),
    Case("geometric_median", {"weight": THREE}),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)

# -- near to the truth ---------------------------------------------------------------------------


@every_dtype
@every_case
def test_a_tiny_llama_is_merged_by_the_formula(case: Case, dtype: str, llamas: Family) -> None:
    base, *tuned = llamas(dtype)
    merged = case.lazy(base, tuned).state_dict()
    nearness(case, dtype, merged, [load(folder) for folder in (base, *tuned)]).check()


SHAPES = {"matrix": (40, 30), "vector": (50,), "kernel": (8, 4, 3, 3), "blocks": (300, 700)}


def unrelated(dtype: torch.dtype, count: int = 4) -> list[State]:
    """Models at about right angles, of different lengths."""
    draw = torch.Generator().manual_seed(11)
    return [
        {n: (i + 1) * torch.randn(s, generator=draw).to(dtype) for n, s in SHAPES.items()}
        for i in range(count)
    ]


@every_case
def test_models_at_right_angles_are_merged_by_the_formula(case: Case) -> None:
    models = unrelated(torch.float32)
    merged = case.lazy(models[0], models[1:]).state_dict()
    nearness(case, "float32", merged, models).check()


@every_case
def test_float64_models_are_merged_by_the_formula_almost_exactly(case: Case) -> None:
    base, *models = unrelated(torch.float64)
    merged = case.lazy(base, models).state_dict()
    for name, tensor in merged.items():
        exact = case.exact(name, base[name].numpy(), [m[name].numpy() for m in models])
        np.testing.assert_allclose(tensor.numpy(), exact, rtol=1e-8, atol=1e-8)


# -- what the formulas promise -------------------------------------------------------------------


def of(*vectors: Sequence[float]) -> list[State]:
    return [{"w": torch.tensor(v, dtype=torch.float64)} for v in vectors]


def result(lazy: merge.Checkpoint) -> list[float]:
    values: list[float] = lazy.state_dict()["w"].tolist()
    return values


@pytest.mark.parametrize(("weight", "out"), [([1, 0], [1.0, 0.0]), ([0, 1], [0.0, 3.0])])
@pytest.mark.parametrize("flatten", [True, False])
def test_nuslerp_ends_at_the_models(weight: list[float], out: list[float], flatten: bool) -> None:
    lazy = merge.nuslerp(of([1, 0], [0, 3]), weight=weight, nuslerp_flatten=flatten)
    assert result(lazy) == pytest.approx(out, abs=1e-12)


def test_nuslerp_of_opposite_models_goes_straight() -> None:
    assert result(merge.nuslerp(of([2, 4], [-1, -2]), weight=1.0)) == pytest.approx([0.5, 1.0])


def test_nuslerp_with_weights_that_cancel_goes_half_way() -> None:
    assert result(merge.nuslerp(of([1, 1], [3, 3]), weight=[1, -1])) == pytest.approx([2, 2])


HALF = [np.sqrt(0.5), np.sqrt(0.5)]


@pytest.mark.parametrize(
    "merged",
    [
        lambda models: merge.slerp(models, t=0.5),
        lambda models: merge.nuslerp(models, weight=1.0),
        lambda models: merge.multislerp(models, weight=1.0),
        lambda models: merge.karcher(models),
    ],
    ids=["slerp", "nuslerp", "multislerp", "karcher"],
)
def test_two_unit_vectors_meet_in_the_middle_of_their_arc(
    merged: Callable[[list[State]], merge.Checkpoint],
) -> None:
    assert result(merged(of([1, 0], [0, 1]))) == pytest.approx(HALF)


def test_multislerp_of_one_model_is_that_model() -> None:
    base, model = of([1, 1], [4, 5])
    assert result(merge.multislerp([model], base=base, weight=0.3)) == [4.0, 5.0]


def test_multislerp_of_two_opposite_models_is_their_sum_by_weight() -> None:
    assert result(merge.multislerp(of([2, 0], [-2, 0]), weight=[1.0, 1.0])) == [0.0, 0.0]


def test_multislerp_of_directions_that_cancel_is_the_sum_by_weight() -> None:
    assert result(merge.multislerp(of([1, 0], [-2, 0], [0, 0]), weight=[2.0, 2.0, 4.0])) == [
        -0.25,
        0.0,
    ]


def test_multislerp_refuses_weights_that_sum_to_zero() -> None:
    lazy = merge.multislerp(of([1, 0], [0, 1]), weight=[1.0, -1.0])
    with pytest.raises(merge.RecipeError, match="sum to 0"):
        lazy.state_dict()


def test_karcher_takes_no_direction_from_a_model_of_zeros_but_its_length() -> None:
    assert result(merge.karcher(of([3, 0], [0, 0]))) == pytest.approx([1.5, 0.0])
    assert result(merge.karcher(of([0, 0], [0, 0]))) == [0.0, 0.0]


def test_karcher_balances_the_angles() -> None:
    """On the sphere in three dimensions, where the mean is no mean of the vectors."""
    models = of([1, 0, 0], [1, 0.2, 0], [0, 0, 2])
    out = np.array(result(merge.karcher(models, max_iter=50, tol=1e-10)))
    u = out / np.linalg.norm(out)
    pulls = []
    for x in (m["w"].numpy() for m in models):
        unit = x / np.linalg.norm(x)
        pulls.append(np.arccos(u @ unit) * (unit - (u @ unit) * u) / np.sin(np.arccos(u @ unit)))
    assert np.linalg.norm(sum(pulls)) < 1e-9
    assert np.linalg.norm(out) == pytest.approx((1 + np.sqrt(1.04) + 2) / 3)


def test_karcher_without_tolerance_stops_where_nothing_pulls() -> None:
    assert result(merge.karcher(of([2, 0], [4, 0]), tol=0.0)) == pytest.approx([3.0, 0.0])
    assert result(merge.karcher(of([2, 0], [-4, 0]), tol=0.0)) == pytest.approx([3.0, 0.0])


def test_karcher_of_opposite_models_is_decided_by_the_first() -> None:
    assert result(merge.karcher(of([1, 0], [-3, 0]))) == pytest.approx([2.0, 0.0])


@pytest.mark.parametrize("weight", [[1, 1, 1, 1, 1], [1, 2, 0.5, 0, 1.2]])
def test_the_geometric_median_has_the_least_sum_of_distances(weight: list[float]) -> None:
    points = np.random.default_rng(4).normal(size=(5, 3))

    def objective(y: Array) -> float:
        return float(np.sum(weight * np.linalg.norm(y - points, axis=1)))

    found = result(merge.geometric_median(of(*points.tolist()), weight=weight))
    best = minimize(objective, points.mean(axis=0), method="Nelder-Mead", tol=1e-12)
    assert objective(np.array(found)) <= best.fun * (1 + 1e-9)
    np.testing.assert_allclose(found, best.x, atol=1e-5)


def test_the_geometric_median_hardly_sees_an_outlier() -> None:
    draw = np.random.default_rng(5)
    good = 1.0 + 0.01 * draw.normal(size=(4, 200))
    models = of(*good.tolist(), [1e6] * 200)
    out = np.array(result(merge.geometric_median(models)))
    assert np.linalg.norm(out - good.mean(axis=0)) < 0.2
    assert np.linalg.norm(np.array(result(merge.uniform_soup(models))) - out) > 1e6


@pytest.mark.parametrize("place", [0, 2])
def test_the_geometric_median_measures_near_models_well_beside_a_far_one(place: int) -> None:
    draw = np.random.default_rng(7)
    near = [1.0 + 0.01 * draw.normal(size=2000) for _ in range(3)]
    models = [x.astype(np.float32) for x in near]
    models.insert(place, (10.0 * draw.normal(size=2000)).astype(np.float32))
    exact = geometric_median([x.astype(np.float64) for x in models], weight=[1.0] * 4)
    out = merge.geometric_median([{"w": torch.from_numpy(x)} for x in models]).state_dict()["w"]
    np.testing.assert_allclose(out.double().numpy(), exact, atol=1e-6)


def test_the_geometric_median_of_fine_tunes_does_not_drown_in_their_common_part() -> None:
    """Differences of 1e-4 on weights of size 100, in float32: their squares are 1e-12 apart."""
    draw = np.random.default_rng(6)
    common = 100 * draw.normal(size=3000)
    near = [(common + 1e-4 * i * draw.normal(size=3000)).astype(np.float32) for i in (1, 2, 9)]
    models = [{"w": torch.from_numpy(x)} for x in near]
    exact = geometric_median([x.astype(np.float64) for x in near])
    out = merge.geometric_median(models).state_dict()["w"].double().numpy()
    assert np.max(np.abs(out - exact)) <= np.spacing(np.float32(400.0))


def test_the_geometric_median_needs_a_weight_above_zero() -> None:
    with pytest.raises(merge.RecipeError, match="all 0"):
        merge.geometric_median(of([1], [2]), weight=0.0).state_dict()


def test_nearswap_moves_no_element_further_than_t() -> None:
    base, other = of([1, 1, 1, 1e-9], [1.05, 3, -3, 0])
    assert result(merge.nearswap([base, other], t=0.1)) == pytest.approx([1.05, 1.1, 0.9, 0])
    assert result(merge.nearswap([base, other], t=0.0)) == result(merge.uniform_soup([base]))
    assert result(merge.nearswap([base, other], t=9.0)) == result(merge.uniform_soup([other]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nearswap_swaps_what_is_near_bit_for_bit(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(8)
    base = torch.randn(5000, generator=draw).to(dtype)
    other = (base + 0.02 * torch.randn(5000, generator=draw)).to(dtype)
    out = merge.nearswap([{"w": base}, {"w": other}], t=0.01).state_dict()["w"]
    near = (base.double() - other.double()).abs() < 0.01 * (1 - 1e-6)
    assert near.any()
    assert torch.equal(out[near], other[near])


def test_wise_ft_ends_at_the_base_and_at_the_fine_tune_byte_for_byte() -> None:
    base, tuned = unrelated(torch.bfloat16, 2)
    for alpha, end in ((0.0, base), (1.0, tuned)):
        merged = merge.wise_ft([tuned], base=base, alpha=alpha).state_dict()
        assert all(torch.equal(t, end[n]) for n, t in merged.items())


def test_a_uniform_soup_is_a_linear_merge_of_equal_weights() -> None:
    models = unrelated(torch.float32)
    ours, linear = merge.uniform_soup(models), merge.linear(models, weight=1.0)
    assert all(torch.equal(t, linear.state_dict()[n]) for n, t in ours.state_dict().items())
    assert ours.plan().steps[0].passes == 1
