"""Tables of rows: which rows of which matrices make a new matrix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge.errors import PlanError
from merge.ir.rows import RowTable

ENTRIES = st.lists(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=4), max_size=12
)


def entries(table: RowTable) -> list[list[tuple[int, int]]]:
    """The table read back, a row at a time."""
    return [
        [(int(table.operand[e]), int(table.row[e])) for e in range(begin, end)]
        for begin, end in zip(table.begin.tolist(), table.end.tolist(), strict=True)
    ]


@given(ENTRIES)
def test_a_table_holds_what_it_was_made_of(wanted: list[list[tuple[int, int]]]) -> None:
    table = RowTable.of(wanted)
    assert entries(table) == wanted
    assert table.count == len(wanted)
    assert (table.begin.dtype, table.operand.dtype, table.row.dtype) == (
        np.int64,
        np.int32,
        np.int64,
    )


@given(ENTRIES, ENTRIES)
def test_tables_are_equal_when_their_rows_are(
    a: list[list[tuple[int, int]]], b: list[list[tuple[int, int]]]
) -> None:
    one, other = RowTable.of(a), RowTable.of(b)
    assert (one == other) == (a == b)
    assert one == RowTable.of(a) and hash(one) == hash(RowTable.of(a))
    assert one != "a table"


def test_a_table_of_single_entries_leaves_negative_rows_empty() -> None:
    table = RowTable.single(np.array([2, 0, 1]), np.array([5, -1, 0]))
    assert entries(table) == [[(2, 5)], [], [(1, 0)]]
    assert entries(RowTable.single(3, [1, 0])) == [[(3, 1)], [(3, 0)]]


def test_rows_may_share_their_entries() -> None:
    """As padding rows do, each the mean of a whole vocabulary."""
    table = RowTable.from_spans([0, 0, 0], [3, 3, 1], [0, 0, 0], [0, 1, 2])
    assert entries(table) == [[(0, 0), (0, 1), (0, 2)]] * 2 + [[(0, 0)]]


def test_the_arrays_are_copies_and_cannot_be_written() -> None:
    rows = np.arange(3)
    table = RowTable.single(0, rows)
    rows[0] = 7
    assert table.row.tolist() == [0, 1, 2]
    for array in (table.begin, table.end, table.operand, table.row):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_an_unchanged_operand_is_known() -> None:
    assert RowTable.single(1, np.arange(4)).identity_of([9, 4]) == 1
    assert RowTable.single(1, np.arange(4)).identity_of([9, 5]) is None  # the last row is cut
    assert RowTable.single(1, np.arange(4)).identity_of([4]) is None
    assert RowTable.single(0, [0, 2, 1]).identity_of([3]) is None
    assert RowTable.single(0, [0, 1, -1]).identity_of([3]) is None
    assert RowTable.single([0, 1], [0, 1]).identity_of([2, 2]) is None
    assert RowTable.of([[(0, 0)], [(0, 1), (0, 1)]]).identity_of([2]) is None
    assert RowTable.of([]).identity_of([0]) is None


def test_rows_that_are_not_there_are_refused() -> None:
    table = RowTable.of([[(0, 3)], [], [(1, 1)]])
    table.check([4, 2])
    RowTable.of([[]]).check([])
    with pytest.raises(PlanError, match="row 3 of operand 0") as beyond:
        table.check([3, 2])
    assert beyond.value.expected == "at most 2"
    with pytest.raises(PlanError, match="missing operand"):
        table.check([4])


@pytest.mark.parametrize(
    ("begin", "end", "operand", "row"),
    [
        ([0], [1, 1], [0], [0]),  # more ends than begins
        ([0], [1], [0, 0], [0]),
        ([0], [2], [0], [0]),  # an end beyond the entries
        ([1], [0], [0], [0]),
        ([-1], [1], [0], [0]),
        ([0], [1], [-1], [0]),
        ([0], [1], [0], [-1]),
        ([[0]], [[1]], [0], [0]),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    begin: list[int], end: list[int], operand: list[int], row: list[int]
) -> None:
    with pytest.raises(ValueError, match="must"):
        RowTable.from_spans(begin, end, operand, row)
