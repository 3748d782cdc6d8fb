"""What a change of width does to scales that a network's code puts in, and how weights undo it.

Attention divides by the root of a head's width; some embeddings are multiplied by the root of the
model's. A head that is tied to the embedding is moved as one that is written, though it is read:
the last norm's gain makes up for that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge.errors import PlanError
from merge.symmetry.axes import Axis, factors_of
from merge.symmetry.symmetry import Layout, Symmetry
from merge.transport.coupling import Couplings, Roles

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Rescaled", "rescaled"]

_UNSCALED = ("t5", "mt5", "umt5", "longt5", "gpt_neo", "switch_transformers")
"""Model types whose attention is not divided by the root of a head's width."""

_ROOTED = ("gemma", "gemma2", "gemma3_text", "t5gemma")
"""Model types that multiply embeddings by the root of the width, and whose gains are 1 + w."""

_LAST = re.compile(
    r"(^|\.)(ln_f|final_norm|final_layer_norm|final_layernorm|vocab_layer_norm|lm_head\.layer_norm"
    r"|predictions\.transform\.LayerNorm)\.(weight|bias)$|^(model\.)?norm\.(weight|bias)$"
)


@dataclass(frozen=True, slots=True, eq=False)
class Rescaled:
    """A tensor is multiplied by ``scale``, broadcast over it, and ``shift`` is added."""

    scale: NDArray[Any]
    shift: float = 0.0


def rescaled(
    source: Symmetry,
    target: Symmetry,
    couplings: Couplings,
    roles: Roles,
    configs: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {}),
    *,
    tied: bool = False,
) -> dict[str, Rescaled]:
    """By tensor, what is to be done after the couplings; nothing where no width changes.

    configs: config.json of both models. tied: whether the head is the embedding.
    """
    import numpy as np

    out: dict[str, Rescaled] = {}
    changed = [
        g for g, group in source.groups.items()
        if g in target.groups and group.size != target.groups[g].size
    ]  # fmt: skip
    kind = str(configs[0].get("model_type"))
    for group in changed:
        ratio = _attention_ratio(group, source, target, roles, configs)
        if kind in _UNSCALED or ratio is None:
            continue
        for name, layout in target.tensors.items():
            scale = _where(layout, group, ratio)
            if scale is not None:
                out[name] = Rescaled(scale)
    streams = [g for g in changed if g in couplings and _is_embedded(source, g, roles)]
    for group in streams:
        n, m = source.groups[group].size, target.groups[group].size
        root = math.sqrt(n / m) if kind in _ROOTED else 1.0
        tables = _tables(source, group, roles)
        if root != 1.0:
            out |= {name: Rescaled(np.asarray(root)) for name in tables}
        if tied:
            gain = n * couplings[group].plan.b / root
            gain = gain * math.sqrt(m / n) if kind in _UNSCALED else gain
            out |= _last_norm(source, group, gain, shifted=kind in _ROOTED)
    return out


def _attention_ratio(
    group: str,
    source: Symmetry,
    target: Symmetry,
    roles: Roles,
    configs: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> float | None:
    """What queries are multiplied by; None unless the group is what queries and keys share."""
    forms = set()
    for name, layout in source.tensors.items():
        for k, axis in enumerate(layout.axes):
            for factor in factors_of(axis):
                if factor.group == group:
                    if k in roles.inputs[name]:
                        return None
                    forms.add(factor.form)
    if not {"", "*"} <= forms:
        return None
    stated = [c.get("query_pre_attn_scalar") for c in configs]
    if all(isinstance(s, int | float) and s for s in stated):
        return math.sqrt(float(stated[1]) / float(stated[0]))  # type: ignore[arg-type]
    return math.sqrt(target.groups[group].size / source.groups[group].size)


def _where(layout: Layout, group: str, ratio: float) -> NDArray[Any] | None:
    """``ratio`` at the queries of a tensor and 1 elsewhere, to be broadcast; None without any."""
    import numpy as np

    for k, axis in enumerate(layout.axes):
        if not any(f.group == group and not f.form for f in factors_of(axis)):
            continue
        scale = np.concatenate([_part(product, group, ratio) for product in axis.parts])
        shape = [1] * len(layout.axes)
        shape[k] = len(scale)
        return scale.reshape(shape)
    return None


def _part(product: tuple[Any, ...], group: str, ratio: float) -> NDArray[Any]:
    import numpy as np

    found = np.ones(1)
    for factor in product:
        if isinstance(factor, Axis):
            inner = np.concatenate([_part(p, group, ratio) for p in factor.parts])
        else:
            inner = np.full(factor.size, ratio if factor.group == group and not factor.form else 1)
        found = np.outer(found, inner).reshape(-1)
    return found


def _tables(symmetry: Symmetry, group: str, roles: Roles) -> list[str]:
    """Tables of token vectors that write to a group."""
    return [
        n
        for n, layout in symmetry.tensors.items()
        if len(layout.axes) == 2
        and not roles.inputs[n]
        and re.search(r"embed_tokens|word_embeddings|wte|shared|tok_embed|embed_in", n)
        and any(f.group == group for f in factors_of(layout.axes[1]))
    ]


def _is_embedded(symmetry: Symmetry, group: str, roles: Roles) -> bool:
    return bool(_tables(symmetry, group, roles))


def _last_norm(
    symmetry: Symmetry, group: str, gain: NDArray[Any], *, shifted: bool
) -> dict[str, Rescaled]:
    """The last norm's gain and bias times ``gain``, one number for each new unit."""
    found = [
        n
        for n, layout in symmetry.tensors.items()
        if _LAST.search(n) and layout.groups() == [group] and not n.startswith("encoder.")
    ]
    if not found:
        raise PlanError(
            "a model whose head is its embedding changes its width, and its last norm is not known",
            group=group,
            expected="a norm called norm, ln_f, final_layer_norm or the like",
            do="save the model with an lm_head of its own (tie_word_embeddings: false)",
        )
    return {n: Rescaled(gain, float(gain.mean()) - 1.0 if shifted else 0.0) for n in found}
