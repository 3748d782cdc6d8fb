"""Adapters of the kinds that peft computes: for each module one function of its whole tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from merge.adapters.config import AdapterConfig
from merge.adapters.kinds import Tuner
from merge.adapters.layer import merged_part
from merge.adapters.names import Module
from merge.ir.derived import Whole
from merge.ir.expr import Expr, Parameter

__all__ = ["foreign_changes"]

Sizes = tuple[str, int, int]
"""Path of a layer, and how many features it makes and reads."""


def foreign_changes(
    places: Mapping[str, Module],
    tensors: Mapping[str, Expr],
    given: Mapping[str, Expr],
    shared: Sequence[str],
    config: AdapterConfig,
    tuner: Tuner,
    turned: Mapping[str, bool],
) -> dict[str, Expr]:
    """The weights, and where the tuner changes them the biases, of all modules with the adapter.

    places: the module of each of the model's weights. tensors: the model's. given: the adapter's,
    of which all modules use those that are ``shared``. turned: weights stored as (in, out).
    """
    sizes: list[Sizes] = []
    for place, module in places.items():
        shape = tensors[place].shape
        if len(shape) == 2:
            rows, columns = shape[::-1] if turned[place] else shape
            sizes.append((module.path, rows, columns))
    largest = json.dumps(_largest(sizes) if tuner.shares else [])
    data = json.dumps(dict(config.data), sort_keys=True)
    made: dict[str, Expr] = {}
    for place, module in places.items():
        stem = place.removesuffix("weight")
        own = {p: tensors[stem + p] for p in ("weight", "bias") if stem + p in tensors}
        every = {**own, **{n: given[n] for n in (*module.tensors, *shared)}}
        known: dict[str, Parameter] = {
            "config": data,
            "largest": largest,
            "names": json.dumps(list(every)),
            "path": module.path,
            "shape": _kind(own["weight"].shape, module, turned[place]),
        }
        for part in own:
            if part == "weight" or tuner.biases:
                made[stem + part] = Whole(
                    f"peft's {config.kind}",
                    merged_part,
                    tuple(every.values()),
                    tuple(sorted({**known, "part": part}.items())),
                    own[part].shape,
                    own[part].dtype,
                    4 * math.prod(own["weight"].shape),
                )
    return made


def _largest(sizes: Sequence[Sizes]) -> list[Sizes]:
    """The layer that makes most features, and the one that reads most."""
    return [max(sizes, key=lambda s: s[1]), max(sizes, key=lambda s: s[2])]


def _kind(shape: tuple[int, ...], module: Module, turned: bool) -> str:
    if any("_embedding_" in name for name in module.tensors):
        return "embedding"
    if len(shape) == 1:
        return "norm"
    return "kernel" if len(shape) > 2 else "turned" if turned else "linear"
