"""Merges whose coefficients are learned, all by `merge.learn`."""

from collections.abc import Callable, Sequence

import merge
from benchmarks.quality.given import tasks_of
from benchmarks.quality.measure import Right
from benchmarks.quality.rows import RANDOM_SEEDS, Bench, Made, Row

__all__ = ["LEARNED"]

LABELLED = 64
"""Labelled texts of a task for the lines that learn from labels."""

SHORT: dict[str, object] = {"rate": 1e-2, "steps": 60, "schedule": "linear"}
"""Published settings take 500 steps of a rate ten times smaller; the same is reached in 60."""

SCALES = (0.3, 2.0)
"""Scales of task arithmetic, and of TSV-M where that is the start, among the candidates."""


def learned(
    preset: str,
    labelled: int = 0,
    more: bool = False,
    seeds: Sequence[int] = RANDOM_SEEDS,
    **how: object,
) -> Callable[[Bench], Made]:
    """A merge learned by a preset, settings given in place of the preset's own, by several seeds.

    A seed draws the order of the texts. All tensors that no expert moved are left alone: their
    differences are 0.
    """

    def make(bench: Bench) -> Made:
        runs: list[Right] = []
        chosen: list[str] = []
        validation: list[dict[str, float]] = []
        for seed in seeds:
            found = merge.learn(
                dict(bench.made.experts),
                base=bench.base,
                tasks=tasks_of(bench.made, labelled, more, seed),
                preset=preset,
                freeze=("embeddings.*", "pooler.*"),
                batch=None,
                scales=SCALES,
                every=40,
                seed=seed,
                **how,
            )
            runs.append(bench.judge.examined(found.checkpoint.state_dict()))
            chosen.append(found.chosen)
            validation.append({c.name: c.score for c in found.scores})
        settings = {"preset": preset, "chosen": chosen, "validation": validation, **how}
        return Made(tuple(runs), settings)

    return make


LEARNED = (
    Row("task_entropy", "AdaMerging, task-wise, entropy", "inputs",
        learned("adamerging:task", **SHORT)),
    Row("tensor_entropy", "AdaMerging, layer-wise, entropy", "inputs",
        learned("adamerging", **SHORT)),
    Row("task_pseudo", "task-wise, experts' labels", "inputs",
        learned("pseudo_labels", granularity="task", **SHORT)),
    Row("tensor_pseudo", "layer-wise, experts' labels", "inputs",
        learned("pseudo_labels", **SHORT)),
    Row("tensor_few_shot", f"layer-wise, {LABELLED} labels a task", "labels",
        learned("pseudo_labels", LABELLED, objective="cross_entropy", **SHORT)),
    Row("tensor_spectral", "layer-wise on TSV-M's parts, experts' outputs", "inputs",
        learned("spectral_gates", granularity="tensor")),
    Row("spectral_gates", "directions and rows of TSV-M's parts (spectral_gates)", "inputs",
        learned("spectral_gates")),
    Row("spectral_gates_more", "the same, on the experts' training texts too", "more inputs",
        learned("spectral_gates", more=True, seeds=RANDOM_SEEDS[:1])),
)  # fmt: skip
"""Merges that learn; layer-wise means numbers of its own for each tensor."""
