"""Which signs and scales a network lets pass: the linear equations on charges, solved.

Each occurrence of an atom has an unknown charge; each operation that was traced is a few linear
equations between them. Signs are solved modulo 2 (a sign squared is none), scales over the
rationals. A solution in which some parameter has a charge other than 0 is a symmetry.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from merge.tracing.atoms import Atom, Equation, Ref, leaves

__all__ = ["Charges", "solve_charges"]

Row = dict[int, Fraction]


@dataclass(slots=True)
class Charges:
    """Charges of occurrences by their number; an atom that is not there may not be acted on."""

    signs: dict[Atom, dict[int, int]] = field(default_factory=dict)
    scales: dict[Atom, dict[int, int]] = field(default_factory=dict)


def solve_charges(equations: Iterable[Equation], parameters: Sequence[Ref]) -> Charges:
    """The charges of the parameters' occurrences, for each atom that has any but zero.

    Of several independent solutions the one is taken in which most parameters take part.
    """
    rows: dict[Atom, list[tuple[dict[int, int], bool, bool]]] = defaultdict(list)
    for equation in equations:
        for atom, terms in _by_leaf(equation):
            rows[atom].append((terms, equation.signs, equation.scales))
    wanted: dict[Atom, list[int]] = defaultdict(list)
    for ref in parameters:
        wanted[ref.root].append(ref.number)
    out = Charges()
    for atom, numbers in wanted.items():
        if atom.frozen:
            continue
        signs = _solved((terms for terms, s, _ in rows[atom] if s), numbers, modulo=2)
        scales = _solved((terms for terms, _, s in rows[atom] if s), numbers, modulo=0)
        if signs:
            out.signs[atom] = signs
        if scales:
            out.scales[atom] = scales
    return out


def _by_leaf(equation: Equation) -> list[tuple[Atom, dict[int, int]]]:
    """The equation on occurrences of refined atoms as equations on what they were refined to."""
    columns = [list(leaves([ref])) for _, ref in equation.terms]
    fits = all(len(c) == len(columns[0]) for c in columns) and all(
        len({leaf.root for leaf in level}) == 1 for level in zip(*columns, strict=False)
    )
    out: list[tuple[Atom, dict[int, int]]] = []
    if not fits:  # refined in two ways: then nothing may act there
        return [(leaf.root, {leaf.number: 1}) for column in columns for leaf in column]
    for level in zip(*columns, strict=True):
        terms: dict[int, int] = {}
        for (factor, _), leaf in zip(equation.terms, level, strict=True):
            terms[leaf.number] = terms.get(leaf.number, 0) + factor
        out.append((level[0].root, terms))
    return out


def _solved(rows: Iterable[dict[int, int]], wanted: Sequence[int], modulo: int) -> dict[int, int]:
    """Charges of the wanted unknowns, not all zero; {} where all must be."""
    known: dict[int, Row] = {}  # an unknown as a sum of free ones
    uses: dict[int, set[int]] = defaultdict(set)  # a free one is used by these unknowns
    for terms in rows:
        row: Row = {}
        for number, factor in terms.items():
            _add(row, known.get(number, {number: Fraction(1)}), Fraction(factor), modulo)
        if not row:
            continue
        pivot = max(row)  # late unknowns go by early ones
        scale = -1 / row.pop(pivot)
        value: Row = {}
        _add(value, row, scale, modulo)
        for user in uses.pop(pivot, set()):
            part = known[user].pop(pivot, None)
            if part is None:  # it went out again
                continue
            _add(known[user], value, part, modulo)
            for free in known[user]:
                uses[free].add(user)
        known[pivot] = value
        for free in value:
            uses[free].add(pivot)
    sums = [known.get(number, {number: Fraction(1)}) for number in wanted]
    open_ones = sorted({f for s in sums for f in s})
    choices = [{f: 1} for f in open_ones] + [dict.fromkeys(open_ones, 1)]
    best: list[int] = []
    for choice in choices:
        charges = [Fraction(sum(v * choice.get(f, 0) for f, v in s.items())) for s in sums]
        values = _whole(charges, modulo)
        if values and sum(map(bool, values)) > sum(map(bool, best)):
            best = values
    return dict(zip(wanted, best, strict=True)) if best else {}


def _add(row: Row, other: Row, factor: Fraction, modulo: int) -> None:
    """``row += factor * other``, without zeros."""
    for number, value in other.items():
        total = row.get(number, Fraction(0)) + factor * value
        total = total % modulo if modulo and total.denominator == 1 else total
        if total:
            row[number] = total
        else:
            row.pop(number, None)


def _whole(charges: Sequence[Fraction], modulo: int) -> list[int]:
    """The charges scaled to -1, 0 and 1, the first being positive; [] where they are not so."""
    largest = max((abs(c) for c in charges), default=Fraction(0))
    if largest == 0:
        return []
    first = next(c for c in charges if c)
    scaled = [c / (largest if first > 0 else -largest) for c in charges]
    if any(c.denominator != 1 for c in scaled):
        return []
    return [abs(int(c)) if modulo else int(c) for c in scaled]
