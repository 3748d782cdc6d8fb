"""The merges that are measured, their recipes, and the speed each is meant to reach."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

WEIGHTS = (0.3, 0.3, 0.4)
DENSITY = 0.5
T = 0.4


@dataclass(frozen=True, slots=True)
class Case:
    """One method: what it merges, and the targets on the b1 models.

    over_floor: body seconds over the floor's, at most.
    times_faster: mergekit's wall seconds over ours, at least; None where it has no such method.
    peak_rss: of our process, in MiB, at most.
    base: whether the base model is read, and whether it is listed among the models, too.
    own and shared: parameters of every model, and of the merge.
    """

    over_floor: float
    times_faster: float | None
    peak_rss: float
    base: Literal["no", "yes", "listed"] = "yes"
    finetunes: int = 3
    weighted: bool = False
    own: Mapping[str, float] = field(default_factory=dict)
    shared: Mapping[str, float] = field(default_factory=dict)

    @property
    def models(self) -> int:
        """How many models are read."""
        return (self.base != "no") + self.finetunes

    def inputs(self, models: Sequence[Path]) -> list[Path]:
        """The folders that this merge reads, out of the base and its fine-tunes."""
        return list(models[1 if self.base == "no" else 0 : 1 + self.finetunes])


_DENSITY = {"density": DENSITY}
_STREAMED = (1.0, 3, 350)
_MEASURED = (2.0, 4, 400)
_RANDOM = (2.5, 12, 400)
_SELECTED = (4.0, 20, 500)
_BEYOND = (4.0, None, 500)

CASES = {
    "linear": Case(*_STREAMED, base="no", weighted=True),
    "task_arithmetic": Case(*_STREAMED, weighted=True),
    "passthrough": Case(*_STREAMED, base="no", finetunes=1),
    "slerp": Case(*_MEASURED, base="listed", finetunes=1, shared={"t": T}),
    "nuslerp": Case(*_MEASURED, base="no", finetunes=2, weighted=True),
    "multislerp": Case(*_MEASURED, base="no", weighted=True),
    "karcher": Case(*_MEASURED, base="no"),
    "model_stock": Case(*_MEASURED),
    "nearswap": Case(*_MEASURED, base="listed", finetunes=1, shared={"t": 1e-3}),
    "ram": Case(*_MEASURED),
    "ramplus_tl": Case(*_MEASURED),
    "dare_linear": Case(*_RANDOM, weighted=True, own=_DENSITY),
    "dare_ties": Case(*_RANDOM, weighted=True, own=_DENSITY),
    "ties": Case(*_SELECTED, weighted=True, own=_DENSITY),
    "breadcrumbs": Case(*_SELECTED, weighted=True, own=_DENSITY),
    "breadcrumbs_ties": Case(*_SELECTED, weighted=True, own=_DENSITY),
    "della": Case(*_SELECTED, weighted=True, own=_DENSITY),
    "della_linear": Case(*_SELECTED, weighted=True, own=_DENSITY),
    "sce": Case(*_SELECTED, shared={"select_topk": 0.5}),
    "arcee_fusion": Case(*_SELECTED, base="listed", finetunes=1),
    "geometric_median": Case(*_BEYOND, base="no"),
    "magmax": Case(*_BEYOND),
    "consensus_ta": Case(*_BEYOND),
    "pcb": Case(*_BEYOND),
}


def recipe(method: str, models: Sequence[Path]) -> str:
    """The YAML that merges the case's share of `models`: the base, then its fine-tunes."""
    case = CASES[method]
    base, finetunes = models[0], models[1 : 1 + case.finetunes]
    lines = [f"merge_method: {method}"]
    if case.base != "no":
        lines.append(f"base_model: {base}")
    lines.append("models:")
    if case.base == "listed":
        lines.append(f"  - model: {base}")
    for folder, weight in zip(finetunes, WEIGHTS, strict=False):
        lines.append(f"  - model: {folder}")
        parameters = {**({"weight": weight} if case.weighted else {}), **case.own}
        if parameters:
            lines.append(f"    parameters: {json.dumps(parameters)}")
    if case.shared:
        lines.append(f"parameters: {json.dumps(dict(case.shared))}")
    return "\n".join([*lines, "dtype: bfloat16", ""])


def linear(models: Sequence[Path]) -> str:
    """The YAML of an evenly weighted average of any number of models."""
    entries = [f"  - model: {folder}\n    parameters: {{weight: 1.0}}" for folder in models]
    return "\n".join(["merge_method: linear", "models:", *entries, "dtype: bfloat16", ""])
