"""WiSE-FT: between a model and its fine-tune (Wortsman et al. 2021, arXiv:2109.01903).

    d = W - B
    out = B + alpha * d  =  (1 - alpha) B + alpha W

The fine-tune is better on data like that it was tuned on, the base on shifted data, and points
between them are often better on both. The paper sweeps alpha from 0 to 1 and takes 0.5 where there
is no data to choose it by.

Recipe::

    merge_method: wise_ft
    base_model: base
    models:
      - model: a
    parameters: {alpha: 0.5}
"""

from merge.methods.core.schema import Coefficients, method


@method(space="delta", inputs=(1, 1), idempotent=False)
def wise_ft(*, alpha: float = 0.5) -> Coefficients:
    """The point at fraction ``alpha`` of the straight way from the base to its fine-tune.

    alpha: 0 gives the base, 1 the fine-tune; beyond 1 exaggerates what was learnt, and below 0
    takes it out.

    >>> wise_ft.function(alpha=0.25)
    [0.25]
    """
    return [alpha]
