"""Methods that select by rank, chance or variance: their formulas in float64, counts and odds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

import merge
from merge import run
from merge.ir.checkpoint import Checkpoint
from merge.methods.core.bands import band, bands
from merge.methods.core.masks import Stream
from merge.methods.core.ranks import Drop, drop_by_rank, measure_drop, relative_ranks
from merge.methods.core.shapes import row_length
from tests.test_numbers import Array, Family, Nearness, elected_sum, load, plain_sum, wide
from tests.test_selection import InMemory

State = dict[str, torch.Tensor]
law = settings(max_examples=60, deadline=None)

# -- the formulas --------------------------------------------------------------------------------


def breadcrumbs(models: Sequence[Array], *, base: Array, **rest: Any) -> Array:
    return base + plain_sum(crumbs([w - base for w in models], **rest), **rest)


def breadcrumbs_ties(models: Sequence[Array], *, base: Array, **rest: Any) -> Array:
    return base + elected_sum(crumbs([w - base for w in models], **rest), **rest)


def della(models: Sequence[Array], *, base: Array, **rest: Any) -> Array:
    rest = {"normalize": True, **rest}
    return base + elected_sum(thinned_by_rank([w - base for w in models], **rest), **rest)


def della_linear(models: Sequence[Array], *, base: Array, **rest: Any) -> Array:
    return base + plain_sum(thinned_by_rank([w - base for w in models], **rest), **rest)


def sce(
    models: Sequence[Array], *, base: Array, select_topk: float = 1.0, undecided: float, **_: Any
) -> Array:
    d = np.array([w - base for w in models])
    if select_topk < 1.0:
        apart = sum((x - y) ** 2 for x in d for y in d)  # 2 n^2 times the variance, without a mean
        k = int(select_topk * np.count_nonzero(apart))
        d = d * (places_from_top(apart) < k)
    squares = np.array([np.sum(x**2) for x in d])
    weight = squares / squares.sum() if squares.sum() > 0 else np.full(len(d), 1 / len(d))
    votes = d.sum(axis=0)
    close = np.abs(votes) <= 2**-20 * np.abs(d).sum(axis=0)
    agrees = np.sign(d) == np.where(close, undecided, np.sign(votes))
    share = np.tensordot(weight, agrees, axes=1)
    total = np.tensordot(weight, d * agrees, axes=1)
    return base + np.divide(total, share, out=np.zeros_like(total), where=share > 0)


def arcee_fusion(models: Sequence[Array], *, base: Array, undecided: float, **_: Any) -> Array:
    """``undecided``: whether importances at the threshold count as above (+1) or below (-1)."""
    [tuned] = models
    rows = base.size // row_length(base.shape)
    q, p = (np.exp(x.reshape(rows, -1)) for x in (base, tuned))
    q, p = (x / x.sum(axis=1, keepdims=True) + 1e-8 for x in (q, p))
    divergence = np.sum(p * np.log(p / q), axis=1, keepdims=True)
    importance = (np.abs(tuned - base).reshape(rows, -1) * divergence).reshape(base.shape)
    ordered = np.sort(importance, axis=None)
    q1, q2, q3 = (ordered[int(quantile * (base.size - 1))] for quantile in (0.25, 0.5, 0.75))
    threshold = q2 + 1.5 * (q3 - q1)
    return np.where(importance >= threshold * (1 - undecided * 2**-18), tuned, base)


FORMULAS: dict[str, Callable[..., Array]] = {
    f.__name__: f for f in (breadcrumbs, breadcrumbs_ties, della, della_linear, sce, arcee_fusion)
}


def places_from_top(x: Array) -> Array:
    """The place of each magnitude, from 0 for the largest; of equal ones the first is first."""
    order = np.argsort(-np.abs(x), axis=None, kind="stable")
    places = np.empty(x.size, dtype=np.int64)
    places[order] = np.arange(x.size)
    return places.reshape(x.shape)


def crumbs(
    d: Sequence[Array],
    *,
    density: float = 1.0,
    gamma: float = 0.01,
    rescale: bool = False,
    **_: object,
) -> list[Array]:
    """Each delta without its outliers and its smallest elements."""
    n = d[0].size
    keep, top = int(density * n), int(gamma * n)
    bottom = n - keep - top
    if bottom < 0:
        top, bottom = top + bottom, 0
    masks = [(n - 1 - places_from_top(x) >= bottom) & (places_from_top(x) >= top) for x in d]
    return restored(d, masks, rescale=rescale)


def thinned_by_rank(
    d: Sequence[Array],
    *,
    density: float = 1.0,
    epsilon: float = 0.15,
    draw: Callable[[int, Array], Array],
    rescale: bool = True,
    **_: object,
) -> list[Array]:
    """Random elements of each delta, the larger in their row the likelier."""
    if density == 1.0:
        return list(d)
    odds = [np.clip(density - epsilon + 2 * epsilon * ranks_in_rows(x), 0, 1) for x in d]
    return restored(d, [draw(i, p) for i, p in enumerate(odds)], rescale=rescale)


def ranks_in_rows(x: Array) -> Array:
    """From 0 to 1 within each row, by the eight leading digits of the magnitudes."""
    fraction, exponent = np.frexp(np.abs(x).reshape(-1, row_length(x.shape)))
    short = np.ldexp(np.floor(fraction * 256), exponent)
    n = short.shape[1]
    ranks = stats.rankdata(short, axis=1) - 1
    return (ranks / (n - 1) if n > 1 else np.full(short.shape, 0.5)).reshape(x.shape)


def restored(d: Sequence[Array], masks: Sequence[Array], *, rescale: bool) -> list[Array]:
    """The masked deltas, scaled to the L1 norms that they had."""
    return [
        x * m * (np.abs(x).sum() / np.abs(x * m).sum() if rescale and np.any(x * m) else 1)
        for x, m in zip(d, masks, strict=True)
    ]


# -- as near to the formula as the storage type allows -------------------------------------------


@dataclass(frozen=True)
class Case:
    """A method with parameters. gain: by how much errors of the inputs may grow."""

    formula: Callable[..., Array]
    parameters: dict[str, Any] = field(default_factory=dict)
    gain: float = 1.0

    def __str__(self) -> str:
        words = [f"{k}={v}" for k, v in self.parameters.items() if k != "weight"]
        return " ".join([self.formula.__name__, *words])

    def lazy(self, base: object, models: Sequence[object]) -> Checkpoint:
        function = getattr(merge, self.formula.__name__)
        lazy = function(self.used(models), base=base, seed=5, **self.parameters)
        assert isinstance(lazy, Checkpoint)
        return lazy

    def used(self, models: Sequence[Any]) -> list[Any]:
        return list(models[:1] if self.formula is arcee_fusion else models)

    def truths(self, name: str, base: Array, models: Sequence[Array]) -> list[Array]:
        """The outcomes of the formula, one for each way to take what hangs on rounding."""

        def draw(operand: int, p: Array) -> Array:
            stream = Stream(5, self.formula.__name__, name)
            return stream.keep_each(operand, 0, torch.tensor(p)).numpy()

        return [
            self.formula(self.used(models), base=base, draw=draw, undecided=sign, **self.parameters)
            for sign in (1.0, -1.0)
        ]


WEIGHT = [0.3, 0.5, -0.2]
CASES = [
    Case(breadcrumbs, {"weight": WEIGHT, "density": 0.6, "gamma": 0.05, "lambda_": 0.7}),
    Case(breadcrumbs, {"weight": WEIGHT, "density": 0.9, "gamma": 0.3, "normalize": True}),
    Case(breadcrumbs, {"weight": WEIGHT, "density": 0.4, "gamma": 0.001, "rescale": True}, 2.5),
    Case(breadcrumbs, {"weight": WEIGHT, "gamma": 0.5}),
    Case(breadcrumbs_ties, {"weight": WEIGHT, "density": 0.6, "gamma": 0.05}),
    Case(breadcrumbs_ties, {"weight": WEIGHT, "density": 0.7, "normalize": True}, 5.0),
    Case(breadcrumbs_ties, {"weight": WEIGHT, "density": 0.4, "rescale": True}, 2.5),
    Case(della, {"weight": WEIGHT, "density": 0.5}, 12.0),
    Case(della, {"weight": WEIGHT, "density": 0.9, "epsilon": 0.3, "rescale": False}, 5.0),
    Case(della, {"weight": WEIGHT, "density": 0.4, "normalize": False, "lambda_": 0.7}, 2.5),
    Case(della, {"weight": WEIGHT}, 5.0),
    Case(della_linear, {"weight": WEIGHT, "density": 0.5, "epsilon": 0.1}, 2.5),
    Case(della_linear, {"weight": WEIGHT, "density": 0.5, "epsilon": 0.5, "normalize": True}, 4.0),
    Case(sce),
    Case(sce, {"select_topk": 0.3}),
    Case(sce, {"select_topk": 0.0}),
    Case(arcee_fusion),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])


def nearness(
    case: Case, dtype: str, merged: Mapping[str, torch.Tensor], inputs: Sequence[State]
) -> Nearness:
    found = Nearness(dtype)
    for name, tensor in merged.items():
        base, *models = (wide(state[name]) for state in inputs)
        scale = case.gain * np.sum(np.abs([base, *models]), axis=0)
        found.add(name, wide(tensor), case.truths(name, base, models), scale)
    return found


@every_dtype
@every_case
def test_a_tiny_llama_is_merged_by_the_formula(case: Case, dtype: str, llamas: Family) -> None:
    base, *tuned = llamas(dtype)
    merged = case.lazy(base, tuned).state_dict()
    nearness(case, dtype, merged, [load(folder) for folder in (base, *tuned)]).check()


SHAPES = {
    "matrix": (130, 257),
    "long rows": (3, 5001),
    "vector": (999,),
    "column": (37, 1),
    "kernel": (8, 16, 3, 3),
    "experts": (3, 40, 65),
    "one": (1,),
    "two": (2,),
    "four": (1, 4),
    "scalar": (),
}


def family(dtype: torch.dtype, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> list[State]:
    """A base and three fine-tunes of it."""
    draw = torch.Generator().manual_seed(22)
    base = {name: 0.05 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    tuned = [
        {n: t + size * torch.randn(t.shape, generator=draw) for n, t in base.items()}
        for size in (2e-3, 1e-3, 5e-4)
    ]
    return [{n: t.to(dtype) for n, t in state.items()} for state in (base, *tuned)]


@every_dtype
@every_case
def test_tensors_of_odd_shapes_are_merged_by_the_formula(case: Case, dtype: str) -> None:
    base, *tuned = family(getattr(torch, dtype))
    merged = case.lazy(base, tuned).state_dict()
    nearness(case, dtype, merged, [base, *tuned]).check()


@every_case
def test_float64_stays_float64(case: Case) -> None:
    base, *tuned = family(torch.float64)
    for name, tensor in case.lazy(base, tuned).state_dict().items():
        truths = case.truths(name, wide(base[name]), [wide(m[name]) for m in tuned])
        off = np.min([np.abs(wide(tensor) - truth) for truth in truths], axis=0)
        assert tensor.dtype == torch.float64
        assert (off <= 1e-13).all()


# -- breadcrumbs: which ranks stay ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("density", "gamma", "kept"),
    [
        (0.5, 0.1, [4, 5, 6, 7, 8]),  # the largest goes, then five stay
        (0.5, 0.0, [5, 6, 7, 8, 9]),
        (0.5, 0.099, [5, 6, 7, 8, 9]),  # gamma N under 1: no outlier goes
        (0.9, 0.3, [0, 1, 2, 3, 4, 5, 6, 7, 8]),  # no room for three outliers: one goes
        (1.0, 0.5, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),  # a density of 1 leaves all
        (0.3, 1.0, [0, 1, 2]),
        (0.05, 0.1, []),
        (0.0, 0.1, []),
    ],
)
def test_breadcrumbs_of_ten_elements(density: float, gamma: float, kept: list[int]) -> None:
    delta = torch.tensor([3.0, -9.0, 1.0, 0.5, -7.0, 8.0, 2.0, -4.0, 6.0, -5.0])
    [found], factors = bands(InMemory([delta]), density=[density], gamma=[gamma])
    ascending = delta.abs().sort().values
    left = band(delta, found, 0)
    assert sorted(left.abs()[left != 0].tolist()) == ascending[kept].tolist()
    assert (left == delta)[left != 0].all()
    assert factors == [1.0]


def test_of_equal_magnitudes_the_first_are_the_outliers() -> None:
    delta = torch.tensor([1.0, -2.0, 2.0, -2.0, 2.0, 0.5])
    [found], _ = bands(InMemory([delta], tile=2), density=[0.34], gamma=[0.34])
    parts = [band(delta[at : at + 2], found, at) for at in (0, 2, 4)]
    assert torch.cat(parts).tolist() == [0.0, 0.0, 0.0, -2.0, 2.0, 0.0]


@law
@given(
    x=arrays.arrays(np.float32, st.integers(1, 200), elements=st.integers(1, 9).map(float)),
    density=st.floats(0.0, 0.999),
    gamma=st.floats(0.0, 1.0),
)
def test_exactly_the_stated_number_of_crumbs_stays(x: Array, density: float, gamma: float) -> None:
    delta = torch.from_numpy(x)
    [found], _ = bands(InMemory([delta]), density=[density], gamma=[gamma])
    assert int(torch.count_nonzero(band(delta, found, 0))) == int(density * x.size)


# -- della: ranks and odds -----------------------------------------------------------------------


def as_rows(*rows: Sequence[float]) -> torch.Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("row", "ranks"),
    [
        ([3.0, -1.0, 2.0], [1.0, 0.0, 0.5]),
        ([1.0, -1.0, 4.0, 2.0, 1.0], [0.25, 0.25, 1.0, 0.75, 0.25]),  # ties share the mean of 0..2
        ([0.0, 0.0, 0.0], [0.5, 0.5, 0.5]),
        ([-7.0], [0.5]),
        ([1e-45, 0.0, 3e-45], [0.5, 0.5, 0.5]),  # too small for digits: all alike
        ([1e-39, 2e-39], [0.0, 1.0]),
        ([1e-9, 1e-8, 1.0], [0.25, 0.25, 1.0]),  # 16 binades below the largest: alike
        ([1.0, 1.001, 1.01], [0.25, 0.25, 1.0]),  # alike in eight digits
        ([3e38, -3.4e38], [0.0, 1.0]),
    ],
)
def test_ranks_of_a_row_by_hand(row: list[float], ranks: list[float]) -> None:
    assert relative_ranks(as_rows(row)).tolist() == [ranks]


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_ranks_of_float64_reach_beyond_single_precision(scale: float) -> None:
    row = scale * torch.tensor([[3.0, -1.0, 2.0]], dtype=torch.float64)
    assert relative_ranks(row).tolist() == [[1.0, 0.0, 0.5]]


@pytest.mark.parametrize("shape", [(1, 100_000), (50, 300), (700, 64), (900, 3)], ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
def test_ranks_are_those_of_a_sort_row_by_row(shape: tuple[int, int], kind: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).abs_().add_(1e-3)
    x = x.bfloat16().to(kind)
    found = relative_ranks(x)
    np.testing.assert_allclose(found, ranks_in_rows(wide(x)), rtol=0, atol=2e-7)
    assert found.double().mean().item() == pytest.approx(0.5, abs=1e-6)
    assert torch.equal(torch.cat([relative_ranks(row[None]) for row in x[:20]]), found[:20])


M = Stream(0, "della", "w")
UNKNOWN = Drop([1.0, 1.0], {})  # masks are then drawn


@law
@given(
    cuts=st.lists(st.integers(0, 500), max_size=5),
    start=st.sampled_from([0, 1, 12345, 2**32 - 250, 2**33 - 250]),
)
def test_masks_of_many_probabilities_do_not_depend_on_where_tiles_are_cut(
    cuts: list[int], start: int
) -> None:
    p = torch.rand(500, generator=torch.Generator().manual_seed(4))
    ends = [0, *sorted(cuts), 500]
    parts = [M.keep_each(1, start + a, p[a:b]) for a, b in itertools.pairwise(ends)]
    assert torch.equal(torch.cat(parts), M.keep_each(1, start, p))


@pytest.mark.parametrize("p", [1 / 64, 0.3, 0.5, 63 / 64])
def test_one_probability_for_each_is_as_one_for_all(p: float) -> None:
    like = torch.full((10, 100), p)
    assert torch.equal(M.keep_each(2, 7, like), M.keep(2, 7, like, p))


def test_probabilities_0_and_1_are_certain() -> None:
    p = torch.tensor([0.0, 1.0]).repeat(50_000)
    assert torch.equal(M.keep_each(0, 0, p), p)


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.3, 0.3), (0.9, 0.25)])
def test_the_odds_to_be_kept_rise_with_the_rank(density: float, epsilon: float) -> None:
    x = torch.randn(512, 1000, generator=torch.Generator().manual_seed(5))
    [left] = drop_by_rank([x], [density], [epsilon], measured=UNKNOWN, start=0, draw=M)
    kept = (left != 0).numpy().reshape(-1)
    ranks = relative_ranks(x).double().numpy().reshape(-1)
    p = np.clip(density - epsilon + 2 * epsilon * ranks, 0, 1)
    buckets = np.minimum((10 * ranks).astype(int), 9)
    for bucket in range(10):
        here = buckets == bucket
        sigma = np.sqrt(np.sum(p[here] * (1 - p[here])))
        assert abs(kept[here].sum() - p[here].sum()) <= 5 * sigma
    assert torch.equal(left[left != 0], x[left != 0])


def test_the_density_is_the_expected_fraction_even_among_ties() -> None:
    x = torch.randint(-3, 4, (400, 1000), generator=torch.Generator().manual_seed(6)).float()
    x[x == 0] = 0.25
    [left] = drop_by_rank([x], [0.4], [0.3], measured=UNKNOWN, start=0, draw=M)
    sigma = np.sqrt(0.25 * x.numel())
    assert abs(int(torch.count_nonzero(left)) - 0.4 * x.numel()) < 5 * sigma


def test_the_ends_of_the_density_are_all_and_nothing() -> None:
    deltas = [torch.ones(2, 3), torch.ones(2, 3)]
    whole, nothing = drop_by_rank(
        deltas, [1.0, 0.0], [0.15, 0.15], measured=UNKNOWN, start=0, draw=M
    )
    assert torch.equal(whole, deltas[0])
    assert not nothing.any()
    given_ = {"density": [1.0, 0.0], "epsilon": [0.15, 0.15]}
    assert measure_drop(InMemory(deltas), **given_).factors == [1.0, 1.0]


# -- sce -----------------------------------------------------------------------------------------


def test_models_are_weighed_by_their_squares_however_small() -> None:
    base = {"w": torch.zeros(1000)}
    tuned = [{"w": torch.full((1000,), size)} for size in (5e-4, 1e-4)]
    w = np.array([25, 1]) / 26  # 0.96 and 0.04
    expected = w @ [5e-4, 1e-4]
    merged = merge.sce(tuned, base=base).state_dict()["w"]
    np.testing.assert_allclose(merged, expected, rtol=1e-6)


def test_a_model_of_hardly_any_weight_is_heard_where_it_is_alone() -> None:
    base = {"w": torch.zeros(2)}
    tuned = [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1e-5])}]
    merged = merge.sce(tuned, base=base).state_dict()["w"]
    assert merged.tolist() == pytest.approx([1.0, 1e-5], rel=1e-6)


@pytest.mark.parametrize(
    ("select_topk", "out"),
    [
        (1.0, [1.0, 2.0, 3.0, 1.0]),
        (0.99, [1.0, 0.0, 3.0, 0.0]),  # two of the three that differ
        (0.34, [0.0, 0.0, 3.0, 0.0]),
        (0.33, [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_only_positions_where_models_differ_are_selected(
    select_topk: float, out: list[float]
) -> None:
    """They differ in three of four; where their signs differ too, the heavier model has it."""
    base = {"w": torch.zeros(4)}
    tuned = [
        {"w": torch.tensor([1.0, 2.0, 3.0, 1.0])},
        {"w": torch.tensor([-0.5, 2.0, -1.0, 0.0])},
    ]
    merged = merge.sce(tuned, base=base, select_topk=select_topk).state_dict()["w"]
    assert merged.tolist() == pytest.approx(out)


def test_copies_of_one_model_differ_nowhere_whatever_rounding_does() -> None:
    base = {"w": torch.zeros(1000)}
    tuned = {"w": torch.randn(1000, generator=torch.Generator().manual_seed(8))}
    merged = merge.sce([tuned, tuned, tuned], base=base, select_topk=0.9).state_dict()["w"]
    assert not merged.any()


# -- arcee fusion --------------------------------------------------------------------------------


def test_quartiles_of_more_than_a_million_elements_are_exact() -> None:
    base, tuned, *_ = family(torch.float32, {"w": (1100, 1000)})
    merged = merge.arcee_fusion([tuned], base=base).state_dict()["w"]
    strict, lax = (
        arcee_fusion([wide(tuned["w"])], base=wide(base["w"]), undecided=sign) for sign in (-1, 1)
    )
    assert np.count_nonzero(strict != lax) <= 10
    agrees = (wide(merged) == strict) | (wide(merged) == lax)
    assert agrees.all()
    assert 0 < np.count_nonzero(strict != wide(base["w"])) < 0.2 * strict.size


def test_what_is_taken_over_is_taken_bit_for_bit() -> None:
    base, tuned, *_ = family(torch.float32)
    merged = merge.arcee_fusion([tuned], base=base).state_dict()
    for name, tensor in merged.items():
        assert ((tensor == base[name]) | (tensor == tuned[name])).all()


# -- the bytes depend on nothing else ------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if c.parameters.get("density") != 1.0], ids=str)
def test_threads_and_memory_do_not_change_a_byte(case: Case, tmp_path: Path) -> None:
    shapes = {"matrix": (1500, 1000), "rows": (3, 70_001), "vector": (33,)}
    states = family(torch.bfloat16, shapes)
    found = set()
    for number, (threads, memory) in enumerate([(1, "1GiB"), (2, "96MiB"), (3, "256MiB")]):
        base, *tuned = (merge.open(state) for state in states)
        plan = case.lazy(base, tuned).plan(threads=threads, memory=memory)
        run.save_plan(plan, tmp_path / str(number))
        [weights] = (tmp_path / str(number)).glob("*.safetensors")
        found.add(weights.read_bytes())
    assert len(found) == 1
