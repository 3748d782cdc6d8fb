"""Tensors with coordinates in a new order: laws, with plain indexing as the truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import merge
from merge.errors import SourceError
from merge.ir.checkpoint import Checkpoint, combine
from merge.ir.derived import Reorder, Whole, concat, reorder, window
from merge.ir.dtypes import F32
from merge.ir.expr import Expr, Linear, Read, Same, linear_sum
from merge.ir.orders import Permutation
from merge.methods import get
from merge.plan.simplify import simplify

from .expressions import saved, stored, value

Orders = Sequence[Permutation | None]


def indexed(tensor: Tensor, orders: Orders) -> Tensor:
    """The definition: element (i, j, ...) is element (a[i], b[i, j] or b[j], ...)."""
    grid = list(torch.meshgrid(*(torch.arange(n) for n in tensor.shape), indexing="ij"))
    index = []
    for at, order in zip(grid, orders, strict=True):
        if order is None:
            index.append(at)
        else:
            table = torch.from_numpy(order.index.copy())
            index.append(table[grid[0], at] if order.stacked else table[at])
    return tensor[tuple(index)]


def shuffled(shape: Sequence[int], seed: int, moved: Sequence[bool], stacked: bool) -> Orders:
    """Orders of the axes ``moved``; all but the first in a stack of them, if so wished."""
    draw = np.random.default_rng(seed)
    orders: list[Permutation | None] = []
    for axis, (size, moves) in enumerate(zip(shape, moved, strict=True)):
        rows = shape[0] if stacked and axis else 1
        stack = np.stack([draw.permutation(size) for _ in range(rows)])
        orders.append(Permutation.of(stack if rows > 1 else stack[0]) if moves else None)
    return orders


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], Orders, Orders]:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    made = [
        shuffled(shape, draw(st.integers(0, 99)), [draw(st.booleans()) for _ in shape], stacked)
        for stacked in (draw(st.booleans()), draw(st.booleans()))
    ]
    return shape, made[0], made[1]


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


# -- what it means ---------------------------------------------------------------------------------
@settings(deadline=None, max_examples=200)
@given(cases())
def test_every_element_comes_from_where_the_orders_say(
    case: tuple[tuple[int, ...], Orders, Orders],
) -> None:
    shape, orders, _ = case
    tensor = noise(*shape)
    assert torch.equal(value(reorder(stored(tensor), orders)), indexed(tensor, orders))


@settings(deadline=None, max_examples=200)
@given(cases())
def test_two_orders_are_one(case: tuple[tuple[int, ...], Orders, Orders]) -> None:
    shape, first, second = case
    tensor = noise(*shape)
    made = reorder(reorder(stored(tensor), first), second)
    assert not (isinstance(made, Reorder) and isinstance(made.operands[0], Reorder))
    assert torch.equal(value(made), indexed(indexed(tensor, first), second))


def test_an_order_and_its_inverse_are_nothing() -> None:
    operand, order = stored(noise(5, 4)), Permutation.of([3, 1, 4, 0, 2])
    back = Permutation.of(np.argsort(order.index))
    assert reorder(reorder(operand, [order, None]), [back, None]) is operand
    assert reorder(operand, [Permutation.of(range(5)), None]) is operand


def test_three_units_by_hand() -> None:
    """Unit 2 first: the rows of one matrix, the columns of the next, the biases."""
    order = Permutation.of([2, 0, 1])
    up = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    assert value(reorder(stored(up), [order, None])).tolist() == [[3, 3], [1, 1], [2, 2]]
    assert value(reorder(stored(up.T.contiguous()), [None, order])).tolist() == [[3, 1, 2]] * 2
    assert value(reorder(stored(up[:, 0].contiguous()), [order])).tolist() == [3, 1, 2]


def test_units_of_each_expert_have_an_order_of_their_own() -> None:
    stack = torch.arange(12.0).reshape(2, 3, 2)  # experts, features, units
    units = Permutation.of([[1, 0], [0, 1]])
    made = reorder(stored(stack), [Permutation.of([1, 0]), None, units])
    assert value(made)[0].tolist() == [[7, 6], [9, 8], [11, 10]]
    assert value(made)[1].tolist() == stack[0].tolist()


# -- bytes are moved -------------------------------------------------------------------------------
SHAPES: dict[str, tuple[tuple[int, ...], tuple[bool, ...]]] = {
    "matrix, both": ((700, 900), (True, True)),
    "matrix, rows": ((700, 900), (True, False)),
    "matrix, columns": ((700, 900), (False, True)),
    "long rows of little": ((9000, 80), (True, False)),
    "bias": ((5000,), (True,)),
    "kernel": ((64, 48, 3, 3), (True, True, False, False)),
    "kernel, inputs": ((64, 48, 3, 3), (False, True, False, False)),
    "many positions": ((12, 10, 40, 40), (True, True, False, False)),
    "experts": ((6, 200, 300), (True, True, True)),
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.float8_e5m2])
def test_bytes_are_the_same_for_any_tiles_and_threads(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    shape, moved = SHAPES[kind]
    bits = torch.randint(0, 100, shape, dtype=torch.int64)
    tensor = bits if dtype == torch.int64 else (bits / 64).to(dtype)
    orders = shuffled(shape, 1, moved, stacked=kind == "experts")
    made = reorder(stored(tensor), orders)
    first = saved(made, tmp_path / "a", threads=1, memory="1GiB")
    assert first == saved(made, tmp_path / "b", threads=3, memory="16MiB")
    as_bytes = tensor.view(torch.uint8).reshape(*shape, -1)
    assert torch.equal(
        value(made).view(torch.uint8).reshape(*shape, -1), indexed(as_bytes, [*orders, None])
    )


def test_a_negative_zero_and_the_payload_of_a_nan_stay_what_they_are(tmp_path: Path) -> None:
    odd = torch.tensor([-0.0, 1.0, 0.0]).to(torch.bfloat16)
    made = value(reorder(stored(odd), [Permutation.of([1, 0, 2])]))
    assert made.view(torch.int16).tolist() == odd.view(torch.int16)[[1, 0, 2]].tolist()


def test_an_input_that_is_not_finite_is_named() -> None:
    tensor = noise(4, 4)
    tensor[1, 2] = float("nan")
    made = reorder(stored(tensor), [Permutation.of([3, 2, 1, 0]), None])
    mean = linear_sum([(0.5, made), (0.5, stored(noise(4, 4)))])
    with pytest.raises(SourceError, match="not finite"):
        value(mean)


# -- under other nodes -----------------------------------------------------------------------------
def test_equal_orders_of_one_tensor_are_one_term() -> None:
    a, b = stored(noise(4, 3)), stored(noise(4, 3) + 1)
    orders = [Permutation.of([3, 2, 1, 0]), None]
    total = linear_sum([(0.5, reorder(a, orders)), (0.25, b), (0.5, reorder(a, orders))])
    assert total == Linear(((1.0, reorder(a, orders)), (0.25, b)))


def test_equal_orders_are_computed_once() -> None:
    a, orders = stored(noise(4, 3)), [Permutation.of([3, 2, 1, 0]), None]
    base = Checkpoint({"w": stored(noise(4, 3))}, "base")
    moved = [Checkpoint({"w": reorder(a, orders)}, "moved") for _ in range(2)]
    made = simplify(merge.ties(moved, base=base, weight=1.0).tensors["w"])
    assert len({id(e) for e in _orders(made)}) == 1


def _orders(expr: Expr) -> list[Expr]:
    return [expr] if isinstance(expr, Reorder) else [o for e in expr.operands for o in _orders(e)]


def test_what_simplifies_to_its_operand_is_that_operand() -> None:
    a = stored(noise(4, 3))
    orders = [Permutation.of([3, 2, 1, 0]), None]
    back = reorder(linear_sum([(0.5, reorder(a, orders)), (0.5, reorder(a, orders))]), orders)
    assert isinstance(simplify(back), Read)


@pytest.mark.parametrize("kind", ["window", "concat", "whole", "linear", "ties", "tsv"])
def test_what_is_computed_is_moved_too(kind: str) -> None:
    parts = [stored(noise(6, 8) * (i + 1)) for i in range(3)]
    base, *models = (Checkpoint({"w": e}, f"m{i}") for i, e in enumerate(parts))
    operand: dict[str, Expr] = {
        "window": window(stored(noise(9, 8)), 16, (6, 8)),
        "concat": concat([stored(noise(2, 8)), stored(noise(4, 8))], (6, 8)),
        "whole": Whole("turned", _turned, (stored(noise(8, 6)),), (), (6, 8), F32),
        "linear": linear_sum([(0.5, parts[0]), (1.0, parts[1])]),
        "ties": merge.ties(models, base=base, weight=1.0).tensors["w"],
        "tsv": merge.tsv(models, base=base).tensors["w"],
    }
    orders = shuffled((6, 8), 3, (True, True), stacked=False)
    made = value(reorder(operand[kind], orders))
    assert torch.equal(made, indexed(value(operand[kind]), orders))


def _turned(values: Tensor) -> Tensor:
    return values.T.contiguous()


@pytest.mark.parametrize("name", ["linear", "ties", "slerp", "tsv", "nuslerp"])
def test_methods_work_on_moved_tensors(name: str) -> None:
    orders = shuffled((6, 8), 3, (True, True), stacked=False)
    tensors = [noise(6, 8) + i * noise(8, 6).reshape(6, 8) for i in range(3)]
    made = []
    for moved in (
        [reorder(stored(t), orders) for t in tensors],
        [stored(indexed(t, orders)) for t in tensors],
    ):
        base, *models = (Checkpoint({"w": e}, f"m{i}") for i, e in enumerate(moved))
        if name == "slerp":
            out = merge.slerp([models[0]], base=base, t=0.4)
        else:
            weights = {"weight": 0.7} if "weight" in get(name).parameters else {}
            out = getattr(merge, name)(models, base=base, **weights)
        made.append(out.state_dict()["w"])
    assert torch.equal(made[0], made[1])


def test_whole_numbers_in_a_new_order_must_agree_too() -> None:
    order = [Permutation.of([1, 0])]
    a, b = torch.tensor([1, 2]), torch.tensor([2, 1])
    same = combine("steps", [(0.5, stored(a)), (0.5, reorder(stored(b), order))])
    assert isinstance(same, Same) and value(same).tolist() == [1, 2]
    other = combine("steps", [(0.5, stored(a)), (0.5, reorder(stored(a), order))])
    with pytest.raises(SourceError, match="differs between the models"):
        value(other)


# -- as data ---------------------------------------------------------------------------------------
def test_a_plan_says_which_axes_move() -> None:
    made = reorder(stored(noise(4, 3)), [None, Permutation.of([2, 0, 1])])
    step = Checkpoint({"w": made}, "m").plan().to_json(tensors=True)["steps"][0]
    assert step["formula"].startswith("reordered(") and "axis 1 by " in step["formula"]
    other = reorder(made, [None, Permutation.of([1, 0, 2])])
    again = Checkpoint({"w": other}, "m").plan().to_json(tensors=True)["steps"][0]
    assert again["formula"] != step["formula"]


def test_orders_are_equal_when_their_arrays_are() -> None:
    a, b = Permutation.of([1, 0]), Permutation.of(np.array([1, 0], np.int32))
    assert a == b and hash(a) == hash(b) and a != Permutation.of([0, 1])
    assert Permutation.of([[1, 0], [1, 0]]) == a
    with pytest.raises(ValueError, match="read-only"):
        a.index[0] = 0


@pytest.mark.parametrize("index", [[0, 0], [0, 2], [-1, 0], [], [[[0]]]])
def test_what_is_no_order_is_refused(index: object) -> None:
    with pytest.raises(ValueError, match="order"):
        Permutation.of(index)


@pytest.mark.parametrize(
    "orders", [[None], [Permutation.of([1, 0]), None], [Permutation.of([[0, 1], [1, 0]]), None]]
)
def test_an_order_that_does_not_fit_its_axis_is_refused(orders: Orders) -> None:
    with pytest.raises(ValueError, match="order"):
        reorder(stored(noise(3, 2)), orders)
