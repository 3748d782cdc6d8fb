"""Methods that choose among differences element by element, against their formulas in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import merge
from merge.methods.core.order import Extent, extents, kth_largest
from tests.test_numbers import Case, Family, every_dtype, load, nearness, wide

Array = NDArray[Any]

# -- the formulas ---------------------------------------------------------------------------------


def exceeds(a: Array, b: Array | float, undecided: float) -> Array:
    """a > b; where they are equal but for rounding, a is ``undecided`` times that much larger."""
    return a + undecided * 2**-20 * np.maximum(np.abs(a), np.abs(b)) > b


def ram(
    models: Sequence[Array],
    *,
    base: Array,
    epsilon: float = 1e-5,
    undecided: float = 0.0,
    **_: object,
) -> Array:
    return ramplus_tl(models, base=base, epsilon=epsilon, r=0.0, undecided=undecided)


def ramplus_tl(
    models: Sequence[Array],
    *,
    base: Array,
    epsilon: float = 1e-5,
    r: float = 0.1,
    alpha: float = 0.2,
    undecided: float = 0.0,
    **_: object,
) -> Array:
    d = np.array([w - base for w in models])
    nonzero = exceeds(np.abs(d), epsilon, undecided)
    count = nonzero.sum(axis=0)
    unique, shared = count == 1, count > 1
    out = base + (d * nonzero * shared).sum(axis=0) / np.maximum(count, 1)
    for di, changed in zip(d, nonzero, strict=True):
        rho = np.sum(changed & shared) / max(np.sum(changed & unique), epsilon)
        out = out + di * (changed & unique) * (1 + r * np.clip(rho, 0, alpha))
    return out


def magmax(
    models: Sequence[Array],
    *,
    base: Array,
    weight: Sequence[float] = (1.0, 1.0, 1.0),
    lambda_: float = 0.5,
    undecided: float = 0.0,
    **_: object,
) -> Array:
    d = [wi * (w - base) for wi, w in zip(weight, models, strict=False)]
    chosen = d[0]
    for rival in d[1:]:
        chosen = np.where(exceeds(np.abs(rival), np.abs(chosen), undecided), rival, chosen)
    return base + lambda_ * chosen


def consensus_ta(
    models: Sequence[Array],
    *,
    base: Array,
    weight: Sequence[float] = (1.0, 1.0, 1.0),
    mask_lambda: float = 0.4,
    agree: int = 2,
    lambda_: float = 1.0,
    undecided: float = 0.0,
    **_: object,
) -> Array:
    d = [w - base for w in models]
    tau = sum(wi * di for wi, di in zip(weight, d, strict=False))
    masks = [exceeds(np.abs(di), mask_lambda * np.abs(tau - di), undecided) for di in d]
    return base + lambda_ * tau * (np.sum(masks, axis=0) >= agree)


def pcb(
    models: Sequence[Array],
    *,
    base: Array,
    density: float = 0.1,
    lambda_: float = 1.0,
    **_: object,
) -> Array:
    d = np.array([(w - base).reshape(-1) for w in models])
    keep = max(1, int(density * d.shape[1]))
    weights = []
    for di in d:
        intra = np.exp(len(d) * unit(np.abs(di)) ** 2)
        score = intra * np.tanh(di * d.sum(axis=0))
        cut = np.sort(score)[-keep]
        weights.append(unit(np.maximum(score, cut)) if score.max() > cut else (score == cut) * 1.0)
    total = np.sum(weights, axis=0)
    mean = np.sum(weights * d, axis=0) / np.where(total == 0, 1, total)
    return base + lambda_ * mean.reshape(base.shape)


def unit(x: Array) -> Array:
    """From 0 at the least to 1 at the largest."""
    return (x - x.min()) / (x.max() - x.min()) if x.max() > x.min() else x * 0


FORMULAS: dict[str, Callable[..., Array]] = {
    f.__name__: f for f in (ram, ramplus_tl, magmax, consensus_ta, pcb)
}

WEIGHT = [0.9, 0.5, 1.2]
PCB = [Case("pcb"), Case("pcb", {"density": 0.4, "lambda_": 1.2}), Case("pcb", {"density": 0.97})]
CASES = [
    Case("ram"),
    Case("ram", {"epsilon": 0.03}),
    Case("ramplus_tl", {"epsilon": 0.03}),
    Case("ramplus_tl", {"epsilon": 0.05, "r": 0.5, "alpha": 0.3}),
    Case("magmax"),
    Case("magmax", {"weight": WEIGHT, "lambda_": 1.0}),
    Case("consensus_ta"),
    Case("consensus_ta", {"weight": WEIGHT, "mask_lambda": 0.9, "lambda_": 0.7}),
    Case("consensus_ta", {"agree": 3, "mask_lambda": 0.2}),
    Case("consensus_ta", {"agree": 0}),
]

# -- near to the truth ---------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_tiny_llama_is_merged_by_the_formula(case: Case, dtype: str, llamas: Family) -> None:
    base, *tuned = llamas(dtype)
    merged = case.lazy(base, tuned).state_dict()
    nearness(case, dtype, merged, [load(folder) for folder in (base, *tuned)]).check()


@pytest.mark.parametrize("case", [*CASES, *PCB], ids=str)
def test_float64_models_are_merged_by_the_formula_almost_exactly(case: Case) -> None:
    draw = torch.Generator().manual_seed(9)
    shapes = {"matrix": (900, 700), "vector": (50,), "kernel": (8, 4, 3, 3), "one": (1,)}
    base, *models = (
        {n: 0.05 * torch.randn(s, generator=draw, dtype=torch.float64) for n, s in shapes.items()}
        for _ in range(4)
    )
    for name, tensor in case.lazy(base, models).state_dict().items():
        exact = case.exact(name, base[name].numpy(), [m[name].numpy() for m in models])
        np.testing.assert_allclose(tensor.numpy(), exact, rtol=1e-9, atol=1e-12)


@every_dtype
@pytest.mark.parametrize("case", PCB, ids=str)
def test_pcb_of_a_tiny_llama_follows_the_formula(case: Case, dtype: str, llamas: Family) -> None:
    """The weight of an element that barely competes is a small difference, and so less exact."""
    base, *tuned = llamas(dtype)
    states = [load(folder) for folder in (base, *tuned)]
    allowed = {"float32": 1e-5, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    for name, tensor in case.lazy(base, tuned).state_dict().items():
        exact = case.exact(name, *[wide(states[0][name]), [wide(s[name]) for s in states[1:]]])
        off, scale = np.abs(wide(tensor) - exact), np.abs(exact).max()
        assert np.mean(off > allowed * scale) < 0.001
        assert np.sqrt(np.mean(off**2)) < allowed * scale


# -- what the formulas promise -------------------------------------------------------------------


def merged(method: str, *deltas: Sequence[float], **parameters: Any) -> list[float]:
    """The difference to a base of ones that a merge of differences makes."""
    base = torch.ones(len(deltas[0]), dtype=torch.float64)
    models = [{"w": base + torch.tensor(d, dtype=torch.float64)} for d in deltas]
    lazy = getattr(merge, method)(models, base={"w": base}, **parameters)
    values: list[float] = (lazy.state_dict()["w"] - base).tolist()
    return values


@pytest.mark.parametrize(
    ("method", "parameters", "out"),
    [
        ("ram", {}, [2.0, 3.0, 0.0, -4.0]),
        ("ram", {"epsilon": 2.5}, [3.0, 3.0, 0.0, -4.0]),
        ("ramplus_tl", {}, [2.0, 3.0 * 1.02, 0.0, -4.0 * 1.02]),
        ("ramplus_tl", {"r": 0.5, "alpha": 9.0}, [2.0, 3.0 * 1.5, 0.0, -4.0 * 1.5]),
        ("ramplus_tl", {"r": 0.0}, [2.0, 3.0, 0.0, -4.0]),
        ("magmax", {}, [1.5, 1.5, 0.0, -2.0]),
        ("magmax", {"weight": [4.0, 1.0], "lambda_": 1.0}, [4.0, 12.0, 0.0, -4.0]),
        ("consensus_ta", {}, [0.0, 0.0, 0.0, 0.0]),
        ("consensus_ta", {"mask_lambda": 0.3}, [4.0, 0.0, 0.0, 0.0]),
        ("consensus_ta", {"agree": 1, "lambda_": 0.5}, [2.0, 1.5, 0.0, -2.0]),
    ],
    ids=str,
)
def test_two_models_by_hand(method: str, parameters: dict[str, Any], out: list[float]) -> None:
    """Differences that share their first element, and have one each of their own."""
    values = merged(method, [1.0, 3.0, 0.0, 0.0], [3.0, 0.0, 0.0, -4.0], **parameters)
    assert values == pytest.approx(out)


def test_magmax_gives_a_tie_to_the_first_model() -> None:
    assert merged("magmax", [2.0, -1.0], [-2.0, 1.0], lambda_=1.0) == [2.0, -1.0]


def test_consensus_ta_keeps_the_sum_whole_or_not_at_all() -> None:
    draw = np.random.default_rng(2)
    deltas = draw.integers(-8, 9, size=(3, 400)) / 8
    out = np.array(merged("consensus_ta", *deltas.tolist()))
    total = deltas.sum(axis=0)
    masks = np.abs(deltas) > 0.4 * np.abs(total - deltas)
    kept = masks.sum(axis=0) >= 2
    np.testing.assert_array_equal(out, np.where(kept, total, 0.0))
    assert 0 < kept.sum() < 400


def test_consensus_ta_of_more_models_than_there_are_is_refused() -> None:
    with pytest.raises(merge.RecipeError, match="more models must agree") as caught:
        merged("consensus_ta", [1.0], [2.0], agree=3)
    assert caught.value.expected == "at most 2"


def test_pcb_of_one_model_keeps_its_largest_differences_whole() -> None:
    values = merged("pcb", [0.1, -0.9, 0.5, 0.2, -0.7, 0.0], density=0.5)
    assert values == pytest.approx([0, -0.9, 0, 0, -0.7, 0])  # the third largest has weight 0


def test_pcb_keeps_no_element_that_opposes_the_sum() -> None:
    values = merged("pcb", [1.0, 1.0, 1.0, -0.1], [1.0, 0.5, -0.2, 2.0], density=0.5)
    assert values[2] == pytest.approx(0.0)
    assert values[3] == pytest.approx(2.0)


# -- the k-th largest of values of either sign ---------------------------------------------------


class Values:
    """Operands in memory, in tiles of 7."""

    grain, allowance, draw = 1, 1 << 20, None

    def __init__(self, *operands: torch.Tensor) -> None:
        self.operands, self.count, self.numel = operands, len(operands), operands[0].numel()

    def __call__(self, spans: Any = None) -> Any:
        tiles = [(at, at + 7) for at in range(0, self.numel, 7)] if spans is None else spans
        return ((start, [x[start:stop] for x in self.operands]) for start, stop in tiles)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_kth_largest_is_exact_whatever_its_sign(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(1)
    operands = [
        torch.randn(60, generator=draw, dtype=dtype),
        torch.randn(60, generator=draw, dtype=dtype).clamp(min=0.0),
        -torch.rand(60, generator=draw, dtype=dtype),
        torch.randint(-2, 3, (60,), generator=draw).to(dtype),
    ]
    tiles: Any = Values(*operands)
    found = extents(tiles)
    assert found[0] == Extent(
        operands[0].min().item(), operands[0].max().item(), int((operands[0] > 0).sum())
    )
    for k in range(1, 61):
        wanted = [x.sort(descending=True).values[k - 1].item() for x in operands]
        assert kth_largest(tiles, k, found) == wanted
