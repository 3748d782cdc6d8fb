"""Task arithmetic: add scaled task vectors to a base (Ilharco et al. 2023, arXiv:2212.04089).

    d_i = W_i - B
    out = B + lambda * sum_i w_i d_i        the sum divided by sum_i w_i if normalize

A negative weight takes a task out again (negation). If a is to b as c is to d, then adding b with
weight 1 and a with weight -1 to c as the base carries the difference over to d (analogy).

Recipe::

    merge_method: task_arithmetic
    base_model: base
    models:
      - model: a
        parameters: {weight: 0.4}
      - model: b
        parameters: {weight: 0.4}
"""

from merge.methods.core.schema import Coefficients, PerModel, method


@method(space="delta", idempotent=False)
def task_arithmetic(
    *, weight: PerModel[float], normalize: bool = False, lambda_: float = 1.0
) -> Coefficients:
    """The base plus the weighted sum of the differences to it.

    weight: one number a model. lambda: scales the sum. normalize: divide the sum by the sum of the
    weights (unless that is 0).

    >>> task_arithmetic.function(weight=(0.5, 0.25), lambda_=2.0)
    [1.0, 0.5]
    """
    total = sum(weight)
    divisor = total if normalize and abs(total) >= 1e-8 else 1.0
    return [lambda_ * w / divisor for w in weight]
