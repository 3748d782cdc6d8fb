"""What methods are made of: exact trimming, random masks, measuring passes, sign election."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats
from torch import Tensor

from merge.methods.core import trim as trim_module
from merge.methods.core.consensus import drop_at_random, elected, restoring_factors, summed
from merge.methods.core.masks import Stream
from merge.methods.core.measure import BLOCK, inner_products
from merge.methods.core.trim import kept_count, largest, trim

law = settings(max_examples=60, deadline=None)
FLOATS = [np.float32, np.float64]


@dataclass
class InMemory:
    """Operands in memory as `Tiles`; each tile is spoiled when the next one is asked for."""

    operands: Sequence[Tensor]
    tile: int = 4 * BLOCK
    allowance: int = 1 << 30
    grain: int = 1
    draw: Stream = field(default_factory=lambda: Stream(0, "any", "w"))

    @property
    def numel(self) -> int:
        return self.operands[0].numel()

    @property
    def count(self) -> int:
        return len(self.operands)

    def __call__(
        self, spans: Iterable[tuple[int, int]] | None = None
    ) -> Iterator[tuple[int, list[Tensor]]]:
        for start, stop in cut(self.numel, self.tile) if spans is None else spans:
            tile = [x.reshape(-1)[start:stop].clone() for x in self.operands]
            yield start, tile
            for x in tile:
                x.fill_(math.nan)


def cut(numel: int, tile: int) -> Iterator[tuple[int, int]]:
    for start in range(0, numel, tile):
        yield start, min(start + tile, numel)


# -- trimming: the k largest magnitudes ----------------------------------------------------------


def keep_largest(x: np.ndarray, k: int) -> np.ndarray:
    """``x`` with all but its k largest magnitudes zeroed; the first in order win ties."""
    order = np.argsort(-np.abs(x), kind="stable")
    out = np.zeros_like(x)
    out[order[:k]] = x[order[:k]]
    return out


def trimmed(x: np.ndarray, k: int, tile: int = 4 * BLOCK, allowance: int = 1 << 30) -> np.ndarray:
    """The same by `largest` and `trim`, tile by tile."""
    whole = torch.from_numpy(x)
    [found] = largest(InMemory([whole], tile, allowance), [(0, k)])
    parts = [trim(whole[start:stop], found, start) for start, stop in cut(x.size, tile)]
    return torch.cat(parts).numpy()


def magnitudes(kind: type) -> st.SearchStrategy[np.ndarray]:
    """Arrays of any finite numbers, and arrays of few distinct ones."""
    number = st.floats(
        allow_nan=False, allow_infinity=False, width=32 if kind is np.float32 else 64
    )
    few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -0.5])
    shape = st.integers(1, 200)
    return arrays.arrays(kind, shape, elements=number) | arrays.arrays(kind, shape, elements=few)


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("allowance", [1 << 30, 0], ids=["ample", "none"])
@law
@given(data=st.data())
def test_trimming_keeps_exactly_the_k_largest(
    kind: type, allowance: int, data: st.DataObject
) -> None:
    x = data.draw(magnitudes(kind))
    k = data.draw(st.integers(0, x.size + 1))
    tile = data.draw(st.integers(1, x.size))
    np.testing.assert_array_equal(trimmed(x, k, tile, allowance), keep_largest(x, k))


@pytest.mark.parametrize(
    ("values", "k", "kept"),
    [
        ([1.0, -3.0, 2.0], 1, [0.0, -3.0, 0.0]),
        ([1.0, -3.0, 2.0], 2, [0.0, -3.0, 2.0]),
        ([2.0, -2.0, 2.0, 1.0], 2, [2.0, -2.0, 0.0, 0.0]),
        ([1.0, 2.0, -2.0, 2.0], 1, [0.0, 2.0, 0.0, 0.0]),
        ([0.0, 0.0, 5.0], 2, [0.0, 0.0, 5.0]),
        ([1e-45, -1e-45, 0.0], 1, [1e-45, 0.0, 0.0]),
        ([3.0], 0, [0.0]),
        ([3.0], 1, [3.0]),
    ],
)
def test_among_equal_magnitudes_the_first_are_kept(
    values: list[float], k: int, kept: list[float]
) -> None:
    x = np.array(values, np.float32)
    assert trimmed(x, k, tile=2).tolist() == np.array(kept, np.float32).tolist()


Draw = Callable[[np.random.Generator, int], np.ndarray]


def draw_normal(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(size=n).astype(np.float32)


def draw_few_values(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.choice(np.array([0.0, 1e-3, -1e-3, 2e-3, 3e-3], np.float32), n)


def draw_mostly_zeros(rng: np.random.Generator, n: int) -> np.ndarray:
    return draw_normal(rng, n) * (rng.random(n) < 0.01).astype(np.float32)


def draw_bfloat16_delta(rng: np.random.Generator, n: int) -> np.ndarray:
    base = torch.from_numpy(draw_normal(rng, n))
    tuned = base + 0.01 * torch.from_numpy(draw_normal(rng, n))
    return (tuned.bfloat16().float() - base.bfloat16().float()).numpy()


def draw_one_value(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.where(rng.random(n) < 0.5, 0.25, -0.25).astype(np.float32)


def draw_rising(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.linspace(-1.0, 1.0, n, dtype=np.float32)


def where_the_sample_looks(n: int) -> np.ndarray:
    """The positions from which `largest` guesses where the threshold lies."""
    step = n // trim_module._SAMPLES
    starts = step * np.arange(trim_module._SAMPLES)
    return (starts[:, None] + np.arange(trim_module._RUN)).reshape(-1)


def draw_large_where_unseen(rng: np.random.Generator, n: int) -> np.ndarray:
    x = draw_normal(rng, n) + 100.0
    x[where_the_sample_looks(n)] *= 1e-3
    return x.astype(np.float32)


def draw_large_where_seen(rng: np.random.Generator, n: int) -> np.ndarray:
    x = draw_normal(rng, n)
    x[where_the_sample_looks(n)] += 100.0
    return x


def draw_zero_where_seen(rng: np.random.Generator, n: int) -> np.ndarray:
    x = draw_normal(rng, n)
    x[where_the_sample_looks(n)] = 0.0
    return x


DRAWS = [
    draw_normal,
    draw_few_values,
    draw_mostly_zeros,
    draw_bfloat16_delta,
    draw_one_value,
    draw_rising,
    draw_large_where_unseen,
    draw_large_where_seen,
    draw_zero_where_seen,
]
SAMPLED = 2 * trim_module._SAMPLES * trim_module._RUN  # elements; larger tensors are sampled


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("allowance", [1 << 30, 1000], ids=["ample", "small"])
@pytest.mark.parametrize("draw", DRAWS, ids=lambda d: d.__name__.removeprefix("draw_"))
def test_trimming_a_large_tensor_is_exact(draw: Draw, allowance: int, kind: type) -> None:
    n = SAMPLED + 3 * BLOCK + 17
    x: np.ndarray = draw(np.random.default_rng(1), n).astype(kind)
    order = np.argsort(-np.abs(x), kind="stable")
    counts = [int(0.2 * n), n - 1] if allowance == 1000 else [1, int(0.2 * n), int(0.97 * n)]
    operands = [torch.from_numpy(x)] * len(counts)
    found = largest(InMemory(operands, BLOCK, allowance), list(enumerate(counts)))
    for k, kept in zip(counts, found, strict=True):
        expected = np.zeros_like(x)
        expected[order[:k]] = x[order[:k]]
        np.testing.assert_array_equal(trim(torch.from_numpy(x), kept, 0).numpy(), expected)


@pytest.mark.parametrize("draw", [draw_normal, draw_bfloat16_delta], ids=["normal", "bfloat16"])
def test_trimming_millions_of_elements_is_exact_for_any_tile(draw: Draw) -> None:
    x = draw(np.random.default_rng(2), 3_000_001)
    expected = keep_largest(x, 600_000)
    for tile in (BLOCK, 2 * BLOCK, 4 * BLOCK):
        np.testing.assert_array_equal(trimmed(x, 600_000, tile), expected)


@pytest.mark.parametrize(
    ("draw", "allowance", "counted"),
    [
        (draw_normal, 1 << 30, False),  # the guess held: one pass over the tensor was enough
        (draw_normal, 1000, True),  # the bracket does not fit
        (draw_one_value, 100_000, True),  # all values are equal to the threshold
        (draw_large_where_unseen, 1 << 30, True),  # the sample misled
    ],
)
def test_a_guess_that_fails_is_replaced_by_a_count(
    draw: Draw, allowance: int, counted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    by_radix = trim_module._by_radix

    def spied(tiles: InMemory, operand: int, k: int) -> trim_module.Trim:
        calls.append(operand)
        return by_radix(tiles, operand, k)

    monkeypatch.setattr(trim_module, "_by_radix", spied)
    x = draw(np.random.default_rng(3), SAMPLED + BLOCK)
    trimmed(x, x.size // 2, allowance=allowance)
    assert bool(calls) == counted


def test_operands_are_trimmed_each_by_its_own_count() -> None:
    rng = np.random.default_rng(4)
    operands = [draw_normal(rng, 1000) for _ in range(4)]
    counts = [0, 10, 500, 1000]
    found = largest(InMemory([torch.from_numpy(x) for x in operands]), list(enumerate(counts)))
    for x, k, cut_at in zip(operands, counts, found, strict=True):
        kept = trim(torch.from_numpy(x), cut_at, 0).numpy()
        np.testing.assert_array_equal(kept, keep_largest(x, k))


def test_trimming_does_not_write_to_its_operand() -> None:
    x = torch.randn(1000)
    before = x.clone()
    [found] = largest(InMemory([x]), [(0, 100)])
    assert not torch.equal(trim(x, found, 0), before)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("density", "numel", "kept"),
    [
        (1.0, 7, 7),
        (0.5, 7, 3),
        (0.5, 0, 0),
        (0.2, 5, 1),
        (0.29, 100, 28),  # the product is 28.999... in binary, and is truncated as mergekit does
        (0.001, 7, 1),  # at least one
        (0.0, 7, 0),
        (1.0, 0, 0),
    ],
)
def test_a_density_is_truncated_to_whole_elements(density: float, numel: int, kept: int) -> None:
    assert min(kept_count(density, numel), numel) == kept


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.integers(1, 10**12))
def test_more_density_never_keeps_less(a: float, b: float, numel: int) -> None:
    low, high = sorted((a, b))
    assert 0 <= kept_count(low, numel) <= kept_count(high, numel) <= numel


# -- masks: random bits by counter ---------------------------------------------------------------


def bits(
    n: int, p: float = 0.5, *, start: int = 0, operand: int = 0, key: Stream | None = None
) -> np.ndarray:
    """``n`` bits of a stream as 0.0 and 1.0."""
    key = Stream(0, "dare_ties", "w") if key is None else key
    return key.keep(operand, start, torch.empty(n), p).numpy()


@law
@given(
    cuts=st.lists(st.integers(0, 500), max_size=5),
    start=st.sampled_from([0, 1, 12345, 2**31 - 250, 2**32 - 250, 2**33 - 250, 2**40 + 3]),
    p=st.floats(0.0, 1.0) | st.sampled_from([1e-4, 1 / 64, 63 / 64, 0.9999]),
)
def test_the_bits_do_not_depend_on_where_tiles_are_cut(
    cuts: list[int], start: int, p: float
) -> None:
    ends = [0, *sorted(cuts), 500]
    parts = [bits(b - a, p, start=start + a) for a, b in itertools.pairwise(ends)]
    np.testing.assert_array_equal(np.concatenate(parts), bits(500, p, start=start))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 5, 7)], ids=str)
def test_a_mask_has_the_shape_and_type_of_its_tile(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    mask = Stream(0, "m", "w").keep(0, 9, torch.empty(shape, dtype=dtype), 0.5)
    assert (mask.shape, mask.dtype) == (torch.Size(shape), dtype)
    np.testing.assert_array_equal(mask.float().reshape(-1), bits(mask.numel(), start=9, key=M))


M = Stream(0, "m", "w")


@pytest.mark.parametrize(
    "other",
    [
        bits(10_000, operand=1, key=M),
        bits(10_000, key=Stream(1, "m", "w")),
        bits(10_000, key=Stream(0, "n", "w")),
        bits(10_000, key=Stream(0, "m", "v")),
        bits(10_000, key=M, start=1),
        bits(10_000, key=M, start=2**32),
        bits(10_000, key=M, start=2**33),
    ],
    ids=["operand", "seed", "method", "tensor", "element", "2^32 further", "2^33 further"],
)
def test_bits_differ_and_are_independent_for_another(other: np.ndarray) -> None:
    agree = float(np.mean(other == bits(10_000, key=M)))
    assert abs(agree - 0.5) < 5 * 0.5 / math.sqrt(10_000)


@pytest.mark.parametrize("start", [0, 2**31, 2**32, 5 * 2**40], ids=hex)
@pytest.mark.parametrize("p", [1e-4, 1 / 64, 0.02, 0.1, 0.5, 0.9, 0.985, 0.9999])
def test_the_stated_fraction_is_kept(p: float, start: int) -> None:
    n = 1 << 20
    sigma = math.sqrt(n * p * (1 - p))
    assert abs(bits(n, p, start=start).sum() - n * p) < 5 * sigma


@pytest.mark.parametrize(("p", "kept"), [(0.0, 0), (1.0, 100_000), (1 - 2**-40, 100_000)])
def test_the_ends_of_the_range_are_exact(p: float, kept: int) -> None:
    assert bits(100_000, p).sum() == kept


@pytest.mark.parametrize("p", [0.5, 0.1, 0.99])  # 0.99 has words of another size
@pytest.mark.parametrize("lag", [1, 2, 3, 7, 64, 768, 1024, 4096, BLOCK])
def test_neighbours_are_uncorrelated(lag: int, p: float) -> None:
    x = bits(1 << 20, p)
    assert abs(np.corrcoef(x[lag:], x[:-lag])[0, 1]) < 5 / math.sqrt(x.size - lag)


def test_operands_seeds_and_tensors_are_uncorrelated() -> None:
    n = 1 << 18
    streams = [
        *(bits(n, operand=i, key=M) for i in range(4)),
        *(bits(n, key=Stream(seed, "m", "w")) for seed in (1, 2)),
        *(bits(n, key=Stream(0, "m", f"layers.{i}.w")) for i in range(4)),
        bits(n, start=n, key=M),
    ]
    correlation = np.corrcoef(streams) - np.eye(len(streams))
    assert np.abs(correlation).max() < 5 / math.sqrt(n)


def test_bytes_of_bits_are_uniform() -> None:
    packed = np.packbits(bits(1 << 21).astype(np.uint8))
    assert stats.chisquare(np.bincount(packed, minlength=256)).pvalue > 1e-6


def test_the_leading_byte_of_words_is_uniform() -> None:
    """The mask of probability j/256 tells how many words lie in the first j of 256 bins."""
    below = [bits(1 << 17, j / 256).sum(dtype=np.float64) for j in range(4, 253)]
    assert stats.chisquare(np.diff(below)).pvalue > 1e-6


def test_a_probability_is_met_to_a_part_in_a_thousand_of_the_rarer_outcome() -> None:
    """Words of 16 bits cannot meet every probability; in the long run it would show."""
    n = 1 << 24
    for p in (0.0157, 0.3, 1 / 3, 0.98):
        sigma = math.sqrt(n * p * (1 - p))
        assert abs(bits(n, p).sum(dtype=np.float64) - n * p) < 5 * sigma + 0.001 * n * min(p, 1 - p)


def test_gaps_between_kept_elements_are_geometric() -> None:
    p = 1 / 8
    gaps = np.diff(np.flatnonzero(bits(1 << 20, p)))
    bins = np.minimum(gaps, 40)
    expected = p * (1 - p) ** np.arange(40)
    expected[39] = (1 - p) ** 39
    counts = np.bincount(bins, minlength=41)[1:]
    assert stats.chisquare(counts, expected * counts.sum()).pvalue > 1e-6


# -- measuring passes ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 1000, 5 * BLOCK + 1234])
def test_inner_products_are_those_of_float64(n: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(n)
    common = torch.randn(n, generator=draw)
    operands = [(common + torch.randn(n, generator=draw)).to(dtype) for _ in range(3)]
    gram = np.array(inner_products(InMemory(operands)))
    exact = np.array([x.double().numpy() for x in operands])
    norms = np.linalg.norm(exact, axis=1)
    assert (np.abs(gram - exact @ exact.T) <= 1e-6 * np.outer(norms, norms)).all()
    np.testing.assert_array_equal(gram, gram.T)


def test_inner_products_do_not_depend_on_the_tile() -> None:
    operands = [torch.randn(5 * BLOCK + 1234, generator=torch.Generator().manual_seed(5))] * 2
    grams = [inner_products(InMemory(operands, tile)) for tile in (BLOCK, 2 * BLOCK, 4 * BLOCK)]
    assert grams[0] == grams[1] == grams[2]


def test_inner_products_of_nothing_are_zero() -> None:
    assert inner_products(InMemory([torch.empty(0)] * 2)) == [[0.0, 0.0], [0.0, 0.0]]


def test_restoring_factors_are_the_ratio_of_norms() -> None:
    n, density = 3 * BLOCK + 99, [0.3, 1.0, 0.9]
    operands = [torch.randn(n, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    found = restoring_factors(InMemory(operands), density=density)
    for i, (x, p) in enumerate(zip(operands, density, strict=True)):
        magnitude = np.abs(x.double().numpy())
        kept = magnitude * bits(n, p, operand=i, key=Stream(0, "any", "w"))
        assert found[i] == pytest.approx(magnitude.sum() / kept.sum(), rel=1e-6)
    assert found[1] == 1.0


def test_restoring_factors_do_not_depend_on_the_tile() -> None:
    x = [torch.randn(5 * BLOCK + 7, generator=torch.Generator().manual_seed(6))]
    found = [
        restoring_factors(InMemory(x, tile), density=[0.4])
        for tile in (BLOCK, 2 * BLOCK, 4 * BLOCK)
    ]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("x", "density", "rescale"),
    [
        (torch.zeros(100), 0.5, True),  # nothing to restore
        (torch.full((100,), 1e-10), 0.5, True),  # an L1 norm of 1e-8
        (torch.ones(100), 0.0, True),  # nothing is left
        (torch.ones(100), 0.5, False),
    ],
)
def test_there_is_no_rescaling_where_there_is_nothing_to_restore(
    x: Tensor, density: float, rescale: bool
) -> None:
    assert restoring_factors(InMemory([x]), density=[density], rescale=rescale) == [1.0]


def test_what_is_dropped_is_zero_and_the_rest_stays() -> None:
    key = Stream(0, "any", "w")
    deltas = [torch.full((1000,), 2.0), torch.full((1000,), 3.0)]
    thinned = drop_at_random(deltas, [0.25, 1.0], start=40, draw=key)
    np.testing.assert_array_equal(thinned[0], 2.0 * bits(1000, 0.25, start=40, key=key))
    assert torch.equal(thinned[1], deltas[1])
    assert set(deltas[0].tolist()) == {2.0}


# -- election ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "weight", "normalize", "out"),
    [
        ([1.0, 3.0], [1.0, 1.0], False, 4.0),
        ([1.0, 3.0], [1.0, 1.0], True, 2.0),
        ([1.0, -3.0], [1.0, 1.0], False, -3.0),  # the heavier sign wins
        ([1.0, -3.0], [1.0, 1.0], True, -3.0),  # over those that agree
        ([1.0, -3.0], [4.0, 1.0], False, 4.0),  # weights vote
        ([1.0, -3.0], [4.0, 1.0], True, 1.0),
        ([2.0, -2.0], [1.0, 1.0], False, 2.0),  # an exact cancellation elects +
        ([-2.0, 2.0], [1.0, 1.0], True, 2.0),
        ([0.0, -2.0], [1.0, 1.0], True, -2.0),  # zero never agrees, and does not count
        ([0.0, 2.0, 4.0], [5.0, 1.0, 1.0], True, 3.0),
        ([0.0, 0.0], [1.0, 1.0], True, 0.0),  # none agrees: no division by zero
        ([-2.0, 1.0], [-1.0, 1.0], False, 3.0),  # a negative weight turns the sign
        ([-4.0, 1.0], [-0.5, 1.5], True, 3.5),  # (2 + 1.5) / (1.5 - 0.5)
        ([-4.0, 1.0], [-1.0, 1.0], True, 5.0),  # the weights cancel: undivided
        ([1.0, 2.0], [0.0, 1.0], True, 2.0),  # weight 0 has no say
        ([3.0], [0.0], True, 0.0),
    ],
)
def test_the_elected_sum_by_hand(
    columns: list[float], weight: list[float], normalize: bool, out: float
) -> None:
    deltas = [torch.tensor([c]) for c in columns]
    assert elected(deltas, weight, [1.0] * len(weight), normalize=normalize).tolist() == [out]


def test_a_factor_scales_its_model_but_not_its_share() -> None:
    deltas = [torch.tensor([1.0, 2.0]), torch.tensor([1.0, -3.0])]
    assert elected(deltas, [1.0, 1.0], [4.0, 2.0], normalize=True).tolist() == [3.0, 8.0]
    assert summed(deltas, [1.0, 1.0], [4.0, 2.0], normalize=True, scale=2.0).tolist() == [6.0, 2.0]


def test_election_and_sum_leave_their_operands_as_they_are() -> None:
    deltas = [torch.tensor([1.0, 2.0]), torch.tensor([1.0, -3.0])]
    elected(deltas, [0.5, 2.0], [1.0, 1.0], normalize=True)
    summed(deltas, [0.5, 2.0], [1.0, 1.0], normalize=True, scale=1.0)
    assert [d.tolist() for d in deltas] == [[1.0, 2.0], [1.0, -3.0]]


@law
@given(
    count=st.integers(1, 4),
    normalize=st.booleans(),
    data=st.data(),
)
def test_the_elected_sum_is_its_formula(count: int, normalize: bool, data: st.DataObject) -> None:
    eighths = st.integers(-64, 64).map(lambda n: n / 8)  # so that no sum is rounded
    size = data.draw(st.integers(1, 20))
    column = st.lists(eighths, min_size=size, max_size=size)
    d = np.array([data.draw(column) for _ in range(count)])
    w = np.array(data.draw(st.lists(eighths, min_size=count, max_size=count)))
    v = w[:, None] * d
    s = np.where(v.sum(axis=0) >= 0, 1.0, -1.0)
    agrees = np.sign(v) == s
    expected = (v * agrees).sum(axis=0)
    if normalize:
        divisor = (w[:, None] * agrees).sum(axis=0)
        expected = expected / np.where(divisor == 0, 1.0, divisor)
    deltas = [torch.tensor(row, dtype=torch.float32) for row in d]
    got = elected(deltas, w.tolist(), [1.0] * count, normalize=normalize)
    np.testing.assert_allclose(got, expected, rtol=2**-22, atol=0)


@pytest.mark.parametrize(
    ("weight", "normalize", "out"),
    [
        ([0.5, 2.0], False, [2.5, -3.0]),
        ([0.5, 2.0], True, [1.0, -1.2]),
        ([1.0, -1.0], True, [0.0, 4.0]),  # weights that cancel are not divided by
    ],
)
def test_the_plain_sum_by_hand(weight: list[float], normalize: bool, out: list[float]) -> None:
    deltas = [torch.tensor([1.0, 2.0]), torch.tensor([1.0, -2.0])]
    got = summed(deltas, weight, [1.0, 1.0], normalize=normalize, scale=1.0)
    assert got.tolist() == pytest.approx(out)
