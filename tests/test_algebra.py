"""Arithmetic of checkpoints: what sums mean, what they become, and that they are right."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import merge
from merge.errors import MergeError, PlanError, RecipeError, SourceError
from merge.ir.checkpoint import Checkpoint
from merge.plan.model import Plan

from .conftest import MakeModel

Formula = Callable[[Any, Any, Any], Any]
State = Mapping[str, torch.Tensor]


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Three tensors of random values: a matrix, a scalar, and an empty one."""
    draw = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"w": (7, 5), "scalar": (), "none": (0, 3)}
    return {n: torch.randn(s, generator=draw).to(dtype) for n, s in shapes.items()}


def three(dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    return [state(seed, dtype) for seed in (1, 2, 3)]


def opened(states: list[dict[str, torch.Tensor]] | None = None) -> list[Checkpoint]:
    return [merge.open(s) for s in states or three()]


def formula_of(plan: Plan, name: str = "w") -> str:
    """How the plan computes one tensor, with A, B, ... for the sources."""
    steps = plan.to_json(tensors=True)["steps"]
    found = next(s["formula"] for s in steps if s["tensor"] == name)
    assert isinstance(found, str)
    return found


# -- spaces --------------------------------------------------------------------------------------

WEIGHTS: dict[str, Formula] = {
    "one model": lambda a, b, c: a,
    "halves": lambda a, b, c: 0.5 * a + 0.5 * b,
    "thirds": lambda a, b, c: (a + b + c) / 3,
    "a task": lambda a, b, c: a + 0.4 * (b - a),
    "two tasks": lambda a, b, c: a + 0.4 * (b - a) + 0.3 * (c - a),
    "a task taken out": lambda a, b, c: a - 0.3 * (b - a),
    "a task transferred": lambda a, b, c: a + (b - c),
    "a task of a task": lambda a, b, c: a + 0.5 * ((b - a) - 0.25 * (c - a)),
    "extrapolation": lambda a, b, c: 2 * a - b,
    "there and back": lambda a, b, c: 0.75 * b - (-0.25 * a),
}
DELTAS: dict[str, Formula] = {
    "a difference": lambda a, b, c: a - b,
    "scaled": lambda a, b, c: 3 * (a - b) / 7,
    "of differences": lambda a, b, c: (b - a) - (c - a),
    "negative": lambda a, b, c: -(a - b),
    "added": lambda a, b, c: (b - a) + (c - a),
    "of averages": lambda a, b, c: (a + b) / 2 - c,
}
NEITHER: dict[str, tuple[Formula, str]] = {
    "a sum": (lambda a, b, c: a + b, "2 times"),
    "a sum of itself": (lambda a, b, c: a + a, "2 times"),
    "a double": (lambda a, b, c: 2 * a, "2 times"),
    "a half": (lambda a, b, c: a / 2, "0.5 times"),
    "a negative": (lambda a, b, c: -a, "-1 times"),
    "forgotten brackets": (lambda a, b, c: a + 0.4 * b - a, "0.4 times"),
    "too much": (lambda a, b, c: 0.5 * a + 0.6 * b, "1.1 times"),
    "not a number": (lambda a, b, c: float("nan") * a, "nan times"),
    "not a number of a difference": (lambda a, b, c: a + float("nan") * (b - a), "nan times"),
    "infinity": (lambda a, b, c: a + float("inf") * (b - a), "nan times"),
}


@pytest.mark.parametrize("formula", WEIGHTS.values(), ids=WEIGHTS)
def test_what_adds_up_to_one_model_is_weights(formula: Formula) -> None:
    assert formula(*opened()).space == "weight"


@pytest.mark.parametrize("formula", DELTAS.values(), ids=DELTAS)
def test_what_adds_up_to_no_model_is_a_delta(formula: Formula) -> None:
    assert formula(*opened()).space == "delta"


@pytest.mark.parametrize(("formula", "found"), NEITHER.values(), ids=NEITHER)
def test_any_other_sum_is_refused_when_it_is_planned(
    formula: Formula, found: str, tmp_path: Path
) -> None:
    result = formula(*opened())
    assert result.space == "neither"
    for planned in (result.plan, result.state_dict, lambda: result.save(tmp_path / "out")):
        with pytest.raises(PlanError, match="neither weights nor a difference") as caught:
            planned()
        assert caught.value.found == f"{found} a model's weights"
        assert "base + (tuned - base)" in str(caught.value.do)
        assert "average: merge.linear" in str(caught.value.do)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "formula",
    [
        lambda a: a + 3,
        lambda a: 3 + a,
        lambda a: a - "b",
        lambda a: a * a,
        lambda a: a * "2",
        lambda a: a / "2",
        lambda a: a + {"w": torch.ones(1)},
    ],
)
def test_sums_with_other_things_are_type_errors(formula: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError):
        formula(opened()[0])


# -- values --------------------------------------------------------------------------------------


def assert_near(found: State, states: list[dict[str, torch.Tensor]], formula: Formula) -> None:
    """``found`` is the float64 result, but for one rounding of each operation and of storing."""
    for name, tensor in found.items():
        parts = [s[name].double() for s in states]
        truth = formula(*parts)
        size = sum(p.abs() for p in parts)
        stored = torch.finfo(tensor.dtype).eps / 2  # the largest relative error of one rounding
        working = torch.finfo(
            torch.float64 if tensor.dtype == torch.float64 else torch.float32
        ).eps  # of a sum of three, none larger than all parts together
        error = (tensor.double() - truth).abs()
        assert tensor.shape == truth.shape
        assert bool((error <= stored * truth.abs() + 4 * working * size).all()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "formula",
    [*WEIGHTS.values(), *DELTAS.values()],
    ids=[*WEIGHTS, *(f"delta: {n}" for n in DELTAS)],
)
def test_results_are_those_of_float64_arithmetic(formula: Formula, dtype: torch.dtype) -> None:
    states = three(dtype)
    found = formula(*opened(states)).state_dict()
    assert {t.dtype for t in found.values()} == {dtype}
    assert_near(found, states, formula)


def test_one_rounding_is_all_there_is() -> None:
    """1 + 2^-9 + 2^-9 is a bfloat16's next number only when the sum is wider than it."""
    one, little = torch.ones(1).bfloat16(), torch.full((1,), 2.0**-9).bfloat16()
    base, zero = merge.open({"w": one}), merge.open({"w": torch.zeros(1).bfloat16()})
    delta = merge.open({"w": little}) - zero
    assert (base + delta + delta + delta).state_dict()["w"].item() == 1 + 2**-7
    assert (base + delta).state_dict()["w"].item() == 1.0


def test_a_model_minus_itself_is_zeros() -> None:
    a = opened()[0]
    for delta in (a - a, 0.0 * (a - a), (a - a) + (a - a)):
        for name, tensor in delta.state_dict().items():
            assert torch.equal(tensor, torch.zeros_like(state(1)[name]))


def test_eight_bit_floats_are_averaged_wider() -> None:
    kind = torch.float8_e4m3fn
    a, b = (merge.open({"w": torch.tensor([v, -v]).to(kind)}) for v in (1.0, 2.0))
    found = (0.5 * a + 0.5 * b).state_dict()["w"]
    assert found.dtype == kind
    assert found.float().tolist() == [1.5, -1.5]


# -- what sums become ----------------------------------------------------------------------------

SIMPLE: dict[str, tuple[Formula, str]] = {
    "a task": (lambda a, b, c: a + 0.4 * (b - a), "0.6*A[w] + 0.4*B[w]"),
    "two tasks": (
        lambda a, b, c: a + 0.25 * (b - a) + 0.5 * (c - a),
        "0.25*A[w] + 0.25*B[w] + 0.5*C[w]",
    ),
    "a mean of means": (
        lambda a, b, c: 0.5 * ((a + b) / 2) + 0.5 * ((a + c) / 2),
        "0.5*A[w] + 0.25*B[w] + 0.25*C[w]",
    ),
    "a delta": (lambda a, b, c: a - b, "1.0*A[w] + -1.0*B[w]"),
    "a term that cancels": (lambda a, b, c: (a - b) + (b - c), "1.0*A[w] + -1.0*B[w]"),
    "a term of nothing": (lambda a, b, c: 0.5 * a + 0.5 * c + 0 * b, "0.5*A[w] + 0.5*B[w]"),
    "everything cancels": (lambda a, b, c: (a - b) - (a - b), "0.0*A[w]"),
}


@pytest.mark.parametrize(("formula", "text"), SIMPLE.values(), ids=SIMPLE)
def test_chains_become_one_linear_combination(formula: Formula, text: str) -> None:
    assert formula_of(formula(*opened()).plan()) == text


COPIES: dict[str, Formula] = {
    "nothing done": lambda a, b, c: a,
    "times one": lambda a, b, c: 1 * a,
    "nothing of a task": lambda a, b, c: a + 0 * (b - a),
    "a task given and taken": lambda a, b, c: a + 0.3 * (b - c) - 0.3 * (b - c),
    "a whole task": lambda a, b, c: b + (a - b),
    "a third and two": lambda a, b, c: a / 3 + a / 3 + a / 3,
    "three over three": lambda a, b, c: (a + a + a) / 3,
    "ten tenths": lambda a, b, c: merge.linear([a] * 10, weight=0.1, normalize=False),
    "a mean of one": lambda a, b, c: merge.average([a] * 3),
}


@pytest.mark.parametrize("formula", COPIES.values(), ids=COPIES)
def test_what_equals_one_model_is_copied_and_no_other_is_read(
    formula: Formula, make_model: MakeModel, tmp_path: Path
) -> None:
    odd = torch.tensor([-0.0, 1e-45, 3.4e38, 1 / 3])  # what arithmetic could change
    states = [s | {"odd": odd} for s in three()]
    folders = [make_model(n, s) for n, s in zip("abc", states, strict=True)]
    result = formula(*map(merge.open, folders))
    plan = result.plan()
    assert plan.to_json()["copied_tensors"] == 4
    assert {formula_of(plan, n) for n in states[0]} == {f"A[{n}]" for n in states[0]}
    assert [f.path for f in plan.inputs] == [str(folders[0] / "model.safetensors")]
    result.save(tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in states[0].items():
        assert found[name].numpy().tobytes() == tensor.numpy().tobytes()


def test_an_input_is_read_once_however_often_it_is_named(make_model: MakeModel) -> None:
    a, b = (merge.open(make_model(n, state(i))) for i, n in enumerate("ab"))
    plan = (a + 0.5 * (b - a) + 0.25 * (b - a)).plan()
    assert plan.read_bytes == plan.input_bytes == 2 * 36 * 4


LONG = 600


def test_a_long_chain_of_sums_is_as_good_as_a_short_one() -> None:
    a, b, c = opened()
    total = a
    for i in range(LONG):
        total = total + (0.001 * (b - a) if i % 2 else 0.002 * (c - a))
    assert len(total) == 3 and total["w"].shape == (7, 5)
    found = total.state_dict()
    assert_near(found, three(), lambda a, b, c: a + LONG / 2 * (0.001 * (b - a) + 0.002 * (c - a)))


def test_a_long_moving_average_is_one_linear_combination() -> None:
    a, b, _ = opened()
    mean = a
    for _ in range(LONG):
        mean = 0.99 * mean + 0.01 * b
    assert mean.space == "weight"
    text = formula_of(mean.plan())
    assert text.count("*") == 2
    rest = 0.99**LONG
    assert_near(mean.state_dict(), three(), lambda a, b, c: rest * a + (1 - rest) * b)


# -- what does not fit ---------------------------------------------------------------------------


def test_models_of_other_tensors_are_refused_by_name() -> None:
    a = merge.open({"both": torch.ones(1), "mine": torch.ones(1)})
    b = merge.open({"both": torch.ones(1), "yours": torch.ones(1)})
    with pytest.raises(PlanError, match="do not hold the same tensors") as caught:
        a - b
    assert caught.value.found == "1 missing: mine; 1 extra: yours"
    assert caught.value.where == {"model": b.label, "against": a.label}


def test_of_many_missing_tensors_a_few_are_named() -> None:
    a = merge.open({f"w{i}": torch.ones(1) for i in range(9)})
    b = merge.open({"w0": torch.ones(1)})
    with pytest.raises(PlanError) as caught:
        a - b
    assert caught.value.found == "8 missing: w1, w2, w3, w4 and 4 more"


SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], str]] = {
    "rows": ((4, 3), (5, 3), "vocabulary"),
    "transposed": ((4, 3), (3, 4), "transpose"),
    "columns": ((4, 3), (4, 2), "same architecture"),
    "one more dimension": ((4, 3), (4, 3, 1), "same architecture"),
    "a scalar": ((1,), (), "same architecture"),
    "empty": ((3,), (0,), "same architecture"),
}


@pytest.mark.parametrize(("mine", "yours", "advice"), SHAPES.values(), ids=SHAPES)
def test_other_shapes_are_refused_with_both(
    mine: tuple[int, ...], yours: tuple[int, ...], advice: str
) -> None:
    a, b = (merge.open({"ok": torch.ones(1), "w": torch.ones(s)}) for s in (mine, yours))
    with pytest.raises(PlanError, match="different shapes") as caught:
        a - b
    assert caught.value.where["tensor"] == "w"
    assert caught.value.found == f"{list(yours)} in {b.label}"
    assert caught.value.expected == f"{list(mine)} as in {a.label}"
    assert advice in str(caught.value.do)


# -- types ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [torch.tensor([1, 2]), torch.tensor([True, False]), torch.tensor([1 + 1j])], ids=str
)
def test_what_is_no_float_must_be_equal_and_is_copied(value: torch.Tensor) -> None:
    a, b = ({"w": torch.full((1,), v), "ids": value.clone()} for v in (1.0, 3.0))
    found = (0.5 * merge.open(a) + 0.5 * merge.open(b)).state_dict()
    assert torch.equal(found["ids"], value)
    assert found["w"].item() == 2.0


@pytest.mark.parametrize(
    ("mine", "yours"),
    [([1, 2], [1, 3]), ([True, False], [True, True]), ([1 + 1j], [1 - 1j])],
    ids=str,
)
def test_what_is_no_float_and_differs_is_an_error_that_names_it(
    mine: list[Any], yours: list[Any], tmp_path: Path
) -> None:
    a, b = (merge.open({"w": torch.ones(1), "ids": torch.tensor(v)}) for v in (mine, yours))
    result = 0.5 * a + 0.5 * b
    with pytest.raises(SourceError, match="differs between the models") as caught:
        result.save(tmp_path / "out")
    assert caught.value.where["tensor"] == "ids"
    assert a.label in str(caught.value.found) and b.label in str(caught.value.found)
    assert not (tmp_path / "out").exists()


def test_a_counter_of_batches_may_differ() -> None:
    name = "bn.num_batches_tracked"
    a, b = (merge.open({"w": torch.ones(1), name: torch.tensor(n)}) for n in (5, 9))
    assert (0.5 * a + 0.5 * b).state_dict()[name].item() == 5


@pytest.mark.parametrize(
    ("mine", "yours"),
    [(torch.int64, torch.int32), (torch.float32, torch.int64), (torch.bool, torch.uint8)],
    ids=str,
)
def test_types_without_common_arithmetic_are_refused(mine: torch.dtype, yours: torch.dtype) -> None:
    a, b = (merge.open({"w": torch.ones(1, dtype=d)}) for d in (mine, yours))
    with pytest.raises(PlanError, match="mixes element types") as caught:
        0.5 * a + 0.5 * b
    assert caught.value.where["tensor"] == "w"
    names = sorted(str(d).removeprefix("torch.") for d in (mine, yours))
    assert caught.value.found == ", ".join(names)


MIXED = [
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.bfloat16, torch.float16, torch.float32),
    (torch.float64, torch.float16, torch.float64),
    (torch.float8_e4m3fn, torch.bfloat16, torch.bfloat16),
    (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16),
]


@pytest.mark.parametrize(("mine", "yours", "wanted"), MIXED, ids=str)
def test_mixed_floats_are_stored_as_the_type_that_holds_both(
    mine: torch.dtype, yours: torch.dtype, wanted: torch.dtype
) -> None:
    a, b = ({"w": torch.tensor([v]).to(d)} for v, d in ((1.0, mine), (2.0, yours)))
    mean = 0.5 * merge.open(a) + 0.5 * merge.open(b)
    assert any(n.startswith("1 tensor") and "mix element types" in n for n in mean.plan().notes)
    found = mean.state_dict()["w"]
    assert found.dtype == wanted
    assert found.item() == 1.5
    same = 0.5 * merge.open(a) + 0.5 * merge.open(a)
    assert not any("mix" in n for n in same.plan().notes)


def test_cast_is_how_floats_are_stored_and_leaves_integers(
    make_model: MakeModel, tmp_path: Path
) -> None:
    config = {"model_type": "toy", "torch_dtype": "float32"}
    values = {"w": torch.tensor([1 / 3]), "ids": torch.tensor([7])}
    model = merge.open(make_model("a", values, config=config))
    cast = model.cast("bf16")
    assert (cast["w"].dtype.name, cast["ids"].dtype.name) == ("bfloat16", "int64")
    assert model["w"].dtype.name == "float32"
    cast.save(tmp_path / "cast")
    model.save(tmp_path / "saved", dtype="bfloat16")
    for out in ("cast", "saved"):
        found = load_file(tmp_path / out / "model.safetensors")
        assert torch.equal(found["w"], values["w"].bfloat16())
        assert torch.equal(found["ids"], values["ids"])
        written = json.loads((tmp_path / out / "config.json").read_text())
        assert written == config | {"torch_dtype": "bfloat16"}


def test_the_order_of_the_terms_does_not_decide_the_type() -> None:
    a, b, _ = opened()
    kinds = {
        (0.5 * x + 0.5 * y)["w"].dtype
        for x, y in ((a.cast("bfloat16"), b), (b, a.cast("bfloat16")))
    }
    assert len(kinds) == 1


def test_a_value_too_large_for_its_type_is_an_error() -> None:
    large = merge.open({"w": torch.tensor([1.0, 1e6])})
    with pytest.raises(PlanError, match="too large for float16") as caught:
        large.cast("float16").state_dict()
    assert caught.value.where["tensor"] == "w"
    assert "index 1" in str(caught.value.found)


@pytest.mark.parametrize("dtype", ["int8", "bfloat61", "", "float32 "])
def test_an_unknown_type_is_refused(dtype: str) -> None:
    with pytest.raises(RecipeError, match="unknown dtype"):
        opened()[0].cast(dtype)


# -- tied weights --------------------------------------------------------------------------------


class Tied(nn.Module):
    """A head that is the embedding."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.embed.weight
        nn.init.constant_(self.embed.weight, value)


EMBED, HEAD = "embed.weight", "head.weight"


def test_a_tie_in_all_models_is_kept(tmp_path: Path) -> None:
    mean = merge.average([Tied(1.0), Tied(3.0)])
    found = mean.state_dict()
    assert found[HEAD] is found[EMBED]
    assert set(found[EMBED].flatten().tolist()) == {2.0}
    mean.save(tmp_path / "out")
    assert list(load_file(tmp_path / "out" / "model.safetensors")) == [EMBED]


@pytest.mark.parametrize("first", ["tied", "untied"])
@pytest.mark.parametrize("how", ["sum", "method", "delta method"])
def test_a_tie_in_one_model_only_is_split(first: str, how: str) -> None:
    tied = merge.open(Tied(1.0))
    untied = merge.open({EMBED: torch.full((3, 2), 3.0), HEAD: torch.full((3, 2), 5.0)})
    a, b = (tied, untied) if first == "tied" else (untied, tied)
    result = {
        "sum": lambda: 0.5 * a + 0.5 * b,
        "method": lambda: merge.average([a, b]),
        "delta method": lambda: merge.task_arithmetic([b], base=a, weight=0.5),
    }[how]()
    found = result.state_dict()
    assert set(found[EMBED].flatten().tolist()) == {2.0}
    assert set(found[HEAD].flatten().tolist()) == {3.0}


@pytest.mark.parametrize("first", ["module", "folder"])
def test_a_tied_module_fits_the_folder_it_was_saved_to(
    first: str, make_model: MakeModel, tmp_path: Path
) -> None:
    """Libraries save tied weights once, so the folder lacks a name that the module has."""
    folder = merge.open(make_model("saved", {EMBED: torch.full((3, 2), 3.0)}))
    module = merge.open(Tied(1.0))
    a, b = (module, folder) if first == "module" else (folder, module)
    mean = 0.5 * a + 0.5 * b
    assert set(mean.state_dict()[EMBED].flatten().tolist()) == {2.0}
    mean.save(tmp_path / "out")
    assert list(load_file(tmp_path / "out" / "model.safetensors")) == [EMBED]


def test_errors_of_arithmetic_are_of_the_family() -> None:
    a, b = merge.open({"w": torch.ones(2)}), merge.open({"w": torch.ones(3)})
    for combine in (
        lambda: a + b,
        lambda: merge.average([a, b]),
        lambda: merge.slerp([a, b], t=0.5),
    ):
        with pytest.raises(MergeError):
            combine()


def test_a_saved_difference_is_a_difference_when_it_is_opened_again(tmp_path: Path) -> None:
    a, b = merge.open({"w": torch.ones(2)}), merge.open({"w": torch.full((2,), 3.0)})
    (b - a).save(tmp_path / "delta")
    delta = merge.open(tmp_path / "delta")
    assert delta.space == "delta"
    assert (a + 0.5 * delta).state_dict()["w"].tolist() == [2.0, 2.0]
    (a + 0.5 * delta).save(tmp_path / "whole")
    assert merge.open(tmp_path / "whole").space == "weight"
