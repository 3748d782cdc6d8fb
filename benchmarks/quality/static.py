"""Merges that learn nothing, by the library's public functions alone."""

from collections.abc import Callable

import merge
from benchmarks.quality.given import task_of
from benchmarks.quality.measure import Right
from benchmarks.quality.rows import Bench, Made, Row, random, single, tuned

__all__ = ["STATIC"]


def individual(bench: Bench) -> Made:
    """Each expert on its own task."""
    right: Right = {}
    for name, folder in bench.made.experts.items():
        bench.judge.load(merge.open(folder).state_dict())
        right |= bench.judge.right({name: bench.judge.test[name]})
    return Made((right,))


def with_base(
    function: Callable[..., merge.Checkpoint], **parameters: object
) -> Callable[[Bench], merge.Checkpoint]:
    """A merge of all experts by a function of the library."""
    return lambda bench: function(bench.experts, base=bench.base, **parameters)


def dare(bench: Bench, seed: int) -> merge.Checkpoint:
    """Half of each difference, at random, at the usual scale of task arithmetic."""
    return merge.dare_linear(bench.experts, base=bench.base, weight=0.3, density=0.5, seed=seed)


def mean(bench: Bench) -> merge.Checkpoint:
    """The experts' average."""
    return merge.average(bench.experts)


def regmean(bench: Bench) -> merge.Checkpoint:
    """RegMean on the texts of each task that are for learning without labels."""
    known = [
        merge.gather_statistics(folder, task_of(bench.made, name), samples=512).save(
            bench.scratch / f"gram-{name}", replace=True
        )
        for name, folder in bench.made.experts.items()
    ]
    return merge.regmean(bench.experts, statistics=known)


def regmean_plus_plus(bench: Bench) -> merge.Checkpoint:
    """RegMean on the merged layers' own activations, on the same texts."""
    tasks = [task_of(bench.made, name) for name in bench.made.experts]
    return merge.regmean_plus_plus(bench.experts, tasks, samples=512)


STATIC = (
    Row("base", "base", "none", single(lambda bench: merge.open(bench.base))),
    Row("individual", "individual experts (eight models)", "none", individual),
    Row("average", "average", "none", single(mean)),
    Row("model_stock", "Model Stock", "none", single(with_base(merge.model_stock))),
    Row("ta", "task arithmetic, 0.3", "none", single(with_base(merge.task_arithmetic, weight=0.3))),
    Row("ta_tuned", "task arithmetic, tuned", "validation",
        tuned(with_base(merge.task_arithmetic, weight=1.0), (0.2, 0.3, 0.4, 0.5, 0.6, 0.8))),
    Row("ties", "TIES, keep 20 %, scale 1", "none",
        single(with_base(merge.ties, weight=1.0, density=0.2))),
    Row("ties_tuned", "TIES, keep 20 %, tuned", "validation",
        tuned(with_base(merge.ties, weight=1.0, density=0.2), (0.8, 1.0, 1.25, 1.5, 2.0, 2.5))),
    Row("dare", "DARE, keep 50 %, 0.3", "none", random(dare)),
    Row("tsv", "TSV-M, scale 1", "none", single(with_base(merge.tsv))),
    Row("tsv_tuned", "TSV-M, tuned", "validation",
        tuned(with_base(merge.tsv), (1.0, 1.4, 1.7, 2.0, 2.4, 2.8))),
    Row("iso_c_tuned", "Iso-C, tuned", "validation",
        tuned(with_base(merge.iso_c), (1.5, 2.0, 2.4, 2.8, 3.3, 4.0))),
    Row("cart_tuned", "CART, keep 8 %, tuned", "validation",
        tuned(with_base(merge.cart, rank=0.08), (1.0, 1.5, 2.0, 2.5, 3.0, 4.0), mean)),
    Row("regmean", "RegMean", "inputs", single(regmean)),
    Row("regmean_plus_plus", "RegMean++", "inputs", single(regmean_plus_plus)),
    Row("wudi", "WUDI, scale 1", "none", single(with_base(merge.wudi))),
    Row("wudi_tuned", "WUDI, tuned", "validation",
        tuned(with_base(merge.wudi), (0.7, 1.0, 1.3, 1.6, 2.0, 2.5))),
)  # fmt: skip
"""Merges that learn nothing."""
