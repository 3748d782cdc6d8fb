"""Every method against its formula in float64, in three storage types, on tiny and real models."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import merge
from merge import methods
from merge.ir.checkpoint import Checkpoint
from merge.methods.core.masks import Stream

Array = NDArray[Any]
Draw = Callable[[int, float], Array]
Family = Callable[[str], list[Path]]

# -- the formulas, in whatever precision their arrays have ---------------------------------------


def linear(
    models: Sequence[Array], *, weight: Sequence[float], normalize: bool = True, **_: object
) -> Array:
    total = sum(w * x for w, x in zip(weight, models, strict=True))
    return total / sum(weight) if normalize else total


def passthrough(models: Sequence[Array], *, scale: float = 1.0, **_: object) -> Array:
    return scale * models[0]


def slerp(models: Sequence[Array], *, t: float, **_: object) -> Array:
    v0, v1 = models
    u0, u1 = (v / np.linalg.norm(v) if np.linalg.norm(v) > 1e-8 else v for v in (v0, v1))
    cosine = np.sum(u0 * u1)
    if abs(cosine) > 0.9995:
        return (1 - t) * v0 + t * v1
    theta = np.arccos(cosine)
    return (np.sin((1 - t) * theta) * v0 + np.sin(t * theta) * v1) / np.sin(theta)


def model_stock(
    models: Sequence[Array], *, base: Array, cos: str = "mean", clamp: bool = True, **_: object
) -> Array:
    d = [w - base for w in models]
    n = len(d)
    cosines = [
        np.sum(d[i] * d[j]) / max(np.linalg.norm(d[i]) * np.linalg.norm(d[j]), 1e-6)
        for i in range(n)
        for j in range(i + 1, n)
    ]
    cosines = np.clip(cosines, -1, 1)
    c = np.cos(np.mean(np.arccos(cosines))) if cos == "angle" else np.mean(cosines)
    if cos == "lsq":
        products = [np.sum(d[i] * d[j]) for i in range(n) for j in range(n) if i != j]
        c = sum(products) / ((n - 1) * sum(np.sum(x * x) for x in d))
    c = max(0.0, c) if clamp else c
    t = n * c / (1 + (n - 1) * c)
    mean = sum(models) / n
    return t * mean + (1 - t) * base


def task_arithmetic(models: Sequence[Array], *, base: Array, **rest: Any) -> Array:
    return base + plain_sum([w - base for w in models], **rest)


def ties(models: Sequence[Array], *, base: Array, density: float, **rest: Any) -> Array:
    whole = [w - base for w in models]
    d = [keep_largest(x, int(density * base.size)) for x in whole]
    if rest.get("rescale"):
        d = [x * (np.abs(w).sum() / np.abs(x).sum()) for x, w in zip(d, whole, strict=True)]
    return base + elected_sum(d, **{"normalize": True, **rest})


def dare_linear(models: Sequence[Array], *, base: Array, **rest: Any) -> Array:
    return base + plain_sum(thinned([w - base for w in models], **rest), **rest)


def dare_ties(models: Sequence[Array], *, base: Array, **rest: Any) -> Array:
    return base + elected_sum(thinned([w - base for w in models], **rest), **rest)


def keep_largest(delta: Array, k: int) -> Array:
    """``delta`` with all but its k largest magnitudes zeroed; the first in order win ties."""
    size = np.abs(delta.reshape(-1))
    least = np.partition(size, size.size - k)[size.size - k]
    keep = size > least
    keep[np.flatnonzero(size == least)[: k - np.count_nonzero(keep)]] = True
    return delta * keep.reshape(delta.shape)


def thinned(
    d: Sequence[Array], *, density: float, draw: Draw, rescale: bool = True, **_: object
) -> list[Array]:
    """Random elements of each delta, scaled to the L1 norm that it had."""
    masks = [draw(i, density).reshape(x.shape).astype(x.dtype) for i, x in enumerate(d)]
    return [
        x * m * (np.abs(x).sum() / np.abs(x * m).sum() if rescale and np.any(x * m) else 1)
        for x, m in zip(d, masks, strict=True)
    ]


def plain_sum(
    d: Sequence[Array],
    *,
    weight: Sequence[float],
    normalize: bool = False,
    lambda_: float = 1.0,
    **_: object,
) -> Array:
    total = sum(w * x for w, x in zip(weight, d, strict=True))
    return lambda_ * (total / sum(weight) if normalize else total)


def elected_sum(
    d: Sequence[Array],
    *,
    weight: Sequence[float],
    normalize: bool = False,
    lambda_: float = 1.0,
    undecided: float = 1.0,
    **_: object,
) -> Array:
    """The sum of what has the elected sign. ``undecided``: the sign where the votes cancel but for
    rounding, so that both outcomes can be looked at."""
    v = np.array([w * x for w, x in zip(weight, d, strict=True)])
    votes = v.sum(axis=0)
    close = np.abs(votes) <= 2**-20 * np.abs(v).sum(axis=0)
    agrees = (np.sign(v) == np.where(close, undecided, np.sign(votes))).astype(v.dtype)
    total = (v * agrees).sum(axis=0)
    if normalize:
        divisor = sum(w * a for w, a in zip(weight, agrees, strict=True))
        total = total / np.where(divisor == 0, 1, divisor)
    return lambda_ * total


FORMULAS: dict[str, Callable[..., Array]] = {
    f.__name__: f
    for f in (
        linear,
        passthrough,
        slerp,
        model_stock,
        task_arithmetic,
        ties,
        dare_linear,
        dare_ties,
    )
}


@cache
def formulas() -> dict[str, Callable[..., Array]]:
    """Those here and those of the other files of tests of numbers, each beside its tests."""
    files = sorted(Path(__file__).parent.glob("test_numbers*.py"))
    modules = [import_module(f"tests.{file.stem}") for file in files]
    return {name: formula for module in modules for name, formula in module.FORMULAS.items()}


def test_every_method_has_a_formula() -> None:
    elsewhere = ["regmean"]  # whose statistics have shapes of their own: tests/test_regmean.py
    assert sorted([*formulas(), *elsewhere]) == list(methods.registry())


# -- what is merged, and how ---------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A method with parameters."""

    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    models: int = 3
    relative: bool = False
    """Give a base to a method that may have one."""

    def __str__(self) -> str:
        words = [f"{k}={v}" for k, v in self.parameters.items() if k != "weight"]
        return " ".join([self.method, *words, *(["with base"] if self.relative else [])])

    @property
    def based(self) -> bool:
        return self.relative or methods.get(self.method).base == "required"

    @property
    def decides(self) -> bool:
        """Whether rounding may tip an element from one outcome to another."""
        formula = formulas()[self.method]
        return "ties" in self.method or "undecided" in inspect.signature(formula).parameters

    @property
    def gain(self) -> float:
        """The most by which the merge multiplies an element: errors of its inputs grow alike."""
        given = {"density": 1.0, "lambda_": 1.0, "weight": [1.0] * self.models, **self.parameters}
        some = [sum(part) for n in (1, 2, 3) for part in combinations(given["weight"], n)]
        normalize = given.get("normalize", self.method == "ties")
        divisor = min(abs(total) for total in some) if normalize else 1.0
        most = max(*given["weight"], sum(given["weight"]) - 1.0)  # that of the base
        return max(1.0, given["lambda_"] * most / divisor / given["density"])

    def lazy(self, base: object, models: Sequence[object]) -> Checkpoint:
        """The merge, with the base as the first model where a method has no base."""
        function = getattr(merge, self.method)
        if self.based:
            lazy = function(models[: self.models], base=base, seed=5, **self.parameters)
        else:
            lazy = function([base, *models][: self.models], **self.parameters)
        assert isinstance(lazy, Checkpoint)
        return lazy

    def exact(self, name: str, base: Array, models: Sequence[Array], **rest: Any) -> Array:
        """The formula for one tensor, in the precision of its arrays."""

        def draw(operand: int, density: float) -> Array:
            like = torch.empty(base.size)
            return Stream(5, self.method, name).keep(operand, 0, like, density).numpy()

        used = (list(models) if self.based else [base, *models])[: self.models]
        known = {"base": base if self.based else None, "draw": draw, **self.parameters, **rest}
        return formulas()[self.method](used, **known)


WEIGHT = [0.3, 0.5, -0.2]
CASES = [
    Case("linear", {"weight": WEIGHT}),
    Case("linear", {"weight": WEIGHT, "normalize": False}),
    Case("passthrough", {"scale": 0.7}, models=1),
    Case("slerp", {"t": 0.3}, models=2),
    Case("model_stock"),
    Case("model_stock", {"clamp": False}),
    Case("model_stock", {"cos": "angle"}),
    Case("model_stock", {"cos": "lsq"}),
    Case("task_arithmetic", {"weight": WEIGHT, "lambda_": 0.7}),
    Case("task_arithmetic", {"weight": WEIGHT, "normalize": True}),
    Case("ties", {"weight": WEIGHT, "density": 0.4, "lambda_": 0.7}),
    Case("ties", {"weight": WEIGHT, "density": 0.4, "normalize": False}),
    Case("ties", {"weight": WEIGHT, "density": 0.4, "rescale": True}),
    Case("dare_linear", {"weight": WEIGHT, "density": 0.4, "lambda_": 0.7}),
    Case("dare_linear", {"weight": WEIGHT, "density": 0.4, "rescale": False, "normalize": True}),
    Case("dare_ties", {"weight": WEIGHT, "density": 0.4, "normalize": True}),
    Case("dare_ties", {"weight": WEIGHT, "density": 0.4, "rescale": False, "lambda_": 0.7}),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])


def load(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder as they are stored."""
    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            state.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return state


def wide(tensor: torch.Tensor) -> Array:
    return tensor.double().numpy()


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


# -- rounding, from its definition ---------------------------------------------------------------

_PRECISION = {"float16": (11, -24), "bfloat16": (8, -133), "float32": (24, -149)}


def spacing(x: Array, dtype: str) -> Array:
    """The distance between neighbours in ``dtype`` around x."""
    digits, smallest = _PRECISION[dtype]
    return np.ldexp(1.0, np.maximum(np.frexp(x)[1] - digits, smallest))


def rounded(x: Array, dtype: str) -> Array:
    """x to the nearest number of ``dtype``, ties to even."""
    step = spacing(x, dtype)
    return np.rint(x / step) * step


@every_dtype
def test_rounding_is_that_of_the_hardware(dtype: str) -> None:
    x = np.random.default_rng(0).normal(size=10_000).astype(np.float32) * np.float32(1e-3)
    stored = torch.from_numpy(x).to(getattr(torch, dtype))
    np.testing.assert_array_equal(rounded(x.astype(np.float64), dtype), wide(stored))


# -- the law: as near to the truth as the storage type allows ------------------------------------


@dataclass
class Nearness:
    """How far a merge's tensors lie from the formula in float64, tensor by tensor."""

    dtype: str
    elements: int = 0
    unequal: int = 0
    too_far: list[str] = field(default_factory=list)

    def add(self, name: str, ours: Array, truths: Sequence[Array], scale: Array) -> None:
        """``truths``: the outcomes that rounding may lead to; ``scale``: magnitude of the terms."""
        off = np.min([np.abs(ours - truth) for truth in truths], axis=0)
        allowed = 2**-22 * scale
        if self.dtype != "float32":
            half = 0.5 * spacing(np.max(np.abs(truths), axis=0), self.dtype)
            self.unequal += int(np.count_nonzero(off > half + 2**-40 * scale))  # but for exact ties
            allowed += half
        self.elements += ours.size
        miss = off > allowed
        if miss.any():
            self.too_far.append(f"{name}: {np.count_nonzero(miss)} of {ours.size} elements")

    def check(self) -> None:
        assert self.too_far == []
        assert self.elements > 0
        assert self.unequal <= 0.001 * self.elements


def nearness(case: Case, dtype: str, merged: Mapping[str, torch.Tensor], inputs: Any) -> Nearness:
    base, *models = inputs
    assert merged.keys() == base.keys()
    found = Nearness(dtype)
    for name, tensor in merged.items():
        assert str(tensor.dtype) == str(base[name].dtype)
        if not tensor.is_floating_point():
            assert torch.equal(tensor, base[name])
            continue
        root, others = wide(base[name]), [wide(m[name]) for m in models]
        truths = [case.exact(name, root, others)]
        if case.decides:
            truths += [case.exact(name, root, others, undecided=u) for u in (1.0, -1.0)]
        scale = case.gain * np.sum(np.abs([root, *others]), axis=0)
        found.add(name, wide(tensor), truths, scale)
    return found


@every_dtype
@every_case
def test_a_tiny_llama_is_merged_by_the_formula(case: Case, dtype: str, llamas: Family) -> None:
    base, *tuned = llamas(dtype)
    merged = case.lazy(base, tuned).state_dict()
    nearness(case, dtype, merged, [load(folder) for folder in (base, *tuned)]).check()


@every_case
def test_float32_models_lose_no_more_than_in_single_precision_by_the_formula(
    case: Case, llamas: Family
) -> None:
    """What a tool that computes the formula in float32 would yield is not nearer to the truth."""
    base, *tuned = (load(folder) for folder in llamas("float32"))
    merged = case.lazy(base, tuned).state_dict()
    ours = single = 0.0
    for name, tensor in merged.items():
        exact = case.exact(name, wide(base[name]), [wide(t[name]) for t in tuned])
        narrow = case.exact(name, base[name].numpy(), [t[name].numpy() for t in tuned])
        assert narrow.dtype == np.float32
        ours += np.sum((wide(tensor) - exact) ** 2)
        single += np.sum((narrow - exact) ** 2)
    assert np.sqrt(ours) <= 1.15 * np.sqrt(single)


@every_dtype
@pytest.mark.parametrize("t", [0.3, 0.0, 1.0, 1.5])
def test_slerp_of_models_at_right_angles_goes_along_the_arc(t: float, dtype: str) -> None:
    draw = torch.Generator().manual_seed(3)
    shapes = {"a": (40, 50), "b": (3000,), "c": (2, 3, 5)}
    models = [
        {n: torch.randn(s, generator=draw).to(getattr(torch, dtype)) for n, s in shapes.items()}
        for _ in range(2)
    ]
    case = Case("slerp", {"t": t}, models=2)
    nearness(case, dtype, case.lazy(models[0], models[1:]).state_dict(), models).check()


@pytest.mark.parametrize(
    ("v0", "v1", "out"),
    [
        ([1.0, 0.0], [0.0, 1.0], [np.sqrt(0.5), np.sqrt(0.5)]),
        ([2.0, 0.0], [0.0, 1.0], [2 * np.sqrt(0.5), np.sqrt(0.5)]),  # lengths are kept
        ([1.0, 0.0], [3.0, 0.0], [2.0, 0.0]),  # parallel: a straight line
        ([0.0, 0.0], [1.0, 1.0], [np.sqrt(0.5), np.sqrt(0.5)]),  # zero is at right angles to all
    ],
)
def test_slerp_half_way_by_hand(v0: list[float], v1: list[float], out: list[float]) -> None:
    merged = merge.slerp([{"w": torch.tensor(v0)}, {"w": torch.tensor(v1)}], t=0.5).state_dict()
    assert merged["w"].tolist() == pytest.approx(out, abs=1e-7)


@pytest.mark.parametrize(
    ("models", "out"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0]),  # at right angles: the base
        ([[1.0, 1.0], [1.0, 1.0]], [1.0, 1.0]),  # parallel: the mean
        ([[1.0, 0.0], [-1.0, 0.0]], [0.0, 0.0]),  # opposed: singular, the base
        ([[1.0, 0.0], [1.0, np.sqrt(3)]], [2 / 3, np.sqrt(3) / 3]),  # 60 degrees: 2/3 of the mean
        ([[0.0, 0.0], [1.0, 0.0]], [0.0, 0.0]),  # a model that is the base
    ],
)
def test_model_stock_by_hand(models: list[list[float]], out: list[float]) -> None:
    base = {"w": torch.tensor([10.0, 20.0])}
    tuned = [{"w": base["w"] + torch.tensor(m)} for m in models]
    merged = merge.model_stock(tuned, base=base).state_dict()
    assert merged["w"].tolist() == pytest.approx([10.0 + out[0], 20.0 + out[1]], abs=1e-5)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("cos", ["mean", "angle", "lsq"])
def test_model_stock_of_opposed_models_is_the_base(cos: str, rows: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    base, step = torch.randn(4, 6, generator=draw), torch.randn(4, 6, generator=draw)
    tuned = [{"w": base + step}, {"w": base - 0.5 * step}]
    out = merge.model_stock(tuned, base={"w": base}, cos=cos, filter_wise=rows).state_dict()
    torch.testing.assert_close(out["w"], base)
    past = merge.model_stock(tuned, base={"w": base}, cos="lsq", filter_wise=rows, clamp=False)
    c = 2 * -0.5 / 1.25  # the pull of a negative c is past the base
    expected = base + 2 * c / (1 + c) * 0.25 * step
    torch.testing.assert_close(past.state_dict()["w"], expected)


def test_model_stock_by_least_squares_suits_lengths_that_differ() -> None:
    """Of a vector and its double: the mean cosine is 1, while no one centre sees both alike."""
    base = torch.zeros(3)
    tuned = [{"w": torch.tensor([1.0, 0.0, 0.0])}, {"w": torch.tensor([2.0, 0.0, 0.0])}]
    mean = merge.model_stock(tuned, base={"w": base}).state_dict()
    assert mean["w"].tolist() == pytest.approx([1.5, 0.0, 0.0])
    c = 2 * 2.0 / 5.0
    found = merge.model_stock(tuned, base={"w": base}, cos="lsq").state_dict()
    assert found["w"].tolist() == pytest.approx([2 * c / (1 + c) * 1.5, 0.0, 0.0])


def test_model_stock_filter_wise_is_model_stock_of_each_row() -> None:
    draw = torch.Generator().manual_seed(1)
    base, *tuned = (torch.randn(5, 9, generator=draw).double() for _ in range(4))
    for cos in ("mean", "angle", "lsq"):
        whole = merge.model_stock(
            [{"w": t} for t in tuned], base={"w": base}, cos=cos, filter_wise=True
        ).state_dict()["w"]
        for i in range(5):
            row = model_stock([t[i].numpy() for t in tuned], base=base[i].numpy(), cos=cos)
            np.testing.assert_allclose(whole[i].numpy(), row, rtol=1e-12, atol=1e-12)


def test_model_stock_knows_three_cosines() -> None:
    with pytest.raises(merge.RecipeError, match="'cos' names no way"):
        merge.model_stock([{"w": torch.ones(2)}] * 2, base={"w": torch.ones(2)}, cos="median")


@pytest.mark.parametrize(
    ("method", "parameters", "out"),
    [
        ("linear", {"weight": [3.0, 1.0]}, [2.25, 2.0]),
        ("linear", {"weight": 1.0, "normalize": False}, [5.0, 0.0]),
        ("task_arithmetic", {"weight": [1.0, 0.5]}, [3.0, 1.5]),
        ("task_arithmetic", {"weight": [1.0, 0.5], "lambda_": 2.0}, [5.0, 2.0]),
        ("task_arithmetic", {"weight": [3.0, 1.0], "normalize": True}, [2.25, 2.0]),
        ("task_arithmetic", {"weight": [1.0, -1.0], "normalize": True}, [0.0, 9.0]),
        ("ties", {"weight": 1.0}, [2.5, -4.0]),
        ("ties", {"weight": 1.0, "density": 0.5}, [1.0, -4.0]),
        ("ties", {"weight": [1.0, 0.25]}, [2.2, 4.0]),
        ("ties", {"weight": [1.0, 0.25], "normalize": False}, [2.5, 4.0]),
        ("dare_linear", {"weight": [1.0, 0.5]}, [3.0, 1.5]),
        ("dare_ties", {"weight": 1.0}, [4.0, -4.0]),
        ("dare_ties", {"weight": 1.0, "density": 0.0}, [1.0, 1.0]),
    ],
    ids=str,
)
def test_two_models_by_hand(method: str, parameters: dict[str, Any], out: list[float]) -> None:
    """Differences of (1, 3) and (2, -5) to a base of ones."""
    base, a, b = ({"w": torch.tensor(w)} for w in ([1.0, 1.0], [2.0, 4.0], [3.0, -4.0]))
    needed = {"base": base} if methods.get(method).base == "required" else {}
    merged = getattr(merge, method)([a, b], **needed, **parameters).state_dict()
    assert merged["w"].tolist() == pytest.approx(out, rel=1e-6)


def test_weights_that_sum_to_zero_have_no_average() -> None:
    models = [{"w": torch.ones(2)}, {"w": torch.ones(2)}]
    with pytest.raises(merge.RecipeError, match="sum to 0"):
        merge.linear(models, weight=[1.0, -1.0])


# -- written out and loaded ----------------------------------------------------------------------


def config_dtype(folder: Path) -> set[str]:
    config = json.loads((folder / "config.json").read_text())
    return {config[key] for key in ("dtype", "torch_dtype") if key in config}


@every_dtype
@every_case
def test_a_merged_llama_loads_and_runs(
    case: Case, dtype: str, llamas: Family, tmp_path: Path
) -> None:
    base, *tuned = llamas(dtype)
    out = case.lazy(base, tuned).save(tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert str(model.dtype) == f"torch.{dtype}"
    assert config_dtype(out) == {dtype}
    logits = model(torch.tensor([[1, 2, 3, 95]])).logits
    assert logits.shape == (1, 4, 96)
    assert logits.isfinite().all()


@pytest.mark.parametrize("asked", ["bfloat16", "float16", "float32"])
def test_another_storage_type_is_written_named_and_loaded(
    asked: str, llamas: Family, tmp_path: Path
) -> None:
    base, *tuned = llamas("float32")
    case = Case("linear", {"weight": WEIGHT})
    out = case.lazy(base, tuned).save(tmp_path / "out", dtype=asked)
    as_float32 = load(case.lazy(base, tuned).save(tmp_path / "narrow"))
    for name, tensor in load(out).items():
        assert torch.equal(tensor, as_float32[name].to(getattr(torch, asked)))
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert str(model.dtype) == f"torch.{asked}"
    assert config_dtype(out) == {asked}


# -- the real all-MiniLM-L6-v2 -------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilms(
    minilm: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[list[Path], list[dict[str, torch.Tensor]]]]:
    """The real model and two fine-tunes of it made by noise: folders, and their tensors."""
    root = tmp_path_factory.mktemp("minilm")
    base = load(minilm)
    folders, states = [minilm], [base]
    for seed in (1, 2):
        draw = torch.Generator().manual_seed(seed)
        state = {
            n: t + 0.02 * torch.randn(t.shape, generator=draw) if t.is_floating_point() else t
            for n, t in base.items()
        }
        folder = root / f"tuned{seed}"
        shutil.copytree(minilm, folder, ignore=lambda _, names: [n for n in names if "safet" in n])
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        folders.append(folder)
        states.append(state)
    yield folders, states
    shutil.rmtree(root)


TWO = [0.3, 0.5]
REAL = [
    Case("linear", {"weight": TWO}, 2),
    Case("passthrough", {"scale": 0.7}, 1),
    Case("slerp", {"t": 0.3}, 2),
    Case("model_stock", {}, 2),
    Case("task_arithmetic", {"weight": TWO, "lambda_": 0.7}, 2),
    Case("ties", {"weight": TWO, "density": 0.4, "lambda_": 0.7}, 2),
    Case("dare_linear", {"weight": TWO, "density": 0.4, "lambda_": 0.7}, 2),
    Case("dare_ties", {"weight": TWO, "density": 0.4, "normalize": True}, 2),
]


@pytest.mark.parametrize("case", REAL, ids=str)
def test_a_real_model_is_merged_by_the_formula_loads_and_runs(
    case: Case, minilms: tuple[list[Path], list[dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    (base, *tuned), inputs = minilms
    out = case.lazy(base, tuned).save(tmp_path / "out")
    nearness(case, "float32", load(out), inputs).check()
    model, info = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    tokens = AutoTokenizer.from_pretrained(out)("a merged model still reads", return_tensors="pt")
    assert model(**tokens).last_hidden_state.isfinite().all()
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    shutil.rmtree(out)


def test_a_real_model_averaged_with_itself_is_that_model_byte_for_byte(
    minilm: Path, tmp_path: Path
) -> None:
    out = merge.linear([minilm, minilm, minilm], weight=[0.1, 0.7, 0.5]).save(tmp_path / "out")
    ours, theirs = load(out), load(minilm)
    assert {n: as_bytes(t) for n, t in ours.items()} == {n: as_bytes(t) for n, t in theirs.items()}
    shutil.rmtree(out)


def test_a_task_of_weight_zero_leaves_a_real_model_byte_for_byte(
    minilms: tuple[list[Path], list[dict[str, torch.Tensor]]],
) -> None:
    (base, *tuned), inputs = minilms
    merged = merge.task_arithmetic(tuned, base=base, weight=0.0).state_dict()
    assert {n: as_bytes(t) for n, t in merged.items()} == {
        n: as_bytes(t) for n, t in inputs[0].items()
    }
