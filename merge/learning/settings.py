"""How a merge is learned: every setting with its default."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

from merge.errors import RecipeError, nearest
from merge.learning.coefficients import Coefficients
from merge.learning.layout import Link
from merge.learning.limits import check_objective, check_settings
from merge.learning.objectives import (
    Contrastive,
    Criterion,
    CrossEntropy,
    Distill,
    Entropy,
    Features,
    LanguageModel,
    Negation,
    Objective,
    Own,
    PseudoLabels,
)
from merge.learning.prepare import preparation

__all__ = ["OBJECTIVES", "Settings", "objective_of", "settings_of"]

OBJECTIVES: Mapping[str, Callable[[], Objective]] = {
    "pseudo_labels": PseudoLabels,
    "pseudo_labels_all": lambda: PseudoLabels(gate="none"),
    "entropy": Entropy,
    "cross_entropy": CrossEntropy,
    "distill": Distill,
    "logits": lambda: Distill("mse"),
    "features": Features,
    "contrastive": Contrastive,
    "language_model": LanguageModel,
    "criterion": Criterion,
    "negation": Negation,
}
"""Objectives by name, as they are without options."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How coefficients are learned.

    granularity: what has numbers of its own: ``scalar``, ``task``, ``group``, ``layer``,
    ``tensor``, ``row``, ``partition:M``, ``singular``. groups: for ``group``, pairs of a pattern
    and the name of a block. prepare: what differences go through (`merge.learning.prepare`). init:
    where the coefficients start: a number, one for each expert by name, or `Coefficients`;
    ``tuned`` starts at the best single scale, ``uniform`` at 1 / experts. link, bounds: see
    `merge.learning.layout.Link`. depth_smooth: layers share this many knots. learn_base: the base
    has coefficients too. freeze: patterns of tensors that stay at their start. dead: what a tensor
    without gradient gets: ``init``, ``zero`` (the base's value) or ``average`` (1 / experts).

    objective: a name, an objective, or a function (out, batch, task, expert's out) -> loss.
    optimiser: ``adam``, ``adamw``, ``sgd``; rate, decay (of weights), steps, schedule of the rate
    (``constant``, ``linear`` to 0, ``cosine`` to 0), clip (largest norm of a step's gradient).
    batch: rows of each task in a step; None takes batches as they are given. pull: weight of the
    squared distance of the coefficients to their start, which is added to the loss. lp: 1 or 2 adds
    ``lp_weight`` times the mean over blocks of the Lp norm of the experts' coefficients (aTLAS).
    temperature: the scores of classes are divided by a temperature of each task, learned at
    free_rate together with the coefficients (learned soups); networks are returned without it.

    every: steps between scores on validation data; patience: scores without gain before it stops.
    holdout: share of the batches that is held out where a task has no ``validate``. candidates:
    what is scored besides the learned coefficients; scales: those that task arithmetic is tried at.

    memory: ``resident``, ``stream``, ``int8``, ``lowrank:R``. rebuild: steps between exact
    rebuildings of the merged tensors. buffers: what becomes of statistics such as BatchNorm's:
    ``base``, ``mean``, ``recalibrate``. free: names of a module's own tensors that are learned too,
    one set for each task, at free_rate; ``*`` is all of them. A layer that is merged may be named,
    too: then each task has it for itself, and starts with its expert's. surgery: a layer behind
    which each task gets a correction of its own, of rank surgery_rank (`merge.learning.surgery`);
    ``""`` is the module itself. keep: bytes of experts' answers that are kept. seed: of the order
    of data, hashed parts and random masks.
    """

    granularity: str = "layer"
    groups: tuple[tuple[str, str], ...] = ()
    prepare: str = "none"
    init: float | Mapping[str, float] | Coefficients | str = 0.3
    link: str = "clamp"
    bounds: tuple[float, float] = (0.0, 1.0)
    depth_smooth: int | None = None
    learn_base: bool = False
    freeze: tuple[str, ...] = ()
    dead: str = "init"
    objective: str | Objective | Callable[..., Any] = "pseudo_labels"
    optimiser: str = "adam"
    rate: float = 5e-3
    decay: float = 0.0
    steps: int = 150
    schedule: str = "constant"
    clip: float | None = None
    batch: int | None = None
    pull: float = 0.0
    lp: int | None = None
    lp_weight: float = 0.5
    temperature: bool = False
    every: int = 25
    patience: int | None = None
    holdout: float = 0.2
    candidates: tuple[str, ...] = ("start", "base", "task_arithmetic")
    scales: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)
    memory: str = "resident"
    rebuild: int = 25
    buffers: str = "base"
    free: tuple[str, ...] = ()
    free_rate: float = 1e-2
    surgery: str | None = None
    surgery_rank: int = 16
    keep: int = 1 << 30
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings({f.name: getattr(self, f.name) for f in fields(self)})
        preparation(self.prepare)
        self.link_of()

    def link_of(self) -> Link:
        """The link with its bounds."""
        return Link(self.link, *self.bounds)


def settings_of(preset: str | None, given: Mapping[str, Any]) -> Settings:
    """The settings of a preset, those that are given in place of its own."""
    from merge.learning.presets import PRESETS

    if preset is not None and preset not in PRESETS:
        near = nearest(preset, PRESETS)
        raise RecipeError(
            "there is no such preset",
            key="preset",
            found=preset,
            expected=f"one of {', '.join(PRESETS)}",
            do=f"did you mean {near!r}?" if near else None,
        )
    start = Settings() if preset is None else PRESETS[preset]
    known = {f.name for f in fields(Settings)}
    for key in given:
        if key not in known:
            near = nearest(key, known)
            raise RecipeError(
                "there is no such setting of learning",
                key=key,
                expected=f"one of {', '.join(sorted(known))}",
                do=f"did you mean {near!r}?" if near else None,
            )
    found = replace(start, **{k: _frozen(v) for k, v in given.items()})
    if preset == "surgery" and found.surgery is None:
        raise RecipeError(
            "it is not said behind which layer of the tasks' networks their corrections are",
            key="surgery",
            expected="surgery: the name of a layer, such as the last one before the head",
        )
    return found


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_frozen(v) for v in value)
    return value


def objective_of(
    value: str | Objective | Callable[..., Any], layer: str | None = None
) -> Objective:
    """The objective that a name or a function stands for.

    layer: where features are compared if the objective names no layer.
    """
    check_objective(value)
    if isinstance(value, Features) and value.layer is None:
        return replace(value, layer=layer)
    if isinstance(value, str):
        if value not in OBJECTIVES:
            near = nearest(value, OBJECTIVES)
            raise RecipeError(
                "there is no such objective",
                key="objective",
                found=value,
                expected=f"one of {', '.join(OBJECTIVES)}",
                do=f"did you mean {near!r}?" if near else None,
            )
        return objective_of(OBJECTIVES[value](), layer)
    if hasattr(value, "loss") and hasattr(value, "needs"):
        return cast(Objective, value)
    if not callable(value):
        raise RecipeError("this is no objective", key="objective", found=type(value).__name__)
    return Own(value)
