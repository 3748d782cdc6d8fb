"""The small problems of matching: exact, whatever they start from."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from merge.alignment.costs import Part
from merge.alignment.families import Tree
from merge.alignment.nested import (
    Solved,
    arrays,
    from_arrays,
    solve,
    solve_together,
    still,
    value_of,
)
from merge.alignment.solvers import assign, assign_signed, phases, potentials, procrustes


def scores(size: int, seed: int, kind: str) -> Any:
    draw = np.random.default_rng(seed)
    noise = draw.normal(size=(size, size))
    if kind == "structured":
        noise[draw.permutation(size), np.arange(size)] += 3.0
    if kind == "ties":
        noise = np.round(noise)
    return noise


KINDS = st.sampled_from(["noise", "structured", "ties"])


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 999), KINDS)
def test_an_assignment_is_worth_as_much_as_scipys(size: int, seed: int, kind: str) -> None:
    given_ = scores(size, seed, kind)
    rows, columns = scipy.optimize.linear_sum_assignment(given_, maximize=True)
    found = assign(given_.copy())
    assert sorted(found.index) == list(range(size))
    assert found.value == pytest.approx(given_[rows, columns].sum())
    assert found.value == pytest.approx(given_[np.arange(size), found.index].sum())


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(0, 999), KINDS, st.integers(0, 999))
def test_potentials_of_whatever_kind_change_no_value(
    size: int, seed: int, kind: str, other: int
) -> None:
    given_ = scores(size, seed, kind)
    plain = assign(given_.copy())
    columns = np.random.default_rng(other).normal(size=size)
    assert assign(given_.copy(), columns=columns).value == pytest.approx(plain.value)


@settings(deadline=None)
@given(st.integers(2, 30), st.integers(0, 999), KINDS)
def test_potentials_prove_the_assignment_where_they_settle(size: int, seed: int, kind: str) -> None:
    """With enough rounds no pair is worth more than the chosen ones of its row and column."""
    given_ = scores(size, seed, kind)
    index = assign(given_.copy()).index
    reduced = given_ - potentials(given_, index, rounds=size + 1)
    assert (reduced.max(axis=1) <= reduced[np.arange(size), index] + 1e-9).all()


def test_of_equal_assignments_the_start_stays() -> None:
    start = np.array([2, 0, 1])
    assert (assign(np.zeros((3, 3)), start).index == start).all()
    better = np.eye(3)
    assert (assign(better, start).index == [0, 1, 2]).all()


def test_a_large_assignment_gives_potentials_for_the_next() -> None:
    given_ = scores(600, 0, "noise")
    first = assign(given_.copy())
    again = assign(given_ + 1e-3 * scores(600, 1, "noise"), columns=first.potentials)
    assert again.value == pytest.approx(assign(given_ + 1e-3 * scores(600, 1, "noise")).value)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(0, 999))
def test_signs_and_orders_are_the_best_of_all(size: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    signed, unsigned = draw.normal(size=(2, size, size))
    best = max(
        sum(s * signed[i, p[i]] + unsigned[i, p[i]] for i, s in enumerate(signs))
        for p in itertools.permutations(range(size))
        for signs in itertools.product([1, -1], repeat=size)
    )
    found = assign_signed(signed.copy(), unsigned)
    assert found.value == pytest.approx(best) and found.sign is not None
    rows = np.arange(size)
    taken = found.sign * signed[rows, found.index] + unsigned[rows, found.index]
    assert taken.sum() == pytest.approx(best)


def test_a_rotation_is_found_and_worth_the_nuclear_norm() -> None:
    draw = np.random.default_rng(0)
    a = draw.normal(size=(20, 5))
    rotation = np.linalg.qr(draw.normal(size=(5, 5)))[0]
    found, value = procrustes(a.T @ (a @ rotation))
    np.testing.assert_allclose(found, rotation, atol=1e-12)
    assert value == pytest.approx((a * a).sum())


@given(st.integers(1, 4), st.integers(0, 99))
def test_phases_turn_planes_as_well_as_can_be(half: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    given_ = draw.normal(size=(2 * half, 2 * half))
    found, value = phases(given_)
    np.testing.assert_allclose(found @ found.T, np.eye(2 * half), atol=1e-12)
    assert (found * given_).sum() == pytest.approx(value)
    for angle in np.linspace(0, 2 * np.pi, 37):
        matrix = found.copy()
        matrix[[0, half], [0, half]] = np.cos(angle)
        matrix[0, half], matrix[half, 0] = -np.sin(angle), np.sin(angle)
        assert (matrix * given_).sum() <= value + 1e-9


def test_a_plane_that_says_nothing_stays() -> None:
    assert (phases(np.zeros((4, 4)))[0] == np.eye(4)).all()


# -- groups within groups --------------------------------------------------------------------------
SLOT, VALUE = Tree("slot", 2, True), Tree("v", 2, True)
HEADS = Tree("kv", 3, True, (SLOT, VALUE))


def random_part(groups: tuple[str, ...], seed: int) -> Part:
    sizes = {"kv": 3, "slot": 2, "v": 2}
    shape = [sizes[g] for g in groups] * 2
    return Part(groups, np.random.default_rng(seed).normal(size=shape))


def every(tree: Tree) -> list[Solved]:
    """All matchings of a tree."""
    found = []
    for index in itertools.permutations(range(tree.size)):
        inner = [
            dict(zip([t.group for t in tree.below], choice, strict=True))
            for choice in itertools.product(*(every(t) for t in tree.below))
        ]
        for below in itertools.product(inner, repeat=tree.size) if tree.below else [()]:
            found.append(Solved(np.array(index), below))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_one_group_within_another_is_matched_exactly(seed: int) -> None:
    tree = Tree("kv", 3, True, (SLOT,))
    parts = [random_part(("kv", "slot"), seed), random_part(("kv",), seed + 50)]
    found, value = solve(tree, parts, still(tree))
    best = max(value_of([tree], parts, {"kv": s}) for s in every(tree))
    assert value == pytest.approx(best) == pytest.approx(value_of([tree], parts, {"kv": found}))


@pytest.mark.parametrize("seed", range(5))
def test_few_slots_and_their_values_are_matched_exactly(seed: int) -> None:
    parts = [
        random_part(("kv", "slot"), seed),
        random_part(("kv", "v"), seed + 50),
        random_part(("kv", "slot", "v"), seed + 99),
    ]
    found, value = solve(HEADS, parts, still(HEADS))
    best = max(value_of([HEADS], parts, {"kv": s}) for s in every(HEADS))
    assert value == pytest.approx(best) == pytest.approx(value_of([HEADS], parts, {"kv": found}))


@pytest.mark.parametrize("seed", range(5))
def test_many_slots_and_their_values_never_lose(seed: int) -> None:
    slot, inner = Tree("slot", 6, True), Tree("v", 5, True)
    draw = np.random.default_rng(seed)
    parts = [Part(("slot",), draw.normal(size=(6, 6))), Part(("v",), draw.normal(size=(5, 5))),
             Part(("slot", "v"), draw.normal(size=(6, 5, 6, 5)))]  # fmt: skip
    start = {"slot": Solved(draw.permutation(6)), "v": Solved(draw.permutation(5))}
    found, value = solve_together([slot, inner], parts, start)
    assert value >= value_of([slot, inner], parts, start)
    assert value == pytest.approx(value_of([slot, inner], parts, found))
    assert solve_together([slot, inner], parts, found)[1] >= value - 1e-9


def test_heads_that_stay_have_values_that_move() -> None:
    tree = Tree("h", 2, False, (VALUE,))
    part = Part(("h", "v"), np.zeros((2, 2, 2, 2)))
    part.products[0, :, 0, :] = [[0, 1], [1, 0]]
    part.products[0, :, 1, :] = 9.0  # another head, which must not matter
    found, value = solve(tree, [part], still(tree))
    assert arrays(tree, found)["v"].tolist() == [[1, 0], [0, 1]] and value == 2.0


def test_a_matching_and_its_arrays_are_one() -> None:
    """What lies within a head is told by the head's old number."""
    inner = [{"slot": Solved(np.array(s)), "v": Solved(np.array(v))}
             for s, v in (([1, 0], [0, 1]), ([0, 1], [1, 0]), ([1, 0], [1, 0]))]  # fmt: skip
    solved = Solved(np.array([2, 0, 1]), tuple(inner))
    made = arrays(HEADS, solved)
    assert made["slot"].tolist() == [[0, 1], [1, 0], [1, 0]]
    back = from_arrays(HEADS, made)
    assert [b["slot"].index.tolist() for b in back.below] == [[1, 0], [0, 1], [1, 0]]
    assert {k: v.tolist() for k, v in arrays(HEADS, back).items()} == {
        k: v.tolist() for k, v in made.items()
    }
