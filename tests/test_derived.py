"""Tensors made of stored ones: parts, joins, rows, thin products, scaled codes, whole functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import merge
from merge.checkpoint.memory import open_state_dict
from merge.errors import PlanError
from merge.ir.checkpoint import Checkpoint
from merge.ir.derived import (
    BlockScaled,
    Cast,
    Concat,
    Gather,
    LowRank,
    Whole,
    Window,
    cast,
    concat,
    gather,
    window,
)
from merge.ir.dtypes import BF16, BY_NAME, F32
from merge.ir.expr import Expr, Linear, linear_sum
from merge.ir.merging import merge_checkpoints
from merge.ir.rows import RowTable
from merge.methods import get

from .expressions import saved, stored, value

Stored = Callable[..., Expr]


def counting(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(math.prod(shape)).reshape(shape).to(dtype)


# -- parts and joins -------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_window_is_a_run_of_elements(dtype: torch.dtype) -> None:
    whole = counting(4, 3, 2, dtype=dtype)
    assert torch.equal(value(window(stored(whole), 6, (3, 2))), whole[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_parts_are_joined_along_the_first_axis(dtype: torch.dtype) -> None:
    a, b = counting(2, 3, dtype=dtype), counting(1, 3, dtype=dtype)
    assert torch.equal(value(concat([stored(a), stored(b)], (3, 3))), torch.cat([a, b]))


def test_parts_of_different_types_are_joined_as_the_wider() -> None:
    a, b = counting(2, 3, dtype=torch.bfloat16), counting(2, 3)
    joined = value(concat([stored(a), stored(b)], (4, 3)))
    assert joined.dtype == torch.float32 and torch.equal(joined, torch.cat([a.float(), b]))


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.data())
def test_a_window_of_parts_is_what_lies_there(sizes: list[int], data: st.DataObject) -> None:
    parts = [torch.randn(n, 2) for n in sizes]
    whole = torch.cat(parts)
    start = data.draw(st.integers(0, whole.numel() - 1))
    length = data.draw(st.integers(1, whole.numel() - start))
    joined = concat([stored(p) for p in parts], tuple(whole.shape))
    assert torch.equal(value(window(joined, start, (length,))), whole.reshape(-1)[start:][:length])


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6))
def test_taking_apart_and_joining_is_no_work(count: int, size: int) -> None:
    whole = stored(torch.randn(count, size, 2))
    parts = [window(whole, i * size * 2, (size, 2)) for i in range(count)]
    assert concat(parts, (count, size, 2)) == whole
    joined = concat([stored(torch.randn(size, 2)) for _ in range(count)], (count, size, 2))
    again = [window(joined, i * size * 2, (size, 2)) for i in range(count)]
    assert concat(again, (count, size, 2)) == joined


def test_a_part_of_parts_is_that_part() -> None:
    a, b = stored(torch.randn(2, 3)), stored(torch.randn(2, 3))
    joined = concat([a, b], (2, 2, 3))
    assert window(joined, 6, (2, 3)) is b
    assert window(window(joined, 6, (6,)), 3, (3,)) == window(b, 3, (3,))


def test_moved_bytes_are_copied_as_they_are() -> None:
    """Also a NaN with a payload and a negative zero, which arithmetic would change."""
    odd = torch.tensor([0x7F801234, -0x80000000], dtype=torch.int32).view(torch.float32)
    joined = concat([window(stored(odd), 1, (1,)), window(stored(odd), 1, (1,))], (2,))
    assert value(joined).view(torch.int32).tolist() == [-0x80000000] * 2


@pytest.mark.parametrize(("start", "shape"), [(-1, (2,)), (3, (4,)), (0, (7,))])
def test_a_window_beyond_its_operand_is_refused(start: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="of 6"):
        window(stored(torch.zeros(2, 3)), start, shape)


def test_parts_that_do_not_fill_the_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="6 elements"):
        concat([stored(torch.zeros(2, 3))], (3, 3))


# -- rows ------------------------------------------------------------------------------------------
def slow_rows(tensors: Sequence[Tensor], entries: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    width = tensors[0].shape[-1]
    out = torch.zeros(len(entries), width, dtype=torch.float64)
    for i, row in enumerate(entries):
        for operand, at in row:
            out[i] += tensors[operand][at].double() / len(row)
    return out


def tables(rows: Sequence[int]) -> st.SearchStrategy[list[list[tuple[int, int]]]]:
    entry = st.one_of(*(st.tuples(st.just(i), st.integers(0, n - 1)) for i, n in enumerate(rows)))
    return st.lists(st.lists(entry, max_size=3), min_size=1, max_size=40)


@settings(deadline=None)
@given(tables([5, 7, 3]))
def test_rows_are_means_of_the_rows_that_a_table_says(entries: list[list[tuple[int, int]]]) -> None:
    tensors = [torch.randn(n, 6) for n in (5, 7, 3)]
    made = gather([stored(t) for t in tensors], RowTable.of(entries), (len(entries), 6))
    torch.testing.assert_close(value(made).double(), slow_rows(tensors, entries), rtol=0, atol=1e-6)


def test_rows_do_not_depend_on_tiles_and_threads(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, 96, generator=generator) for n in (3000, 2500)]
    entries = [[(i % 2, (i * 7) % 2500)] for i in range(4000)]
    entries += [[(0, i) for i in range(2999)]] * 3 + [[]]
    table = RowTable.of(entries)
    delta = linear_sum([(1.0, stored(tensors[0])), (0.5, stored(torch.ones(3000, 96)))])
    made = gather([delta, stored(tensors[1])], table, (len(entries), 96))
    first = saved(made, tmp_path / "a", threads=1, memory="1GiB")
    assert first == saved(made, tmp_path / "b", threads=3, memory="4MiB")
    wanted = slow_rows([tensors[0] + 0.5, tensors[1]], entries)
    torch.testing.assert_close(value(made).double(), wanted, rtol=0, atol=1e-6)


def test_a_table_that_changes_nothing_is_nothing() -> None:
    a, b = stored(torch.randn(3, 2)), stored(torch.randn(3, 2))
    assert gather([a, b], RowTable.single([1, 1, 1], [0, 1, 2]), (3, 2)) is b


def test_operands_that_no_row_is_of_are_not_read() -> None:
    a, b, c = (stored(torch.randn(3, 2)) for _ in range(3))
    made = gather([a, b, c], RowTable.single([2, 0], [1, 1]), (2, 2))
    assert isinstance(made, Gather) and made.operands == (a, c)
    assert torch.equal(value(made), torch.stack([value(c)[1], value(a)[1]]))


def test_rows_that_nobody_has_are_zeros() -> None:
    made = gather([stored(torch.ones(3, 2))], RowTable.of([[], []]), (2, 2))
    assert torch.equal(value(made), torch.zeros(2, 2))


@pytest.mark.parametrize("shape", [(4,), (1, 4)])
def test_a_bias_has_rows_of_one_element(shape: tuple[int, ...]) -> None:
    bias = torch.tensor([1.0, 2.0, 3.0]).reshape(*shape[:-1], 3)
    made = gather([stored(bias)], RowTable.single(0, [2, 0, -1, 1]), shape)
    assert value(made).reshape(-1).tolist() == [3.0, 1.0, 0.0, 2.0]


def test_a_row_that_is_not_there_is_refused() -> None:
    with pytest.raises(PlanError, match="beyond the end"):
        gather([stored(torch.zeros(3, 2))], RowTable.single(0, [3]), (1, 2))


@pytest.mark.parametrize("name", ["ties", "slerp", "tsv"])
def test_rows_of_a_methods_result_are_rows_of_that_result(name: str) -> None:
    """A method that measures, or works on whole tensors, under a table of fewer rows or more."""
    base, *tuned = (open_state_dict({"w": torch.randn(6, 4)}) for _ in range(3))
    parameters = {"ties": {"weight": 1.0, "density": 0.5}, "slerp": {"t": 0.3}, "tsv": {}}[name]
    models = [base, tuned[0]] if name == "slerp" else tuned
    bound = get(name).bind(len(models), parameters)
    merged = merge_checkpoints(get(name), models, base, lambda _: bound)
    whole = merged.state_dict()["w"]
    rows = [5, 5, 0, 1, 2, 4, 3, 3]
    for count in (3, 8):
        table = RowTable.single(0, rows[:count])
        found = value(gather([merged.tensors["w"]], table, (count, 4)))
        assert torch.equal(found, whole[rows[:count]])


# -- thin products ---------------------------------------------------------------------------------
@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.booleans())
def test_a_thin_product_is_the_product(m: int, n: int, rank: int, transposed: bool) -> None:
    left, right = torch.randn(m, rank), torch.randn(rank, n)
    wanted = left.double() @ right.double()
    wanted = wanted.T if transposed else wanted
    shape = tuple(wanted.shape)
    made = value(LowRank((stored(left), stored(right)), rank, transposed, shape, F32))
    torch.testing.assert_close(made.double(), wanted, rtol=0, atol=1e-5)


def test_a_thin_product_does_not_depend_on_tiles_and_threads(tmp_path: Path) -> None:
    left, right = torch.randn(700, 8), torch.randn(8, 1100)
    base = stored(torch.randn(700, 1100).bfloat16())
    product = LowRank((stored(left), stored(right)), 8, False, (700, 1100), BF16)
    tuned = linear_sum([(1.0, base), (2.0, product)])
    first = saved(tuned, tmp_path / "a", threads=1, memory="1GiB")
    assert first == saved(tuned, tmp_path / "b", threads=2, memory="8MiB")
    wanted = value(base).double() + 2.0 * (left.double() @ right.double())
    torch.testing.assert_close(value(tuned).double(), wanted, rtol=2**-8, atol=1e-5)


def test_a_product_is_all_that_is_left_of_a_difference() -> None:
    base = stored(torch.randn(4, 6))
    product = LowRank((stored(torch.randn(4, 2)), stored(torch.randn(2, 6))), 2, False, (4, 6), F32)
    tuned = linear_sum([(1.0, base), (0.5, product)])
    assert linear_sum([(1.0, tuned), (-1.0, base)]) == Linear(((0.5, product),))


def test_a_kernels_axes_are_columns() -> None:
    left, right = torch.randn(8, 2, 1, 1), torch.randn(2, 3, 5, 5)
    made = LowRank((stored(left), stored(right)), 2, False, (8, 3, 5, 5), F32)
    wanted = torch.einsum("or,rikl->oikl", left[:, :, 0, 0], right)
    torch.testing.assert_close(value(made), wanted)


# -- scaled codes ----------------------------------------------------------------------------------
def test_four_codes_and_a_scale_for_each_column() -> None:
    codes = torch.tensor([[1.0, 2.0], [-3.0, 0.5]]).to(torch.float8_e4m3fn)
    scales = torch.tensor([[10.0, 100.0]])
    made = BlockScaled((stored(codes), stored(scales)), (2, 1), (2, 2), F32)
    assert value(made).tolist() == [[10.0, 200.0], [-30.0, 50.0]]


@settings(deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4)
)
def test_codes_are_times_the_scale_of_their_block(
    experts: int, rows: int, columns: int, high: int, wide: int
) -> None:
    codes = torch.randn(experts, rows, columns).to(torch.float8_e4m3fn)
    scales = torch.rand(experts, -(-rows // high), -(-columns // wide))
    spread = scales.repeat_interleave(high, 1)[:, :rows].repeat_interleave(wide, 2)[..., :columns]
    made = BlockScaled((stored(codes), stored(scales)), (high, wide), tuple(codes.shape), F32)
    assert torch.equal(value(made), codes.float() * spread)


# -- whole tensors ---------------------------------------------------------------------------------
def turned(values: Tensor, codes: Tensor, *, by: float) -> Tensor:
    return (values.T * by).contiguous() + codes.to(values.dtype)


def test_a_function_of_whole_tensors_gets_them_in_their_shapes_and_types() -> None:
    values, codes = torch.randn(3, 5), torch.arange(15, dtype=torch.uint8).reshape(5, 3)
    operands = (stored(values), stored(codes))
    made = Whole("turned", turned, operands, (("by", 2.0),), (5, 3), F32)
    assert torch.equal(value(made), values.T * 2.0 + codes.float())


def test_a_stack_is_computed_part_by_part() -> None:
    """Of many whole parts only one at a time is held: the budget is that of a part."""
    parts = [
        Whole("turned", _twice, (stored(torch.randn(256, 1024)),), (), (1024, 256), F32)
        for _ in range(16)
    ]
    stack = concat(parts, (16, 1024, 256))
    plan = Checkpoint({"out": stack}, "test").plan(threads=1)
    assert plan.steps[0].grain == plan.steps[0].chunk == 256 * 1024
    assert plan.budget.buffers < 16 * 1024 * 256 * 4
    assert torch.equal(value(stack), torch.stack([value(p) for p in parts]))


def _twice(values: Tensor) -> Tensor:
    return (values.T * 2).contiguous()


# -- other types -----------------------------------------------------------------------------------
def test_a_tensor_of_another_type_is_rounded_once_at_the_end() -> None:
    """As stored in bfloat16 each of the terms would lose what makes it differ from 1."""
    fine = torch.full((4,), 1 + 2**-9)
    sum_ = linear_sum([(1.0, cast(stored(fine), BF16)), (1.0, cast(stored(fine), BF16))])
    assert sum_.dtype == BF16
    coarse = linear_sum([(0.5, sum_), (-1.0, stored(torch.ones(4).bfloat16()))])
    assert value(coarse).tolist() == [0.0019531250] * 4
    assert value(cast(stored(fine), BF16)).tolist() == fine.bfloat16().tolist()


def test_a_tensor_of_its_own_type_stays_what_it_is() -> None:
    it = stored(torch.ones(3))
    assert cast(it, F32) is it


# -- all of them under methods ---------------------------------------------------------------------
KINDS = ["window", "concat", "cast", "gather", "low rank", "scaled", "whole"]


def every(kind: str) -> Expr:
    """A (6, 8) tensor of each kind."""
    w = stored(torch.randn(6, 8))
    made: dict[str, Expr] = {
        "window": window(stored(torch.randn(9, 8)), 16, (6, 8)),
        "concat": concat([stored(torch.randn(2, 8)), stored(torch.randn(4, 8))], (6, 8)),
        "cast": Cast((stored(torch.randn(6, 8, dtype=torch.float64)),), F32),
        "gather": gather([w], RowTable.single(0, [5, 4, 3, 2, 1, 0]), (6, 8)),
        "low rank": LowRank((stored(torch.randn(6, 2)), stored(torch.randn(2, 8))), 2, False,
                            (6, 8), F32),
        "scaled": BlockScaled((w, stored(torch.rand(3, 2))), (2, 4), (6, 8), F32),
        "whole": Whole("twice", _twice, (stored(torch.randn(8, 6)),), (), (6, 8), F32),
    }  # fmt: skip
    return made[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["linear", "ties", "slerp", "model_stock", "tsv", "nuslerp"])
def test_methods_work_on_all_of_them(kind: str, name: str) -> None:
    """As on the same numbers stored plainly."""
    torch.manual_seed(0)
    exprs = [every(kind) for _ in range(3)]
    plain = [stored(value(e)) for e in exprs]
    made = []
    for group in (exprs, plain):
        base, *models = (Checkpoint({"w": e}, f"m{i}") for i, e in enumerate(group))
        if name == "slerp":
            out = merge.slerp([models[0]], base=base, t=0.4)
        else:
            weights = {"weight": 0.7} if "weight" in get(name).parameters else {}
            out = getattr(merge, name)(models, base=base, **weights)
        made.append(out.state_dict()["w"])
    torch.testing.assert_close(made[0], made[1], rtol=1e-6, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(KINDS))
def test_equal_formulas_are_equal_plans(kind: str) -> None:
    torch.manual_seed(0)
    expr = every(kind)
    steps = [Checkpoint({"w": expr}, "m").plan().to_json(tensors=True)["steps"] for _ in range(2)]
    assert steps[0] == steps[1]


def test_a_plan_says_what_is_made_of_what() -> None:
    parts = concat([every("window"), every("low rank")], (12, 8))
    shown = Checkpoint({"w": parts}, "m").plan().to_json(tensors=True)["steps"][0]["formula"]
    assert shown.startswith("concat(") and "[from 16 as 6x8]" in shown and "rank 2" in shown


def test_the_types_of_made_tensors() -> None:
    assert isinstance(every("window"), Window) and isinstance(every("concat"), Concat)
    assert every("scaled").dtype == BY_NAME["float32"]
