"""LoRA on parameters that are no module's weight, above all on stacks of experts.

peft keeps one B and one A for all E experts: A is (E r, in), one expert after another, and B is
(out, r E), the expert counting fastest. A stack is (E, out, in), or (E, in, out) where it is stored
turned. Several parameters of one module lie around one another without their names, so that shapes
say which change is whose.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from merge.adapters.lora import Factors
from merge.errors import PlanError
from merge.ir.derived import LowRank, Whole, concat, window
from merge.ir.expr import Expr, linear_sum

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["assign", "with_experts"]


def assign(
    changes: Sequence[tuple[str, Factors]], parameters: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Which parameter each change is of, by shapes; PlanError unless there is exactly one way.

    changes: of one module, each with a name. parameters: the module's, by name.
    """
    ways = list(_ways(list(changes), dict(parameters)))
    if len(ways) != 1:
        raise PlanError(
            "it is not clear which parameters of a module an adapter changes"
            if ways
            else "an adapter's changes of a module's parameters do not fit them",
            tensor=changes[0][0],
            found=", ".join(f"B {list(f[0].shape)}, A {list(f[1].shape)}" for _, f in changes),
            expected=", ".join(f"{n} {list(shape)}" for n, shape in parameters.items()) or "one",
        )
    return ways[0]


def _ways(
    changes: list[tuple[str, Factors]], parameters: dict[str, tuple[int, ...]]
) -> Iterable[dict[str, str]]:
    if not changes:
        yield {}
        return
    (name, factors), *rest = changes
    for parameter, shape in parameters.items():
        if _turned(shape, factors, False) is not None:
            others = {p: s for p, s in parameters.items() if p != parameter}
            for way in _ways(rest, others):
                yield {name: parameter, **way}


def _turned(shape: tuple[int, ...], factors: Factors, square: bool) -> bool | None:
    """Whether each expert is stored as the transpose of its B A; None where neither fits."""
    (out, columns), (rows, inner) = factors[0].shape, factors[1].shape
    if len(shape) != 3 or rows != columns or rows % shape[0]:
        return None
    if (out, inner) == shape[1:]:
        return square and out == inner
    return True if (out, inner) == shape[:0:-1] else None


def with_experts(stack: Expr, factors: Factors, scale: float, square: bool) -> tuple[Expr, int]:
    """The stack with each expert's change, and the rank of one.

    square: whether experts are stored turned where they are square and do not show it.
    """
    left, right = factors
    count = stack.shape[0]
    rank, inner = right.shape[0] // count, right.shape[1]
    turned = _turned(stack.shape, factors, square)
    assert turned is not None, "changes are assigned to what they fit"
    out = left.shape[0]
    parts: list[Expr] = []
    for expert in range(count):
        own = (
            Whole("columns of an expert", _columns, (left,),
                  (("count", count), ("expert", expert)), (out, rank), left.dtype),
            window(right, expert * rank * inner, (rank, inner)),
        )  # fmt: skip
        parts.append(LowRank(own, rank, turned, stack.shape[1:], stack.dtype))
    return linear_sum([(1.0, stack), (scale, concat(parts, stack.shape))]), rank


def _columns(left: Tensor, *, count: int, expert: int) -> Tensor:
    return left.reshape(len(left), -1, count)[:, :, expert].contiguous()
