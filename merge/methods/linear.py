"""Weighted average of models: model soups (Wortsman et al. 2022, arXiv:2203.05482).

    out = sum_i w_i W_i            divided by sum_i w_i if normalize

Recipe::

    merge_method: linear
    models:
      - model: a
        parameters: {weight: 0.7}
      - model: b
        parameters: {weight: 0.3}
"""

from merge.errors import RecipeError
from merge.methods.core.schema import Coefficients, PerModel, method


@method(space="weight")
def linear(*, weight: PerModel[float], normalize: bool = True) -> Coefficients:
    """The weighted sum of the models.

    weight: one number a model. normalize: divide by the sum of the weights, which must not be 0.

    >>> linear.function(weight=(3.0, 1.0))
    [0.75, 0.25]
    """
    if not normalize:
        return list(weight)
    total = sum(weight)
    if abs(total) < 1e-8:
        raise RecipeError(
            "the weights of a normalised linear merge sum to 0",
            key="weight",
            found=f"{list(weight)}",
            expected="a sum that is not 0",
            do="change a weight, or set normalize: false to keep the plain sum",
        )
    return [w / total for w in weight]
