"""Presets: settings of published methods, and of those that did best here.

Where authors' code and paper differ, the code that made the published figures is followed, but for
its faults: clamped coefficients are put back into their box after the step, and so do not freeze
outside it; a batch whose gate lets nothing through costs nothing; and the best of all candidates on
validation data is returned, not the last step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from merge.learning.objectives import (
    Contrastive,
    CrossEntropy,
    Distill,
    Entropy,
    Features,
    Negation,
    PseudoLabels,
)
from merge.learning.settings import Settings

__all__ = ["PRESETS"]

_ADAMERGING = Settings(
    granularity="tensor", objective=Entropy(), rate=1e-3, steps=500, batch=16, init=0.3
)
"""Yang et al. 2024, arXiv:2310.02575."""

_ATLAS = Settings(
    granularity="tensor",
    link="identity",
    init=0.0,
    objective=CrossEntropy(),
    optimiser="adamw",
    rate=1e-3,
    decay=0.1,
    steps=500,
    batch=16,
    clip=1.0,
)
"""Zhang et al. 2024, arXiv:2407.02880."""

_TINTING = Settings(
    granularity="tensor",
    objective=PseudoLabels(gate="none"),
    rate=1e-3,
    free=("*",),
    free_rate=1e-2,
    steps=500,
    batch=32,
)
"""Model Tinting: coefficients, and one layer of each task's own, by default its head."""

PRESETS: Mapping[str, Settings] = {
    "adamerging": _ADAMERGING,
    "adamerging:task": replace(_ADAMERGING, granularity="task"),
    "adamerging++": replace(_ADAMERGING, prepare="ties:0.2:global"),
    "adamerging++:task": replace(_ADAMERGING, granularity="task", prepare="ties:0.2:global"),
    "pseudo_labels": Settings(granularity="tensor", batch=16),
    "atlas": _ATLAS,
    "atlas:partition": replace(_ATLAS, granularity="partition:8"),
    "atlas:few_shot": replace(_ATLAS, schedule="cosine", steps=200),
    "atlas:negation": replace(_ATLAS, objective=Negation()),
    "tinting": _TINTING,
    "tinting++": replace(_TINTING, objective=PseudoLabels(gate="confidence")),
    "self_positioning": Settings(
        granularity="task",
        link="softmax",
        init="uniform",
        objective=Contrastive(),
        rate=1e-2,
        steps=200,
        batch=32,
        pull=1e-2,
    ),
    "spectral_gates": Settings(
        granularity="singular+row",
        prepare="tsv",
        link="identity",
        init=2.0,
        objective=Distill("kl"),
        rate=0.4,
        schedule="linear",
        steps=240,
        batch=8,
    ),
    "surgery": Settings(  # the merge stays what it is, so that no other is a candidate
        granularity="task",
        freeze=(".*",),
        objective=Features("l1"),
        free_rate=1e-3,
        steps=1000,
        batch=16,
        candidates=("start",),
    ),
    "darex": Settings(
        granularity="tensor",
        prepare="dare:0.99",
        link="identity",
        init=1.0,
        objective=Distill("mse", top=5),
        optimiser="adamw",
        rate=1e-2,
        schedule="cosine",
        steps=200,
        batch=8,
    ),
    "soup": Settings(  # Wortsman et al. 2022, arXiv:2203.05482
        granularity="task",
        link="softmax",
        init="uniform",
        objective=CrossEntropy(),
        temperature=True,
        optimiser="adamw",
        rate=5e-2,
        free_rate=5e-2,
        steps=100,
        batch=32,
    ),
}
"""Settings by name."""
