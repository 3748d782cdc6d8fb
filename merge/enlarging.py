"""Checkpoints made larger: more layers on a line through those there are, wider ones by copies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from merge import symmetries
from merge.blocks import Blocks
from merge.checkpoint import open_checkpoint
from merge.errors import PlanError, RecipeError
from merge.families.config import relayer
from merge.families.layers import of_stack, place_of
from merge.ir.align import short
from merge.ir.checkpoint import Checkpoint
from merge.ir.derived import Whole
from merge.ir.expr import Expr, linear_sum
from merge.resizing import is_gain
from merge.symmetry.roles import resized
from merge.transport.coupling import Coupling
from merge.transport.mapped import carried, roles_of
from merge.transport.plans import of_index
from merge.transport.scales import rescaled
from merge.widths import sizes_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LINES", "expand", "widen"]

LINES = ("line", "templates")
"""What new layers are made of: a line through the old ones, or mixtures of their templates."""


def expand(
    model: object,
    layers: int,
    *,
    kind: str = "line",
    templates: int | None = None,
    align: bool = True,
) -> Checkpoint:
    """``model`` with any number of layers, made of those that it has.

    kind: ``line``: layer l of L is A + (l - 1) / (L - 1) B, with A and B by least squares over the
    old layers (TLEG; Xia et al. 2024, arXiv:2312.05614), so every new layer is a weighted sum of
    old ones, computed as it is written. ``templates``: the old layers come first, as mixtures of
    ``templates`` shared ones (as many as layers, by default, which keeps them as they are), and new
    ones follow as mixtures orthogonal to them (MixtureGrowth; Pham et al. 2024, arXiv:2311.04251).
    align: units inside of layers (of the feed-forward part, heads) are first brought into the order
    of the layer before, without which their mean means nothing. Both are initialisations for
    further training, not finished models.
    """
    checkpoint = open_checkpoint(model)
    blocks = Blocks.of(checkpoint)
    if kind not in LINES:
        raise RecipeError(
            "layers are not made in that way",
            key="kind",
            found=repr(kind),
            expected=f"one of {', '.join(LINES)}",
        )
    if kind == "templates" and layers < blocks.count:
        raise PlanError(
            "a network of templates only grows",
            found=f"{layers} layers",
            expected=f"{blocks.count} or more",
            do="use kind='line', or merge.shrink",
        )
    if layers < 1:
        raise PlanError("a model has at least one layer", found=layers, expected="1 or more")
    if blocks.count < 2:
        raise PlanError(
            "a line through one layer is not known", model=checkpoint.label, expected="two or more"
        )
    if align:
        from merge.resizing_layers import aligned_layers

        checkpoint = aligned_layers(checkpoint, blocks)
    notes: list[str] = []
    count = templates or blocks.count
    weights = _line(blocks.count, layers)
    shared = of_stack(checkpoint.tensors, blocks.stack)
    rests = _rests(checkpoint, blocks, shared)
    tensors: dict[str, Any] = {}
    for name, expr in checkpoint.tensors.items():
        place = place_of(name)
        if place is None or place[0] != blocks.stack or name in shared:
            tensors[name] = expr
        elif place[1] == 0:
            for new in range(layers) if not tensors.keys() & {name} else ():
                for rest in rests:
                    old = [
                        checkpoint.tensors[f"{blocks.name(n)}{rest}"] for n in range(blocks.count)
                    ]
                    made = (
                        _mixed(old, new, layers, count)
                        if kind == "templates"
                        else _summed(old, weights[new])
                    )
                    tensors[f"{blocks.name(new)}{rest}"] = made
    config = checkpoint.side.config
    near = [round(n * (blocks.count - 1) / max(1, layers - 1)) for n in range(layers)]
    changed = relayer(config, blocks.stack, blocks.count, [(config, n) for n in near])
    notes += [f"config.json: look at {key!r}, which speaks of layers" for key in changed.unsure]
    return replace(
        checkpoint,
        tensors=tensors,
        label=f"expanded({short(checkpoint.label)})",
        tied={a: b for a, b in checkpoint.tied.items() if a in tensors and b in tensors},
        side=checkpoint.side.with_config(changed.config) if config else checkpoint.side,
        notes=(*checkpoint.notes, *notes),
        stored=None,
    )


def _rests(checkpoint: Checkpoint, blocks: Blocks, shared: frozenset[str]) -> list[str]:
    """What names of a layer's tensors end with; PlanError unless every layer has them all."""
    found: dict[int, dict[str, tuple[int, ...]]] = {n: {} for n in range(blocks.count)}
    for name, expr in checkpoint.tensors.items():
        place = place_of(name)
        if place is not None and place[0] == blocks.stack and name not in shared:
            found[place[1]][place[2]] = expr.shape
    odd = next((n for n in found if found[n] != found[0]), None)
    if odd is not None:
        raise PlanError(
            "the layers are not all of one kind",
            model=checkpoint.label,
            layer=blocks.name(odd),
            found=f"{len(found[odd])} tensors",
            expected=f"those of {blocks.name(0)}, in the same shapes",
        )
    return list(found[0])


def _summed(old: Sequence[Expr], weights: Sequence[float]) -> Expr:
    if old[0].dtype.kind != "float":
        return old[0]
    return linear_sum(list(zip(weights, old, strict=True)))


def _mixed(old: Sequence[Expr], number: int, layers: int, templates: int) -> Expr:
    """One tensor of layer ``number`` as a mixture of the old layers' templates."""
    if old[0].dtype.kind != "float" or (number < len(old) == templates):
        return old[min(number, len(old) - 1)]

    def function(*values: Tensor, layer: int, layers: int, templates: int) -> Tensor:
        import torch

        from merge.resize.templates import factorised, grown

        rows = torch.stack([v.reshape(-1) for v in values])
        mixing, shared = factorised(rows, templates)
        every = torch.cat([mixing, grown(mixing, layers - len(values))])
        return (every[layer] @ shared).reshape(values[0].shape).to(values[0].dtype)

    size = math.prod(old[0].shape)
    parameters = (("layer", number), ("layers", layers), ("templates", templates))
    return Whole(
        "mixture", function, tuple(old), parameters, old[0].shape, old[0].dtype,
        scratch=4 * size * len(old),
    )  # fmt: skip


def widen(model: object, widths: Mapping[str, int]) -> Checkpoint:
    """``model`` with wider layers that compute what it computed: units copied in turn.

    What writes a unit is copied, what reads it is shared out among the copies (Net2WiderNet; Chen
    et al. 2016, arXiv:1511.05641), so the function is the same up to rounding. widths: as of
    `merge.shrink`. A group behind norms can only be multiplied: a norm sees how often each unit is
    there. PlanError where sizes do not fit together.
    """
    checkpoint = open_checkpoint(model)
    own = symmetries.symmetry_of(checkpoint)
    config, sizes = sizes_of(checkpoint, own, widths)
    couplings: dict[str, Coupling] = {}
    for group, size in sizes.items():
        import numpy as np

        old = own.groups[group].size
        normed = any(is_gain(own, n, group) for n in own.places(group))
        if size < old or own.groups[group].per or (normed and size % old):
            raise PlanError(
                "a group cannot be made that wide",
                model=checkpoint.label,
                group=group,
                found=size,
                expected=f"a multiple of {old}" if normed else f"{old} or more",
            )
        couplings[group] = Coupling(of_index(np.arange(size) % old, old))
    target, roles = resized(own, sizes), roles_of(own)
    factors = rescaled(
        own, target, couplings, roles, (checkpoint.side.config, config), tied=bool(checkpoint.tied)
    )
    wide = carried(checkpoint, own, target, couplings, factors)
    side = wide.side.with_config(config) if config else wide.side
    found = replace(wide, label=f"widened({short(checkpoint.label)})", side=side)
    symmetries.symmetry_of(found)  # sizes that do not fit together show here
    return found


def _line(old: int, new: int) -> list[list[float]]:
    """For each new layer its weights on the old ones: the least-squares line, read there.

    >>> [[round(w, 9) for w in row] for row in _line(2, 3)]
    [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    """
    places = [n / (old - 1) for n in range(old)]
    mean = sum(places) / old
    spread = sum((p - mean) ** 2 for p in places)
    at = [n / (new - 1) if new > 1 else 0.5 for n in range(new)]
    return [[1 / old + (t - mean) * (p - mean) / spread for p in places] for t in at]
