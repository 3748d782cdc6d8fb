"""The merges that are measured, their recipes, and the speed each is meant to reach."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WEIGHTS = (0.3, 0.3, 0.4)
DENSITY = 0.5
T = 0.4


@dataclass(frozen=True, slots=True)
class Case:
    """One method: what it merges, and the targets on the b1 models.

    over_floor: body seconds over the floor's, at most.
    times_faster: mergekit's wall seconds over ours, at least.
    peak_rss: of our process, in MiB, at most.
    """

    over_floor: float
    times_faster: float
    peak_rss: float
    base: bool = True
    finetunes: int = 3
    weighted: bool = False
    density: bool = False

    def inputs(self, models: Sequence[Path]) -> list[Path]:
        """The folders that this merge reads, out of the base and its fine-tunes."""
        return list(models[0 if self.base else 1 : 1 + self.finetunes])


CASES = {
    "linear": Case(1.0, 3, 350, base=False, weighted=True),
    "task_arithmetic": Case(1.0, 3, 350, weighted=True),
    "passthrough": Case(1.0, 3, 350, base=False, finetunes=1),
    "slerp": Case(2.0, 4, 400, finetunes=1),
    "model_stock": Case(2.0, 4, 400),
    "dare_linear": Case(2.5, 12, 400, weighted=True, density=True),
    "dare_ties": Case(2.5, 12, 400, weighted=True, density=True),
    "ties": Case(4.0, 20, 500, weighted=True, density=True),
}


def recipe(method: str, models: Sequence[Path]) -> str:
    """The YAML that merges the case's share of `models`: the base, then its fine-tunes."""
    case = CASES[method]
    base, finetunes = models[0], models[1 : 1 + case.finetunes]
    lines = [f"merge_method: {method}"]
    if case.base:
        lines.append(f"base_model: {base}")
    lines.append("models:")
    if method == "slerp":  # the one method here that lists its base among the models
        lines.append(f"  - model: {base}")
    for folder, weight in zip(finetunes, WEIGHTS, strict=False):
        lines.append(f"  - model: {folder}")
        parameters = []
        if case.weighted:
            parameters.append(f"weight: {weight}")
        if case.density:
            parameters.append(f"density: {DENSITY}")
        if parameters:
            lines.append(f"    parameters: {{{', '.join(parameters)}}}")
    if method == "slerp":
        lines.append(f"parameters: {{t: {T}}}")
    return "\n".join([*lines, "dtype: bfloat16", ""])


def linear(models: Sequence[Path]) -> str:
    """The YAML of an evenly weighted average of any number of models."""
    entries = [f"  - model: {folder}\n    parameters: {{weight: 1.0}}" for folder in models]
    return "\n".join(["merge_method: linear", "models:", *entries, "dtype: bfloat16", ""])
