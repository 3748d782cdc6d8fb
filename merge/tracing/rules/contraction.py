"""Products of tensors that are summed over axes: maps, attention, bilinear forms.

All are sums over an index space: letters for axes, each operand having some of them. A letter of
both operands that the result keeps is an elementwise product; one that it does not keep is
contracted, and there what is done to one operand is undone in the other.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merge.tracing.atoms import Product
from merge.tracing.labels import Chosen, Label
from merge.tracing.rules.pointwise import aligned, general
from merge.tracing.rules.registry import Call, Ruled, rule, wrap

__all__ = ["multilinear"]


@rule("mm", "mv", "dot", "vdot")
def matrix_product(call: Call) -> Ruled:
    """``(n, m) x (m, p)``, where either may be a vector."""
    names = list(call.arguments)[:2]
    one, other = (call.label(call[n]) for n in names)
    left = "nm" if len(one.axes) == 2 else "m"
    right = "mp" if len(other.axes) == 2 else "m"
    return multilinear(call, one, other, left, right, "np" if right == "mp" else left[:-1])


@rule("bmm")
def batched(call: Call) -> Ruled:
    """``(b, n, m) x (b, m, p)``."""
    one, other = call.label(call["self"]), call.label(call["mat2"])
    return multilinear(call, one, other, "bnm", "bmp", "bnp")


@rule("addmm", "addmv", "addbmm", "baddbmm", "addr", "_addmm_activation")
def added_product(call: Call) -> Ruled:
    """A product and an addend, which is moved as the product is."""
    if call.name == "addr":
        one, other, letters = call.label(call["vec1"]), call.label(call["vec2"]), ("n", "p", "np")
    elif call.name == "addmv":
        one, other, letters = call.label(call["mat"]), call.label(call["vec"]), ("nm", "m", "n")
    elif call.name in ("baddbmm", "addbmm"):
        one, other = call.label(call["batch1"]), call.label(call["batch2"])
        letters = ("bnm", "bmp", "bnp" if call.name == "baddbmm" else "np")
    else:
        one, other, letters = call.label(call["mat1"]), call.label(call["mat2"]), ("nm", "mp", "np")
    product = multilinear(call, one, other, *letters)
    if call["beta"] == 0:
        return product
    for axis, own in aligned([product, call.label(call["self"])], len(product.axes)):
        if axis and own:
            call.book.same(axis, own)
        elif axis:
            call.book.neutral(axis)
    return general(call) if call.name == "_addmm_activation" else product


@rule("linear")
def linear(call: Call) -> Ruled:
    """``x W^T + b`` where the operator was not taken apart."""
    one, weight = call.label(call["input"]), call.label(call["weight"])
    rest = "abcdefgh"[: len(one.axes) - 1]
    out = multilinear(call, one, weight, rest + "i", "oi", rest + "o")
    if isinstance(call["bias"], Tensor):
        call.book.same(out.axes[-1], call.label(call["bias"]).axes[0])
    return out


@rule("bilinear", "_trilinear")
def frozen_bilinear(call: Call) -> Ruled:
    """Left to the rule for what is not known."""
    return None


@rule("linalg_solve_triangular", "triangular_solve")
def solve_triangular(call: Call) -> Ruled:
    """``A X = B`` with triangular A: its order counts; the columns of B and X are moved alike."""
    from merge.tracing.atoms import Reason

    matrix = call.label(call["self"] if call.name[0] == "l" else call["A"])
    label = call.label(call["B"] if call.name[0] == "l" else call["self"])
    reason = Reason("order", f"its order counts in {call.name}")
    left = call["left"] is None or bool(call["left"])
    call.book.freeze([*matrix.axes[-1], *matrix.axes[-2]], reason)
    call.book.freeze(label.axes[-2 if left else -1], reason)
    for axis, own in aligned([label, wrap([*matrix.axes[:-2], (), ()])], len(label.axes)):
        if own:
            call.book.match(axis, own)
            call.book.neutral(own)
            call.book.neutral(axis)
    return label


def multilinear(call: Call, one: Label, other: Label, left: str, right: str, result: str) -> Label:
    """The label of a sum of products; ``left``, ``right`` and ``result`` are letters for axes."""
    ours, theirs = dict(zip(left, one.axes, strict=True)), dict(zip(right, other.axes, strict=True))
    kept: dict[str, Product] = {}
    for letter in dict.fromkeys(left + right):
        a, b = ours.get(letter, ()), theirs.get(letter, ())
        if a and b and letter in result:
            kept[letter] = call.book.times(a, b)
        elif a and b:
            call.book.contract(a, b)
            kept[letter] = a
        elif letter in result:
            kept[letter] = a or b
        else:
            call.book.neutral(a or b)
            kept[letter] = a or b
    letters = list(dict.fromkeys(left + right))
    space = _chosen(one, left, letters) + _chosen(other, right, letters)
    call.book.record(wrap([kept[n] for n in letters], space))
    chosen = _chosen(one, left, result) + _chosen(other, right, result)
    return wrap([kept[n] for n in result], list(dict.fromkeys(chosen)))


def _chosen(label: Label, letters: str, result: Sequence[str]) -> list[Chosen]:
    """What was chosen along axes that the result keeps, counted as in the result."""
    out = []
    for c in label.chosen:
        names = [letters[a] for a in c.axes]
        if all(n in result for n in names):
            axes = tuple(list(result).index(n) for n in names)
            out.append(Chosen(c.selection, c.values, axes))
    return out
