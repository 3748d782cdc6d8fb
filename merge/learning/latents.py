"""Latent numbers of a layout: the parameters that an optimiser moves, and coefficients from them.

Only this map is differentiated by autograd, over a handful of numbers; what a coefficient does to
the loss comes as inner products of gradients with differences (`merge.learning.parts`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from merge.errors import PlanError, RecipeError
from merge.learning.coefficients import BASE, Block, Coefficients
from merge.learning.layout import Layout, Unit

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SCALE", "Latents"]

SCALE = "(scale)"
"""The name of the row that holds the scale of a softmax."""

_EDGE = 1e-4  # how near to its bounds a sigmoid may start: it has no slope there


class Latents:
    """The rows of a layout as float64 tensors, (operands, width) each, which want gradients.

    init: a number for all operands, one for each, or coefficients, whose blocks or tensors are
    looked up by name. ``rows`` are leaves: give them to any optimiser, and call `project` after
    each of its steps.
    """

    def __init__(
        self, layout: Layout, init: float | Mapping[str, float] | Coefficients = 0.3
    ) -> None:
        import torch

        self.layout = layout
        self.experts = [o for o in layout.operands if o != BASE]
        self.rows: dict[str, Tensor] = {}
        tensor_of: dict[str, str] = {}
        for tensor, members in layout.members.items():
            for row, _ in members:
                tensor_of.setdefault(row, tensor)
        each = {} if isinstance(init, Coefficients) else self._numbers(init)
        for row, width in layout.widths.items():
            first = layout.gates.get(row, width)
            wanted = (
                _looked_up(init, tensor_of[row], layout.operands, width, first)
                if isinstance(init, Coefficients)
                else [[each[o]] * first + [0.0] * (width - first) for o in layout.operands]
            )
            values = torch.tensor(wanted, dtype=torch.float64).reshape(-1, width)
            if layout.shared:
                count = len(self.experts)
                values = torch.cat([values[:count].mean(0, keepdim=True), values[count:]])
            self.rows[row] = self._inverse(row, values).requires_grad_(True)
        if layout.link.kind == "softmax":
            total = (
                torch.tensor(float(sum(each[o] for o in self.experts)))
                if each
                else torch.tensor(_mean_sum(init, layout))  # type: ignore[arg-type]
            )
            self.rows[SCALE] = total.double().reshape(1, 1).requires_grad_(True)
        self.project()

    def _numbers(self, init: float | Mapping[str, float]) -> dict[str, float]:
        if isinstance(init, Mapping):
            missing = [o for o in self.experts if o not in init]
            if missing:
                raise RecipeError(
                    "a start is missing for an expert",
                    key="init",
                    found=", ".join(init),
                    expected=f"a number for {', '.join(missing)}",
                )
            found = {o: float(init[o]) for o in self.experts}
        else:
            found = {o: float(init) for o in self.experts}
        if not all(map(math.isfinite, found.values())):
            raise RecipeError("a coefficient must start at a finite number", key="init", found=init)
        return {**found, BASE: 1.0}

    def _inverse(self, row: str, values: Tensor) -> Tensor:
        """Latent numbers of coefficients."""
        import torch

        link, count = self.layout.link, len(self.experts)
        count = 1 if self.layout.shared else count
        own, rest = values[:count], values[count:]
        if link.kind == "clamp":
            own = own.clamp(link.low, link.high)
        elif link.kind == "sigmoid":
            span = link.high - link.low
            inside = ((own - link.low) / span).clamp(_EDGE, 1 - _EDGE)
            own = torch.logit(inside)
        elif link.kind == "softmax":
            total = own.sum(0, keepdim=True)
            if bool((own < 0).any()) or bool((total <= 0).any()):
                raise RecipeError(
                    "weights that a softmax gives cannot start below zero, or all at it",
                    key="init",
                    block=row,
                    do="start above zero, or take another link",
                )
            own = (own / total).clamp_min(_EDGE).log()
        return torch.cat([own, rest])

    # -- coefficients --------------------------------------------------------------------------
    def coefficients_of(self, tensor: str) -> Tensor:
        """The coefficients of a tensor, (operands, width), as a function of the rows."""
        import torch

        mixed = None
        for row, weight in self.layout.members[tensor]:
            term = self.rows[row] if weight == 1.0 else weight * self.rows[row]
            mixed = term if mixed is None else mixed + term
        assert mixed is not None
        link = self.layout.link
        count = 1 if self.layout.shared else len(self.experts)
        own, rest = mixed[:count], mixed[count:]
        if link.kind == "sigmoid":
            own = link.low + (link.high - link.low) * torch.sigmoid(own)
        elif link.kind == "softmax":
            own = self.rows[SCALE] * torch.softmax(own, 0)
        elif link.kind == "abs":
            own = own.abs()
        if self.layout.shared:
            own = own.expand(len(self.experts), -1)
        return torch.cat([own, rest]) if len(rest) else own

    def rows_of(self, unit: Unit) -> list[Tensor]:
        """The leaves behind a unit."""
        rows = [self.rows[r] for r in unit.rows]
        return [*rows, self.rows[SCALE]] if SCALE in self.rows else rows

    def pull_back(self, gradients: Mapping[str, Tensor]) -> None:
        """Add to the rows' gradients what gradients of coefficients, by tensor, amount to."""
        import torch

        outputs = [self.coefficients_of(n) for n in gradients]
        given = [g.double().reshape_as(o) for g, o in zip(gradients.values(), outputs, strict=True)]
        torch.autograd.backward(outputs, given)

    def project(self, unit: Unit | None = None) -> None:
        """Put clamped rows back into their box: those of a unit, or all."""
        import torch

        link = self.layout.link
        if link.kind != "clamp":
            return
        count = 1 if self.layout.shared else len(self.experts)
        with torch.no_grad():
            for row in self.rows if unit is None else unit.rows:
                self.rows[row][:count].clamp_(link.low, link.high)

    # -- values --------------------------------------------------------------------------------
    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the rows."""
        return {n: t.detach().clone() for n, t in self.rows.items()}

    def restore(self, rows: Mapping[str, Tensor]) -> None:
        """Take over the rows of a snapshot; PlanError where they are of another layout."""
        import torch

        if {n: t.shape for n, t in rows.items()} != {n: t.shape for n, t in self.rows.items()}:
            raise PlanError(
                "saved numbers do not belong to these blocks",
                found=f"{len(rows)} rows",
                expected=f"{len(self.rows)} rows of the same names and sizes",
                do="learn afresh, or with the settings that the state was saved with",
            )
        with torch.no_grad():
            for name, row in self.rows.items():
                row.copy_(rows[name])

    def coefficients(
        self, fixed: Mapping[str, Tensor], prepare: str = "none", seed: int = 0
    ) -> Coefficients:
        """The coefficients as they stand; tensors in ``fixed`` have values of their own."""
        import torch

        tensors: dict[str, list[str]] = {}
        values: dict[str, Tensor] = {}
        kinds = dict(self.layout.kinds)
        with torch.no_grad():
            for name, block in self.layout.blocks.items():
                if name in fixed:
                    block = f"{block} / {name}" if block != name else name
                    values[block] = fixed[name]
                elif block not in values:
                    values[block] = self.coefficients_of(name)
                tensors.setdefault(block, []).append(name)
        link = self.layout.link
        return Coefficients(
            self.layout.operands,
            {
                block: Block(
                    tuple(names),
                    tuple(tuple(float(v) for v in row) for row in values[block].tolist()),
                    kinds[names[0]],
                    self.layout.gates_of(names[0]),
                )
                for block, names in tensors.items()
            },
            prepare,
            self.layout.granularity,
            link.kind,
            (link.low, link.high) if link.kind in ("clamp", "sigmoid") else None,
            seed,
        )


def _looked_up(
    known: Coefficients, tensor: str, operands: Sequence[str], width: int, first: int
) -> list[list[float]]:
    """The numbers of a tensor in other coefficients, spread or averaged to ``width``.

    first: how many of them have the mean; those after them have 0.
    """
    block = known.block_of(tensor) if tensor in known.tensors else None
    out: list[list[float]] = []
    for operand in operands:
        if operand == BASE and BASE not in known.operands:
            out.append([1.0] * width)
            continue
        if block is None or operand not in known.operands:
            raise PlanError(
                "the coefficients to start from lack a tensor or an expert",
                tensor=tensor,
                expert=operand,
                found=f"{len(known.tensors)} tensors, experts {', '.join(known.experts)}",
            )
        at = known.operands.index(operand)
        if len(block.values[at]) == width and (block.gates or width) == first:
            out.append(list(block.values[at]))
        else:
            out.append([block.mean(at)] * first + [0.0] * (width - first))
    return out


def _mean_sum(known: Coefficients, layout: Layout) -> float:
    """The sum over experts of coefficients, the mean over tensors: a softmax's scale."""
    sums = [
        math.fsum(x[0] for x in _looked_up(known, n, layout.operands, 1, 1)[: len(known.experts)])
        for n in layout.tensors
    ]
    return math.fsum(sums) / len(sums)
