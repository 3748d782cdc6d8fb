"""hf-merge: merge and operate on model weights, lazily, in bounded memory.

::

    import merge

    base, math, code = (merge.open(p) for p in ("base", "math", "code"))
    out = merge.ties([math, code], base=base, weight=1.0, density=0.5)   # nothing is read yet
    print(out.plan())                                        # what would be read, written, held
    out.save("merged", dtype="bfloat16")                     # whole or not at all

Every merge method is a function here, ``merge.<method>(models, base=..., **parameters)``; the list
is `merge methods` on the command line. Nothing here imports torch before weights are computed.
"""

from __future__ import annotations

import importlib
from typing import Any

from merge import api as _api
from merge.aligning import align, alignment_report
from merge.analysis.confidence import confidence
from merge.analysis.interpolation import Interpolation, negative_flips
from merge.analysis.task import Task
from merge.api import apply, average, greedy_soup, load_recipe, open, push
from merge.barriers import Barriers, barrier
from merge.comparing import Difference, diff
from merge.converging import convergence
from merge.enlarging import expand, widen
from merge.errors import (
    MergeError,
    OutputRefused,
    PlanError,
    RecipeError,
    ScoreError,
    SinkError,
    SourceError,
)
from merge.extraction import Extraction, extract_lora
from merge.fusing import fuse, fusion_reports
from merge.gathering import gather_statistics
from merge.in_order import regmean_plus_plus
from merge.interpolating import Interpolated, interpolate
from merge.ir.checkpoint import Checkpoint
from merge.learn import apply_coefficients, learn
from merge.learning.coefficients import Coefficients
from merge.learning.soup import Soup, Trial
from merge.learning.sweep import Sweep, sweep
from merge.outcome import Learned
from merge.parting import PartialMerge, pleas
from merge.resizing import shrink
from merge.searches import Tuned, tune
from merge.stitching import stitch
from merge.symmetries import symmetry_of
from merge.task_model import open_task
from merge.task_network import load_task
from merge.training.anchor import AnchorDecay
from merge.training.average import WeightAverage, recalibrate
from merge.training.delta import PushDelta
from merge.training.gradients import coefficient_gradients
from merge.training.replicas import PeriodicMerge
from merge.training.trainer import trainer_callback
from merge.training.wise import WiseSweep
from merge.verify import verify
from merge.zipping import Zipped, zip_models

__version__ = "0.1.0"

__all__ = [
    "AnchorDecay",
    "Barriers",
    "Checkpoint",
    "Coefficients",
    "Difference",
    "Extraction",
    "Interpolated",
    "Interpolation",
    "Learned",
    "MergeError",
    "OutputRefused",
    "PartialMerge",
    "PeriodicMerge",
    "PlanError",
    "PushDelta",
    "RecipeError",
    "ScoreError",
    "SinkError",
    "Soup",
    "SourceError",
    "Sweep",
    "Task",
    "Trial",
    "Tuned",
    "WeightAverage",
    "WiseSweep",
    "Zipped",
    "align",
    "alignment_report",
    "apply",
    "apply_coefficients",
    "average",
    "barrier",
    "coefficient_gradients",
    "confidence",
    "convergence",
    "diff",
    "expand",
    "extract_lora",
    "fuse",
    "fusion_reports",
    "gather_statistics",
    "greedy_soup",
    "interpolate",
    "learn",
    "load_recipe",
    "load_task",
    "negative_flips",
    "open",
    "open_task",
    "pleas",
    "push",
    "recalibrate",
    "regmean_plus_plus",
    "shrink",
    "stitch",
    "sweep",
    "symmetry_of",
    "trainer_callback",
    "tune",
    "verify",
    "widen",
    "zip_models",
]


_LATE = {"MergedModule": "merge.training.module"}
"""Public classes that stand on torch's, which is imported when they are first asked for."""


def __getattr__(name: str) -> Any:
    """``merge.<method>``: a lazy function for every registered method; and what needs torch."""
    from merge import methods

    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)

    if name.startswith("_") or name not in methods.registry():
        raise AttributeError(f"module 'merge' has no attribute {name!r}")
    return _api.method_function(name)


def __dir__() -> list[str]:
    from merge import methods

    return sorted([*__all__, *_LATE, *methods.registry()])
