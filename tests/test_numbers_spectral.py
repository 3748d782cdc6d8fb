"""The methods that decompose matrices, against their papers' formulas by numpy's SVD in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import merge
from merge import methods
from merge.methods.core.schema import Method
from merge.methods.core.spectral import polar, thin_svd

Array = NDArray[Any]
Factors = tuple[Array, Array, Array]

# -- the formulas --------------------------------------------------------------------------------


def svd(x: Array, rank: int | None = None, null: float = 0.0) -> Factors:
    """U, s, V of the directions that are not null, the leading ``rank`` of them."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    kept = int(np.count_nonzero(s > max(1e-5 * s[0], null)))
    kept = kept if rank is None else min(rank, kept)
    return u[:, :kept], s[:kept], vt[:kept].T


def side_by_side(parts: Sequence[Factors]) -> Factors:
    u, s, v = (np.concatenate(f, axis=-1) for f in zip(*parts, strict=True))
    return u, s, v


def orthonormal(x: Array) -> Array:
    """The polar factor."""
    if not x.size:
        return x
    u, _, v = svd(x)
    return u @ v.T


def mean(s: Array) -> float:
    return float(np.mean(s)) if s.size else 0.0


def tsv(d: Sequence[Array], *, lambda_: float = 1.0) -> Array:
    q = max(1, min(d[0].shape) // len(d))
    u, s, v = side_by_side([svd(x, q) for x in d])
    return lambda_ * orthonormal(u) @ np.diag(s) @ orthonormal(v).T


def iso_c(d: Sequence[Array], *, lambda_: float = 1.0) -> Array:
    u, s, v = svd(np.sum(d, axis=0))
    return lambda_ * mean(s) * u @ v.T


def iso_cts(
    d: Sequence[Array], *, common_space_fraction: float = 0.8, lambda_: float = 1.0
) -> Array:
    u, s, v = svd(np.sum(d, axis=0))
    r = len(s)
    t = round((1 - common_space_fraction) * r / len(d))
    c = max(0, r - t * len(d))
    u, s, v = u[:, :c], s[:c], v[:, :c]
    own = [svd(x - u @ u.T @ x, t, null=1e-5 * float(np.linalg.norm(x))) for x in d]
    u, s, v = side_by_side([(u, s, v), *own])
    return lambda_ * mean(s) * orthonormal(u) @ orthonormal(v).T


def cart(d: Sequence[Array], *, rank: float = 0.08, lambda_: float = 1.0) -> Array:
    average = np.mean(d, axis=0)
    r = max(1, round(rank * min(average.shape)))
    near = [u @ np.diag(s) @ v.T for u, s, v in (svd(x - average, r) for x in d)]
    return average + lambda_ * np.sum(near, axis=0)


def wudi(d: Sequence[Array], *, ridge: float = 1e-6, lambda_: float = 1.0) -> Array:
    g = [x.T @ x / max(np.sum(x * x), 1e-300) for x in d]
    left, pull = np.sum(g, axis=0), ridge * np.trace(np.sum(g, axis=0)) / len(g[0])
    if pull == 0:
        return np.zeros_like(d[0])
    right = np.sum([x @ y for x, y in zip(d, g, strict=True)], axis=0) + pull * np.sum(d, axis=0)
    return lambda_ * np.linalg.solve(left + pull * np.eye(len(left)), right.T).T


def knots(
    d: Sequence[Array],
    *,
    weight: Sequence[float] | float = 1.0,
    density: float = 1.0,
    inner: str = "ties",
    normalize: bool = True,
    lambda_: float = 1.0,
) -> Array:
    w = np.broadcast_to(weight, len(d))
    u, s, v = svd(np.concatenate(d, axis=1))
    c = np.array([np.diag(s) @ part.T for part in np.split(v, len(d))])
    if inner == "linear":
        total = np.tensordot(w, c, 1)
        return lambda_ * u @ total / (np.sum(w) if normalize else 1.0)
    votes = w[:, None, None] * np.array([keep_largest(x, int(density * x.size)) for x in c])
    agrees = np.sign(votes) == np.where(votes.sum(axis=0) >= 0, 1, -1)
    divisor = np.tensordot(w, agrees, 1) if normalize else np.ones_like(c[0])
    return lambda_ * u @ ((votes * agrees).sum(axis=0) / np.where(divisor == 0, 1, divisor))


def keep_largest(x: Array, k: int) -> Array:
    least = np.sort(np.abs(x), axis=None)[x.size - k] if x.size else 0.0
    return x * (np.abs(x) >= least)


FORMULAS: dict[str, Callable[..., Array]] = {
    f.__name__: f for f in (tsv, iso_c, iso_cts, cart, wudi, knots)
}
every_method = pytest.mark.parametrize("m", [methods.get(n) for n in FORMULAS], ids=list(FORMULAS))

# -- matrices ------------------------------------------------------------------------------------

TALL, WIDE, SQUARE = (40, 12), (12, 40), (24, 24)


def family(
    shape: tuple[int, int],
    count: int,
    rank: int | None = None,
    *,
    spectrum: Array | None = None,
    seed: int = 0,
) -> list[Array]:
    """Random differences of float32; their spectra fall as those of fine-tunes do."""
    draw = np.random.default_rng(seed)
    s = 1 / np.arange(1, (rank or min(shape)) + 1) ** 0.5 if spectrum is None else spectrum

    def one() -> Array:
        u, v = (np.linalg.qr(draw.normal(size=(side, len(s))))[0] for side in shape)
        return (u * s @ v.T).astype(np.float32)

    return [one() for _ in range(count)]


CASES = {
    **{f"tall {n}": family(TALL, n) for n in (1, 2, 3, 5)},
    **{f"wide {n}": family(WIDE, n) for n in (1, 2, 3, 5)},
    **{f"square {n}": family(SQUARE, n) for n in (1, 2, 3, 5)},
    "more models than directions": family((30, 4), 6),
    "low rank": family(SQUARE, 3, rank=3),
    "low rank tall": family(TALL, 3, rank=2),
    "one is the base": [*family(WIDE, 2), np.zeros(WIDE, np.float32)],
    "all are the base": [np.zeros(TALL, np.float32)] * 3,
    "copies": family(SQUARE, 1) * 3,
}
every_case = pytest.mark.parametrize("deltas", CASES.values(), ids=list(CASES))


def run(m: Method, deltas: Sequence[Array], **parameters: Any) -> Array:
    bound = m.bind(len(deltas), {k.rstrip("_"): v for k, v in parameters.items()})
    out = m.function([torch.from_numpy(d) for d in deltas], **bound)
    assert out.dtype == torch.from_numpy(deltas[0]).dtype
    return np.asarray(out.double())


def wide(deltas: Sequence[Array]) -> list[Array]:
    return [d.astype(np.float64) for d in deltas]


SETTINGS: dict[str, list[dict[str, Any]]] = {
    "tsv": [{}, {"lambda_": 0.7}],
    "iso_c": [{}, {"lambda_": 1.3}],
    "iso_cts": [{}, {"common_space_fraction": 0.5, "lambda_": 1.3}, {"common_space_fraction": 0.0}],
    "cart": [{}, {"rank": 0.25, "lambda_": 2.0}],
    "wudi": [{}, {"ridge": 1e-2, "lambda_": 0.7}],
    "knots": [{}, {"density": 0.4, "lambda_": 0.7}, {"normalize": False}],
}


@every_method
@every_case
def test_a_merge_is_the_formula_to_six_digits(m: Method, deltas: Sequence[Array]) -> None:
    for parameters in SETTINGS[m.name]:
        exact = FORMULAS[m.name](wide(deltas), **parameters)
        off = float(np.linalg.norm(run(m, deltas, **parameters) - exact))
        assert off <= 1e-6 * float(np.linalg.norm(exact)), parameters


@every_method
@pytest.mark.parametrize("count", [1, 2])
def test_digits_are_lost_as_singular_values_come_close_to_zero(m: Method, count: int) -> None:
    """A direction of float32 numbers is known to 2^-24 s_1 / s_i, here to 6e-4 for the last.

    What flattens or whitens raises it to the size of the others.
    """
    deltas = family(SQUARE, count, spectrum=np.geomspace(1, 1e-4, 24))
    exact = FORMULAS[m.name](wide(deltas))
    off = float(np.linalg.norm(run(m, deltas) - exact))
    assert off <= 2**-24 * 1e4 * float(np.linalg.norm(exact))


@every_method
@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE], ids=str)
def test_float64_models_are_merged_in_float64(m: Method, shape: tuple[int, int]) -> None:
    deltas = wide(family(shape, 3))
    exact = FORMULAS[m.name](deltas)
    np.testing.assert_allclose(run(m, deltas), exact, rtol=0, atol=1e-8 * np.linalg.norm(exact))


@every_method
@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_half_precision_is_the_formula_rounded_once(m: Method, dtype: str, bits: int) -> None:
    stored = getattr(torch, dtype)
    base = torch.from_numpy(family(WIDE, 1, seed=9)[0]).to(stored)
    tuned = [base + 0.1 * torch.from_numpy(d).to(stored) for d in family(WIDE, 3)]
    merged = getattr(merge, m.name)([{"w": t} for t in tuned], base={"w": base}).state_dict()["w"]
    deltas = [np.asarray(t.double() - base.double()) for t in tuned]
    exact = np.asarray(base.double()) + FORMULAS[m.name](deltas)
    assert merged.dtype == stored
    half_a_unit = 2.0 ** (np.frexp(exact)[1] - bits - 1)
    assert np.all(np.abs(np.asarray(merged.double()) - exact) <= 1.001 * half_a_unit + 2**-20)


@every_method
def test_what_is_no_matrix_is_averaged(m: Method) -> None:
    """Vectors, kernels, scalars, single rows, and vocabularies, whose rows are tokens."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"v": (6,), "kernel": (4, 3, 2, 2), "scalar": (), "row": (1, 4), "vocabulary": (90, 8)}
    base = {n: torch.randn(s, generator=draw) for n, s in shapes.items()}
    models = [{n: torch.randn(s, generator=draw) for n, s in shapes.items()} for _ in range(3)]
    merged = getattr(merge, m.name)(models, base=base).state_dict()
    average = {n: torch.stack([x[n] for x in models]).mean(dim=0) for n in shapes}
    torch.testing.assert_close(merged, average, rtol=0, atol=1e-6)


@every_method
@pytest.mark.parametrize("deltas", [family(TALL, 4), family(WIDE, 4)], ids=["tall", "wide"])
def test_the_order_of_models_does_not_matter_to_matrices(
    m: Method, deltas: Sequence[Array]
) -> None:
    straight, reversed_ = run(m, deltas), run(m, deltas[::-1])
    np.testing.assert_allclose(reversed_, straight, rtol=0, atol=1e-5 * np.linalg.norm(straight))


# -- what each method is for ---------------------------------------------------------------------


def close(a: Array, b: Array, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, float(np.linalg.norm(b))))


def test_tasks_in_orthogonal_subspaces_are_simply_added_by_tsv() -> None:
    x = family((24, 30), 1)[0].astype(np.float64)
    u, s, v = svd(x)
    deltas = [(u[:, i::3] * s[i::3] @ v[:, i::3].T).astype(np.float32) for i in range(3)]
    close(run(methods.get("tsv"), deltas), x)


def test_one_model_is_given_back_by_tsv_wudi_cart_and_knots() -> None:
    (delta,) = family(TALL, 1)
    for name in ("tsv", "wudi", "cart", "knots"):
        close(run(methods.get(name), [delta]), delta)


@pytest.mark.parametrize("rank", [None, 3])
def test_iso_c_keeps_the_directions_of_the_sum_and_makes_their_sizes_equal(
    rank: int | None,
) -> None:
    deltas = family(WIDE, 2, rank)
    u, s, v = svd(np.sum(wide(deltas), axis=0))
    close(run(methods.get("iso_c"), deltas), np.mean(s) * u @ v.T)
    sizes = np.linalg.svd(run(methods.get("iso_c"), deltas), compute_uv=False)
    assert sizes[: len(s)] == pytest.approx(np.mean(s), rel=1e-5)
    assert sizes[len(s) :] == pytest.approx(0.0, abs=1e-6)


def test_iso_cts_has_full_rank_and_one_singular_value() -> None:
    sizes = np.linalg.svd(run(methods.get("iso_cts"), family(TALL, 3)), compute_uv=False)
    assert sizes == pytest.approx(sizes[0], rel=1e-5)
    assert sizes[0] > 0.1


def test_iso_cts_of_common_space_alone_is_iso_c() -> None:
    deltas = family(SQUARE, 3)
    cts = run(methods.get("iso_cts"), deltas, common_space_fraction=1.0)
    close(cts, run(methods.get("iso_c"), deltas))


def test_deviations_of_full_rank_cancel_in_cart() -> None:
    deltas = family(SQUARE, 3)
    close(run(methods.get("cart"), deltas, rank=1.0), np.mean(wide(deltas), axis=0))


def test_copies_of_one_model_are_given_back_by_cart() -> None:
    (delta,) = family(SQUARE, 1)
    close(run(methods.get("cart"), [delta] * 3, rank=0.3, lambda_=2.0), delta)


def interference(t: torch.Tensor, d: Sequence[torch.Tensor]) -> torch.Tensor:
    """The loss of WUDI as the paper states it."""
    return torch.stack([((t - x) @ x.T).square().sum() / x.square().sum() for x in d]).sum()


def test_interference_has_no_slope_where_wudi_ends() -> None:
    deltas = [torch.from_numpy(d).double() for d in family(SQUARE, 3)]

    def slope(at: torch.Tensor) -> float:
        at = at.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(interference(at, deltas), at)
        return float(gradient.norm())

    start = torch.stack(deltas).sum(dim=0)
    end = methods.get("wudi").function(deltas, ridge=1e-10, lambda_=1.0)
    assert slope(end) <= 1e-7 * slope(start)


def test_wudi_is_where_gradient_descent_from_the_sum_ends() -> None:
    """Also on inputs that no model uses, where the loss is flat: there both stay at the sum."""
    deltas = [torch.from_numpy(d).double() for d in family((3, 9), 2)]
    at = torch.stack(deltas).sum(dim=0).requires_grad_()
    descent = torch.optim.LBFGS([at], max_iter=500, tolerance_grad=1e-14, tolerance_change=0)

    def loss() -> torch.Tensor:
        descent.zero_grad()
        value = interference(at, deltas)
        value.backward()
        return value

    descent.step(loss)
    end = methods.get("wudi").function(deltas, ridge=1e-10, lambda_=1.0)
    close(np.asarray(end), np.asarray(at.detach()))


@pytest.mark.parametrize("normalize", [True, False])
def test_knots_without_ties_is_the_weighted_sum(normalize: bool) -> None:
    base, *models = ({"w": torch.from_numpy(d)} for d in family(TALL, 4))
    given = {"base": base, "weight": [0.5, 1.0, 2.0], "normalize": normalize}
    linear = merge.knots(models, inner="linear", **given).state_dict()
    torch.testing.assert_close(linear, merge.task_arithmetic(models, **given).state_dict())
    w = np.array(given["weight"])
    deltas = [np.asarray(m["w"].double() - base["w"].double()) for m in models]
    exact = knots(deltas, inner="linear", weight=w, normalize=normalize)
    close(np.asarray(linear["w"].double() - base["w"].double()), exact)


def test_knots_knows_two_ways_to_merge() -> None:
    base, *models = ({"w": torch.from_numpy(d)} for d in family(TALL, 3))
    with pytest.raises(merge.RecipeError, match="'inner' names no way to merge") as caught:
        merge.knots(models, base=base, inner="dare")
    assert caught.value.expected == "ties or linear"


# -- the decompositions at the size of a real layer ----------------------------------------------


@pytest.mark.parametrize("shape", [(768, 3072), (3072, 768)], ids=str)
def test_a_layer_of_real_size_is_decomposed_as_by_an_svd(shape: tuple[int, int]) -> None:
    a = torch.from_numpy(family(shape, 1)[0])
    u, s, v = thin_svd(a)
    exact = torch.linalg.svd(a.double(), full_matrices=False)
    torch.testing.assert_close(s.double(), exact.S, rtol=1e-6, atol=0)
    one = torch.eye(768)
    for factor in (u, v):
        torch.testing.assert_close(factor.T @ factor, one, rtol=0, atol=1e-5)
    torch.testing.assert_close((u * s) @ v.T, a, rtol=0, atol=1e-6 * float(s[0]))
    tall = a if shape[0] > shape[1] else a.T
    nearest = exact.U @ exact.Vh
    nearest = nearest if shape[0] > shape[1] else nearest.T
    torch.testing.assert_close(polar(tall).double(), nearest, rtol=0, atol=1e-6)


def test_tsv_where_the_rank_does_not_divide_among_the_models() -> None:
    deltas = family((10, 7), 3)  # two directions of each, one of the seven left over
    close(run(methods.get("tsv"), deltas), tsv(wide(deltas)))
